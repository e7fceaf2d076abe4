"""MLflow as a projection of the store: a trial's run is brought up to date from the trial's folder.

``MLFLOW_TRACKING_URI`` names the server or database; without it, or without an experiment, nothing is
tracked. A sweep is an experiment, its runs are flat in it, and a trial's run is found by its key.
"""

import os
import shutil
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.store import read_json, state, write_json
from dvq import DvqError, events
from dvq.fingerprints import FINGERPRINTS, LABELS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BATCH = 500  # metrics in a request; MLflow takes 1,000
STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "RUNNING", "new": "RUNNING"}


def client() -> "MlflowClient":
    """The client of the tracking server; its import takes seconds, so it is made where it is needed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient()


def ensure() -> None:
    """Create the sqlite database's schema, before many writers would try at once; whole or not at all."""
    database = _database()
    if database is None or database.exists():
        return
    client()
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    partial = database.with_name(database.name + ".partial")
    partial.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{partial}").search_experiments()
    partial.replace(database)


def _experiment(server: "MlflowClient", name: str) -> str:
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
    return str(found.experiment_id)


def _database() -> Path | None:
    """The sqlite file that tracks, if one does (rather than a server)."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _artifacts(experiment: str) -> str | None:
    """Where an experiment's artifacts go: beside the sqlite file; where a server tracks, it decides."""
    database = _database()
    return str(database.absolute().parent / "mlflow-artifacts" / experiment) if database else None


def _known(folder: Path, experiment: str, content: str = "finished") -> bool:
    """Whether this tracker has ``folder``'s ``content`` in the experiment, without asking it: MLflow is slow
    to import. A note in the folder says so, and a lost sqlite file refutes it."""
    database = _database()
    noted = read_json(folder / "tracked.json") or {}
    return (database is None or database.exists()) and noted.get(_place(experiment)) == content


def _remember(folder: Path, experiment: str, content: str = "finished") -> None:
    noted = read_json(folder / "tracked.json") or {}
    write_json(folder / "tracked.json", {**noted, _place(experiment): content})


def _place(experiment: str) -> str:
    return f"{os.environ['MLFLOW_TRACKING_URI']} {experiment}"


class TrialRun:
    """A trial's run in a sweep's experiment; :meth:`sync` never raises into the trial."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.folder, self.experiment = folder, experiment
        self.enabled = bool(experiment and os.environ.get("MLFLOW_TRACKING_URI"))
        self._server: MlflowClient | None = None
        self._run_id = ""
        self._sent = 0

    def sync(self) -> None:
        """Bring the run up to date from the trial's folder."""
        if self.settled():
            return
        try:
            self._sync()
        except Exception:
            print(f"tracking: {self.folder.name} could not be brought up to date; the trial goes on")
            traceback.print_exc()

    def settled(self) -> bool:
        """Whether there is nothing left to send: known without asking MLflow."""
        return not self.enabled or _known(self.folder, self.experiment)

    def _sync(self) -> None:
        document = read_json(self.folder / "trial.json")
        if document is None:
            return
        if self._server is None:
            self._server = client()
            run = _find_or_create(
                self._server, _experiment(self._server, self.experiment), document, self.folder
            )
            self._run_id, self._sent = run.info.run_id, int(run.data.tags.get("dvq.events_sent", 0))
            if run.info.status == "FAILED":  # it is tried again
                self._server.update_run(self._run_id, status="RUNNING")
                self._server.delete_tag(self._run_id, "dvq.failure")
        self._send_events(self._server)
        now = state(self.folder)
        if now.name == "failed":
            self._server.set_tag(self._run_id, "dvq.failure", now.reason)
            self._server.set_terminated(self._run_id, "FAILED", _last_time(self.folder))
        if now.name == "finished":
            _send_results(self._server, self._run_id, self.folder)
            self._server.set_terminated(self._run_id, "FINISHED", _last_time(self.folder))
            _remember(self.folder, self.experiment)

    def _send_events(self, server: "MlflowClient") -> None:
        from mlflow.entities import Metric

        # Of training that goes on after an interruption the same points come again: they are counted, for their
        # order is always the same, and only those after the last that was sent are sent.
        sendable = [event for event in events.read(self.folder) if event["kind"] in ("metrics", "image")]
        fresh = sendable[self._sent :]
        points = [
            Metric(name, value, round(event["time"] * 1000), event["step"])
            for event in fresh
            if event["kind"] == "metrics"
            for name, value in event["values"].items()
        ]
        for start in range(0, len(points), BATCH):
            server.log_batch(self._run_id, metrics=points[start : start + BATCH])
        for event in fresh:
            if event["kind"] == "image":
                _send_image(server, self._run_id, self.folder / event["path"], event)
        if fresh:
            self._sent += len(fresh)
            server.set_tag(self._run_id, "dvq.events_sent", str(self._sent))


