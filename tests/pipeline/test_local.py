"""How a running pipeline's processes are ended."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dvq import DvqError
from pipeline import local


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
