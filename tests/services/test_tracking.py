"""Tracking against a real MLflow server on PostgreSQL and S3, and against its faults: nothing is lost or doubled."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import LoggedModelStatus

from components import mlflow_server, tracking
from components.folder import begin, read_json, state, write_json
from components.tracking import TrialRun
from dvq import events
from dvq.config import trial
from dvq.data import prepare
from dvq.events import Events
from dvq.model import Model
from dvq.saved import save
from dvq.style import save_png
from pipeline.stack import Stack
from tests.services.conftest import wait_for
from tests.services.proxy import Exchange, Proxy, answer, answer_up_to, cut, hang

TINY = trial({"estimator": "gs-soft", "data": "cifar10-sample", "features": 4, "num_codes": 4, "code_dim": 3})
STEPS = 700
"""so many that the points need several batches"""
LOG_BATCH = r"POST .*/runs/log-batch"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    made = Stack(tmp_path_factory.mktemp("stack"))
    made.up()
    yield made
    made.down()


@pytest.fixture
def server(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy before MLflow's server, to which the environment leads."""
    made = Proxy(stack.ports["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield made
    made.close()


def train(folder: Path, name: str = "t") -> Events:
    """What training leaves in a trial's folder."""
    begin(folder, TINY, name)
    diary = Events(folder)
    diary.state("training")
    for step in range(1, STEPS + 1):
        diary.metrics(step, {"train/rate": step / 10, "train/distortion": -step / 7})
    save_png(np.zeros((8, 8, 3), dtype=np.uint8), folder / "images" / "a.png")
    diary.image(STEPS, "reconstructions", "images/a.png")
    return diary


def finish(folder: Path, diary: Events) -> None:
    diary.metrics(STEPS + 1, {"train/rate": 0.0, "test/bits_per_dim": 7.5})
    save(Model(TINY), folder / "model")
    save_png(np.zeros((8, 8, 3), dtype=np.uint8), folder / "figures" / "codebooks.png")
    for name in ("evaluation.json", "analysis.npz"):
        write_json(folder / name, {})
    evaluation = {"split": "test", "bits_per_dim": 7.5, "bits_per_dim_se": 0.25, "rate": 0.5, "distortion": 7}
    data = {"name": "cifar10-sample", "fingerprint": "f" * 64, "label": "bundled sample"}
    results = {"name": "t", "trial": {"steps": STEPS + 1}, "data": data, "provenance": {"torch": "x"}}
    write_json(folder / "results.json", {**results, "evaluation": evaluation, "training": {}})
    diary.state("finished")


def runs(experiment: str) -> list[Any]:
    found = mlflow_server.client().get_experiment_by_name(experiment)
    return list(mlflow_server.client().search_runs([found.experiment_id])) if found else []


def end_state(experiment: str) -> dict[str, Any]:
    """All that MLflow has of the experiment's one run, but for what is different each time."""
    client, (run,) = mlflow_server.client(), runs(experiment)
    models = [client.get_logged_model(one.model_id) for one in run.outputs.model_outputs]  # in any order
    (model,) = (one for one in models if one.status == LoggedModelStatus.READY)
    names = [
        item.path
        for part in ("", "figures", "images")
        for item in client.list_artifacts(run.info.run_id, part)
    ]
    return {
        "status": run.info.status,
        "times": (run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "data": [one.dataset.digest for one in run.inputs.dataset_inputs],
        "tags": {name: value for name, value in run.data.tags.items() if name.startswith("dvq.")},
        "points": points(run),
        "artifacts": sorted(name.partition("+timestamp")[0] for name in names),
        "model": sorted(one.path for one in client.list_logged_model_artifacts(model.model_id)),
    }


def points(run: Any) -> dict[str, list[tuple[int, float]]]:
    client = mlflow_server.client()
    return {
        name: sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))
        for name in run.data.metrics
    }


def stored(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What :func:`points` is to be, from the trial's events."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events.read(folder):
        for name, value in event.get("values", {}).items():
            found.setdefault(name, []).append((event["step"], value))
    return found


unheard = answer_up_to(0)
"""The server does what it is asked for, and the connection breaks before it can say so."""

FAULTS: dict[str, tuple[str, Callable[[Exchange], None]]] = {
    "the experiment's creation unanswered": (r"POST .*/experiments/create", hang),
    "a run made and its answer lost": (r"POST .*/runs/create", unheard),
    "points stored and their answer lost": (LOG_BATCH, unheard),
    "500": (LOG_BATCH, answer(500)),
    "503": (LOG_BATCH, answer(503)),
    "cut off": (LOG_BATCH, cut()),
    "taken and never answered": (LOG_BATCH, hang),
    "an image cut off": (r"PUT .*/images/.*webp", cut()),
    "a figure refused": (r"PUT .*/figures/", answer(500)),
    "the model cut off": (r"PUT .*/models/.*", cut()),
    "the end refused": (r"POST .*/runs/update", answer(500)),
}


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A trial's folder, and what MLflow has of it after no fault at all."""
    folder = tmp_path_factory.mktemp("undisturbed") / "trial"
    finish(folder, train(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", stack.address)
        assert TrialRun(folder, "undisturbed").sync()
        found = end_state("undisturbed")
    assert (found["status"], found["points"]) == ("FINISHED", stored(folder))
    assert "results.json" in found["artifacts"]
    return folder, found


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_request_leaves_the_end_as_it_is_without(
    name: str, server: Proxy, undisturbed: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = undisturbed
    pattern, fault = FAULTS[name]
    met = server.at(pattern, fault)
    run = TrialRun(folder, name)
    while not run.sync():
        assert "is not up to date in MLflow (" in capsys.readouterr().out
    assert met.is_set()
    assert end_state(name) == expected


def test_a_hanging_server_holds_nothing(
    server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the looks of the process that waits for training, and not its end: both return while not one request
    has been answered, nor has any been given up. (What a look costs is measured by tests/bench/tracking.py.)"""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    monkeypatch.setattr(tracking, "FINAL_WAIT", 1)
    met = server.at(r".*", hang, times=1000)
    diary, run = train(tmp_path / "trial"), TrialRun(tmp_path / "trial", "hanging")
    for step in range(200):
        diary.metrics(STEPS + 2 + step, {"train/rate": 1.0})
        run.sync_soon()
    wait_for(met.is_set, 60)
    run.sync_soon()
    run.finish()
    assert run._thread.is_alive()
    assert len(server.requests) == 1
    server.closing.set()
    run._thread.join(60)
    server.clear()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    assert TrialRun(tmp_path / "trial", "hanging").sync()
    assert points(runs("hanging")[0]) == stored(tmp_path / "trial")


def test_mlflow_killed_and_started_again(stack: Stack, server: Proxy, tmp_path: Path) -> None:
    """In the middle of a batch; down at the end of that trial, and from the start of another."""

    def kill() -> None:
        os.killpg(stack.pids["mlflow"], signal.SIGKILL)

    first, second = tmp_path / "first", tmp_path / "second"
    diary, run = train(first), TrialRun(first, "killed")
    server.at(LOG_BATCH, cut(kill))
    assert not run.sync()
    finish(first, diary)
    finish(second, train(second))
    assert not run.sync()
    assert not TrialRun(second, "killed too").sync()
    stack.up()
    server.upstream = stack.ports["mlflow"]
    for folder, experiment in ((first, "killed"), (second, "killed too")):
        assert TrialRun(folder, experiment).sync()
        assert end_state(experiment)["points"] == stored(folder)


def test_postgresql_restarted(stack: Stack, server: Proxy, tmp_path: Path) -> None:
    diary, run = train(tmp_path / "trial"), TrialRun(tmp_path / "trial", "postgres")

    def restart() -> None:
        service = stack._services()["postgres"]
        os.kill(stack.pids["postgres"], signal.SIGKILL)
        wait_for(lambda: not stack._processes("postgres"))
        stack._start("postgres", service)

    def fault(exchange: Exchange) -> None:
        restart()
        exchange.forward()

    server.at(LOG_BATCH, fault)
    wait_for(run.sync, 120)
    finish(tmp_path / "trial", diary)
    wait_for(run.sync, 120)
    found = end_state("postgres")
    assert (found["status"], found["points"]) == ("FINISHED", stored(tmp_path / "trial"))


@pytest.mark.usefixtures("server")
def test_eight_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    folders = [tmp_path / f"{number}" for number in range(8)]
    for folder in folders:
        train(folder)
        document = read_json(folder / "trial.json")
        assert document
        document |= {"key": f"{document['key']}-{folder.name}", "name": folder.name}
        write_json(folder / "trial.json", document)
    mlflow_server.client()
    threads = [threading.Thread(target=TrialRun(folder, "eight").sync) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for folder in folders:
        assert TrialRun(folder, "eight").sync()
    found = {run.info.run_name: points(run) for run in runs("eight")}
    assert found == {folder.name: stored(folder) for folder in folders}


@pytest.mark.usefixtures("server")
def test_an_interrupted_trial_is_killed_and_runs_again_when_it_goes_on(tmp_path: Path) -> None:
    diary = train(tmp_path / "trial")
    for name, status in (("interrupted", "KILLED"), ("training", "RUNNING"), ("interrupted", "KILLED")):
        diary.state(name)
        assert TrialRun(tmp_path / "trial", "interrupted").sync()
        assert [run.info.status for run in runs("interrupted")] == [status]
    finish(tmp_path / "trial", diary)
    assert TrialRun(tmp_path / "trial", "interrupted").sync()
    assert end_state("interrupted")["status"] == "FINISHED"


@pytest.mark.usefixtures("server")
def test_long_names_and_reports_have_room_in_postgresql(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diary = train(tmp_path / "trial", "gs-soft" * 40)
    finish(tmp_path / "trial", diary)
    assert TrialRun(tmp_path / "trial", "long").sync()
    (tmp_path / "report").mkdir()
    note = "\n".join(f"| trial {number} | 7.000 |" for number in range(1000))
    tracking.send_report("long", tmp_path / "report", note, failed=False)
    assert "tracking:" not in capsys.readouterr().out
    assert {run.info.run_name[:7] for run in runs("long")} == {"gs-soft", "report"}


TRAIN = "import json, sys; from pathlib import Path; from components import trials\n"
TRAIN += "trials.train('estimator=gs-soft', sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), 'sigterm')"


def test_sigterm_while_the_server_hangs(
    server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training ends with its checkpoint, and goes on: as without tracking."""
    base = {
        "data": "cifar10-sample",
        "features": 4,
        "num_codes": 4,
        "code_dim": 3,
        "batch_size": 8,
        "log_every": 1,
    }
    one = trial({**base, "estimator": "gs-soft"})
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    folder = tmp_path / "store" / "trials" / one.key()
    prepare("cifar10-sample", "", tmp_path / "data")
    met = server.at(r".*", hang, times=1000)
    command = [sys.executable, "-c", TRAIN, json.dumps(base), str(tmp_path / "data"), str(tmp_path / "model")]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: met.is_set() and stored(folder).get("train/rate"), 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(tracking.FINAL_WAIT + 10) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert state(folder).name == "interrupted"
    assert state(folder).step > 0
    server.clear()
    assert TrialRun(folder, "sigterm").sync()
    (run,) = runs("sigterm")
    assert (run.info.status, points(run)) == ("KILLED", stored(folder))
