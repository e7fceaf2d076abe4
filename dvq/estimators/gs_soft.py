"""Gumbel-Softmax, soft: the decoder sees a continuous relaxation of the codes."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dvq.trial import NEEDS, Count, Loss, Positive, Stochastic, Whole, progress

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.latents import Categorical
    from dvq.model import Model
    from dvq.trial import Step


class GSSoft(Stochastic):
    """GS-Soft: y = softmax((l + g)/τ), g ~ Gumbel(0, 1); the decoder sees y·M.

        surrogate = −log p(x | y·M) + KL(q(z|x) ‖ p(z)),

    with the categorical KL in closed form. The gradient is biased, because the decoder is trained on mixtures of
    codes; as τ falls, the bias falls and the variance rises. Nor is the training loss a bound: a mixture can tell the
    decoder more than the single codes that evaluation takes.

    Source: Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax", section 2; Maddison et al.
    2017, "The Concrete Distribution".
    """

    estimator: Literal["gs-soft"] = "gs-soft"
    temperature: Positive = 0.5
    """τ, or where its annealing begins; the paper's 0.5 balances bias and variance"""
    final_temperature: Positive | None = None
    """τ falls to this, geometrically, over ``annealing_steps``; None: τ is constant, as in the paper"""
    annealing_after: Whole = Field(default=0, json_schema_extra={NEEDS: "final_temperature"})
    """steps before it begins to fall"""
    annealing_steps: Count = Field(default=50_000, json_schema_extra={NEEDS: "final_temperature"})

    def temperature_at(self, step: "Step") -> "float | Tensor":
        """τ at a training step."""
        if self.final_temperature is None:
            return self.temperature
        ratio = self.final_temperature / self.temperature
        return self.temperature * ratio ** progress(step - self.annealing_after, self.annealing_steps)

    def latents(self) -> "Categorical":
        latents = super().latents()
        # for τ > 1 the fast form is wrong, and a step that is recorded on a GPU has τ as a tensor
        latents.plain = max(self.temperature, self.final_temperature or 0) > 1
        return latents

    hard: ClassVar[bool] = False
    """whether the decoder sees one code"""

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        latents: Categorical = model.latents
        v = model.encoder(images)  # (K, N, D)
        vectors, rate = latents.relax(v, self.temperature_at(step), self.hard, generator)
        distortion, rate = model.distortion(vectors, images)[0] / len(images), rate / len(images)
        return Loss(distortion + self.kl_weight(step) * rate, distortion.detach(), rate.detach())
