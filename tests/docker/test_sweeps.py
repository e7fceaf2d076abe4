"""Sweeps through real containers."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.store import Store
from dvq import events
from dvq.sweep import load_sweep

pytestmark = pytest.mark.timeout(600)
GRID = {"estimator": ["gs-soft", "vq-ema"]}
CERTIFICATE = re.compile(r"certificate (\w+)")


def wait(condition: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return value


def test_the_certificate_is_that_of_this_machine(sweep: Any, mine: Any) -> None:
    sweep.write(GRID, steps=20)
    code, here = sweep.run("--on", "local")
    assert code == 0, here
    sweep.environment["DVQ_STORE"] = str(sweep.folder / "other")
    code, inside = sweep.run("--on", "docker")
    assert code == 0, inside
    assert CERTIFICATE.findall(here) == CERTIFICATE.findall(inside) != []
    assert mine() == []
    assert {path.stat().st_uid for path in (sweep.folder / "other").rglob("*")} == {os.getuid()}


def _training(folder: Path) -> bool:
    store = Store(folder / "outputs/store")
    found = [
        store.trial(trial.key()) / "checkpoints"
        for trial in load_sweep(folder / "tiny.yaml").trials().values()
    ]
    return any(list(path.glob("[0-9]*")) for path in found)


def test_a_container_killed_in_training_is_told_and_the_same_command_goes_on(sweep: Any, mine: Any) -> None:
    grid = {"estimator": ["gs-soft"]}
    sweep.write(grid, steps=600, checkpoint_every=100)
    process = sweep.start("--on", "docker")
    wait(lambda: _training(sweep.folder))
    for one in mine():
        one.kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    assert "container of train estimator=gs-soft" in output
    assert "exit code 137 (SIGKILL)" in output
    assert mine() == []
    code, output = sweep.run("--on", "docker")
    assert code == 0, output
    assert "goodput 1 interruption," in output


def test_ctrl_c_ends_the_containers_after_a_checkpoint(sweep: Any, mine: Any) -> None:
    sweep.write({"estimator": ["gs-soft"]}, steps=100_000)
    process = sweep.start("--on", "docker")
    store = Store(sweep.folder / "outputs/store")
    folder = store.trial(next(iter(load_sweep(sweep.folder / "tiny.yaml").trials().values())).key())
    wait(lambda: any(event["kind"] == "metrics" for event in events.read(folder)))
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert mine() == []
    assert store.state(folder.name).step > 0


def test_the_launchers_death_ends_the_containers(sweep: Any, mine: Any) -> None:
    sweep.write({"estimator": ["gs-soft"]}, steps=100_000)
    process = sweep.start("--on", "docker")
    wait(mine)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    wait(lambda: mine() == [], 30)


def test_a_trial_over_its_memory_limit_is_told(sweep: Any, mine: Any) -> None:
    sweep.write({"estimator": ["gs-soft"]}, batch_size=512, features=64, num_codes=512, num_latents=16)
    (sweep.folder / "small.yaml").write_text(yaml.safe_dump({"cpu": 1, "memory": "700Mi"}))
    code, output = sweep.run("--on", "docker", "--profile", "small.yaml")
    assert code == 1, output
    assert "out of memory, over" in output
    assert "700 MiB" in output
    assert mine() == []
