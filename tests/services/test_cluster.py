"""ON=kfp from end to end: a server of the tests answers as KFP's API, and runs what was uploaded; S3 is real."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubeflow_server import KubeflowServer, execute
from tests.services.conftest import SeaweedFS, wait_for

ROOT = Path(__file__).parents[2]
TINY = {
    "data": "cifar10-sample", "features": 4, "num_latents": 2, "num_codes": 4, "code_dim": 4, "batch_size": 16,
    "steps": 5, "log_every": 5, "evaluate_every": 1000, "bound_samples": 1,
}  # fmt: skip


class Launch:
    """``submit-sweep ON=kfp`` in a folder of its own, and the server that it finds."""

    def __init__(self, folder: Path, server: KubeflowServer, address: str, store: dict[str, str]) -> None:
        self.folder, self.server = folder, server
        self.pods: list[subprocess.Popen[bytes]] = []
        self.inside = {
            **store, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "", "DVQ_CACHE": str(folder / "nodes"),
        }  # fmt: skip
        self.environment = {
            **os.environ, **self.inside, "KFP_HOST": address, "DVQ_CACHE": str(folder / "cache"),
            "DVQ_STORE": f"s3://dvq/{folder.name}",
        }  # fmt: skip
        (folder / "here.yaml").write_text(
            yaml.safe_dump({"cpu": 1, "cluster": {"pull_policy": "Never", "config_maps": {}, "secrets": {}}})
        )
        server.started = self._started

    def _started(self, run: Any, text: str) -> None:
        folder = self.folder / "runs" / run.run_id
        self.pods.append(execute(folder, text, run, self.inside))

    def sweep(self, seeds: list[int], **base: Any) -> None:
        content = {"base": {**TINY, **base}, "grid": {"estimator": ["vq-ema"]}, "seeds": seeds}
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(content))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            "-m",
            "pipeline.submit",
            "tiny.yaml",
            "--on",
            "kfp",
            "--profile",
            "here.yaml",
        ]
        return subprocess.Popen(
            [*command, *arguments], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output


@pytest.fixture
def launch(tmp_path: Path, seaweed: SeaweedFS) -> Iterator[Launch]:
    server = KubeflowServer()
    with server.listening() as address:
        made = Launch(tmp_path, server, address, seaweed.environment())
        yield made
        for one in made.pods:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)


@pytest.mark.timeout(300)
def test_a_sweep_is_submitted_followed_and_found_finished(launch: Launch) -> None:
    launch.sweep([0, 1])
    code, output = launch.run("--wait")
    log = "".join(path.read_text() for path in launch.folder.glob("runs/*/log"))
    assert code == 0, output + log
    (run,) = launch.server.runs
    assert f"/#/runs/details/{run}" in output
    assert "vq-ema-c4-k2-s1  finished: " in output
    assert "certificate" in output
    assert "CPU-hours: " in output
    code, output = launch.run("--wait")
    assert code == 0, output
    assert len(launch.server.versions) == 1
    assert "0 of 2 trials" in (launch.folder / "runs" / list(launch.server.runs)[1] / "log").read_text()
    code, output = launch.run("--dry-run")
    assert code == 0
    assert "2 finished" in output


@pytest.mark.timeout(300)
def test_an_interrupted_run_is_submitted_again_until_it_is_done(launch: Launch) -> None:
    launch.sweep([0], steps=400, checkpoint_every=20)
    process = launch.start("--wait")
    trial = f"s3://dvq/{launch.folder.name}"
    wait_for(lambda: list(launch.folder.glob("nodes/**/checkpoints/000000040")), 120)
    wait_for(lambda: list(launch.folder.glob("cache/**/events/*")), 60)  # a checkpoint was pushed, and seen
    os.killpg(launch.pods[0].pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output + trial
    assert len(launch.server.runs) == 2
    assert [one.state for one in launch.server.runs.values()] == ["FAILED", "SUCCEEDED"]
    assert "1 trials are left: submitting it again" in output
    assert "goodput 1 interruption," in output


@pytest.mark.timeout(300)
def test_it_is_left_going_refused_twice_and_cancelled(launch: Launch) -> None:
    launch.sweep([0], steps=100000, checkpoint_every=50)
    code, output = launch.run()
    assert code == 0, output
    (run,) = launch.server.runs
    assert f"make cancel RUN={run}" in output
    code, output = launch.run()
    assert code == 2
    assert output.startswith("error: the sweep 'tiny' is under way")

    def told() -> str:
        found = subprocess.run(
            [sys.executable, "-m", "pipeline.explain", "tiny.yaml"],
            cwd=launch.folder, env=launch.environment, capture_output=True, text=True,
        )  # fmt: skip
        return found.stdout

    wait_for(lambda: "goes on from step" in told(), 120)  # a checkpoint was pushed
    command = [
        sys.executable,
        "-m",
        "pipeline.cancel",
        f"http://x/#/runs/details/{run}",
        "--profile",
        "here.yaml",
    ]
    done = subprocess.run(command, cwd=launch.folder, env=launch.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wait_for(lambda: launch.server.runs[run].state == "FAILED")
    assert "goes on from step" in told()


def test_data_that_is_not_there_is_refused_before_anything_starts(launch: Launch, tmp_path: Path) -> None:
    launch.sweep([0], data="cifar10")
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output = launch.run("--data", str(empty))
    assert (code, launch.server.runs) == (2, {}), output
    assert str(empty) in output


def test_data_of_this_machine_is_uploaded_first(launch: Launch) -> None:
    source = os.environ.get("DVQ_TEST_CIFAR10")
    if not source:
        pytest.skip("DVQ_TEST_CIFAR10 names no folder with the official CIFAR-10 batches")
    launch.sweep([0], data="cifar10")
    code, output = launch.run("--data", source)
    assert code == 0, output
    (run,) = launch.server.runs.values()
    assert run.runtime_config.parameters["source"] == ""
    assert json.loads(run.runtime_config.parameters["sweep"])["base"]["data"] == "cifar10"
