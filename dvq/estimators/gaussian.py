"""The continuous reference: a Gaussian VAE in the same encoder and decoder."""

from typing import TYPE_CHECKING, Literal

from dvq.trial import Loss, Warmed

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.latents import Normal
    from dvq.model import Model
    from dvq.trial import Step


class Gaussian(Warmed):
    """A VAE with z ~ N(μ(x), σ²(x)) of K·D dimensions a position, prior N(0, 1), reparameterized.

        surrogate = −log p(x | μ + σε) + KL(q(z|x) ‖ p(z)), ε ~ N(0, 1)

    The discrete models are compared with it. Van den Oord et al. 2017 report 4.51 bits/dim on CIFAR-10, and cite
    4.54 of Gregor et al. 2016 for a deep convolutional VAE.

    Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 2.4 and appendix B.
    """

    estimator: Literal["gaussian"] = "gaussian"

    def latents(self) -> "Normal":
        from dvq.latents import Normal

        return Normal(self)

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        latents: Normal = model.latents
        sample = latents.sample(model.encoder(images), generator)
        distortion = model.distortion(sample.vectors, images)[0] / len(images)
        rate = sample.rate.sum() / len(images)
        return Loss(distortion + self.kl_weight(step) * rate, distortion.detach(), rate.detach())
