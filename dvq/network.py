"""The network: encoder and decoder.

Source: "Continuous Relaxation Training of Discrete Latent Variable Image Models" (NeurIPS 2017 workshop on
Bayesian Deep Learning); the residual blocks are those of van den Oord et al. 2017, section 4.1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dvq import DvqError
from dvq.likelihood import VALUES, plain_nll, tiled_nll
from dvq.trial import Trial

Weigh = Callable[[Tensor], Tensor]


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization whose means and variances may be fixed: training is then as evaluation."""

    fixed = False

    def train(self, mode: bool = True) -> "BatchNorm":
        return super().train(mode and not self.fixed)


def _norm(trial: Trial) -> nn.Module:
    return BatchNorm(trial.features) if trial.normalization == "batch" else nn.Identity()


class Residual(nn.Module):
    """h + 1×1(ReLU(3×3(ReLU(h)))), both convolutions with batch normalization where the trial has it."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        f, bias = trial.features, trial.normalization == "none"
        self.body = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(f, f, 3, padding=1, bias=bias),
            _norm(trial),
            nn.ReLU(inplace=True),
            nn.Conv2d(f, f, 1, bias=bias),
            _norm(trial),
        )

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.body(h)
        return out


class _Network(nn.Module):
    mixed = False
    """whether the convolutions are in bfloat16 in training"""

    def autocast(self, like: Tensor) -> torch.autocast:
        if torch.is_autocast_enabled(like.device.type):
            raise DvqError(
                "torch.autocast around a loss rounds the posterior too: leave it out, and call model.mix(True) for "
                "bfloat16 where it does no harm"
            )
        mixed = self.mixed and self.training
        # no cache: an autocast around the whole training would keep it over all steps, with the first step's weights
        return torch.autocast(like.device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


class Encoder(_Network):
    """Images (B, H, W, 3) uint8 → v (K, N, D): two 4×4 convolutions of stride 2, then residual blocks."""

    def __init__(self, trial: Trial, encodings: int) -> None:
        super().__init__()
        f, bias = trial.features, trial.normalization == "none"
        self.num_latents, self.positions = trial.num_latents, trial.positions
        self.body = nn.Sequential(
            nn.Conv2d(trial.image_shape[-1], f, 4, stride=2, padding=1, bias=bias),
            _norm(trial),
            nn.ReLU(inplace=True),
            nn.Conv2d(f, f, 4, stride=2, padding=1, bias=bias),
            _norm(trial),
            *(Residual(trial) for _ in range(trial.residual_blocks)),
            nn.ReLU(),
            nn.Conv2d(f, trial.num_latents * trial.code_dim * encodings, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = images.to(next(self.parameters()).dtype, copy=True).div_(127.5).sub_(1)
        x = x.permute(0, 3, 1, 2)  # (B, 3, H, W), stored NHWC
        with self.autocast(x):
            v: Tensor = self.body(x).permute(0, 2, 3, 1).to(x.dtype)  # (B, H/4, W/4, K·D)
        return v.reshape(len(images) * self.positions, self.num_latents, -1).transpose(0, 1)  # (K, N, D)


class Decoder(_Network):
    """Code vectors (K, N, D) → 256 logits for each sub-pixel, by the encoder mirrored."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        f, bias = trial.features, trial.normalization == "none"
        self.grid, logits = trial.grid, trial.image_shape[-1] * VALUES
        self.shape = trial.num_latents, trial.code_dim
        self.body = nn.Sequential(
            nn.Conv2d(trial.num_latents * trial.code_dim, f, 1, bias=bias),
            _norm(trial),
            *(Residual(trial) for _ in range(trial.residual_blocks)),
            nn.ReLU(),
            nn.ConvTranspose2d(f, f, 4, stride=2, padding=1, bias=bias),
            _norm(trial),
            nn.ReLU(inplace=True),
        )
        self.last: nn.Module
        self.head: nn.Linear | None
        if trial.output_head == "1x1":
            up = nn.ConvTranspose2d(f, f, 4, stride=2, padding=1, bias=bias)
            self.last = nn.Sequential(up, _norm(trial), nn.ReLU(inplace=True))
            self.head = nn.Linear(f, logits)
        else:
            self.last = nn.ConvTranspose2d(f, logits, 4, stride=2, padding=1)
            self.head = None

    def hidden(self, vectors: Tensor) -> Tensor:
        """What the head sees, (B, H·W, F); the logits themselves, (B, H·W, 3·256), where there is no head."""
        k, _, d = vectors.shape
        h = vectors.transpose(0, 1).reshape(-1, *self.grid, k * d).permute(0, 3, 1, 2)
        with self.autocast(h):
            h = self.last(self.body(h)).permute(0, 2, 3, 1)  # (B, H, W, F)
        return h.flatten(1, 2)

    def forward(self, vectors: Tensor) -> Tensor:
        """(K, N, D) → (B, H·W, 3·256) logits."""
        hidden = self.hidden(vectors)
        return hidden if self.head is None else self.head(hidden)

    def nll(self, vectors: Tensor, images: Tensor, weigh: Weigh | None) -> tuple[Tensor, Tensor]:
        """Σ_b w_b·(−log p(x_b|z_b)) [nats] to differentiate, and −log p(x|z) of each image's channels, (B, 3).

        ``weigh`` makes the constants w (B,) from −log p(x|z) (B,); without it they are 1.

        Raises:
            DvqError: vectors of another shape, or of another number of images.
        """
        k, d = self.shape
        right = (k, len(images) * math.prod(self.grid), d)
        if vectors.shape != right:
            raise DvqError(
                f"the decoder takes vectors (K, N, D), here {right} for {len(images)} images; these are "
                f"{tuple(vectors.shape)}"
            )
        hidden, pixels = self.hidden(vectors), images.flatten(1, 2)
        if self.head is None:
            nll = plain_nll(hidden.to(vectors.dtype), pixels)
            weights = weigh(nll.detach().sum(1)) if weigh else torch.ones_like(nll[:, 0])
            return (nll.sum(1) * weights).sum(), nll.detach()
        head = self.head.weight, self.head.bias
        if weigh is None:
            return tiled_nll(hidden, *head, pixels)
        with torch.no_grad():
            weights = weigh(tiled_nll(hidden, *head, pixels)[1].sum(1))
        return tiled_nll(hidden, *head, pixels, weights)
