"""A look at the gradient itself: how biased an estimator's is, and how noisy.

It is the paper's thesis as two numbers along training: relaxations pay with bias, score functions with a
variance that grows with the number of latent variables.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor

from dvq import DvqError
from dvq.latents import Categorical
from dvq.model import Model, in_evaluation
from dvq.trial import Stochastic

LOOKED_AT = 4  # images, with one latent variable of each enumerated


@in_evaluation
def probe(model: Model, images: Tensor, draws: int, generator: Generator, step: int) -> dict[str, float]:
    """Bias and variance of the surrogate's gradient by the posterior's logits l, against that of −ELBO.

        variance = E‖g − E g‖² / ‖E g‖², over all latent variables of the images;
        bias = ‖E g − r‖ / ‖r‖ over one latent variable of each image, where r is the gradient of −ELBO with
        that variable summed out: r_c = q_c (f_c − Σ q f) + β ∂KL/∂l_c, f_c = E −log p(x | z_c, other z), and β
        the KL's weight in warm-up,

    both means over ``draws``. The norms are of means over few draws, so the bias is a proxy: it cannot fall
    under the noise, about √(variance / draws). Where E g is lost in the noise there is no variance.

    Batch normalization is as in evaluation here, so that images do not depend on each other: the bias that it causes
    for score functions in training does not show.

    Args:
        model: one with a categorical posterior.
        images: (B, H, W, 3) uint8.
        draws: of g, and of the other latent variables in f, 2 or more; r costs LOOKED_AT·C·draws passes of the
            decoder.
        step: the training step, for temperature and warm-up.
    """
    gradients = torch.stack([_gradient(model, images, generator, step) for _ in range(draws)])  # (S, K, N, C)
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum() / (draws - 1)
    signal = mean.square().sum() - variance / draws  # ‖E g‖² without the noise's share
    logits = model.latents.logits(model.encoder(images))
    positions = logits.shape[1] // len(images)
    assert isinstance(model.trial, Stochastic)
    weight = model.trial.kl_weight(step)
    estimated, reference = [], []
    for i in range(min(LOOKED_AT, len(images))):
        k, p = (
            int(torch.randint(size, (), generator=generator, device=images.device))
            for size in (len(logits), positions)
        )
        image_rows = slice(i * positions, (i + 1) * positions)
        estimated.append(mean[k, image_rows][p])
        reference.append(
            _reference(model, images[i : i + 1], logits[:, image_rows], k, p, draws, generator, weight)
        )
    bias = torch.stack(estimated) - torch.stack(reference)
    found = {"probe/bias": (bias.norm() / torch.stack(reference).norm()).item()}
    return found | ({"probe/variance": (variance / signal).item()} if signal > 0 else {})


@contextmanager
def _seen_logits(latents: Categorical) -> Iterator[list[Tensor]]:
    """The logits that the estimator's loss makes, which with a method of one's own is in the plain form, kept for
    their gradient."""
    made: list[Tensor] = []
    make, own = latents.logits, vars(latents).get("logits")

    def logits(v: Tensor) -> Tensor:
        made.append(make(v))
        return made[-1]

    latents.logits = logits  # type: ignore[method-assign]
    try:
        yield made
    finally:
        del latents.logits  # the class's method is seen again
        if own:  # of this object alone
            latents.logits = own  # type: ignore[method-assign]


def _gradient(model: Model, images: Tensor, generator: Generator, step: int) -> Tensor:
    with torch.enable_grad(), _seen_logits(model.latents) as seen:
        loss = model.trial.loss(model, images, generator, step)
        if not seen:
            raise DvqError(
                f"{model.trial.estimator}: its loss takes no logits of its latents, whose gradient probe_draws looks "
                "at; let it call latents.logits(v), or leave probe_draws out"
            )
        each = torch.autograd.grad(len(images) * loss.surrogate, seen, materialize_grads=True)
        return torch.stack(each).sum(0)  # the same logits, if it made them more than once


def _reference(
    model: Model,
    image: Tensor,
    logits: Tensor,
    k: int,
    p: int,
    draws: int,
    generator: Generator,
    weight: float | Tensor,
) -> Tensor:
    """The gradient of −ELBO, its KL by its ``weight`` in warm-up, by logits[k, p], with z[k, p] summed out:
    (1, H, W, 3), (K, P, C) → (C,)."""
    latents, (_, positions, codes) = model.latents, logits.shape
    distortion = torch.zeros_like(logits[k, p])
    for _ in range(draws):
        vectors = latents.vectors(latents.draw(logits, generator)).repeat(1, codes, 1)  # (K, C·P, D)
        vectors[k, p::positions] = latents.codebook[k]
        distortion += model.channel_distortions(vectors, image.expand(codes, -1, -1, -1)).sum(1) / draws
    log_q = logits[k, p].log_softmax(-1)  # finite where q is 0
    q, cost = log_q.exp(), distortion + weight * (log_q - latents.log_prior()[k])
    return q * (cost - (q * cost).sum())
