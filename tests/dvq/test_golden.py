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


def test_recording_a_new_curve_leaves_those_that_agree_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, kept, changed = [[1.0, 2.0], [3.0]], [[1.0, 2 + 1e-9], [3.0]], [[1.0, 2.1], [3.0]]
    monkeypatch.setattr(f"{__name__}.GOLDEN", file := tmp_path / "golden.json")
    monkeypatch.setattr(f"{__name__}.curve", lambda _: found)
    one, other, *_ = estimators()
    file.write_text(json.dumps({"numerics": 0, "curves": {one: kept, other: changed, "gone": kept}}))
    main()
    curves = dict.fromkeys(estimators(), found) | {one: kept}
    assert json.loads(file.read_text()) == {"numerics": dvq.NUMERICS, "curves": curves}


def main() -> None:
    """Record the curves. Those that agree with the golden ones stay as they are: another machine has other last
    digits."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["curves"]
    curves = {name: curve(name) for name in sorted(estimators())}
    for name, points in golden.items():
        if curves.get(name) == [pytest.approx(point, rel=1e-6) for point in points]:
            curves[name] = points
    document = {"numerics": dvq.NUMERICS, "curves": curves}
    GOLDEN.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
