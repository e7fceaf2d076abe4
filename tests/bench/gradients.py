"""The estimators' bias and variance, against gradients by enumeration: the README's table.

    .venv/bin/python tests/bench/gradients.py

Medians over 20 random models so small that every z can be listed (tests/dvq/test_enumeration.py), of 20,000 gradients
of one image each: the bias ‖E g − ∇ELBO‖ / ‖∇ELBO‖, which an unbiased estimator shows as √(variance / 20,000),
and the variance E‖g − E g‖² / ‖∇ELBO‖². About a minute on one core.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.dvq.test_enumeration import IMAGE, Toy, estimates, exact_bound, gradients, options

MODELS, GROUPS, COPIES = 20, 100, 200
SETTINGS = {
    "gs-soft, τ = 0.5": {"estimator": "gs-soft"},
    "gs-soft, τ = 1": {"estimator": "gs-soft", "temperature": 1.0},
    "gs-soft, τ = 0.1": {"estimator": "gs-soft", "temperature": 0.1},
    "gs-hard, τ = 0.5": {"estimator": "gs-hard"},
    "reinmax": {"estimator": "reinmax"},
    "vimco, S = 4": {"estimator": "vimco"},
    "vimco, S = 4, backward: one": {"estimator": "vimco", "backward": "one"},
    "nvil": {"estimator": "nvil"},
    "nvil, c = 0": {"estimator": "nvil"},
    "rloo, S = 2": {"estimator": "rloo", "samples": 2},
    "rloo, S = 4": {"estimator": "rloo"},
}


def measure(name: str, seed: int) -> tuple[float, float]:
    """Bias and variance on one model. NVIL's c is what it becomes where the model stays as it is, or 0, as it begins;
    its b(x) is untrained."""
    one = options(**SETTINGS[name])
    toy = Toy(one, seed).eval()
    if name == "nvil":
        signal, _ = toy.latents.signal(exact_bound(toy, 1).detach()[None], toy.encoder(IMAGE), update=False)
        toy.latents.mean.copy_(signal[0])
    right = gradients(exact_bound(toy, 1), toy)
    found = estimates(one, toy, GROUPS, COPIES)
    bias = (found.mean(0) - right).norm() / right.norm()
    variance = COPIES * found.var(0).sum() / right.square().sum()
    return bias.item(), variance.item()


def main() -> None:
    torch.set_num_threads(1)
    print("| estimator | bias | variance |\n| --- | --- | --- |")
    for name in SETTINGS:
        bias, variance = np.median([measure(name, seed) for seed in range(MODELS)], axis=0)
        print(f"| {name} | {bias:.2f} | {variance:.1f} |", flush=True)


if __name__ == "__main__":
    main()
