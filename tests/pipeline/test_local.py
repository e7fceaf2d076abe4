"""How a running pipeline's processes are ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvq import DvqError
from pipeline import containers, local, submit


@pytest.mark.parametrize(("trap", "told"), [("echo told > told; exit", True), ("", False)])
def test_a_task_gets_sigterm_and_if_it_stays_sigkill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: Callable[..., Any], trap: str, told: bool
) -> None:
    monkeypatch.setattr(local, "GRACE", 0.5)
    task = f"trap '{trap}' TERM; touch ready; while :; do sleep 0.05; done"
    kfp = subprocess.Popen(["sh", "-c", f"({task}) & wait"], cwd=tmp_path, start_new_session=True)
    wait((tmp_path / "ready").exists, 10)
    local.end(kfp)
    assert (tmp_path / "told").exists() is told
    wait(lambda: not local._signal_group(kfp.pid, 0), 10)


def test_two_launches_of_one_second_are_told(tmp_path: Path) -> None:
    (tmp_path / "work/tmp").mkdir(parents=True)
    with (
        pytest.raises(DvqError, match="is another launch's, of the same second"),
        local.running({}, 1, tmp_path),
    ):
        pass


def test_a_daemon_that_died_hides_no_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    containers.end(tmp_path / "a launch", 0.1)
    said = capsys.readouterr().err
    assert said.startswith(
        f"warning: containers may still run (no Docker daemon answers at unix://{tmp_path}/none.sock)"
    )
    assert f"docker ps -aq --filter 'label=dvq.launch={tmp_path}/a launch')" in said


class Daemon:
    """A Docker daemon, and its one container, which heeds no SIGTERM."""

    def __init__(self) -> None:
        self.containers, self.id, self.told = self, "one", list[str]()

    def list(self, every: bool = False, **_: Any) -> list["Daemon"]:
        return [self] if every or "SIGKILL" not in self.told else []

    def exec_run(self, _: Any) -> None:
        self.told.append("SIGTERM")

    def kill(self) -> None:
        self.told.append("SIGKILL")

    def remove(self, **_: Any) -> None:
        self.told.append("removed")


def test_a_second_ctrl_c_ends_containers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom nobody else would end."""
    daemon, sleep = Daemon(), time.sleep

    def interrupted(_: float) -> None:
        monkeypatch.setattr(time, "sleep", sleep)
        raise KeyboardInterrupt

    monkeypatch.setattr(containers, "connect", lambda: daemon)
    monkeypatch.setattr(time, "sleep", interrupted)
    containers.end(tmp_path, 60)
    assert daemon.told == ["SIGTERM", "SIGKILL", "removed"]


def test_a_sigterm_to_make_reaches_the_sweep(tmp_path: Path, wait: Callable[..., Any]) -> None:
    """As of a batch system, which may tell the first process alone."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python"
    python.write_text(
        f"#!/bin/sh\ntrap 'echo > {tmp_path}/told; exit 1' TERM\necho > {tmp_path}/begun\n"
        "for i in $(seq 200); do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    making = subprocess.Popen(
        ["make", "-e", "submit-sweep"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "VENV": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait((tmp_path / "begun").exists, 30)
    making.terminate()
    making.wait()
    assert (tmp_path / "told").exists()


def test_a_second_sigterm_cuts_nothing_short() -> None:
    """A group that is told to end, as ``timeout`` and SLURM do, is told twice: make passes it on."""
    before = {number: signal.getsignal(number) for number in submit.ENDING}
    try:
        for number in before:
            signal.signal(number, submit._interrupt)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        for number in before:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
