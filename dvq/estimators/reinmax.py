"""ReinMax: the decoder sees one code; the gradient is of second order, where straight-through's is of first."""

from typing import TYPE_CHECKING, Literal

from dvq.trial import Loss, Stochastic

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.latents import Categorical
    from dvq.model import Model
    from dvq.trial import Step


class ReinMax(Stochastic):
    """ReinMax: a draw z ~ q(z|x), and Heun's method in place of the straight-through gradient's Euler step.

        surrogate = −log p(x | M[z]) + KL(q(z|x) ‖ p(z)),

    with the categorical KL in closed form, and for the logits, where g_c is the gradient by the weight of code c,

        g_l = ½ q·(g − g_z) + ½ onehot(z)·(g_z − Σ_c q_c g_c).

    Unbiased where −log p(x|z) is quadratic in each latent variable's vector, whatever the others are; the decoder is
    trained on exact samples. There is no temperature: this is τ = 1 of Liu et al., where their π is q.

    Source: Liu et al. 2023, "Bridging Discrete and Backpropagation: Straight-Through and Beyond", algorithm 2.
    """

    estimator: Literal["reinmax"] = "reinmax"

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        latents: Categorical = model.latents
        vectors, rate = latents.reinmax(model.encoder(images), generator)
        distortion, rate = model.distortion(vectors, images)[0] / len(images), rate / len(images)
        return Loss(distortion + self.kl_weight(step) * rate, distortion.detach(), rate.detach())
