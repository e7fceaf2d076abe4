"""Evaluation: the ELBO in bits/dim with hard samples, on every image of the evaluation split."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq import DvqError, inputs
from dvq.autoregressive import Autoregressive
from dvq.codes import code_counts
from dvq.device import exact
from dvq.latents import Codebooks, Sample, per_image
from dvq.minutely import Minutely
from dvq.model import Model, in_evaluation
from dvq.network import Decoder
from dvq.quantizers import Deterministic

Prior = Callable[[Tensor], Tensor]
STATISTICS = 200
"""how many minibatches, at most, batch normalization's statistics are estimated from"""


def batches(images: NDArray[np.uint8], size: int, device: torch.device) -> Iterator[Tensor]:
    """Every image once, in order; the last batch may be smaller."""
    for start in range(0, len(images), size):
        yield torch.from_numpy(np.array(images[start : start + size])).to(device)


@dataclass
class _Pass:
    """What a pass over the images gathers, in nats."""

    distortions: list[Tensor] = field(default_factory=list)  # (B, 3), of the first draw
    rates: list[Tensor] = field(default_factory=list)  # (B, K)
    draws: list[Tensor] = field(default_factory=list)  # (S, B), the ELBO of each draw
    bounds: list[Tensor] = field(default_factory=list)  # (B,), L_S
    autoregressive: list[Tensor] = field(default_factory=list)  # (B,), the rate under an autoregressive prior
    usage: Tensor | None = None  # (K, C), counts
    mass: Tensor | float = 0.0  # (K, C), Σ q(z|x)

    def evaluate(self, model: Model, images: Tensor, samples: Iterator[Sample], prior: Prior | None) -> None:
        elbos: list[Tensor] = []
        weights: list[Tensor] = []
        for sample in samples:
            distortion = model.channel_distortions(sample.vectors, images)
            if not elbos:
                self.add(sample, distortion)
                if prior is not None:
                    self.autoregressive.append(_rate_under(prior, model, sample, len(images)))
            nll = distortion.sum(1).double()
            elbos.append(nll + per_image(sample.rate, len(images)))
            weights.append(-nll - per_image(sample.log_ratio, len(images)))
        self.draws.append(torch.stack(elbos))
        self.bounds.append(math.log(len(weights)) - torch.stack(weights).logsumexp(0))

    def add(self, sample: Sample, distortion: Tensor) -> None:
        images = len(distortion)
        self.distortions.append(distortion)
        self.rates.append(sample.rate.unflatten(1, (images, -1)).sum(2).T)
        if sample.codes is not None:
            if self.usage is None:
                raise DvqError("latent variables that have codes are of a class of dvq.latents.Codebooks")
            counts = code_counts(sample.codes, self.usage.shape[1])
            self.usage += counts
            self.mass = self.mass + (counts if sample.mass is None else sample.mass).double()


