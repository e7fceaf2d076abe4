"""The ELBO's two terms, and that evaluation takes hard samples of every image."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from dvq import DvqError
from dvq.config import trial
from dvq.draws import inverse_draw
from dvq.evaluate import evaluate, fit, usage_summary
from dvq.latents import Categorical, Sample
from dvq.model import Model
from dvq.posterior import LOWEST
from dvq.quantizers import Nearest
from dvq.relaxation import gumbel
from tests.sizes import taken

TINY: dict[str, Any] = {
    "data": "cifar10-sample",
    "features": 4,
    "num_latents": 2,
    "num_codes": 5,
    "code_dim": 3,
    "residual_blocks": 1,
}


def tiny(estimator: str, **options: Any) -> Model:
    torch.manual_seed(0)
    return Model(trial({**TINY, "estimator": estimator, **options})).double().eval()


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def some_v(n: int) -> torch.Tensor:
    return torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_posterior_is_a_softmax_of_negative_squared_distances() -> None:
    latents: Categorical = tiny("gs-soft", distance_scale=0.7).latents
    v = some_v(4)
    distances = (v.unsqueeze(2) - latents.codebook.unsqueeze(1)).square().sum(-1)
    torch.testing.assert_close(latents.logits(v).softmax(-1), (-0.7 * distances).softmax(-1))


def test_kl_is_the_mean_of_log_q_minus_log_p_over_samples() -> None:
    latents: Categorical = tiny("gs-soft").latents
    with torch.no_grad():
        latents.prior_logits.copy_(torch.tensor([[2.0, 0, 0, 0, -1], [0, 1, 0, 0, 0]]))
    logits = latents.logits(some_v(1)).detach()
    samples = logits.expand(2, 200_000, 5)
    z = (samples + gumbel(samples.contiguous(), torch.Generator().manual_seed(0))).argmax(-1)
    ratio = logits.log_softmax(-1).expand_as(samples).gather(2, z.unsqueeze(-1)).squeeze(-1)
    ratio = ratio - latents.log_prior().gather(1, z)
    error = ratio.std(1) / ratio.shape[1] ** 0.5
    assert ((latents.kl(logits).squeeze(1) - ratio.mean(1)).abs() < 4 * error).all()


def test_kl_is_zero_where_posterior_equals_prior_and_positive_elsewhere() -> None:
    latents: Categorical = tiny("gs-soft").latents
    logits = latents.logits(some_v(3))
    assert (latents.kl(logits) > 0.01).all()
    with torch.no_grad():
        latents.prior_logits.copy_(logits[:, 0])
    assert latents.kl(logits)[:, 0].abs().max() < 1e-12


def test_vq_rate_is_the_code_length_under_the_prior() -> None:
    latents: Nearest = tiny("vq-ema").latents
    codes = torch.tensor([[0, 4], [1, 1]])
    assert latents.rate(codes).flatten().tolist() == pytest.approx([math.log(5)] * 4)
    with torch.no_grad():
        latents.prior_logits[0, 0] = math.log(4.0)  # p(z_0 = 0) = 4 / 8
    assert latents.rate(codes)[0, 0].item() == pytest.approx(math.log(2))


def test_vq_codes_are_the_nearest() -> None:
    """In training too, where encodings have a gradient: an author need not detach them."""
    latents: Nearest = tiny("vq-ema").latents
    v = some_v(50).requires_grad_()
    assert torch.equal(latents.codes(v), torch.cdist(v, latents.codebook).argmin(-1))
    assert torch.equal(latents.sample(v, torch.Generator()).codes, latents.codes(v))


def test_evaluation_draws_the_codes_from_the_posterior() -> None:
    """Argmax codes charged with the stochastic KL are no ELBO: here q is uniform, but for a hair."""
    model = tiny("gs-soft")
    with torch.no_grad():
        model.latents.codebook.mul_(1e-6)
    usage = np.asarray(evaluate(model, images(40))["usage"])
    assert usage.sum(1).tolist() == [40 * 64, 40 * 64]
    assert usage.min() > 0.8 * usage.sum() / usage.size


def test_evaluation_decodes_rows_of_the_codebook() -> None:
    model, seen = tiny("gs-soft"), []
    decode = model.decoder.nll

    def spy(vectors: torch.Tensor, *rest: Any) -> Any:
        seen.append(vectors)
        return decode(vectors, *rest)

    model.decoder.nll = spy  # type: ignore[method-assign]
    evaluate(model, images(3))
    gaps = torch.cdist(seen[0], model.latents.codebook).amin(-1)
    assert gaps.max() < 1e-6


@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema"])
def test_evaluation_is_the_mean_over_every_image_whatever_the_batch(estimator: str) -> None:
    sharp = {"distance_scale": 1e9} if estimator == "gs-soft" else {}  # so that sampling is no matter
    model, batch = tiny(estimator, codebook_std=1.0, **sharp), images(7)
    whole = evaluate(model, batch, batch_size=7)
    pieces = evaluate(model, batch, batch_size=3)
    singles = [evaluate(model, batch[i : i + 1])["bits_per_dim"] for i in range(7)]
    assert whole["images"] == 7
    assert evaluate(model, batch[:1])["bits_per_dim_se"] == 0
    assert whole["bits_per_dim"] == pytest.approx(pieces["bits_per_dim"], rel=1e-12)
    assert whole["bits_per_dim"] == pytest.approx(np.mean(singles), rel=1e-12)
    assert whole["bits_per_dim_se"] == pytest.approx(np.std(singles, ddof=1) / 7**0.5, rel=1e-6)
    assert whole["bits_per_dim"] == pytest.approx(whole["rate"] + whole["distortion"], rel=1e-12)


def test_the_elbo_is_of_one_draw_with_the_kl_in_closed_form_whatever_the_bounds_samples() -> None:
    model, some = tiny("gs-soft"), images(3)
    kl = model.latents.kl(model.latents.logits(model.encoder(torch.from_numpy(some)))).sum().item() / 3
    one, five = (evaluate(model, some, batch_size=2, bound_samples=samples) for samples in (1, 5))
    assert one["rate"] == pytest.approx(kl * model.trial.bits_per_nat, rel=1e-9)
    assert five["bits_per_dim"] == one["bits_per_dim"]
    assert five.keys() - one.keys() == {"bound", "bound_samples", "draws_se"}


@torch.no_grad()
def test_the_ledger_has_each_latent_variables_rate_and_each_channels_distortion() -> None:
    model, some = tiny("gs-soft"), images(3)
    model.latents.prior_logits[1] = torch.arange(5.0)
    v, x = model.encoder(torch.from_numpy(some)), torch.from_numpy(some)
    sample = model.latents.sample(v, model.generator(0))
    found = evaluate(model, some)["ledger"]
    right = {
        "latents": sample.rate.sum(1) / 3,
        "channels": model.channel_distortions(sample.vectors, x).mean(0),
    }
    assert right["latents"][1] > 1.5 * right["latents"][0]
    for name, nats in right.items():
        bits = (nats * model.trial.bits_per_nat).tolist()
        assert found[name] == pytest.approx(bits, rel=1e-9), name


@pytest.mark.parametrize("draws", [2, 3])
def test_the_bound_and_its_spread_are_those_of_several_draws(draws: int) -> None:
    """The first as without a bound, the others from noise of their own."""
    model, some = tiny("gs-soft"), images(3)
    v, x = model.encoder(torch.from_numpy(some)), torch.from_numpy(some)
    first, more = (torch.Generator().manual_seed(seed) for seed in range(2))
    samples = [model.latents.sample(v, noise) for noise in (first, more, more)[:draws]]
    nll = torch.stack([model.channel_distortions(one.vectors, x).sum(1) for one in samples])
    rate, ratio = (
        torch.stack([term.unflatten(1, (3, -1)).sum((0, 2)) for term in terms])
        for terms in zip(*((one.rate, one.log_ratio) for one in samples), strict=True)
    )
    found = evaluate(model, some, bound_samples=draws)
    bound = math.log(draws) - (-nll - ratio).logsumexp(0).mean()
    assert found["bound"] == pytest.approx(bound.item() * model.trial.bits_per_nat, rel=1e-9)
    spread = (nll + rate).mean(1).std().item() * model.trial.bits_per_nat
    assert found["draws_se"] == pytest.approx(spread, rel=1e-6)
    assert found["draws_se"] > 0


def test_the_posterior_is_computed_once_for_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits as for each of them."""
    model, some = tiny("gs-soft"), images(3)
    of, computed = model.latents.logits, []
    monkeypatch.setattr(model.latents, "logits", lambda v: computed.append(v.shape[1]) or of(v))
    found = evaluate(model, some, batch_size=2, bound_samples=3)
    assert computed == [2 * 64, 64]
    monkeypatch.setattr(Sample, "again", None)
    assert evaluate(model, some, batch_size=2, bound_samples=3) == found
    assert len(computed) == 2 + 3 * 2


