"""One contract for every estimator under every option, and what is particular to some."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import Tensor

from dvq import DvqError, config, load, posterior, relaxation
from dvq.codes import kmeans
from dvq.config import estimators, trial
from dvq.estimators.fsq import FSQ
from dvq.estimators.gs_soft import GSSoft
from dvq.estimators.vimco import leave_one_out
from dvq.evaluate import evaluate
from dvq.latents import Categorical
from dvq.model import Model
from dvq.probe import _reference, probe
from dvq.quantizers import Nearest
from dvq.randomness import noise_seed
from dvq.saved import save
from dvq.trainer import Trainer
from dvq.trial import TwoOrMore, Unkeyed
from tests.sizes import LEVELS, taken

IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
SMALL: dict[str, Any] = {
    "data": "cifar10-sample",
    "num_latents": 2,
    "code_dim": 3,
    "features": 4,
    "batch_size": 6,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_codes": 7},
    {"normalization": "none"},
    {"normalization_until": 1},
    {"residual_blocks": 0},
    {"residual_blocks": 4},
    {"output_head": "transposed"},
    {"code_dim": 16},
    {"prior": "uniform"},
    {"codebook_init": "kmeans"},
    {"codebook_std": 0.2},
    {"distance_scale": 0.5},
    {"kl_warmup": 3},
    {"temperature": 1.0, "final_temperature": 0.2, "annealing_steps": 2},
    {"samples": 2},
    {"backward": "one"},
    {"temperature": 2.0},
    {"baseline_decay": 0.5},
    {"commitment": 1.0, "ema_decay": 0.9},
    {"revive_below": 1.0},
    {"gradient": "rotation"},
    {"levels": (2, 5, 8)},
]
GRID = [
    pytest.param(name, options, id=f"{name} {' '.join(f'{k}={v}' for k, v in options.items())}")
    for name in sorted(estimators())
    for options in OPTIONS
    if taken(name, options) == options
]


@pytest.mark.parametrize(("estimator", "options"), GRID)
def test_every_estimator_trains_saves_and_evaluates_to_the_same(
    estimator: str, options: dict[str, Any], tmp_path: Path
) -> None:
    few = {**SMALL, "num_codes": 5, "data": "noise@8x8x3-0123456789abcdef"}  # the options see no image's size
    images = IMAGES[:, :8, :8]
    one = trial({**taken(estimator, few), **options, "estimator": estimator})
    trainer = Trainer(one, images, torch.device("cpu"), torch.float32)
    untrained = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    for step in range(3):
        assert torch.isfinite(trainer.step(step)).all()
    for name, tensor in trainer.model.named_parameters():
        assert torch.isfinite(tensor).all(), name
        assert not torch.equal(tensor, untrained[name]), f"{name} got no gradient"
    save(trainer.model, tmp_path)
    loaded = load(tmp_path)
    assert (loaded.trial, loaded.training) == (one, False)
    before, after = (evaluate(model, images, bound_samples=2) for model in (trainer.model, loaded))
    assert before == after
    assert sum(after["ledger"]["latents"]) == pytest.approx(after["rate"], rel=1e-6)
    assert sum(after["ledger"]["channels"]) == pytest.approx(after["distortion"], rel=1e-6)


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_training_tells_the_distortion_and_rate_that_evaluation_does(estimator: str) -> None:
    """An image's, whatever samples there are and whatever weighs the KL; of a decoder that looks at no code."""
    torch.manual_seed(0)
    few = {**SMALL, "num_codes": 5, "kl_warmup": 9}
    model = Model(trial({**taken(estimator, few), "estimator": estimator})).double().eval()
    with torch.no_grad():
        model.decoder.head.weight.zero_()
        for name, parameter in model.named_parameters():
            if name.endswith("prior_logits"):
                parameter.normal_()
    loss = model.trial.loss(model, torch.from_numpy(IMAGES[:3]), torch.Generator().manual_seed(0), 0)
    found, right = loss._asdict(), evaluate(model, IMAGES[:3])
    for name in ("distortion", "rate"):
        assert found[name].item() * model.trial.bits_per_nat == pytest.approx(right[name], rel=1e-9), name


def test_there_is_a_grid() -> None:
    assert {param.values[0] for param in GRID} == set(estimators())
    assert len(GRID) > 60


class Signs(GSSoft):
    """Of which D decides C: two values for each dimension."""

    estimator: Literal["signs"] = "signs"  # type: ignore[assignment]
    num_codes: TwoOrMore = Field(default=512, json_schema_extra=Unkeyed)


def test_the_tests_leave_sizes_that_others_decide_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "ESTIMATORS", [Signs, FSQ])
    sizes = {"num_codes": 5, "code_dim": 3, "features": 4}
    assert taken("signs", sizes) == {"code_dim": 3, "features": 4}
    assert taken("fsq", sizes) == {"levels": LEVELS, "features": 4}


