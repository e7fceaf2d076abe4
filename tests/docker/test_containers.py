"""What a container comes to, and what others do with the components."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest
from kfp import dsl, local
from kfp.components import load_component_from_file
from kfp.dsl import Dataset, Metrics
from kfp.dsl import Model as ModelArtifact
from kfp.local import docker_task_handler

from components import IMAGE
from dvq import data
from dvq.config import trial
from dvq.model import Model
from dvq.saved import save
from pipeline import containers
from pipeline.profile import Profile

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_forty_failures_are_forty_failures(
    client: docker.DockerClient, tag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """kfp's own took some of such containers for successes, under load."""

    def fail(number: int) -> int:
        command = ["sh", "-c", f"printf 'not yet a line'; exit {3 + number % 2}"]
        return containers.run_container(client, tag, command, {}, network_mode="none", mem_limit="64m")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(fail, range(40))) == [3, 4] * 20
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith(containers.ENDED)]
    assert Counter(told) == {f"{containers.ENDED}a task: exit code {code}": 20 for code in (3, 4)}


def test_out_of_memory_is_named(
    client: docker.DockerClient, tag: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["python", "-c", "x = bytearray(500_000_000)"]
    limits = {"mem_limit": "64m", "memswap_limit": "64m"}
    assert containers.run_container(client, tag, command, {}, **limits) == 137
    assert "exit code 137, out of memory, over its limit of 64 MiB" in capfd.readouterr().out


def test_evaluate_alone_in_a_foreign_pipeline(
    client: docker.DockerClient, tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded from its YAML, without store or tracking: data and model are imported from files."""
    monkeypatch.delenv("DVQ_STORE", raising=False)
    folder = tmp_path / "given"
    data.prepare("cifar10-sample", "", folder / "data")
    assert client.images.get(IMAGE).id == client.images.get(tag).id, "make image"
    small = {"data": "cifar10-sample", "estimator": "vq-ema", "features": 4, "num_latents": 2, "num_codes": 4}
    save(Model(trial(small)), folder / "model")
    evaluate = load_component_from_file(str(ROOT / "components/evaluate/component.yaml"))

    @dsl.pipeline(name="foreign")
    def foreign() -> Metrics:  # type: ignore[valid-type]
        images = dsl.importer(artifact_uri=str(folder / "data"), artifact_class=Dataset)
        model = dsl.importer(artifact_uri=str(folder / "model"), artifact_class=ModelArtifact)
        return evaluate(data=images.output, model=model.output).outputs["evaluation"]

    # kfp's own runner, with the end of a container told as it was.
    monkeypatch.setattr(docker_task_handler, "run_docker_container", containers.run_container)
    local.init(local.DockerRunner(user=f"{os.getuid()}:{os.getgid()}"), pipeline_root=str(tmp_path))
    metadata = foreign().output.metadata
    assert metadata["bits_per_dim"] == pytest.approx(metadata["rate"] + metadata["distortion"])
    assert 7 < metadata["bits_per_dim"] < 12


def test_services_on_loopback_are_reached_by_the_hosts_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_text("")
    for name, value in {
        "DVQ_STORE": "s3://bucket/store",
        "DVQ_CACHE": str(tmp_path / "cache"),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "AWS_CA_BUNDLE": str(certificate),
        "DVQ_RECORD": "0",
        "SECRET": "stays",
        "DVQ_LOCKS": str(tmp_path / "locks"),
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work/tmp").mkdir(parents=True)  # as the launcher makes it: tasks write there
    made = containers.settings(Profile(gpu=2, memory="512Mi"), tmp_path, "")
    assert made["network_mode"] == "host"
    assert made["environment"]["DVQ_STORE"] == "s3://bucket/store"
    assert made["environment"]["DVQ_RECORD"] == "0"
    assert made["environment"]["TRITON_CACHE_DIR"].startswith(str(tmp_path / "work/"))  # a mount, not a tmpfs
    assert "SECRET" not in made["environment"]
    written = {one["Target"] for one in made["mounts"] if not one["ReadOnly"]}
    assert written == {str(tmp_path / name) for name in ("work", "cache", "locks")}
    assert {one["Target"] for one in made["mounts"] if one["ReadOnly"]} == {str(certificate)}
    assert made["mem_limit"] == "512M"
    assert made["device_requests"][0]["Count"] == -1
    assert made["environment"]["DVQ_LOCKS"] == str(tmp_path / "locks")  # which all launches share
    assert made["environment"]["DVQ_DEVICE"] == "cuda"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert containers.settings(Profile(), tmp_path, "")["network_mode"] == "bridge"
    assert (
        containers.settings(Profile(), tmp_path, "http://localhost:8000/x.tar.gz")["network_mode"] == "host"
    )
