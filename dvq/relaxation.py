"""The Gumbel-Softmax relaxation and the posterior's KL: the equations as they stand, and a faster form."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dvq.codes import code_sums, largest, look_up

TILE = {"cpu": 2**18, "cuda": 2**23}  # logits that stay in the cache (1 MiB; 32 MiB)
SMALLEST = 1e-30  # u is never 0, and its logarithm finite
SHARP = (
    0.5  # temperatures under this make powers of y that leave float32's range, unless divided by the largest
)

Noise = Generator | np.random.Generator


def noise_of(generator: Generator) -> Noise:
    """A source of uniform numbers, seeded by ``generator``: itself on a GPU; on a CPU numpy's SFC64, whose
    numbers cost a third less than PyTorch's."""
    if generator.device.type != "cpu":
        return generator
    seed = torch.randint(2**63 - 1, (1,), generator=generator)
    return np.random.Generator(np.random.SFC64(seed.numpy()))


def exponential(out: Tensor, noise: Noise) -> Tensor:
    """Exp(1) noise −log u in the place of ``out``, which is contiguous."""
    if isinstance(noise, Generator):
        return out.exponential_(generator=noise)
    flat = out.view(-1).numpy()
    noise.random(out=flat, dtype=flat.dtype)
    return out.clamp_(min=SMALLEST).log_().neg_()


def gumbel(like: Tensor, generator: Generator) -> Tensor:
    """Gumbel(0, 1) noise −log(−log u) of ``like``'s shape."""
    # not empty_like: the order of the noise must not hang on strides
    return exponential(like.new_empty(like.shape), noise_of(generator)).log_().neg_()


def logits_of(v: Tensor, codebook: Tensor, scale: float) -> Tensor:
    """l = −s‖v − m‖², less ‖v‖²: (K, N, D), (K, C, D) → (K, N, C)."""
    norms = codebook.square().sum(-1).unsqueeze(1)  # (K, 1, C)
    return torch.baddbmm(norms, v, codebook.mT, beta=-scale, alpha=2 * scale)


