"""Gumbel-Softmax, hard: the decoder sees one code; the gradient is the relaxation's."""

from typing import ClassVar, Literal

from dvq.estimators.gs_soft import GSSoft


class GSHard(GSSoft):
    """GS-Hard (straight-through Gumbel-Softmax): the decoder sees onehot(argmax y) + y − stopgrad(y).

    The decoder is trained on exact samples z ~ q(z|x), since argmax y is one; only the posterior's gradient is
    biased: the encoder's, and by the logits the codebooks'.

    Source: Jang et al. 2017, "Categorical Reparameterization with Gumbel-Softmax", section 2.2.
    """

    estimator: Literal["gs-hard"] = "gs-hard"  # type: ignore[assignment]

    hard: ClassVar[bool] = True
