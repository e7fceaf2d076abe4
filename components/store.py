"""The store: prepared data and computed trials, by fingerprint and key, so that nothing is done twice.

``DVQ_STORE`` names it: a folder, or s3://bucket/prefix, with a local folder as its cache (components/remote.py).
Without a store, components keep nothing and find nothing.
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
from dvq.data import is_prepared
from dvq.trial import Trial

DID_NOT_START = "it did not start"
DID_NOT_FINISH = "it is not finished: at work now, or interrupted; the log may say why"


@dataclass
class Work:
    """A trial's folder while this process, and no other, works on it."""

    folder: Path
    lock: int | None = None
    """the lock's descriptor; processes that inherit it hold the lock too"""
    lost: DvqError | None = None
    """why this worker has lost the trial"""
    own: bool = True
    """whether its weights and images are the trial's own, so that what is made of them are its results"""

    def check(self) -> None:
        """Raise the reason if this worker has lost the trial."""
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
        """DvqError if the store cannot ensure that a trial has one owner at a time."""

    def look(self, keys: Iterable[str], *parts: str) -> None:
        """Look at these trials and fetch parts of them; the methods below answer as of the last look."""

    def fetch(self, keys: Iterable[str], *parts: str) -> None:
        """Fetch these files and folders of the trials, which were looked at."""

    def follow(self, keys: Iterable[str]) -> None:
        """Look at these trials and fetch their events and results."""

    @contextmanager
    def working(self, key: str) -> Iterator[Work]:
        """Work on a trial alone, after waiting for other processes; what is done is kept."""
        message = f"trial {key}: another process on this machine is at work on it; waiting for it"
        with disk.locked(self._lock(key), lambda: print(message, flush=True)) as lock:
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
        return is_prepared(name, self.data(name))

    def fetch_data(self, name: str) -> None:
        """Fetch the prepared dataset to its folder, if it is elsewhere."""

    def publish_data(self, name: str) -> None:
        """Publish the prepared dataset in its folder."""

    def publish_report(self, sweep: str) -> None:
        """Publish the report in its folder."""

    def state(self, key: str) -> State:
        return state(self.trial(key))

    def silent(self, key: str) -> bool:  # noqa: ARG002
        """Whether the trial's last worker has not reported its end, so it is at work or died; unknown of a local
        folder, hence False."""
        return False

    def has(self, key: str, part: str) -> bool:
        """Whether the trial has this file or folder."""
        return (self.trial(key) / part).exists()

    def steps(self, key: str) -> list[int]:
        """The steps of the trial's checkpoints, ascending."""
        return checkpoint.steps(self.trial(key))

    def keys(self) -> list[str]:
        """The keys of all trials in the store."""
        return glob.glob("*-*", root_dir=self.root / "trials")

    def families(self, trials: Iterable[Trial]) -> list[str]:
        """The keys of the stored trials that are of the same families as these."""
        families = {trial.family() for trial in trials}
        return [key for key in self.keys() if key.rpartition("-")[0] in families]

    def reached_step(self, trial: Trial) -> int:
        """The step from which the trial would go on: that of its own last checkpoint, or, if it was not begun, of a
        shorter trial's."""
        own_step = max(self.steps(trial.key()), default=0)
        shorter_trial = None if self.has(trial.key(), "trial.json") else self._shorter_checkpoint(trial)
        return own_step or (shorter_trial[0] if shorter_trial else 0)

    def shorter_trial(self, trial: Trial) -> Path | None:
        """The folder of the trial of the same family whose last checkpoint takes this one furthest."""
        self.look([trial.key()])
        checkpoint = self._shorter_checkpoint(trial)
        return self.bring(checkpoint[1]) if checkpoint else None

    def bring(self, key: str) -> Path:
        """The trial's folder, with all that the store has of it."""
        return self.trial(key)

    def _shorter_checkpoint(self, trial: Trial) -> tuple[int, str] | None:
        """Step and key of the furthest checkpoint of another trial from which this one can go on."""
        others = (key for key in self.families([trial]) if key != trial.key())
        checkpoints = ((step, key) for key in others for step in self.steps(key) if step <= trial.steps)
        return max(checkpoints, default=None)

    def results(self, key: str) -> dict[str, Any] | None:
        """The finished trial's results.json; DvqError if it is damaged."""
        path = self.trial(key) / "results.json"
        results = read_json(path) if self.has(key, "results.json") else None
        if results == {}:
            raise damaged(path, "it is empty")
        return results

    def finished(self, trial: Trial) -> dict[str, Any] | None:
        """The trial's results, if it is finished; DvqError if they are damaged, or a default was edited since."""
        results = self.results(trial.key())
        if results:
            check_values(trial, results)
        return results

    def outcomes(self, trials: Mapping[str, Trial]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The finished trials' results, and by name the reasons why others are not finished."""
        self.look([trial.key() for trial in trials.values()], "results.json")
        results, reasons = [], {}
        for name, trial in trials.items():
            result = self.finished(trial)
            if result:
                results.append({**result, "name": name})
            else:
                state = self.state(trial.key())
                reasons[name] = state.reason or (DID_NOT_START if state.name == "new" else DID_NOT_FINISH)
        return results, reasons