def test_a_sample_of_ones_own_is_taken_for_every_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a class, or an object alone, changes what Categorical.sample returns."""

    def shifted(sample: Sample) -> Sample:
        return sample._replace(vectors=sample.vectors + 3)

    class Shifted(Categorical):
        def sample(self, v: torch.Tensor, generator: torch.Generator) -> Sample:
            return shifted(super().sample(v, generator))

    by_class, by_object = tiny("gs-soft"), tiny("gs-soft")
    by_class.latents.__class__, of = Shifted, by_object.latents.sample
    by_object.latents.sample = lambda v, generator: shifted(of(v, generator))
    found = [evaluate(model, images(3), bound_samples=3) for model in (by_class, by_object)]
    monkeypatch.setattr(Sample, "again", None)
    assert found == [evaluate(by_class, images(3), bound_samples=3)] * 2


@torch.no_grad()
def test_no_exponential_of_a_posterior_underflows_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MKL's is slow there. No number changes."""
    model = Model(trial({**TINY, "estimator": "gs-soft", "num_codes": 512}))
    model.latents.codebook *= 20
    v = model.encoder(torch.from_numpy(images(3)))
    plain, seen, of = model.latents.logits(v), [], model.latents.kl
    assert plain.log_softmax(-1).min() < -200
    monkeypatch.setattr(model.latents, "kl", lambda logits: seen.append(logits) or of(logits))
    sample = model.latents.sample(v, torch.Generator().manual_seed(0))
    assert seen[0].log_softmax(-1).min() >= LOWEST
    assert torch.equal(sample.rate, of(plain))
    assert torch.equal(
        sample.codes, inverse_draw(plain.softmax(-1), 1, torch.Generator().manual_seed(0))[..., 0]
    )


