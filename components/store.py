"""The store: what was prepared and computed, in folders by fingerprint and key, so that nothing is done twice.

``DVQ_STORE`` names it. Without one, components work alone: they keep nothing and find nothing.
"""

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvq import DvqError, events
from dvq.trial import Trial, values

FORMAT = 1
"""The version of a trial's folder."""


@dataclass(frozen=True)
class State:
    """How far a trial is: new, interrupted, failed (and the reason), or finished."""

    name: str
    reason: str = ""


class Store:
    """A folder of trials, data and reports."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    @classmethod
    def from_environment(cls) -> "Store | None":
        """The store that ``DVQ_STORE`` names, if it names one."""
        root = os.environ.get("DVQ_STORE")
        return cls(root) if root else None

    def trial(self, key: str) -> Path:
        return self.root / "trials" / key

    def data(self, fingerprint: str) -> Path:
        return self.root / "data" / fingerprint

    def report(self, sweep: str) -> Path:
        return self.root / "reports" / sweep

    def state(self, key: str) -> State:
        return state(self.trial(key))

    def results(self, key: str) -> dict[str, Any] | None:
        """The finished trial's results.json."""
        return read_json(self.trial(key) / "results.json")


def state(folder: Path) -> State:
    """The state of the trial in ``folder``, read from what is there."""
    if (folder / "results.json").exists():
        return State("finished")
    last = State("new")
    for event in events.read(folder):
        if event["kind"] == "failure":
            last = State("failed", event["reason"])
        elif last.name != "failed":
            last = State("interrupted")
    return last


def begin(folder: Path, trial: Trial, name: str) -> None:
    """An empty folder for a new attempt at ``trial``, with its trial.json; what another attempt left is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    document = {
        "format": FORMAT,
        "name": name,
        "key": trial.key(),
        "attempt": uuid.uuid4().hex,
        "trial": values(trial),
    }
    write_json(folder / "trial.json", document)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at ``path``, None if there is no such file; DvqError if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DvqError(f"{path}: damaged ({error}); delete this trial's folder to compute it anew") from None
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write under another name, sync, and rename: a reader sees the whole file or none."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
