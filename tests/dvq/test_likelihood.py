"""The pixels' likelihood: what it costs, and that the tiled form is the plain one."""

import math

import pytest
import torch

from dvq import DvqError
from dvq.config import trial
from dvq.likelihood import TILE, gpu_gradient, gpu_nll, plain_nll, tiled_nll

SUBPIXELS = 3 * 32 * 32


def head(images: int, features: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (images, 1024, features), (768, features), (768,)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def pixels(images: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (images, 1024, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_a_uniform_model_costs_eight_bits_a_dimension() -> None:
    nll = plain_nll(torch.zeros(2, 1024, 768, dtype=torch.float64), pixels(2))
    assert nll.shape == (2, 3)
    assert nll.sum(1).tolist() == pytest.approx([SUBPIXELS * math.log(256)] * 2, rel=1e-12)
    assert (nll.sum(1) * trial({"estimator": "gs-soft"}).bits_per_nat).tolist() == pytest.approx(
        [8.0, 8.0], rel=1e-12
    )


def test_each_value_from_0_to_255_is_a_category_of_its_own() -> None:
    logits = torch.zeros(256, 1, 3, 256, dtype=torch.float64)
    logits[torch.arange(256), :, :, torch.arange(256)] = 50.0  # image v is certain of the value v everywhere
    values = torch.arange(256, dtype=torch.uint8).view(256, 1, 1).expand(-1, 1, 3)
    assert plain_nll(logits.flatten(2), values).max() < 1e-9
    assert plain_nll(logits.flatten(2), values.flip(0)).min() > 49


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("tile", [256, 300])  # of 2048 rows: 8 tiles, and 7 whose last is smaller
def test_tiles_agree_with_the_plain_form(
    dtype: torch.dtype, tolerance: float, weighted: bool, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TILE, "cpu", tile)
    inputs, targets = head(2, 5, dtype), pixels(2)
    weights = torch.tensor([0.25, 3.0], dtype=dtype) if weighted else None
    hidden, weight, bias = inputs
    plain = plain_nll(hidden @ weight.T + bias, targets)
    expected = (plain.sum(1) * weights).sum() if weights is not None else plain.sum()
    total, nll = tiled_nll(hidden, weight, bias, targets, weights)
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(nll, plain, rtol=tolerance, atol=0)
    gradients = torch.autograd.grad(2 * total, inputs)
    for found, right in zip(gradients, torch.autograd.grad(2 * expected, inputs), strict=True):
        assert (found - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("tile", [256, 1024])
def test_bfloat16_is_near_the_plain_form(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine images: two products of 4,096 rows, and one of 1,024, in tiles and in one."""
    monkeypatch.setitem(TILE, "cpu", tile)
    inputs, targets = head(9, 16, torch.float32), pixels(9)
    weights = torch.linspace(0.5, 2, 9)
    hidden, weight, bias = inputs
    plain = plain_nll(hidden @ weight.T + bias, targets)
    expected = torch.autograd.grad((plain.sum(1) * weights).sum(), inputs)
    total, nll = tiled_nll(hidden.bfloat16(), weight, bias, targets, weights)
    assert total.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(nll, plain, rtol=1e-3, atol=0)
    torch.testing.assert_close(total, (plain.sum(1) * weights).sum(), rtol=1e-3, atol=0)
    for found, right in zip(torch.autograd.grad(total, inputs), expected, strict=True):
        assert (found - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_what_a_gpu_computes_agrees_with_the_plain_form(weighted: bool) -> None:
    (hidden, weight, bias), targets = head(2, 5, torch.float64), pixels(2)
    logits = (hidden @ weight.T).detach().requires_grad_()
    nll = plain_nll(logits + bias, targets).sum(1)
    weights = torch.tensor([0.25, 3.0], dtype=torch.float64) if weighted else torch.ones(2)
    (expected,) = torch.autograd.grad((nll * weights).sum(), logits)
    rows, places = logits.detach().flatten(0, 1), targets.flatten(0, 2).long().view(-1, 3, 1)
    each = weights.repeat_interleave(len(rows) // 2).unsqueeze(-1) if weighted else None
    equations = gpu_gradient.__wrapped__  # type: ignore[attr-defined]
    found, gradient = equations(rows, bias.detach(), places, each, torch.float64)
    torch.testing.assert_close(found.view(2, -1).sum(1), nll.detach())
    torch.testing.assert_close(gradient.view_as(expected), expected)
    torch.testing.assert_close(gpu_nll(rows, bias.detach(), places), found)
    assert equations(rows, bias.detach(), places, each, torch.bfloat16)[1].dtype == torch.bfloat16


def test_a_second_derivative_and_a_second_backward_pass_are_one_sentence_each() -> None:
    inputs = head(1, 4, torch.float32)
    total, _ = tiled_nll(*inputs, pixels(1))
    with pytest.raises(DvqError, match=r"no second derivatives; .* output_head: transposed"):
        torch.autograd.grad(total, inputs[0], create_graph=True)
    (2 * total).backward(retain_graph=True)
    with pytest.raises(DvqError, match="kept for one backward pass; compute the loss again"):
        total.backward()


def test_logits_of_any_size_have_a_likelihood() -> None:
    """Of hundreds, whose exponentials are beyond float32."""
    hidden, weight, bias = (tensor.detach() for tensor in head(1, 4, torch.float32))
    targets, hidden = pixels(1), 200 * hidden
    found = tiled_nll(hidden, weight, bias, targets)[1]
    torch.testing.assert_close(found, plain_nll(hidden @ weight.T + bias, targets))


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, bias = (tensor.detach() for tensor in head(1, 4, torch.float32))
    total, _ = tiled_nll(hidden, weight, bias, pixels(1))
    assert not total.requires_grad
