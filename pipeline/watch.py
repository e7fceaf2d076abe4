"""Show the progress of a sweep, from the store, until it ends."""

import time
from collections.abc import Callable

from rich.console import Console

from components.store import Store
from dvq.events import Tail
from dvq.trial import Trial
from pipeline.job import Job
from pipeline.progress import FINISHED, LOOK, LiveTable, PlainLines, Row


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
