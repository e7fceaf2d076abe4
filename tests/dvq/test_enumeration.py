"""Estimators against the truth, on a model so small that every z can be listed.

K = 2 latent variables of C = 3 categories at one position: 9 values of z, and 9⁴ of four samples, so that the
ELBO, the bound L_S and log p(x), and all their gradients, are sums.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dvq import DvqError
from dvq.config import trial
from dvq.estimators.gs_soft import GSSoft
from dvq.evaluate import evaluate
from dvq.probe import _gradient, _reference, probe
from dvq.trial import Loss, Trial

K, C, D, VALUES = 2, 3, 2, 4
Z = torch.tensor(list(itertools.product(range(C), repeat=K)))  # (9, K)


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "image_shape", (1, 1, 3))


class Toy(nn.Module):
    """An image of one pixel of three channels of four values; linear encoder and decoder."""

    def __init__(self, one: Trial, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.trial = one
        self.latents: Any = one.latents()
        self.linear = nn.Linear(3, K * D * self.latents.encodings)
        self.decoder = nn.Linear(K * D, 3 * VALUES)
        self.double()
        with torch.no_grad():
            if hasattr(self.latents, "prior_logits"):
                self.latents.prior_logits.normal_()
            self.decoder.weight.normal_()

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def encoder(self, images: Tensor) -> Tensor:
        x = images.flatten(1).double() / VALUES
        return self.linear(x).unflatten(1, (K, -1)).transpose(0, 1)

    def channels(self, vectors: Tensor, images: Tensor) -> Tensor:
        log_p = self.decoder(vectors.transpose(0, 1).flatten(1)).unflatten(1, (3, VALUES)).log_softmax(-1)
        return -log_p.gather(-1, images.flatten(1).long().unsqueeze(-1)).squeeze(-1)  # (B, 3)

    def channel_distortions(self, vectors: Tensor, images: Tensor) -> Tensor:
        return self.channels(vectors, images).detach()

    def distortion(
        self, vectors: Tensor, images: Tensor, weigh: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        nll = self.channels(vectors, images).sum(1)
        weights = weigh(nll.detach()) if weigh else 1.0
        return (weights * nll).sum(), nll.detach()


IMAGE = torch.tensor([[[[1, 3, 0]]]], dtype=torch.uint8)


def options(estimator: str, **more: Any) -> Trial:
    sizes = {} if estimator == "gaussian" else {"num_codes": C, "codebook_std": 1.0}
    return trial({"estimator": estimator, "num_latents": K, "code_dim": D, **sizes, **more})


def exact_terms(toy: Toy) -> tuple[Tensor, Tensor]:
    """log q(z|x) and log p(x, z) for each of the nine z."""
    latents = toy.latents
    v = toy.encoder(IMAGE)
    log_q = (-latents.scale * (v - latents.codebook).square().sum(-1)).log_softmax(-1)  # (K, C)
    log_prior = latents.prior_logits.log_softmax(-1)
    vectors = torch.stack([latents.codebook[k, Z[:, k]] for k in range(K)])  # (K, 9, D)
    nll = toy.channels(vectors, IMAGE.expand(len(Z), -1, -1, -1)).sum(1)
    pick = [log_q[k, Z[:, k]] for k in range(K)], [log_prior[k, Z[:, k]] for k in range(K)]
    return torch.stack(pick[0]).sum(0), torch.stack(pick[1]).sum(0) - nll


def exact_bound(toy: Toy, samples: int, kl_weight: float = 1.0) -> Tensor:
    """L_S = E log (1/S) Σ_s p(x, z_s)/q(z_s|x), over all 9^S tuples; L_1 is the ELBO. In warm-up p(z)/q(z|x) is to
    the power of the KL's weight."""
    log_q, log_joint = exact_terms(toy)
    tuples = torch.tensor(list(itertools.product(range(len(Z)), repeat=samples)))
    probability = log_q[tuples].sum(1).exp()
    log_ratio = toy.latents.log_p(Z.T, len(Z)) - log_q
    w = (log_joint - log_q - (1 - kl_weight) * log_ratio)[tuples]
    return (probability * (w.logsumexp(1) - math.log(samples))).sum()


