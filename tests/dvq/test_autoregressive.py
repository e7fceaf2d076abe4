"""The autoregressive prior: a distribution over codes, which begins as the model's own prior and learns more."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dvq import DvqError, autoregressive, saved
from dvq.autoregressive import Autoregressive, fit
from dvq.config import trial
from dvq.evaluate import evaluate
from dvq.model import Model

TINY: dict[str, Any] = {
    "data": "bits@8x4x1-0123456789abcdef",  # two positions
    "features": 4,
    "num_latents": 2,
    "num_codes": 3,
    "code_dim": 3,
    "residual_blocks": 1,
    "batch_size": 16,
    "steps": 1,
}


def tiny(estimator: str = "vq-ema", **options: Any) -> Model:
    torch.manual_seed(0)
    model = Model(trial({**TINY, "estimator": estimator, **options})).eval()
    if estimator != "gaussian":
        with torch.no_grad():
            model.latents.prior_logits.copy_(torch.randn(2, 3))
    return model


def every_code() -> torch.Tensor:
    """All z of two positions with two latent variables each, (81, 2, 1, 2)."""
    return torch.tensor(list(itertools.product(range(3), repeat=4))).reshape(-1, 2, 1, 2)


def shaken(model: Model) -> Autoregressive:
    """A prior that is far from where it begins."""
    prior = Autoregressive(model)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return prior


def images(count: int) -> np.ndarray:
    """Of one brightness each: the codes of all positions hang together."""
    levels = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 1))
    return np.broadcast_to(levels, (count, 8, 4, 1)).astype(np.uint8)


@pytest.mark.parametrize("training", [True, False])
def test_it_sums_to_1_over_all_codes(training: bool) -> None:
    prior = shaken(tiny()).train(training)
    with torch.no_grad():
        log_r = prior(every_code()).double()
    assert log_r.std() > 0.5
    assert log_r.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_it_begins_as_the_models_own_prior() -> None:
    model = tiny()
    codes = every_code()
    own = model.latents.log_p_each(codes.flatten(0, 2).T).unflatten(1, (-1, 2)).sum((0, 2))
    torch.testing.assert_close(Autoregressive(model)(codes), own)


def test_it_tells_places_and_latent_variables_apart() -> None:
    """In images that differ in which of two latent variables has which code."""
    torch.manual_seed(0)
    prior = shaken(Model(trial({**TINY, "estimator": "vq-ema", "num_latents": 3})))
    codes = torch.tensor([[[0, 1, 2], [0, 0, 0]], [[1, 0, 2], [0, 0, 0]]])  # (B, P, K)
    one, other = prior.logits(prior.context(codes), codes).unflatten(1, (2, 2)).transpose(0, 1)  # (K, P, C)
    assert (one - other)[2, 0].abs().max() > 1e-3  # the third, from those beside it
    assert (one - other)[0, 1].abs().max() > 1e-3  # the first of the next position, from those before it
    prior(codes.unflatten(1, prior.trial.grid)).sum().backward()
    assert prior.place.grad is not None
    assert (prior.place.grad.norm(dim=1) > 1e-3).all()


def test_positions_come_row_by_row() -> None:
    torch.manual_seed(0)
    prior = shaken(Model(trial({**TINY, "estimator": "vq-ema", "data": "bits@8x8x1-0123456789abcdef"})))
    codes = torch.arange(8).view(1, 2, 2, 2) % 3
    rows = codes.reshape(1, 4, 2)
    log_r = prior.logits(prior.context(rows), rows).log_softmax(-1)  # (K, P, C)
    torch.testing.assert_close(prior(codes), log_r.gather(2, rows[0].T.unsqueeze(2)).sum().view(1))


def test_samples_come_as_often_as_it_says() -> None:
    prior, n = shaken(tiny()).eval(), 20_000
    codes = prior.sample(n)
    assert codes.shape == (n, 2, 1, 2)
    counts = np.bincount((codes.flatten(1) @ torch.tensor([27, 9, 3, 1])).numpy(), minlength=81)
    with torch.no_grad():
        expected = n * prior(every_code()).double().exp().numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 126  # χ², 80 degrees of freedom, 0.1%
    generators = (torch.Generator().manual_seed(1) for _ in range(2))
    assert np.array_equal(*(prior.sample(5, generator) for generator in generators))


def test_what_it_cannot_take_is_told() -> None:
    model = tiny("vq-ema")
    for steps in (0, -1, 2.5):
        with pytest.raises(DvqError, match=r"steps = .*: give a whole number of at least 1"):
            fit(model, images(4), steps=steps)  # type: ignore[arg-type]
    with pytest.raises(DvqError, match="the training images are uint8"):
        fit(model, images(0), steps=1)
    for n in (0, 2.5):
        with pytest.raises(DvqError, match="give a whole number of at least 1"):
            Autoregressive(model).sample(n)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["vq-ema", "gs-soft"])
def test_bits_under_it_are_the_elbos_with_it_for_the_prior(estimator: str) -> None:
    model = tiny(estimator)
    prior = Autoregressive(model)  # = p(z)
    found = evaluate(model, images(300), prior=prior)
    assert found["rate_autoregressive"] == pytest.approx(
        found["rate"], rel=1e-5 if estimator == "vq-ema" else 0.05
    )
    assert found["autoregressive_bits_per_dim"] == pytest.approx(
        found["distortion"] + found["rate_autoregressive"]
    )
    assert found["autoregressive_bits_per_dim_se"] == pytest.approx(found["bits_per_dim_se"], rel=0.05)
    moved = evaluate(model, images(300), prior=shaken(model))
    assert {name: x for name, x in moved.items() if "autoregressive" not in name} == {
        name: x for name, x in found.items() if "autoregressive" not in name
    }
    assert moved["rate_autoregressive"] > found["rate_autoregressive"]


def test_a_prior_of_ones_own_is_any_function_of_the_codes() -> None:
    model = tiny()

    def uniform(z: torch.Tensor) -> torch.Tensor:
        assert z.shape[1:] == (2, 1, 2)
        return torch.full((len(z),), -z[0].numel() * math.log(3))

    found = evaluate(model, images(30), prior=uniform)
    assert found["rate_autoregressive"] == pytest.approx(found["rate_uniform"])
    with pytest.raises(
        DvqError, match=r"the prior gives \(\) for 30 images: give log r\(z\) \[nats\] of each, \(30,\)"
    ):
        evaluate(model, images(30), prior=lambda z: uniform(z).sum())


def test_fitted_to_codes_that_hang_together_it_costs_less_than_any_factorial_prior() -> None:
    model = tiny()
    shades = torch.tensor([40, 128, 215], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 8, 4, 1)
    model.latents.place(model.encoder(shades).detach()[:, ::2])  # (2, 3, 3), of each shade's first position
    prior = fit(model, images(200), 60)
    found = evaluate(model, images(200), prior=prior)
    assert found["rate_autoregressive"] < 0.7 * found["rate_least"]
    again = fit(model, images(200), 60)
    assert all(
        torch.equal(one, other) for one, other in zip(prior.parameters(), again.parameters(), strict=True)
    )


def test_fitting_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = tiny("gs-soft").train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    fit(model, images(20), 2)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_its_weights_images_and_noise_are_those_of_seed_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def noted(name: str) -> None:
        function = getattr(autoregressive, name)
        monkeypatch.setattr(
            autoregressive, name, lambda *given: asked.append((name, *given)) or function(*given)
        )

    for name in ("seeded", "minibatch", "noise"):
        noted(name)
    fit(tiny("gs-soft"), images(20), 2, seed=3, batch_size=5)
    cpu = torch.device("cpu")
    steps = [(("minibatch", step, 5, 20, 3), ("noise", 3, step, cpu)) for step in range(2)]
    assert asked == [("seeded", 3), *itertools.chain(*steps)]


def test_its_learning_rate_falls_linearly_to_0(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, step = [], torch.optim.Adam.step

    def noted(self: torch.optim.Adam, *given: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    fit(tiny(), images(20), 4, learning_rate=0.8)
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_what_has_no_codes_has_no_such_prior() -> None:
    fields = {name: value for name, value in TINY.items() if name != "num_codes"}
    continuous = Model(trial({**fields, "estimator": "gaussian"}))
    with pytest.raises(DvqError, match="continuous"):
        fit(continuous, images(20), 2)
    with pytest.raises(DvqError, match="images are"):
        fit(tiny(), np.zeros((3, 32, 32, 3), np.uint8), 2)


def test_the_key_tells_its_steps_and_the_family_does_not() -> None:
    plain, more = (trial({**TINY, "estimator": "vq-ema", "autoregressive_steps": n}) for n in (0, 5))
    assert (plain.family(), f"{plain.key()}a5") == (more.family(), more.key())


def test_it_is_of_the_models_type_and_fitted_whatever_torchs_mode() -> None:
    assert Autoregressive(tiny().double())(every_code()).dtype == torch.float64
    right = fit(tiny(), images(20), 1)
    with torch.inference_mode():
        found = fit(tiny(), images(20), 1)
    assert all(
        torch.equal(one, other) for one, other in zip(found.parameters(), right.parameters(), strict=True)
    )


def test_large_images_are_fitted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearly the same prior."""
    model = tiny()
    whole = fit(model, images(40), 3)
    monkeypatch.setattr(type(model.trial), "images_at_once", 10)
    encode, sizes = model.encode, []
    monkeypatch.setattr(model, "encode", lambda some, noise: sizes.append(len(some)) or encode(some, noise))
    pieces = fit(model, images(40), 3)
    assert sizes == [10, 10, 10, 10, 10, 10, 4] * 3
    for one, other in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


