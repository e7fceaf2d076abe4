"""−log p(x|z) of the pixels: a categorical distribution over 256 values for each of an image's H·W·3 sub-pixels."""

from typing import Any

import torch
from torch import Tensor

from dvq import DvqError
from dvq.fused import fused
from dvq.posterior import above_underflow, differentiated_once

VALUES = 256
TILE = {"cpu": 256, "cuda": 2**16}  # rows of logits (× 768 floats): a cache full; on a GPU a minibatch's
WIDE = 4096  # rows of a CPU's product in bfloat16, which is fast only where it is large


def plain_nll(logits: Tensor, pixels: Tensor) -> Tensor:
    """−log p(x|z) = −Σ_d log softmax(l_d)[x_d] [nats], the equation as it stands.

    Args:
        logits: (B, R, 3·256) at the R = H·W pixels, of gray images (B, R, 256).
        pixels: (B, R, 3) uint8, of gray images (B, R, 1).

    Returns:
        (B, 3), one for each colour channel
    """
    log_p = logits.unflatten(-1, (-1, VALUES)).log_softmax(-1)  # (B, R, 3, 256)
    return -log_p.gather(-1, pixels.long().unsqueeze(-1)).sum((1, 3))


class _Tiles:
    """The likelihood of logits, tile by tile, and the gradients by them; here is what adds up over the tiles."""

    def __init__(
        self, bias: Tensor, targets: Tensor, weights: Tensor | None, rows: Tensor, learning: bool
    ) -> None:
        self.bias, self.targets, self.weights, self.learning = bias, targets, weights, learning
        self.dtype, self.size = rows.dtype, min(TILE[rows.device.type], len(rows))
        self.nll = bias.new_empty(targets.shape[:2])
        self.grad_bias = torch.zeros_like(bias)
        self.buffer = bias.new_empty(self.size, len(bias))  # one for all tiles: it stays in the cache

    def gradient(self, rows: Tensor, weight: Tensor, start: int) -> Tensor:
        """d(weighted nll)/d(logits) of the rows from ``start`` on: (R, F), (F, 3·256) → (R, 3·256)."""
        if len(rows) <= self.size:
            logits = _product(rows, weight, self.buffer)
            return self._gradient(logits, slice(start, start + len(rows))).to(self.dtype)
        grad = rows @ weight
        for at in range(0, len(grad), self.size):
            tile = grad[at : at + self.size]
            logits = self.buffer[: len(tile)].copy_(tile)
            tile.copy_(self._gradient(logits, slice(start + at, start + at + len(tile))))
        return grad

    def _gradient(self, logits: Tensor, tile: slice) -> Tensor:
        """weight · (softmax − onehot), on a CPU in place of the logits; also stores the nll."""
        weights, targets = None if self.weights is None else self.weights[tile, None], self.targets[tile]
        if logits.is_cuda:
            if not self.learning:
                self.nll[tile] = gpu_nll(logits, self.bias, targets)
                return logits
            self.nll[tile], grad = gpu_gradient(logits, self.bias, targets, weights, self.dtype)
            # the sum over rows as a product, which reads them once
            self.grad_bias.add_(_product(grad.new_ones(8, len(grad)), grad, self.buffer)[0])
            return grad
        logits += self.bias
        self.nll[tile], p = _softmax(logits.unflatten(-1, (-1, VALUES)), targets, self.learning)
        if not self.learning:
            return logits
        p.scatter_add_(-1, targets, p.new_full((), -1).expand_as(targets))
        grad = p.flatten(1)
        if weights is not None:
            grad *= weights
        self.grad_bias.add_(grad.sum(0))
        return grad


