"""Stores that earlier versions wrote stay readable: a finished and an interrupted trial of each, kept as fixtures.

``python tests/components/test_old_stores.py FOLDER`` writes one with today's code, for when the format is raised.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import dvq
from components import judging, reports, trials
from components.folder import begin
from components.store import Store
from dvq import checkpoint, data, events
from dvq.config import trial
from dvq.evaluate import evaluate
from dvq.sweep import Sweep
from dvq.train import train

WRITTEN = Path(__file__).parents[1] / "fixtures" / "store-v1"
NUMERICS = 1  # of the version that wrote it
BASE: dict[str, Any] = {
    "data": "cifar10-sample",
    "features": 2,
    "num_latents": 2,
    "num_codes": 4,
    "code_dim": 3,
    "residual_blocks": 0,
    "batch_size": 8,
    "log_every": 5,
    "bound_samples": 2,
}
FINISHED = {"estimator": "gs-soft", "steps": 10}
INTERRUPTED = {"estimator": "vq-ema", "steps": 40, "checkpoint_every": 5}
SWEEP = Sweep(name="old", base=BASE, include=[FINISHED])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of the old store."""
    shutil.copytree(WRITTEN, tmp_path / "store")
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(dvq, "NUMERICS", NUMERICS)
    return Store(tmp_path / "store")


@pytest.mark.parametrize(("options", "state"), [(FINISHED, "finished"), (INTERRUPTED, "interrupted")])
def test_an_old_trial_has_its_key_and_state(store: Store, options: dict[str, Any], state: str) -> None:
    asked = trial(BASE | options)
    document = json.loads((store.trial(asked.key()) / "trial.json").read_text(encoding="utf-8"))
    assert trial(document["trial"]).key() == document["key"] == asked.key()
    assert store.state(asked.key()).name == state
    assert store.reached_step(asked) == max(checkpoint.steps(store.trial(asked.key()))) > 0


def test_old_results_are_reported(store: Store) -> None:
    results = store.results(trial(BASE | FINISHED).key())
    assert results is not None
    page = reports.report(SWEEP.model_dump_json()).read_text(encoding="utf-8")
    for number in ("bits_per_dim", "rate", "distortion"):
        assert f"{results['evaluation'][number]:.3f}" in page
    assert trials.unfinished(SWEEP) == []


def test_an_old_model_evaluates_to_its_results(store: Store, prepared: Path) -> None:
    key = trial(BASE | FINISHED).key()
    results = store.results(key)
    assert results is not None
    images, _ = data.load(prepared).evaluation("test")
    found = evaluate(dvq.load(store.trial(key) / "model"), images, bound_samples=2)
    for number in ("bits_per_dim", "rate", "distortion", "bound"):
        assert found[number] == pytest.approx(results["evaluation"][number], abs=1e-3)


def test_an_old_interrupted_trial_goes_on_and_finishes(
    store: Store, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trial(BASE | INTERRUPTED)
    folder, step = store.trial(one.key()), store.reached_step(one)
    known = [event for event in events.read(folder) if event["kind"] == "metrics"]
    train(one, data.load(prepared), folder)
    assert f"going on from step {step}" in capsys.readouterr().out
    judging.evaluate(prepared, folder / "model", tmp_path / "evaluation")
    judging.analyze(prepared, folder / "model", tmp_path / "evaluation", tmp_path / "analysis", "")
    assert store.state(one.key()).name == "finished"
    points = [event for event in events.read(folder) if event["kind"] == "metrics"]
    assert points[: len(known)] == known
    assert [event["step"] for event in points[:-1]] == list(range(5, one.steps + 1, 5))  # and the evaluation


def main(folder: Path) -> None:
    os.environ["DVQ_STORE"] = str(folder)
    with tempfile.TemporaryDirectory() as scratch:
        prepared, out = Path(scratch) / "data", Path(scratch)
        data.prepare("cifar10-sample", "", prepared)
        trials.train("estimator=gs-soft steps=10", json.dumps(BASE), prepared, out / "model", "")
        judging.evaluate(prepared, out / "model", out / "evaluation")
        judging.analyze(prepared, out / "model", out / "evaluation", out / "analysis", "")
        one = trial(BASE | INTERRUPTED)
        begin(Store(folder).trial(one.key()), one, one.describe())
        path = Store(folder).trial(one.key())
        child = subprocess.Popen([sys.executable, "-m", "dvq.train", str(path), "--data", str(prepared)])
        while len(checkpoint.steps(path)) < 2:
            time.sleep(0.005)
        child.send_signal(signal.SIGTERM)
        child.wait()
    for picture in folder.rglob("*.png"):  # large, and read by nothing but the tracking
        picture.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
