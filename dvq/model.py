"""The network: encoder, latent variables, decoder; and what one does with a trained one.

Source: "Continuous Relaxation Training of Discrete Latent Variable Image Models" (NeurIPS 2017 workshop on
Bayesian Deep Learning), section 3; the residual blocks are those of van den Oord et al. 2017, section 4.1.
"""

import operator
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq import DvqError, inputs
from dvq.latents import per_image
from dvq.likelihood import VALUES, plain_nll, tiled_nll
from dvq.trial import Trial

P = ParamSpec("P")
Weigh = Callable[[Tensor], Tensor]
Images = Tensor | NDArray[np.uint8]


class BatchNorm(nn.BatchNorm2d):
    """Batch normalization whose means and variances may be fixed: it is then in training as in evaluation."""

    fixed = False

    def train(self, mode: bool = True) -> "BatchNorm":
        return super().train(mode and not self.fixed)


def _norm(trial: Trial) -> nn.Module:
    return BatchNorm(trial.features) if trial.normalization == "batch" else nn.Identity()


def _in_evaluation(method: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The method in evaluation mode and without gradients; the model's own mode is as it was behind it."""

    @wraps(method)
    def judged(*args: P.args, **named: P.kwargs) -> Tensor:
        model = args[0]
        assert isinstance(model, nn.Module)
        modes = {part: part.training for part in model.modules()}
        model.eval()
        try:
            with torch.no_grad():
                return method(*args, **named)
        finally:
            for part, mode in modes.items():
                part.training = mode

    return judged


class Residual(nn.Module):
    """h + 1×1(ReLU(3×3(ReLU(h))))."""

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
        return torch.autocast(like.device.type, torch.bfloat16, enabled=self.mixed and self.training)


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
        """
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


class Model(nn.Module):
    """A trial's encoder, latent variables and decoder.

    Images are uint8 (B, H, W, 3), or in gray (B, H, W, 1), as the trial's data are, values 0 to 255; codes are
    integers (B, H/4, W/4, K), values 0 to C − 1. Of CIFAR-10: (B, 32, 32, 3) and (B, 8, 8, K).
    """

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial
        latents: Any = trial.latents()
        self.latents = latents
        self.encoder = Encoder(trial, latents.encodings)
        self.decoder = Decoder(trial)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def mixed(self) -> bool:
        """Whether it trains in bfloat16, as :meth:`mix` says."""
        return self.decoder.mixed

    def mix(self, mixed: bool) -> None:
        """Whether to train with the convolutions, and the factors of the head's product, in bfloat16."""
        self.encoder.mixed = self.decoder.mixed = mixed

    def fix_normalization(self, fixed: bool) -> None:
        """Whether batch normalization's means and variances stay as they are."""
        for layer in self.modules():
            if isinstance(layer, BatchNorm):
                layer.fixed = fixed
                layer.train(self.training)

    def distortion(
        self, vectors: Tensor, images: Tensor, weigh: Weigh | None = None
    ) -> tuple[Tensor, Tensor]:
        """Σ_b w_b·(−log p(x_b|z_b)) [nats], to differentiate, and −log p(x|z) of each image, detached.

        Args:
            vectors: (K, N, D), what the decoder sees.
            images: (B, H, W, 3) uint8.
            weigh: makes the constants w (B,) from −log p(x|z) (B,); None: w = 1.

        Returns:
            a scalar, and (B,).
        """
        total, nll = self.decoder.nll(vectors, images, weigh)
        return total, nll.sum(1)

    @torch.no_grad()
    def channel_distortions(self, vectors: Tensor, images: Tensor) -> Tensor:
        """−log p(x|z) of each image and colour channel [nats]: (K, N, D), (B, H, W, 3) → (B, 3)."""
        return self.decoder.nll(vectors, images, None)[1]

    @_in_evaluation
    def encode(self, images: Images, generator: torch.Generator | None = None) -> Tensor:
        """One sample z ~ q(z|x); for VQ-VAE the nearest codes.

        Args:
            images: (B, H, W, 3) uint8, a tensor or a numpy array on any device.
            generator: of the samples, on the model's device; None: one with seed 0, the same samples each time.

        Returns:
            codes (B, H/4, W/4, K), int64, 0 to C − 1.

        Raises:
            DvqError: other images, or a model whose latent variables are continuous.
        """
        inputs.discrete(self.trial)
        codes = torch.cat([sample.codes for _, sample in self._samples(images, generator)], 1)
        return codes.T.contiguous().unflatten(0, (-1, *self.trial.grid))

    @_in_evaluation
    def decode(self, codes: Tensor | NDArray[np.integer]) -> Tensor:
        """The mean of p(x|z), rounded: codes (B, H/4, W/4, K), 0 to C − 1 → images (B, H, W, 3) uint8.

        Raises:
            DvqError: other codes, or a model whose latent variables are continuous.
        """
        checked = inputs.codes(codes, self.trial, self._device())
        pieces = checked.split(self.trial.images_at_once)
        return torch.cat([self._mean_image(self.latents.vectors(piece.flatten(0, 2).T)) for piece in pieces])

    @_in_evaluation
    def reconstruct(self, images: Images, generator: torch.Generator | None = None) -> Tensor:
        """``decode(encode(images))``, of continuous latent variables too: uint8 (B, H, W, 3) → the same."""
        pieces = [self._mean_image(sample.vectors) for _, sample in self._samples(images, generator)]
        return torch.cat(pieces)

    @_in_evaluation
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The mean of p(x|z) for ``n`` ≥ 1 draws z ~ p(z), rounded: uint8 (n, H, W, 3). Without a generator the same
        draws each time."""
        if not hasattr(n, "__index__") or n < 1:
            raise DvqError(f"sample: n = {n!r}; give a whole number of at least 1")
        generator = inputs.generator(generator, self._device())
        vectors = self.latents.prior_sample(operator.index(n) * self.trial.positions, generator)
        return self._mean_image(vectors)

    @_in_evaluation
    def bits_per_dim(self, images: Images, generator: torch.Generator | None = None) -> Tensor:
        """(distortion + rate) / (H·W·3 ln 2) of each image, by one hard sample: uint8 (B, H, W, 3) → (B,)."""
        nats = [
            self.channel_distortions(sample.vectors, piece).sum(1) + per_image(sample.rate, len(piece))
            for piece, sample in self._samples(images, generator)
        ]
        return torch.cat(nats) * self.trial.bits_per_nat

    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _samples(self, images: Images, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Any]]:
        """The images, checked, in pieces, and a sample of each."""
        checked = inputs.images(images, self.trial, self._device())
        generator = inputs.generator(generator, checked.device)
        for piece in checked.split(self.trial.images_at_once):
            yield piece, self.latents.sample(self.encoder(piece), generator)

    def _mean_image(self, vectors: Tensor) -> Tensor:
        values, pieces = torch.arange(VALUES, dtype=vectors.dtype, device=vectors.device), []
        for piece in vectors.split(self.trial.images_at_once * self.trial.positions, 1):
            p = self.decoder(piece).unflatten(-1, (-1, VALUES)).softmax(-1)  # (B, H·W, 3, 256)
            pieces.append((p @ values).round().to(torch.uint8).unflatten(1, self.trial.image_shape[:2]))
        return torch.cat(pieces)
