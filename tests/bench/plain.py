"""The same models as one first writes them in PyTorch: what ``make bench`` compares ``dvq`` with.

NCHW, distances by a matrix product, ``gumbel_softmax``, ``Categorical``, ``cross_entropy`` on the whole logits. Each
estimator is a function of the network and the images that gives each image's surrogate, (B,) [nats].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from vector_quantize_pytorch import VectorQuantize

from dvq.trial import Trial

P = 64  # positions


class Plain(nn.Module):
    """The encoder, the decoder and the parameters of the latent variables."""

    def __init__(self, one: Trial) -> None:
        super().__init__()
        self.estimator, f = one.estimator, one.features
        self.k, self.d, self.c = one.num_latents, one.code_dim, getattr(one, "num_codes", 1)
        width, self.encodings = self.k * self.d, 2 if one.estimator == "gaussian" else 1
        self.encoder = nn.Sequential(
            nn.Conv2d(3, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU(),
            nn.Conv2d(f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f),
            *(Residual(f) for _ in range(one.residual_blocks)),
            nn.ReLU(), nn.Conv2d(f, width * self.encodings, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(width, f, 1, bias=False), nn.BatchNorm2d(f),
            *(Residual(f) for _ in range(one.residual_blocks)),
            nn.ReLU(), nn.ConvTranspose2d(f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f),
            nn.ReLU(), nn.ConvTranspose2d(f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f),
            nn.ReLU(), nn.Conv2d(f, 768, 1),
        )  # fmt: skip
        self.book = nn.Parameter(torch.randn(self.k, self.c, self.d), one.estimator not in ("vq-ema", "fsq"))
        self.prior = nn.Parameter(torch.zeros(self.k, self.c))
        self.register_buffer("levels", torch.tensor(getattr(one, "levels", ())))
        self.register_buffer("counts", torch.ones(self.k, self.c))
        self.register_buffer("sums", self.book.detach().clone())
        self.baseline = nn.Sequential(nn.Linear(width, 100), nn.Tanh(), nn.Linear(100, 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return PLAIN[self.estimator](self, images)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 32, 32, 3) → v (K, B·P, D)."""
        h = self.encoder(images.permute(0, 3, 1, 2).float() / 127.5 - 1)
        d = self.d * self.encodings
        return h.view(-1, self.k, d, P).permute(1, 0, 3, 2).reshape(self.k, -1, d)

    def nll(self, z: Tensor, images: Tensor) -> Tensor:
        """−log p(x|z): (K, B·P, D), (B, 32, 32, 3) → (B,)."""
        h = z.view(self.k, -1, P, self.d).permute(1, 0, 3, 2).reshape(-1, self.k * self.d, 8, 8)
        logits = self.decoder(h).view(-1, 3, 256, 32, 32).transpose(1, 2)  # (B, 256, 3, 32, 32)
        return F.cross_entropy(logits, images.permute(0, 3, 1, 2).long(), reduction="none").sum((1, 2, 3))

    def distances(self, v: Tensor) -> Tensor:
        """‖v − m‖²: (K, N, D) → (K, N, C)."""
        m = self.book
        return v.square().sum(-1, keepdim=True) - 2 * v @ m.mT + m.square().sum(-1)[:, None]

    def codes(self, z: Tensor) -> Tensor:
        """M[z]: (K, N) → (K, N, D)."""
        return self.book.gather(1, z.unsqueeze(-1).expand(-1, -1, self.d))

    def log_p(self, z: Tensor) -> Tensor:
        """log p(z) of each image: (…, K, B·P) → (…, B)."""
        log_prior = self.prior.log_softmax(-1)
        return per_image(log_prior.expand(*z.shape[:-1], self.c).gather(-1, z))


class Residual(nn.Sequential):
    def __init__(self, f: int) -> None:
        super().__init__(
            nn.ReLU(), nn.Conv2d(f, f, 3, padding=1, bias=False), nn.BatchNorm2d(f),
            nn.ReLU(), nn.Conv2d(f, f, 1, bias=False), nn.BatchNorm2d(f),
        )  # fmt: skip

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


def per_image(terms: Tensor) -> Tensor:
    """Sums over an image's latent variables: (…, K, B·P) → (…, B)."""
    return terms.unflatten(-1, (-1, P)).sum((-3, -1))


def gumbel_softmax(net: Plain, images: Tensor, hard: bool) -> Tensor:
    logits = -net.distances(net.encode(images))
    log_q = logits.log_softmax(-1)
    kl = (log_q.exp() * (log_q - net.prior.log_softmax(-1)[:, None])).sum(-1)
    return net.nll(F.gumbel_softmax(logits, tau=0.5, hard=hard) @ net.book, images) + per_image(kl)


def reinmax(net: Plain, images: Tensor) -> Tensor:
    logits = -net.distances(net.encode(images))
    log_q = logits.log_softmax(-1)
    q, log_prior = log_q.exp(), net.prior.log_softmax(-1)[:, None]
    onehot = F.one_hot(Categorical(probs=q.detach()).sample(), net.c).float()
    middle = ((((q + onehot) / 2).log() - logits).detach() + logits).softmax(-1)
    y = 2 * middle - q / 2
    y = y - y.detach() + onehot
    return net.nll(y @ net.book, images) + per_image((q * (log_q - log_prior)).sum(-1))


