"""VQ-VAE with the codebook loss: the codebooks learn by gradient."""

from typing import TYPE_CHECKING, Literal

from dvq.estimators.vq_ema import VQEMA

if TYPE_CHECKING:
    from torch import Tensor

    from dvq.quantizers import Nearest


class VQLoss(VQEMA):
    """VQ-VAE whose codebooks learn by ‖stopgrad(v) − M[i]‖² instead of a moving average:

        surrogate = −log p(x|z) + 3072·(β·mean‖v − stopgrad(M[i])‖² + mean‖stopgrad(v) − M[i]‖²) − log p(z).

    Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", eq. 3.
    """

    estimator: Literal["vq-loss"] = "vq-loss"  # type: ignore[assignment]

    def latents(self) -> "Nearest":
        from dvq.quantizers import Nearest

        return Nearest(self, self.ema_decay, trained=True)

    def codebook_loss(self, v: "Tensor", latents: "Nearest", codes: "Tensor") -> "Tensor":
        return (v - latents.vectors(codes)).square().mean()
