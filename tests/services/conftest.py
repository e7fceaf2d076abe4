"""Real servers on free loopback ports, and a scripted proxy before the one whose faults are tested."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.services import QUIET, WEED, answers
from tests.services.proxy import Proxy


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """What ``condition`` returns when it first is true, asked until then."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)
    return value


class SeaweedFS:
    """SeaweedFS with its S3 gateway, in ``folder``; it can be killed and started again on the same port."""

    def __init__(self, folder: Path, bucket: str, *options: str) -> None:
        self.folder, self.bucket, self.options = folder, bucket, options
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self._ports = dict(zip(WEED, free_ports(len(WEED)), strict=True))
        self.port = self._ports["s3.port"]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        command = [str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "-v=-1", "mini"]
        command += [f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}={port}" for name, port in self._ports.items()]
        command += [*QUIET, f"-bucket={self.bucket}", *self.options]
        with self.folder.with_suffix(".log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **keys, "GOMEMLIMIT": "512MiB"}, stdout=log, stderr=log
            )
        wait_for(lambda: answers(f"{self.address}/healthz") and self._has_bucket())

    def _has_bucket(self) -> bool:
        """It is made a moment after the first answers."""
        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        client = boto3.client("s3", endpoint_url=self.address, region_name="us-east-1", **keys)
        return self.bucket in [one["Name"] for one in client.list_buckets()["Buckets"]]

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()

    def environment(self, address: str = "") -> dict[str, str]:
        """What reaches it by the usual AWS variables, at ``address`` if a proxy stands before it."""
        return {
            "AWS_ENDPOINT_URL": address or self.address,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A SeaweedFS with the bucket ``dvq``, for all tests of this session."""
    folder = tmp_path_factory.mktemp("seaweed")
    server = SeaweedFS(folder / "data", "dvq")
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def proxy(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before SeaweedFS; the environment's AWS_* variables lead to it."""
    made = Proxy(seaweed.port)
    for name, value in seaweed.environment(made.address).items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    yield made
    made.close()
    if not answers(f"{seaweed.address}/healthz"):
        seaweed.restart()
