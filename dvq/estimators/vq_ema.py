"""VQ-VAE with EMA: the nearest code, a straight-through gradient, codebooks that follow the encodings."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from dvq.trial import LearnedCodes, Loss, NonNegative

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from dvq.model import Model
    from dvq.quantizers import Nearest
    from dvq.trial import Step


class VQEMA(LearnedCodes):
    """VQ-VAE with codebooks that are exponential moving averages: i = argmin_c ‖v − M[c]‖².

    The decoder sees v + stopgrad(M[i] − v). Because the distortion is a sum over 3072 sub-pixels,

        surrogate = −log p(x|z) + 3072·β·mean‖v − stopgrad(M[i])‖² − log p(z),

    in nats an image, where −log p(z) trains nothing but the prior, by maximum likelihood. The codebook
    follows N ← γN + (1−γ)n, S ← γS + (1−γ)Σv, M = S/N.

    With ``gradient: rotation`` the decoder sees λRv instead, which is M[i] too: λ = ‖M[i]‖/‖v‖ and R, the rotation of
    v to M[i], are constants of the gradient (Fifty et al. 2025, "Restructuring Vector Quantization with the Rotation
    Trick").

    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", eq. 3 and appendix A.1.
    """

    estimator: Literal["vq-ema"] = "vq-ema"
    commitment: NonNegative = 0.25
    """β; van den Oord et al. found 0.1 to 2 alike. The mean is over latent variables and dimensions too, so that the
    fewer there are of them, the more tightly each is held"""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """γ; also of the usage counts that revival looks at"""
    revive_below: NonNegative = 0.0
    """codes whose moving average of uses per minibatch is below this move to random encodings of the minibatch; 0:
    never, as in the papers. Codes that the minibatch uses never move."""
    gradient: Literal["straight-through", "rotation"] = "straight-through"
    """the decoder's as it is; or turned back from M[i]'s direction to v's, and scaled by ‖M[i]‖/‖v‖"""

    def latents(self) -> "Nearest":
        from dvq.quantizers import Nearest

        return Nearest(self, self.ema_decay, trained=False)

    def codebook_loss(self, v: "Tensor", latents: "Nearest", codes: "Tensor") -> "Tensor | float":
        """A term of the surrogate that trains the codebooks; here there is none, for they are moving averages."""
        return 0.0

    def loss(self, model: "Model", images: "Tensor", generator: "Generator", step: "Step") -> Loss:
        from dvq.codes import rotated

        latents: Nearest = model.latents
        v = model.encoder(images)  # (K, N, D)
        codes = latents.codes(v)
        vectors = latents.vectors(codes).detach()
        decoded = rotated(v, vectors) if self.gradient == "rotation" else v + (vectors - v).detach()
        distortion = model.distortion(decoded, images)[0] / len(images)
        rate = latents.rate(codes).sum() / len(images)
        scale = images[0].numel()  # 3072
        commitment = self.commitment * scale * (v - vectors).square().mean()
        codebook = scale * self.codebook_loss(v.detach(), latents, codes)
        if model.training:
            latents.follow(v.detach(), codes)
            latents.revive(v.detach(), codes, self.revive_below, generator)
        return Loss(distortion + commitment + codebook + rate, distortion.detach(), rate.detach())