def some_v(n: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def small(estimator: str, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(trial({**SMALL, "num_codes": 5, **options, "estimator": estimator})).double()


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_no_schedule_looks_at_the_last_step(estimator: str) -> None:
    """For longer trials go on from shorter ones."""
    few = {**SMALL, "num_codes": 5, "data": "noise@8x8x3-0123456789abcdef", "kl_warmup": 2, "decay_after": 1}
    few |= {"final_temperature": 0.2, "annealing_steps": 2}
    short, long = (
        Trainer(
            trial({**taken(estimator, few), "estimator": estimator, "steps": steps}),
            IMAGES[:, :8, :8],
            torch.device("cpu"),
            torch.float32,
        )
        for steps in (3, 30)
    )
    for step in range(3):
        assert torch.equal(short.step(step), long.step(step)), (
            "a schedule looks at steps: give it a length of its own"
        )


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_all_that_changes_in_training_is_in_a_checkpoint(estimator: str) -> None:
    few = {**SMALL, "num_codes": 5, "data": "noise@8x8x3-0123456789abcdef"}
    one = trial({**taken(estimator, few), "estimator": estimator})
    goes_on, resumed = (Trainer(one, IMAGES[:, :8, :8], torch.device("cpu"), torch.float32) for _ in range(2))
    for step in range(3):
        goes_on.step(step)
    resumed.restore(goes_on.state())
    assert torch.equal(resumed.step(3), goes_on.step(3)), (
        "what changes in training must be a parameter, or a buffer that is saved"
    )


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_a_sample_is_a_draw_from_q_and_charged_by_p(estimator: str) -> None:
    """Or evaluation is of no bound: with the most probable codes, mixtures of codes, a prior whose sum is not 1."""
    few = {**SMALL, "num_codes": 5, "codebook_std": 0.5, "data": "noise@8x8x3-0123456789abcdef"}
    torch.manual_seed(0)
    model, draws = Model(trial({**taken(estimator, few), "estimator": estimator})).double().eval(), 4000
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("prior_logits"):
                parameter.normal_()
        v = model.encoder(torch.from_numpy(IMAGES[:1, :8, :8])).repeat_interleave(draws, 1)  # (K, 4·draws, ·)
        found = model.latents.sample(v, torch.Generator().manual_seed(0))
    rate, log_ratio = (x.unflatten(1, (-1, draws)) for x in (found.rate, found.log_ratio))
    assert ((log_ratio.mean(-1) - rate.mean(-1)).abs() <= 5 * log_ratio.std(-1) / draws**0.5 + 1e-9).all()
    if found.codes is None:
        return
    assert torch.equal(found.vectors, model.latents.vectors(found.codes))
    log_prior = model.latents.log_prior()
    torch.testing.assert_close(log_prior.exp().sum(-1), torch.ones_like(log_prior[:, 0]))
    codes = found.codes.long().unflatten(1, (-1, draws))
    often = torch.nn.functional.one_hot(codes, log_prior.shape[1]).double().mean(2).gather(-1, codes)
    q = (log_ratio + model.latents.log_p_each(found.codes).view_as(codes)).exp()
    assert ((often - q).abs() <= 5 * (q * (1 - q).clamp(min=0) / draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (3, 7, 3), (2, 7, 4), (14, 3)])
def test_other_encodings_are_one_sentence(shape: tuple[int, ...]) -> None:
    for estimator, method in (
        ("gs-soft", "relax"),
        ("reinmax", "reinmax"),
        ("rloo", "score"),
        ("vq-ema", "codes"),
    ):
        latents, noise = small(estimator).latents, torch.Generator()
        rest = {"relax": (0.5, False, noise), "reinmax": (noise,), "score": (2, noise), "codes": ()}[method]
        with pytest.raises(
            DvqError, match=r"encodings are \(K, N, D\), here \(2, N, 3\); these are \("
        ) as caught:
            getattr(latents, method)(torch.zeros(shape, dtype=torch.float64), *rest)
        assert str(caught.value).endswith(str(shape))


# --- Gumbel-Softmax


@pytest.mark.parametrize("hard", [False, True])
def test_what_a_gpu_computes_of_a_relaxed_sample_agrees_with_the_plain_form(hard: bool) -> None:
    latents, v = small("gs-hard" if hard else "gs-soft").latents, some_v(40)
    noise = relaxation.exponential(v.new_empty(2, 40, 5), torch.Generator().manual_seed(3))
    log_prior = latents.prior_logits.log_softmax(-1)
    args = latents.logits(v), latents.codebook, log_prior, -noise.log(), 0.5, hard
    expected = relaxation.relaxed(*args)
    equations = relaxation.gpu_relax.__wrapped__  # type: ignore[attr-defined]
    found = equations(v, latents.codebook, latents.prior_logits, noise, latents.scale, 0.5, hard)
    torch.testing.assert_close(found, expected)


def test_temperature_falls_geometrically_and_stays() -> None:
    one = trial({"estimator": "gs-soft", "temperature": 2.0, "final_temperature": 0.5, "annealing_steps": 10})
    assert isinstance(one, GSSoft)
    assert [one.temperature_at(step) for step in (0, 5, 10, 99)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    late = one.model_copy(update={"annealing_after": 20})
    assert [late.temperature_at(step) for step in (0, 20, 25, 30)] == pytest.approx([2.0, 2.0, 1.0, 0.5])
    constant = trial({"estimator": "gs-soft"})
    assert isinstance(constant, GSSoft)
    assert constant.temperature_at(10**6) == 0.5


@pytest.mark.parametrize("estimator", ["gs-soft", "gs-hard", "reinmax", "vimco", "nvil", "rloo", "gaussian"])
def test_kl_warmup_weighs_the_surrogate_and_not_the_rate(estimator: str) -> None:
    codes = {"num_codes": 5} if estimator != "gaussian" else {}
    one = trial({**SMALL, **codes, "estimator": estimator, "kl_warmup": 4})
    assert [one.kl_weight(step) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]  # type: ignore[attr-defined]
    less = one.model_copy(update={"final_kl_weight": 0.5})
    assert [less.kl_weight(step) for step in (0, 1, 3, 4)] == [0.125, 0.25, 0.5, 0.5]  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model, images = Model(one).double().eval(), torch.from_numpy(IMAGES)
    terms = [one.loss(model, images, torch.Generator().manual_seed(0), step) for step in (0, 9)]
    assert terms[0].rate == terms[1].rate > 0
    assert terms[0].surrogate != terms[1].surrogate
    if estimator not in ("vimco", "nvil", "rloo"):  # of which test_enumeration knows the gradient
        for term, weight in zip(terms, (0.25, 1.0), strict=True):
            assert term.surrogate.item() == pytest.approx((term.distortion + weight * term.rate).item())


def test_gs_hard_and_reinmax_decode_codes_and_gs_soft_mixtures() -> None:
    for estimator, exact in (("gs-hard", True), ("reinmax", True), ("gs-soft", False)):
        model, seen = small(estimator), []
        decode = model.distortion

        def spy(vectors: Tensor, images: Tensor, seen: list[Tensor] = seen, decode: Any = decode) -> Any:
            seen.append(vectors)
            return decode(vectors, images)

        model.distortion = spy  # type: ignore[method-assign]
        model.trial.loss(model, torch.from_numpy(IMAGES), torch.Generator().manual_seed(0), 0)
        gap = torch.cdist(seen[0], model.latents.codebook).amin(-1).max()
        assert (gap < 1e-6) == exact


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tile", [5 * 7, 2**18])
def test_the_fast_relaxation_agrees_with_the_plain(
    hard: bool, dtype: torch.dtype, tolerance: float, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In value and in every gradient, with weights on both outputs, by tiles of rows and all at once."""
    monkeypatch.setitem(posterior.TILE, "cpu", tile)
    model = small("gs-soft", distance_scale=0.7).to(dtype)
    latents, weight = model.latents, torch.randn(2, 40, 3, dtype=dtype)
    with torch.no_grad():
        latents.prior_logits.normal_()
    v = some_v(40).to(dtype).requires_grad_()
    found = []
    for plain in (True, False):
        latents.plain = plain
        vectors, rate = latents.relax(v, 0.4, hard, torch.Generator().manual_seed(3))
        value = (vectors * weight).sum() + 0.3 * rate
        found.append(
            [vectors, rate, *torch.autograd.grad(value, [v, latents.codebook, latents.prior_logits])]
        )
    for right, fast in zip(*found, strict=True):
        assert (fast - right).norm() <= tolerance * right.norm()


class Given:
    """Stands for numpy's uniform numbers: the same, whatever the precision."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def random(self, out: Any, dtype: Any) -> None:  # noqa: ARG002
        out[:] = np.resize(np.array(self.numbers), out.shape)


@pytest.mark.parametrize("annealed", [False, True])
@pytest.mark.parametrize("temperature", [0.05, 0.15, 0.5])
def test_the_fast_relaxation_survives_the_smallest_and_largest_random_number(
    temperature: float, annealed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(exp(l)/E)^(1/τ) leaves float32's range under τ = 0.19, unless it is divided by the largest first."""
    monkeypatch.setattr(relaxation, "noise_of", lambda _: Given([0, 1 - 2**-24]))
    tau = torch.tensor(temperature, dtype=torch.float64) if annealed else temperature
    found = []
    for plain, dtype in ((True, torch.float64), (False, torch.float32)):
        latents = small("gs-soft").latents.to(dtype)
        latents.plain = plain
        v = some_v(40).to(dtype).requires_grad_()
        vectors, rate = latents.relax(v, tau, False, torch.Generator())
        gradients = torch.autograd.grad(vectors.square().sum() + rate, [v, latents.codebook])
        found.append([x.detach().double() for x in (vectors, rate, *gradients)])
    for right, fast in zip(*found, strict=True):
        assert (fast - right).norm() <= 1e-3 * right.norm()


@pytest.mark.parametrize("schedule", [{"temperature": 50.0}, {"temperature": 1.0, "final_temperature": 50.0}])
def test_a_high_temperature_keeps_what_exp_l_loses(
    schedule: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At τ = 50 codes share y whose exp(l) is 0 in float32; ``fast_relax`` would drop them."""
    monkeypatch.setattr(relaxation, "noise_of", lambda _: Given(np.linspace(0.01, 0.99, 397).tolist()))
    found = []
    for dtype in (torch.float64, torch.float32):
        latents = small("gs-soft", **schedule, codebook_std=10.0).latents.to(dtype)
        v = some_v(40).to(dtype)
        found.append(latents.relax(v, 50.0, False, torch.Generator())[0].detach().double())
    assert (found[1] - found[0]).norm() <= 1e-3 * found[0].norm()


def test_a_high_temperature_keeps_what_exp_l_loses_in_estimators_of_ones_own() -> None:
    """They call relax themselves, with the τ that they like, and hear nothing of its forms."""
    latents, found = small("gs-soft").latents, []
    v = some_v(6) * 1000
    for latents.plain in (False, True):
        generator = torch.Generator().manual_seed(0)
        found.append(latents.relax(v, 50.0, False, generator)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("estimator", ["gs-soft", "gs-hard"])
def test_the_loss_takes_the_temperature_of_its_step(estimator: str) -> None:
    model, images = small(estimator).eval(), torch.from_numpy(IMAGES)
    schedule = {"temperature": 1.0, "final_temperature": 0.25, "annealing_steps": 10}
    first, last = {"temperature": 1.0}, {"temperature": 0.25}
    for step, constant in ((0, first), (10, last)):
        found, right = (
            torch.autograd.grad(
                trial({**SMALL, "num_codes": 5, "estimator": estimator, **options})
                .loss(model, images, torch.Generator().manual_seed(0), step)
                .surrogate,
                model.latents.codebook,
            )[0]
            for options in (schedule, constant)
        )
        torch.testing.assert_close(found, right)


def sampled(latents: Categorical, method: str, v: Tensor, tau: float | Tensor) -> Tensor:
    """A number made of all that a method gives to differentiate, from the same noise each time."""
    generator = torch.Generator().manual_seed(3)
    if method == "score":
        log_q = latents.score(v, 2, generator)[1]
        return (log_q * torch.arange(log_q.numel()).view_as(log_q)).sum()
    found = latents.reinmax(v, generator) if method == "reinmax" else None
    vectors, rate = found or latents.relax(v, tau, method == "hard", generator)
    return vectors.pow(3).sum() + rate


@pytest.mark.parametrize("shape", [(), (2, 1, 1)], ids=["one", "of each codebook"])
@pytest.mark.parametrize("method", ["soft", "hard", "reinmax", "score"])
def test_a_trained_scale_and_temperature_get_the_gradients_of_the_equations(
    method: str, shape: tuple[int, ...]
) -> None:
    latents, v = small("gs-soft").latents, some_v(6).requires_grad_()
    latents.scale = torch.nn.Parameter(torch.full(shape, 0.7, dtype=v.dtype))
    tau = torch.tensor(0.6, dtype=v.dtype, requires_grad=True)
    inputs = [latents.scale, *([tau] if method in ("soft", "hard") else []), v, latents.codebook]
    found = torch.autograd.grad(sampled(latents, method, v, tau), inputs)

    def logits(v: Tensor) -> Tensor:
        return -latents.scale * (v.unsqueeze(2) - latents.codebook.unsqueeze(1)).square().sum(-1)

    latents.plain, latents.logits = True, logits  # type: ignore[method-assign]
    torch.testing.assert_close(found, torch.autograd.grad(sampled(latents, method, v, tau), inputs))


class Leaning(Categorical):
    """A posterior of one's own: it prefers the last codes."""

    def logits(self, v: Tensor) -> Tensor:
        return super().logits(v) + 3 * torch.arange(5)


class Skewed(Categorical):
    """A prior of one's own, likewise."""

    def log_prior(self) -> Tensor:
        return (self.prior_logits + torch.arange(5)).log_softmax(-1)


@pytest.mark.parametrize("kind", [Leaning, Skewed])
def test_logits_or_a_prior_of_ones_own_are_trained_as_they_are_evaluated(kind: type[Categorical]) -> None:
    """The fast forms, which know the class's own equations alone, trained another posterior than was evaluated."""
    latents, v = small("gs-soft").latents, some_v(6)
    as_it_was = latents.sample(v, torch.Generator()).rate.sum()
    latents.__class__ = kind
    right = latents.sample(v, torch.Generator()).rate.sum()
    assert abs(right - as_it_was) > 1
    rates = [latents.relax(v, 0.5, hard, torch.Generator())[1] for hard in (False, True)]
    rates += [latents.reinmax(v, torch.Generator())[1], latents.score(v, 2, torch.Generator())[2]]
    torch.testing.assert_close(torch.stack(rates), right.expand(4))


def test_the_probe_leaves_logits_of_ones_own() -> None:
    model = small("gs-soft")
    for own in (False, True):
        if own:
            model.latents.logits = lambda v: Categorical.logits(model.latents, v)
        before = dict(vars(model.latents))
        probe(model, torch.from_numpy(IMAGES[:2]), 2, torch.Generator(), 0)
        assert vars(model.latents) == before


def test_a_trained_temperature_and_scale_get_the_slopes_of_the_fast_form() -> None:
    latents, v, step = small("gs-soft").latents, some_v(6), 1e-5
    tau = torch.tensor(0.6, dtype=v.dtype, requires_grad=True)
    slopes = [(sampled(latents, "soft", v, 0.6 + h) / (2 * h)).item() for h in (step, -step)]
    (by_tau,) = torch.autograd.grad(sampled(latents, "soft", v, tau), tau)
    assert by_tau.item() == pytest.approx(sum(slopes), rel=1e-6)
    slopes = []
    for h in (step, -step):
        latents.scale = 0.7 + h
        slopes.append((sampled(latents, "soft", v, 0.6) / (2 * h)).item())
    latents.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=v.dtype))
    (by_scale,) = torch.autograd.grad(sampled(latents, "soft", v, 0.6), latents.scale)
    assert by_scale.item() == pytest.approx(sum(slopes), rel=1e-6)


@pytest.mark.parametrize("method", ["soft", "hard", "reinmax", "score"])
def test_fast_forms_differentiate_again_and_say_that_they_have_no_second_derivatives(method: str) -> None:
    latents, v = small("gs-soft").latents, some_v(6).requires_grad_()
    value = sampled(latents, method, v, 0.6)
    first, again = (torch.autograd.grad(value, v, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(DvqError, match=r"no second derivatives; set latents\.plain = True"):
        torch.autograd.grad(value, v, create_graph=True)


@pytest.mark.parametrize("method", ["soft", "score"])
def test_the_plain_form_has_second_derivatives(method: str) -> None:
    latents, v = small("gs-soft").latents, some_v(2).requires_grad_()
    latents.plain = True
    assert torch.autograd.gradgradcheck(lambda v: sampled(latents, method, v, 0.6), v)


def test_the_transposed_head_has_second_derivatives() -> None:
    model, images = small("gs-soft", output_head="transposed"), torch.from_numpy(IMAGES[:1])
    v, direction = some_v(64).requires_grad_(), some_v(64).flip(1)
    slopes = []
    for h in (1e-4, -1e-4):
        moved = (v + h * direction).detach().requires_grad_()
        slopes.append(torch.autograd.grad(model.distortion(moved, images)[0], moved)[0] / (2 * h))
    (gradient,) = torch.autograd.grad(model.distortion(v, images)[0], v, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction).sum(), v)
    assert (product - sum(slopes)).norm() <= 1e-3 * product.norm()


# --- The decoder


@pytest.mark.parametrize("head", ["1x1", "transposed"])
@pytest.mark.parametrize("shape", [(2, 2 * 3 * 64, 3), (2, 3 * 64, 5), (3 * 64, 2, 3)])
def test_other_vectors_than_the_images_are_one_sentence(head: str, shape: tuple[int, ...]) -> None:
    """Two samples of images that are not repeated were a distortion, of the first sample alone."""
    model, vectors = small("gs-soft", output_head=head), torch.zeros(shape, dtype=torch.float64)
    says = r"takes vectors \(K, N, D\), here \(2, 192, 3\) for 3 images; these are \("
    with pytest.raises(DvqError, match=says) as caught:
        model.distortion(vectors, torch.from_numpy(IMAGES[:3]))
    assert str(caught.value).endswith(str(shape))


@pytest.mark.parametrize("head", ["1x1", "transposed"])
def test_the_distortion_weighs_each_image(head: str) -> None:
    model, images = small("vimco", output_head=head).eval(), torch.from_numpy(IMAGES[:3])
    vectors = some_v(3 * 64).requires_grad_()
    weights = torch.tensor([0.2, 3.0, 0.0], dtype=torch.float64)
    each = [model.distortion(vectors[:, i * 64 : i * 64 + 64], images[i : i + 1])[0] for i in range(3)]
    right = (weights * torch.stack(each)).sum()
    found, nll = model.distortion(vectors, images, lambda nll: weights * nll / nll)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(nll, torch.stack(each).detach())
    torch.testing.assert_close(*(torch.autograd.grad(value, vectors)[0] for value in (found, right)))


# --- VIMCO


def test_leave_one_out_is_the_equation_written_out() -> None:
    w = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = leave_one_out(w)
    for s in range(4):
        for b in range(3):
            others = [w[t, b].item() for t in range(4) if t != s]
            replaced = [*others, sum(others) / 3]
            bound, without = (math.log(sum(map(math.exp, x)) / 4) for x in (w[:, b].tolist(), replaced))
            assert found[s, b].item() == pytest.approx(bound - without, rel=1e-10)


# --- NVIL


def test_nvils_signal_is_centered_by_statistics_from_before_the_minibatch() -> None:
    scored = small("nvil").latents
    with torch.no_grad():
        scored.baseline[2].weight.zero_()
        scored.baseline[2].bias.fill_(2.0)
    v, w = some_v(4 * 64), torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    first, _ = scored.signal(w, v, update=True)
    assert first.tolist() == [0.0] * 4  # no statistics yet
    assert (scored.mean.item(), scored.variance.item()) == pytest.approx((2.0, 5.0))
    second, fit = scored.signal(w + 10, v, update=True)
    assert second.tolist() == pytest.approx([x + 10 - 2 - 2 for x in w.tolist()])
    assert scored.mean.item() == pytest.approx(0.9 * 2.0 + 0.1 * 12.0)
    (gradient,) = torch.autograd.grad(fit.sum(), scored.baseline[2].bias)
    assert gradient.item() == pytest.approx(-2 * (w + 10 - scored.mean - 2).sum().item())
    seen, _ = scored.signal(w, v, update=False)
    assert seen.tolist() == pytest.approx((w - 2 - scored.mean).tolist())


def test_nvils_baseline_is_of_the_mean_over_an_images_own_positions() -> None:
    scored, v, w = small("nvil").latents, some_v(3 * 64), torch.zeros(3, dtype=torch.float64)
    found, _ = scored.signal(w, v, update=False)
    assert found.std() > 1e-3
    for i, own in enumerate(v.split(64, 1)):
        for positions in (own, own.repeat(1, 2, 1)):
            torch.testing.assert_close(scored.signal(w[:1], positions, update=False)[0], found[i : i + 1])


@pytest.mark.parametrize(("variance", "share"), [(400.0, 1 / 20), (0.25, 1.0)])
def test_nvil_divides_the_encoders_gradient_by_a_deviation_above_1(variance: float, share: float) -> None:
    scored = small("nvil").latents
    scored.variance.fill_(variance)
    v = some_v(4).requires_grad_()
    assert torch.equal(scored.damped(v), v)
    (gradient,) = torch.autograd.grad(scored.damped(v).sum(), v)
    torch.testing.assert_close(gradient, torch.full_like(v, share))


def test_nvils_loss_trains_the_baseline_to_fit() -> None:
    model, images = small("nvil").eval(), torch.from_numpy(IMAGES[:4])
    fits, signal = [], model.latents.signal

    def spy(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        fits.append(signal(*args, **more))
        return fits[0]

    model.latents.signal = spy
    surrogate = model.trial.loss(model, images, torch.Generator().manual_seed(0), 0).surrogate
    inputs = list(model.latents.baseline.parameters())
    found = torch.autograd.grad(surrogate, inputs, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(fits[0][1].mean(), inputs), strict=True):
        torch.testing.assert_close(a, b)


# --- VQ-VAE


@pytest.mark.parametrize("estimator", ["vq-ema", "vq-loss"])
def test_vq_gradients_are_those_of_the_equation(estimator: str) -> None:
    """Straight-through to the encoder, commitment to the encoder alone, the codebook loss to the codebook."""
    model, images = small(estimator, commitment=0.7).eval(), torch.from_numpy(IMAGES[:3])
    surrogate = model.trial.loss(model, images, torch.Generator(), 0).surrogate
    encoder, head = model.encoder.body[-1].weight, model.decoder.head.weight
    inputs = [encoder, head, model.latents.prior_logits]
    inputs += [model.latents.codebook] if estimator == "vq-loss" else []
    found = torch.autograd.grad(surrogate, inputs)

    v = model.encoder(images)
    codes = torch.cdist(v, model.latents.codebook).argmin(-1)
    m = model.latents.vectors(codes)
    z = m.detach().requires_grad_()
    distortion = model.distortion(z, images)[0] / 3
    straight_through, to_head = torch.autograd.grad(distortion, [z, head])
    elements = v.numel()
    to_v = straight_through + 0.7 * 3072 * 2 * (v - m) / elements
    right = [torch.autograd.grad(v, encoder, to_v.detach())[0], to_head]
    counts = torch.stack([torch.bincount(row, minlength=5) for row in codes]).double()
    right.append((model.latents.log_prior().exp() * counts.sum(1, keepdim=True) - counts) / 3)
    if estimator == "vq-loss":
        chosen = torch.nn.functional.one_hot(codes, 5).double()  # (K, N, C)
        right.append(-2 * 3072 / elements * torch.einsum("knc,knd->kcd", chosen, (v - m).detach()))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)


def test_the_commitment_is_a_mean_times_the_images_own_sub_pixels() -> None:
    model = small("vq-ema", commitment=0.7, data="noise@8x12x3-0123456789abcdef").eval()
    images = torch.from_numpy(IMAGES[:3, :8, :12])
    loss, v = model.trial.loss(model, images, torch.Generator(), 0), model.encoder(images)
    mean = (v - model.latents.vectors(model.latents.codes(v.detach()))).square().mean()
    torch.testing.assert_close(loss.surrogate - loss.distortion - loss.rate, 0.7 * 8 * 12 * 3 * mean)


def test_ema_is_kmeans_on_a_fixed_assignment() -> None:
    latents: Nearest = small("vq-ema", ema_decay=0.5).latents
    v = some_v(300)
    codes = latents.codes(v)
    for _ in range(60):
        latents.follow(v, codes)
    for k in range(2):
        for c in codes[k].unique():
            torch.testing.assert_close(
                latents.codebook[k, c], v[k, codes[k] == c].mean(0), rtol=1e-4, atol=1e-5
            )


def test_ema_weighs_the_past_by_its_decay() -> None:
    """N is smoothed where it divides, by ε = 10⁻⁵ a code, and keeps its sum."""
    latents: Nearest = small("vq-ema", ema_decay=0.9).latents
    before = latents.codebook.clone()
    v = some_v(4)
    codes = torch.zeros(2, 4, dtype=torch.long)
    latents.follow(v, codes)
    n, s = 0.9 * 1 + 0.1 * 4, 0.9 * before[:, 0] + 0.1 * v.sum(1)
    torch.testing.assert_close(latents.counts[:, 0], torch.full((2,), n, dtype=torch.float64))
    total = n + 4 * 0.9
    smoothed, unused = ((count + 1e-5) / (total + 5e-5) * total for count in (n, 0.9))
    torch.testing.assert_close(latents.codebook[:, 0], s / smoothed)
    torch.testing.assert_close(latents.codebook[:, 1:], 0.9 * before[:, 1:] / unused)


@pytest.mark.parametrize("estimator", ["vq-ema", "vq-loss"])
def test_a_training_step_follows_and_revives_and_evaluation_moves_nothing(estimator: str) -> None:
    """With one code far away: it is dead, and moves to an encoding."""
    model, images = small(estimator, ema_decay=0.5, revive_below=2.0), torch.from_numpy(IMAGES)
    latents: Nearest = model.latents
    with torch.no_grad():
        latents.codebook[:, 4] += 1e3
    before, counts = latents.codebook.detach().clone(), latents.counts.clone()
    codes = latents.codes(model.encoder(images).detach())
    for training in (False, True):
        model.train(training).trial.loss(model, images, torch.Generator().manual_seed(0), 0)
        assert torch.equal(latents.counts, counts) != training
    used = torch.stack([torch.bincount(row, minlength=5) for row in codes]).double()
    stays = torch.equal(latents.codebook[used > 0], before[used > 0])
    assert stays == (estimator == "vq-loss")  # whose codebook only its gradient moves
    assert latents.codebook[:, 4].abs().max() < 100
    torch.testing.assert_close(latents.counts, (0.5 + 0.5 * used).where(used > 0, torch.tensor(2.0).double()))


def test_smoothing_is_no_part_of_the_state() -> None:
    latents: Nearest = small("vq-ema", ema_decay=0.5).latents
    v = some_v(4)
    for _ in range(1200):  # halved so often, an unused code's count is 0
        latents.follow(v, torch.zeros(2, 4, dtype=torch.long))
    assert latents.counts[:, 1:].max() == 0
    assert torch.isfinite(latents.codebook).all()


@pytest.mark.parametrize("estimator", ["vq-ema", "vq-loss"])
def test_revival_moves_dead_codes_to_encodings_and_never_a_used_one(estimator: str) -> None:
    latents: Nearest = small(estimator, codebook_std=1e-6).latents
    v = some_v(50, spread=5.0) + 20
    codes = torch.randint(0, 3, (2, 50), generator=torch.Generator().manual_seed(0))  # 3 and 4 are not used
    latents.counts[:] = torch.tensor([0.01, 5.0, 0.01, 0.01, 5.0])
    before = latents.codebook.clone()
    latents.revive(v, codes, 0.0, torch.Generator())
    assert torch.equal(latents.codebook, before)
    latents.revive(v, codes, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(latents.codebook[:, [0, 1, 2, 4]], before[:, [0, 1, 2, 4]])
    assert torch.cdist(latents.codebook[:, 3:4], v).amin(-1).max() < 1e-6
    torch.testing.assert_close(latents.sums[:, 3], 0.5 * latents.codebook[:, 3])
    assert latents.counts[:, 3].tolist() == [0.5, 0.5]
    before = latents.codebook.clone()
    latents.revive(v, codes, 0.5, torch.Generator().manual_seed(2))  # which is not under 0.5
    assert torch.equal(latents.codebook, before)


def test_the_trained_prior_reaches_the_codes_frequencies() -> None:
    latents: Nearest = small("vq-ema").latents
    codes = torch.tensor([[0] * 50 + [1] * 30 + [2] * 20, [4] * 90 + [0] * 10])
    optimizer = torch.optim.Adam([latents.prior_logits], lr=0.1)
    for _ in range(500):
        latents.rate(codes).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = torch.tensor([[0.5, 0.3, 0.2, 0, 0], [0.1, 0, 0, 0, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(latents.log_prior().exp().detach(), expected, rtol=0.01, atol=0.003)


# --- Codebooks


def test_kmeans_finds_clusters_and_the_codebooks_begin_there() -> None:
    centers = torch.tensor([[[0.0, 0], [10, 0], [0, 10]], [[5.0, 5], [-5, 5], [0, -9]]])
    points = centers.repeat_interleave(40, 1)
    points = points + 0.01 * torch.randn(points.shape, generator=torch.Generator().manual_seed(0))
    found = min(
        (kmeans(points, 3, torch.Generator().manual_seed(seed)) for seed in range(10)),
        key=lambda c: torch.cdist(points, c).amin(-1).sum().item(),
    )
    assert torch.cdist(centers, found).amin(-1).max() < 0.01
    copies = points[:, :2].repeat(1, 3, 1)  # of the centers that are the same, all but one have no encodings
    few = kmeans(copies, 5, torch.Generator())
    assert few.shape == (2, 5, 2)
    assert torch.cdist(few, points[:, :2]).amin(-1).max() < 0.05

    for estimator in ("gs-soft", "vq-ema"):
        one = trial({**SMALL, "num_codes": 5, "estimator": estimator, "codebook_init": "kmeans"})
        model = Trainer(one, IMAGES, torch.device("cpu"), torch.float32).model
        v = model.encoder(torch.from_numpy(IMAGES)).detach()
        assert torch.cdist(v, model.latents.codebook).amin(-1).mean() < 0.8 * v.std(), estimator
    torch.testing.assert_close(model.latents.sums, model.latents.codebook)

    with pytest.raises(
        DvqError, match="129 codes among as many encodings, and 2 training images have 128; take few"
    ):
        Trainer(one.model_copy(update={"num_codes": 129}), IMAGES[:2], torch.device("cpu"), torch.float32)


def test_kmeans_ends_in_means_however_few_encodings_they_are_of() -> None:
    v = some_v(12)[:, :8]
    found = kmeans(v, 5, torch.Generator().manual_seed(0))
    for points, centers in zip(v, found, strict=True):
        nearest = torch.cdist(points, centers).argmin(-1)
        assert nearest.bincount(minlength=5).min() == 1
        right = torch.stack([points[nearest == code].mean(0) for code in range(5)])
        torch.testing.assert_close(centers, right)


def test_kmeans_sees_ten_encodings_a_code_of_minibatches_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("dvq.trainer.kmeans", lambda v, codes, noise: seen.extend((v, noise)) or v[:, :codes])
    many = {**SMALL, "num_codes": 50, "seed": 3, "codebook_init": "kmeans"}
    one = trial({**many, "estimator": "vq-ema"})
    trainer = Trainer(one, IMAGES, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        encodings = [trainer.model.encoder(trainer.minibatch(step)) for step in (0, 1)]
    torch.testing.assert_close(seen[0], torch.cat(encodings, 1))
    assert seen[1].initial_seed() == noise_seed(3, 0)


@pytest.mark.parametrize(("dim", "scale"), [(16, 1.0), (32, 1.0), (64, 1.0), (32, 0.25)])
def test_the_default_spread_of_the_logits_is_the_same_for_every_dimension(dim: int, scale: float) -> None:
    one = trial({**SMALL, "estimator": "gs-soft", "code_dim": dim, "distance_scale": scale, "num_codes": 512})
    torch.manual_seed(0)
    latents: Categorical = Model(one).latents
    spread = 2 * dim * latents.codebook.var().item() * scale
    assert spread == pytest.approx(32, rel=0.1)


# --- The probe


def test_the_probe_compares_gradients_of_one_latent_variable_of_one_position_and_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With one of each place for the estimator's, and that of the place asked for for the reference."""
    model, images = (
        small("nvil", data="noise@8x8x3-0123456789abcdef").eval(),
        torch.from_numpy(IMAGES[:2, :8, :8]),
    )
    each = torch.randn(2, 2 * 4, 5)
    logits = model.latents.logits(model.encoder(images))
    places = []

    def reference(_: Any, image: Tensor, own: Tensor, k: int, p: int, *__: Any) -> Tensor:
        i = [torch.equal(image[0], one) for one in images].index(True)
        torch.testing.assert_close(own, logits[:, 4 * i : 4 * i + 4])
        places.append((i, p))
        return each[k, 4 * i + p]

    monkeypatch.setattr("dvq.probe._gradient", lambda *_: each)
    monkeypatch.setattr("dvq.probe._reference", reference)
    found = [probe(model, images, 2, torch.Generator().manual_seed(seed), 0) for seed in range(5)]
    assert [one["probe/bias"] for one in found] == [0] * 5
    assert {i for i, _ in places} == {0, 1}
    assert len({p for _, p in places}) > 1


def test_the_probes_reference_sums_out_one_latent_variable_of_one_position() -> None:
    model, images = (
        small("nvil", data="noise@8x8x3-0123456789abcdef").eval(),
        torch.from_numpy(IMAGES[:2, :8, :8]),
    )
    seen: list[Tensor] = []
    model.channel_distortions = lambda vectors, _: seen.append(vectors) or torch.zeros(5, 3)  # type: ignore
    with torch.no_grad():
        logits = model.latents.logits(model.encoder(images[:1]))
        _reference(model, images[:1], logits, 1, 2, 1, torch.Generator().manual_seed(0), 1.0)
    vectors = seen[0].unflatten(1, (5, 4))  # (K, C, P, D)
    assert torch.equal(vectors[1, :, 2], model.latents.codebook[1])
    same = (vectors == vectors[:, :1]).all(1).all(-1)  # (K, P)
    assert same.flatten().tolist() == [(k, p) != (1, 2) for k in range(2) for p in range(4)]
