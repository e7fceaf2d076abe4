"""A step of training: which images it sees, in which noise, and that it leaves nothing behind."""

import copy
import math
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from dvq import DvqError, failures, load
from dvq.config import trial
from dvq.estimators.gs_soft import GSSoft
from dvq.evaluate import evaluate, fit
from dvq.latents import Categorical
from dvq.model import Model
from dvq.randomness import minibatch, noise_seed
from dvq.recorded import Recorded
from dvq.saved import save
from dvq.trainer import Trainer, checked
from dvq.trial import Loss

IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


def test_each_epoch_visits_every_image_once_in_an_order_of_its_own() -> None:
    """Also where a minibatch does not divide an epoch, and where it is longer than one."""
    for size in (4, 7, 25):
        order = np.concatenate([minibatch(step, size, 10, seed=3) for step in range(50)])
        epochs = [order[start : start + 10] for start in range(0, len(order) - 9, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > len(epochs) / 2
    assert minibatch(0, 10, 10, seed=3).tolist() != minibatch(0, 10, 10, seed=4).tolist()


def test_each_seed_and_each_step_has_noise_of_its_own() -> None:
    assert len({noise_seed(seed, step) for seed in range(20) for step in range(20)}) == 400


def test_the_seed_decides_the_weights_and_a_step_leaves_no_gradient() -> None:
    small = {"data": "cifar10-sample", "num_latents": 2, "code_dim": 3, "features": 4, "batch_size": 6}
    first, same, other = (
        Trainer(
            trial({**small, "estimator": "gs-soft", "num_codes": 5, "seed": seed}),
            IMAGES,
            torch.device("cpu"),
            torch.float32,
        )
        for seed in (1, 1, 2)
    )
    weights = [trainer.model.encoder.body[0].weight for trainer in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    first.step(0)
    assert all(parameter.grad is None for parameter in first.model.parameters())


def test_seed_and_step_decide_which_images_a_step_sees_in_which_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Generator, int]] = []
    monkeypatch.setattr(Trainer, "advance", lambda _, *given: seen.append(given))
    small = {"data": "cifar10-sample", "num_latents": 2, "code_dim": 3, "features": 4, "batch_size": 6}
    for seed, step in ((1, 0), (1, 3), (2, 3)):
        one = trial({**small, "estimator": "gs-soft", "num_codes": 5, "seed": seed})
        Trainer(one, IMAGES, torch.device("cpu"), torch.float32).step(step)
        images, noise, told = seen.pop()
        np.testing.assert_array_equal(images, IMAGES[minibatch(step, 6, len(IMAGES), seed)])
        assert (noise.initial_seed(), told) == (noise_seed(seed, step), step)


@pytest.mark.parametrize("estimator", ["gs-soft", "vimco", "vq-ema"])
def test_normalization_is_of_minibatches_until_its_statistics_stay(estimator: str, tmp_path: Path) -> None:
    """Whatever is looked at in between; and those that stay are not fitted, for the weights have met them."""
    small = {"data": "cifar10-sample", "num_latents": 2, "code_dim": 3, "features": 4, "batch_size": 6}
    one = trial({**small, "estimator": estimator, "num_codes": 5, "normalization_until": 2, "steps": 4})
    fixed, undisturbed, never = (
        Trainer(other, IMAGES, torch.device("cpu"), torch.float64)
        for other in (one, one, one.model_copy(update={"normalization_until": None}))
    )
    norm = fixed.model.encoder.body[1]
    for step in range(4):
        before = norm.running_mean.clone()
        terms = fixed.step(step)
        assert torch.equal(terms, undisturbed.step(step))
        assert torch.equal(terms, never.step(step)) == (step < 2)
        assert torch.equal(before, norm.running_mean) == (step >= 2)
        evaluate(fixed.model, IMAGES)
        fixed.model.train()
    save(fixed.model.float(), tmp_path)
    loaded = load(tmp_path).train().encoder.body[1]
    assert not loaded.training
    before = norm.running_mean.clone()
    for until in (2, 3):  # the last step is step 3
        fixed.model.trial = one.model_copy(update={"normalization_until": until})
        fit(fixed.model, IMAGES)
        assert torch.equal(before, norm.running_mean)
    for until in (None, 4):  # which no step came to
        never.model.trial = one.model_copy(update={"normalization_until": until})
        save(copy.deepcopy(never.model).float(), tmp_path / str(until))
        assert load(tmp_path / str(until)).train().encoder.body[1].training
        followed = never.model.encoder.body[1].running_mean.clone()
        fit(never.model, IMAGES)
        assert not torch.equal(followed, never.model.encoder.body[1].running_mean)
        never.model.encoder.body[1].running_mean.copy_(followed)


def test_the_learning_rate_falls_by_half_every_half_life_and_is_the_optimizers() -> None:
    small = {"data": "cifar10-sample", "num_latents": 2, "code_dim": 3, "features": 4, "batch_size": 6}
    small |= {"estimator": "gs-soft", "num_codes": 5, "learning_rate": 0.5}
    falling = trial({**small, "decay_after": 2, "decay_half_life": 3})
    rates = [falling.learning_rate_at(step) for step in (0, 2, 5, 8)]
    assert rates == pytest.approx([0.5, 0.5, 0.25, 0.125])
    moved = []
    for one in (trial(small), falling):
        trainer = Trainer(one, IMAGES, torch.device("cpu"), torch.float64)
        before = trainer.model.encoder.body[0].weight.detach().clone()
        trainer.step(8)
        moved.append(trainer.model.encoder.body[0].weight.detach() - before)
    torch.testing.assert_close(moved[0], 4 * moved[1])


def test_the_loss_is_that_of_the_step() -> None:
    """By a schedule: at step 5 the KL's weight has risen to 6 tenths."""
    small = {"data": "cifar10-sample", "num_latents": 2, "code_dim": 3, "features": 4, "batch_size": 6}
    one = trial({**small, "estimator": "gs-soft", "num_codes": 5, "kl_warmup": 10})
    trainer = Trainer(one, IMAGES, torch.device("cpu"), torch.float64)
    surrogate, distortion, rate = trainer.step(5).tolist()
    assert (surrogate - distortion) / rate == pytest.approx(0.6)


SCALAR = torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (
            (SCALAR, SCALAR, SCALAR),
            "mine: its loss returned a tuple; return Loss",
        ),
        (None, "mine: its loss returned a NoneType; return Loss"),
        (Loss(SCALAR, 0.5, SCALAR), "mine: its loss returned a float as the distortion; return a tensor"),  # type: ignore[arg-type]
        (Loss(SCALAR, SCALAR, torch.zeros(3, 1)), r"mine: its loss returned a \(3, 1\) tensor as the rate"),
        (Loss(SCALAR.detach(), SCALAR, SCALAR), "mine: its loss returned a surrogate that hangs on no"),
        (
            Loss(SCALAR, SCALAR, SCALAR, {"σ²": torch.zeros(2)}),
            r"mine: its loss logs a \(2,\) tensor as 'σ²'; log a",
        ),
        (
            Loss(SCALAR, SCALAR, SCALAR, {"rate": SCALAR}),
            "mine: its loss logs a number as 'rate'; .* that is not",
        ),
        (Loss(SCALAR, SCALAR, SCALAR, {"a b/c": 0.0}), "mine: its loss logs a number as 'a b/c'"),
        (Loss(SCALAR, SCALAR, SCALAR, {"x": None}), "mine: its loss logs a NoneType as 'x'; log a number"),  # type: ignore[dict-item]
        (
            Loss(SCALAR, SCALAR, SCALAR, {"x": torch.zeros((), device="meta")}),
            "mine: its loss logs a tensor on the meta as 'x'; log a number, on the loss's device",
        ),
    ],
)
def test_a_loss_that_is_none_is_one_sentence(found: Any, says: str) -> None:
    with pytest.raises(DvqError, match=says):
        checked(found, "mine")


