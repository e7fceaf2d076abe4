"""Bits/dim by another hand: from a model's files alone, with the network and the ELBO written again, plainly, and
nothing of dvq between the files and the numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from dvq.config import trial
from dvq.evaluate import evaluate
from dvq.saved import load, save
from dvq.trainer import Trainer

SAMPLE = Path(__file__).parents[2] / "dvq/sample/cifar10-sample.npz"
SMALL: dict[str, Any] = {"features": 8, "num_latents": 3, "num_codes": 7, "code_dim": 2, "batch_size": 16}


class Files:
    """The network of ``model.safetensors``."""

    def __init__(self, folder: Path) -> None:
        self.weights = load_file(folder / "model.safetensors")
        self.trial = json.loads((folder / "trial.json").read_text())
        self.codebooks = self.weights["latents.codebook"].double()  # (K, C, D)
        self.log_prior = self.weights["latents.prior_logits"].double().log_softmax(1)  # (K, C)

    def normalized(self, x: Tensor, name: str) -> Tensor:
        its = [self.weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        mean, variance, weight, bias = (each[:, None, None] for each in its)
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias

    def residual(self, x: Tensor, name: str) -> Tensor:
        h = F.conv2d(x.relu(), self.weights[f"{name}.body.1.weight"], padding=1)
        h = F.conv2d(self.normalized(h, f"{name}.body.2").relu(), self.weights[f"{name}.body.4.weight"])
        return x + self.normalized(h, f"{name}.body.5")

    def encodings(self, images: np.ndarray) -> Tensor:
        """v, (B, 64, K, D)."""
        x = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 127.5 - 1
        x = F.conv2d(x, self.weights["encoder.body.0.weight"], stride=2, padding=1)
        x = F.conv2d(
            self.normalized(x, "encoder.body.1").relu(),
            self.weights["encoder.body.3.weight"],
            stride=2,
            padding=1,
        )
        x = self.normalized(x, "encoder.body.4")
        x = self.residual(self.residual(x, "encoder.body.5"), "encoder.body.6").relu()
        x = F.conv2d(x, self.weights["encoder.body.8.weight"], self.weights["encoder.body.8.bias"])
        k, _, d = self.codebooks.shape
        return x.double().flatten(2).mT.unflatten(2, (k, d))

    def distortion(self, codes: Tensor, images: np.ndarray) -> Tensor:
        """−log p(x|z) [nats] of codes (B, 64, K), (B,)."""
        vectors = torch.stack([book[codes[..., k]] for k, book in enumerate(self.codebooks)], 2)
        x = vectors.float().flatten(2).mT.unflatten(2, (8, 8))
        x = self.normalized(F.conv2d(x, self.weights["decoder.body.0.weight"]), "decoder.body.1")
        x = self.residual(self.residual(x, "decoder.body.2"), "decoder.body.3")
        for layer, norm in (("body.5", "body.6"), ("last.0", "last.1")):
            x = F.conv_transpose2d(x.relu(), self.weights[f"decoder.{layer}.weight"], stride=2, padding=1)
            x = self.normalized(x, f"decoder.{norm}")
        weight, bias = self.weights["decoder.head.weight"], self.weights["decoder.head.bias"]
        logits = F.conv2d(x.relu(), weight[:, :, None, None], bias).unflatten(1, (3, 256))
        pixels = torch.from_numpy(images).long().permute(0, 3, 1, 2)
        return F.cross_entropy(logits.transpose(1, 2).double(), pixels, reduction="none").sum((1, 2, 3))

    def squared_distances(self, images: np.ndarray) -> Tensor:
        """‖v − M[k, c]‖², (B, 64, K, C)."""
        return (self.encodings(images)[..., None, :] - self.codebooks).square().sum(-1)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    with np.load(SAMPLE) as sample:
        return np.ascontiguousarray(sample["train_images"][:, :16].transpose(1, 2, 3, 0))


@pytest.fixture
def trained(request: pytest.FixtureRequest, images: np.ndarray, tmp_path: Path) -> Path:
    one = trial({"estimator": request.param, "data": "cifar10", "learning_rate": 0.01, **SMALL})
    trainer = Trainer(one, images, torch.device("cpu"), torch.float32)
    for step in range(40):
        trainer.step(step)
    save(trainer.model, tmp_path)
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("trained", ["vq-ema"], indirect=True)
def test_bits_per_dim_of_the_nearest_codes(trained: Path, images: np.ndarray) -> None:
    files, found = Files(trained), evaluate(load(trained), images)
    codes = files.squared_distances(images).argmin(-1)
    nats = files.distortion(codes, images)
    for k, log_prior in enumerate(files.log_prior):
        nats -= log_prior[codes[..., k]].sum(1)
    bits = nats / (3072 * math.log(2))
    assert found["bits_per_dim"] == pytest.approx(bits.mean().item(), rel=1e-6)
    assert found["bits_per_dim_se"] == pytest.approx(bits.std().item() / len(images) ** 0.5, rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("trained", ["gs-soft", "reinmax"], indirect=True)
def test_bits_per_dim_of_draws(trained: Path, images: np.ndarray) -> None:
    """The rate, in which nothing is left to chance, and the distortion among those of other draws."""
    files, found = Files(trained), evaluate(load(trained), images)
    log_q = (-files.trial["distance_scale"] * files.squared_distances(images)).log_softmax(-1)
    nats = 3072 * math.log(2)
    rate = (log_q.exp() * (log_q - files.log_prior)).sum((1, 2, 3)).mean().item() / nats
    assert found["rate"] == pytest.approx(rate, rel=1e-6)
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(20):
        codes = log_q.exp().flatten(0, 2).multinomial(1, generator=generator).view(log_q.shape[:3])
        draws.append(files.distortion(codes, images).mean() / nats)
    among = torch.stack(draws)
    assert abs(found["distortion"] - among.mean()) < 5 * among.std()
