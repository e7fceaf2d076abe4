"""MLflow is brought up to date from a trial's folder, and nothing is doubled or lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components import mlflow_server, reports, tracking, trials
from components.folder import begin, read_json, state, write_json
from components.store import Store
from dvq import events
from dvq.config import trial
from dvq.events import Events
from dvq.model import Model
from dvq.saved import save
from dvq.style import save_png
from dvq.sweep import Sweep

ROOT = Path(__file__).parents[2]

TINY = trial({"estimator": "gs-soft", "data": "cifar10-sample", "features": 4, "num_codes": 4, "code_dim": 3})

RESULTS = {
    "name": "gs-soft-c4-k8-s0",
    "trial": {"steps": 4},
    "data": {"name": "cifar10-sample", "fingerprint": "f" * 64, "label": "bundled sample"},
    "provenance": {"torch": "x"},
    "evaluation": {
        "split": "test", "bits_per_dim": 7.5, "bits_per_dim_se": 0.25, "rate": 0.5, "distortion": 7, "bound": 7.25,
        "fitted_bits_per_dim": 7.125,
    },
    "training": {"images_per_second": 50.0},
    "analysis": {"components_95_weighted_mean": 2.5},
}  # fmt: skip


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("DVQ_STORE", str(tmp_path))


def folder_with(tmp_path: Path, steps: int) -> tuple[Path, Events]:
    folder = tmp_path / "trial"
    begin(folder, TINY, "gs-soft-c4-k8-s0")
    diary = Events(folder)
    diary.state("training")
    for step in range(1, steps + 1):
        diary.metrics(step, {"train/rate": step / 10})
    return folder, diary


def finish(folder: Path, diary: Events) -> None:
    import numpy as np

    save_png(np.zeros((8, 8, 3), dtype=np.uint8), folder / "images" / "a.png")
    diary.image(1, "reconstructions", "images/a.png")
    save(Model(TINY), folder / "model")
    save_png(np.zeros((8, 8, 3), dtype=np.uint8), folder / "figures" / "codebooks.png")
    for name in ("evaluation.json", "analysis.npz"):
        write_json(folder / name, {})
    write_json(folder / "results.json", RESULTS)
    diary.state("finished")


def runs(experiment: str = "sweep") -> list[Any]:
    server = mlflow_server.client()
    found = server.get_experiment_by_name(experiment)
    assert found is not None
    return list(server.search_runs([found.experiment_id]))


def history(run: Any, name: str) -> list[tuple[int, float]]:
    points = mlflow_server.client().get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


def test_a_finished_trial_is_a_finished_run_with_all_it_made(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder, diary = folder_with(tmp_path, 3)
    live = tracking.TrialRun(folder, "sweep")
    live.sync()
    assert runs()[0].info.status == "RUNNING"
    diary.metrics(4, {"train/rate": 0.4, "test/bits_per_dim": 7.5})
    finish(folder, diary)
    live.sync()
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "gs-soft-c4-k8-s0"
    assert run.data.params["temperature"] == "0.5"
    assert "bundled sample" in run.data.tags["dvq.data"]
    assert history(run, "train/rate") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert run.data.metrics["test/bits_per_dim"] == 7.5
    paths = {item.path for item in mlflow_server.client().list_artifacts(run.info.run_id)}
    assert {"figures", "images", "results.json"} <= paths
    assert len(run.outputs.model_outputs) == 1
    assert not [one for one in recwarn if "type hints" in str(one.message)], "make report would show it"


@pytest.mark.parametrize("how", ["moved", "copied back"])
def test_a_moved_folder_has_the_same_runs_and_models(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work_in(outputs: Path) -> tracking.TrialRun:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{outputs}/mlflow.db")
        monkeypatch.setenv("DVQ_STORE", str(outputs / "store"))
        mlflow_server.ensure_database()
        return tracking.TrialRun(outputs / "store" / "trial", "sweep")

    old, new = tmp_path / "old", tmp_path / "new"
    (old / "store").mkdir(parents=True)
    folder, diary = folder_with(old / "store", 3)
    finish(folder, diary)
    assert work_in(old).sync()
    (before,) = runs()
    shutil.copytree(old, new)  # other inodes
    shutil.rmtree(old)
    place = new if how == "moved" else old
    if place is old:
        new.rename(old)
    (place / "store" / "trial" / "tracked.json").unlink()
    assert work_in(place).sync()
    (run,) = runs()
    assert run.info.run_id == before.info.run_id
    assert run.info.artifact_uri.startswith(f"{place}/")
    model = run.outputs.model_outputs[0].model_id
    assert (Path(tracking.download(f"models:/{model}")) / "model.safetensors").exists()
    assert old.exists() == (place is old)


def test_a_finished_trials_numbers_are_on_its_run_and_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, though the first attempt at sending them was cut off at its end."""
    from mlflow import MlflowClient

    folder, diary = folder_with(tmp_path, 3)
    diary.metrics(4, {"train/rate": 0.4, "test/bits_per_dim": 7.5, "images_per_second": 40.0})
    finish(folder, diary)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_: 1 / 0)
        assert not tracking.TrialRun(folder, "sweep").sync()
    assert tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    for name, value in {
        "bits_per_dim": 7.5,
        "bound": 7.25,
        "components_95_weighted": 2.5,
    }.items():
        assert history(run, f"test/{name}") == [(4, value)]
    (output,) = run.outputs.model_outputs
    model = mlflow_server.client().get_logged_model(output.model_id)
    assert (model.name, model.experiment_id) == (run.info.run_name, run.info.experiment_id)
    assert model.params == run.data.params
    assert {one.key: one.value for one in model.metrics} == {
        name: value for name, value in run.data.metrics.items() if name.startswith("test/")
    }
    assert {one.dataset_name for one in model.metrics} == {"cifar10-sample"}
    assert run.data.metrics["images_per_second"] == 50.0, "of the whole training, not of its end"
    said = run.data.tags["mlflow.note.content"]
    assert "**7.500 ± 0.250 bits/dim**" in said
    assert "7.125 with prior and batch normalization's statistics fitted" in said
    assert f'dvq.load("models:/{output.model_id}")' in said


