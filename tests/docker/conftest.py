"""The daemon and the image that `make image` built of this checkout; missing, they are failures, not skips."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from pipeline import containers, image
from tests.k8s.conftest import Built

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


@pytest.fixture(scope="session")
def client() -> Iterator[docker.DockerClient]:
    made = containers.connect()
    yield made
    made.close()


@pytest.fixture(scope="session")
def tag(client: docker.DockerClient) -> str:
    made = image.content().tag()
    assert image.has_image(client, made), f"{made} is not there: make image"
    return made


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("k8s") / "k8s")


class Sweep:
    """tiny.yaml in a folder of its own, and the launcher on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
        self.environment.pop("DVQ_STORE", None)

    def write(self, grid: dict[str, list[Any]], **base: Any) -> None:
        content = {"base": {**TINY, **base}, "grid": grid}
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(content))

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.submit", "tiny.yaml", *arguments],
            cwd=self.folder, env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=280)
        return process.returncode, output


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path)


@pytest.fixture
def mine(client: docker.DockerClient, tmp_path: Path) -> Iterator[Callable[[], list[Any]]]:
    """The containers that this test's launches started, running or not."""

    def found() -> list[Any]:
        return [
            one
            for one in client.containers.list(all=True, ignore_removed=True)
            if one.labels.get(containers.LABEL, "").startswith(f"{tmp_path}/")
        ]

    yield found
    for one in found():
        one.remove(force=True)
