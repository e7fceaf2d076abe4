"""The store: what was prepared and computed, in folders by fingerprint and key, so that nothing is done twice.

``DVQ_STORE`` names it: a folder, or s3://bucket/prefix, of which a folder is then the cache (components/remote.py).
Without one, components work alone: they keep nothing and find nothing.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.folder import State, check_values, clear, damaged, read_json, state
from dvq import DvqError, checkpoint, disk, fingerprints
from dvq.trial import Trial

DID_NOT_START = "it did not start"
DID_NOT_FINISH = "it is not finished: at work now, or interrupted; the log may say why"


@dataclass
class Work:
    """A trial's folder while this process, and no other, works on it."""

    folder: Path
    lock: int | None = None
    """the lock's descriptor: the processes that inherit it hold the lock too"""
    lost: DvqError | None = None
    """why the trial is no longer this worker's"""

    def check(self) -> None:
        """Raise what took the trial away."""
        if self.lost:
            raise self.lost


class Store:
    """A folder of trials, data and reports."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.place = str(self.root)
        """where it is, for messages: a path or an address"""

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

    def data(self, name: str) -> Path:
        return self.root / "data" / fingerprints.of(name)

    def report(self, sweep: str) -> Path:
        return self.root / "reports" / sweep

    def check(self) -> None:
        """DvqError if the store cannot be reached."""
        if self.root.is_file():
            raise DvqError(f"DVQ_STORE: {self.root} is a file; name a folder")

    def check_writing(self) -> None:
        """DvqError if one worker alone could not own a trial here."""

    def look(self, keys: Iterable[str], *names: str) -> None:
        """Look at these trials, and bring the named files: the methods below answer as of the last look."""

    def follow(self, keys: Iterable[str]) -> None:
        """Look at these trials, and bring their events and results."""

    @contextmanager
    def working(self, key: str) -> Iterator[Work]:
        """Work on a trial alone, after waiting for any other process that does; what is done is kept."""
        told = f"trial {key}: another process on this machine is at work on it; waiting for it"
        with disk.locked(self._lock(key), lambda: print(told, flush=True)) as lock:
            yield Work(self.trial(key), lock)

    @contextmanager
    def idle(self, key: str) -> Iterator[None]:
        """Keep others from a trial; DvqError if a process is at work on it."""

        def refuse() -> None:
            raise DvqError(f"trial {key} is being computed by another process; stop that first")

        with disk.locked(self._lock(key), refuse):
            yield

    def remove(self, key: str) -> None:
        """Remove a trial; DvqError if a process is at work on it."""
        with self.idle(key):
            clear(self.trial(key))

    def _lock(self, key: str) -> Path:
        return self.root / "trials" / f".{key}.lock"

    def has_data(self, name: str) -> bool:
        """Whether the store has the prepared dataset."""
        from dvq.data import is_prepared

        return is_prepared(name, self.data(name))

    def fetch_data(self, name: str) -> None:
        """Bring the prepared dataset to its folder, if it is elsewhere."""

    def publish_data(self, name: str) -> None:
        """Give others the prepared dataset that is in its folder."""

    def publish_report(self, sweep: str) -> None:
        """Give others the report that is in its folder."""

    def state(self, key: str) -> State:
        return state(self.trial(key))

    def silent(self, key: str) -> bool:  # noqa: ARG002
        """Whether the trial's last worker has not said that it ended: it is at work, or died. Not known of a local
        folder."""
        return False

    def has(self, key: str, part: str) -> bool:
        """Whether the trial has this file or folder."""
        return (self.trial(key) / part).exists()

    def steps(self, key: str) -> list[int]:
        """The steps of the trial's checkpoints, ascending."""
        return checkpoint.steps(self.trial(key))

    def keys(self) -> list[str]:
        """The keys of all trials in the store, of whatever sweep."""
        return glob.glob("*-*", root_dir=self.root / "trials")

    def families(self, trials: Iterable[Trial]) -> list[str]:
        """The keys of the trials of the same families as these."""
        families = {trial.family() for trial in trials}
        return [key for key in self.keys() if key.rpartition("-")[0] in families]

    def reached(self, trial: Trial) -> int:
        """The step that the trial would go on from: its own last checkpoint's, or, if it was not begun yet, that of a
        shorter trial."""
        own = max(self.steps(trial.key()), default=0)
        shorter = None if self.has(trial.key(), "trial.json") else self._shorter(trial)
        return own or (shorter[0] if shorter else 0)

    def shorter(self, trial: Trial) -> Path | None:
        """The folder of the furthest trial of the same family that this one can go on from now."""
        self.look([trial.key()])
        found = self._shorter(trial)
        return self.bring(found[1]) if found else None

    def bring(self, key: str) -> Path:
        """The trial's folder, with all that the store has of it."""
        return self.trial(key)

    def _shorter(self, trial: Trial) -> tuple[int, str] | None:
        """The latest checkpoint of another trial of the family that this one can go on from: its step, and that
        trial's key."""
        others = (key for key in self.families([trial]) if key != trial.key())
        found = ((step, key) for key in others for step in self.steps(key) if step <= trial.steps)
        return max(found, default=None)

    def results(self, key: str) -> dict[str, Any] | None:
        """The finished trial's results.json; DvqError if it is damaged."""
        path = self.trial(key) / "results.json"
        found = read_json(path) if self.has(key, "results.json") else None
        if found == {}:
            raise damaged(path, "it is empty")
        return found

    def finished(self, trial: Trial) -> dict[str, Any] | None:
        """The trial's results, if it is finished; DvqError if they are damaged, or were computed with another default
        of a field."""
        found = self.results(trial.key())
        if found:
            check_values(trial, found)
        return found

    def outcomes(self, trials: Mapping[str, Trial]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The finished trials' results, and by name why the others are not finished."""
        self.look([trial.key() for trial in trials.values()], "results.json")
        results, reasons = [], {}
        for name, trial in trials.items():
            found = self.finished(trial)
            if found:
                results.append({**found, "name": name})
            else:
                state = self.state(trial.key())
                reasons[name] = state.reason or (DID_NOT_START if state.name == "new" else DID_NOT_FINISH)
        return results, reasons
