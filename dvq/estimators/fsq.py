"""FSQ: no codebook is learned; each dimension of the encoding is rounded to a few levels."""

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from dvq.trial import Count, Discrete, Loss, TwoOrMore, Unkeyed

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.model import Model
    from dvq.quantizers import Rounded
    from dvq.trial import Step

# beyond 1000 levels the bound, which ε widens, would round to one too many
Level = Annotated[int, Field(ge=2, le=1000)]


class FSQ(Discrete):
    """Finite scalar quantization: the decoder sees round(b) / ⌊L/2⌋, b = h·tanh(v + atanh(o/h)) − o, where h and o
    are such that dimension d of v has L_d values.

        surrogate = −log p(x|z) − log p(z),

    in nats an image, where −log p(z) trains nothing but the prior, by maximum likelihood. Rounding passes the
    gradient straight through. The codes are the grid of all levels: there are none to learn, or to commit to.

    Source: Mentzer et al. 2024, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3 and appendix A.1.
    """

    estimator: Literal["fsq"] = "fsq"
    levels: Annotated[tuple[Level, ...], Field(min_length=1)] = (8, 8, 8)
    """L of each dimension; their number is D and their product C. The authors advise 5 or more; with 2, tanh is flat
    where v = 0"""
    num_codes: TwoOrMore = Field(default=512, json_schema_extra=Unkeyed)
    """C, which the levels decide; there is no need to set it"""
    code_dim: Count = Field(default=3, json_schema_extra=Unkeyed)
    """D, which the levels decide; there is no need to set it"""

    @model_validator(mode="after")
    def _derive_from_levels(self) -> Self:
        derived = {
            "num_codes": (math.prod(self.levels), "codes"),
            "code_dim": (len(self.levels), "dimensions"),
        }
        levels = ", ".join(map(str, self.levels))
        if math.prod(self.levels) >= 2**31:
            raise ValueError(f"the levels {levels} make 2147483648 codes or more; give fewer")
        for name, (right, unit) in derived.items():
            value = getattr(self, name)
            if name in self.model_fields_set and value != right:
                raise ValueError(
                    f"{name} = {value}: the levels {levels} make {right} {unit}; set levels to others, "
                    f"or {name} to {right}"
                )
            self.__dict__[name] = right  # the configuration is frozen from here on
        return self

    def latents(self) -> "Rounded":
        from dvq.quantizers import Rounded

        return Rounded(self)

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        latents: Rounded = model.latents
        vectors, codes = latents.straight_through(model.encoder(images))
        distortion = model.distortion(vectors, images)[0] / len(images)
        rate = latents.rate(codes).sum() / len(images)
        return Loss(distortion + rate, distortion.detach(), rate.detach())
