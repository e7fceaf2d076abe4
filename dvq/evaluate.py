"""Evaluation: the ELBO in bits/dim with hard samples, on every image of the evaluation split."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq import DvqError
from dvq.latents import Codebooks, Nearest, Sample, per_image
from dvq.model import BITS_PER_DIM, POSITIONS, Model


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
    usage: Tensor | None = None  # (K, C)

    def add(self, sample: Sample, distortion: Tensor) -> None:
        images = len(distortion)
        self.distortions.append(distortion)
        self.rates.append(sample.rate.unflatten(1, (images, -1)).sum(2).T)
        if self.usage is not None and sample.codes is not None:
            self.usage.scatter_add_(1, sample.codes, torch.ones_like(sample.codes))


@torch.no_grad()
def evaluate(
    model: Model,
    images: NDArray[np.uint8],
    batch_size: int = 100,
    seed: int = 0,
    bound_samples: int = 1,
    training: NDArray[np.uint8] | None = None,
) -> dict[str, Any]:
    """The single-sample ELBO with hard samples z ~ q(z|x), on all ``images`` (N, 32, 32, 3) uint8.

    distortion = −log p(x|z), rate = KL(q(z|x) ‖ p(z)), bits_per_dim = distortion + rate, of one draw an image.
    With ``bound_samples`` S > 1 also the importance-weighted bound

        L_S = log (1/S) Σ_s p(x, z_s) / q(z_s|x),

    one draw at a time, so that memory does not grow with S. VQ-VAE's q is certain: its L_S is its ELBO.

    Early in training the prior, which an optimizer moves by small steps, is far from the codes' frequencies, and the
    more so the fewer codes an estimator uses. With ``training``, the images that the model was trained on, also the
    ELBO under the prior fitted to these, p(z_k = c) = (n_kc + 1) / (n_k + C) by the counts n of one draw each.

    Returns:
        all in bits/dim: ``bits_per_dim``, ``rate`` and ``distortion``, with standard errors over images
        (``_se``); ``bound`` (−L_S), and ``draws_se``, the standard deviation of the mean over images between
        repeated draws; ``ledger``: ``latents`` (the rate of each of the K) and ``channels`` (the distortion of
        red, green, blue), which add up to ``bits_per_dim``. For discrete latent variables also
        ``rate_uniform`` (P·K·log C, the rate under a uniform prior for VQ-VAE), ``usage`` (K lists of C counts
        over the whole pass), ``perplexity`` (mean over k of exp H(usage_k)), ``dead_codes`` and, with ``training``,
        ``bits_per_dim_fitted``.

    Raises:
        DvqError: no images, or others.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise DvqError(
            f"the images to evaluate are {images.dtype} {images.shape}: give uint8 (N, 32, 32, 3), values 0 to 255"
        )
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    first, more = (torch.Generator(device).manual_seed(seed + i) for i in range(2))
    gathered = _Pass()
    if isinstance(model.latents, Codebooks):
        gathered.usage = torch.zeros(model.latents.codebook.shape[:2], dtype=torch.long, device=device)
    draws = 1 if isinstance(model.latents, Nearest) else bound_samples
    for batch in batches(images, batch_size, device):
        v = model.encoder(batch)
        elbos, weights = [], []
        for draw in range(draws):
            sample = model.latents.sample(v, more if draw else first)
            distortion = model.distortions(sample.vectors, batch)
            if draw == 0:
                gathered.add(sample, distortion)
            nll = distortion.sum(1).double()
            elbos.append(nll + per_image(sample.rate, len(batch)))
            weights.append(-nll - per_image(sample.log_ratio, len(batch)))
        gathered.draws.append(torch.stack(elbos))
        gathered.bounds.append(math.log(draws) - torch.stack(weights).logsumexp(0))
    result = _summary(gathered, bound_samples)
    if training is not None and gathered.usage is not None:
        fitted = _fitted_prior(model, training, batch_size, seed)  # (K, C)
        gain = ((fitted - model.latents.log_prior().double()) * gathered.usage).sum() / len(images)
        result["bits_per_dim_fitted"] = result["bits_per_dim"] - gain.item() * BITS_PER_DIM
    model.train(was_training)
    return result


def _fitted_prior(model: Model, images: NDArray[np.uint8], batch_size: int, seed: int) -> Tensor:
    """log p(z_k = c) by the codes of ``images``, each counted once more: (K, C)."""
    device = next(model.parameters()).device
    counts = torch.ones(model.latents.codebook.shape[:2], dtype=torch.double, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for batch in batches(images, batch_size, device):
        codes = model.latents.sample(model.encoder(batch), generator).codes
        counts.scatter_add_(1, codes, torch.ones_like(codes, dtype=torch.double))
    return (counts / counts.sum(1, keepdim=True)).log()


def _summary(gathered: _Pass, bound_samples: int) -> dict[str, Any]:
    distortions, rates = (
        torch.cat(terms).double() * BITS_PER_DIM for terms in (gathered.distortions, gathered.rates)
    )
    distortion, rate = distortions.sum(1), rates.sum(1)
    result: dict[str, Any] = {"images": len(rate)}
    for name, bits in {"bits_per_dim": distortion + rate, "rate": rate, "distortion": distortion}.items():
        result[name] = bits.mean().item()
        result[f"{name}_se"] = (bits.std() / len(bits) ** 0.5).item() if len(bits) > 1 else 0.0
    if bound_samples > 1:
        means = torch.cat(gathered.draws, 1).mean(1) * BITS_PER_DIM  # (S,)
        result["bound"] = (torch.cat(gathered.bounds).mean() * BITS_PER_DIM).item()
        result["bound_samples"] = bound_samples
        result["draws_se"] = means.std().item() if len(means) > 1 else 0.0
    result["ledger"] = {"latents": rates.mean(0).tolist(), "channels": distortions.mean(0).tolist()}
    if gathered.usage is not None:
        k, c = gathered.usage.shape
        result["rate_uniform"] = POSITIONS * k * math.log(c) * BITS_PER_DIM
        result |= usage_summary(gathered.usage.cpu().numpy())
    return result


def usage_summary(usage: NDArray[np.int64]) -> dict[str, Any]:
    """Perplexity exp H and dead codes of whole-pass counts (K, C)."""
    p = usage / usage.sum(1, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
    return {
        "perplexity": float(np.exp(entropy).mean()),
        "dead_codes": int((usage == 0).sum()),
        "usage": usage.tolist(),
    }
