"""MLflow as a projection of the store: a trial's run is brought up to date from the trial's folder.

``MLFLOW_TRACKING_URI`` names the server or database; without it, or without an experiment, nothing is
tracked. A sweep is an experiment, its runs are flat in it, and a trial's run is found by its key. What a run lacks is
asked of MLflow itself, so that nothing is lost or sent twice, whatever broke in between.
"""

import os
import re
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import moved
from components.folder import read_json, write_json
from dvq import DvqError, disk

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from components.runs import Run

PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
"""A call that is not answered fails, and the next sync asks first what arrived: MLflow's own retries would take
minutes, and could make a run twice."""
RETRY, LAST = 30, 5
"""Seconds before the background thread tries again after a failure, and seconds that the end of training waits for
it."""
REFUSED = (
    "MLflow at {} refuses the name and password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
    "to those of a user there"
)
ANOTHERS = "the experiment, or the model of that name, is another user's: ask its owner for EDIT permission"


def client(uri: str | None = None) -> "MlflowClient":
    """The client of the tracking server, or of ``uri``; its import takes seconds: it is made where it is needed."""
    _prepare()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _prepare() -> None:
    """Settings that MLflow reads when it is imported."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)


def redacted(text: str) -> str:
    """``text`` without the name and password of an address in it."""
    return re.sub(r"//[^/\s]*@", "//", text)


BEHIND = "is not up to date in MLflow"
"""what the log says of a trial, a report or a champion that MLflow did not take"""


def _say(what: str, error: Exception) -> None:
    # the body of a 403 of MLflow's own: others have other causes, such as a host that it does not know
    denied = getattr(error, "error_code", "") == "PERMISSION_DENIED" and "Permission denied" in str(error)
    lasting = denied or isinstance(error, DvqError)
    mended = "; make replay mends it" if os.environ.get("DVQ_STORE") and not lasting else ""
    why = ANOTHERS if denied else told(error)
    print(f"tracking: {what} {BEHIND} ({why}){mended}", flush=True)


def told(error: Exception) -> str:
    """One sentence for an error of MLflow's; if it is a bug, its traceback is printed."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException | OSError | DvqError):
        traceback.print_exception(error)
    if getattr(error, "error_code", "") == "UNAUTHENTICATED":
        return REFUSED.format(os.environ["MLFLOW_TRACKING_URI"])
    if "Max retries exceeded" in str(error):  # as MLflow's client says that none was answered
        return f"{redacted(os.environ['MLFLOW_TRACKING_URI'])} does not answer"
    return redacted((str(error).splitlines() or [type(error).__name__])[0])[:300]


def ensure() -> None:
    """Create the sqlite database's tables before many writers would do so at once: under another name, which is then
    renamed. An existing file is never replaced, since a process that has it open would write what nobody reads; but
    its paths are mended if its folder was moved."""
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
    """The experiment of that name, which is created if there is none."""
    from mlflow.exceptions import MlflowException

    found = server.get_experiment_by_name(name)
    if found is None:
        tags = {"mlflow.experimentKind": "custom_model_development"}  # MLflow shows its pages for training
        try:
            return str(server.create_experiment(name, _artifacts(name), tags=tags))
        except MlflowException:  # another writer was first
            found = server.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":  # the name stays taken
        restore = f"mlflow experiments restore -x {found.experiment_id}"
        raise DvqError(f"MLflow's experiment '{name}' is deleted: restore it ({restore}) or rename the sweep")
    return str(found.experiment_id)


def newest() -> str:
    """The id of the experiment with our latest run; empty if there is none, or MLflow cannot tell."""
    try:
        server = client()
        known = [one.experiment_id for one in server.search_experiments()]
        order = ["attributes.start_time DESC"]
        found = server.search_runs(known, "tags.`dvq.store` LIKE '%'", order_by=order, max_results=1)
    except Exception as error:
        print(f"tracking: {told(error)}", flush=True)
        return ""
    return str(found[0].info.experiment_id) if found else ""


def database(uri: str | None = None) -> Path | None:
    """The sqlite file that MLFLOW_TRACKING_URI, or ``uri``, names; None if that is a server."""
    place = os.environ.get("MLFLOW_TRACKING_URI", "") if uri is None else uri
    file = place.partition("sqlite:///")[2]
    return Path(file) if file else None


