"""Show the progress of a sweep, from the store, until it ends."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from components.folder import begin
from components.store import Store
from dvq.events import Tail
from dvq.sweep import Sweep
from dvq.trial import Trial
from pipeline.profile import Profile
from pipeline.progress import FINISHED, LOOK, LiveTable, PlainLines, Row


@dataclass(frozen=True)
class Job:
    """A sweep that was checked and can start."""

    sweep: Sweep
    trials: Mapping[str, Trial]
    store: Store
    arguments: Mapping[str, str]
    jobs: int
    folder: Path
    """of this launch's log"""
    profile: Profile | None
    """of the containers or pods; None if the tasks are processes"""

    @property
    def data(self) -> str:
        """The name of its images."""
        return self.arguments["data_name"]

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


def rows(job: Job) -> list[Row]:
    """A row for each trial, as the store has it."""
    return [_row(name, trial, job.store) for name, trial in job.trials.items()]


def _row(name: str, trial: Trial, store: Store) -> Row:
    row = Row(name, trial, Tail(store.trial(trial.key())))
    results = store.finished(trial)
    if results:
        row.state, row.step, row.bits_per_dim = FINISHED, trial.steps, results["evaluation"]["bits_per_dim"]
        row.news.append(f"{FINISHED} before: {row.bits_per_dim:.3f} bits/dim")
    else:
        row.step = store.reached_step(trial)
    return row


def watch(
    job: Job, shown: list[Row], since: float, console: Console, look: Callable[[], tuple[bool, str]]
) -> None:
    """Show the trials' progress after the time ``since``, until ``look`` returns True; it also returns a note on what
    else is going on."""
    screen = LiveTable(console, job.jobs) if console.is_interactive else PlainLines(console)
    with screen:
        while True:
            ended, note = look()
            for row in shown:
                if row.state != FINISHED:  # these have no more news, and there may be a thousand
                    row.update(since)
            screen.show(shown, "" if ended else note)
            if ended:
                return
            time.sleep(LOOK)
