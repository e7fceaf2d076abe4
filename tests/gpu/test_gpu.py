"""What only a GPU can tell: the recorded step is the step, runs repeat, bfloat16 is near, trials share and resume."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dvq import data, events, fused
from dvq.config import estimators, trial
from dvq.device import exact
from dvq.estimators.gs_soft import GSSoft
from dvq.evaluate import evaluate
from dvq.latents import Categorical
from dvq.model import Model
from dvq.randomness import noise
from dvq.trainer import Trainer
from dvq.trial import Loss, Trial, values
from tests.sizes import taken

IMAGES = data.read_sample()
SMALL: dict[str, Any] = {
    "features": 64,
    "num_latents": 4,
    "num_codes": 64,
    "code_dim": 16,
    "batch_size": 32,
    "log_every": 50,
    "evaluate_every": 1000,
}
SCHEDULES = {"kl_warmup": 5, "temperature": 1.0, "final_temperature": 0.2, "annealing_steps": 4}


def make(estimator: str, **options: Any) -> Trial:
    fields = taken(estimator, {**SMALL, **options})
    return trial({"estimator": estimator, "data": "cifar10-sample", **fields})


def trainer(one: Trial, gpu: torch.device, dtype: torch.dtype = torch.float32) -> Trainer:
    return Trainer(one, IMAGES["train_images"], gpu, dtype)


def assert_same(one: Trainer, other: Trainer) -> None:
    for (name, found), (_, right) in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(found, right), name


def test_a_model_does_not_round_to_tf32(gpu: torch.device) -> None:
    """Convolutions on a GPU do by default, which would be an error of about 5e-4 here."""
    model, images = Model(make("gs-soft")).to(gpu), IMAGES["test_images"][:64]
    with exact():  # which puts back what is set in it
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        found = model.log_posterior(images)
        right = model.double().log_posterior(images)
    assert (found - right).norm() < 5e-5 * (right - right.mean(-1, keepdim=True)).norm()


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_the_recorded_step_is_the_step_bit_for_bit(estimator: str, gpu: torch.device) -> None:
    recorded, plain = (trainer(make(estimator), gpu) for _ in range(2))
    plain.recorded = None
    for step in range(30):
        assert torch.equal(recorded.step(step), plain.step(step)), step
    assert_same(recorded, plain)


def test_the_step_is_recorded_anew_when_normalization_is_fixed(gpu: torch.device) -> None:
    one = make("gs-soft", normalization_until=10)
    recorded, plain = (trainer(one, gpu) for _ in range(2))
    plain.recorded = None
    for step in range(20):
        assert torch.equal(recorded.step(step), plain.step(step)), step
    assert_same(recorded, plain)


@pytest.mark.parametrize("head", ["1x1", "transposed"])
@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_the_fused_step_is_the_step(
    estimator: str, head: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.able(), "no C compiler?"
    one = make(estimator, precision="float32", output_head=head)
    fast, plain = (trainer(one, gpu, torch.float64) for _ in range(2))
    found = [fast.step(step) for step in range(3)]
    monkeypatch.setattr(fused, "able", lambda: False)
    for step, terms in enumerate(found):
        torch.testing.assert_close(terms, plain.step(step), rtol=1e-9, atol=0)


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_the_recorded_step_follows_its_schedules(estimator: str, gpu: torch.device) -> None:
    """In float64: a step's number on the device takes another way through some equations, which rounds otherwise."""
    one = make(estimator, precision="float32", **SCHEDULES)
    recorded, plain = (trainer(one, gpu, torch.float64) for _ in range(2))
    plain.recorded = None
    for step in range(8):
        torch.testing.assert_close(recorded.step(step), plain.step(step), rtol=1e-6, atol=0)


class Own(GSSoft):
    """GS-Soft with a trained scale, a parameter that gets no gradient, and numbers to follow."""

    estimator: Literal["own"] = "own"  # type: ignore[assignment]

    def latents(self) -> Categorical:
        latents = super().latents()
        latents.scale = torch.nn.Parameter(torch.tensor(0.7))
        latents.still = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
        return latents

    def loss(self, model: Model, images: Tensor, generator: torch.Generator, step: Any) -> Loss:
        followed = {"s": model.latents.scale, "tau": self.temperature_at(step), "step": step, "one": 1.0}
        return super().loss(model, images, generator, step)._replace(logged=followed)