class _TiledNLL(torch.autograd.Function):
    """Forward and backward in one pass over tiles of rows, so that the logits never exist whole."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        pixels: Tensor,
        image_weights: Tensor | None,
        learning: bool,
    ) -> tuple[Tensor, Tensor]:
        images, per_image, features = hidden.shape
        rows, targets = hidden.reshape(-1, features), pixels.flatten(0, 1).long().unsqueeze(-1)
        row_weights = None if image_weights is None else image_weights.repeat_interleave(per_image)
        tiles = _Tiles(bias, targets, row_weights, rows, learning)
        factor = weight.to(rows.dtype)
        transposed = factor.T.contiguous()  # (F, 3·256), as the products want it, and so is its gradient
        grad_rows, grad_weight = torch.empty_like(rows) if learning else rows, torch.zeros_like(weight.T)
        wide = WIDE if rows.dtype != weight.dtype and not rows.is_cuda else tiles.size
        for start in range(0, len(rows), wide):
            piece = rows[start : start + wide]
            grad = tiles.gradient(piece, transposed, start)
            if learning:
                torch.mm(grad, factor, out=grad_rows[start : start + wide])
                _add_product(grad_weight, piece.T, grad)
        nll = tiles.nll.unflatten(0, (images, per_image)).sum(1)
        ctx.save_for_backward(grad_rows.view_as(hidden), grad_weight.T, tiles.grad_bias)
        ctx.mark_non_differentiable(nll)
        ctx.spent = False
        total = nll.sum() if image_weights is None else (nll.sum(1) * image_weights).sum()
        return total, nll

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise DvqError(
                "the likelihood's gradient is kept for one backward pass; compute the loss again before the next, or "
                "set output_head: transposed"
            )
        ctx.spent = True
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad * grad_weight, grad * grad_bias, None, None, None


def _softmax(logits: Tensor, targets: Tensor, learning: bool) -> tuple[Tensor, Tensor]:
    """−log softmax(l)[targets], and, if ``learning``, softmax(l), computed in place of l.

    (R, 3, 256), (R, 3, 1) → (R, 3), (R, 3, 256)
    """
    logits -= logits.amax(-1, keepdim=True)
    picked = logits.gather(-1, targets)
    total = above_underflow(logits).exp_().sum(-1, keepdim=True)
    if learning:
        logits *= total.reciprocal()
    return (total.log_() - picked).squeeze(-1), logits


def gpu_nll(logits: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(l + b)[targets]: (R, 3·256), (3·256,), (R, 3, 1) → (R, 3)."""
    log_p = (logits + bias).unflatten(-1, (-1, VALUES)).log_softmax(-1)
    return -log_p.gather(-1, targets).squeeze(-1)


@fused
def gpu_gradient(
    logits: Tensor, bias: Tensor, targets: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """:func:`gpu_nll`, and its gradient by l, weight · (softmax(l + b) − onehot), (R, 3·256), as ``dtype``."""
    log_p = (logits + bias).unflatten(-1, (-1, VALUES)).log_softmax(-1)
    hit = torch.arange(VALUES, device=logits.device) == targets  # (R, 3, 256)
    grad = (log_p.exp() - hit.to(log_p.dtype)).flatten(1)
    grad = grad if weights is None else grad * weights
    return -torch.where(hit, log_p, 0.0).sum(-1), grad.to(dtype)


def _product(a: Tensor, b: Tensor, buffer: Tensor) -> Tensor:
    """a b in the buffer's precision, whatever the factors'; written to the buffer if theirs is the same."""
    if a.dtype == buffer.dtype:
        return torch.mm(a, b, out=buffer[: len(a)])
    return torch.mm(a, b, out_dtype=buffer.dtype) if a.is_cuda else (a @ b).to(buffer.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b, total)


def tiled_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, image_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ_b w_b·(−log p(x_b|z_b)) [nats] to differentiate, and −log p(x_b|z_b) of each channel, detached.

    :func:`plain_nll` of the logits W h + b, and a weighted sum; but each tile of rows goes forward and
    backward while its logits are in the cache, which is faster on a CPU and takes a fraction of the memory.

    Args:
        hidden: (B, R, F), the decoder's last features; where they are bfloat16 the products' factors are too,
            and logits, likelihood and sums float32.
        weight: (3·256, F); bias: (3·256,).
        pixels: (B, R, 3) uint8.
        image_weights: (B,), constants; None for ones.

    Returns:
        a scalar, and (B, 3).
    """
    learning = torch.is_grad_enabled()
    total, nll = _TiledNLL.apply(hidden, weight, bias, pixels, image_weights, learning)  # type: ignore[no-untyped-call]
    return total, nll
