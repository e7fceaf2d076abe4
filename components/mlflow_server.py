"""The MLflow that ``MLFLOW_TRACKING_URI`` names, a server or a database: its client, its experiments, its errors."""

import os
import re
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from components import moved
from dvq import DvqError, disk

if TYPE_CHECKING:
    from mlflow import MlflowClient

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""An unanswered call fails, and the next sync first asks what arrived: MLflow's own retries would take minutes and
could make a run twice."""
REFUSED = (
    "MLflow at {} refuses the name and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
    "to those of a user there"
)


def client(uri: str | None = None) -> "MlflowClient":
    """The client of the tracking server, or of ``uri``; importing MLflow takes seconds, so only this does it."""
    prepare()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def prepare() -> None:
    """Set the environment variables that MLflow reads when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


def redacted(text: str) -> str:
    """``text`` without the name and password of an address in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


def explanation(error: Exception) -> str:
    """One sentence about an error of MLflow's; of a bug also the traceback is printed."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException | OSError | DvqError):
        traceback.print_exception(error)
    if getattr(error, "error_code", "") == "UNAUTHENTICATED":
        return REFUSED.format(os.environ["MLFLOW_TRACKING_URI"])
    if "Max retries exceeded" in str(error):
        return f"{redacted(os.environ['MLFLOW_TRACKING_URI'])} does not answer"
    return redacted((str(error).splitlines() or [type(error).__name__])[0])[:300]


def ensure_database() -> None:
    """Create the sqlite database before several processes would do so at once: under another name, then renamed. An
    existing file is not replaced, since processes may have it open; its paths are corrected if it was moved."""
    file = database()
    if file is None:
        return
    with disk.locked(file.with_name(f".{file.name}.lock")):
        if file.exists():
            moved.update_paths(file)
        else:
            partial = file.with_name(file.name + ".partial")
            partial.unlink(missing_ok=True)
            client(f"sqlite:///{partial}").search_experiments()
            partial.replace(file)


def experiment_id(server: "MlflowClient", name: str) -> str:
    """The id of the experiment of that name, which is created if there is none."""
    from mlflow.exceptions import MlflowException

    experiment = server.get_experiment_by_name(name)
    if experiment is None:
        tags = {"mlflow.experimentKind": "custom_model_development"}  # MLflow shows its pages for training
        try:
            return str(server.create_experiment(name, _artifacts(name), tags=tags))
        except MlflowException:  # another writer was first
            experiment = server.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":  # the name stays taken
        restore = f"mlflow experiments restore -x {experiment.experiment_id}"
        raise DvqError(f"MLflow's experiment '{name}' is deleted: restore it ({restore}) or rename the sweep")
    return str(experiment.experiment_id)


def newest_experiment() -> str:
    """The id of the experiment with our latest run; empty if there is none, or MLflow fails."""
    try:
        server = client()
        experiments = [experiment.experiment_id for experiment in server.search_experiments()]
        order = ["attributes.start_time DESC"]
        runs = server.search_runs(experiments, "tags.`dvq.store` LIKE '%'", order_by=order, max_results=1)
    except Exception as error:
        print(f"tracking: {explanation(error)}", flush=True)
        return ""
    return str(runs[0].info.experiment_id) if runs else ""


def database(uri: str | None = None) -> Path | None:
    """The sqlite file that MLFLOW_TRACKING_URI, or ``uri``, names; None if that is a server."""
    place = os.environ.get("MLFLOW_TRACKING_URI", "") if uri is None else uri
    file = place.partition("sqlite:///")[2]
    return Path(file) if file else None


def _artifacts(experiment: str) -> str | None:
    """The place of an experiment's artifacts, beside the sqlite file; None for a server, which decides itself."""
    file = database()
    return str(file.absolute().parent / moved.ARTIFACTS / experiment) if file else None
