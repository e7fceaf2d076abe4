"""Sweeps so small that a trial takes seconds, and the launcher as a process."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TINY = {
    "data": "cifar10-sample",
    "features": 4,
    "num_latents": 2,
    "num_codes": 4,
    "code_dim": 4,
    "batch_size": 16,
    "steps": 5,
    "log_every": 5,
    "evaluate_every": 1000,
    "bound_samples": 1,
}


class Launcher:
    """``python -m pipeline.submit`` in ``folder``; ``MARK`` in the environment tells all that it starts."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self._mark = folder, mark.encode()
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "MARK": mark, "MLFLOW_TRACKING_URI": ""}
        self.environment.pop("DVQ_STORE", None)

    def start(self, *arguments: str, by: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """In a session of its own, so that its process group is the terminal's foreground group; ``by`` a program
        such as nohup."""
        return subprocess.Popen(
            [*by, sys.executable, "-m", "pipeline.submit", "tiny.yaml", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # tests that a shell runs in the background ignore Ctrl-C, and so would what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=150)
        return process.returncode, output

    def alive(self) -> list[int]:
        """The processes that carry the mark."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if self._mark in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


def wait_for(condition: Callable[[], Any], seconds: float) -> Any:
    """What ``condition`` returns when it first is true, asked until then."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


@pytest.fixture
def wait() -> Callable[[Callable[[], Any], float], Any]:
    return wait_for


@pytest.fixture
def write_sweep(tmp_path: Path) -> Callable[..., Path]:
    """Write a sweep over the tiny base to ``tiny.yaml`` of the test's folder."""

    def write(base: dict[str, Any] | None = None, **content: Any) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({"base": {**TINY, **(base or {})}, **content}))
        return path

    return write


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("looks for processes in /proc")
    made = Launcher(tmp_path, uuid.uuid4().hex)
    yield made
    for pid in made.alive():
        os.kill(pid, 9)
