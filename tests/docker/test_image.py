"""The image: what goes into it, what it serves, how a build and a push fail."""

import contextlib
import io
import json
import re
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest
import yaml

from components import IMAGE
from dvq import DvqError
from pipeline import containers, image

ROOT = Path(__file__).parents[2]


def test_the_image_runs_with_a_read_only_root_and_no_name_for_its_user(
    client: docker.DockerClient, tag: str
) -> None:
    code = "import os, torch, mlflow, dvq, pipeline.profile; print(os.getuid(), torch.__version__)"
    options = {"read_only": True, "tmpfs": {"/tmp": ""}, "cap_drop": ["ALL"], "remove": True}
    for user in (None, "12345:12345"):
        told = client.containers.run(tag, ["python", "-c", code], user=user, stderr=False, **options).decode()
        assert told.split() == [(user or "10001:").partition(":")[0], image.content().arguments["TORCH"]]
    bill = client.containers.run(tag, ["cat", "/opt/venv/sbom.cdx.json"], remove=True)
    names = {one["name"].lower() for one in json.loads(bill)["components"]}
    assert {"torch", "mlflow", "kfp", "flask-wtf", "psycopg"} <= names


def test_the_image_serves_mlflow(client: docker.DockerClient, tag: str) -> None:
    command = ["mlflow", "server", "--backend-store-uri", "sqlite:////tmp/m.db", "--workers", "1"]
    probe = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:5000/health').read().decode())"
    server = client.containers.run(tag, command, read_only=True, tmpfs={"/tmp": ""}, detach=True)
    try:
        deadline = time.monotonic() + 90
        while server.exec_run(["python", "-c", probe]).output.strip() != b"OK":
            assert time.monotonic() < deadline, server.logs().decode()
            time.sleep(1)
    finally:
        server.remove(force=True)