@in_evaluation
def evaluate(
    model: Model,
    images: NDArray[np.uint8],
    batch_size: int | None = None,
    seed: int = 0,
    bound_samples: int = 1,
    training: NDArray[np.uint8] | None = None,
    prior: Prior | None = None,
) -> dict[str, Any]:
    """The single-sample ELBO with hard samples z ~ q(z|x), on all ``images`` (N, H, W, 3) uint8.

    The draws are a function of ``seed`` and ``batch_size`` (None: the trial's ``images_at_once``).

    distortion = −log p(x|z), rate = KL(q(z|x) ‖ p(z)), bits_per_dim = distortion + rate, of one draw an image.
    With ``bound_samples`` S > 1 also the importance-weighted bound

        L_S = log (1/S) Σ_s p(x, z_s) / q(z_s|x),

    one draw at a time, so that memory does not grow with S. Of a deterministic q (VQ-VAE, FSQ) it is the ELBO.

    With ``training``, the images that the model was trained on, also the ELBO of the model that :func:`fit` makes
    of it. With a ``prior`` r of the model's codes, also the ELBO with it in place of p(z): an autoregressive one, or
    any other function from codes (B, H/4, W/4, K) to log r(z) [nats], (B,), with Σ_z r(z) ≤ 1.

    Returns:
        all in bits/dim: ``bits_per_dim``, ``rate`` and ``distortion``, with standard errors over images
        (``_se``); ``bound`` (−L_S), and ``draws_se``, the standard deviation of the mean over images between
        repeated draws; ``ledger``: ``latents`` (the rate of each of the K) and ``channels`` (the distortion of
        red, green and blue, or of gray), which add up to ``bits_per_dim``; with ``training``,
        ``fitted_bits_per_dim``; with ``prior``, ``rate_autoregressive`` and ``autoregressive_bits_per_dim`` (with
        ``_se``), of the same draw. For discrete latent variables also ``rate_uniform`` (P·K·log C, VQ-VAE's and FSQ's
        rate under a uniform prior), ``rate_least`` (under the mean of q over these images and positions: no prior
        that all positions share has less, and no bound), ``usage`` (K lists of C counts over the whole pass),
        ``perplexity`` (mean over k of exp H(usage_k)) and ``dead_codes``.

    Raises:
        DvqError: no images, or others; a number below 1; a ``prior`` of codes that the model does not have, or that
            does not give a number for each image.
    """
    images = inputs.arrays(images, model.trial, "the images to evaluate")
    bound_samples = inputs.count(bound_samples, "bound_samples")
    at_once = model.trial.images_at_once if batch_size is None else inputs.count(batch_size, "batch_size")
    if prior is not None:
        inputs.discrete(model.trial)
    if isinstance(prior, Autoregressive):
        inputs.prior(prior.trial, model.trial)
    first, more = model.generator(2 * seed), model.generator(2 * seed + 1)
    device = first.device
    gathered = _Pass()
    if isinstance(model.latents, Codebooks):
        gathered.usage = torch.zeros(model.latents.codebook.shape[:2], dtype=torch.long, device=device)
    draws = 1 if isinstance(model.latents, Deterministic) else bound_samples
    minutely = Minutely()
    for number, batch in enumerate(batches(images, at_once, device)):
        gathered.evaluate(model, batch, _samples(model, batch, first, more, draws), prior)
        minutely.say(f"evaluation: {number * at_once + len(batch):,} of {len(images):,} images")
    result = _summary(gathered, bound_samples, model)
    if training is not None:
        fitted = fit(copy.deepcopy(model), training, batch_size, seed)
        result["fitted_bits_per_dim"] = evaluate(fitted, images, batch_size, seed)["bits_per_dim"]
    return result


def _samples(
    model: Model, images: Tensor, first: torch.Generator, more: torch.Generator, draws: int
) -> Iterator[Sample]:
    """One sample by ``first``, and ``draws`` − 1 by ``more``."""
    v = model.encoder(images)
    sample = model.latents.sample(v, first)
    yield sample
    for _ in range(1, draws):
        sample = sample.again(more) if sample.again else model.latents.sample(v, more)
        yield sample


def _rate_under(prior: Prior, model: Model, sample: Sample, images: int) -> Tensor:
    """log q(z|x) − log r(z) [nats] of each image, by its draw: (B,)."""
    assert sample.codes is not None
    log_q = per_image(sample.log_ratio + model.latents.log_p_each(sample.codes), images)
    log_r = prior(sample.codes.T.unflatten(0, (images, *model.trial.grid)))
    if log_r.shape != log_q.shape:
        raise DvqError(
            f"the prior gives {tuple(log_r.shape)} for {images} images: give log r(z) [nats] of each, ({images},)"
        )
    return log_q - log_r


@torch.no_grad()
def fit(model: Model, training: NDArray[np.uint8], batch_size: int | None = None, seed: int = 0) -> Model:
    """Estimate anew, in place, what lags behind the weights in training: batch normalization's statistics, and the
    prior.

    The statistics lag because they are running averages (for GS-Soft, besides, of mixtures of codes instead of single
    ones), the prior because the optimizer's steps are small, the more so the fewer codes an estimator uses. The
    statistics become the mean over up to ``STATISTICS`` minibatches of the trial's size, with hard samples (Ioffe &
    Szegedy 2015, "Batch Normalization", algorithm 2), unless they are fixed. Then a prior that is trained
    becomes p(z_k = c) = (n_kc + 1) / (n_k + C), with the counts n of one draw for each image.

    Args:
        model: left in evaluation mode.
        training: the images (N, H, W, 3) uint8 that it was trained on.
        batch_size: images at a time when codes are counted; None: the trial's ``images_at_once``.
        seed: of the draws.

    Returns:
        the model.

    Raises:
        DvqError: no images, or others; a ``batch_size`` below 1.
    """
    training = inputs.arrays(training, model.trial, "the training images")
    at_once = model.trial.images_at_once if batch_size is None else inputs.count(batch_size, "batch_size")
    generator = model.generator(seed)
    model.eval()
    with exact(), torch.autocast(generator.device.type, enabled=False):
        _fit_normalization(model, training, generator)
        if isinstance(getattr(model.latents, "prior_logits", None), nn.Parameter):
            _fit_prior(model, training, at_once, generator)
    return model