def test_how_far_it_is_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And how far an evaluation is: each can take an hour on a CPU."""
    now = itertools.count(step=40.0)
    monkeypatch.setattr("dvq.minutely.time", SimpleNamespace(perf_counter=lambda: next(now)))
    model = tiny()
    fit(model, images(16), steps=4)
    evaluate(model, images(20), batch_size=6)
    assert capsys.readouterr().out.splitlines() == [
        "autoregressive prior: 2 of 4 steps",
        "autoregressive prior: 4 of 4 steps",
        "evaluation: 12 of 20 images",
        "evaluation: 20 of 20 images",
    ]


def test_it_is_kept_beside_its_model(tmp_path: Path) -> None:
    model = tiny("gs-soft")
    saved.save(model, tmp_path)
    with pytest.raises(DvqError, match=r"no autoregressive prior here: a sweep with autoregressive_steps"):
        autoregressive.load(tmp_path)
    prior, state = shaken(model), torch.random.get_rng_state()
    autoregressive.save(prior, tmp_path)
    loaded = autoregressive.load(str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not loaded.training
    assert torch.equal(loaded(every_code()), prior.eval()(every_code()))

    saved.save(Model(trial({**TINY, "estimator": "gs-soft", "num_codes": 4})), tmp_path)
    with pytest.raises(DvqError, match=r"prior\.safetensors holds another network"):
        autoregressive.load(tmp_path)
    saved.save(model, tmp_path)
    content = bytearray((tmp_path / autoregressive.FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / autoregressive.FILE).write_bytes(content)
    with pytest.raises(DvqError, match=r"damaged: prior\.safetensors does not have the SHA-256"):
        autoregressive.load(tmp_path)
