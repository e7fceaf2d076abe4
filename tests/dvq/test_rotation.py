"""The rotation trick against the matrix that it stands for."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from dvq.codes import rotated
from dvq.config import trial
from dvq.model import Model

SMALL: dict[str, Any] = {
    "data": "cifar10-sample",
    "num_latents": 2,
    "num_codes": 5,
    "code_dim": 3,
    "features": 4,
}


def some(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 40, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def matrix(v: Tensor, q: Tensor) -> Tensor:
    """λR of each pair: (…, D, D)."""
    e, unit = (x / x.norm(dim=-1, keepdim=True) for x in (v, q))
    r = e + unit
    r = r / r.norm(dim=-1, keepdim=True)
    outer = [a.unsqueeze(-1) * b.unsqueeze(-2) for a, b in ((r, r), (unit, e))]
    R = torch.eye(v.shape[-1], dtype=v.dtype) - 2 * outer[0] + 2 * outer[1]
    torch.testing.assert_close(R @ R.mT, torch.eye(v.shape[-1], dtype=v.dtype).expand_as(R))
    return R * (q.norm(dim=-1) / v.norm(dim=-1))[..., None, None]


def test_it_is_the_matrix_in_value_and_gradient() -> None:
    v, q, weight = some(0).requires_grad_(), 3 * some(1), some(2)
    found = rotated(v, q)
    right = (matrix(v.detach(), q) @ v.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(found, q)
    torch.testing.assert_close(right, q)
    torch.testing.assert_close(*(torch.autograd.grad((seen * weight).sum(), v)[0] for seen in (found, right)))


def test_its_gradient_is_vector_quantize_pytorchs() -> None:
    v, q, weight = some(0).requires_grad_(), 3 * some(1), some(2)
    found, right = (torch.autograd.grad((turn(v, q) * weight).sum(), v)[0] for turn in (rotated, rotate_to))
    torch.testing.assert_close(found, right)


def test_where_the_code_is_the_encoding_it_is_straight_through() -> None:
    v, weight = some(0).requires_grad_(), some(2)
    (gradient,) = torch.autograd.grad((rotated(v, v) * weight).sum(), v)
    torch.testing.assert_close(gradient, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_and_opposites_are_finite(dtype: torch.dtype) -> None:
    """Where v = 0 it is straight through; where q = 0 nothing passes; v and −v are of a plane that is anyone's."""
    v, q, weight = some(0, dtype), some(1, dtype), some(2, dtype)
    v[:, :10], q[:, 5:20] = 0, 0
    q[:, 20:30] = -2 * v[:, 20:30]
    v.requires_grad_()
    found = rotated(v, q)
    assert torch.equal(found, q)
    (gradient,) = torch.autograd.grad((found * weight).sum(), v)
    assert gradient.isfinite().all()
    assert torch.equal(gradient[:, :10], weight[:, :10])
    assert not gradient[:, 10:20].any()
    torch.testing.assert_close(
        gradient[:, 20:].norm(dim=-1), (weight.norm(dim=-1) * q.norm(dim=-1) / v.norm(dim=-1))[:, 20:]
    )


@pytest.mark.parametrize("estimator", ["vq-ema", "vq-loss"])
def test_the_loss_turns_the_encoders_gradient_and_nothing_else(estimator: str) -> None:
    """On the same weights the terms are the straight-through estimator's, and so are all other gradients."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 32, 32, 3), generator=generator).byte()
    found = {}
    for gradient in ("straight-through", "rotation"):
        torch.manual_seed(0)
        one = trial({**SMALL, "estimator": estimator, "gradient": gradient, "commitment": 0.7})
        model = Model(one).double().eval()
        loss = one.loss(model, images, torch.Generator(), 0)
        inputs = [*model.parameters()]
        names = [name for name, _ in model.named_parameters()]
        found[gradient] = loss, dict(zip(names, torch.autograd.grad(loss.surrogate, inputs), strict=True))
    (straight, its), (turned, theirs) = found["straight-through"], found["rotation"]
    for a, b in zip(straight, turned, strict=True):
        torch.testing.assert_close(a, b)
    for name in its:
        same = torch.allclose(its[name], theirs[name], rtol=1e-6, atol=1e-9)
        assert same != name.startswith("encoder"), name

    v = model.encoder(images)
    codes = model.latents.codes(v.detach())
    m = model.latents.vectors(codes).detach()
    z = m.clone().requires_grad_()
    (to_z,) = torch.autograd.grad(model.distortion(z, images)[0] / 3, z)
    to_v = (matrix(v.detach(), m).mT @ to_z.unsqueeze(-1)).squeeze(-1)
    to_v += 0.7 * 3072 * 2 * (v.detach() - m) / v.numel()
    last = model.encoder.body[-1].weight
    torch.testing.assert_close(
        theirs[f"encoder.body.{len(model.encoder.body) - 1}.weight"], torch.autograd.grad(v, last, to_v)[0]
    )