def test_the_image_serves_mlflow_with_passwords(client: docker.DockerClient, tag: str) -> None:
    command = ["mlflow", "server", "--app-name", "basic-auth", "--workers", "1"]
    settings = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": "a-long-enough-password",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "any",
    }
    code = "import urllib.request as u, urllib.error as e\ntry: u.urlopen('http://127.0.0.1:5000/')\n"
    code += "except e.HTTPError as x: print(x.code)"
    server = client.containers.run(
        tag, [*command, "--backend-store-uri", "sqlite:////tmp/m.db"], environment=settings, read_only=True,
        tmpfs={"/tmp": ""}, detach=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while server.exec_run(["python", "-c", code]).output.strip() != b"401":
            assert time.monotonic() < deadline, server.logs().decode()
            time.sleep(1)
    finally:
        server.remove(force=True)


def test_a_failed_step_and_a_missing_daemon_are_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [
        "Step 3/9 : RUN uv",
        "\n",
        " ---> Running in 1\n",
        "\x1b[91mcause: \x1b[0m",
        "\x1b[91mno torch\n\x1b[0m",
    ]
    error = {"error": "The command 'uv' returned a non-zero code: 1"}
    with pytest.raises(DvqError, match=r"the image: Step 3/9 : RUN uv failed: cause: no torch$"):
        image.follow([*({"stream": one} for one in [*said, "Removing intermediate container 1\n"]), error])
    assert "Step 3/9 : RUN uv\n ---> Running in 1\ncause: no torch\n" in capsys.readouterr().out
    with pytest.raises(DvqError, match="docker system prune"):
        image.follow([{"error": "write /x: no space left on device"}])
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    with pytest.raises(DvqError, match=r"no Docker daemon answers at unix:///nowhere/d\S+; install one"):
        containers.connect()


def test_a_build_that_fails_says_why(client: docker.DockerClient, tag: str, tmp_path: Path) -> None:
    """The daemon's own messages of a step that fails, and of a disk that is full."""
    for command, why in {
        "echo begin; echo the reason >&2; exit 3": "Step 2/2 : RUN .* failed: the reason$",
        "(echo a; echo error: b; echo cause: c) >&2; exit 3": "Step 2/2 : RUN .* failed: error: b cause: c$",
        "exit 3": "Step 2/2 : RUN exit 3 failed: The command .* returned a non-zero code: 3$",
    }.items():
        (tmp_path / "Dockerfile").write_text(f"FROM {tag}\nRUN {command}\n")
        with pytest.raises(DvqError, match=why):
            image.follow(client.api.build(path=str(tmp_path), rm=True, forcerm=True, decode=True))


def test_the_context_holds_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret, data or history, wherever it lies."""
    for folder in ("dvq", "components", "pipeline", "docker", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    named = ("LICENSE", "README.md", "pyproject.toml", "requirements.lock", "requirements-services.lock")
    for name in named:
        shutil.copy(ROOT / name, tmp_path / name)
    for planted in (
        ".env", "dvq/.env", "pipeline/.netrc", ".git/config", "data/batch.bin", "outputs/stack/stack.json",
        "key.pem", "components/train/.secrets/key", "dvq/__pycache__/x.pyc", "docker/config.json",
    ):  # fmt: skip
        (tmp_path / planted).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / planted).write_text("secret")
    before = image.content().tag()
    monkeypatch.setattr(image, "ROOT", tmp_path)
    made = image.content()
    buffer = io.BytesIO()
    made.write(buffer)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        names = tar.getnames()
    folders = tuple(f"{name}/" for name in ("dvq", "components", "pipeline"))
    assert [n for n in names if not n.startswith(folders)] == sorted({*named, "docker/Dockerfile"})
    assert b"secret" not in {path.read_bytes() for path in made.files.values()}
    assert "dvq/estimators/gs_soft.py" in names
    assert made.tag() == before


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A registry on loopback, which the daemon trusts without TLS: Debian's docker-registry."""
    program = shutil.which("docker-registry")
    if not program:
        pytest.skip("no registry to push to: apt-get install docker-registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "registry.yml").write_text(yaml.safe_dump(settings))
    with (tmp_path / "registry.log").open("wb") as log:
        server = subprocess.Popen([program, "serve", str(tmp_path / "registry.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while socket.socket().connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))):
            assert time.monotonic() < deadline, (tmp_path / "registry.log").read_text()
            time.sleep(0.1)
        yield address
    finally:
        server.kill()
        server.wait()


def test_what_is_pushed_is_there(client: docker.DockerClient, registry: str, tmp_path: Path) -> None:
    """Pushed, found by what looks before a cluster's run, pulled; a small image stands for the large one."""
    (tmp_path / "file").write_text("content")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY file /file\n")
    tag, place = "dvq-test-push:1", f"{registry}/me"
    try:
        made, _ = client.images.build(path=str(tmp_path), tag=tag, rm=True)
        with pytest.raises(DvqError, match="is not in its registry"):
            containers.check_pushed(f"{place}/{tag}")
        assert image.push(client, tag, place) == f"{place}/{tag}"
        containers.check_pushed(f"{place}/{tag}")
        client.images.remove(f"{place}/{tag}")
        assert client.images.pull(f"{place}/dvq-test-push", "1").id == made.id
        with pytest.raises(DvqError, match=r"REGISTRY = 'https://x': .*; give host/path"):
            image.push(client, tag, "https://x")
        with pytest.raises(DvqError, match=r"the push of 127.0.0.1:9/me/dvq:0.1.0 failed: .*refused"):
            image.push(client, tag, "127.0.0.1:9/me")
    finally:
        for name in (tag, f"{place}/{tag}", f"{place}/{IMAGE}", f"127.0.0.1:9/me/{IMAGE}"):
            with contextlib.suppress(docker.errors.ImageNotFound):
                client.images.remove(name)


def test_the_image_serves_the_tests(client: docker.DockerClient, tag: str) -> None:
    """As the README says, on the code in the image."""
    command = [
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        "tests/dvq/test_agreement.py",
        "tests/dvq/test_config.py",
    ]
    told = client.containers.run(
        tag, command, volumes={str(ROOT): {"bind": "/src", "mode": "ro"}}, working_dir="/src", remove=True,
        read_only=True, tmpfs={"/tmp": ""}, network_mode="none",
    ).decode()  # fmt: skip
    assert re.search(r"\d+ passed", told), told
    assert "/src/dvq" not in told