def _artifacts(experiment: str) -> str | None:
    """Where an experiment's artifacts go: beside the sqlite file; where a server tracks, it decides."""
    file = database()
    return str(file.absolute().parent / moved.ARTIFACTS / experiment) if file else None


def known(folder: Path, experiment: str, content: str = "finished") -> bool:
    """Whether MLflow has ``folder``'s ``content`` in the experiment, by a note in the folder, which a lost sqlite
    file refutes. MLflow, which is slow to import, is not asked."""
    file = database()
    noted = read_json(folder / "tracked.json") or {}
    return (file is None or file.exists()) and noted.get(_place(experiment)) == content


def known_somewhere(folder: Path, experiment: str) -> bool:
    """Whether MLflow has the finished trial in the experiment, under whatever address a worker calls it."""
    noted = read_json(folder / "tracked.json") or {}
    return any(place.endswith(f" {experiment}") and content == "finished" for place, content in noted.items())


def remember(folder: Path, experiment: str, content: str = "finished") -> None:
    """Note that MLflow has it."""
    noted = read_json(folder / "tracked.json") or {}
    write_json(folder / "tracked.json", {**noted, _place(experiment): content})


def forget(folder: Path, experiment: str) -> None:
    """Remove that note, so that MLflow is asked."""
    noted = read_json(folder / "tracked.json") or {}
    if noted.pop(_place(experiment), None):
        write_json(folder / "tracked.json", noted)


def _place(experiment: str) -> str:
    return f"{redacted(os.environ['MLFLOW_TRACKING_URI'])} {experiment}"


class TrialRun:
    """A trial's run in a sweep's experiment; its errors are printed, and never raised into the trial."""

    def __init__(self, folder: Path, experiment: str, name: str = "") -> None:
        """``name`` is what this sweep calls the trial; the sweep that computed it may have called it otherwise."""
        self.folder, self.experiment, self.name = folder, experiment, name
        self.enabled = bool(experiment and os.environ.get("MLFLOW_TRACKING_URI"))
        self._thread = threading.Thread()
        self._not_before = 0.0
        self._run: Run | None = None

    def settled(self) -> bool:
        """Whether there is nothing left to send: known without asking MLflow."""
        return not self.enabled or known(self.folder, self.experiment)

    def sync_soon(self) -> None:
        """Bring the run up to date in the background: takes no time."""
        if not (self._thread.is_alive() or self.settled() or time.monotonic() < self._not_before):
            self._thread = threading.Thread(target=self.sync, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Send the rest in the background, and wait for that, but not for long."""
        deadline = time.monotonic() + LAST
        if self._thread.is_alive():
            self._thread.join(LAST)
        self._not_before = 0.0
        self.sync_soon()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def sync(self) -> bool:
        """Bring the run up to date from the trial's folder; whether it is."""
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
                    remember(self.folder, self.experiment)
        except Exception as error:
            self._run, self._not_before = None, time.monotonic() + RETRY
            _say(f"trial {self.folder.name}", error)
            return False
        return True


def report(experiment: str, folder: Path, note: str, failed: bool) -> None:
    """The sweep's ``report`` run: its figures, its page and its table; ``note`` is Markdown, shown first.

    It is made anew when the note, which holds the table and its certificate, has changed.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") or known(folder, experiment, note):
        return
    try:
        server = client()
        from components.runs import send_report

        send_report(server, experiment, folder, note, failed)
        remember(folder, experiment, note)
    except Exception as error:
        _say(f"the report of {experiment}", error)


def champion(model: str, experiment: str, best: dict[str, Any]) -> None:
    """Make the trial whose results are ``best`` the champion of the registered model ``model``."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        return
    try:
        server = client()
        from components.runs import set_champion

        set_champion(server, model, experiment, best)
        print(f"champion: models:/{model}@champion is {best['name']}", flush=True)
    except Exception as error:
        _say(f"the champion of {experiment}", error)


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
            f"{uri}: MLflow gives no model ({told(error)}); is MLFLOW_TRACKING_URI right?"
        ) from None
