"""What the live table and the plain lines say, from the events that tasks write."""

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from components.store import Store
from dvq import events as diary
from dvq.config import trial as make_trial
from dvq.events import Events, Tail
from dvq.sweep import Sweep
from pipeline.job import Job
from pipeline.progress import MARGIN, LiveTable, PlainLines, Row, clock, shorten, sweep_seconds_left, table
from pipeline.watch import watch

TRIAL = make_trial({"estimator": "gs-soft", "steps": 100, "batch_size": 10})


def row(folder: Path, name: str = "gs-soft-c512-k8-s0") -> Row:
    return Row(name, TRIAL, Tail(folder))


def text(*rows: Row, height: int = 20, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(list(rows), "", 2, 61, height, width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_events_are_read_once_and_only_whole_lines(tmp_path: Path) -> None:
    tail = Tail(tmp_path)
    assert list(tail.fresh()) == []
    events = Events(tmp_path)
    events.state("training")
    assert [event["state"] for event in tail.fresh()] == ["training"]
    assert list(tail.fresh()) == []
    path = tmp_path / "events" / "000000.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "failu')
    assert list(tail.fresh()) == []
    path.write_text(whole + '{"kind": "failure", "time": 1, "reason": "x"}\n')
    assert [event["reason"] for event in tail.fresh()] == ["x"]


def test_a_new_attempt_is_read_from_its_beginning(tmp_path: Path) -> None:
    tail = Tail(tmp_path)
    for _ in range(3):
        Events(tmp_path).state("training")
    assert len(list(tail.fresh())) == 3
    for path in (tmp_path / "events").glob("*"):
        path.unlink()
    list(tail.fresh())
    Events(tmp_path).state("evaluating")
    assert [event["state"] for event in tail.fresh()] == ["evaluating"]


def test_training_that_goes_on_is_followed(tmp_path: Path) -> None:
    """What is forgotten for being computed again is not taken for what comes."""
    events = Events(tmp_path)
    events.state("training")
    place = diary.sizes(tmp_path)
    Events(tmp_path).state("interrupted")
    tail = Tail(tmp_path)
    assert len(list(tail.fresh())) == 2
    diary.truncate(tmp_path, place)
    Events(tmp_path).state("training")
    assert [event["state"] for event in tail.fresh()] == ["training"]
    assert [event["state"] for event in diary.read(tmp_path)] == ["training", "training"]


@pytest.mark.parametrize("split", ["test", "tune"])
def test_a_row_goes_through_its_states(split: str, tmp_path: Path) -> None:
    one, events = row(tmp_path), Events(tmp_path)
    one.trial = TRIAL.model_copy(update={"split": split})
    assert "waiting" in text(one)
    events.state("training")
    events.metrics(20, {"train/bits_per_dim": 7.5, "images_per_second": 105.0})
    one.update(0)
    assert [part in text(one) for part in ("training", "20/100", "105", "7.500 train")] == [True] * 4
    events.metrics(20, {f"{split}/bits_per_dim": 7.25})
    events.metrics(40, {"train/bits_per_dim": 7.0})
    one.update(0)
    assert "7.250" in text(one), "an evaluation is worth more than a later training batch"
    assert "train" not in text(one).replace("training", "")
    events.state("finished")
    one.update(0)
    assert "finished" in text(one)


def test_a_failure_is_shown_with_its_reason(tmp_path: Path) -> None:
    one, events = row(tmp_path), Events(tmp_path)
    events.failure("out of [memory]")
    one.update(0)
    assert "failed" in text(one).splitlines()[1]
    assert text(one).splitlines()[-1].strip() == "gs-soft-c512-k8-s0: out of [memory]"


def test_what_happened_before_this_launch_is_not_shown(tmp_path: Path) -> None:
    one = row(tmp_path)
    Events(tmp_path).failure("yesterday's")
    one.update(time.time() + 1)
    assert one.state == "waiting"


def test_a_trial_that_was_under_way_before_anybody_looked_is_training(tmp_path: Path) -> None:
    events, shown = Events(tmp_path), row(tmp_path)
    events.state("training")
    events.metrics(20, {})
    since = time.time()
    time.sleep(0.01)
    for step in (40, 60):
        events.metrics(step, {"images_per_second": 10.0})
        shown.update(since)
        time.sleep(0.01)
    assert (shown.state, shown.step, shown.base) == ("training", 60, 40)
    left = shown.seconds_left()
    assert left is not None
    assert 0 < left < 10


def test_time_left_of_a_run_that_is_shown_from_its_beginning_is_by_all_of_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it had come to step 60 when the launcher looked."""
    events, shown = Events(tmp_path), row(tmp_path)
    shown.step = shown.base = 60
    monkeypatch.setattr(time, "time", lambda: 100.0)
    events.state("training")
    for step in (20, 40, 60, 62):
        monkeypatch.setattr(time, "time", lambda at=100 + step / 2: at)
        events.metrics(step, {})
    shown.update(0)
    assert shown.seconds_left() == pytest.approx(19)


@pytest.mark.parametrize("again", [40, 20], ids=["at its last point", "from an earlier checkpoint"])
def test_time_left_is_not_by_the_time_that_a_trial_lay_still(
    again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a cluster took the pod's node for five hours."""
    events, shown = Events(tmp_path), row(tmp_path)
    for began, steps in ((100, (20, 40)), (18_000, range(again, 61, 20))):
        monkeypatch.setattr(time, "time", lambda at=began: at)
        events.state("training")
        for number, step in enumerate(steps, start=1):
            monkeypatch.setattr(time, "time", lambda at=began + 10 * number: at)
            events.metrics(step, {})
    shown.update(0)
    assert shown.seconds_left() == pytest.approx(20)


def test_time_left_follows_the_steps(tmp_path: Path) -> None:
    one, other = row(tmp_path), row(tmp_path)
    one.state, one.began, one.at, one.step = "training", 100.0, 110.0, 20  # half a second a step
    assert one.seconds_left(110.0) == pytest.approx(40)
    assert one.seconds_left(115.0) == pytest.approx(35)
    assert other.seconds_left(115.0) is None
    assert sweep_seconds_left([one, other], jobs=1, now=110.0) == pytest.approx(90)
    assert sweep_seconds_left([one, other], jobs=2, now=110.0) == pytest.approx(45)
    one.base = other.step = 10  # steps of an earlier launch: a second a step
    assert sweep_seconds_left([one, other], jobs=1, now=110.0) == pytest.approx(80 + 90)
    other.state = "training"
    assert sweep_seconds_left([one, other], jobs=2, now=110.0) == pytest.approx(85), "it has just begun"
    other.state, other.at, other.step = "interrupted", 110.0, 20
    assert other.seconds_left(110.0) is None, "nobody trains it now"
    one.step = 100
    assert one.seconds_left(110.0) is None, "evaluation and analysis are still to come"
    assert (clock(65), clock(3723)) == ("1:05", "1:02:03")


def test_a_long_table_shows_what_moves(tmp_path: Path) -> None:
    rows = [row(tmp_path, f"trial-{number}") for number in range(30)]
    rows[29].state = "training"
    rows[28].state, rows[28].reason = "failed", "why not"
    shown = text(*rows, height=5)
    assert all(part in shown for part in ("trial-29", "why not", "26 more", "28 waiting"))
    assert "trial-9" not in shown


def test_numbers_stay_whole_in_a_narrow_terminal(tmp_path: Path) -> None:
    names = [f"gs-soft-c512-k16-s0-learning-rate-{rate}-temperature-0.5" for rate in (0.001, 0.002)]
    rows = [row(tmp_path, name) for name in names]
    for one in rows:
        one.state, one.reason, one.step, one.bits_per_dim = "failed", "why not " * 20, 100, 7.25
        one.trial = TRIAL.model_copy(update={"steps": 100_000})
    shown = text(*rows, width=77).splitlines()
    assert [len(line) <= 77 for line in shown] == [True] * len(shown)
    assert len(shown) == 4 + 2 * 2, "a line a trial, and two for each reason"
    assert ["100/100000" in line and "7.250" in line and "…" in line for line in shown[1:3]] == [True] * 2
    assert shown[0].split() == ["trial", "state", "step", "images/s", "bits/dim", "time", "left"]
    assert shorten("gs-soft-c256-k16-s0", 19) == "gs-soft-c256-k16-s0"
    assert shorten("gs-soft-c256-k16-s10", 19) == "gs-soft-c…6-k16-s10"
    long = "vq-ema-c64-k4-s{}-code-dim-4-codebook-init-kmeans"
    assert shorten(long.format(0), 30) == "vq-ema-c64-k4-s0…k-init-kmeans"
    assert len({shorten(long.format(seed), 30) for seed in range(12)}) == 12
    assert shorten("gs-soft-c256-k16-s10", 5) == "gs-soft-…k16-s10", "never less than 16"


def test_the_live_table_leaves_the_margin_to_the_terminal(tmp_path: Path) -> None:
    """Where it prints ^C, which must not break a line, or what is drawn next stands beside what is there."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=10, color_system=None)
    one = row(tmp_path, "a-trial-" * 20)
    one.state, one.reason = "failed", "why not " * 20
    with LiveTable(console, 2) as live:
        live.show([one], "preparing " * 20)
    assert isinstance(console.file, io.StringIO)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n").splitlines()
    assert 60 < max(map(len, lines)) <= 80 - MARGIN
    assert len(lines) < 2 * 10, lines


def test_plain_lines_are_said_once(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    one, events = row(tmp_path), Events(tmp_path)
    events.state("training")
    events.metrics(20, {"train/bits_per_dim": 7.5, "images_per_second": 105.0})
    events.metrics(50, {"test/bits_per_dim": 7.25})
    with PlainLines(console) as lines:
        for _ in range(3):
            one.update(0)
            lines.show([one], "preparing")
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue().splitlines()
    assert (said[0], said[2]) == ("gs-soft-c512-k8-s0  training", "preparing")
    assert said[1].startswith("gs-soft-c512-k8-s0  step 50/100: 7.250 bits/dim, 105 images/s")
    assert len(said) == 3


def test_the_live_table_draws(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=10)
    with LiveTable(console, 2) as live:
        live.show([row(tmp_path)], "preparing cifar10")
    assert isinstance(console.file, io.StringIO)
    assert "preparing cifar10" in console.file.getvalue()


def test_a_terminal_that_cannot_draw_gets_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Emacs' shell: nothing at all was shown there until the end."""
    monkeypatch.setenv("TERM", "dumb")
    console = Console(file=io.StringIO(), force_terminal=True)
    sweep = Sweep(name="s", base={"estimator": "gs-soft", "data": "cifar10-sample"})
    job = Job(sweep, sweep.trials(), Store(tmp_path), "", 1, tmp_path, None)
    looks = iter([(False, "preparing"), (True, "")])
    watch(job, [], 0.0, console, lambda: next(looks))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "preparing\n"


def test_a_look_at_a_hundred_trials_is_cheap(tmp_path: Path) -> None:
    rows = [row(tmp_path / str(number)) for number in range(100)]
    for number in range(100):
        events = Events(tmp_path / str(number))
        for step in range(200):
            events.metrics(step, {"train/bits_per_dim": 7.0})
    for one in rows:
        one.update(0)
    began = time.process_time()
    for one in rows:
        one.update(0)
    assert time.process_time() - began < 0.1
