"""What explain prints of a finished trial."""

import json
from pathlib import Path

import pytest

from components.store import Store
from dvq import DvqError
from dvq.events import Events
from dvq.sweep import Sweep
from pipeline.explain import ledger

TRIALS = Sweep(name="s", base={"data": "cifar10-sample"}, grid={"estimator": ["gs-soft"]}).trials()
(NAME,) = TRIALS
EVALUATION = {
    "split": "test", "images": 500, "bits_per_dim": 7.0, "bits_per_dim_se": 0.02, "rate": 0.5, "distortion": 6.5,
    "ledger": {"latents": [0.25, 0.25], "channels": [2.0, 2.0, 2.5]}, "bound": 6.75, "bound_samples": 4,
}  # fmt: skip


def test_a_ledger_counts_latents_as_the_figures_do_and_says_where_the_model_is(tmp_path: Path) -> None:
    store, folder = Store(tmp_path), tmp_path / "trials" / TRIALS[NAME].key()
    with pytest.raises(DvqError, match=r"not finished: make submit-sweep SWEEP=tiny\.yaml"):
        ledger(NAME, TRIALS, store, "tiny.yaml")
    (folder / "model").mkdir(parents=True)
    results = {"evaluation": EVALUATION, "data": {"label": "a sample"}}
    (folder / "results.json").write_text(json.dumps(results))
    lines = ledger(NAME, TRIALS, store, "tiny.yaml").splitlines()
    assert lines[0] == f"{NAME} on a sample, split test, in bits/dim"
    assert [line.split() for line in lines[1:3]] == [
        ["latent", "variable", "k", "=", number, "0.25000"] for number in ("1", "2")
    ]
    assert lines[-3].split()[:5] == ["bits/dim", "7.00000", "±", "0.02000", "over"]
    assert lines[-1] == f'its model: dvq.load("{folder}/model")'
    results["evaluation"] = {**EVALUATION, "fitted_bits_per_dim": 6.875}
    (folder / "results.json").write_text(json.dumps(results))
    assert ["fitted", "6.87500"] in [
        line.split()[:2] for line in ledger(NAME, TRIALS, store, "s").splitlines()
    ]
    with pytest.raises(DvqError, match=f"no trial 'other'; its trials: {NAME}"):
        ledger("other", TRIALS, store, "tiny.yaml")


def test_why_a_failed_trial_has_no_ledger_is_said(tmp_path: Path) -> None:
    Events(tmp_path / "trials" / TRIALS[NAME].key()).failure("training diverged")
    with pytest.raises(
        DvqError, match=rf"'{NAME}' failed \(training diverged\): make submit-sweep SWEEP=s tries it"
    ):
        ledger(NAME, TRIALS, Store(tmp_path), "s")