def vimco(net: Plain, images: Tensor, samples: int = 4) -> Tensor:
    posterior = Categorical(logits=-net.distances(net.encode(images)))
    z = posterior.sample((samples,))  # (S, K, N)
    log_q, log_p = per_image(posterior.log_prob(z)), net.log_p(z)  # (S, B)
    nll = net.nll(torch.cat([net.codes(each) for each in z], 1), images.repeat(samples, 1, 1, 1))
    w = log_p - log_q - nll.view(samples, -1)
    with torch.no_grad():
        others = (w.sum(0) - w) / (samples - 1)
        without = [torch.cat([w[:s], others[s : s + 1], w[s + 1 :]]).logsumexp(0) for s in range(samples)]
        signal = w.logsumexp(0) - torch.stack(without)
    return -(signal * log_q).sum(0) - (w.softmax(0).detach() * w).sum(0)


def rloo(net: Plain, images: Tensor, samples: int = 4) -> Tensor:
    posterior = Categorical(logits=-net.distances(net.encode(images)))
    z = posterior.sample((samples,))  # (S, K, N)
    log_q, log_p = per_image(posterior.log_prob(z)), net.log_p(z)  # (S, B)
    nll = net.nll(torch.cat([net.codes(each) for each in z], 1), images.repeat(samples, 1, 1, 1))
    nll = nll.view(samples, -1)
    w = (log_p - log_q - nll).detach()
    signal = w - (w.sum(0) - w) / (samples - 1)
    return (nll - log_p - signal * log_q).mean(0)


def nvil(net: Plain, images: Tensor) -> Tensor:
    v = net.encode(images)
    damped = v.detach() + (v - v.detach()) / net.variance.sqrt().clamp(min=1)
    posterior = Categorical(logits=-net.distances(damped))
    z = posterior.sample()
    log_q, log_p, nll = per_image(posterior.log_prob(z)), net.log_p(z), net.nll(net.codes(z), images)
    x = v.detach().view(net.k, -1, P, net.d).mean(2).transpose(0, 1).flatten(1)
    rest = (log_p - log_q - nll).detach() - net.baseline(x).squeeze(-1)
    signal = (rest - net.mean).detach()
    fit = (rest - net.mean.clone()).square()
    with torch.no_grad():
        net.mean.lerp_(rest.mean(), 0.1)
        net.variance.lerp_(rest.var(), 0.1)
    return nll - log_p - signal * log_q + fit


def nearest(net: Plain, images: Tensor, ema: bool) -> Tensor:
    v = net.encode(images)
    z = net.distances(v).argmin(-1)
    m = net.codes(z)
    terms = 0.25 * (v - m.detach()).square()
    if ema:
        with torch.no_grad():
            chosen = F.one_hot(z, net.c).float()
            net.counts.mul_(0.99).add_(chosen.sum(1), alpha=0.01)
            net.sums.mul_(0.99).add_(chosen.mT @ v, alpha=0.01)
            net.book.copy_(net.sums / (net.counts + 1e-5).unsqueeze(-1))
    else:
        terms = terms + (v.detach() - m).square()
    return net.nll(v + (m - v).detach(), images) + 3072 * terms.mean() - net.log_p(z)


def fsq(net: Plain, images: Tensor) -> Tensor:
    levels = net.levels
    half, offset = (levels - 1) * 1.001 / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(net.encode(images) + torch.atanh(offset / half)) * half - offset
    rounded = bounded + (bounded.round() - bounded).detach()
    z = ((rounded.detach().round().long() + levels // 2) * (levels.cumprod(0) // levels)).sum(-1)
    return net.nll(rounded / (levels // 2), images) - net.log_p(z)


def gaussian(net: Plain, images: Tensor) -> Tensor:
    mean, rho = net.encode(images).chunk(2, -1)
    kl = 0.5 * (mean.square() + (2 * rho).exp() - 1 - 2 * rho).sum(-1)
    return net.nll(mean + rho.exp() * torch.randn_like(mean), images) + per_image(kl)


PLAIN: dict[str, Callable[[Plain, Tensor], Tensor]] = {
    "gs-soft": partial(gumbel_softmax, hard=False),
    "gs-hard": partial(gumbel_softmax, hard=True),
    "reinmax": reinmax,
    "vimco": vimco,
    "nvil": nvil,
    "rloo": rloo,
    "vq-ema": partial(nearest, ema=True),
    "vq-loss": partial(nearest, ema=False),
    "fsq": fsq,
    "gaussian": gaussian,
}

LIBRARY: dict[str, dict[str, Any]] = {
    "vq-ema": {"decay": 0.99},
    "vq-loss": {"learnable_codebook": True, "ema_update": False},
    # its Gumbel option: one code in the decoder; no KL, ‖v − m‖ for its square, codebooks by averages
    "gs-hard": {"stochastic_sample_codes": True, "straight_through": True, "route_gradients_to_input": False},
}
"""vector-quantize-pytorch's options for an estimator, where it has them"""


class Library(Plain):
    """vector-quantize-pytorch's quantizer in the same encoder and decoder."""

    def __init__(self, one: Trial) -> None:
        super().__init__(one)
        self.quantize = VectorQuantize(
            self.k * self.d, self.c, codebook_dim=self.d, heads=self.k, separate_codebook_per_head=True,
            commitment_weight=0.25 * 3072, rotation_trick=False, **LIBRARY[one.estimator],
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        v = self.encode(images).view(self.k, -1, P, self.d)
        found, z, commitment = self.quantize(v.permute(1, 2, 0, 3).flatten(2))  # (B, P, K·D), (B, P, K)
        vectors = found.view(-1, P, self.k, self.d).permute(2, 0, 1, 3).reshape(self.k, -1, self.d)
        return self.nll(vectors, images) + commitment - self.log_p(z.permute(2, 0, 1).flatten(1))