def _send_image(server: "MlflowClient", run_id: str, path: Path, event: dict[str, Any]) -> None:
    from PIL import Image

    with Image.open(path) as image:
        server.log_image(run_id, image.convert("RGB"), key=event["name"], step=event["step"])


def _last_time(folder: Path) -> int:
    return round(1000 * max((event["time"] for event in events.read(folder)), default=time.time()))


def _find_or_create(
    server: "MlflowClient", experiment_id: str, document: dict[str, Any], folder: Path
) -> "Run":
    """The run of this attempt at the trial; runs of attempts that the store no longer knows are deleted."""
    for run in server.search_runs([experiment_id], f"tags.`dvq.key` = '{document['key']}'"):
        if run.data.tags.get("dvq.attempt") == document["attempt"]:
            return run
        server.delete_run(run.info.run_id)
    trial = document["trial"]
    label = LABELS[trial["data"]]
    tags = {
        "dvq.key": document["key"],
        "dvq.attempt": document["attempt"],
        "dvq.data": label,
        "mlflow.note.content": f"`{document['name']}` on {label}",
    }
    first = next(events.read(folder), {"time": time.time()})
    run = server.create_run(experiment_id, round(first["time"] * 1000), tags, run_name=document["name"])
    _send_inputs(server, run.info.run_id, trial)
    return run


def _send_inputs(server: "MlflowClient", run_id: str, trial: dict[str, Any]) -> None:
    """The trial's fields as parameters, and its data by fingerprint."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    server.log_batch(run_id, params=[Param(key, str(value)) for key, value in trial.items()])
    name, fingerprint = trial["data"], FINGERPRINTS[trial["data"]]
    dataset = Dataset(name, fingerprint[:16], "code", "{}", profile=f'{{"label": "{LABELS[name]}"}}')
    server.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])


def _send_results(server: "MlflowClient", run_id: str, folder: Path) -> None:
    """The finished trial's results, figures and model."""
    results = read_json(folder / "results.json") or {}
    for name, value in results.get("provenance", {}).items():
        server.set_tag(run_id, f"dvq.{name}", value)
    for artifact in ("results.json", "evaluation.json", "analysis.npz"):
        server.log_artifact(run_id, str(folder / artifact))
    server.log_artifacts(run_id, str(folder / "figures"), "figures")
    _send_model(run_id, folder / "model")


def _send_model(run_id: str, model: Path) -> None:
    """The model as a pyfunc made from code and safetensors: nothing in it is a pickle."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import dvq

    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, 32, 32, 3))])
    method = ParamSchema([ParamSpec("method", "string", "encode")])
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "dvq"
        shutil.copytree(
            Path(dvq.__file__).parent, code, ignore=shutil.ignore_patterns("sample", "__pycache__")
        )
        with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MLflow wants type hints or examples where a signature is given
            mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("pyfunc.py")),
                artifacts={"model": str(model)},
                code_paths=[str(code)],
                signature=ModelSignature(inputs=images, params=method),
                pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
            )


REQUIREMENTS = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "mlflow")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).partition("+")[0]


def download(uri: str) -> str:
    """The folder for ``dvq.load`` of a model that MLflow keeps (``models:/…``, ``runs:/…``)."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        return str(Path(mlflow.artifacts.download_artifacts(uri)) / "artifacts" / "model")
    except (MlflowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise DvqError(f"{uri}: MLflow gives no model ({first}); is MLFLOW_TRACKING_URI right?") from None


def report(experiment: str, folder: Path, note: str, failed: bool) -> None:
    """The sweep's ``report`` run: its figures, its page and its table; ``note`` is Markdown, shown first.

    It is made anew when the note, which holds the table and its certificate, is another.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI") or _known(folder, experiment, note):
        return
    server = client()
    experiment_id = _experiment(server, experiment)
    for old in server.search_runs([experiment_id], "tags.`dvq.report` = 'true'"):
        server.delete_run(old.info.run_id)
    tags = {"dvq.report": "true", "mlflow.note.content": note}
    run = server.create_run(experiment_id, tags=tags, run_name="report")
    server.log_artifacts(run.info.run_id, str(folder))
    server.set_terminated(run.info.run_id, "FAILED" if failed else "FINISHED")
    _remember(folder, experiment, note)
