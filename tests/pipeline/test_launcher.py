"""Sweeps from end to end, as processes: failures, interruptions, and the same command again."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvq import events, goodput
from dvq.sweep import load_sweep

GRACE = 15
"""seconds in which everything that was started has to end"""
Wait = Callable[[Callable[[], Any], float], Any]


class Trials:
    """The folders of a sweep's trials by their names."""

    def __init__(self, sweep: Path) -> None:
        keys = {name: trial.key() for name, trial in load_sweep(sweep).trials().items()}
        self.folders = {name: sweep.parent / "outputs/store/trials" / key for name, key in keys.items()}

    def finished(self) -> set[str]:
        return {name for name, folder in self.folders.items() if (folder / "results.json").exists()}

    def attempts(self) -> dict[str, int]:
        return {name: goodput.read(folder)["attempts"] for name, folder in self.folders.items()}

    def training(self, part: str = "") -> int | None:
        """The process that trains a trial with ``part`` in its name, once one does."""
        for name, folder in self.folders.items():
            for event in events.read(folder) if part in name else ():
                if event.get("state") == "training":
                    return int(event["pid"])
        return None


def clean(folder: Path) -> bool:
    """Whether no temporary file of a launch is left in its folder."""
    return {path.name for path in (folder / "outputs/logs").glob("*/*")} == {"kfp.log"}


def test_failures_are_named_and_only_they_are_tried_again(
    launcher: Any, write_sweep: Callable[..., Path], wait: Wait
) -> None:
    """One trial raises, one runs out of memory, one is killed with SIGKILL, and one is well."""
    much = {"num_codes": 2**30, "code_dim": 2**20}
    points: list[dict[str, Any]] = [{}, {"learning_rate": 1e30}, much, {"steps": 40}]
    sweep = write_sweep(include=[{"estimator": "gs-soft", **point} for point in points])
    trials = Trials(sweep)
    good, diverged, memory, killed = trials.folders

    process = launcher.start("--jobs", "4")
    os.kill(wait(lambda: trials.training("steps"), 90), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert trials.finished() == {good}
    assert "3 of 4 trials failed" in output
    told = {line.split(": ")[0].strip(): line for line in output.splitlines() if line.startswith("  ")}
    assert "diverged" in told[diverged]
    assert "out of memory" in told[memory]
    assert "SIGKILL" in told[killed]
    page = (launcher.folder / "outputs/store/reports/tiny/report.html").read_text()
    assert all(name in page for name in (*trials.folders, "Reconstructions and samples"))
    assert clean(launcher.folder)

    before = trials.attempts()
    code, output = launcher.run("--jobs", "4")
    assert code == 1, output
    assert "2 of 4 trials failed" in output
    assert trials.finished() == {good, killed}
    assert {name for name, attempt in trials.attempts().items() if attempt == before[name]} == {good}
    assert launcher.alive() == []


def test_ctrl_c_leaves_nothing_running_and_the_same_command_goes_on(
    launcher: Any, write_sweep: Callable[..., Path], wait: Wait
) -> None:
    sweep = write_sweep({"steps": 30}, grid={"estimator": ["gs-soft"], "num_codes": [4, 5]})
    trials = Trials(sweep)
    for kill in (os.kill, os.killpg):  # to the launcher alone; to the terminal's whole foreground group
        process = launcher.start()
        wait(lambda: trials.training() in launcher.alive(), 90)
        kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=GRACE)
        assert process.returncode == 130, output
        assert "a second Ctrl-C ends them at once" in output
        assert "interrupted; the same command goes on" in output
        assert "Traceback" not in output
        assert launcher.alive() == []
        assert trials.finished() == set()
        assert clean(launcher.folder)

    code, output = launcher.run()
    assert code == 0, output
    assert trials.finished() == set(trials.folders)

    before = trials.attempts()
    code, output = launcher.run()
    assert code == 0, output
    assert output.count("finished before") == 2
    assert trials.attempts() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_launchers_death_ends_everything(
    launcher: Any, write_sweep: Callable[..., Path], wait: Wait, number: signal.Signals
) -> None:
    trials = Trials(write_sweep({"steps": 100_000}, grid={"estimator": ["gs-soft"], "num_codes": [4, 5]}))
    process = launcher.start()
    wait(trials.training, 90)
    assert len(launcher.alive()) > 4
    os.kill(process.pid, number)
    process.communicate(timeout=GRACE)
    wait(lambda: launcher.alive() == [], GRACE)
    assert not list(launcher.folder.glob("outputs/logs/*/work")), "which holds a copy of each model"


def test_under_nohup_a_sweep_outlives_its_terminal(
    launcher: Any, write_sweep: Callable[..., Path], wait: Wait
) -> None:
    trials = Trials(write_sweep(grid={"estimator": ["gs-soft"]}))
    process = launcher.start(by=["nohup"])
    wait(trials.training, 90)
    os.killpg(process.pid, signal.SIGHUP)
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    assert trials.finished() == set(trials.folders)


def test_data_that_cannot_be_prepared_is_told(launcher: Any, write_sweep: Callable[..., Path]) -> None:
    """It looked well beforehand."""
    write_sweep(grid={"estimator": ["gs-soft"]})
    data = launcher.folder / "outputs/store/data"
    data.parent.mkdir(parents=True)
    data.write_text("in the way")
    code, output = launcher.run()
    assert code == 1
    assert "\nthe prepared images cannot be written" in output
    assert "it did not start" in output