class Own(GSSoft):
    """GS-Soft with a parameter that the loss does not use, and numbers to follow."""

    estimator: Literal["own"] = "own"  # type: ignore[assignment]
    frozen: bool = True

    def latents(self) -> Categorical:
        latents = super().latents()
        latents.log_tau = torch.nn.Parameter(torch.tensor(-0.5), requires_grad=not self.frozen)
        return latents

    def loss(self, model: Model, images: Tensor, generator: torch.Generator, step: Any) -> Loss:
        followed = {"τ": model.latents.log_tau.exp(), "step": step} | ({"late": 1.0} if step == 2 else {})
        return super().loss(model, images, generator, step)._replace(logged=followed)


def own(**fields: Any) -> Trainer:
    one = Own(
        data="cifar10-sample", num_latents=2, code_dim=3, features=4, num_codes=5, batch_size=6, **fields
    )
    return Trainer(one, IMAGES, torch.device("cpu"), torch.float32)


def test_a_parameter_without_a_gradient_is_named_unless_it_wants_none() -> None:
    with pytest.raises(DvqError, match=r"^own: latents\.log_tau gets no gradient from the loss; use it"):
        own(frozen=False).step(0)
    trained, goes_on = own(), own()
    trained.step(0)
    goes_on.restore(trained.state())
    assert torch.equal(goes_on.step(1), trained.step(1))


def test_numbers_of_ones_own_stand_behind_the_terms_by_the_same_names_at_every_step() -> None:
    plain, fixed = own(), own()
    recorded = Recorded(fixed)
    for step in (0, 1):
        found = plain.step(step)
        assert found[3:].tolist() == pytest.approx([math.exp(-0.5), step])
        torch.testing.assert_close(recorded.step(step), found)
    assert plain.logged == fixed.logged == ["τ", "step"]
    with pytest.raises(
        DvqError, match="own: its loss logs τ, step, late, and at its first step it logged τ, step;"
    ):
        plain.step(2)


def test_what_an_estimator_gave_to_the_model_is_told_with_the_estimators_line() -> None:
    """Though what fell over it lies deeper."""
    one = trial(
        {"estimator": "vq-ema", "data": "cifar10-sample", "num_latents": 2, "code_dim": 3, "features": 4}
    )
    trainer = Trainer(one, IMAGES, torch.device("cpu"), torch.float32)
    trainer.model.latents.codes = lambda v: v  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError) as caught:
        trainer.step(0)
    assert re.search(r"\(vq_ema.py, line \d+\)$", failures.reason(caught.value))


def test_what_an_estimator_got_wrong_is_told_with_its_line() -> None:
    def loss(self: GSSoft, *_: object) -> None:
        self.kl_weight("three")  # type: ignore[arg-type]

    with pytest.raises(TypeError) as caught:
        loss(GSSoft(kl_warmup=1))
    assert re.fullmatch(r"TypeError: .* \(trial.py, line \d+\)", failures.reason(caught.value))
