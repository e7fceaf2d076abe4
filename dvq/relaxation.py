"""The Gumbel-Softmax relaxation and the posterior's KL: the equations as they stand, and a faster form."""

from typing import Any

import torch
from torch import Generator, Tensor


def gumbel(like: Tensor, generator: Generator) -> Tensor:
    """Gumbel(0, 1) noise −log(−log u) of ``like``'s shape."""
    u = like.new_empty(like.shape)  # not empty_like: the order of the noise must not hang on strides
    if u.is_cuda:  # an exponential is −log u; which of the two is cheaper depends on the device
        return u.exponential_(generator=generator).log_().neg_()
    return u.uniform_(generator=generator).log_().neg_().log_().neg_()


def logits_of(v: Tensor, codebook: Tensor, scale: float) -> Tensor:
    """l = −s‖v − m‖², less ‖v‖²: (K, N, D), (K, C, D) → (K, N, C)."""
    norms = codebook.square().sum(-1).unsqueeze(1)  # (K, 1, C)
    return torch.baddbmm(norms, v, codebook.mT, beta=-scale, alpha=2 * scale)


def categorical_kl(logits: Tensor, log_prior: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_c q_c (log q_c − log p_c) [nats]: (K, N, C), (K, C) → (K, N)."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_prior.unsqueeze(1))).sum(-1)


def onehot(y: Tensor) -> Tensor:
    """1 at the largest y of each row."""
    return torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0)


def plain_relax(
    logits: Tensor, codebook: Tensor, log_prior: Tensor, temperature: float, hard: bool, generator: Generator
) -> tuple[Tensor, Tensor]:
    """What the decoder sees of a relaxed sample, and the rate.

    y = softmax((l + g)/τ); soft: y·M; hard: (onehot(argmax y) + y − stopgrad(y))·M.

    Args:
        logits: (K, N, C); codebook: (K, C, D); log_prior: (K, C).

    Returns:
        (K, N, D), and Σ KL(q ‖ p) over all latent variables, a scalar [nats].
    """
    y = ((logits + gumbel(logits, generator)) / temperature).softmax(-1)
    seen = onehot(y) + (y - y.detach()) if hard else y
    return torch.bmm(seen, codebook), categorical_kl(logits, log_prior).sum()


class _Relaxed(torch.autograd.Function):
    """One codebook at a time, so that its (N, C) matrices stay in the cache; the backward pass in closed form."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        codebook: Tensor,
        prior_logits: Tensor,
        scale: float,
        temperature: float,
        hard: bool,
        generator: Generator,
    ) -> tuple[Tensor, Tensor]:
        log_prior = prior_logits.log_softmax(-1)
        shape = (*v.shape[:2], codebook.shape[1])
        y, kl_gradient = v.new_empty(shape), v.new_empty(shape)
        vectors, q_sums, total = torch.empty_like(v), torch.empty_like(log_prior), v.new_zeros(())
        for k in range(len(v)):
            norms = codebook[k].square().sum(-1)
            logits = torch.addmm(norms, v[k], codebook[k].T, beta=-scale, alpha=2 * scale)  # (N, C)
            noisy = gumbel(logits, generator).add_(logits).div_(temperature)
            torch.softmax(noisy, -1, out=y[k])
            torch.mm(onehot(y[k]) if hard else y[k], codebook[k], out=vectors[k])
            ratio = torch.log_softmax(logits, -1)  # log q
            q = torch.exp(ratio, out=logits)
            ratio -= log_prior[k]
            kl = torch.linalg.vecdot(q, ratio)  # (N,)
            total += kl.sum()
            torch.sum(q, 0, out=q_sums[k])
            torch.mul(ratio.sub_(kl.unsqueeze(1)), q, out=kl_gradient[k])  # ∂KL/∂l
        ctx.save_for_backward(v, codebook, y, kl_gradient, q_sums, log_prior)
        ctx.scale, ctx.temperature, ctx.hard = scale, temperature, hard
        return vectors, total

    @staticmethod
    def backward(ctx: Any, g_z: Tensor, g_kl: Tensor) -> tuple[Tensor | None, ...]:
        """With g_y = g_z Mᵀ:  g_l = (g_y − Σ g_y·y)·y/τ + g_kl ∂KL/∂l,  g_v = 2s g_l M,
        g_M = yᵀ g_z + 2s (g_lᵀ v − (Σ_n g_l)·M),  g_θ = g_kl (N softmax θ − Σ_n q)."""
        v, codebook, y, kl_gradient, q_sums, log_prior = ctx.saved_tensors
        g_v, g_m = torch.empty_like(v), torch.empty_like(codebook)
        for k in range(len(v)):
            seen = onehot(y[k]) if ctx.hard else y[k]
            torch.mm(seen.T, g_z[k], out=g_m[k])
            g_l = g_z[k] @ codebook[k].T  # g_y
            g_l -= torch.linalg.vecdot(g_l, y[k]).unsqueeze(1)
            g_l *= y[k]
            g_l.mul_(1 / ctx.temperature).addcmul_(kl_gradient[k], g_kl)
            torch.mm(g_l, codebook[k], out=g_v[k])
            g_m[k].addmm_(g_l.T, v[k], alpha=2 * ctx.scale)
            g_m[k].addcmul_(g_l.sum(0).unsqueeze(1), codebook[k], value=-2 * ctx.scale)
        g_v *= 2 * ctx.scale
        g_prior = g_kl * (v.shape[1] * log_prior.exp() - q_sums)
        return g_v, g_m, g_prior, None, None, None, None


def fast_relax(
    v: Tensor,
    codebook: Tensor,
    prior_logits: Tensor,
    scale: float,
    temperature: float,
    hard: bool,
    generator: Generator,
) -> tuple[Tensor, Tensor]:
    """The same as :func:`logits_of` and :func:`plain_relax`, from the same noise, faster on a CPU."""
    found: tuple[Tensor, Tensor] = _Relaxed.apply(  # type: ignore[no-untyped-call]
        v, codebook, prior_logits, scale, temperature, hard, generator
    )
    return found
