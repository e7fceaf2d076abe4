"""An MLflow server with basic auth: the right password is let in, a wrong one is one sentence."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components import mlflow_server
from components.folder import begin
from components.tracking import TrialRun
from dvq import DvqError
from dvq.config import trial
from pipeline import tracker
from pipeline.services import answers
from tests.services.conftest import free_ports, wait_for

RIGHT, WRONG = "a-long-enough-password", "a-wrong-password"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server as the README says."""
    folder, (port,) = tmp_path_factory.mktemp("auth"), free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", "sqlite:///mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--allowed-hosts", "127.0.0.1:*"]
    settings = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": RIGHT,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for the forms' tokens",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **settings},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/health"), 120)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def test_the_right_password_is_let_in_and_a_wrong_one_is_a_sentence(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "trial", trial({"estimator": "gs-soft", "data": "cifar10-sample"}), "t")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", WRONG)
    with pytest.raises(DvqError, match=f"MLflow at {address} refuses the name and password: set "):
        tracker.check()
    assert not TrialRun(tmp_path / "trial", "sweep").sync()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert f"(MLflow at {address} refuses the name and password: set MLFLOW_TRACKING_USERNAME" in said[0]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", RIGHT)
    assert tracker.check() == ""
    assert TrialRun(tmp_path / "trial", "sweep").sync()


def test_an_experiment_of_another_users_is_a_sentence_that_names_the_remedy(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To send it again mends nothing."""
    from mlflow.server.auth.client import AuthServiceClient

    begin(tmp_path / "trial", trial({"estimator": "gs-soft", "data": "cifar10-sample"}), "t")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DVQ_STORE", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", RIGHT)
    mlflow_server.experiment_id(mlflow_server.client(), "the admin's")
    AuthServiceClient(address).create_user("guest", "another-long-password")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "guest")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-long-password")
    assert not TrialRun(tmp_path / "trial", "the admin's").sync()
    (said,) = capsys.readouterr().out.splitlines()
    assert said.endswith("is another user's: ask its owner for EDIT permission)")
