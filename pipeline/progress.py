"""The display of a running sweep: a live table in a terminal, plain lines elsewhere and where TERM is dumb.

Both are drawn from the events that the tasks append to the trials' folders in the store.
"""

import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.constrain import Constrain
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dvq.events import Tail
from dvq.trial import Trial

WAITING, TRAINING, FINISHED, FAILED = "waiting", "training", "finished", "failed"
STYLES = {WAITING: "dim", FINISHED: "green", FAILED: "red"}
LOOK = 0.5
"""Seconds between two looks at the events."""
MARGIN = 3
"""Columns that the live table leaves free for the ^C that a terminal prints, which would break its last line."""
REASONS, LONGEST = 2, 120
"""Failures whose reasons are shown under the live table, and characters of each, at most."""
NUMBERS = 45
"""Columns of the live table beside the names and the steps."""


@dataclass
class Row:
    """A trial as the table shows it."""

    name: str
    trial: Trial
    tail: Tail
    state: str = WAITING
    reason: str = ""
    step: int = 0
    base: int = 0  # the first step that was seen since training last began
    images_per_second: float | None = None
    bits_per_dim: float | None = None
    evaluated: bool = False  # whether bits_per_dim is an evaluation's, not the training curve's
    began: float = 0.0  # its time; 0 if there is none
    at: float = 0.0  # the last step's time
    news: list[str] = field(default_factory=list)
    """what happened since this was last emptied, in words"""

    def update(self, since: float) -> None:
        """Take in what happened after the time ``since`` [seconds since 1970]."""
        for event in self.tail.fresh():
            if event["time"] >= since:
                self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        if event["kind"] == "state":
            self.state = event["state"]
            if self.state == TRAINING:  # perhaps again, from an earlier step
                self.began = self.at = 0.0
            has_result = self.state == FINISHED and self.bits_per_dim
            self.news.append(f"{FINISHED}: {self.bits_per_dim:.3f} bits/dim" if has_result else self.state)
        elif event["kind"] == "failure":
            self.state, self.reason = FAILED, event["reason"]
            self.news.append(f"{FAILED}: {self.reason}")
        elif event["kind"] == "metrics":
            self._measure(event["step"], event["values"], event["time"])

    def _measure(self, step: int, values: dict[str, float], at: float) -> None:
        if not self.began:
            self.state, self.began, self.base = TRAINING, at, step
        self.step, self.at = step, at
        self.images_per_second = values.get("images_per_second", self.images_per_second)
        evaluated = values.get(f"{self.trial.split}/bits_per_dim")
        if evaluated is not None:
            self.bits_per_dim, self.evaluated = evaluated, True
            speed = f", {self.images_per_second:.0f} images/s" if self.images_per_second else ""
            remaining = f", {clock(self.seconds_left())} left" if self.seconds_left() else ""
            self.news.append(f"step {step}/{self.trial.steps}: {evaluated:.3f} bits/dim{speed}{remaining}")
        elif not self.evaluated:
            self.bits_per_dim = values.get("train/bits_per_dim", self.bits_per_dim)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Seconds until the last step, evaluations along the way included; None while nothing is known."""
        over = self.state != TRAINING or self.step >= self.trial.steps
        if over or self.step <= self.base or self.at <= self.began:
            return None
        remaining = (self.trial.steps - self.step) * (self.at - self.began) / (self.step - self.base)
        return max(0.0, remaining - ((now or self.at) - self.at))


class LiveTable:
    """The table, drawn in place."""

    def __init__(self, console: Console, jobs: int) -> None:
        self._console, self._jobs, self._began = console, jobs, time.time()
        self._live = Live(console=console, auto_refresh=False)

    def show(self, rows: list[Row], note: str) -> None:
        for row in rows:
            row.news.clear()
        reasons = 2 * min(REASONS, sum(row.state == FAILED for row in rows))
        height, width = max(3, self._console.height - 6 - reasons), self._console.width - MARGIN
        drawn = table(rows, note, self._jobs, time.time() - self._began, height, width)
        self._live.update(Constrain(drawn, width), refresh=True)

    def __enter__(self) -> "LiveTable":
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()


class PlainLines:
    """A line for each change of state and each evaluation."""

    def __init__(self, console: Console) -> None:
        self._console, self._note = console, ""

    def show(self, rows: list[Row], note: str) -> None:
        for row in rows:
            for news in row.news:
                self._print(f"{row.name}  {news}")
            row.news.clear()
        if note and note != self._note:
            self._print(note)
            self._note = note

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "PlainLines":
        return self

    def __exit__(self, *exception: object) -> None:
        pass


def table(rows: list[Row], note: str, jobs: int, elapsed: float, height: int, width: int) -> Table:
    """The rows as a table of at most ``height`` lines: running trials first, then failed ones, with their reasons
    under the table. Where ``width`` is too small, names are shortened, not numbers."""
    drawn = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption_style="")
    drawn.add_column("trial", no_wrap=True)
    drawn.add_column("state")  # the only one that wraps
    for title in ("step", "images/s", "bits/dim", "time left"):
        drawn.add_column(title, justify="right", no_wrap=True)
    shown = rows if len(rows) <= height else sorted(rows, key=_urgency)[: height - 1]
    now, longest = time.time(), max((len(f"{row.trial.steps}/{row.trial.steps}") for row in rows), default=0)
    for row in shown:
        texts = _cells(row, now, width - NUMBERS - longest)
        cells = (Text(text, no_wrap=True, overflow="ellipsis") for text in texts)
        drawn.add_row(*cells, style=STYLES.get(row.state, ""))
    if len(shown) < len(rows):
        drawn.add_row(f"… {len(rows) - len(shown)} more", style="dim")
    failed = [row for row in rows if row.state == FAILED]
    reasons = [f"{shorten(row.name, 30)}: {row.reason}" for row in failed[:REASONS]]
    reason_text = "".join(
        f"\n{reason if len(reason) <= LONGEST else reason[: LONGEST - 1] + '…'}" for reason in reasons
    )
    drawn.caption = Text(_caption(rows, note, jobs, elapsed, now) + reason_text)
    return drawn


def _urgency(row: Row) -> int:
    return {FAILED: 1, WAITING: 2, FINISHED: 3}.get(row.state, 0)


def shorten(name: str, width: int) -> str:
    """``name`` without its middle if it is longer than ``width`` (at least 16); its end, and a seed that something
    follows, tell trials apart and stay."""
    width = max(width, 16)
    if len(name) <= width:
        return name
    half = (width - 1) // 2
    seeded = re.match(r".*?-k\d+-s\d+(?=-)", name)
    begin = seeded.end() if seeded and seeded.end() <= width - 8 else width - 1 - half
    return f"{name[:begin]}…{name[begin + 1 - width :]}"


def _cells(row: Row, now: float, width: int) -> Iterable[str]:
    seconds = row.seconds_left(now)
    speed, bits = row.images_per_second, row.bits_per_dim
    return (
        shorten(row.name, width),
        row.state,
        f"{row.step}/{row.trial.steps}" if row.step else "",
        f"{speed:.0f}" if speed and row.state not in (FINISHED, FAILED) else "",
        (f"{bits:.3f}" if bits < 1000 else f"{bits:.2g}") + " train" * (not row.evaluated) if bits else "",
        clock(seconds),
    )


def _caption(rows: list[Row], note: str, jobs: int, elapsed: float, now: float) -> str:
    counts = Counter(row.state for row in rows)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    seconds = sweep_seconds_left(rows, jobs, now)
    remaining = f" · about {clock(seconds)} left" if seconds else ""
    return f"{states} · {clock(elapsed)} gone{remaining}" + (f"\n{note}" if note else "")


def sweep_seconds_left(rows: list[Row], jobs: int, now: float) -> float | None:
    """A guess: trials of which nothing is known yet will take as long per step as the others on average."""
    running = [(row, seconds) for row in rows if (seconds := row.seconds_left(now)) is not None]
    if not running:
        return None
    per_step = fmean((row.at - row.began) / (row.step - row.base) for row, _ in running)
    others = (row for row in rows if row.state not in (FINISHED, FAILED) and row.seconds_left(now) is None)
    waiting = sum((row.trial.steps - row.step) * per_step for row in others)
    remaining = [seconds for _, seconds in running]
    return max(max(remaining), (sum(remaining) + waiting) / jobs)


def clock(seconds: float | None) -> str:
    """``1:05``, ``2:03:04``."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