@pytest.mark.parametrize("what", ["send_scores", "note"])
def test_a_run_is_finished_when_all_is_there_and_not_before(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the trial's model was sent, what comes after it failed, and a finished run is never looked at again."""
    from components import logged

    folder, diary = folder_with(tmp_path, 3)
    finish(folder, diary)
    with monkeypatch.context() as patch:
        patch.setattr(logged, what, lambda *_: 1 / 0)
        assert not tracking.TrialRun(folder, "sweep").sync()
    assert runs()[0].info.status == "RUNNING"
    assert tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert history(run, "test/bound") == [(4, 7.25)]
    assert "bits/dim**" in run.data.tags["mlflow.note.content"]


def test_a_trial_that_another_sweep_computed_has_this_sweeps_name(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 1)
    finish(folder, diary)
    tracking.TrialRun(folder, "sweep", "its-name-here").sync()
    assert [run.info.run_name for run in runs()] == ["its-name-here"]


def test_a_model_has_its_trials_name_as_far_as_mlflow_allows(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 1)
    name = "gs-soft-c4-k8-s0-temperature-0.1"
    write_json(folder / "trial.json", {**(read_json(folder / "trial.json") or {}), "name": name})
    finish(folder, diary)
    assert tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert run.info.run_name == name
    (output,) = run.outputs.model_outputs
    assert mlflow_server.client().get_logged_model(output.model_id).name == "gs-soft-c4-k8-s0-temperature-0_1"


def test_a_runs_name_has_room_in_mlflows_database_and_is_no_others(tmp_path: Path) -> None:
    """PostgreSQL has 250 characters for it, sqlite any number."""
    for key in ("0" * 16 + "-4", "0" * 16 + "-8"):
        folder, diary = folder_with(tmp_path / key, 1)
        document = {**(read_json(folder / "trial.json") or {}), "key": key, "name": "gs-soft" * 40 + key}
        write_json(folder / "trial.json", document)
        finish(folder, diary)
        assert tracking.TrialRun(folder, "sweep").sync()
    names = {run.info.run_name for run in runs()}
    assert {len(name) for name in names} == {250}
    assert {name[-19:] for name in names} == {f"-{'0' * 16}-4", f"-{'0' * 16}-8"}


def test_a_long_report_has_room_in_mlflows_database_and_is_known(tmp_path: Path) -> None:
    """PostgreSQL has 8,000 characters for a tag, sqlite any number."""
    page = tmp_path / "report"
    page.mkdir()
    rows = [f"| trial {number} " + "| 7.000 " * 6 + "|" for number in range(200)]
    note = "\n".join(["What it is.", "", *rows])
    for last in ("", "\none more"):
        assert not tracking.is_sent(page, "sweep", note + last)
        tracking.send_report("sweep", page, note + last, failed=False)
        assert tracking.is_sent(page, "sweep", note + last)
    (run,) = runs()
    said = run.data.tags["mlflow.note.content"].splitlines()
    assert 7800 < len("\n".join(said)) < 8000
    assert (said[-2:], set(said[2:-2]) <= set(rows)) == (["", "… all rows: table.json"], True)
    assert (
        mlflow_server.client().get_experiment(run.info.experiment_id).tags["mlflow.note.content"] == said[0]
    )


def test_a_report_that_does_not_arrive_costs_not_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    page = tmp_path / "report"
    page.mkdir()
    tracking.send_report("sweep", page, "first", failed=False)
    for what in ("create_run", "log_artifacts"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, what, lambda *_, **__: 1 / 0)
            tracking.send_report("sweep", page, "second", failed=False)
        assert "first" in [run.data.tags["mlflow.note.content"] for run in runs()]
    tracking.send_report("sweep", page, "second", failed=False)
    assert [run.data.tags["mlflow.note.content"] for run in runs()] == ["second"]


def test_a_finished_trial_that_mlflow_lacks_is_sent_by_the_report(tmp_path: Path) -> None:
    """No task of its own is started for that."""
    fields = TINY.model_dump(mode="json", exclude_defaults=True) | {"data": TINY.data}
    sweep, store = Sweep(name="sweep", base=fields, include=[{"estimator": "gs-soft"}]), Store(tmp_path)
    ((name, one),) = sweep.trials().items()
    begin(store.trial(one.key()), one, "as another sweep calls it")
    finish(store.trial(one.key()), Events(store.trial(one.key())))
    assert trials.unfinished(sweep) == []
    assert reports.track(sweep, store) == {name: True}
    assert [(run.info.run_name, run.info.status) for run in runs()] == [(name, "FINISHED")]


@pytest.mark.timeout(100)
def test_a_failed_trial_that_is_tried_again_is_not_waited_for(tmp_path: Path) -> None:
    """Its state is that of the attempt before until the new one trains, which takes hours."""
    sweep = Sweep(name="sweep", base={"data": "cifar10-sample"}, include=[{"estimator": "fsq"}])
    ((name, one),) = sweep.trials().items()
    store = Store(tmp_path)
    begin(store.trial(one.key()), one, name)
    Events(store.trial(one.key())).failure("out of memory")
    with store.working(one.key()):
        assert reports.track(sweep, store, anew=True) == {}
    assert reports.track(sweep, store, anew=True) == {name: True}
    assert [run.info.status for run in runs()] == ["FAILED"]


def test_a_trial_without_codebooks_is_a_finished_run_too(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 1)
    finish(folder, diary)
    (folder / "analysis.npz").unlink()
    shutil.rmtree(folder / "figures")
    assert tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert len(run.outputs.model_outputs) == 1


def test_another_process_goes_on_without_doubling_a_point(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 2)
    tracking.TrialRun(folder, "sweep").sync()
    diary.metrics(3, {"train/rate": 0.3})
    tracking.TrialRun(folder, "sweep").sync()
    tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert history(run, "train/rate") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_failed_run_goes_on_when_its_trial_does(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 2)
    diary.failure("the machine was on fire")
    tracking.TrialRun(folder, "sweep").sync()
    (failed,) = runs()
    assert (failed.info.status, failed.data.tags["dvq.failure"]) == ("FAILED", "the machine was on fire")
    said = failed.data.tags["mlflow.note.content"]
    assert said.startswith("`gs-soft-c4-k8-s0` on bundled sample")
    assert said.endswith(" failed: the machine was on fire")
    again = Events(folder)
    again.state("training")
    again.metrics(3, {"train/rate": 0.3})
    tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert run.info.status == "RUNNING"
    assert "dvq.failure" not in run.data.tags
    assert "fire" not in run.data.tags["mlflow.note.content"]
    assert history(run, "train/rate") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_points_that_come_again_after_an_interruption_are_not_doubled(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 3)
    tracking.TrialRun(folder, "sweep").sync()
    events.truncate(folder, {})
    again = Events(folder)
    for step in range(1, 5):
        again.metrics(step, {"train/rate": step / 10})
        tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert history(run, "train/rate") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_stores_on_one_server_leave_each_others_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their trials of one sweep have the same keys; a trial computed anew replaces its own store's run."""
    found: dict[str, str] = {}
    for name in ("mine", "theirs", "mine"):
        monkeypatch.setenv("DVQ_STORE", str(tmp_path / name))
        shutil.rmtree(tmp_path / name / "trial", ignore_errors=True)
        folder, _ = folder_with(tmp_path / name, 1)
        (tmp_path / name / "report").mkdir(exist_ok=True)
        tracking.TrialRun(folder, "sweep").sync()
        tracking.send_report("sweep", tmp_path / name / "report", f"{name}: {len(found)}", failed=False)
        found[name] = json.loads((folder / "trial.json").read_text())["attempt"]
    tags = [run.data.tags for run in runs()]
    assert {one["dvq.attempt"] for one in tags if "dvq.attempt" in one} == set(found.values())
    assert sorted(one["mlflow.note.content"] for one in tags if "dvq.report" in one) == [
        "mine: 2",
        "theirs: 1",
    ]


def test_a_trial_computed_anew_replaces_its_run(tmp_path: Path) -> None:
    folder, _ = folder_with(tmp_path, 2)
    tracking.TrialRun(folder, "sweep").sync()
    (old,) = runs()
    shutil.rmtree(folder)
    folder, _ = folder_with(tmp_path, 1)
    tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    assert run.info.run_id != old.info.run_id
    assert history(run, "train/rate") == [(1, 0.1)]


@pytest.mark.parametrize("registered", [False, True])
def test_a_trial_computed_anew_takes_its_earlier_model_away_but_no_registered_one(
    registered: bool, tmp_path: Path
) -> None:
    import mlflow

    folder, diary = folder_with(tmp_path, 1)
    finish(folder, diary)
    assert tracking.TrialRun(folder, "sweep").sync()
    (old,) = runs()
    (output,) = old.outputs.model_outputs
    if registered:
        mlflow.register_model(f"models:/{output.model_id}", "somebodys")
    shutil.rmtree(folder)
    folder, _ = folder_with(tmp_path, 1)
    assert tracking.TrialRun(folder, "sweep").sync()
    assert old.info.run_id not in [run.info.run_id for run in runs()]
    left = mlflow_server.client().search_logged_models([old.info.experiment_id])
    assert [one.model_id for one in left] == [output.model_id] * registered


def test_two_sweeps_each_have_the_trial_that_they_share(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 1)
    finish(folder, diary)
    for sweep in ("first", "second", "first"):
        tracking.TrialRun(folder, sweep).sync()
    assert [len(runs(sweep)) for sweep in ("first", "second")] == [1, 1]


WRITER = """
import sys
from pathlib import Path
from components.mlflow_server import ensure_database
from components.tracking import TrialRun
ensure_database()
run = TrialRun(Path(sys.argv[1]), "sweep")
sys.exit(not any(run.sync() for _ in range(20)))
"""


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    """And the database is made by one of them, in which it can be used at once."""
    for number in range(4):
        folder, _ = folder_with(tmp_path / f"{number}", 20)
        document = read_json(folder / "trial.json") or {}
        write_json(folder / "trial.json", {**document, "key": f"key-{number}", "name": f"{number}"})
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / f"{number}" / "trial")])
        for number in range(4)
    ]
    assert [one.wait(240) for one in writers] == [0] * 4
    expected = [(step, step / 10) for step in range(1, 21)]
    assert {run.info.run_name: history(run, "train/rate") for run in runs()} == {
        f"{number}": expected for number in range(4)
    }


