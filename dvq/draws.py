"""Draws from the posterior, their log q and ReinMax's gradient: the equations as they stand, and a faster form."""

from typing import Any

import torch
from torch import Generator, Tensor

from dvq.codes import code_sums, look_up
from dvq.posterior import (
    SMALLEST,
    Logits,
    above_underflow,
    categorical_kl,
    differentiated_once,
    posterior_gradients,
    softmax_terms,
    tiles,
)


def cumulative(weights: Tensor) -> Tensor:
    """Σ_{c' ≤ c} w_c' of each row, (K, N, C), for :func:`inverse_of`.

    On a GPU, which does not add from left to right, it rises only in float64.
    """
    return (weights.double() if weights.is_cuda else weights).cumsum(-1)


def inverse_of(below: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` draws for each row from its cumulative weights: (K, N, C) → (K, N, count).

    The first c with q(z ≤ c) ≥ u: one random number per draw (the Gumbel-max trick takes one per category). A
    category of probability 0 is never drawn, since u > 0 and the cumulative sums rise only where w > 0.
    """
    u = below.new_empty(*below.shape[:2], count).uniform_(SMALLEST, 1, generator=generator)
    codes = torch.searchsorted(below, u.mul_(below[..., -1:]))
    # weights that are not finite must not raise an error here: the check of the loss reports them
    return codes.clamp_(max=below.shape[-1] - 1)


def inverse_draw(weights: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` draws z ~ w/Σw for each row: (K, N, C) → (K, N, count)."""
    return inverse_of(cumulative(weights), count, generator)


def plain_score(
    logits: Tensor, log_prior: Tensor, count: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` draws z ~ q, log q(z) to differentiate, and the rate.

    Args:
        logits: (K, N, C); log_prior: (K, C).

    Returns:
        (count, K, N) integers; (count, K, N) [nats]; Σ KL(q ‖ p) over all latent variables, detached [nats].
    """
    with torch.no_grad():
        codes = inverse_draw(logits.softmax(-1), count, generator)
        rate = categorical_kl(logits, log_prior).sum()
    log_q = logits.gather(-1, codes) - logits.logsumexp(-1, keepdim=True)
    return codes.movedim(-1, 0), log_q.movedim(-1, 0), rate


class _Scored(torch.autograd.Function):
    """In tiles, like the relaxation: between the passes only the codes and one number per row are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        codebook: Tensor,
        log_prior: Tensor,
        scale: float,
        count: int,
        generator: Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = (*v.shape[:2], count)
        codes, log_q = torch.empty(shape, dtype=torch.long, device=v.device), v.new_empty(shape)
        log_sum, rate = v.new_empty(v.shape[:2]), v.new_zeros(())
        make = Logits(v, codebook, scale)
        for at in tiles(v, codebook.shape[1]):
            weights, total, log_sum[at], kl = softmax_terms(make[at], log_prior[at[0]])
            codes[at] = inverse_draw(weights, count, generator)
            log_q[at] = weights.gather(-1, codes[at]).log_() - total.log().unsqueeze(-1)
            rate += kl.sum()
        ctx.save_for_backward(v, codebook, log_sum, codes)
        ctx.scale = scale
        ctx.mark_non_differentiable(codes, rate)
        return codes, log_q, rate

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, _: Any, g_log_q: Tensor, __: Any) -> tuple[Tensor | None, ...]:
        """g_l = Σ_s g_s·(onehot(z_s) − q),  g_v = 2s g_l M,  g_M = 2s (g_lᵀ v − (Σ_n g_l)·M)."""
        v, codebook, log_sum, codes = ctx.saved_tensors
        g_v, g_m = torch.empty_like(v), torch.zeros_like(codebook)
        make = Logits(v, codebook, ctx.scale, log_sum)
        for at in tiles(v, codebook.shape[1]):
            m, g = codebook[at[0]], g_log_q[at]
            g_l = above_underflow(make[at]).exp_()  # q
            g_l *= -g.sum(-1, keepdim=True)
            for s in range(g.shape[-1]):  # one at a time: draws of one code would add in no fixed order
                g_l.scatter_add_(-1, codes[at][..., s : s + 1], g[..., s : s + 1])
            g_v[at] = torch.bmm(g_l, m)
            g_m[at[0]].baddbmm_(g_l.mT, v[at]).addcmul_(g_l.sum(1).unsqueeze(-1), m, value=-1)
        return g_v.mul_(2 * ctx.scale), g_m.mul_(2 * ctx.scale), None, None, None, None


def fast_score(
    v: Tensor, codebook: Tensor, log_prior: Tensor, scale: float, count: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`dvq.posterior.logits_of` and :func:`plain_score`, from the same random numbers."""
    codes, log_q, rate = _Scored.apply(  # type: ignore[no-untyped-call]
        v, codebook, log_prior.detach(), scale, count, generator
    )
    return codes.movedim(-1, 0), log_q.movedim(-1, 0), rate


def plain_reinmax(
    logits: Tensor, codebook: Tensor, log_prior: Tensor, generator: Generator
) -> tuple[Tensor, Tensor]:
    """What the decoder sees of a draw z ~ q, M[z], with ReinMax's gradient; and the rate.

    g_c is the decoder's gradient with respect to the weight of code c. Heun's method approximates the difference of f
    between z and c by the mean of its gradients there; summed over c with weights q, this gives the logits

        g_l = ½ ∂(Σ_c q_c g_c)/∂l + ½ (g_z − Σ_c q_c g_c) ∂log q_z/∂l,  and the codes get theirs through M[z] alone.

    Args:
        logits: (K, N, C); codebook: (K, C, D); log_prior: (K, C).

    Returns:
        (K, N, D), and Σ KL(q ‖ p) over all latent variables, a scalar [nats].
    """
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    codes = inverse_draw(q.detach(), 1, generator)
    log_q_z, mean = log_q.gather(-1, codes), torch.bmm(q, codebook.detach())
    chosen = look_up(codebook, codes.squeeze(-1))
    away = (chosen - mean).detach()
    vectors = chosen + 0.5 * (mean - mean.detach()) + 0.5 * away * (log_q_z - log_q_z.detach())
    return vectors, categorical_kl(logits, log_prior).sum()


class _ReinMax(torch.autograd.Function):
    """In tiles, like the relaxation: between the passes only the codes and a few numbers per row are kept."""

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, codebook: Tensor, prior_logits: Tensor, scale: float, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        log_prior, mean = prior_logits.log_softmax(-1), torch.empty_like(v)
        log_sum, kl = v.new_empty(v.shape[:2]), v.new_empty(v.shape[:2])
        codes = torch.empty((*v.shape[:2], 1), dtype=torch.long, device=v.device)
        make = Logits(v, codebook, scale)
        for at in tiles(v, codebook.shape[1]):
            weights, total, log_sum[at], kl[at] = softmax_terms(make[at], log_prior[at[0]])
            codes[at] = inverse_draw(weights, 1, generator)
            mean[at] = torch.bmm(weights, codebook[at[0]]).div_(total.unsqueeze(-1))
        vectors = look_up(codebook, codes.squeeze(-1))
        ctx.save_for_backward(v, codebook, log_prior, log_sum, kl, codes, mean, vectors)
        ctx.scale = scale
        return vectors, kl.sum()

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, g_vectors: Tensor, g_kl: Tensor) -> tuple[Tensor | None, ...]:
        """With g_c = g_vectors·M[c]: g_s = ½ q (g_c − g_z) + ½ onehot(z) (g_z − Σ q g)."""
        v, codebook, log_prior, log_sum, kl, codes, mean, vectors = ctx.saved_tensors
        g_z = (g_vectors * vectors).sum(-1, keepdim=True)
        g_left = torch.cat([g_vectors, -g_z], -1) / 2
        g_right = torch.cat([codebook, torch.ones_like(codebook[..., :1])], -1).mT
        away = (g_z - (g_vectors * mean).sum(-1, keepdim=True)) / 2

        def sample_gradient(at: tuple[slice, slice], q: Tensor, _: Tensor) -> Tensor:
            return torch.bmm(g_left[at], g_right[at[0]]).mul_(q).scatter_add_(-1, codes[at], away[at])

        g_codes = code_sums(g_vectors, codes.squeeze(-1), codebook.shape[1])
        gradients = posterior_gradients(
            v, codebook, log_prior, log_sum, kl, ctx.scale, g_kl, g_codes, sample_gradient
        )
        return *gradients, None, None


def fast_reinmax(
    v: Tensor, codebook: Tensor, prior_logits: Tensor, scale: float, generator: Generator
) -> tuple[Tensor, Tensor]:
    """The same as :func:`dvq.posterior.logits_of` and :func:`plain_reinmax`, from the same random numbers."""
    drawn: tuple[Tensor, Tensor] = _ReinMax.apply(  # type: ignore[no-untyped-call]
        v, codebook, prior_logits, scale, generator
    )
    return drawn
