"""A sweep that was checked and can start; and what ``FRESH=1`` removes of it first."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from components.folder import begin
from components.store import Store
from dvq.sweep import Sweep
from dvq.trial import Trial
from pipeline.profile import Profile


@dataclass(frozen=True)
class Job:
    """A sweep that was checked and can start."""

    sweep: Sweep
    trials: Mapping[str, Trial]
    store: Store
    source: str
    """where its images come from, as prepare_data takes it"""
    jobs: int
    folder: Path
    """of this launch's log"""
    profile: Profile | None
    """of the containers or pods; None if the tasks are processes"""

    @property
    def data(self) -> str:
        """The name of its images."""
        return next(iter(self.trials.values())).data

    @property
    def arguments(self) -> dict[str, str]:
        """The parameters of the pipeline (pipeline/definition.py)."""
        return {
            "sweep": self.sweep.model_dump_json(),
            "base": json.dumps(self.sweep.base),
            "data_name": self.data,
            "source": self.source,
            "experiment": self.sweep.name,
        }

    def keys(self) -> list[str]:
        """The trials' keys."""
        return [trial.key() for trial in self.trials.values()]


def remove(job: Job) -> None:
    """Remove the sweep's trials from the store, print which, and begin those that would go on from shorter ones, so
    that they do not."""
    removed = [name for name, trial in job.trials.items() if job.store.has(trial.key(), "trial.json")]
    for name in removed:  # DvqError for one at work, before any is removed
        with job.store.idle(job.trials[name].key()):
            pass
    for name in removed:
        job.store.remove(job.trials[name].key())
    print(f"removed from {job.store.place}: {', '.join(removed) or 'nothing'}")
    for name, trial in job.trials.items():
        if job.store.reached_step(trial):
            with job.store.working(trial.key()) as work:
                begin(work.folder, trial, name)
    job.store.look(job.keys())
