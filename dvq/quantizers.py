"""Latent variables with a deterministic code: the nearest, as VQ-VAE has it, or that of rounding, as FSQ.

Shapes are those of :mod:`dvq.latents`.
"""

import torch
from torch import Generator, Tensor

from dvq.codes import code_counts, code_sums, largest
from dvq.estimators.fsq import FSQ
from dvq.latents import Codebooks, Sample, normal_codes
from dvq.posterior import Logits, tiles
from dvq.trial import LearnedCodes


class Deterministic(Codebooks):
    """A posterior that puts all its mass on one z, so that KL(q ‖ p) = −log p(z)."""

    def codes(self, v: Tensor) -> Tensor:
        """z of each encoding: (K, N, D) → (K, N)."""
        raise NotImplementedError

    def rate(self, codes: Tensor) -> Tensor:
        """−log p(z) [nats]: (K, N) → (K, N)."""
        return -self.log_p_each(codes)

    def sample(self, v: Tensor, generator: Generator) -> Sample:  # noqa: ARG002
        codes = self.codes(v)
        rate = self.rate(codes)
        return Sample(self.vectors(codes), rate, rate, codes)


class Nearest(Deterministic):
    """The posterior of VQ-VAE, z = argmin_c ‖v − M[k, c]‖²."""

    EPSILON = 1e-5

    counts: Tensor
    sums: Tensor

    def __init__(self, trial: LearnedCodes, decay: float, trained: bool) -> None:
        super().__init__(trial, normal_codes(trial), trained)
        self.decay, self.trained = decay, trained
        self.register_buffer("counts", torch.ones(trial.num_latents, trial.num_codes))  # N
        self.register_buffer("sums", self.codebook.detach().clone())  # S

    @torch.no_grad()
    def codes(self, v: Tensor) -> Tensor:
        """The nearest code of each vector, with the largest 2 v·m − ‖m‖²: (K, N, D) → (K, N)."""
        codes = torch.empty(v.shape[:2], dtype=torch.long, device=v.device)
        logits = Logits(v, self.codebook, 1.0)
        for at in tiles(v, self.codebook.shape[1]):
            codes[at] = largest(logits[at])
        return codes

    @torch.no_grad()
    def place(self, centers: Tensor) -> None:
        self.codebook.copy_(centers)
        self.sums.copy_(centers * self.counts.unsqueeze(-1))

    @torch.no_grad()
    def follow(self, v: Tensor, codes: Tensor) -> None:
        """One step of the k-means rule: N ← γN + (1−γ)n, S ← γS + (1−γ)Σv, M = S/N.

        N is smoothed (Laplace) where it divides, not where it is kept, so that a code that is no longer used
        shrinks to the origin once its N is below ε, a thousand steps later. Codebooks that learn by gradient have
        only their counts kept.
        """
        n = code_counts(codes, self.counts.shape[1])
        self.counts.lerp_(n.to(v.dtype), 1 - self.decay)
        if not self.trained:
            self.sums.lerp_(code_sums(v, codes, self.counts.shape[1]), 1 - self.decay)
            total = self.counts.sum(1, keepdim=True)
            smoothed = (self.counts + self.EPSILON) / (total + self.counts.shape[1] * self.EPSILON) * total
            self.codebook.copy_(self.sums / smoothed.unsqueeze(-1))

    @torch.no_grad()
    def revive(self, v: Tensor, codes: Tensor, below: float, generator: Generator) -> None:
        """Move codes that are used less than ``below`` times a minibatch to random encodings of this one.

        A code that this minibatch uses never moves.
        """
        if not below:
            return
        used = torch.zeros_like(self.counts, dtype=torch.bool).scatter_(1, codes, True)
        dead = (self.counts < below) & ~used  # (K, C)
        pick = torch.randint(v.shape[1], dead.shape, generator=generator, device=v.device)
        fresh = v.gather(1, pick.unsqueeze(-1).expand(-1, -1, v.shape[-1]))  # (K, C, D)
        moved = torch.where(dead.unsqueeze(-1), fresh, self.codebook)
        self.codebook.data.copy_(moved)  # .data: a backward pass to come needs the codebook's shape alone
        self.counts.masked_fill_(dead, below)
        self.sums.copy_(torch.where(dead.unsqueeze(-1), fresh * below, self.sums))


class Rounded(Deterministic):
    """The posterior of FSQ: each dimension of v is bounded and rounded to one of its L levels.

    b = h·tanh(v + atanh(o/h)) − o with h = (L − 1)(1 + ε)/2 and o = ½ for even L, else 0, rounds to −⌊L/2⌋, …,
    ⌈L/2⌉ − 1, and b = 0 where v = 0; the decoder sees round(b) / ⌊L/2⌋, in [−1, 1]. (The authors' listing has tan in
    place of atanh, which one of them calls a mistake, and 1 − ε, with which o/h > 1 for two levels. This is
    vector-quantize-pytorch's form.) The codes count the first dimension's levels fastest, and the codebooks, all the
    same, list them.
    """

    EPSILON = 1e-3

    levels: Tensor
    weights: Tensor
    width: Tensor
    offset: Tensor

    def __init__(self, trial: FSQ) -> None:
        levels = torch.tensor(trial.levels)  # L, (D,)
        weights = levels.cumprod(0) // levels
        digits = torch.arange(trial.num_codes).unsqueeze(-1) // weights % levels  # (C, D)
        grid = (digits - levels // 2) / (levels // 2)
        super().__init__(trial, grid.repeat(trial.num_latents, 1, 1), trained=False)
        width, offset = (levels - 1) * (1 + self.EPSILON) / 2, 0.5 * (levels % 2 == 0)
        for name, constant in zip(
            ("levels", "weights", "width", "offset"), (levels, weights, width, offset), strict=True
        ):
            self.register_buffer(name, constant, persistent=False)

    def bounded(self, v: Tensor) -> Tensor:
        """b: (K, N, D) → (K, N, D)."""
        return self.width * (v + (self.offset / self.width).atanh()).tanh() - self.offset

    def codes(self, v: Tensor) -> Tensor:
        return self._codes(self.bounded(v))

    def straight_through(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder sees, with b's gradient for round(b)'s, (K, N, D), and the codes (K, N)."""
        bounded = self.bounded(v)
        codes = self._codes(bounded.detach())
        slope = bounded / (self.levels // 2)
        return self.vectors(codes) + (slope - slope.detach()), codes

    def _codes(self, bounded: Tensor) -> Tensor:
        # NaN gets a code too, so that the loss, not the look-up, reports that training diverged
        digits = bounded.round().nan_to_num() + self.levels // 2
        return (digits.long() * self.weights).sum(-1)
