"""MLflow as a projection of the store: a trial's run is brought up to date from the trial's folder.

``MLFLOW_TRACKING_URI`` names the server or database; without it, or without an experiment, nothing is tracked. A
sweep is an experiment, and a trial's run in it is found by the trial's key. MLflow itself is asked what a run lacks,
so that nothing is lost or sent twice after a fault.
"""

import os
import re
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import moved
from components.folder import read_json, write_json
from dvq import DvqError, disk

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from components.runs import Run

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""An unanswered call fails, and the next sync first asks what arrived: MLflow's own retries would take minutes and
could make a run twice."""
RETRY, FINAL_WAIT = 30, 5
"""Seconds before the background thread tries again after a failure, and seconds that the end of training waits for
it."""
REFUSED = (
    "MLflow at {} refuses the name and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
    "to those of a user there"
)
DENIED = "the experiment, or the model of that name, is another user's: ask its owner for EDIT permission"


def client(uri: str | None = None) -> "MlflowClient":
    """The client of the tracking server, or of ``uri``; importing MLflow takes seconds, so only this does it."""
    _prepare()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _prepare() -> None:
    """Set the environment variables that MLflow reads when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


def redacted(text: str) -> str:
    """``text`` without the name and password of an address in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


BEHIND = "is not up to date in MLflow"
"""in the log, about a trial, a report or a champion that could not be sent"""


def _print_failure(subject: str, error: Exception) -> None:
    # the body of MLflow's own 403; others have other causes, such as a host that it does not know
    forbidden = getattr(error, "error_code", "") == "PERMISSION_DENIED" and "Permission denied" in str(error)
    lasting = forbidden or isinstance(error, DvqError)
    remedy = "; make replay mends it" if os.environ.get("DVQ_STORE") and not lasting else ""
    reason = DENIED if forbidden else explanation(error)
    print(f"tracking: {subject} {BEHIND} ({reason}){remedy}", flush=True)


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


def is_sent(folder: Path, experiment: str, content: str = "finished") -> bool:
    """Whether MLflow has ``folder``'s ``content`` in the experiment, by a mark in the folder, unless the sqlite file
    is gone. MLflow, which is slow to import, is not asked."""
    file = database()
    return (file is None or file.exists()) and _notes(folder).get(_note_key(experiment)) == content


def is_sent_anywhere(folder: Path, experiment: str) -> bool:
    """Whether MLflow, under any address, has the finished trial in the experiment."""
    notes = _notes(folder).items()
    return any(place.endswith(f" {experiment}") and content == "finished" for place, content in notes)


def mark_sent(folder: Path, experiment: str, content: str = "finished") -> None:
    """Record in the folder that MLflow has ``content`` in the experiment."""
    write_json(folder / "tracked.json", {**_notes(folder), _note_key(experiment): content})


def unmark_sent(folder: Path, experiment: str) -> None:
    """Remove that record, so that MLflow is asked."""
    notes = _notes(folder)
    if notes.pop(_note_key(experiment), None):
        write_json(folder / "tracked.json", notes)


def _notes(folder: Path) -> dict[str, Any]:
    """What is noted in the folder; nothing where that is damaged, so that MLflow is asked."""
    with suppress(DvqError):
        return read_json(folder / "tracked.json") or {}
    return {}


def _note_key(experiment: str) -> str:
    return f"{redacted(os.environ['MLFLOW_TRACKING_URI'])} {experiment}"


class TrialRun:
    """A trial's run in a sweep's experiment; errors are printed, never raised."""

    def __init__(self, folder: Path, experiment: str, name: str = "") -> None:
        """``name``: the trial's name in this sweep; in the sweep that computed it, it may have another."""
        self.folder, self.experiment, self.name = folder, experiment, name
        self.enabled = bool(experiment and os.environ.get("MLFLOW_TRACKING_URI"))
        self._thread = threading.Thread()
        self._not_before = 0.0
        self._run: Run | None = None

    def settled(self) -> bool:
        """Whether nothing is left to send, without asking MLflow."""
        return not self.enabled or is_sent(self.folder, self.experiment)

    def sync_soon(self) -> None:
        """Bring the run up to date in the background."""
        if not (self._thread.is_alive() or self.settled() or time.monotonic() < self._not_before):
            self._thread = threading.Thread(target=self.sync, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Send the rest in the background, and wait for that for a few seconds at most."""
        deadline = time.monotonic() + FINAL_WAIT
        if self._thread.is_alive():
            self._thread.join(FINAL_WAIT)
        self._not_before = 0.0
        self.sync_soon()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def sync(self) -> bool:
        """Bring the run up to date from the trial's folder; returns whether that succeeded."""
        if self.settled():
            return True
        try:
            document = read_json(self.folder / "trial.json")
            if document is not None:
                server = client()
                from components.runs import Run

                document["name"] = self.name or document["name"]
                self._run = self._run or Run(server, self.folder, self.experiment, document)
                if self._run.sync():
                    mark_sent(self.folder, self.experiment)
        except Exception as error:
            self._run, self._not_before = None, time.monotonic() + RETRY
            _print_failure(f"trial {self.folder.name}", error)
            return False
        return True


def send_report(experiment: str, folder: Path, note: str, failed: bool) -> None:
    """Make the sweep's ``report`` run: its figures, page and table; ``note`` is Markdown, shown first.

    It is made again only when the note, which holds the table and its certificate, has changed.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") or is_sent(folder, experiment, note):
        return
    try:
        server = client()
        from components import runs

        runs.send_report(server, experiment, folder, note, failed)
        mark_sent(folder, experiment, note)
    except Exception as error:
        _print_failure(f"the report of {experiment}", error)


def set_champion(model: str, experiment: str, best: dict[str, Any]) -> None:
    """Make the trial whose results are ``best`` the champion of the registered model ``model``."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return
    try:
        server = client()
        from components import runs

        runs.set_champion(server, model, experiment, best)
        print(f"champion: models:/{model}@champion is {best['name']}", flush=True)
    except Exception as error:
        _print_failure(f"the champion of {experiment}", error)


def download(uri: str) -> str:
    """The folder for ``dvq.load`` of a model that MLflow keeps (``models:/…``, ``runs:/…``)."""
    _prepare()
    import mlflow

    if not mlflow.is_tracking_uri_set():  # MLflow would make an empty database where one stands
        raise DvqError(
            f"{uri}: no MLflow is named; set MLFLOW_TRACKING_URI to its server's address, or sqlite:///outputs/mlflow.db"
        )
    file = database(mlflow.get_tracking_uri())
    if file and not file.exists():  # likewise
        raise DvqError(f"{uri}: MLFLOW_TRACKING_URI names the database {file.absolute()}, which is not there")
    try:
        return str(Path(mlflow.artifacts.download_artifacts(uri)) / "artifacts" / "model")
    except Exception as error:
        raise DvqError(
            f"{uri}: MLflow gives no model ({explanation(error)}); is MLFLOW_TRACKING_URI right?"
        ) from None
