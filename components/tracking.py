"""MLflow as a projection of the store: a trial's run is brought up to date from the trial's folder.

``MLFLOW_TRACKING_URI`` names the server or database; without it, or without an experiment, nothing is tracked. A
sweep is an experiment, and a trial's run in it is found by the trial's key. MLflow itself is asked what a run lacks,
so that nothing is lost or sent twice after a fault.
"""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.folder import read_json, write_json
from components.mlflow_server import client, database, explanation, prepare, redacted
from dvq import DvqError

if TYPE_CHECKING:
    from components.runs import Run

RETRY, FINAL_WAIT = 30, 5
"""Seconds before the background thread tries again after a failure, and seconds that the end of training waits for
it."""
DENIED = "the experiment, or the model of that name, is another user's: ask its owner for EDIT permission"
BEHIND = "is not up to date in MLflow"
"""in the log, about a trial, a report or a champion that could not be sent"""


def _print_failure(subject: str, error: Exception) -> None:
    # the body of MLflow's own 403; others have other causes, such as a host that it does not know
    forbidden = getattr(error, "error_code", "") == "PERMISSION_DENIED" and "Permission denied" in str(error)
    lasting = forbidden or isinstance(error, DvqError)
    remedy = "; make replay mends it" if os.environ.get("DVQ_STORE") and not lasting else ""
    reason = DENIED if forbidden else explanation(error)
    print(f"tracking: {subject} {BEHIND} ({reason}){remedy}", flush=True)


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
    prepare()
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
