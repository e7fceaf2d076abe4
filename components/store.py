"""The store: what was prepared and computed, in folders by fingerprint and key, so that nothing is done twice.

``DVQ_STORE`` names it: a folder, or s3://bucket/prefix, of which a folder is then the cache (components/remote.py).
Without one, components work alone: they keep nothing and find nothing.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvq import DvqError, checkpoint, disk, events, fingerprints
from dvq.trial import Trial, values

FORMAT = 1
"""The version of a trial's folder."""
DID_NOT_START = "it did not start"
DID_NOT_FINISH = "it did not finish; the log may say why"


@dataclass(frozen=True)
class State:
    """How far a trial is: new, interrupted, failed (and the reason), or finished."""

    name: str
    reason: str = ""
    step: int = 0
    """where training would go on, by the trial's checkpoints"""


@dataclass
class Work:
    """A trial's folder while this process, and no other, works on it."""

    folder: Path
    lock: int | None = None
    """the lock's descriptor: the processes that inherit it hold the lock too"""
    lost: DvqError | None = None
    """why the trial is this worker's no longer"""

    def check(self) -> None:
        """Raise what took the trial away."""
        if self.lost:
            raise self.lost


class Store:
    """A folder of trials, data and reports."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.place = str(self.root)
        """where it is, as one names it"""

    @classmethod
    def from_environment(cls) -> "Store | None":
        """The store that ``DVQ_STORE`` names, if it names one."""
        place = os.environ.get("DVQ_STORE", "")
        if "://" in place:
            from components.remote import RemoteStore

            return RemoteStore(place)
        return cls(place) if place else None

    def trial(self, key: str) -> Path:
        return self.root / "trials" / key

    def data(self, fingerprint: str) -> Path:
        return self.root / "data" / fingerprint

    def report(self, sweep: str) -> Path:
        return self.root / "reports" / sweep

    def check(self) -> None:
        """DvqError if the store cannot be reached."""

    def look(self, keys: Iterable[str], *names: str) -> None:
        """See how these trials are now, with these files of theirs; what is asked below is as of then."""

    def follow(self, keys: Iterable[str]) -> None:
        """See how these trials are now, and bring their events and results."""

    @contextmanager
    def working(self, key: str) -> Iterator[Work]:
        """Work on a trial, alone: waits while another process does; what is done is kept."""
        told = f"trial {key}: another process on this machine is at work on it; waiting for it"
        with locked(self._lock(key), lambda: print(told, flush=True)) as lock:
            yield Work(self.trial(key), lock)

    def remove(self, key: str) -> None:
        """Remove a trial; DvqError if a process is at work on it."""

        def refuse() -> None:
            raise DvqError(f"trial {key} is being computed by another process; stop that first")

        with locked(self._lock(key), refuse):
            _clear(self.trial(key))

    def _lock(self, key: str) -> Path:
        return self.root / "trials" / f".{key}.lock"

    def has_data(self, name: str) -> bool:
        """Whether the store has the prepared dataset."""
        from dvq.data import is_prepared

        return is_prepared(name, self.data(fingerprints.of(name)))

    def fetch_data(self, fingerprint: str) -> None:
        """Bring the prepared dataset to its folder, if it is elsewhere."""

    def publish_data(self, fingerprint: str) -> None:
        """Give others the prepared dataset that is in its folder."""

    def publish_report(self, sweep: str) -> None:
        """Give others the report that is in its folder."""

    def state(self, key: str) -> State:
        return state(self.trial(key))

    def has(self, key: str, part: str) -> bool:
        """Whether the trial has this file or folder."""
        return (self.trial(key) / part).exists()

    def steps(self, key: str) -> list[int]:
        """The steps of the trial's checkpoints, ascending."""
        return checkpoint.steps(self.trial(key))

    def family(self, trial: Trial) -> list[str]:
        """The keys of the trials of the same family."""
        return [folder.name for folder in (self.root / "trials").glob(f"{trial.family()}-*")]

    def reached(self, trial: Trial) -> int:
        """The step that the trial would go on from: its own last checkpoint's, or, unless it was begun, a shorter
        one's."""
        own = max(self.steps(trial.key()), default=0)
        shorter = None if self.has(trial.key(), "trial.json") else self._shorter(trial)
        return own or (shorter[0] if shorter else 0)

    def shorter(self, trial: Trial) -> Path | None:
        """The folder of the trial of the same family that this one can go on from, the furthest one's."""
        found = self._shorter(trial)
        return self.bring(found[1]) if found else None

    def bring(self, key: str) -> Path:
        """The trial's folder, with all that the store has of it."""
        return self.trial(key)

    def _shorter(self, trial: Trial) -> tuple[int, str] | None:
        """The latest step that another trial of the family has a checkpoint of and this one can go on from, and
        that trial's key."""
        found = []
        for key in self.family(trial):
            reached = [step for step in self.steps(key) if step <= trial.steps]
            if reached and key != trial.key():
                found.append((reached[-1], key))
        return max(found, default=None)

    def results(self, key: str) -> dict[str, Any] | None:
        """The finished trial's results.json."""
        return read_json(self.trial(key) / "results.json") if self.has(key, "results.json") else None

    def outcomes(self, trials: Mapping[str, Trial]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The finished trials' results, and of the others the reasons, by name."""
        self.look([trial.key() for trial in trials.values()], "results.json")
        results, reasons = [], {}
        for name, trial in trials.items():
            found = self.results(trial.key())
            if found:
                results.append({**found, "name": name})
            else:
                state = self.state(trial.key())
                reasons[name] = state.reason or (DID_NOT_START if state.name == "new" else DID_NOT_FINISH)
        return results, reasons


@contextmanager
def locked(path: Path, busy: Callable[[], None]) -> Iterator[int]:
    """Hold the lock that is the file ``path``; ``busy`` is called before waiting for one that another process
    holds. The system gives it back when the last process that has it ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


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
    _clear(folder)
    folder.mkdir(parents=True)
    if shorter:
        _copy(shorter, folder)
    for step in checkpoint.steps(folder):
        if step > trial.steps:
            shutil.rmtree(folder / "checkpoints" / f"{step:09d}")
    _forget_end(folder)
    document = {
        "format": FORMAT,
        "name": name,
        "key": trial.key(),
        "attempt": uuid.uuid4().hex,
        "trial": values(trial),
    }
    write_json(folder / "trial.json", document)


def _copy(shorter: Path, folder: Path) -> None:
    """Copy what training goes on from; what grows, and what a checkpoint counts on, after it."""
    for part in ("checkpoints", "images", "events"):
        if (shorter / part).exists():
            try:
                shutil.copytree(shorter / part, folder / part, ignore=shutil.ignore_patterns(".partial-*"))
            except shutil.Error as error:
                raise DvqError(_because(shorter, [str(why) for *_, why in error.args[0]])) from None


def _because(shorter: Path, reasons: list[str]) -> str:
    """Why a shorter trial's files could not be copied."""
    others = [why for why in reasons if "No such file" not in why]
    if others:
        return f"{shorter} cannot be copied, to go on from it ({others[0]})"
    return f"{shorter} changed while it was copied, for it is in training; the same command tries again"


def _clear(folder: Path) -> None:
    """Remove a trial's folder, if it is there."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DvqError(f"{error.filename or folder} cannot be removed ({error.strerror})") from None


def _forget_end(folder: Path) -> None:
    """Leave out the events after the last checkpoint: who follows them would see the shorter trial's end."""
    for step in checkpoint.steps(folder)[-1:]:
        with suppress(DvqError):  # damaged: training goes on from the one before, and says so
            about = read_json(folder / "checkpoints" / f"{step:09d}" / "checkpoint.json") or {}
            events.truncate(folder, about.get("events", {}))


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
    """Write the JSON object at ``path``, whole or not at all."""
    disk.replace(path, json.dumps(content, indent=1) + "\n")
