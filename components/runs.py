"""What MLflow gets: a trial's run with its curves, results and model, a sweep's ``report`` run, and its champion."""

import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.entities import Run as MlflowRun

from components import logged
from components.folder import read_json
from components.mlflow_server import database, experiment_id
from dvq import DvqError, fingerprints
from dvq.events import Tail

BATCH = 500  # metrics in a request; MLflow takes 1,000
NAME, NOTE = 250, 7_900
"""Characters of a run's name and of its note, at most: PostgreSQL has a column of 250 and one of 8,000 for them."""


class Run:
    """A trial's run. MLflow is asked once what it has, and then sent what is new."""

    def __init__(self, server: MlflowClient, folder: Path, experiment: str, document: dict[str, Any]) -> None:
        run = _find_or_create(server, experiment_id(server, experiment), document, folder)
        if not run.data.params:
            _send_inputs(server, run.info.run_id, document["trial"])
        self.server, self.folder, self.id = server, folder, run.info.run_id
        self._status, self._reason = run.info.status, run.data.tags.get("dvq.failure", "")
        self._name, self._model = _name(document), logged.ready_model(server, run)
        self._shape, self._about = fingerprints.shape(document["trial"]["data"]), _about(document)
        # A metric's points come in the order of steps, and training repeats some after an interruption: new are those
        # after the last step that MLflow has, which only these private objects tell.
        self._last = {metric.key: metric.step for metric in run.data._metric_objs}
        pattern = re.compile(r"images/(.+)\+step\+(\d+)\+.+\+compressed")
        matches = (pattern.match(image.path) for image in server.list_artifacts(self.id, "images"))
        self._images = {(match[1], int(match[2])) for match in matches if match}
        self._tail = Tail(folder)
        self._last_event: dict[str, Any] = {"time": time.time()}  # the last event of a state or a failure

    def sync(self) -> bool:
        """Send what is new in the trial's folder; whether that was all of a finished trial."""
        if self._status == "FINISHED":
            return True
        finished = (self.folder / "results.json").exists()
        self._send_events()
        self._set_status(_status(self._last_event))
        if finished:
            self._send_results()
            self._set_status("FINISHED")
        return finished

    def _send_events(self) -> None:
        batch: list[Metric] = []
        for event in self._tail.fresh():
            if event["kind"] == "metrics":
                batch += self._new_points(event)
            elif event["kind"] == "image" and (event["name"], event["step"]) not in self._images:
                self._send_image(event)
            elif event["kind"] in ("state", "failure"):
                self._last_event = event
            if len(batch) >= BATCH:
                self.server.log_batch(self.id, metrics=batch[:BATCH])
                batch = batch[BATCH:]
        if batch:
            self.server.log_batch(self.id, metrics=batch)

    def _new_points(self, event: dict[str, Any]) -> list[Metric]:
        step, timestamp = event["step"], round(event["time"] * 1000)
        new = [name for name in event["values"] if step > self._last.get(name, -1)]
        self._last.update(dict.fromkeys(new, step))
        return [Metric(name, event["values"][name], timestamp, step) for name in new]

    def _send_image(self, event: dict[str, Any]) -> None:
        """Like MLflow's log_image, but under the same names each time: an image that was cut off is replaced."""
        from PIL import Image

        suffix = f"step+{event['step']}+timestamp+{round(event['time'] * 1000)}+{self.id}"
        with tempfile.TemporaryDirectory() as scratch, Image.open(self.folder / event["path"]) as image:
            for name in (f"{event['name']}+{suffix}.png", f"{event['name']}+{suffix}+compressed.webp"):
                image.convert("RGB").save(Path(scratch) / name)
                self.server.log_artifact(self.id, str(Path(scratch) / name), "images")
        self.server.set_tag(self.id, "mlflow.loggedImages", "True")
        self._images.add((event["name"], event["step"]))

    def _set_status(self, status: str) -> None:
        reason = self._last_event["reason"] if status == "FAILED" else ""
        if (status, reason) == (self._status, self._reason):
            return
        if reason:
            self.server.set_tag(self.id, "dvq.failure", reason)
            self.server.set_tag(self.id, "mlflow.note.content", f"{self._about} failed: {reason}")
        elif self._reason:  # it is tried again
            self.server.delete_tag(self.id, "dvq.failure")
            self.server.set_tag(self.id, "mlflow.note.content", self._about)
        if status == "RUNNING":
            self.server.update_run(self.id, status=status)
        else:
            self.server.set_terminated(self.id, status, round(1000 * self._last_event["time"]))
        self._status, self._reason = status, reason

    def _send_results(self) -> None:
        """The finished trial's results, figures and model."""
        results = read_json(self.folder / "results.json") or {}
        for name, value in results["provenance"].items():
            self.server.set_tag(self.id, f"dvq.{name}", value)
        for artifact in ("results.json", "evaluation.json", "analysis.npz"):
            if (self.folder / artifact).exists():  # continuous latent variables have no codebooks to analyse
                self.server.log_artifact(self.id, str(self.folder / artifact))
        if (self.folder / "figures").exists():
            self.server.log_artifacts(self.id, str(self.folder / "figures"), "figures")
        run, timestamp = self.server.get_run(self.id), round(1000 * self._last_event["time"])
        self._model = self._model or logged.send_model(
            self.server, run, self._name, self._shape, self.folder / "model"
        )
        logged.send_scores(self.server, run, self._model, results, timestamp)
        self.server.set_tag(self.id, "mlflow.note.content", logged.note(results, self._model))


