"""FSQ: its rounding against vector-quantize-pytorch's, what the levels decide, and training that goes on."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import FSQ as Theirs  # noqa: N811

from dvq import DvqError, figures
from dvq.config import overrides, point, trial
from dvq.evaluate import evaluate
from dvq.model import Model
from dvq.quantizers import Rounded
from dvq.sweep import Sweep, short_name
from dvq.trainer import Trainer
from tests.dvq.test_figures import curves, result

IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
SMALL: dict[str, Any] = {
    "estimator": "fsq",
    "data": "cifar10-sample",
    "num_latents": 2,
    "features": 4,
    "batch_size": 6,
}
LEVELS = [(8, 8, 8), (8, 5, 5, 5), (3,), (7, 4), (6, 3, 4), (1000,)]


def latents_of(levels: tuple[int, ...]) -> Rounded:
    return Rounded(trial({**SMALL, "levels": levels}))  # type: ignore[arg-type]


def some_v(dimensions: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """From 0 to where tanh is flat."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0, 5, 300, dtype=dtype).unsqueeze(-1)
    return spread * torch.randn(2, 300, dimensions, dtype=dtype, generator=generator)


@pytest.mark.parametrize("levels", LEVELS)
def test_it_rounds_as_vector_quantize_pytorch_does(levels: tuple[int, ...]) -> None:
    """Codes and what the decoder sees bit for bit, and the gradient."""
    latents, theirs = latents_of(levels), Theirs(list(levels))
    v = some_v(len(levels)).requires_grad_()
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    (vectors, codes), (right, indices) = latents.straight_through(v), theirs(v)
    assert torch.equal(codes, indices.long())
    assert torch.equal(codes, latents.codes(v))
    torch.testing.assert_close(vectors, right, rtol=0, atol=1e-6)  # theirs is b + (round(b) − b)
    torch.testing.assert_close(
        *(torch.autograd.grad((seen * weight).sum(), v)[0] for seen in (vectors, right)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(latents.codebook[1], theirs.implicit_codebook)


@pytest.mark.parametrize("levels", [*LEVELS, (2, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_code_is_its_own_vector_and_the_decoder_sees_those_of_the_codes(
    levels: tuple[int, ...], dtype: torch.dtype
) -> None:
    latents = latents_of(levels).to(dtype)
    v = 9 * some_v(len(levels), dtype)
    vectors, codes = latents.straight_through(v)
    assert torch.equal(vectors, latents.vectors(codes))
    assert torch.equal(latents.sample(v, torch.Generator()).vectors, vectors)
    assert latents.codebook.abs().max() == 1
    assert all(len(book.unique(dim=0)) == latents.codebook.shape[1] for book in latents.codebook)
    # v that are bounded to the codes have those codes: b = round(b), as far as tanh reaches
    b = latents.codebook * (latents.levels // 2)
    inside = ((b + latents.offset) / latents.width).atanh() - (latents.offset / latents.width).atanh()
    assert torch.equal(latents.codes(inside), torch.arange(latents.codebook.shape[1]).expand(2, -1))


def test_every_v_has_a_code_and_nan_reaches_the_decoder() -> None:
    latents = latents_of((8, 5))
    v = torch.tensor([[[1e30, -1e30]], [[float("nan"), 0.0]]])
    vectors, codes = latents.straight_through(v)
    assert codes[0].item() == 7  # the highest level of the first, the lowest of the second
    assert 0 <= codes[1].item() < 40
    assert vectors[0].tolist() == [[0.75, -1.0]]
    assert vectors[1, 0, 0].isnan()


def test_the_gradient_is_the_equations() -> None:
    """Straight through the rounding to the encoder, by maximum likelihood to the prior."""
    torch.manual_seed(0)
    model = Model(trial({**SMALL, "levels": (4, 3)})).double().eval()
    images = torch.from_numpy(IMAGES[:3])
    surrogate = model.trial.loss(model, images, torch.Generator(), 0).surrogate
    encoder, prior = model.encoder.body[-1].weight, model.latents.prior_logits
    found = torch.autograd.grad(surrogate, [encoder, prior])

    v = model.encoder(images)
    width, offset = torch.tensor([3.0, 2.0]).double() * 1.001 / 2, torch.tensor([0.5, 0.0]).double()
    bounded = width * torch.tanh(v + torch.atanh(offset / width)) - offset
    half = torch.tensor([2.0, 1.0]).double()
    seen = (bounded.round() / half).detach().requires_grad_()
    (to_seen,) = torch.autograd.grad(model.distortion(seen, images)[0] / 3, seen)
    digits = bounded.round().long() + torch.tensor([2, 1])
    codes = digits[..., 0] + 4 * digits[..., 1]
    counts = torch.stack([torch.bincount(row, minlength=12) for row in codes]).double()
    to_prior = (prior.softmax(-1) * counts.sum(1, keepdim=True) - counts) / 3
    torch.testing.assert_close(
        found[0], torch.autograd.grad(bounded / half, encoder, to_seen)[0], rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(found[1], to_prior.detach())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"num_codes": 128},
            "num_codes = 128: the levels 8, 8, 8 make 512 codes; set levels to others, or num_codes to 512",
        ),
        ({"levels": [8, 5], "code_dim": 3}, "code_dim = 3: the levels 8, 5 make 2 dimensions"),
        ({"levels": []}, "levels = []: give at least one"),
        ({"levels": [8, 1]}, "levels.1 = 1: input should be greater than or equal to 2"),
        ({"levels": [1001]}, "levels.0 = 1001: input should be less than or equal to 1000"),
        ({"levels": 8}, "levels = 8: give a list of numbers"),
        ({"codebook_std": 1.0}, "fsq has no 'codebook_std', which is a field of gs-soft"),
        ({"codebook_init": "kmeans"}, "fsq has no 'codebook_init'"),
        ({"commitment": 1.0}, "fsq has no 'commitment'"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(DvqError) as caught:
        trial({**SMALL, **fields})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_levels_decide_the_codes_and_travel_as_a_list() -> None:
    at = {"estimator": "fsq", "levels": [8, 6, 5]}
    assert point(overrides(at)) == at
    one = trial(point(overrides(at)))
    assert (one.num_codes, one.code_dim) == (240, 3)  # type: ignore[attr-defined]
    assert one.changed() == {"levels": [8, 6, 5]}
    said = trial({**at, "num_codes": 240, "code_dim": 3})
    assert (said, said.key()) == (one, one.key())
    assert {"num_codes", "code_dim"} <= one.unkeyed()
    assert short_name(one, at) == "fsq-c240-k8-s0-levels-8-6-5"
    sweep = Sweep(
        name="s", base={"code_dim": 3}, grid={"estimator": ["fsq"], "levels": [[8, 8, 8], [8, 6, 5]]}
    )
    assert list(sweep.trials()) == ["fsq-c512-k8-s0-levels-8-8-8", "fsq-c240-k8-s0-levels-8-6-5"]


def test_training_goes_on_to_the_same_bits() -> None:
    one, cpu = trial({**SMALL, "levels": (5, 4)}), torch.device("cpu")
    whole, cut, rest = (Trainer(one, IMAGES, cpu, torch.float32) for _ in range(3))
    for step in range(6):
        whole.step(step)
    for step in range(3):
        cut.step(step)
    rest.restore(cut.state())
    for step in range(3, 6):
        rest.step(step)
    for (name, found), (_, right) in zip(rest.tensors(), whole.tensors(), strict=True):
        assert torch.equal(found, right), name
    judged = evaluate(whole.model, IMAGES, bound_samples=3)
    assert judged["bound"] == pytest.approx(judged["bits_per_dim"], rel=1e-6)  # its draws are one
    usage = np.asarray(judged["usage"])
    assert usage.shape == (2, 20)
    assert judged["dead_codes"] == (usage == 0).sum()


def test_its_levels_are_one_curve_in_figure_1a_unless_some_make_the_same_codes() -> None:
    points = [((8, 8), 64, 5.5), ((8, 6, 5), 240, 5.2), ((8, 8, 8), 512, 5.1)]
    found = [result("fsq", codes, 4, 0, bits, levels=list(each)) for each, codes, bits in points]
    assert len(list(curves(figures.figure_1a(found).axes[0]))) == 1
    other = result("fsq", 512, 4, 0, 5.0, levels=[4, 4, 4, 8])
    assert len(list(curves(figures.figure_1a([*found, other]).axes[0]))) == 4
