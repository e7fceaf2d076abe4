"""The latent variables' parameters: codebooks, posterior and prior.

Shapes: B images, P = H/4·W/4 positions, N = B·P, K latent variables a position, C categories, D dimensions of
a code. The codebooks come first, (K, N, ·), as their batched products want it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from dvq.codes import look_up
from dvq.draws import (
    cumulative,
    fast_reinmax,
    fast_score,
    inverse_draw,
    inverse_of,
    plain_reinmax,
    plain_score,
)
from dvq.posterior import LOWEST, categorical_kl, logits_of
from dvq.relaxation import fast_relax, plain_relax
from dvq.trial import Discrete, LearnedCodes, Stochastic, Trial


class Sample(NamedTuple):
    """One hard sample z ~ q(z|x), as evaluation takes it."""

    vectors: Tensor
    """(K, N, D), what the decoder sees"""
    rate: Tensor
    """(K, N) [nats]: KL(q(z|x) ‖ p(z)) of each latent variable, in closed form"""
    log_ratio: Tensor
    """(K, N) [nats]: log q(z|x) − log p(z) of this sample, whose mean over samples is the rate"""
    codes: Tensor | None = None
    """(K, N) integers, where the latent variables are discrete"""
    mass: Tensor | None = None
    """(K, C): Σ_n q(z|x), unless that is the count of the codes"""
    again: "Callable[[Generator], Sample] | None" = None
    """another sample from the same q(z|x), where that costs less than the first"""


def per_image(terms: Tensor, images: int) -> Tensor:
    """Sums over an image's latent variables: (…, K, B·P) → (…, B)."""
    return terms.unflatten(-1, (images, -1)).sum((-3, -1))


def normal_codes(trial: LearnedCodes, scale: float = 1.0) -> Tensor:
    """Codebooks (K, C, D) of draws from N(0, σ²), σ as ``codebook_std`` says for logits of this ``scale``."""
    sigma = trial.codebook_std or (16 / (trial.code_dim * scale)) ** 0.5
    return torch.randn(trial.num_latents, trial.num_codes, trial.code_dim) * sigma


class Codebooks(nn.Module):
    """M (K, C, D), shared over positions, and the factorial prior p(z_k) = Cat(softmax θ[k])."""

    encodings = 1
    """the encoder's output channels for each of the K·D dimensions"""
    codebook: Tensor
    prior_logits: Tensor

    def __init__(self, trial: Discrete, codebook: Tensor, trained: bool) -> None:
        super().__init__()
        prior = torch.zeros(trial.num_latents, trial.num_codes)
        if trained:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        if trial.prior == "trained":
            self.prior_logits = nn.Parameter(prior)
        else:
            self.register_buffer("prior_logits", prior)

    def vectors(self, codes: Tensor) -> Tensor:
        """M[k, codes]: (K, N) → (K, N, D)."""
        return look_up(self.codebook, codes)

    def log_prior(self) -> Tensor:
        """log p(z_k = c), (K, C)."""
        return self.prior_logits.log_softmax(-1)

    def log_p_each(self, codes: Tensor) -> Tensor:
        """log p(z) [nats] of each latent variable: (K, N) → (K, N)."""
        return look_up(self.log_prior().unsqueeze(-1), codes).squeeze(-1)

    @torch.no_grad()
    def prior_sample(self, n: int, generator: Generator) -> Tensor:
        """The vectors of n draws z ~ p(z): (K, n, D)."""
        return self.vectors(self.log_prior().exp().multinomial(n, replacement=True, generator=generator))

    @torch.no_grad()
    def place(self, centers: Tensor) -> None:
        """Set the codebooks (K, C, D) that training begins with."""
        self.codebook.copy_(centers)


