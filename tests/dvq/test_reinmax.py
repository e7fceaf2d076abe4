"""ReinMax's gradient: the paper's algorithm, and what it is exact for."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dvq import draws
from dvq.draws import plain_reinmax
from tests.dvq.test_enumeration import Toy, estimates, exact_bound, gradients, options, parameters, worst_z

K, C, D = 2, 4, 3
MATRIX = torch.randn(K * D, K * D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Function = Callable[[Tensor], Tensor]


def posterior(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (K, 1, C) and codebooks (K, C, D) to differentiate, and a prior."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (K, 1, C), (K, C, D), (K, C)
    logits, codebook, prior = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return logits.requires_grad_(), codebook.requires_grad_(), prior.log_softmax(-1)


def draw(codes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next draws be these codes of the K latent variables."""
    monkeypatch.setattr(draws, "inverse_draw", lambda *_: torch.tensor(codes).view(K, 1, 1))


def linear(x: Tensor) -> Tensor:
    return (MATRIX[0] * x).sum()


def quadratic(x: Tensor) -> Tensor:
    return x @ MATRIX @ x + linear(x)


def cubic(x: Tensor) -> Tensor:
    return x.pow(3).sum() + quadratic(x)


@pytest.mark.parametrize("codes", list(itertools.product(range(C), repeat=K)))
def test_the_gradient_is_that_of_the_papers_algorithm(
    codes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, codebook, prior = posterior(0)
    draw(codes, monkeypatch)
    seen, _ = plain_reinmax(logits, codebook, prior, torch.Generator())
    assert torch.equal(seen[:, 0], torch.stack([codebook[k, c] for k, c in enumerate(codes)]))
    found = torch.autograd.grad(cubic(seen.flatten()), (logits, codebook))

    q = logits.softmax(-1)
    onehot = torch.nn.functional.one_hot(torch.tensor(codes).view(K, 1), C).double()
    middle = ((((q + onehot) / 2).log() - logits).detach() + logits).softmax(-1)
    z = 2 * middle - q / 2
    z = z - z.detach() + onehot
    right = torch.autograd.grad(cubic(torch.bmm(z, codebook).flatten()), (logits, codebook))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("f", "exact"), [(linear, True), (quadratic, True), (cubic, False)])
def test_it_is_unbiased_for_what_is_quadratic(
    f: Function, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all draws, summed out, of two latent variables that act together."""
    logits, codebook, prior = posterior(2)
    log_q, expected, mean = logits.log_softmax(-1), torch.zeros(()), torch.zeros(K, 1, C, dtype=torch.float64)
    for codes in itertools.product(range(C), repeat=K):
        probability = torch.stack([log_q[k, 0, c] for k, c in enumerate(codes)]).sum().exp()
        vectors = torch.stack([codebook[k, c] for k, c in enumerate(codes)])
        expected = expected + probability * f(vectors.flatten()).detach()
        draw(codes, monkeypatch)
        seen, _ = plain_reinmax(logits, codebook, prior, torch.Generator())
        mean += probability.detach() * torch.autograd.grad(f(seen.flatten()), logits, retain_graph=True)[0]
    (right,) = torch.autograd.grad(expected, logits)
    assert ((mean - right).norm() < 1e-12 * right.norm()) == exact


def test_the_decoder_is_trained_without_bias() -> None:
    toy = Toy(options("reinmax"), seed=1).eval()
    decoder = torch.cat([torch.full((p.numel(),), p is toy.decoder.weight) for p in parameters(toy)])
    right = gradients(exact_bound(toy, 1), toy)
    found = estimates(options("reinmax"), toy, 200, 200)
    assert worst_z(found[:, decoder], right[decoder]) < 4
    assert worst_z(found[:, ~decoder], right[~decoder]) > 4  # a decoder of this kind is not quadratic