def categorical_kl(logits: Tensor, log_prior: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_c q_c (log q_c − log p_c) [nats]: (K, N, C), (K, C) → (K, N)."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_prior.unsqueeze(1))).sum(-1)


def plain_relax(
    logits: Tensor,
    codebook: Tensor,
    log_prior: Tensor,
    temperature: float | Tensor,
    hard: bool,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """What the decoder sees of a relaxed sample, and the rate.

    y = softmax((l + g)/τ); soft: y·M; hard: (onehot(argmax y) + y − stopgrad(y))·M.

    Args:
        logits: (K, N, C); codebook: (K, C, D); log_prior: (K, C).

    Returns:
        (K, N, D), and Σ KL(q ‖ p) over all latent variables, a scalar [nats].
    """
    y = ((logits + gumbel(logits, generator)) / temperature).softmax(-1)
    onehot = torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0)
    seen = onehot + (y - y.detach()) if hard else y
    return torch.bmm(seen, codebook), categorical_kl(logits, log_prior).sum()


def tiles(v: Tensor, codes: int) -> Iterator[tuple[slice, slice]]:
    """Places in v (K, N, D) whose logits (·, ·, C) have TILE elements at most: some rows of a codebook, or
    several codebooks whole. In the order of the noise."""
    count, rows, _ = v.shape
    tile = max(1, TILE["cuda" if v.is_cuda else "cpu"] // codes)
    several = max(1, tile // rows)
    for k in range(0, count, several):
        for start in range(0, rows, tile):
            yield slice(k, k + several), slice(start, start + tile)


class Logits:
    """l in tiles, each a single product: l = [v, 1]·[2sM, −s‖m‖²]ᵀ, and log q with another column."""

    def __init__(self, v: Tensor, codebook: Tensor, scale: float, log_sum: Tensor | None = None) -> None:
        ones, norms = v.new_ones(*v.shape[:2], 1), codebook.square().sum(-1, keepdim=True)
        left, right = [v, ones], [2 * scale * codebook, -scale * norms]
        if log_sum is not None:
            left, right = [*left, log_sum.unsqueeze(-1)], [*right, norms.new_full(norms.shape, -1)]
        self.left, self.right = torch.cat(left, -1), torch.cat(right, -1).mT

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        return torch.bmm(self.left[at], self.right[at[0]])


def weigh(
    logits: Tensor, log_prior: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w = exp(l − max l), its sum, log Σ exp l, and KL(q ‖ p), in tiles; ``logits`` is used up.

        KL = (Σ w·l − Σ w·log p)/Σ w − log Σ w,  l less its largest

    Args:
        logits: (K, N, C); log_prior: (K, C); out: (K, N, C), where to put w.

    Returns:
        (K, N, C), (K, N), (K, N) and (K, N).
    """
    top = logits.amax(-1, keepdim=True)
    logits -= top
    weights = torch.exp(logits, out=out)
    total = weights.sum(-1)
    log_total = total.log()
    mean_log_p = torch.bmm(weights, log_prior.unsqueeze(-1)).squeeze(-1)
    logits *= weights
    kl = (logits.sum(-1) - mean_log_p) / total - log_total
    return weights, total, log_total + top.squeeze(-1), kl


def posterior_gradients(
    v: Tensor,
    codebook: Tensor,
    log_prior: Tensor,
    log_sum: Tensor,
    kl: Tensor,
    scale: float,
    g_kl: Tensor,
    g_codes: Tensor | float,
    sample_gradient: Callable[[tuple[slice, slice], Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by v, M and the prior's θ, in tiles, for those g_s that the sample gives the logits:

    g_l = g_s + g_kl·q·(log q − log p − KL),  g_v = 2s g_l M,  g_M = g_codes + 2s (g_lᵀ v − (Σ_n g_l)·M),
    g_θ = g_kl (N softmax θ − Σ_n q).

    Args:
        log_sum, kl: (K, N), log Σ exp l and KL(q ‖ p), by :func:`weigh`.
        g_codes: (K, C, D), what the sample itself gives M.
        sample_gradient: g_s of a tile, from its place, its q and all of g_M, to which it may add.
    """
    g_v, g_m = torch.empty_like(v), torch.zeros_like(codebook)
    q_sums, l_sums = torch.zeros_like(log_prior), torch.zeros_like(log_prior)
    make = Logits(v, codebook, scale, log_sum)
    for at in tiles(v, codebook.shape[1]):
        ks = at[0]
        ratio = make[at]  # log q
        q = ratio.exp()
        q_sums[ks] += q.sum(1)
        ratio -= log_prior[ks].unsqueeze(1)
        ratio -= kl[at].unsqueeze(-1)
        g_l = sample_gradient(at, q, g_m)
        g_l.addcmul_(ratio, q.mul_(g_kl))
        g_v[at] = torch.bmm(g_l, codebook[ks])
        g_m[ks].baddbmm_(g_l.mT, v[at], alpha=2 * scale)
        l_sums[ks] += g_l.sum(1)
    g_m += g_codes
    g_v *= 2 * scale
    g_m.addcmul_(l_sums.unsqueeze(-1), codebook, value=-2 * scale)
    return g_v, g_m, g_kl * (v.shape[1] * log_prior.exp() - q_sums)


class _Relaxed(torch.autograd.Function):
    """In tiles that stay in the cache, with the backward pass in closed form.

    The relaxed sample needs no Gumbel noise: with E = −log u ~ Exp(1), y ∝ exp((l − log E)/τ) = (exp(l)/E)^(1/τ).
    Between the passes only this, the factors that make it y, and a few numbers a row are kept; q is made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        codebook: Tensor,
        prior_logits: Tensor,
        scale: float,
        temperature: float | Tensor,
        hard: bool,
        generator: Generator,
    ) -> tuple[Tensor, Tensor]:
        log_prior, noise = prior_logits.log_softmax(-1), noise_of(generator)
        y = v.new_empty(*v.shape[:2], codebook.shape[1])
        mean, factor = torch.empty_like(v), v.new_empty(*v.shape[:2], 1)
        log_sum, kl = v.new_empty(v.shape[:2]), v.new_empty(v.shape[:2])
        codes = torch.empty(v.shape[:2] if hard else 0, dtype=torch.long, device=v.device)
        sharp = isinstance(temperature, Tensor) or temperature < SHARP
        make = Logits(v, codebook, scale)
        for at in tiles(v, codebook.shape[1]):
            logits = make[at]
            weights, _, log_sum[at], kl[at] = weigh(logits, log_prior[at[0]], out=y[at])
            weights /= exponential(logits, noise)
            if sharp:
                weights /= weights.amax(-1, keepdim=True)
            weights.pow_(1 / temperature)
            factor[at] = weights.sum(-1, keepdim=True).reciprocal_()
            mean[at] = torch.bmm(weights, codebook[at[0]]).mul_(factor[at])
            if hard:
                codes[at] = largest(weights)
        ctx.save_for_backward(v, codebook, log_sum, kl, log_prior, y, factor, mean, codes)
        ctx.scale, ctx.temperature, ctx.hard = scale, temperature, hard
        return look_up(codebook, codes) if hard else mean, kl.sum()

    @staticmethod
    def backward(ctx: Any, g_z: Tensor, g_kl: Tensor) -> tuple[Tensor | None, ...]:
        """With g_y = g_z Mᵀ, and so Σ g_y·y = g_z·(y M), g_s = (g_y − Σ g_y·y)·y/τ, and g_codes = yᵀ g_z; see
        :func:`posterior_gradients`."""
        v, codebook, log_sum, kl, log_prior, y, factor, mean, codes = ctx.saved_tensors
        g_seen = g_z * factor  # y is without its factor
        g_left = torch.cat([g_seen, -(g_seen * mean).sum(-1, keepdim=True)], -1) / ctx.temperature
        g_right = torch.cat([codebook, torch.ones_like(codebook[..., :1])], -1).mT

        def sample_gradient(at: tuple[slice, slice], _: Tensor, g_m: Tensor) -> Tensor:
            if not ctx.hard:
                g_m[at[0]].baddbmm_(y[at].mT, g_seen[at])
            return torch.bmm(g_left[at], g_right[at[0]]).mul_(y[at])

        g_codes = code_sums(g_z, codes, codebook.shape[1]) if ctx.hard else 0.0
        found = posterior_gradients(
            v, codebook, log_prior, log_sum, kl, ctx.scale, g_kl, g_codes, sample_gradient
        )
        return *found, None, None, None, None


def fast_relax(
    v: Tensor,
    codebook: Tensor,
    prior_logits: Tensor,
    scale: float,
    temperature: float | Tensor,
    hard: bool,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """The same as :func:`logits_of` and :func:`plain_relax`, from the same noise, faster on a CPU."""
    found: tuple[Tensor, Tensor] = _Relaxed.apply(  # type: ignore[no-untyped-call]
        v, codebook, prior_logits, scale, temperature, hard, generator
    )
    return found