def test_a_tracking_fault_is_said_and_never_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = folder_with(tmp_path, 1)

    def down() -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr(tracking, "client", down)
    tracking.TrialRun(folder, "sweep").sync()
    assert (
        "trial trial is not up to date in MLflow (no server); make replay mends it" in capsys.readouterr().out
    )
    assert state(folder).name == "interrupted"


@pytest.mark.parametrize(
    ("body", "told"), [("Permission denied", "EDIT permission)"), ("Invalid Host", "mends it")]
)
def test_what_another_user_owns_is_not_mended_by_sending_it_again(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

    folder, _ = folder_with(tmp_path, 1)

    def refuse() -> None:
        raise MlflowException(
            f"API request failed with error code 403 != 200. Response body: '{body}'", PERMISSION_DENIED
        )

    monkeypatch.setattr(tracking, "client", refuse)
    tracking.TrialRun(folder, "sweep").sync()
    assert capsys.readouterr().out.strip().endswith(told)


def test_a_deleted_experiment_is_restored_or_the_sweep_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name stays taken, and no sync mends it."""
    folder, _ = folder_with(tmp_path, 1)
    server = mlflow_server.client()
    deleted = mlflow_server.experiment_id(server, "sweep")
    server.delete_experiment(deleted)
    assert not tracking.TrialRun(folder, "sweep").sync()
    said = capsys.readouterr().out
    remedy = f"restore it (mlflow experiments restore -x {deleted}) or rename the sweep"
    assert f"(MLflow's experiment 'sweep' is deleted: {remedy})\n" in said
    server.restore_experiment(deleted)
    assert tracking.TrialRun(folder, "sweep").sync()


def test_what_a_fault_kept_back_is_sent_by_the_next_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    folder, diary = folder_with(tmp_path, 2)
    live = tracking.TrialRun(folder, "sweep")
    assert live.sync()
    diary.metrics(3, {"train/rate": 0.3})
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        assert not live.sync()
    assert live.sync()
    (run,) = runs()
    assert history(run, "train/rate") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_the_model_loads_elsewhere_with_pickle_forbidden(tmp_path: Path) -> None:
    folder, diary = folder_with(tmp_path, 1)
    finish(folder, diary)
    tracking.TrialRun(folder, "sweep").sync()
    (run,) = runs()
    uri = f"models:/{run.outputs.model_outputs[0].model_id}"
    script = (
        f"import sys; sys.path = [path for path in sys.path if path != {str(ROOT)!r}]\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]\n"
        "import importlib.util, json, numpy as np, mlflow\n"
        "assert importlib.util.find_spec('dvq') is None\n"
        f"model = mlflow.pyfunc.load_model({uri!r})\n"
        "images = np.zeros((2, 32, 32, 3), dtype=np.uint8)\n"
        "codes = model.predict(images)\n"
        "back = model.predict(images, params={'method': 'reconstruct'})\n"
        "print(json.dumps([list(codes.shape), list(back.shape), str(back.dtype)]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[2, 8, 8, 8], [2, 32, 32, 3], "uint8"]


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("", "no MLflow is named; set MLFLOW_TRACKING_URI"),
        ("sqlite:///gone.db", "MLFLOW_TRACKING_URI names the database"),
    ],
)
def test_a_model_of_no_mlflow_is_refused_and_no_database_made(uri: str, told: str, tmp_path: Path) -> None:
    """In a process of its own: MLflow keeps what it was told once."""
    script = "import dvq\ntry: dvq.load('models:/m-1')\nexcept dvq.DvqError as error: print(error)\n"
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = str(Path(tracking.__file__).parents[1])
    environment |= {"MLFLOW_TRACKING_URI": uri} if uri else {}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"models:/m-1: {told}" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_no_password_is_noted_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow.example.org:5000")
    tracking.mark_sent(tmp_path, "sweep")
    assert read_json(tmp_path / "tracked.json") == {"http://mlflow.example.org:5000 sweep": "finished"}
    assert mlflow_server.explanation(OSError("http://me:secret@h/x is away")) == "http://h/x is away"


def test_a_damaged_note_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is asked, and no trial is lost for it."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example.org:5000")
    (tmp_path / "tracked.json").write_text('{"http')
    run = tracking.TrialRun(tmp_path, "sweep")
    assert not run.settled()
    tracking.mark_sent(tmp_path, "sweep")
    assert run.settled()


def test_no_uri_means_no_tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    folder, _ = folder_with(tmp_path, 1)
    tracking.TrialRun(folder, "sweep").sync()
    assert not (tmp_path / "mlflow.db").exists()


def test_the_newest_experiment_is_that_of_the_run_that_began_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = mlflow_server.client()
    assert mlflow_server.newest_experiment() == ""
    first, second = (mlflow_server.experiment_id(server, name) for name in ("first", "second"))
    for at, experiment in ((2000, first), (1000, second)):
        server.create_run(experiment, at, {"dvq.store": ""})
    server.create_run(second, 3000)  # somebody else's
    assert mlflow_server.newest_experiment() == first
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert mlflow_server.newest_experiment() == ""
    assert "http://127.0.0.1:1 does not answer" in capsys.readouterr().out
