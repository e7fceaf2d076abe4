"""The whole model in its plain and in its fast form: the same loss, and the same gradient of every parameter."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dvq import posterior
from dvq.config import estimators, trial
from dvq.likelihood import VALUES, plain_nll
from dvq.model import Model
from tests.sizes import taken

IMAGES = torch.from_numpy(
    np.random.Generator(np.random.PCG64(0)).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
)


def plain_form(
    hidden: Tensor, weight: Tensor, bias: Tensor, pixels: Tensor, image_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`dvq.likelihood.tiled_nll` as the equation stands, left to autograd."""
    nll = plain_nll(hidden @ weight.T + bias, pixels)
    weights = torch.ones_like(nll[:, 0]) if image_weights is None else image_weights
    return (nll.sum(1) * weights).sum(), nll.detach()


def terms_and_gradients(model: Model, step: int) -> dict[str, Tensor]:
    """Loss and gradients of a step, by name, with the step's noise."""
    loss = model.trial.loss(model, IMAGES, torch.Generator().manual_seed(step), step)
    names, parameters = zip(*model.named_parameters(), strict=True)
    terms = dict(zip(loss._fields, loss[:3], strict=False))
    return terms | dict(zip(names, torch.autograd.grad(loss.surrogate, parameters), strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance", "ruled_out"),
    [(torch.float64, 1e-10, False), (torch.float32, 1e-4, False), (torch.float32, 1e-4, True)],
)
@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_the_fast_form_agrees_with_the_plain(
    estimator: str, dtype: torch.dtype, tolerance: float, ruled_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the probability of a code and of a pixel's value underflows, as in a trained model."""
    options: dict[str, Any] = {"num_latents": 2, "code_dim": 3, "features": 8, "kl_warmup": 20}
    options |= {"num_codes": 5, "distance_scale": 0.7}
    monkeypatch.setitem(posterior.TILE, "cpu", 5 * 70)  # pieces of a codebook's rows
    torch.manual_seed(0)
    model = Model(trial({"estimator": estimator, **taken(estimator, options)}))
    with torch.no_grad():
        # the images' likelihoods hang on the codes, as a trained decoder's do; where they hardly do, VIMCO's
        # signal is a small difference of numbers near 17,000, of which float32 knows two decimals
        model.decoder.head.weight *= 10
        if ruled_out:
            model.decoder.head.bias[::VALUES] -= 300
            codebook = getattr(model.latents, "codebook", torch.empty(1, 0, 1))
            codebook[:, :1] += 30
    model.to(dtype)
    terms_and_gradients(model, 9)  # NVIL's signal needs a minibatch before
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = terms_and_gradients(model, 10)
    model.load_state_dict(state)  # running averages go on from where they were
    model.latents.plain = True
    monkeypatch.setattr("dvq.network.tiled_nll", plain_form)
    for name, right in terms_and_gradients(model, 10).items():
        assert right.norm() > 0, f"{name}: nothing to compare"
        assert (fast[name] - right).norm() <= tolerance * right.norm(), name
