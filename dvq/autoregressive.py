"""An autoregressive prior for the codes of a trained model, in place of the factorial one.

    log r(z) = Σ_p Σ_k log r(z_pk | z_<p, z_p,<k),  positions p row by row, latent variables k in their order

A causal transformer reads the codes of earlier positions (van den Oord et al. 2017, section 3.3, use a PixelCNN), and
a small network for each k reads those of the latent variables before it at the same position.

    rate = E_q[log q(z|x) − log r(z)],

so distortion + rate is −ELBO under r, as it is under p. The model is not changed: r is trained only on the model's
codes of the training images.

Shapes: B images, P = H/4·W/4 positions, K latent variables a position, C categories.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Generator, Tensor, nn

from dvq import DvqError, inputs, saved
from dvq.device import exact
from dvq.minutely import Minutely
from dvq.model import Model, in_evaluation
from dvq.randomness import minibatch, noise, seeded

WIDTH, LAYERS, HEADS = 128, 4, 4
FILE = "prior.safetensors"


class Autoregressive(nn.Module):
    """r(z), initialized as the model's own factorial prior.

    Args:
        model: the model whose codes it is a prior for; DvqError if its latent variables are continuous.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        inputs.discrete(model.trial)
        self.trial = model.trial
        log_prior = model.latents.log_prior().detach()
        k, c = log_prior.shape
        self.before = nn.Embedding(k * c, WIDTH)  # of a code, as later positions see it
        self.beside = nn.Embedding(k * c, WIDTH)  # as later latent variables at its own position see it
        self.place = nn.Parameter(0.02 * torch.randn(model.trial.positions, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.hidden = nn.Linear(WIDTH, k * WIDTH)
        self.out = nn.Parameter(torch.zeros(k, WIDTH, c))
        self.bias = nn.Parameter(log_prior.clone().unsqueeze(1))
        self.register_buffer("first", c * torch.arange(k), persistent=False)
        self.first: Tensor  # where the embeddings of each k begin
        self.to(log_prior)

    def context(self, codes: Tensor) -> Tensor:
        """What each position sees of the earlier ones: (B, p, K) → (B, p, WIDTH)."""
        embedded = self.before(codes + self.first).sum(2)
        embedded = (
            torch.cat([torch.zeros_like(embedded[:, :1]), embedded[:, :-1]], 1) + self.place[: codes.shape[1]]
        )
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1], embedded.device, embedded.dtype)
        context: Tensor = self.body(embedded, mask=mask, is_causal=True)
        return context

    def logits(self, context: Tensor, codes: Tensor) -> Tensor:
        """The logits of every latent variable, given those before it: (B, p, WIDTH), (B, p, K) → (K, B·p, C)."""
        beside = self.beside(codes + self.first)
        before = beside.cumsum(2) - beside
        hidden = nn.functional.gelu(self.hidden(context).unflatten(-1, before.shape[2:]) + before)
        return torch.baddbmm(self.bias, hidden.flatten(0, 1).transpose(0, 1), self.out)

    def forward(self, codes: Tensor) -> Tensor:
        """log r(z) [nats] of each image: (B, H/4, W/4, K) → (B,)."""
        codes = codes.flatten(1, 2)
        with torch.autocast(codes.device.type, enabled=False):
            logits = self.logits(self.context(codes), codes)
        targets = codes.flatten(0, 1).T.flatten()  # (K·B·P,)
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        return -nats.unflatten(0, (-1, *codes.shape[:2])).sum((0, 2))

    @in_evaluation
    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """``n`` draws z ~ r(z), (n, H/4, W/4, K), for the model's ``decode``."""
        device = self.place.device
        generator = inputs.generator(generator, device)
        shape = inputs.count(n, "sample: n"), self.trial.positions, self.trial.num_latents
        codes = torch.zeros(shape, dtype=torch.long, device=device)
        for p in range(codes.shape[1]):
            context = self.context(codes[:, : p + 1])[:, -1:]
            for k in range(codes.shape[2]):
                q = self.logits(context, codes[:, p : p + 1])[k].softmax(-1)
                codes[:, p, k] = q.multinomial(1, generator=generator).squeeze(-1)
        return codes.unflatten(1, self.trial.grid)


def fit(
    model: Model,
    training: NDArray[np.uint8],
    steps: int = 5000,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
) -> Autoregressive:
    """The prior that maximizes log r(z), z ~ q(z|x) (VQ-VAE's nearest codes), over the training images.

    By Adam, whose learning rate falls linearly to 0.

    Args:
        model: a trained model, which is not changed.
        training: the images (N, H, W, 3) uint8 that it was trained on.
        steps, batch_size: 1 or more.

    Raises:
        DvqError: no images, or others; a number below 1; or a model whose latent variables are continuous.
    """
    steps, batch_size = inputs.count(steps, "steps"), inputs.count(batch_size, "batch_size")
    training = inputs.arrays(training, model.trial, "the training images")
    full = torch.autocast(model.generator(0).device.type, enabled=False)  # for the backward pass too
    with exact(), torch.inference_mode(False), torch.enable_grad(), full:
        with seeded(seed):
            prior = Autoregressive(model)
        optimizer = torch.optim.Adam(prior.parameters(), lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
        minutely = Minutely()
        for step in range(steps):
            images = training[minibatch(step, batch_size, len(training), seed)]
            generator, at_once = noise(seed, step, prior.place.device), model.trial.images_at_once
            for start in range(0, batch_size, at_once):  # so that memory does not grow with image size
                codes = model.encode(images[start : start + at_once], generator)
                (-prior(codes).sum() / batch_size).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            minutely.say(f"autoregressive prior: {step + 1:,} of {steps:,} steps")
    return prior.eval()


def save(prior: Autoregressive, folder: Path | str) -> None:
    """Write the prior (prior.safetensors, its SHA-256 in it) to ``folder``, in which its model is."""
    saved.write_weights(prior, Path(folder) / FILE)


def load(path: str | Path) -> Autoregressive:
    """The prior beside a trained model, in evaluation mode, on the CPU.

    Args:
        path: where the model is, as for :func:`dvq.load`.

    Raises:
        DvqError: there is no model or no prior, or one of them is damaged.
    """
    folder = saved.find(path)
    with seeded(0):
        prior = Autoregressive(saved.load(folder))
    if not (folder / FILE).is_file():
        raise DvqError(f"{folder}: no autoregressive prior here: a sweep with autoregressive_steps fits one")
    try:
        saved.read_weights(prior, folder / FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise saved.damaged(folder, error) from None
    return prior.eval()
