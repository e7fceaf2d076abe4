"""Training's speed against the plain version of the same model: ``make bench``.

Process CPU time of a training step on one thread, the variants interleaved in rounds in one process, so that the
machine's own changes of speed touch all alike. The plain version is the equations as one first writes them in
PyTorch: NCHW, distances by a matrix product, ``gumbel_softmax``, ``cross_entropy`` on the whole logits.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvq.config import trial
from dvq.estimators.gs_soft import GSSoft
from dvq.trainer import Trainer
from dvq.trial import Trial

SIZE: dict[str, Any] = {"features": 64, "num_latents": 8, "num_codes": 512, "code_dim": 16}
Step = Callable[[int], object]


class Plain(nn.Module):
    """GS-Soft or VQ-VAE with EMA, as one first writes it."""

    def __init__(self, one: Trial) -> None:
        super().__init__()
        f, width = one.features, one.num_latents * one.code_dim
        self.one, self.k, self.d = one, one.num_latents, one.code_dim
        self.c = SIZE["num_codes"]

        def residual() -> nn.Module:
            return nn.Sequential(
                nn.ReLU(), nn.Conv2d(f, f, 3, padding=1, bias=False), nn.BatchNorm2d(f),
                nn.ReLU(), nn.Conv2d(f, f, 1, bias=False), nn.BatchNorm2d(f),
            )  # fmt: skip

        self.e1 = nn.Sequential(
            nn.Conv2d(3, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU(),
            nn.Conv2d(f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f),
        )  # fmt: skip
        self.e2 = nn.ModuleList([residual(), residual()])
        self.e3 = nn.Sequential(nn.ReLU(), nn.Conv2d(f, width, 1))
        self.d1 = nn.Sequential(nn.Conv2d(width, f, 1, bias=False), nn.BatchNorm2d(f))
        self.d2 = nn.ModuleList([residual(), residual()])
        self.d3 = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU(),
            nn.ConvTranspose2d(f, f, 4, 2, 1, bias=False), nn.BatchNorm2d(f), nn.ReLU(), nn.Conv2d(f, 768, 1),
        )  # fmt: skip
        book = torch.randn(self.k, self.c, self.d)
        if isinstance(one, GSSoft):
            self.book = nn.Parameter(book)
        else:
            self.register_buffer("book", book)
            self.register_buffer("counts", torch.ones(self.k, self.c))
            self.register_buffer("sums", book.clone())
        self.prior = nn.Parameter(torch.zeros(self.k, self.c))

    def loss(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        h = self.e1(x)
        for block in self.e2:
            h = h + block(h)
        b = len(x)
        v = self.e3(h).view(b, self.k, self.d, 64).permute(1, 0, 3, 2).reshape(self.k, b * 64, self.d)
        distances = (
            v.square().sum(-1, keepdim=True) - 2 * v @ self.book.mT + self.book.square().sum(-1)[:, None]
        )
        z, rest = self.soft(distances) if isinstance(self.one, GSSoft) else self.hard(v, distances)
        h = self.d1(z.view(self.k, b, 64, self.d).permute(1, 0, 3, 2).reshape(b, -1, 8, 8))
        for block in self.d2:
            h = h + block(h)
        logits = self.d3(h).view(b, 3, 256, 32, 32).transpose(1, 2)
        nll = F.cross_entropy(logits, images.permute(0, 3, 1, 2).long(), reduction="sum")
        return (nll + rest) / b

    def soft(self, distances: Tensor) -> tuple[Tensor, Tensor]:
        log_q = (-distances).log_softmax(-1)
        kl = (log_q.exp() * (log_q - self.prior.log_softmax(-1)[:, None])).sum()
        return F.gumbel_softmax(-distances, tau=0.5) @ self.book, kl

    def hard(self, v: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        codes = distances.argmin(-1)
        chosen = F.one_hot(codes, self.c).float()
        m = chosen @ self.book
        with torch.no_grad():
            self.counts.mul_(0.99).add_(chosen.sum(1), alpha=0.01)
            self.sums.mul_(0.99).add_(chosen.mT @ v, alpha=0.01)
            self.book.copy_(self.sums / (self.counts + 1e-5).unsqueeze(-1))
        rate = -self.prior.log_softmax(-1).gather(1, codes).sum()
        commitment = 0.25 * 3072 * len(v[0]) / 64 * F.mse_loss(v, m.detach())
        return v + (m - v).detach(), rate + commitment


def plain_step(one: Trial, images: np.ndarray) -> Step:
    torch.manual_seed(0)
    model = Plain(one)
    optimizer = torch.optim.Adam(model.parameters(), lr=one.learning_rate)

    def step(at: int) -> None:
        start = at * one.batch_size % len(images)
        model.loss(torch.from_numpy(images[start : start + one.batch_size])).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def fast_step(one: Trial, images: np.ndarray) -> Step:
    return Trainer(one, images, torch.device("cpu"), torch.float32).step


VARIANTS = {"plain": plain_step, "dvq": fast_step}


def measured(estimator: str, batch: int) -> tuple[Trial, np.ndarray]:
    one = trial({**SIZE, "estimator": estimator, "data": "cifar10-sample", "batch_size": batch})
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (4 * batch, 32, 32, 3), dtype=np.uint8)
    return one, images


def compare(estimator: str, rounds: int, batch: int = 16) -> dict[str, Any]:
    """Median CPU milliseconds a step of each variant, and the ratio to plain round by round."""
    steps = {name: make(*measured(estimator, batch)) for name, make in VARIANTS.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for at in range(rounds + 1):
        for name, step in steps.items():
            began = time.process_time()
            step(at)
            if at:  # the first warms up
                spent[name].append(1000 * (time.process_time() - began))
    ratios = [a / b for a, b in zip(spent["plain"], spent["dvq"], strict=True)]
    return {
        "estimator": estimator,
        "milliseconds": {name: statistics.median(times) for name, times in spent.items()},
        "images_per_second": {n: 1000 * batch / statistics.median(times) for n, times in spent.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_mib_at_64": {name: peak(estimator, name) for name in steps},
    }


def peak(estimator: str, name: str) -> float:
    """Peak memory of two steps at batch 64, over what the process takes before them, in one of its own [MiB]."""
    command = [sys.executable, __file__, "--peak", estimator, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak(estimator: str, name: str) -> float:
    step = VARIANTS[name](*measured(estimator, 64))
    status = Path("/proc/self/status")

    def kib(field: str) -> int:
        return int(status.read_text().split(f"{field}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kib("VmRSS")
    for at in range(2):
        step(at)
    return (kib("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(_peak(*args.peak))
        return
    results = [compare(estimator, args.rounds) for estimator in ("gs-soft", "vq-ema")]
    print(
        "| estimator | plain, images/s | dvq, images/s | ratio (min to max) | peak MiB at batch 64, plain / dvq |"
    )
    print("| --- | --- | --- | --- | --- |")
    for one in results:
        speed, ratio, memory = one["images_per_second"], one["ratio"], one["peak_mib_at_64"]
        print(
            f"| {one['estimator']} | {speed['plain']:.1f} | {speed['dvq']:.1f} "
            f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) "
            f"| {memory['plain']:.0f} / {memory['dvq']:.0f} |"
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
