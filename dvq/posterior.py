"""The posterior's logits, its KL and their gradients: as the equations stand, and in tiles that stay in the cache."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from dvq import DvqError
from dvq.device import tensor_float32

P = ParamSpec("P")
R = TypeVar("R")

TILE = {"cpu": 2**18, "cuda": 2**23}  # logits that stay in the cache (1 MiB; 32 MiB)
LOWEST = -87.0  # exp of less underflows
SMALLEST = 1e-30  # the least random number u: its logarithm is finite


def logits_of(v: Tensor, codebook: Tensor, scale: float | Tensor) -> Tensor:
    """l = −s‖v − m‖², less ‖v‖²: (K, N, D), (K, C, D) → (K, N, C)."""
    norms = codebook.square().sum(-1).unsqueeze(1)  # (K, 1, C)
    if isinstance(scale, Tensor):
        return scale * torch.baddbmm(norms, v, codebook.mT, beta=-1, alpha=2)
    return torch.baddbmm(norms, v, codebook.mT, beta=-scale, alpha=2 * scale)


def differentiated_once(backward: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a ``backward`` in closed form, which autograd cannot differentiate: DvqError if it is asked
    to."""

    @wraps(backward)
    def checked(*args: P.args, **named: P.kwargs) -> R:
        if torch.is_grad_enabled():  # create_graph=True
            raise DvqError(
                "the fast forms have no second derivatives; set latents.plain = True and output_head: transposed, "
                "whose equations torch differentiates as often as it is asked to"
            )
        return backward(*args, **named)

    return checked


def categorical_kl(logits: Tensor, log_prior: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_c q_c (log q_c − log p_c) [nats]: (K, N, C), (K, C) → (K, N)."""
    log_q = logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_prior.unsqueeze(1))).sum(-1)


def tiles(v: Tensor, codes: int) -> Iterator[tuple[slice, slice]]:
    """Places in v (K, N, D) whose logits (·, ·, C) have TILE elements at most: some rows of a codebook, or
    several codebooks whole. In the order in which noise is drawn."""
    count, rows, _ = v.shape
    tile = max(1, TILE["cuda" if v.is_cuda else "cpu"] // codes)
    several = max(1, tile // rows)
    for k in range(0, count, several):
        for start in range(0, rows, tile):
            yield slice(k, k + several), slice(start, start + tile)


class Logits:
    """l in tiles, each a single product: l = [v, 1]·[2sM, −s‖m‖²]ᵀ, and log q with another column."""

    def __init__(self, v: Tensor, codebook: Tensor, scale: float, log_sum: Tensor | None = None) -> None:
        (count, _, width), shape = codebook.shape, tuple(v.shape)
        if v.ndim != 3 or (shape[0], shape[2]) != (count, width):
            raise DvqError(f"encodings are (K, N, D), here ({count}, N, {width}); these are {shape}")
        ones, norms = v.new_ones(*v.shape[:2], 1), codebook.square().sum(-1, keepdim=True)
        left, right = [v, ones], [2 * scale * codebook, -scale * norms]
        if log_sum is not None:
            left, right = [*left, log_sum.unsqueeze(-1)], [*right, norms.new_full(norms.shape, -1)]
        self.left, self.right = torch.cat(left, -1), torch.cat(right, -1).mT

    def __getitem__(self, at: tuple[slice, slice]) -> Tensor:
        # never TF32, not even in backward passes: an error in the exponent multiplies q
        with tensor_float32(False, self.left.device):
            return torch.bmm(self.left[at], self.right[at[0]])


def above_underflow(logits: Tensor) -> Tensor:
    """On a CPU, raise logits, less their largest, to ``LOWEST`` in place.

    A trained posterior rules most codes out, and MKL takes 10 to 40 times as long for an exp that underflows. e⁻⁸⁷,
    1.6·10⁻³⁸, is lost in every sum as 0 would be.
    """
    return logits if logits.is_cuda else logits.clamp_(min=LOWEST)


def softmax_terms(
    logits: Tensor, log_prior: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w = exp(l − max l), its sum, log Σ exp l, and KL(q ‖ p), for a tile; ``logits`` is overwritten.

        KL = (Σ w·l − Σ w·log p)/Σ w − log Σ w,  l less its largest

    Args:
        logits: (K, N, C); log_prior: (K, C); out: (K, N, C), where to put w.

    Returns:
        (K, N, C), (K, N), (K, N) and (K, N).
    """
    top = logits.amax(-1, keepdim=True)
    logits -= top
    weights = torch.exp(above_underflow(logits), out=out)
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
        log_sum, kl: (K, N), log Σ exp l and KL(q ‖ p), by :func:`softmax_terms`.
        g_codes: (K, C, D), what the sample itself gives M.
        sample_gradient: g_s of a tile, from its place, its q and all of g_M, to which it may add.
    """
    g_v, g_m = torch.empty_like(v), torch.zeros_like(codebook)
    q_sums, l_sums = torch.zeros_like(log_prior), torch.zeros_like(log_prior)
    make = Logits(v, codebook, scale, log_sum)
    for at in tiles(v, codebook.shape[1]):
        ks = at[0]
        ratio = above_underflow(make[at])  # log q
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