def _fit_normalization(model: Model, training: NDArray[np.uint8], generator: torch.Generator) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    layers = [layer for layer in layers if not getattr(layer, "fixed", False)]  # PyTorch's own never are
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all minibatches
        layer.train()  # this layer alone: the rest stays as in evaluation, in float32
    size = min(model.trial.batch_size, len(training))
    whole = training[: min(len(training) // size, STATISTICS) * size]
    decoder: nn.Module = model.decoder
    decode = decoder.hidden if isinstance(decoder, Decoder) else decoder  # ours without its head
    for batch in batches(whole, size, generator.device):
        decode(model.latents.sample(model.encoder(batch), generator).vectors)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def _fit_prior(
    model: Model, training: NDArray[np.uint8], batch_size: int, generator: torch.Generator
) -> None:
    counts = torch.ones_like(model.latents.prior_logits, dtype=torch.double)
    for batch in batches(training, batch_size, generator.device):
        codes = model.latents.sample(model.encoder(batch), generator).codes
        counts += code_counts(codes, counts.shape[1])
    model.latents.prior_logits.copy_(counts.log())


def _summary(gathered: _Pass, bound_samples: int, model: Model) -> dict[str, Any]:
    trial = model.trial
    distortions, rates = (
        torch.cat(terms).double() * trial.bits_per_nat for terms in (gathered.distortions, gathered.rates)
    )
    distortion, rate = distortions.sum(1), rates.sum(1)
    result: dict[str, Any] = {"images": len(rate)}
    for name, bits in {"bits_per_dim": distortion + rate, "rate": rate, "distortion": distortion}.items():
        result[name], result[f"{name}_se"] = _mean(bits)
    if bound_samples > 1:
        means = torch.cat(gathered.draws, 1).mean(1) * trial.bits_per_nat  # (S,)
        result["bound"] = (torch.cat(gathered.bounds).mean() * trial.bits_per_nat).item()
        result["bound_samples"] = bound_samples
        result["draws_se"] = means.std().item() if len(means) > 1 else 0.0
    if gathered.autoregressive:
        under = torch.cat(gathered.autoregressive).double() * trial.bits_per_nat
        bits, result["rate_autoregressive"] = distortion + under, under.mean().item()
        result["autoregressive_bits_per_dim"], result["autoregressive_bits_per_dim_se"] = _mean(bits)
    result["ledger"] = {"latents": rates.mean(0).tolist(), "channels": distortions.mean(0).tolist()}
    if gathered.usage is not None:
        k, c = gathered.usage.shape
        result["rate_uniform"] = trial.positions * k * math.log(c) * trial.bits_per_nat
        mass, log_prior = gathered.mass, model.latents.log_prior().double()
        assert isinstance(mass, Tensor)
        gain = torch.xlogy(mass, mass / mass.sum(1, keepdim=True)).sum() - (mass * log_prior).sum()
        result["rate_least"] = result["rate"] - gain.item() / len(rate) * trial.bits_per_nat
        result |= usage_summary(gathered.usage.cpu().numpy())
    return result


def _mean(bits: Tensor) -> tuple[float, float]:
    """The mean over images, and its standard error."""
    return bits.mean().item(), (bits.std() / len(bits) ** 0.5).item() if len(bits) > 1 else 0.0


def usage_summary(usage: NDArray[np.int64]) -> dict[str, Any]:
    """Perplexity exp H and dead codes of whole-pass counts (K, C)."""
    p = usage / usage.sum(1, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
    return {
        "perplexity": float(np.exp(entropy).mean()),
        "dead_codes": int((usage == 0).sum()),
        "usage": usage.tolist(),
    }
