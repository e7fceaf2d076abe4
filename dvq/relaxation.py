"""The Gumbel-Softmax relaxation: the equations as they stand, and a faster form."""

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dvq import fused
from dvq.codes import code_sums, largest, look_up
from dvq.posterior import (
    SMALLEST,
    Logits,
    categorical_kl,
    differentiated_once,
    logits_of,
    posterior_gradients,
    softmax_terms,
    tiles,
)

SHARP = 0.5
"""below this temperature the powers that make y leave float32's range, unless divided by the largest"""

Noise = Generator | np.random.Generator


def noise_of(generator: Generator) -> Noise:
    """A source of uniform numbers, seeded by ``generator``: itself on a GPU; on a CPU numpy's SFC64, whose
    numbers cost a third less than PyTorch's."""
    if generator.device.type != "cpu":
        return generator
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device="cpu")
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
    # not empty_like: the order of the noise must not depend on strides
    return exponential(like.new_empty(like.shape), noise_of(generator)).log_().neg_()


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
    return relaxed(logits, codebook, log_prior, gumbel(logits, generator), temperature, hard)


def relaxed(
    logits: Tensor,
    codebook: Tensor,
    log_prior: Tensor,
    noise: Tensor,
    temperature: float | Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """The same, from its noise (K, N, C)."""
    y = ((logits + noise) / temperature).softmax(-1)
    onehot = torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0)
    mixture = onehot + (y - y.detach()) if hard else y
    return torch.bmm(mixture, codebook), categorical_kl(logits, log_prior).sum()


@fused.fused
def gpu_relax(
    v: Tensor,
    codebook: Tensor,
    prior_logits: Tensor,
    exponentials: Tensor,
    scale: float,
    temperature: float | Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """The equations from the encodings on, from Exp(1) noise E, for g = −log E."""
    logits, noise = logits_of(v, codebook, scale), -exponentials.log()
    return relaxed(logits, codebook, prior_logits.log_softmax(-1), noise, temperature, hard)


class _Relaxed(torch.autograd.Function):
    """In tiles that stay in the cache, with the backward pass in closed form.

    The relaxed sample needs no Gumbel noise: with E = −log u ~ Exp(1), y ∝ exp((l − log E)/τ) = (exp(l)/E)^(1/τ).
    Between the passes only these powers, the factors that normalize them to y, and a few numbers per row are kept; q
    is computed again.
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
            weights, _, log_sum[at], kl[at] = softmax_terms(logits, log_prior[at[0]], out=y[at])
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
    @differentiated_once
    def backward(ctx: Any, g_z: Tensor, g_kl: Tensor) -> tuple[Tensor | None, ...]:
        """With g_y = g_z Mᵀ, and so Σ g_y·y = g_z·(y M), g_s = (g_y − Σ g_y·y)·y/τ, and g_codes = yᵀ g_z,
        hard: onehotᵀ g_z; see :func:`posterior_gradients`."""
        v, codebook, log_sum, kl, log_prior, y, factor, mean, codes = ctx.saved_tensors
        g_seen = g_z * factor  # y is without its factor
        g_left = torch.cat([g_seen, -(g_seen * mean).sum(-1, keepdim=True)], -1) / ctx.temperature
        g_right = torch.cat([codebook, torch.ones_like(codebook[..., :1])], -1).mT

        def sample_gradient(at: tuple[slice, slice], _: Tensor, g_m: Tensor) -> Tensor:
            if not ctx.hard:
                g_m[at[0]].baddbmm_(y[at].mT, g_seen[at])
            return torch.bmm(g_left[at], g_right[at[0]]).mul_(y[at])

        g_codes = code_sums(g_z, codes, codebook.shape[1]) if ctx.hard else 0.0
        gradients = posterior_gradients(
            v, codebook, log_prior, log_sum, kl, ctx.scale, g_kl, g_codes, sample_gradient
        )
        return *gradients, None, None, None, None


def fast_relax(
    v: Tensor,
    codebook: Tensor,
    prior_logits: Tensor,
    scale: float,
    temperature: float | Tensor,
    hard: bool,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """The same as :func:`logits_of` and :func:`plain_relax`, from the same noise, faster."""
    if v.is_cuda and fused.able():
        noise = v.new_empty(*v.shape[:2], codebook.shape[1]).exponential_(generator=generator)
        # a Python number would be compiled into the kernels, anew for each τ
        tau = temperature if isinstance(temperature, Tensor) else v.new_full((), temperature)
        return gpu_relax(v, codebook, prior_logits, noise, scale, tau, hard)
    relaxed: tuple[Tensor, Tensor] = _Relaxed.apply(  # type: ignore[no-untyped-call]
        v, codebook, prior_logits, scale, temperature, hard, generator
    )
    return relaxed
