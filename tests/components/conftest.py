"""A tiny trial, its data and its store."""

import json
from pathlib import Path
from typing import Any

import pytest

from components import judging, trials
from components.store import Store
from dvq import data

BASE: dict[str, Any] = {
    "data": "cifar10-sample",
    "features": 4,
    "num_latents": 2,
    "num_codes": 4,
    "code_dim": 3,
    "residual_blocks": 0,
    "batch_size": 8,
    "steps": 4,
    "log_every": 2,
    "evaluate_every": 4,
    "bound_samples": 2,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    data.prepare("cifar10-sample", "", folder)
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = Store.from_environment()
    assert found is not None
    return found


def run(overrides: str, prepared: Path, out: Path, record: bool = True) -> dict[str, Any]:
    trials.train(overrides, json.dumps(BASE), prepared, out / "model", "", record)
    numbers = judging.evaluate(prepared, out / "model", out / "evaluation", record)
    judging.analyze(prepared, out / "model", out / "evaluation", out / "analysis", "", record)
    return numbers