def _status(event: dict[str, Any]) -> str:
    if event.get("kind") == "failure":
        return "FAILED"
    return "KILLED" if event.get("state") == "interrupted" else "RUNNING"


def _store_id() -> str:
    """What tells this store from others on the same server: its address, or its folder's path and inode, since
    another machine may have a folder of that path. Empty without a store."""
    place = os.environ.get("DVQ_STORE", "")
    return place if "://" in place or not place else f"{Path(place).resolve()}#{Path(place).stat().st_ino}"


def _is_ours(store: str) -> bool:
    """Whether ``store`` is this one. In a sqlite file, which belongs to one machine, the folder's path is enough, as
    its inode changes when it is restored from a backup."""
    ours = _store_id()
    return store == ours or bool(database() and store.rsplit("#", 1)[0] == ours.rsplit("#", 1)[0])


def _find_runs(server: MlflowClient, experiment: str, tag: str, value: str) -> list[MlflowRun]:
    """The runs with a tag that belong to this store, or, without a store, to none."""
    runs = server.search_runs([experiment], f"tags.`{tag}` = '{value}'")
    return [run for run in runs if _is_ours(run.data.tags.get("dvq.store", ""))]


def _find_or_create(
    server: MlflowClient, experiment: str, document: dict[str, Any], folder: Path
) -> MlflowRun:
    """The run of this attempt at the trial. Runs of its earlier attempts are deleted, with their models."""
    for run in _find_runs(server, experiment, "dvq.key", document["key"]):
        if run.data.tags.get("dvq.attempt") == document["attempt"]:
            return run
        if _store_id():
            logged.delete_models(server, run)
            server.delete_run(run.info.run_id)
    from dvq.style import tint

    tags = {
        "dvq.key": document["key"],
        "dvq.attempt": document["attempt"],
        "dvq.store": _store_id(),
        "dvq.data": fingerprints.label(document["trial"]["data"]),
        "mlflow.note.content": _about(document),
        "mlflow.runColor": tint(document["trial"]["estimator"], document["name"]),
    }
    first_event = next(Tail(folder).fresh(), {"time": time.time()})
    return server.create_run(experiment, round(first_event["time"] * 1000), tags, run_name=_name(document))


def _name(document: dict[str, Any]) -> str:
    """The trial's name; if it is too long, its beginning and the key."""
    name, key = document["name"], document["key"]
    return name if len(name) <= NAME else f"{name[: NAME - len(key) - 1]}-{key}"


def _about(document: dict[str, Any]) -> str:
    return f"`{document['name']}` on {fingerprints.label(document['trial']['data'])}"


def _send_inputs(server: MlflowClient, run_id: str, trial: dict[str, Any]) -> None:
    """Send the trial's data by fingerprint, and then its fields as parameters in one request."""
    name = trial["data"]
    about = json.dumps({"label": fingerprints.label(name)})
    dataset = Dataset(name, fingerprints.of(name)[:16], "code", "{}", profile=about)
    server.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    server.log_batch(run_id, params=[Param(key, str(value)) for key, value in trial.items()])


def send_report(server: MlflowClient, experiment: str, folder: Path, note: str, failed: bool) -> None:
    """Make the sweep's ``report`` run anew: its figures, page and table. ``note`` is shown first, its first line
    beside the experiment's name. The former run is deleted once the new one is complete."""
    experiment = experiment_id(server, experiment)
    note = _shortened(note)
    server.set_experiment_tag(experiment, "mlflow.note.content", note.partition("\n")[0])
    earlier_runs = _find_runs(server, experiment, "dvq.report", "true")
    tags = {"dvq.report": "true", "dvq.store": _store_id(), "mlflow.note.content": note}
    run = server.create_run(experiment, tags=tags, run_name="report")
    server.log_artifacts(run.info.run_id, str(folder))
    server.set_terminated(run.info.run_id, "FAILED" if failed else "FINISHED")
    for earlier_run in earlier_runs:
        server.delete_run(earlier_run.info.run_id)


def _shortened(note: str) -> str:
    """The note, or as many of its first lines as there is room for."""
    if len(note) <= NOTE:
        return note
    beginning = note[:NOTE]
    return (beginning.rpartition("\n")[0] or beginning) + "\n\n… all rows: table.json"


def set_champion(server: MlflowClient, model: str, experiment: str, best: dict[str, Any]) -> None:
    """Register the trial whose results are ``best`` as a version of ``model`` with the alias champion, tagged with
    its origin."""
    run = next(iter(_find_runs(server, experiment_id(server, experiment), "dvq.key", best["key"])), None)
    if run is None:
        raise DvqError(f"{best['name']} has no run there; make replay sends it anew")
    lineage = {
        "dvq.sweep": experiment,
        "dvq.trial": best["name"],
        "dvq.key": best["key"],
        "dvq.attempt": run.data.tags["dvq.attempt"],
        "dvq.data": best["data"]["label"],
        "dvq.fingerprint": best["data"]["fingerprint"],
        "dvq.commit": best["provenance"]["commit"],
        f"dvq.{best['evaluation']['split']}_bits_per_dim": f"{best['evaluation']['bits_per_dim']:.6f}",
    }
    versions = logged.versions(server, model, lineage["dvq.attempt"])
    if not versions:
        versions = [
            mlflow.register_model(f"models:/{logged.ready_model(server, run)}", model, tags=lineage).version
        ]
    server.set_registered_model_alias(model, "champion", versions[0])
