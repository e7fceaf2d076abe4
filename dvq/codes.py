"""What is done code by code: look-ups, counts and sums, the rotation trick, and k-means."""

from typing import Any

import torch
from torch import Generator, Tensor

ITERATIONS = 10
"""of k-means"""


def largest(terms: Tensor) -> Tensor:
    """The index of each row's maximum (of equal ones the first): (…, C) → (…). On a CPU numpy takes a tenth of
    PyTorch's time."""
    if terms.is_cuda:
        return terms.argmax(-1)
    return torch.from_numpy(terms.numpy().argmax(-1))


def code_sums(terms: Tensor, codes: Tensor, count: int) -> Tensor:
    """Σ of the terms of each code: (K, N, D), (K, N) → (K, C, D)."""
    if terms.is_cuda:
        return ordered_code_sums(terms, codes, count)
    sums = terms.new_zeros(len(terms), count, terms.shape[-1])
    return sums.scatter_add_(1, codes.unsqueeze(-1).expand_as(terms), terms)


def ordered_code_sums(terms: Tensor, codes: Tensor, count: int) -> Tensor:
    """The same for a GPU, where ``scatter_add_`` adds in an order that changes from run to run: products with
    the codes' one-hot rows, one codebook at a time."""
    every = torch.arange(count, device=codes.device).unsqueeze(1)
    return torch.stack([(every == z).to(t.dtype) @ t for z, t in zip(codes, terms, strict=True)])


def code_counts(codes: Tensor, count: int) -> Tensor:
    """How often each code occurs: (K, N) → (K, C), integers."""
    return codes.new_zeros(len(codes), count).scatter_add_(1, codes, torch.ones_like(codes))


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.count = table.shape[1]
        return table.gather(1, codes.unsqueeze(-1).expand(-1, -1, table.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return code_sums(grad.contiguous(), ctx.saved_tensors[0], ctx.count), None


def look_up(table: Tensor, codes: Tensor) -> Tensor:
    """table[k, codes]: (K, C, D), (K, N) → (K, N, D); its gradient is :func:`code_sums`."""
    vectors: Tensor = _LookUp.apply(table, codes)  # type: ignore[no-untyped-call]
    return vectors


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(v, codes)
        return codes.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        v, codes = ctx.saved_tensors
        least = torch.finfo(v.dtype).tiny
        v_norm, norm = v.norm(dim=-1, keepdim=True), codes.norm(dim=-1, keepdim=True)
        e, q = v / v_norm.clamp(min=least), codes / norm.clamp(min=least)
        r = e + q
        r = r / r.norm(dim=-1, keepdim=True).clamp(min=least)
        turned = grad - 2 * _dot(r, grad) * r + 2 * _dot(q, grad) * e  # Rᵀg
        return torch.where(v_norm > least, norm / v_norm.clamp(min=least) * turned, grad), None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def rotated(v: Tensor, codes: Tensor) -> Tensor:
    """The codes q, as λRv with constants λ = ‖q‖/‖v‖ and R, the rotation of v to q: both (…, D) → (…, D).

        R = I − 2rrᵀ + 2q̂êᵀ,  ê = v/‖v‖,  q̂ = q/‖q‖,  r = (ê + q̂)/‖ê + q̂‖

    The gradient of v is λRᵀ times that of the result; where v = 0, and so has no direction, it is the result's
    gradient itself.

    Source: Fifty et al. 2025, "Restructuring Vector Quantization with the Rotation Trick", section 4.2.
    """
    found: Tensor = _Rotated.apply(v, codes.detach())  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def kmeans(v: Tensor, codes: int, generator: Generator) -> Tensor:
    """Lloyd's k-means of each codebook's encodings, N ≥ C, from centers drawn among them: (K, N, D) → (K, C, D)."""
    k, n, d = v.shape
    order = torch.stack([torch.randperm(n, generator=generator, device=v.device)[:codes] for _ in range(k)])
    centers = v.gather(1, order.unsqueeze(-1).expand(-1, -1, d))
    for _ in range(ITERATIONS):
        # (K, N), one codebook at a time, since (N, C) distances may take a gigabyte
        nearest = torch.stack([torch.cdist(*pair).argmin(-1) for pair in zip(v, centers, strict=True)])
        sums = code_sums(v, nearest, codes)
        counts = code_counts(nearest, codes).unsqueeze(-1)
        centers = torch.where(counts > 0, sums / counts, centers)
    return centers
