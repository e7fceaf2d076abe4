"""The Gumbel-Softmax relaxation and the posterior's KL: the equations as they stand, and a faster form."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor

TILE = {"cpu": 2**18, "cuda": 2**23}  # logits that stay in the cache (1 MiB; 32 MiB)
SMALLEST = 1e-30  # u is never 0, and its logarithm finite


def exponential(like: Tensor, generator: Generator, out: Tensor | None = None) -> Tensor:
    """Exp(1) noise −log u of ``like``'s shape."""
    # not empty_like: the order of the noise must not hang on strides
    u = like.new_empty(like.shape) if out is None else out
    if u.is_cuda:  # which of the two is cheaper depends on the device
        return u.exponential_(generator=generator)
    return u.uniform_(SMALLEST, 1, generator=generator).log_().neg_()


def gumbel(like: Tensor, generator: Generator) -> Tensor:
    """Gumbel(0, 1) noise −log(−log u) of ``like``'s shape."""
    return exponential(like, generator).log_().neg_()


def logits_of(v: Tensor, codebook: Tensor, scale: float) -> Tensor:
    """l = −s‖v − m‖², less ‖v‖²: (K, N, D), (K, C, D) → (K, N, C)."""
    norms = codebook.square().sum(-1).unsqueeze(1)  # (K, 1, C)
    return torch.baddbmm(norms, v, codebook.mT, beta=-scale, alpha=2 * scale)


def categorical_kl(logits: Tensor, log_prior: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_c q_c (log q_c − log p_c) [nats]: (K, N, C), (K, C) → (K, N)."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_prior.unsqueeze(1))).sum(-1)


def inverse_draw(logits: Tensor, count: int, generator: Generator) -> Tensor:
    """``count`` draws z ~ Cat(softmax l) for each row: (K, N, C) → (K, N, count).

    The first c with q(z ≤ c) ≥ u, one random number a draw (the Gumbel maximum takes one a category). It is
    never one of probability 0: u > 0, and the sums rise only where q does. They do so on a GPU, which adds in
    another order than from left to right, in float64.
    """
    q = logits.softmax(-1)
    below = (q.double() if q.is_cuda else q).cumsum(-1)
    u = below.new_empty(*q.shape[:2], count).uniform_(SMALLEST, 1, generator=generator)
    return torch.searchsorted(below, u.mul_(below[..., -1:]))


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
        codes = inverse_draw(logits, count, generator)
        rate = categorical_kl(logits, log_prior).sum()
    log_q = logits.gather(-1, codes) - logits.logsumexp(-1, keepdim=True)
    return codes.movedim(-1, 0), log_q.movedim(-1, 0), rate


def onehot(y: Tensor) -> Tensor:
    """1 at the largest y of each row."""
    return torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0)


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
    seen = onehot(y) + (y - y.detach()) if hard else y
    return torch.bmm(seen, codebook), categorical_kl(logits, log_prior).sum()


