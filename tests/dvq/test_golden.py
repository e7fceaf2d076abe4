"""Golden loss curves: a few steps of tiny trials in float64, number by number.

They fail when an edit changes what a trial computes. If that was meant: raise ``dvq.NUMERICS``, so that the
stores' results of the old code are no longer taken for the new code's, and run ``make golden``.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import dvq
from dvq.config import estimators, trial
from dvq.evaluate import evaluate
from dvq.trainer import Trainer
from tests.sizes import taken

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 5


def curve(estimator: str) -> list[list[float]]:
    """Surrogate, distortion and rate of each step, then the evaluation's rate, distortion and fitted bits/dim."""
    sizes = {"num_latents": 2, "num_codes": 5, "code_dim": 3, "features": 4, "residual_blocks": 1}
    images = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    tiny = trial(
        {"estimator": estimator, "data": "cifar10-sample", "batch_size": 4, **taken(estimator, sizes)}
    )
    trainer = Trainer(tiny, images, torch.device("cpu"), torch.float64)
    points = [trainer.step(step).tolist() for step in range(STEPS)]
    result = evaluate(trainer.model, images, training=images)
    return [*points, [result["rate"], result["distortion"], result["fitted_bits_per_dim"]]]


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_numbers_are_the_golden_ones(estimator: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert golden["numerics"] == dvq.NUMERICS, (
        "dvq.NUMERICS was raised: run make golden and commit the new curves"
    )
    assert estimator in golden["curves"], "a new estimator: run make golden and commit its curve"
    expected = golden["curves"][estimator]
    for found, right in zip(curve(estimator), expected, strict=True):
        assert found == pytest.approx(right, rel=1e-6), (
            "numbers changed: raise dvq.NUMERICS, then make golden"
        )


def main() -> None:
    document = {"numerics": dvq.NUMERICS, "curves": {name: curve(name) for name in sorted(estimators())}}
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
