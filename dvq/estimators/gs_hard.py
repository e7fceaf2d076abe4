"""Gumbel-Softmax, hard: the decoder sees one code; the gradient is the relaxation's."""

from typing import TYPE_CHECKING, Literal

from dvq.estimators.gs_soft import GSSoft

if TYPE_CHECKING:
    from torch import Tensor


class GSHard(GSSoft):
    """GS-Hard (straight-through Gumbel-Softmax): the decoder sees onehot(argmax y) + y − stopgrad(y).

    The decoder is trained on exact samples z ~ q(z|x), since argmax y is one; only the encoder's gradient is
    biased.

    Source: Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax", section 2.2.
    """

    estimator: Literal["gs-hard"] = "gs-hard"  # type: ignore[assignment]

    def relax(self, y: "Tensor") -> "Tensor":
        import torch

        hard = torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0)
        return hard + (y - y.detach())