def parameters(toy: Toy) -> list[Tensor]:
    return [p for name, p in toy.named_parameters() if "baseline" not in name]


def gradients(value: Tensor, toy: Toy) -> Tensor:
    found = torch.autograd.grad(value, parameters(toy), allow_unused=True)
    pairs = zip(found, parameters(toy), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def estimates(one: Trial, toy: Toy, groups: int, copies: int, seed: int = 0) -> Tensor:
    """Gradients of −surrogate, each the mean over ``copies`` of the image: (groups, parameters)."""
    generator = torch.Generator().manual_seed(seed)
    images = IMAGE.expand(copies, -1, -1, -1)
    return torch.stack(
        [-gradients(one.loss(toy, images, generator, 0).surrogate, toy) for _ in range(groups)]
    )


def worst_z(found: Tensor, right: Tensor) -> float:
    """The largest distance from ``right`` in standard errors, over parameters."""
    error = found.std(0) / len(found) ** 0.5
    return ((found.mean(0) - right).abs() / (error + 1e-12)).max().item()


def unbiased(estimator: str, **more: Any) -> tuple[Trial, Toy]:
    one = options(estimator, **more)
    toy = Toy(one, seed=1).eval()
    if estimator == "nvil":  # the baseline is arbitrary; make it one that matters
        nn.init.normal_(toy.latents.baseline[2].bias, -3.0)
    return one, toy


@pytest.mark.parametrize(("estimator", "more"), [("nvil", {}), ("rloo", {}), ("rloo", {"samples": 2})])
def test_they_are_unbiased_for_the_elbo(estimator: str, more: dict[str, Any]) -> None:
    one, toy = unbiased(estimator, **more)
    assert worst_z(estimates(one, toy, 200, 200), gradients(exact_bound(toy, 1), toy)) < 4


def test_nvils_deviation_scales_the_encoders_gradient_alone() -> None:
    """The codebooks have one part of it from q and one from p(x|z), which keep their proportion."""
    one, toy = unbiased("nvil")
    toy.latents.variance.fill_(100)
    encoders = {id(p) for p in toy.linear.parameters()}
    scale = torch.cat([torch.full((p.numel(),), 0.1 if id(p) in encoders else 1.0) for p in parameters(toy)])
    assert scale.min() < 1
    assert worst_z(estimates(one, toy, 200, 200), scale * gradients(exact_bound(toy, 1), toy)) < 4


@pytest.mark.parametrize("backward", ["all", "one"])
def test_vimco_is_unbiased_for_its_bound_and_not_for_the_elbo(backward: str) -> None:
    one, toy = unbiased("vimco", backward=backward)
    found = estimates(one, toy, 200, 200)
    assert worst_z(found, gradients(exact_bound(toy, 4), toy)) < 4
    assert worst_z(found, gradients(exact_bound(toy, 1), toy)) > 20


def test_vimco_with_two_samples_trains_the_bound_of_two() -> None:
    one = options("vimco", samples=2)
    toy = Toy(one, seed=2).eval()
    found = estimates(one, toy, 200, 200)
    assert worst_z(found, gradients(exact_bound(toy, 2), toy)) < 4
    assert worst_z(found, gradients(exact_bound(toy, 4), toy)) > 10


@pytest.mark.parametrize(("estimator", "samples"), [("nvil", 1), ("rloo", 1), ("vimco", 4)])
def test_in_warmup_they_are_unbiased_for_a_bound_with_the_kls_weight(estimator: str, samples: int) -> None:
    one, toy = unbiased(estimator, kl_warmup=2, final_kl_weight=0.5)
    found = estimates(one, toy, 200, 200)
    assert worst_z(found, gradients(exact_bound(toy, samples, 0.25), toy)) < 4
    assert worst_z(found, gradients(exact_bound(toy, samples), toy)) > 10


def test_rloos_variance_falls_with_the_samples() -> None:
    """Of S = 2 the baseline is another sample as noisy: the variance falls faster than 1/S."""
    variances = []
    for samples in (2, 4, 8):
        one, toy = unbiased("rloo", samples=samples)
        variances.append(estimates(one, toy, 2000, 1).var(0).sum().item())
    assert variances[1] < 0.5 * variances[0]
    assert variances[2] < 0.5 * variances[1]


@pytest.mark.parametrize("estimator", ["nvil", "rloo"])
def test_the_comparison_can_fail(estimator: str) -> None:
    """A negative control: a gradient that is off by a twentieth is seen."""
    one, toy = unbiased(estimator)
    assert worst_z(estimates(one, toy, 200, 200), 1.05 * gradients(exact_bound(toy, 1), toy)) > 4


def relative_bias(one: Trial, seed: int) -> float:
    toy = Toy(one, seed).eval()
    right = gradients(exact_bound(toy, 1), toy)
    found = estimates(one, toy, 20, 1500).mean(0)
    return ((found - right).norm() / right.norm()).item()


@pytest.mark.parametrize(("estimator", "falls_to"), [("gs-soft", 0.3), ("gs-hard", 0.9)])
def test_the_relaxations_bias_falls_with_the_temperature(estimator: str, falls_to: float) -> None:
    """Medians over 20 models: a single one need not be monotone."""
    medians = [
        np.median([relative_bias(options(estimator, temperature=tau), seed) for seed in range(20)])
        for tau in (1.0, 0.5, 0.1)
    ]
    assert medians[0] > medians[1] > medians[2]
    assert medians[2] < falls_to * medians[0]


def test_gs_hard_trains_the_decoder_without_bias() -> None:
    """Its decoder sees exact samples; the posterior's gradient alone is the relaxation's."""
    one = options("gs-hard")
    toy = Toy(one, seed=1).eval()
    decoder = torch.cat([torch.full((p.numel(),), p is toy.decoder.weight) for p in parameters(toy)])
    right = gradients(exact_bound(toy, 1), toy)
    assert worst_z(estimates(one, toy, 200, 200)[:, decoder], right[decoder]) < 4
    soft = options("gs-soft")
    assert worst_z(estimates(soft, toy, 200, 200)[:, decoder], right[decoder]) > 4


def test_the_bound_rises_with_s_and_stays_below_the_likelihood() -> None:
    for seed in range(5):
        toy = Toy(options("vimco"), seed)
        log_likelihood = exact_terms(toy)[1].logsumexp(0)
        bounds = [exact_bound(toy, samples) for samples in (1, 2, 3, 4)]
        assert bounds == sorted(bounds)
        assert bounds[0] < bounds[3] - 1e-3
        assert bounds[-1] < log_likelihood


def test_evaluation_estimates_the_elbo_and_the_bound() -> None:
    toy = Toy(options("gs-soft"), seed=3).eval()
    copies = IMAGE.expand(40_000, -1, -1, -1).numpy()
    result = evaluate(toy, copies, batch_size=4_000, bound_samples=4)  # type: ignore[arg-type]
    elbo, bound = (-exact_bound(toy, samples).item() * toy.trial.bits_per_nat for samples in (1, 4))
    assert abs(result["bits_per_dim"] - elbo) < 4 * result["bits_per_dim_se"]
    assert abs(result["bound"] - bound) < 4 * result["bits_per_dim_se"]
    assert abs(result["bound"] - elbo) > 10 * result["bits_per_dim_se"]
    assert 0.3 < result["draws_se"] / result["distortion_se"] < 3


def test_the_prior_fitted_to_copies_of_an_image_is_its_posterior() -> None:
    toy = Toy(options("gs-soft"), seed=3).eval()
    copies = IMAGE.expand(40_000, -1, -1, -1).numpy()
    result = evaluate(toy, copies, batch_size=4_000, training=copies)  # type: ignore[arg-type]
    assert result["rate"] > 0.05 * result["distortion"]
    assert result["fitted_bits_per_dim"] == pytest.approx(result["distortion"], abs=0.02 * result["rate"])


def test_the_elbo_is_the_likelihood_where_q_is_the_true_posterior() -> None:
    """One latent variable matters; its posterior is put into the encoder's bias."""
    toy = Toy(options("gs-soft", code_dim=D), seed=4)
    with torch.no_grad():
        toy.linear.weight.zero_()
        toy.decoder.weight[:, D:] = 0  # the second latent variable does not reach the image
        log_joint = exact_terms(toy)[1].view(C, C)
        posterior = log_joint.logsumexp(1).log_softmax(0), toy.latents.prior_logits[1].log_softmax(0)
        corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        decoded = toy.latents.codebook[0].clone()
        for k, log_p in enumerate(posterior):
            # l_c = 2 v·m_c − ‖m_c‖² with m = 0, e_1, e_2: v_i = (log p_i − log p_0 + 1) / 2
            toy.latents.codebook[k] = corners
            toy.linear.bias[k * D : (k + 1) * D] = (log_p[1:] - log_p[0] + 1) / 2
        basis = torch.linalg.lstsq(
            torch.cat([corners, torch.ones(C, 1, dtype=torch.float64)], 1),
            torch.cat([decoded, torch.ones(C, 1, dtype=torch.float64)], 1)
            @ torch.cat([toy.decoder.weight[:, :D], toy.decoder.bias.unsqueeze(1)], 1).T,
        ).solution  # the same decoder for the moved codes
        toy.decoder.weight[:, :D], toy.decoder.bias[:] = basis[:D].T, basis[D]
    log_likelihood = exact_terms(toy)[1].logsumexp(0)
    torch.testing.assert_close(exact_bound(toy, 1), log_likelihood, rtol=1e-10, atol=0)
    result = evaluate(toy, IMAGE.expand(500, -1, -1, -1).numpy(), bound_samples=8)  # type: ignore[arg-type]
    assert result["bound"] == pytest.approx(-log_likelihood.item() * toy.trial.bits_per_nat, rel=1e-9)


def test_the_gaussian_kl_and_its_bound() -> None:
    toy = Toy(options("gaussian"), seed=5)
    v = toy.encoder(IMAGE)
    mean, rho = v.chunk(2, -1)
    q = torch.distributions.Normal(mean, rho.exp())
    p = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    sample = toy.latents.sample(v, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.rate, torch.distributions.kl_divergence(q, p).sum(-1))
    ratio = (q.log_prob(sample.vectors) - p.log_prob(sample.vectors)).sum(-1)
    torch.testing.assert_close(sample.log_ratio, ratio)


def test_samples_of_the_gaussian_prior_have_variance_1() -> None:
    z = Toy(options("gaussian"), seed=5).latents.prior_sample(40_000, torch.Generator().manual_seed(0))
    assert z.shape == (K, 40_000, D)
    assert z.mean(1).abs().max() < 4 / 200
    assert (z.var(1) - 1).abs().max() < 4 * 2**0.5 / 200


def test_the_gaussian_vaes_gradient_is_that_of_the_elbo() -> None:
    """Against the pathwise gradient written out with torch.distributions, on the same noise."""
    one = options("gaussian")
    toy = Toy(one, seed=6)
    images = IMAGE.expand(50, -1, -1, -1)
    found = gradients(one.loss(toy, images, torch.Generator().manual_seed(7), 0).surrogate, toy)
    noise = torch.empty(K, 50, D, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(7))
    mean, rho = toy.encoder(images).chunk(2, -1)
    q = torch.distributions.Normal(mean, rho.exp())
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    right = gradients((toy.channels(mean + rho.exp() * noise, images).sum() + kl) / 50, toy)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize(
    ("estimator", "more", "low", "high"),
    [
        ("nvil", {}, 0.0, 0.3),
        ("nvil", {"kl_warmup": 1000}, 0.0, 0.3),  # whose reference is the ELBO of that step
        ("gs-soft", {"temperature": 2.0}, 0.4, 2.0),
    ],
)
def test_the_probe_sees_bias_where_there_is_some(
    estimator: str, more: dict[str, Any], low: float, high: float
) -> None:
    one = options(estimator, **more)
    toy = Toy(one, seed=1)
    toy.trial = one
    images = IMAGE.expand(4, -1, -1, -1)
    found = probe(toy, images, 400, torch.Generator().manual_seed(0), 0)  # type: ignore[arg-type]
    assert low <= found["probe/bias"] <= high
    assert toy.training
    assert found["probe/variance"] > 0.1


def test_the_probe_tells_the_mean_gradient_from_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three draws, 1, 3 and 5: their variance is 4, and ‖E g‖² is 9 less a third of it."""
    one = options("nvil")
    toy, draws = Toy(one, seed=1), [torch.full((K, 4, C), value) for value in (1.0, 3.0, 5.0)]
    monkeypatch.setattr("dvq.probe._gradient", lambda *_: draws.pop())
    monkeypatch.setattr("dvq.probe._reference", lambda *_: torch.ones(C))
    found = probe(toy, IMAGE.expand(4, -1, -1, -1), 3, torch.Generator(), 0)  # type: ignore[arg-type]
    assert found == pytest.approx({"probe/bias": 2.0, "probe/variance": 12 / 23})


def test_the_probe_leaves_out_the_variance_of_what_is_lost_in_the_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which was a number above 10³⁰."""
    toy, draws = Toy(options("nvil"), seed=1), [torch.full((K, 4, C), value) for value in (1.0, -1.0)]
    monkeypatch.setattr("dvq.probe._gradient", lambda *_: draws.pop())
    monkeypatch.setattr("dvq.probe._reference", lambda *_: torch.ones(C))
    found = probe(toy, IMAGE.expand(4, -1, -1, -1), 2, torch.Generator(), 0)  # type: ignore[arg-type]
    assert found == pytest.approx({"probe/bias": 1.0})


class Weighing(GSSoft):
    """An estimator of one's own, which makes its logits anew for each term."""

    estimator: Literal["weighing"] = "weighing"  # type: ignore[assignment]
    weights: tuple[float, ...] = ()

    def loss(self, model: Any, images: Tensor, generator: torch.Generator, step: int | Tensor) -> Loss:  # noqa: ARG002
        v = model.encoder(images)
        total = v.sum() + sum(weight * model.latents.logits(v).sum() for weight in self.weights)
        return Loss(total, total.detach(), total.detach())


def test_the_probe_looks_at_all_logits_that_a_loss_makes() -> None:
    toy = Toy(options("gs-soft"), seed=1)
    toy.trial = Weighing(weights=(1.0, 2.0))
    found = _gradient(toy, IMAGE, torch.Generator(), 0)  # type: ignore[arg-type]
    assert torch.equal(found, torch.full_like(found, 3.0))
    toy.trial = Weighing()
    with pytest.raises(
        DvqError, match="weighing: its loss takes no logits of its latents, whose gradient probe"
    ):
        _gradient(toy, IMAGE, torch.Generator(), 0)  # type: ignore[arg-type]


def test_the_probes_reference_is_the_elbos_gradient() -> None:
    toy = Toy(options("nvil"), seed=1).eval()
    v = toy.encoder(IMAGE).detach()
    logits = toy.latents.logits(v).detach().requires_grad_()
    toy.latents.logits = lambda _: logits
    log_q = logits.squeeze(1).log_softmax(-1)
    log_q_z = torch.stack([log_q[k, Z[:, k]] for k in range(K)]).sum(0)
    _, log_joint = exact_terms(toy)
    elbo = (log_q_z.exp() * (log_joint.detach() - log_q_z)).sum()
    (right,) = torch.autograd.grad(-elbo, logits)
    for k in range(K):
        with torch.no_grad():
            found = _reference(toy, IMAGE, logits, k, 0, 500, torch.Generator().manual_seed(0), 1.0)
        assert (found - right[k, 0]).norm() < 0.1 * right[k, 0].norm()


def test_the_probes_reference_is_finite_where_codes_have_no_probability() -> None:
    toy = Toy(options("nvil"), seed=1).eval()
    logits = toy.latents.logits(toy.encoder(IMAGE)).detach()
    logits[..., 0] -= 2000  # q is 0 there
    with torch.no_grad():
        found = _reference(toy, IMAGE, logits, 0, 0, 2, torch.Generator().manual_seed(0), 1.0)
    assert found.isfinite().all()
    assert found[0] == 0