@pytest.mark.parametrize("estimator", ["vq-ema", "fsq"])
def test_the_bound_of_a_deterministic_code_is_its_elbo(estimator: str) -> None:
    model = Model(trial({**taken(estimator, TINY), "estimator": estimator})).double()
    found = evaluate(model, images(3), batch_size=2, bound_samples=5)
    assert found["bound"] == pytest.approx(found["bits_per_dim"], rel=1e-12)
    assert (found["bound_samples"], found["draws_se"]) == (5, 0)


def test_the_fitted_prior_is_that_of_the_training_images_codes() -> None:
    model, judged, training = (
        tiny("vq-ema", codebook_std=1.0, normalization="none"),
        images(7),
        images(19)[7:],
    )
    with torch.no_grad():
        model.latents.prior_logits.normal_(generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(model.state_dict())
    found = evaluate(model, judged, batch_size=3, training=training)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert "fitted_bits_per_dim" not in evaluate(model, judged)
    counts = np.asarray(evaluate(model, training)["usage"]) + 1
    with torch.no_grad():
        model.latents.prior_logits.copy_(torch.from_numpy(counts).double().log())
    right = evaluate(model, judged)["bits_per_dim"]
    assert found["fitted_bits_per_dim"] == pytest.approx(right, rel=1e-12)
    assert abs(found["bits_per_dim"] - right) > 1e-4
    judged_by_itself = evaluate(model, judged, training=judged)["fitted_bits_per_dim"]
    assert judged_by_itself != found["fitted_bits_per_dim"]


@torch.no_grad()
def test_the_fitted_statistics_are_those_of_training_minibatches_of_hard_samples() -> None:
    """The first layers', and the decoder's first, by hand."""
    model, training = tiny("vq-ema", codebook_std=1.0, batch_size=4), images(15)
    convolution, norm = model.encoder.body[:2]
    first = model.decoder.body[0]
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.fill_(7.0)
    seen, encoded = [], []
    for start in (0, 4, 8):  # a rest of 3 is no minibatch
        x = torch.from_numpy(training[start : start + 4]).double() / 127.5 - 1
        seen.append(convolution(x.permute(0, 3, 1, 2)).mean((0, 2, 3)))
        model.train()
        codes = model.latents.codes(model.encoder(torch.from_numpy(training[start : start + 4])))
        vectors = model.latents.vectors(codes).transpose(0, 1).reshape(4, 8, 8, -1).permute(0, 3, 1, 2)
        encoded.append(first(vectors).mean((0, 2, 3)))
    momentum = norm.momentum
    fit(model, training)
    assert not model.training
    torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
    torch.testing.assert_close(model.decoder.body[1].running_mean, torch.stack(encoded).mean(0))
    assert norm.momentum == momentum


def test_the_seed_decides_the_draws_that_a_model_is_fitted_to() -> None:
    """0 unless it is given."""
    found = [
        fit(tiny("gs-soft"), images(7), **seed).latents.prior_logits
        for seed in ({}, {"seed": 0}, {"seed": 1})
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_statistics_are_fitted_to_so_many_minibatches_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvq.evaluate.STATISTICS", 2)
    found, right = (
        fit(tiny("vq-ema", batch_size=4), some).encoder.body[1].running_mean
        for some in (images(15), images(8))
    )
    assert torch.equal(found, right)


def test_statistics_that_are_fixed_are_not_fitted() -> None:
    """By whomever: they were reset, and nothing came after it."""
    model = tiny("vq-ema", batch_size=4)
    norm, free = model.encoder.body[1], model.decoder.body[1]
    for layer in (norm, free):
        layer.running_mean.fill_(7.0)
    model.fix_normalization(True)
    free.fixed = False
    fit(model, images(8))
    assert (norm.running_mean == 7).all()
    assert (free.running_mean != 7).all()


@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema", "fsq", "gaussian"])
def test_what_is_told_as_fitted_is_the_fitted_models_elbo(estimator: str) -> None:
    torch.manual_seed(0)
    model = Model(trial({**taken(estimator, TINY), "estimator": estimator, "batch_size": 4})).double().eval()
    judged, training = images(7), images(19)[7:]
    found = evaluate(model, judged, batch_size=3, seed=5, training=training, bound_samples=2)
    expected = evaluate(model, judged, batch_size=3, seed=5, bound_samples=2)
    fitted = evaluate(fit(model, training, batch_size=3, seed=5), judged, batch_size=3, seed=5)
    assert found == expected | {"fitted_bits_per_dim": fitted["bits_per_dim"]}
    assert abs(found["fitted_bits_per_dim"] - found["bits_per_dim"]) > 1e-4


def test_a_model_that_trains_in_bfloat16_is_fitted_in_float32() -> None:
    found = []
    for mixed in (False, True):
        model = tiny("vq-ema", codebook_std=1.0).float()
        model.mix(mixed)
        found.append(evaluate(model, images(7), training=images(19)[7:])["fitted_bits_per_dim"])
    assert found[0] == found[1]


def test_a_trained_prior_is_fitted_whatever_chose_it() -> None:
    """An estimator of one's own need have no field for it."""
    model = tiny("vq-ema", codebook_std=1.0, normalization="none")
    before = evaluate(model, images(7), training=images(19)[7:])["fitted_bits_per_dim"]
    model.trial = trial({"estimator": "gaussian"})  # which has none
    assert evaluate(model, images(7), training=images(19)[7:])["fitted_bits_per_dim"] == before


def test_latents_with_codes_and_no_codebooks_are_refused() -> None:
    model, codebooks = tiny("vq-ema", codebook_std=1.0), tiny("vq-ema", codebook_std=1.0).latents
    model.latents = torch.nn.Module()
    model.latents.sample = codebooks.sample  # type: ignore[assignment]
    with pytest.raises(DvqError, match="latent variables that have codes are of a class of dvq"):
        evaluate(model, images(2))


def test_a_uniform_prior_is_not_fitted() -> None:
    """It is the trial's, and training does not move it."""
    model = tiny("vq-ema", codebook_std=1.0, normalization="none", prior="uniform")
    found = evaluate(model, images(7), training=images(19)[7:])
    assert found["fitted_bits_per_dim"] == found["bits_per_dim"]
    assert found["rate_uniform"] == pytest.approx(found["rate"], rel=1e-6)


def test_the_least_rate_is_that_of_the_codes_own_frequencies() -> None:
    model = tiny("vq-ema", codebook_std=1.0)
    found = evaluate(model, images(7))
    counts = np.asarray(found["usage"])
    with torch.no_grad():
        model.latents.prior_logits.copy_(torch.from_numpy(counts).double().clamp(min=1e-300).log())
    assert found["rate_least"] == pytest.approx(evaluate(model, images(7))["rate"], rel=1e-12)
    assert found["rate_least"] < found["rate"]


def test_the_least_rate_of_a_posterior_is_that_of_its_mean_as_the_prior() -> None:
    model, some = tiny("gs-soft"), images(7)
    found = evaluate(model, some, batch_size=3)
    with torch.no_grad():
        model.latents.prior_logits.copy_(model.log_posterior(some).exp().mean((0, 1, 2)).log())
    assert found["rate_least"] == pytest.approx(evaluate(model, some)["rate"], rel=1e-9)
    assert found["rate"] > 1.1 * found["rate_least"] > 0


def test_the_least_rate_of_a_posterior_that_looks_at_nothing_is_0() -> None:
    """By the posteriors themselves: one draw of each underrates their mean's entropy."""
    found = evaluate(tiny("gs-soft", codebook_std=1e-4, num_codes=64), images(7))
    assert found["rate_least"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("change", [lambda x: x / 255, lambda x: x.transpose(0, 3, 1, 2), lambda x: x[:0]])
def test_other_images_are_not_evaluated(change: Any) -> None:
    with pytest.raises(DvqError, match="give uint8"):
        evaluate(tiny("gs-soft"), change(images(3)))
    with pytest.raises(DvqError, match=r"the training images are .*: give uint8"):
        evaluate(tiny("gs-soft"), images(3), training=change(images(3)))


def test_perplexity_and_dead_codes_of_counts() -> None:
    found = usage_summary(np.array([[1, 1, 1, 0], [8, 0, 0, 0]]))
    assert found["perplexity"] == pytest.approx((3 + 1) / 2)
    assert found["dead_codes"] == 4


def test_a_uniform_model_with_its_posterior_at_the_prior_costs_eight_bits() -> None:
    model = tiny("gs-soft")
    with torch.no_grad():
        model.latents.codebook.zero_()
        model.decoder.head.weight.zero_()
        model.decoder.head.bias.zero_()
    result = evaluate(model, images(3))
    assert result["bits_per_dim"] == pytest.approx(8.0, rel=1e-12)
    assert result["rate"] == pytest.approx(0.0, abs=1e-12)
    assert result["distortion_se"] == pytest.approx(0.0, abs=1e-12)


def test_evaluation_leaves_the_model_as_it_was() -> None:
    model = tiny("gs-soft").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, images(3))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_draws_follow_the_posterior_and_never_take_a_code_of_probability_0() -> None:
    logits = torch.tensor([-1e9, 1.0, -1e9, 0.0, -1e9]).expand(1, 1000, 5)
    z = inverse_draw(logits.softmax(-1), 200, torch.Generator().manual_seed(0))
    assert z.shape == (1, 1000, 200)
    share = torch.bincount(z.flatten(), minlength=5) / z.numel()
    assert share[[0, 2, 4]].tolist() == [0, 0, 0]
    assert share[1].item() == pytest.approx(1 / (1 + math.exp(-1)), abs=5e-3)  # five standard errors


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])  # what PyTorch draws from [0, 1)
def test_the_smallest_and_largest_random_number_draw_a_code_too(
    u: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(1, 500, 300, generator=torch.Generator().manual_seed(0))
    logits[..., [0, 1, -2, -1]] = -1e9  # probability 0
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, *_, **__: self.fill_(max(u, low)))
    z = inverse_draw(logits.softmax(-1), 1, torch.Generator())
    assert z.min() >= 2
    assert z.max() < 298


def test_weights_that_are_not_finite_draw_codes_that_exist() -> None:
    """Training then ends by what its loss says, and not inside a draw."""
    weights = torch.full((1, 3, 5), torch.nan)
    assert inverse_draw(weights, 2, torch.Generator().manual_seed(0)).max() < 5
