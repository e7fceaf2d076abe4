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

from dvq import DvqError, checkpoint, events
from dvq.trial import Trial, values

FORMAT = 1
"""The version of a trial's folder."""


@dataclass(frozen=True)
class State:
    """How far a trial is: new, interrupted, failed (and the reason), or finished."""

    name: str
    reason: str = ""
    step: int = 0
    """where training would go on, by the trial's checkpoints"""


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

    def reached(self, trial: Trial) -> int:
        """The step that the trial would go on from: its own last checkpoint's, or a shorter one's."""
        own = max(checkpoint.steps(self.trial(trial.key())), default=0)
        shorter = self.shorter(trial)
        return own or (shorter[0] if shorter else 0)

    def shorter(self, trial: Trial) -> tuple[int, Path] | None:
        """The latest step that a trial of the same family has a checkpoint of and this one can go on from, and
        that trial's folder."""
        found = []
        for folder in (self.root / "trials").glob(f"{trial.family()}-*"):
            reached = [step for step in checkpoint.steps(folder) if step <= trial.steps]
            if reached and folder.name != trial.key():
                found.append((reached[-1], folder))
        return max(found, default=None)

    def results(self, key: str) -> dict[str, Any] | None:
        """The finished trial's results.json."""
        return read_json(self.trial(key) / "results.json")


def state(folder: Path) -> State:
    """The state of the trial in ``folder``, read from what is there."""
    if (folder / "results.json").exists():
        return State("finished")
    step = max(checkpoint.steps(folder), default=0)
    last = State("interrupted", step=step) if (folder / "checkpoints").exists() else State("new")
    for event in events.read(folder):
        if event["kind"] == "failure":
            last = State("failed", event["reason"], step)
        elif event["kind"] == "state" or last.name == "new":
            last = State("interrupted", step=step)
    return last


def begin(folder: Path, trial: Trial, name: str, shorter: Path | None = None) -> None:
    """The trial's folder, as it was left, or a new one; that may go on from a ``shorter`` trial's checkpoints.

    Raises:
        DvqError: the folder was written by a version with another format.
    """
    document = read_json(folder / "trial.json")
    if document is not None:
        if document["format"] != FORMAT:
            raise DvqError(
                f"{folder} has format {document['format']}, and this version reads {FORMAT}; "
                "compute anew (FRESH=1), or use the version that wrote it"
            )
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for part in ("events", "images", "checkpoints") if shorter else ():
        if shorter and (shorter / part).exists():
            shutil.copytree(shorter / part, folder / part)
    for step in checkpoint.steps(folder):
        if step > trial.steps:
            shutil.rmtree(folder / "checkpoints" / f"{step:09d}")
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
