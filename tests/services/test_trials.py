"""Trials with their store in a real S3: whatever happens to the server, they end as the undisturbed one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components import bucket as objects
from components import judging, mirror, remote, reports, s3, trials
from components.folder import State, begin
from components.remote import RemoteStore
from components.store import Store
from dvq import DvqError, checkpoint
from dvq.config import trial
from dvq.events import Events
from dvq.sweep import Sweep
from tests.services.conftest import SeaweedFS, wait_for
from tests.services.proxy import Proxy, answer_up_to, cut, s3_error, slow

BASE: dict[str, Any] = {
    "data": "noise@0000000000000000",
    "features": 4,
    "num_latents": 2,
    "num_codes": 4,
    "code_dim": 3,
    "residual_blocks": 0,
    "batch_size": 8,
    "steps": 12,
    "log_every": 2,
    "evaluate_every": 6,
    "checkpoint_every": 3,
    "bound_samples": 1,
}
POINT = "estimator=vq-ema seed=1"
KEY = trial({**BASE, "estimator": "vq-ema", "seed": 1}).key()
LONG = "estimator=vq-ema seed=1 steps=4000"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of a few images, so that the trials take seconds."""
    folder = tmp_path_factory.mktemp("data")
    random_images = np.random.Generator(np.random.PCG64(0))
    for name, count in (("train", 30), ("test", 8)):
        images = random_images.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}_images.npy", images)
        np.save(folder / f"{name}_labels.npy", np.zeros(count, dtype=np.uint8))
    info = {
        "format": 1,
        "name": BASE["data"],
        "label": "noise",
        "fingerprint": "0" * 64,
        "train": 30,
        "tune": 3,
        "test": 8,
    }
    (folder / "data.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PATIENCE", 60.0)
    monkeypatch.setattr(objects, "PART", 5 << 20)
    monkeypatch.setattr(remote, "LOOK", 0.05)
    monkeypatch.setattr(mirror, "POLL", 0.2)
    monkeypatch.setattr(mirror, "SILENCE", 2.0)
    monkeypatch.setattr(trials, "SYNC_SECONDS", 0.2)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def store(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.address
    monkeypatch.setenv("DVQ_STORE", f"s3://dvq/{tmp_path.name}")
    return machine(tmp_path / "one", monkeypatch)


def machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """Go on as on a machine with its cache there."""
    monkeypatch.setenv("DVQ_CACHE", str(cache))
    found = Store.from_environment()
    assert isinstance(found, RemoteStore)
    return found


def run(point: str, prepared: Path, out: Path) -> None:
    trials.train(point, json.dumps(BASE), prepared, out / "model", "")
    judging.evaluate(prepared, out / "model", out / "evaluation")
    judging.analyze(prepared, out / "model", out / "evaluation", out / "analysis", "")


def numbers(results: dict[str, Any] | None) -> dict[str, Any]:
    """All of the results that says nothing of time and place."""
    assert results is not None
    return {
        name: results[name] for name in ("key", "trial", "data", "evaluation", "curves", "probe", "analysis")
    }


@pytest.fixture(scope="module")
def plain(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The trial in a plain folder."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("plain")
        patch.setenv("DVQ_STORE", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(POINT, prepared, folder / "out")
        return Store(folder)


@pytest.fixture(scope="module")
def undisturbed(plain: Store) -> dict[str, Any]:
    return numbers(plain.results(KEY))


def test_a_trial_whose_worker_died_without_a_word_is_behind_the_others(store: RemoteStore) -> None:
    """As a pod that is out of memory does: at any step, while evaluating, and before its first push. In front it
    would end each run before the others begin."""
    sweep = Sweep(name="s", base=BASE, grid={"estimator": ["vq-ema"]}, seeds=[0, 1, 2, 3])
    keys = [one.key() for one in sweep.trials().values()]
    for seed in (0, 1, 2):
        with store.working(keys[seed]) as work:
            if seed:
                begin(work.folder, list(sweep.trials().values())[seed], f"s{seed}")
                checkpoint.write(work.folder, 2, {}, {"events": {}})
                Events(work.folder).state("evaluating")
    for seed in (0, 1):
        store._mirror(keys[seed]).claim()  # and nothing after it
    assert [one["seed"] for one in trials.unfinished(sweep, 9)] == [2, 3, 0, 1]
    with store.working(keys[1]):
        pass
    assert [one["seed"] for one in trials.unfinished(sweep, 9)] == [1, 2, 3, 0]


def publish(store: RemoteStore, folder: Path) -> None:
    """Publish a finished trial without computing it."""
    with store.working(KEY) as work:
        shutil.copytree(folder, work.folder, dirs_exist_ok=True)


def finished(cache: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The results as another machine sees them."""
    elsewhere = machine(cache, monkeypatch)
    elsewhere.look([KEY], "results.json", "analysis.npz")
    assert elsewhere.state(KEY) == State("finished")
    return numbers(elsewhere.results(KEY))


def test_each_step_may_be_on_another_machine(
    store: RemoteStore,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Any],
) -> None:
    trials.train(POINT, json.dumps(BASE), prepared, tmp_path / "model", "")
    store.look([KEY])
    assert store.state(KEY) == State("interrupted", step=12)
    machine(tmp_path / "two", monkeypatch)
    judging.evaluate(prepared, tmp_path / "model", tmp_path / "evaluation")
    machine(tmp_path / "three", monkeypatch)
    judging.analyze(prepared, tmp_path / "model", tmp_path / "evaluation", tmp_path / "analysis", "")
    assert finished(tmp_path / "four", monkeypatch) == undisturbed
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is trained again
    run(POINT, prepared, tmp_path / "again")
    assert (tmp_path / "again" / "model" / "model.safetensors").exists()


def test_a_longer_trial_goes_on_from_a_shorter_one_of_another_machine(
    store: RemoteStore,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Any],
) -> None:
    assert store.place.startswith("s3://")
    run(f"{POINT} steps=6", prepared, tmp_path / "short")
    two = machine(tmp_path / "two", monkeypatch)
    two.look([KEY])
    assert two.reached_step(trial({**BASE, "estimator": "vq-ema", "seed": 1})) == 6
    run(POINT, prepared, tmp_path / "long")
    assert finished(tmp_path / "three", monkeypatch) == undisturbed


def kills(proxy: Proxy, seaweed: SeaweedFS) -> list[threading.Event]:
    """SIGKILL in the middle of a checkpoint, of publishing the model and the results, and of replacing a manifest."""
    parts = ("checkpoints/.*/state.safetensors", "model/model.safetensors", "results.json", f"{KEY}.json")
    return [proxy.at(f"PUT .*/{part}$", cut(seaweed.restart)) for part in parts]


def down_for_a_while(proxy: Proxy, seaweed: SeaweedFS) -> list[threading.Event]:
    """From the first checkpoint, which is on the way, until training has ended."""
    trained, cache = threading.Event(), Path(os.environ["DVQ_CACHE"])

    def back() -> None:
        wait_for(lambda: list(cache.rglob("model/model.safetensors")), 60)
        trained.set()
        seaweed.start()

    def kill() -> None:
        seaweed.kill()
        threading.Thread(target=back).start()

    return [proxy.at(r"PUT .*checkpoints/", cut(kill)), trained]


def errors(proxy: Proxy, _: SeaweedFS) -> list[threading.Event]:
    """503, 403, lost answers, and a slow server all the time."""
    met = [proxy.at(r"PUT .*/checkpoints/", s3_error(503, "SlowDown"), times=3)]
    met.append(proxy.at(r"PUT .*/model/", s3_error(403, "AccessDenied"), times=3))
    met.append(proxy.at(r"PUT .*/results.json", s3_error(500, "InternalError"), times=2))
    met.append(proxy.at(rf"PUT .*/{KEY}.json", answer_up_to(0), times=3))
    return [*met, proxy.at(r"PUT .*", slow(rate=1 << 20), times=999)]


@pytest.mark.parametrize("faults", [kills, down_for_a_while, errors])
def test_a_fault_of_the_server_changes_nothing(
    faults: Callable[[Proxy, SeaweedFS], list[threading.Event]],
    store: RemoteStore,
    proxy: Proxy,
    seaweed: SeaweedFS,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Any],
) -> None:
    met = faults(proxy, seaweed)
    run(POINT, prepared, tmp_path)
    assert all(one.is_set() for one in met)
    assert finished(tmp_path / "two", monkeypatch) == undisturbed
    stored = {key.removeprefix(f"trials/{KEY}/") for key in store.bucket.list(f"trials/{KEY}/")}
    whole = store._mirror(KEY).read()
    assert stored == whole.objects()
    assert not whole.active


def test_a_kill_in_a_multipart_checkpoint_changes_nothing(
    store: RemoteStore, proxy: Proxy, seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = proxy.at(r"PUT .*/state.safetensors\?.*partNumber=2", cut(seaweed.restart))
    with store.working(KEY) as work:
        made = checkpoint.write(work.folder, 3, {"weights": torch.rand(3, 1 << 20)}, {"family": "x"})
        content = (made / "state.safetensors").read_bytes()
        wait_for(met.is_set)
    elsewhere = machine(tmp_path / "two", monkeypatch)
    with elsewhere.working(KEY) as work:
        found = checkpoint.latest(work.folder, "x")
        assert found is not None
        assert (work.folder / "checkpoints" / "000000003" / "state.safetensors").read_bytes() == content


def worker(cache: Path, prepared: Path, out: Path) -> "subprocess.Popen[str]":
    """A train step in a process group of its own."""
    script = (
        "import sys; from pathlib import Path; from components import remote, trials\n"
        "remote.LOOK, remote.HEARTBEAT, trials.SYNC_SECONDS = 0.1, 0.5, 0.2\n"
        f"trials.train({LONG!r}, sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), '')"
    )
    environment = {**os.environ, "DVQ_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    base = json.dumps({**BASE, "checkpoint_every": 20, "evaluate_every": 1000})
    return subprocess.Popen(
        [sys.executable, "-c", script, base, str(prepared), str(out)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_worker_that_was_frozen_and_overtaken_is_refused_and_says_so(
    store: RemoteStore, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = trial({**BASE, "estimator": "vq-ema", "seed": 1, "steps": 4000}).key()
    frozen = worker(tmp_path / "frozen", prepared, tmp_path / "out")
    try:
        wait_for(lambda: store.look([key]) or store.steps(key), 60)
        os.killpg(frozen.pid, signal.SIGSTOP)
        other = machine(tmp_path / "other", monkeypatch)
        with other.working(key) as work:
            reached = [path.name for path in (work.folder / "checkpoints").iterdir()]
            assert reached
            (work.folder / "model").mkdir()
            (work.folder / "model" / "model.safetensors").write_text("the other's")
        os.killpg(frozen.pid, signal.SIGCONT)
        output, _ = frozen.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(frozen.pid, signal.SIGKILL)
    assert frozen.returncode == 1
    last = output.strip().splitlines()[-1]
    assert f"trials/{key}: overtaken by process {os.getpid()} on" in last
    assert "what this process made since then is not published" in last
    seen = machine(tmp_path / "third", monkeypatch)
    seen.look([key], "model/model.safetensors")
    assert (seen.trial(key) / "model" / "model.safetensors").read_text() == "the other's"
    assert seen.state(key).name == "interrupted"  # and has not failed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_was_ended_is_gone_on_with_elsewhere(
    number: signal.Signals,
    store: RemoteStore,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = trial({**BASE, "estimator": "vq-ema", "seed": 1, "steps": 4000}).key()
    ended = worker(tmp_path / "ended", prepared, tmp_path / "out")
    try:
        wait_for(lambda: store.look([key]) or store.steps(key), 60)
        (os.kill if number == signal.SIGTERM else os.killpg)(ended.pid, number)
        ended.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(ended.pid, signal.SIGKILL)
    store.look([key])
    reached = store.steps(key)[-1]
    other = machine(tmp_path / "other", monkeypatch)
    with other.working(key) as work:
        steps = sorted(int(path.name) for path in (work.folder / "checkpoints").iterdir())
        assert steps[-1] == reached


def spoil(store: RemoteStore, trial_key: str, path: str, place: int) -> str:
    """Flip a bit of the object that holds a file of the trial; its key."""
    piece = store._mirror(trial_key).read().files[path][0]
    key = f"trials/{trial_key}/{piece.object}"
    content = bytearray(store.bucket.get(key)[0])
    content[place] ^= 1
    store.bucket.put(key, bytes(content))
    return key


def test_a_flipped_byte_is_named_and_refused(
    store: RemoteStore, plain: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, plain.trial(KEY))
    key = spoil(store, KEY, "results.json", 50)
    other = machine(tmp_path / "two", monkeypatch)
    with pytest.raises(
        DvqError, match=f"{key} is damaged: its SHA-256 is .* remove s3://.*json to have all of it made anew"
    ):
        other.look([KEY], "results.json")


def test_a_flipped_byte_in_a_checkpoint_costs_that_checkpoint(
    store: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with store.working(KEY) as work:
        for step in (3, 6):
            checkpoint.write(work.folder, step, {"weights": torch.rand(1000)}, {"family": "x"})
    key = spoil(store, KEY, "checkpoints/000000006/state.safetensors", 2000)
    elsewhere = machine(tmp_path / "two", monkeypatch)
    with elsewhere.working(KEY) as work:
        told = capsys.readouterr().out
        found = checkpoint.latest(work.folder, "x")
        assert found is not None
        assert found.step == 3
    assert f"{key} is damaged: its SHA-256 is" in told
    assert "this checkpoint is left out" in told


def test_the_report_is_there_after_a_kill_in_it(
    store: RemoteStore, proxy: Proxy, seaweed: SeaweedFS, plain: Store
) -> None:
    publish(store, plain.trial(KEY))
    sweep = Sweep(name="tiny", base=BASE, grid={"estimator": ["vq-ema"]}, seeds=[1])
    met = proxy.at(r"PUT .*reports/tiny/.*png", cut(seaweed.restart))
    reports.report(sweep.model_dump_json())
    assert met.is_set()
    local = {path.relative_to(store.report("tiny")).as_posix() for path in store.report("tiny").rglob("*.*")}
    assert {key.removeprefix("reports/tiny/") for key in store.bucket.list("reports/")} == local
    assert {"report.html", "table.json", "figures/figure_1a.png"} <= local
