"""A trial's encoder, latent variables and decoder, and what one does with a trained one."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dvq import inputs
from dvq.device import exact
from dvq.latents import per_image
from dvq.likelihood import VALUES
from dvq.network import BatchNorm, Decoder, Encoder, Weigh
from dvq.trial import Trial

P = ParamSpec("P")
R = TypeVar("R")
Images = Tensor | NDArray[np.uint8]


def in_evaluation(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: the function of a model runs in evaluation mode, without gradients, and in the model's own
    precision: no autocast, and :func:`dvq.device.exact`. Afterwards, whatever it raises, the model and its parts are
    in the modes they were in before."""

    @wraps(function)
    def evaluated(*args: P.args, **named: P.kwargs) -> R:
        model = args[0] if args else named["model"]
        assert isinstance(model, nn.Module)
        modes = {part: part.training for part in model.modules()}
        model.eval()
        try:
            kind = next(model.parameters()).device.type
            with exact(), torch.no_grad(), torch.autocast(kind, enabled=False):
                return function(*args, **named)
        finally:
            for part, mode in modes.items():
                part.training = mode

    return evaluated


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

        Raises:
            DvqError: other images (as numbers from 0 to 1, say, nearly all would be the pixel value 0), or other
                vectors.
        """
        images = inputs.images(images, self.trial, vectors.device)
        total, nll = self.decoder.nll(vectors, images, weigh)
        return total, nll.sum(1)

    @torch.no_grad()
    def channel_distortions(self, vectors: Tensor, images: Tensor) -> Tensor:
        """−log p(x|z) of each image and colour channel [nats]: (K, N, D), (B, H, W, 3) → (B, 3)."""
        return self.decoder.nll(vectors, images, None)[1]

    @in_evaluation
    def encode(self, images: Images, generator: torch.Generator | None = None) -> Tensor:
        """One sample z ~ q(z|x); for VQ-VAE the nearest codes.

        Args:
            images: (B, H, W, 3) uint8, a tensor or a numpy array on any device.
            generator: of the samples, on the model's device; None: torch's own (``torch.manual_seed``).

        Returns:
            codes (B, H/4, W/4, K), int64, 0 to C − 1.

        Raises:
            DvqError: other images, or a model whose latent variables are continuous.
        """
        inputs.discrete(self.trial)
        codes = torch.cat([sample.codes for _, sample in self._samples(images, generator)], 1)
        return codes.T.contiguous().unflatten(0, (-1, *self.trial.grid))

    @in_evaluation
    def log_posterior(self, images: Images) -> Tensor:
        """log q(z|x) of every code [nats]: images (B, H, W, 3) uint8 → (B, H/4, W/4, K, C).

        The most probable codes are not draws from q: their distortion plus q's KL is no ELBO.

        Raises:
            DvqError: other images, or a model whose posterior has no such probabilities (VQ-VAE, FSQ, Gaussian).
        """
        trial = inputs.stochastic(self.trial)
        checked = inputs.images(images, trial, self._device()).split(trial.images_at_once)
        logits = torch.cat([self.latents.logits(self.encoder(piece)) for piece in checked], 1)  # (K, N, C)
        return logits.log_softmax(-1).transpose(0, 1).unflatten(0, (-1, *trial.grid))

    @in_evaluation
    def decode(self, codes: Tensor | NDArray[np.integer]) -> Tensor:
        """The mean of p(x|z), rounded: codes (B, H/4, W/4, K), 0 to C − 1 → images (B, H, W, 3) uint8.

        Raises:
            DvqError: other codes, or a model whose latent variables are continuous.
        """
        checked = inputs.codes(codes, self.trial, self._device())
        pieces = checked.split(self.trial.images_at_once)
        return torch.cat([self._mean_image(self.latents.vectors(piece.flatten(0, 2).T)) for piece in pieces])

    @in_evaluation
    def vectors(self, codes: Tensor | NDArray[np.integer]) -> Tensor:
        """What the codes stand for: codes (B, H/4, W/4, K), 0 to C − 1 → their vectors (B, H/4, W/4, K, D).

        Raises:
            DvqError: other codes, or a model whose latent variables are continuous.
        """
        checked = inputs.codes(codes, self.trial, self._device())
        vectors: Tensor = self.latents.vectors(checked.flatten(0, 2).T)
        return vectors.transpose(0, 1).contiguous().unflatten(0, (-1, *self.trial.grid))

    @in_evaluation
    def decode_vectors(self, vectors: Tensor | NDArray[np.floating]) -> Tensor:
        """The mean of p(x|z), rounded, of any vectors, between codes too: (B, H/4, W/4, K, D) → uint8 (B, H, W, 3).

        Raises:
            DvqError: numbers of another shape, or integers.
        """
        checked = inputs.vectors(vectors, self.trial, next(self.parameters()))
        pieces = checked.split(self.trial.images_at_once)
        return torch.cat([self._mean_image(piece.flatten(0, 2).transpose(0, 1)) for piece in pieces])

    @in_evaluation
    def reconstruct(self, images: Images, generator: torch.Generator | None = None) -> Tensor:
        """``decode(encode(images, generator))``, of continuous latent variables too: uint8 (B, H, W, 3) → like it."""
        pieces = [self._mean_image(sample.vectors) for _, sample in self._samples(images, generator)]
        return torch.cat(pieces)

    @in_evaluation
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The mean of p(x|z) for ``n`` ≥ 1 draws z ~ p(z), rounded: uint8 (n, H, W, 3)."""
        generator = inputs.generator(generator, self._device())
        vectors = self.latents.prior_sample(inputs.count(n, "sample: n") * self.trial.positions, generator)
        return self._mean_image(vectors)

    @in_evaluation
    def bits_per_dim(self, images: Images, generator: torch.Generator | None = None) -> Tensor:
        """(distortion + rate) / (H·W·3 ln 2) of each image, by one hard sample: uint8 (B, H, W, 3) → (B,)."""
        nats = [
            self.channel_distortions(sample.vectors, piece).sum(1) + per_image(sample.rate, len(piece))
            for piece, sample in self._samples(images, generator)
        ]
        return torch.cat(nats) * self.trial.bits_per_nat

    def generator(self, seed: int) -> torch.Generator:
        """Random numbers for the methods here, on the model's device."""
        return torch.Generator(self._device()).manual_seed(seed)

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
