"""−log p(x|z) of the pixels: a categorical distribution over 256 values for each of the 3·32·32 sub-pixels."""

from typing import Any

import torch
from torch import Tensor

VALUES = 256
TILE = {"cpu": 256, "cuda": 8192}  # rows whose logits (× 768 floats) stay in the cache


def plain_nll(logits: Tensor, pixels: Tensor) -> Tensor:
    """−log p(x|z) = −Σ_d log softmax(l_d)[x_d] [nats], the equation as it stands.

    Args:
        logits: (B, R, 3·256) at the R = 32·32 pixels.
        pixels: (B, R, 3) uint8.

    Returns:
        (B, 3), one for each colour channel
    """
    log_p = logits.unflatten(-1, (3, VALUES)).log_softmax(-1)  # (B, R, 3, 256)
    return -log_p.gather(-1, pixels.long().unsqueeze(-1)).sum((1, 3))


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
        rows, targets = hidden.reshape(-1, features), pixels.reshape(-1, 3).long().unsqueeze(-1)
        nll = weight.new_empty(len(rows), 3)
        grad_rows = torch.empty_like(rows) if learning else rows
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        row_weights = None if image_weights is None else image_weights.repeat_interleave(per_image)
        factor = weight.to(rows.dtype)
        for start in range(0, len(rows), TILE[rows.device.type]):
            tile = slice(start, start + TILE[rows.device.type])
            flat = _affine(bias, rows[tile], factor.T)
            logits = flat.unflatten(-1, (3, VALUES))  # (rows, 3, 256)
            picked = logits.gather(-1, targets[tile])
            p = logits.softmax(-1)
            # logsumexp l = max l − log max p: one exponential a logit serves value and gradient
            log_sum = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log_()
            nll[tile] = (log_sum - picked).squeeze(-1)
            if learning:  # d(weighted nll)/d(logits) = weight · (softmax − onehot)
                grad = p.scatter_add_(-1, targets[tile], -torch.ones_like(picked)).flatten(1)
                if row_weights is not None:
                    grad *= row_weights[tile, None]
                grad_bias += grad.sum(0)
                grad = grad.to(rows.dtype)
                torch.mm(grad, factor, out=grad_rows[tile])
                grad_weight = _affine(grad_weight, grad.T, rows[tile])
        nll = nll.view(images, per_image, 3).sum(1)
        ctx.save_for_backward(grad_rows.view_as(hidden), grad_weight, grad_bias)
        ctx.mark_non_differentiable(nll)
        total = nll.sum() if image_weights is None else (nll.sum(1) * image_weights).sum()
        return total, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad * grad_weight, grad * grad_bias, None, None, None


def _affine(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias + a b, in the bias's precision, whatever the factors'."""
    if a.dtype == bias.dtype:
        return torch.addmm(bias, a, b)
    product = torch.mm(a, b, out_dtype=bias.dtype) if a.is_cuda else (a @ b).to(bias.dtype)
    return product.add_(bias)


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
