"""MLflow's pages of the sweeps, wherever they are tracked: python -m pipeline.ui [--port 5000]"""

import os
import socket
import sys
from typing import Annotated

import typer

from components import mlflow_server
from dvq import DvqError
from pipeline import preflight, tracker
from pipeline.command import application, outputs
from pipeline.services import HOST
from pipeline.stack import Stack

FORM = "?workflowType=machine_learning"
"""selects MLflow's pages for training rather than for language models"""
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


def ui(port: Annotated[str, typer.Option(help="of this machine")] = "5000") -> None:
    """Print the address of MLflow's pages; serve them if no server does."""
    home = outputs()
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.update(Stack(home / "stack").environment())
    uri = os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    tracker.require()
    if uri.startswith("http"):
        print(f"{uri.rstrip('/')}/{_start_page()}")
        return
    file = mlflow_server.database()
    if file and not file.exists():
        raise DvqError(f"there is no {file}, for no sweep was tracked in it yet: make submit-sweep")
    _check_port(port)
    mlflow_server.ensure_database()
    print(f"MLflow on {file or uri}; Ctrl-C ends it\nhttp://{HOST}:{port}/{_start_page()}", flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    command += ["--host", HOST, "--port", port, "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    os.execve(sys.executable, command, {**os.environ, **QUIET})


def _start_page() -> str:
    """The page of the latest sweep's runs; from the list of experiments MLflow leads to pages for language models."""
    experiment = mlflow_server.newest_experiment()
    return f"#/experiments/{experiment}/runs{FORM}" if experiment else f"#/experiments{FORM}"


def _check_port(port: str) -> None:
    number = preflight.whole_number("PORT", port, 65535)
    try:
        socket.create_server((HOST, number)).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise DvqError(f"PORT = '{port}' cannot be listened on ({reason}): name another") from None


app = application(ui)

if __name__ == "__main__":
    app()
