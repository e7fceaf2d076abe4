"""A trained model is evaluated and analyzed: by its own images or others, and where that fails."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components import judging, reports, tracking, trials
from components.folder import State, read_json, write_json
from components.store import Store
from dvq import DvqError, data
from dvq.autoregressive import Autoregressive
from dvq.config import trial
from dvq.model import Model
from dvq.saved import save
from dvq.sweep import Sweep
from tests.components.conftest import BASE, run


def others(prepared: Path, folder: Path) -> Path:
    """A dataset of the same shape: its labels are others."""
    data.link(prepared, folder)
    about = json.loads((folder / "data.json").read_text())
    (folder / "data.json").unlink()
    about |= {"name": "birds@" + "0" * 16, "fingerprint": "0" * 64, "label": "birds"}
    (folder / "data.json").write_text(json.dumps(about))
    return folder


def test_a_model_is_judged_by_other_images_apart_from_its_trial(
    store: Store, prepared: Path, tmp_path: Path
) -> None:
    """Their numbers would stay under its key."""
    other, model = others(prepared, tmp_path / "other"), tmp_path / "model"
    trials.train("estimator=vq-ema", json.dumps(BASE), prepared, model, "")
    key = trial({**BASE, "estimator": "vq-ema"}).key()
    for when in ("before", "after"):  # its own are judged
        numbers = judging.evaluate(other, model, tmp_path / when)
        assert numbers["bits_per_dim"] > 0
        assert "fitted_bits_per_dim" not in numbers, "it is not trained on these"
        assert store.has(key, "evaluation.json") == (when == "after")
        judging.analyze(other, model, tmp_path / when, tmp_path / f"analysis-{when}", "")
        results = read_json(tmp_path / f"analysis-{when}" / "results.json") or {}
        assert results["data"]["label"] == "birds"
        assert "fitted_bits_per_dim" in judging.evaluate(prepared, model, tmp_path / "own")
        assert store.state(key).name == "interrupted"
    with pytest.raises(
        DvqError, match=r"the evaluation is of other data; give those that evaluate was given"
    ):
        judging.analyze(prepared, model, tmp_path / "before", tmp_path / "analysis", "")
    assert not store.has(key, "results.json")


def test_other_weights_do_not_get_the_trials_numbers(
    store: Store,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run("estimator=vq-ema", prepared, tmp_path)
    one = trial({**BASE, "estimator": "vq-ema"})
    before = (store.trial(one.key()) / "evaluation.json").read_bytes()
    save(Model(one), tmp_path / "mine")
    numbers = judging.evaluate(prepared, tmp_path / "mine", tmp_path / "theirs")
    assert numbers["bits_per_dim"] != first["bits_per_dim"]
    assert (store.trial(one.key()) / "evaluation.json").read_bytes() == before
    assert "not the weights that the store has" in capsys.readouterr().out
    sent: list[Path] = []
    monkeypatch.setattr(tracking.TrialRun, "sync", lambda run: sent.append(run.folder))
    judging.analyze(prepared, tmp_path / "mine", tmp_path / "theirs", tmp_path / "analysis", "e")
    assert sent == [], "the trial's run in MLflow is not theirs either"
    judging.analyze(prepared, tmp_path / "model", tmp_path / "evaluation", tmp_path / "analysis", "e")
    assert sent == [store.trial(one.key())]
    (store.trial(one.key()) / "results.json").unlink()
    with pytest.raises(DvqError, match="the evaluation is of other weights"):
        judging.analyze(prepared, tmp_path / "model", tmp_path / "theirs", tmp_path / "analysis", "")
    write_json(tmp_path / "theirs", numbers)  # which does not say what it is of
    with pytest.raises(DvqError, match="the evaluation is of other data"):
        judging.analyze(prepared, tmp_path / "model", tmp_path / "theirs", tmp_path / "analysis", "")
    assert not store.has(one.key(), "results.json")


def test_images_that_are_wrong_do_not_make_a_trained_trial_fail(
    store: Store, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, model = ("estimator=vq-ema", json.dumps(BASE)), tmp_path / "model"
    key, other = trial({**BASE, "estimator": "vq-ema"}).key(), others(prepared, tmp_path / "other")
    for _ in ("new", "trained"):
        with pytest.raises(DvqError, match="the trial is of cifar10-sample, and these images are birds@"):
            trials.train(*point, other, model, "")
        assert store.state(key).name in ("new", "interrupted")
        trials.train(*point, prepared, model, "")
    nowhere = tmp_path / "nowhere"
    with pytest.raises(DvqError, match="holds no whole prepared dataset"):
        judging.evaluate(nowhere, model, tmp_path / "evaluation")
    assert store.state(key).name == "interrupted"
    assert judging.evaluate(nowhere, model, tmp_path / "evaluation", record=True) == {}
    assert store.state(key).reason.startswith("evaluating: ")
    judging.evaluate(prepared, model, tmp_path / "evaluation")
    sent: list[Path] = []
    monkeypatch.setattr(tracking.TrialRun, "sync", lambda run: sent.append(run.folder))
    judging.analyze(nowhere, model, tmp_path / "evaluation", tmp_path / "analysis", "e", record=True)
    assert store.state(key).reason.startswith("analyzing: ")
    assert (tmp_path / "analysis").is_dir(), "the artifact of a step that succeeds is there"
    assert sent == [store.trial(key)], "and MLflow learns of the failure"


def test_images_of_another_shape_are_refused(prepared: Path, tmp_path: Path) -> None:
    save(
        Model(trial({**BASE, "estimator": "vq-ema", "data": "digits@8x8x1-" + "0" * 16})), tmp_path / "model"
    )
    with pytest.raises(DvqError, match=r"the model takes images of 8×8×1, and cifar10-sample are of 32×32×3"):
        judging.evaluate(prepared, tmp_path / "model", tmp_path / "evaluation")


def test_what_is_no_model_is_said(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DvqError, match=r"no model here: trial.json is missing; give what train made"):
        judging.evaluate(prepared, prepared, tmp_path / "evaluation")
    with pytest.raises(DvqError, match="limit = -1: give how many"):
        trials.unfinished(Sweep(name="s", base={"estimator": "vq-ema"}), -1)


@pytest.mark.usefixtures("store")
def test_a_trial_is_judged_by_its_splits_images_and_fitted_to_those_it_was_trained_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("dvq.evaluate.evaluate", lambda *given, **more: asked.append((given, more)) or {})
    one = trial({**BASE, "estimator": "vq-ema", "split": "tune", "bound_samples": 3, "seed": 2})
    one = one.model_copy(update={"autoregressive_steps": 5})
    fitted: list[Any] = []
    monkeypatch.setattr(
        "dvq.autoregressive.fit",
        lambda model, *given, **more: fitted.append((given[1:], more)) or Autoregressive(model),
    )
    save(Model(one), tmp_path / "model")
    judging.evaluate(prepared, tmp_path / "model", tmp_path / "evaluation")
    ((_, judged), more), images = asked[0], data.load(prepared).arrays["train_images"]
    assert more["bound_samples"] == 3
    assert fitted == [((5,), {"seed": 2})], "each training's prior begins and goes another way"
    np.testing.assert_array_equal(judged, images[1800:])
    np.testing.assert_array_equal(more["training"], images[:1800])
    assert (read_json(tmp_path / "evaluation") or {})["split"] == "tune"


def test_a_number_that_is_not_finite_is_no_metric_and_no_champion(
    store: Store, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {**BASE, "split": "tune"}
    sweep = Sweep(name="s", base=base, grid={"estimator": ["vq-ema"]}, seeds=[0, 1], champion="best")
    first, second = (trial({**base, "estimator": "vq-ema", "seed": seed}).key() for seed in (0, 1))
    for seed in (0, 1):
        run(f"estimator=vq-ema seed={seed} split=tune", prepared, tmp_path / str(seed))
    results = read_json(store.trial(first) / "results.json") or {}
    results["evaluation"]["bits_per_dim"] = math.nan
    write_json(store.trial(first) / "results.json", results)
    crowned: list[str] = []
    monkeypatch.setattr(tracking, "set_champion", lambda _, __, best: crowned.append(best["key"]))
    reports.report(sweep.model_dump_json())
    assert crowned == [second]

    write_json(store.trial(first) / "evaluation.json", results["evaluation"])
    numbers = judging.evaluate(prepared, tmp_path / "0" / "model", tmp_path / "evaluation")
    assert "distortion" in numbers
    assert "bits_per_dim" not in numbers


def test_a_failing_evaluation_is_recorded_and_the_analysis_leaves_the_trial_alone(
    store: Store, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing\nas this")

    monkeypatch.setattr("dvq.evaluate.evaluate", broken)
    run("estimator=vq-ema", prepared, tmp_path)
    found = store.state(trial({**BASE, "estimator": "vq-ema"}).key())
    assert found == State("failed", "evaluating: RuntimeError: no such thing", step=4)
