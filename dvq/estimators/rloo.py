"""RLOO: the score function on S samples, the baseline of each the mean over the others."""

from typing import TYPE_CHECKING, Literal

from dvq.trial import Loss, Stochastic, TwoOrMore

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.latents import Categorical
    from dvq.model import Model
    from dvq.trial import Step


class RLOO(Stochastic):
    """REINFORCE with a leave-one-out baseline: gradients of the ELBO, unbiased with ``normalization: none`` (see
    VIMCO).

    With w_s = log p(x, z_s) − log q(z_s|x) for S samples z_s ~ q(z|x),

        surrogate = −(1/S) Σ_s [stopgrad(w_s − (1/(S−1)) Σ_{r≠s} w_r)·log q(z_s|x) + log p(x, z_s)].

    Source: Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """

    estimator: Literal["rloo"] = "rloo"
    samples: TwoOrMore = 4
    """S; each costs a pass through the decoder"""

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        import torch

        from dvq.latents import per_image

        latents: Categorical = model.latents
        S, B, beta = self.samples, len(images), self.kl_weight(step)
        codes, each_log_q, rate = latents.score(model.encoder(images), S, generator)  # (S, K, N)
        log_q = per_image(each_log_q, B)  # (S, B)
        log_p = torch.stack([latents.log_p(z, B) for z in codes])
        vectors = latents.vectors(codes.transpose(0, 1).flatten(1))  # (K, S·N, D)
        total, nll = model.distortion(vectors, images.repeat(S, 1, 1, 1))  # Σ −log p(x|z); each, (S·B,)
        w = beta * (log_p - log_q).detach() - nll.view(S, B)
        signal = (w - w.mean(0)) * S / (S - 1)  # w less the mean of the others
        surrogate = total - (signal * log_q).sum() - beta * log_p.sum()
        return Loss(surrogate / (S * B), nll.mean(), rate / B)
