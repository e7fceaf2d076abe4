"""What the benchmark compares with computes the same loss, where no noise is left: else its ratios mean nothing."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvq import posterior
from dvq.config import estimators, trial
from dvq.latents import Sample
from dvq.model import Model
from dvq.quantizers import Deterministic
from dvq.saved import save
from dvq.trainer import Trainer
from dvq.trial import Trial
from tests.sizes import taken

IMAGES = torch.randint(0, 256, (4, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SMALL: dict[str, Any] = {"num_latents": 2, "num_codes": 5, "code_dim": 3, "features": 8}


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import plain

    return plain


def certain(one: Trial) -> Model:
    """A model whose posterior leaves nothing to chance."""
    torch.manual_seed(0)
    model = Model(one)
    with torch.no_grad():
        if one.estimator == "gaussian":
            for part in (model.encoder.body[-1].weight, model.encoder.body[-1].bias):
                part.unflatten(0, (2, 2, 3))[:, 1] = 0.0
            model.encoder.body[-1].bias.unflatten(0, (2, 2, 3))[:, 1] = -20.0  # log σ
        elif not isinstance(model.latents, Deterministic):
            model.latents.codebook *= 1000
    return model


@torch.no_grad()
def copy(model: Model, net: nn.Module) -> nn.Module:
    """``net`` with ``model``'s weights."""
    for ours, theirs in ((model.encoder, net.encoder), (model.decoder, net.decoder)):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            b.copy_(a.view_as(b))
    if hasattr(model.latents, "codebook"):
        net.book.copy_(model.latents.codebook)
    if hasattr(model.latents, "baseline"):
        net.baseline.load_state_dict(model.latents.baseline.state_dict())
    return net


def losses(model: Model, net: nn.Module) -> tuple[Tensor, Tensor]:
    return model.trial.loss(model, IMAGES, torch.Generator(), 0).surrogate, net(IMAGES).mean()


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_the_plain_version_has_the_same_loss(estimator: str, plain: Any) -> None:
    if estimator not in plain.PLAIN:
        pytest.skip(f"{estimator} has no plain form in tests/bench/plain.py to be measured against")
    one = trial({"estimator": estimator, **taken(estimator, SMALL)})
    model = certain(one).eval()
    found, right = losses(model, copy(model, plain.Plain(one)).eval())
    torch.testing.assert_close(found, right, rtol=1e-5, atol=0)


def test_vector_quantize_pytorch_has_the_same_loss(plain: Any) -> None:
    one = trial({"estimator": "vq-ema", **SMALL})
    model = certain(one)
    net = copy(model, plain.Library(one))
    net.quantize.codebook = model.latents.codebook
    torch.testing.assert_close(*losses(model, net), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("plain")
def test_a_measurement_of_every_variant() -> None:
    import training

    size, cpu = "F=64 K=8 C=512", torch.device("cpu")
    times, ceiling = training.measure(size, ["vq-ema"], 2, 1, cpu)
    assert [name for _, name in times] == ["plain", "library", "dvq"]
    assert all(len(spent) == 2 and min(spent) > 0 for spent in times.values())
    assert training.flops(size, "vq-ema", 1) / max(map(min, times.values())) < ceiling
    found = training.peaks(
        size, ["vq-ema"], cpu
    )  # in processes of their own: this one keeps memory of earlier tests
    assert sys.platform != "linux" or min(found.values()) > 10


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema", "vimco"])
def test_where_a_step_spends_its_time(estimator: str) -> None:
    import where

    one = trial({"estimator": estimator, "data": "cifar10-sample", "batch_size": 4, **SMALL})
    found = where.kernels(where.told(Trainer(one, IMAGES.numpy(), torch.device("cpu"), torch.float32)), 1)
    assert set(found) == {*where.KINDS, where.OTHER}
    assert min(found.values()) > 0


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["latents", "aten::bmm"], "latent variables"),
        (["autograd::engine::evaluate_function: _RelaxedBackward", "aten::bmm"], "latent variables"),
        (["_TiledNLL", "aten::mm"], "likelihood"),
        (["Optimizer.step#Adam.step", "aten::_fused_adam_"], "optimizer"),
        (["aten::convolution", "aten::cudnn_convolution"], "convolutions"),
        (["ConvolutionBackward0", "aten::convolution_backward"], "convolutions"),
        (["aten::relu"], "other: ReLU, casts, sums"),
    ],
)
def test_an_operation_counts_for_what_it_belongs_to(names: list[str], kind: str) -> None:
    import where

    event = None
    for name in names:
        event = SimpleNamespace(name=name, cpu_parent=event)
    assert where.kind(event) == kind


def test_a_trained_models_exps_underflow_only_where_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import trained

    far = torch.tensor([[0.0, -200.0]])
    with trained.underflow():
        assert posterior.above_underflow(far.clone()).equal(far)
    assert posterior.above_underflow(far.clone()).equal(torch.tensor([[0.0, posterior.LOWEST]]))
    with trained.anew():
        assert Sample(far, far, far, again=lambda _: None).again is None
    save(Model(trial({"estimator": "gs-soft", "data": "cifar10-sample", **SMALL})), tmp_path)
    monkeypatch.setattr(trained, "keep_memory", lambda: None)
    monkeypatch.setattr(trained, "ROUNDS", 1)
    monkeypatch.setattr(trained, "EVALUATED", 2)
    monkeypatch.setattr(sys, "argv", ["trained.py", str(tmp_path)])
    try:
        trained.main()
    finally:
        torch.set_flush_denormal(False)
    told = capsys.readouterr().out.splitlines()[1:]
    assert [re.sub(r" [\d.]+ \(.*", "", line) for line in told] == [
        "training",
        "evaluation",
        "evaluation by 16 draws",
    ]
