"""NVIL: the score function with a learned, input-dependent baseline."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dvq.trial import Loss, Stochastic

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.latents import Baselined
    from dvq.model import Model
    from dvq.trial import Step


class NVIL(Stochastic):
    """NVIL: gradients of the ELBO from one sample, unbiased with ``normalization: none`` (see VIMCO) but for a
    positive factor on the encoder's.

    w = log p(x, z) − log q(z|x);  signal = w − c − b(x), with the running mean c of w − b(x), and b(x) a small
    network trained by (w − c − b(x))².

        surrogate = −stopgrad(signal)·log q(z|x) − log p(x, z) + (stopgrad(w − c) − b(x))²

    The encoder's gradient is divided by max(1, σ), σ² the running variance of w − b(x) within a minibatch. Mnih &
    Gregor divide the signal, but their q and p share no parameters. Here they share the codebooks, and a divided
    signal would scale only one of the two parts of the codebooks' gradient.

    Source: Mnih & Gregor 2014, "Neural Variational Inference and Learning in Belief Networks", section 2.3
    and, in appendix A, algorithm 1.
    """

    estimator: Literal["nvil"] = "nvil"
    baseline_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """of the running mean and variance; Mnih & Gregor have 0.8"""

    def latents(self) -> "Baselined":
        from dvq.latents import Baselined

        return Baselined(self, decay=self.baseline_decay)

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        from dvq.latents import per_image

        latents: Baselined = model.latents
        B, beta = len(images), self.kl_weight(step)
        v = model.encoder(images)
        (z,), each_log_q, rate = latents.score(latents.damped(v), 1, generator)  # (K, N)
        log_q, log_p = per_image(each_log_q[0], B), latents.log_p(z, B)  # (B,)
        total, nll = model.distortion(latents.vectors(z), images)
        w = beta * (log_p - log_q).detach() - nll
        signal, fit = latents.signal(w, v.detach(), update=model.training)
        surrogate = total - (signal * log_q).sum() - beta * log_p.sum() + fit.sum()
        return Loss(surrogate / B, nll.mean(), rate / B)