def test_the_recorded_step_follows_parameters_and_numbers_of_ones_own(gpu: torch.device) -> None:
    """Recorded anew on the way, and by one that goes on from its state."""
    one = Own(
        **{**SMALL, **SCHEDULES, "data": "cifar10-sample", "precision": "float32", "normalization_until": 5}
    )
    recorded, plain, later = (trainer(one, gpu, torch.float64) for _ in range(3))
    plain.recorded = None
    for step in range(8):
        found = recorded.step(step)
        torch.testing.assert_close(found, plain.step(step), rtol=1e-6, atol=0)
        assert found[-2:].tolist() == [step, 1]
    assert found[3] != 0.7
    later.restore(recorded.state())
    later.logged = ["s", "tau", "step", "one"]
    torch.testing.assert_close(later.step(8), recorded.step(8), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"codebook_init": "kmeans", "revive_below": 1.0, "backward": "one", "gradient": "rotation"}],
)
@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_a_run_repeats_bit_for_bit(estimator: str, options: dict[str, Any], gpu: torch.device) -> None:
    first, second = (trainer(make(estimator, **options), gpu) for _ in range(2))
    for step in range(100):
        assert torch.equal(first.step(step), second.step(step)), step
    assert_same(first, second)
    judged = [evaluate(one.model, IMAGES["test_images"], bound_samples=2) for one in (first, second)]
    assert judged[0] == judged[1]


@pytest.mark.parametrize("head", ["1x1", "transposed"])
@pytest.mark.parametrize(
    "estimator", ["gs-soft", "gs-hard", "reinmax", "vimco", "rloo", "vq-ema", "fsq", "gaussian"]
)
def test_bfloat16_changes_bits_per_dim_by_less_than_0_005(
    estimator: str, head: str, gpu: torch.device
) -> None:
    """Of the network at its full size, after some training in it, with the same noise."""
    full = {"features": 256, "num_latents": 8, "num_codes": 512, "code_dim": 32, "batch_size": 64}
    one = trainer(make(estimator, output_head=head, **full), gpu)
    for step in range(200):
        one.step(step)
    found = {}
    for mixed in (True, False):
        one.model.mix(mixed)
        with torch.no_grad():
            losses = [
                one.trial.loss(one.model, one.minibatch(at), noise(0, at, gpu), at) for at in range(200, 210)
            ]
        nats = sum((loss.distortion + loss.rate).item() for loss in losses) / 10
        found[mixed] = nats * one.trial.bits_per_nat
    assert found[True] != found[False]
    assert abs(found[True] - found[False]) < 0.005


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sample"
    data.prepare("cifar10-sample", "", folder)
    return folder


def start(folder: Path, one: Trial, prepared: Path) -> "subprocess.Popen[bytes]":
    folder.mkdir(exist_ok=True)
    (folder / "trial.json").write_text(json.dumps({"trial": values(one)}), encoding="utf-8")
    return subprocess.Popen([sys.executable, "-m", "dvq.train", str(folder), "--data", str(prepared)])


def outcome(folder: Path) -> dict[str, Any]:
    """All that training made, but for times and speeds."""
    measured = [
        (event["step"], {name: x for name, x in event["values"].items() if name != "images_per_second"})
        for event in events.read(folder)
        if event["kind"] == "metrics"
    ]
    return {"model": (folder / "model" / "model.safetensors").read_bytes(), "metrics": measured}


@pytest.mark.parametrize("estimator", ["gs-soft", "vimco", "vq-ema"])
def test_killed_training_ends_with_the_same_bits(estimator: str, tmp_path: Path, prepared: Path) -> None:
    one = make(estimator, steps=3000, checkpoint_every=100)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert start(undisturbed, one, prepared).wait() == 0
    kills = 0
    for step in (100, 800, 1500):
        process = start(killed, one, prepared)
        while process.poll() is None and not any(
            int(path.name) >= step for path in (killed / "checkpoints").glob("[0-9]*")
        ):
            time.sleep(0.01)
        process.kill()
        kills += process.wait() < 0
    assert kills == 3, "it was over before it was killed: raise its steps"
    assert start(killed, one, prepared).wait() == 0
    assert outcome(killed) == outcome(undisturbed)


def test_trials_that_share_a_gpu_compute_as_alone(tmp_path: Path, prepared: Path) -> None:
    trials = {name: make(name, steps=500) for name in ("gs-soft", "vq-ema", "vimco")}
    for name, one in trials.items():
        assert start(tmp_path / f"alone-{name}", one, prepared).wait() == 0
    together = [start(tmp_path / f"together-{name}", one, prepared) for name, one in trials.items()]
    assert [process.wait() for process in together] == [0, 0, 0]
    for name in trials:
        assert outcome(tmp_path / f"together-{name}") == outcome(tmp_path / f"alone-{name}"), name