class Categorical(Codebooks):
    """The stochastic posterior q(z|x) = Cat(softmax l), l = −s‖v − M[k, c]‖²."""

    def __init__(self, trial: Stochastic) -> None:
        super().__init__(trial, normal_codes(trial, trial.distance_scale), trained=True)
        self.scale: Any = trial.distance_scale
        """s; a parameter, without dimensions or (K, 1, 1), may take its place"""
        self.plain = False
        """whether to compute the equations as they stand, where there is a faster form"""

    def _plainly(self, temperature: float | Tensor = 1.0) -> bool:
        """Whether to compute the equations as they stand: the faster forms have logits and prior of this class alone,
        give s and τ no gradient, and raise exp(l) to the power 1/τ, so that for τ > 1 what underflows in exp(l) would
        still have counted."""
        trained = isinstance(temperature, Tensor) and temperature.requires_grad
        # a tensor's value is not read: a GPU would be waited for
        hot = not isinstance(temperature, Tensor) and temperature > 1
        own = self._overrides("logits", "log_prior")
        return self.plain or trained or hot or own or isinstance(self.scale, Tensor)

    def _overrides(self, *methods: str) -> bool:
        """Whether a subclass, or this object alone, has one of the methods of its own."""
        return any(
            getattr(getattr(self, name), "__func__", None) is not getattr(Categorical, name)
            for name in methods
        )

    def logits(self, v: Tensor) -> Tensor:
        """l, less ‖v‖², which the softmax does not see: (K, N, D) → (K, N, C)."""
        return logits_of(v, self.codebook, self.scale)

    def relax(
        self, v: Tensor, temperature: float | Tensor, hard: bool, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """What the decoder sees of a Gumbel-Softmax sample, (K, N, D), and the rate [nats], summed over all."""
        if self._plainly(temperature):
            logits = self.logits(v)
            return plain_relax(logits, self.codebook, self.log_prior(), temperature, hard, generator)
        return fast_relax(v, self.codebook, self.prior_logits, self.scale, temperature, hard, generator)

    def reinmax(self, v: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """What the decoder sees of a draw z ~ q(z|x), (K, N, D), with ReinMax's gradient; and the rate [nats], summed
        over all."""
        if self._plainly():
            return plain_reinmax(self.logits(v), self.codebook, self.log_prior(), generator)
        return fast_reinmax(v, self.codebook, self.prior_logits, self.scale, generator)

    def kl(self, logits: Tensor) -> Tensor:
        """KL(q ‖ p) [nats]: (K, N, C) → (K, N)."""
        return categorical_kl(logits, self.log_prior())

    @torch.no_grad()
    def draw(self, logits: Tensor, generator: Generator) -> Tensor:
        """z ~ q(z|x): (K, N, C) → (K, N)."""
        return inverse_draw(logits.softmax(-1), 1, generator).squeeze(-1)

    def score(self, v: Tensor, count: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """``count`` draws z ~ q(z|x), (count, K, N), their log q to differentiate, likewise [nats], and the rate
        [nats], summed over all and detached."""
        if self._plainly():
            return plain_score(self.logits(v), self.log_prior(), count, generator)
        return fast_score(v, self.codebook, self.log_prior(), self.scale, count, generator)

    def log_p(self, codes: Tensor, images: int) -> Tensor:
        """log p(z) [nats an image]: (K, N) → (B,)."""
        return per_image(self.log_p_each(codes), images)

    def sample(self, v: Tensor, generator: Generator) -> Sample:
        logits = self.logits(v)
        if not logits.is_cuda:  # as in above_underflow; log q is less by up to log C, 7 for 1,096 codes
            logits = torch.maximum(logits, logits.amax(-1, keepdim=True) + (LOWEST + 7))
        rate, q = self.kl(logits), logits.softmax(-1)
        sample = self._sample(logits, cumulative(q), logits.logsumexp(-1), rate, q.sum(1), generator)
        # where each sample may be changed, each is made by sample itself
        return sample._replace(again=None) if self._overrides("sample") else sample

    def _sample(
        self, logits: Tensor, below: Tensor, log_sum: Tensor, rate: Tensor, mass: Tensor, generator: Generator
    ) -> Sample:
        codes = inverse_of(below, 1, generator).squeeze(-1)
        log_q = logits.gather(-1, codes.unsqueeze(-1)).squeeze(-1) - log_sum
        again = partial(self._sample, logits, below, log_sum, rate, mass)
        return Sample(self.vectors(codes), rate, log_q - self.log_p_each(codes), codes, mass, again)


class Baselined(Categorical):
    """A categorical posterior with NVIL's baseline: a network b(x) and running statistics of w − b(x)."""

    mean: Tensor
    variance: Tensor
    begun: Tensor

    def __init__(self, trial: Stochastic, decay: float) -> None:
        super().__init__(trial)
        self.decay = decay
        width = trial.num_latents * trial.code_dim
        self.baseline = nn.Sequential(nn.Linear(width, 100), nn.Tanh(), nn.Linear(100, 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("begun", torch.zeros(()))

    def damped(self, v: Tensor) -> Tensor:
        """v itself, whose gradient is divided by max(1, σ), σ² the running variance: (K, N, D) → (K, N, D)."""
        return v.detach().lerp(v, 1 / self.variance.sqrt().clamp(min=1))

    def signal(self, w: Tensor, v: Tensor, update: bool) -> tuple[Tensor, Tensor]:
        """The learning signal w − c − b(x), a constant, and what trains the baseline: (B,), (K, N, D) → (B,), (B,).

        The signal's statistics are those from before this minibatch, so that they do not depend on its samples; in
        the first one, where there are none, it is 0. The variance is that within minibatches.
        """
        x = v.unflatten(1, (len(w), -1)).mean(2).transpose(0, 1).flatten(1)  # (B, K·D)
        baseline = self.baseline(x).squeeze(-1)
        residual = w - baseline.detach()
        signal = (residual - self.mean) * (self.begun if update else 1)
        if update:
            weight = torch.where(self.begun > 0, 1 - self.decay, 1.0)
            self.mean.lerp_(residual.mean(), weight)
            self.variance.lerp_(residual.var(correction=0), weight)
            self.begun.fill_(1)
        return signal, (w - self.mean - baseline).square()


class Normal(nn.Module):
    """The continuous posterior N(μ, σ²), σ = exp(ρ), from encodings (K, N, 2D) = [μ, ρ]; prior N(0, 1)."""

    encodings = 2
    like: Tensor

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.shape = trial.num_latents, trial.code_dim
        self.register_buffer("like", torch.zeros(()), persistent=False)

    def prior_sample(self, n: int, generator: Generator) -> Tensor:
        """n draws z ~ N(0, 1): (K, n, D)."""
        k, d = self.shape
        return self.like.new_empty(k, n, d).normal_(generator=generator)

    def sample(self, v: Tensor, generator: Generator) -> Sample:
        """μ + σε; KL = ½ Σ_D (μ² + σ² − 1 − 2ρ) [nats]."""
        mean, rho = v.chunk(2, -1)
        noise = mean.new_empty(mean.shape).normal_(generator=generator)
        z = mean + rho.exp() * noise
        rate = 0.5 * (mean.square() + (2 * rho).exp() - 1 - 2 * rho).sum(-1)
        log_ratio = 0.5 * (z.square() - noise.square() - 2 * rho).sum(-1)
        return Sample(z, rate, log_ratio)