class _Relaxed(torch.autograd.Function):
    """In tiles that stay in the cache, with the backward pass in closed form.

    The relaxed sample needs no Gumbel noise: with E = −log u ~ Exp(1), y ∝ exp((l − log E)/τ) = (exp(l)/E)^(1/τ).
    Between the passes only y and two numbers a row are kept; q is made again.
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
        log_prior = prior_logits.log_softmax(-1)
        vectors, log_sum, kl = torch.empty_like(v), v.new_empty(v.shape[:2]), v.new_empty(v.shape[:2])
        kept = []
        for at, tile in tiles(v, codebook.shape[1]):
            m = codebook[at[0]]
            logits = logits_of(tile, m, scale)
            top = logits.amax(-1, keepdim=True)
            logits -= top
            weights = logits.exp()
            total = weights.sum(-1)
            log_total = total.log()
            log_sum[at] = log_total + top.squeeze(-1)
            # KL = (Σ w·l − Σ w·log p)/Σ w − log Σ w
            mean_log_p = torch.bmm(weights, log_prior[at[0]].unsqueeze(-1)).squeeze(-1)
            kl[at] = (torch.linalg.vecdot(weights, logits) - mean_log_p) / total - log_total
            weights /= exponential(logits, generator, out=logits)
            weights /= weights.amax(-1, keepdim=True)
            y = weights.pow_(1 / temperature)
            y /= y.sum(-1, keepdim=True)
            vectors[at] = torch.bmm(onehot(y) if hard else y, m)
            kept.append(y)
        ctx.save_for_backward(v, codebook, log_sum, kl, log_prior, *kept)
        ctx.scale, ctx.temperature, ctx.hard = scale, temperature, hard
        return vectors, kl.sum()

    @staticmethod
    def backward(ctx: Any, g_z: Tensor, g_kl: Tensor) -> tuple[Tensor | None, ...]:
        """With g_y = g_z Mᵀ:  g_l = (g_y − Σ g_y·y)·y/τ + g_kl·q·(log q − log p − KL),  g_v = 2s g_l M,
        g_M = yᵀ g_z + 2s (g_lᵀ v − (Σ_n g_l)·M),  g_θ = g_kl (N softmax θ − Σ_n q)."""
        v, codebook, log_sum, kl, log_prior, *kept = ctx.saved_tensors
        g_v, g_m = torch.empty_like(v), torch.zeros_like(codebook)
        q_sums, l_sums = torch.zeros_like(log_prior), torch.zeros_like(log_prior)
        for (at, tile), y in zip(tiles(v, codebook.shape[1]), kept, strict=True):
            ks, m, g = at[0], codebook[at[0]], g_z[at]
            ratio = logits_of(tile, m, ctx.scale)
            ratio -= log_sum[at].unsqueeze(-1)
            q = ratio.exp()
            q_sums[ks] += q.sum(1)
            ratio -= log_prior[ks].unsqueeze(1)
            ratio -= kl[at].unsqueeze(-1)
            g_m[ks].baddbmm_((onehot(y) if ctx.hard else y).mT, g)
            g_l = torch.bmm(g, m.mT)  # g_y
            g_l -= torch.linalg.vecdot(g_l, y).unsqueeze(-1)
            g_l *= y
            g_l *= 1 / ctx.temperature
            g_l.addcmul_(ratio, q.mul_(g_kl))
            g_v[at] = torch.bmm(g_l, m)
            g_m[ks].baddbmm_(g_l.mT, tile, alpha=2 * ctx.scale)
            l_sums[ks] += g_l.sum(1)
        g_v *= 2 * ctx.scale
        g_m.addcmul_(l_sums.unsqueeze(-1), codebook, value=-2 * ctx.scale)
        g_prior = g_kl * (v.shape[1] * log_prior.exp() - q_sums)
        return g_v, g_m, g_prior, None, None, None, None


class _Scored(torch.autograd.Function):
    """Likewise for hard samples: between the passes only their codes and a number a row are kept."""

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
        for at, tile in tiles(v, codebook.shape[1]):
            logits = logits_of(tile, codebook[at[0]], scale)
            log_sum[at] = logits.logsumexp(-1)
            codes[at] = inverse_draw(logits, count, generator)
            log_q[at] = logits.gather(-1, codes[at]) - log_sum[at].unsqueeze(-1)
            rate += categorical_kl(logits, log_prior[at[0]]).sum()
        ctx.save_for_backward(v, codebook, log_sum, codes)
        ctx.scale = scale
        ctx.mark_non_differentiable(codes, rate)
        return codes, log_q, rate

    @staticmethod
    def backward(ctx: Any, _: Any, g_log_q: Tensor, __: Any) -> tuple[Tensor | None, ...]:
        """g_l = Σ_s g_s·(onehot(z_s) − q),  g_v = 2s g_l M,  g_M = 2s (g_lᵀ v − (Σ_n g_l)·M)."""
        v, codebook, log_sum, codes = ctx.saved_tensors
        g_v, g_m = torch.empty_like(v), torch.zeros_like(codebook)
        for at, tile in tiles(v, codebook.shape[1]):
            m, g = codebook[at[0]], g_log_q[at]
            g_l = logits_of(tile, m, ctx.scale).sub_(log_sum[at].unsqueeze(-1)).exp_()  # q
            g_l *= -g.sum(-1, keepdim=True)
            for s in range(g.shape[-1]):  # one by one: draws of one code would be added in any order
                g_l.scatter_add_(-1, codes[at][..., s : s + 1], g[..., s : s + 1])
            g_v[at] = torch.bmm(g_l, m)
            g_m[at[0]].baddbmm_(g_l.mT, tile).addcmul_(g_l.sum(1).unsqueeze(-1), m, value=-1)
        return g_v.mul_(2 * ctx.scale), g_m.mul_(2 * ctx.scale), None, None, None, None


def fast_score(
    v: Tensor, codebook: Tensor, log_prior: Tensor, scale: float, count: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as :func:`logits_of` and :func:`plain_score`, from the same random numbers."""
    codes, log_q, rate = _Scored.apply(  # type: ignore[no-untyped-call]
        v, codebook, log_prior.detach(), scale, count, generator
    )
    return codes.movedim(-1, 0), log_q.movedim(-1, 0), rate


def tiles(v: Tensor, codes: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Pieces of v (K, N, D) whose logits (·, ·, C) have TILE elements at most: some rows of a codebook, or
    several codebooks whole. In the order of the noise."""
    count, rows, _ = v.shape
    tile = TILE["cuda" if v.is_cuda else "cpu"] // codes
    several = max(1, tile // rows)
    for k in range(0, count, several):
        for start in range(0, rows, max(1, tile)):
            at = slice(k, k + several), slice(start, start + max(1, tile))
            yield at, v[at]


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
