"""The words that ``make findings`` finds for results in which each finding of the paper holds, or does not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from components.store import Store
from dvq.findings import Claim, Estimate, Miniature, claims, signal
from dvq.sweep import load_sweep
from dvq.trial import Trial, values
from pipeline import findings, preflight

SWEEP = load_sweep(preflight.SWEEPS / "findings.yaml")
PAPER = {
    "vq-ema loses": 0.3,  # bits/dim from C = 64 to 256
    "vq-ema at C = 8": 0.5,  # its optimum is at C = 64
    "gs-soft loses": -0.1,
    "vimco loses": -0.05,  # less than GS-Soft gains: it falls behind
    "vimco behind in K": 0.3,  # at K = 8
    "vimco at K = 4": 0.0,
    "vimco power": 1.0,
    "gs-soft power": -0.5,
    "gs-soft rate": 0.2,
    "gs-soft distortion": -1.0,
    "vimco rate": 0.2,
    "vimco distortion": -1.0,
    "vq-ema rate": -0.01,
    "components": 4.5,
    "components weighted": 4.0,
    "scatter": 0.003,
}
"""a world in which every finding holds"""
MORE = "VQ-VAE degrades more than GS-Soft"
STAYS = "VQ-VAE's rate stays: it moves less than GS-Soft's rises"
BEHIND = "VIMCO falls behind GS-Soft as C grows"
FASTER = "VIMCO's grows faster than GS-Soft's"
NAMES = ("GS-Soft", "VIMCO", "VQ-VAE, EMA")


def result(name: str, trial: Trial, world: dict[str, float]) -> dict[str, Any]:
    """The results of a trial in ``world``, with seeds scattered evenly about their mean."""
    fields = values(trial)
    who, codes, latents = fields["estimator"], fields["num_codes"], fields["num_latents"]
    off = (fields["seed"] - 1) * world["scatter"]
    bits = 7.0 + (world[f"{who} loses"] if codes == 256 else 0.0) + off
    if who == "vq-ema":
        bits += world["vq-ema at C = 8"] * (codes == 8)
    if who == "vimco":
        bits += world["vimco behind in K"] * (latents == 8) + world["vimco at K = 4"] * (latents == 4)
    gain = [world.get(f"{who} {term}", -0.5) + off for term in ("rate", "distortion")]
    made: dict[str, Any] = {
        "name": name,
        "trial": fields,
        "data": {"name": "cifar10-sample"},
        "evaluation": {
            "bits_per_dim": 99.0,  # its prior lags behind, and nothing is told by it
            "fitted_bits_per_dim": bits,
            "rate": 0.5,
            "distortion": 6.5 + off,
            "perplexity": 2.0,
            "usage": [[5, 5] + [0] * (codes - 2)] * latents,
        },
        "analysis": {
            "components_95_mean": world["components"] + off,
            "components_95_weighted_mean": world["components weighted"] + off,
        },
        "curves": [
            {"step": 100, "rate": 99.0, "rate_least": 0.4, "distortion": 7.0},
            {"step": fields["steps"], "rate": 9.0, "rate_least": 0.4 + gain[0], "distortion": 7.0 + gain[1]},
        ],
    }
    if fields.get("probe_draws"):
        power = world[f"{who} power"]
        made["probe"] = [{"step": 100, "variance": 9e9}]  # not the last look
        made["probe"] += [{"step": 300, "bias": 1.0, "variance": 100 * latents**power * math.exp(off)}]
    return made


def told(changes: dict[str, float]) -> list[Claim]:
    """What is said of the paper's world with ``changes``."""
    assert changes.keys() <= PAPER.keys()
    world = {**PAPER, **changes}
    return claims(
        Miniature(SWEEP.base, [result(name, trial, world) for name, trial in SWEEP.trials().items()])
    )


def words(found: list[Claim], word: str) -> set[str]:
    return {one.says for one in found if one.verdict() == word}


def test_all_agrees_in_the_papers_world() -> None:
    found = told({})
    assert words(found, "agrees") == {one.says for one in found}
    assert [one.number for one in found] == [1] * 4 + [2] * 5 + [3] * 3 + [4] * 6
    assert found[0].shows.endswith("+0.300 ± 0.002, not fitted +0.000 ± 0.000")
    assert found[6].shows.endswith("as L to the power +1.000 ± 0.002")
    assert found[7].shows.endswith("as L to the power -0.500 ± 0.002")


@pytest.mark.parametrize(
    ("changes", "refuted"),
    [
        ({"vq-ema loses": -0.3}, {"VQ-VAE degrades as C grows", MORE}),
        ({"gs-soft loses": 0.4}, {"GS-Soft does not degrade", MORE, BEHIND}),
        ({"vimco loses": 0.3}, {"VIMCO does not degrade"}),
        ({"vimco loses": -0.2}, {BEHIND}),
        ({"vimco behind in K": -0.3}, {"VIMCO falls behind GS-Soft as K grows"}),
        ({"vimco at K = 4": 1.0}, set()),
        (
            {"vimco at K = 4": 1.0, "vimco loses": -0.2},
            {BEHIND},
        ),  # far behind at each C, and less so at the last
        ({"vimco power": -1.0}, {"the variance of VIMCO's gradient grows with L", FASTER}),
        ({"gs-soft power": 0.5}, {"the variance of GS-Soft's gradient does not grow with L"}),
        ({"vimco power": 0.5, "gs-soft power": 0.0}, set()),
        ({"gs-soft power": 2.0}, {"the variance of GS-Soft's gradient does not grow with L", FASTER}),
        ({"gs-soft rate": -0.2}, {"GS-Soft adds rate as its distortion falls", STAYS}),
        ({"gs-soft distortion": 0.1}, {"GS-Soft adds rate as its distortion falls"}),
        ({"vimco rate": -0.2}, {"VIMCO adds rate as its distortion falls"}),
        ({"vq-ema rate": -0.3}, {STAYS}),
        ({"vq-ema rate": 0.3}, {STAYS}),
        ({"components": 12.0}, {f"fewer than 5 components explain {name}'s codes (all)" for name in NAMES}),
        (
            {"components weighted": 12.0},
            {f"fewer than 5 components explain {name}'s codes (used)" for name in NAMES},
        ),
    ],
)
def test_what_is_not_as_in_the_paper_disagrees(changes: dict[str, float], refuted: set[str]) -> None:
    assert words(told(changes), "disagrees") == refuted


def test_codebooks_as_they_began_tell_nothing() -> None:
    """Of normal numbers, in 16 dimensions, 14 components hold 95% of the variance."""
    found = told({"components": 14.0})
    assert words(found, "can't tell") == {
        f"fewer than 5 components explain {name}'s codes (all)" for name in NAMES
    }
    assert found[-2].shows == "95% of the variance in 14.0 ± 0.0 components, as before training (14.0)"


def test_the_loss_is_from_the_center_whatever_was_lowest() -> None:
    """The lowest of what was measured is so by its noise too."""
    assert "VQ-VAE degrades as C grows" in words(
        told({"vq-ema loses": 0.0, "vq-ema at C = 8": -0.5}), "can't tell"
    )


def test_where_seeds_scatter_nothing_can_be_told() -> None:
    found = told({"scatter": 20.0})
    assert words(found, "can't tell") == {one.says for one in found}


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([(2.1, 1.0)], "agrees"),
        ([(1.9, 1.0)], "can't tell"),
        ([(-1.9, 1.0)], "can't tell"),
        ([(-2.1, 1.0)], "disagrees"),
        ([(5.0, 1.0), (1.9, 1.0)], "can't tell"),
        ([(5.0, 1.0), (-2.1, 1.0)], "disagrees"),
        ([(math.nan, math.inf)], "can't tell"),
        ([(5.0, math.nan)], "can't tell"),
    ],
)
def test_a_verdict_needs_two_standard_errors(differences: list[tuple[float, float]], word: str) -> None:
    assert Claim(1, "", "", tuple(Estimate(*one) for one in differences)).verdict() == word


def test_estimates() -> None:
    three = Estimate.over([1.0, 2.0, 3.0])
    assert three.mean == 2.0
    assert three.error == pytest.approx(1 / math.sqrt(3))
    assert Estimate.over([1.0]).error == math.inf
    both = Estimate(1.0, 3.0) - Estimate(3.0, 4.0)
    assert (both.mean, both.error) == (-2.0, 5.0)
    assert Estimate(0.0, 1.0).log(2).error == math.inf
    low, high = (math.log(8.0 + off, 4) for off in (-1e-4, 1e-4))
    found = Estimate(8.0, 1e-4).log(4)
    assert found.mean == pytest.approx(1.5)
    assert found.error == pytest.approx((high - low) / 2)
    falling = Estimate(8.0, 1e-4).log(0.5)
    assert falling.error > 0


def test_the_last_look_at_the_gradient_counts() -> None:
    assert signal({"probe": [{"bias": 1.0, "variance": 5.0}, {"bias": 1.0, "variance": 4.0}]}) == 0.25
    assert signal({"probe": [{"bias": 1.0, "variance": 5.0}, {"bias": 1.0}]}) == 0, "lost in the noise"


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The results.json of every trial of the sweep, in a store of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    paths = {}
    for name, trial in SWEEP.trials().items():
        paths[name] = Store(tmp_path / "store").trial(trial.key()) / "results.json"
        paths[name].parent.mkdir(parents=True)
        paths[name].write_text(json.dumps(result("another name", trial, PAPER)))
    return paths


def run(capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stopped:
        findings.app([])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, *capsys.readouterr()


def test_tables_and_a_figure(
    stored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(capsys)
    assert (code, error) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert sum(line.endswith("| agrees |") for line in lines) == 18
    assert "| GS-Soft | 256 | 4 | 6.900 ± 0.002 | 0.500 | 6.500 | 2.0 |" in lines
    assert len(lines) == 2 + 18 + 2 + len(stored) / len(SWEEP.seeds)
    for table in (lines[:20], lines[20:]):
        assert len({line.count("|") for line in table}) == 1
    assert (tmp_path / "store/reports/findings/findings.png").read_bytes().startswith(b"\x89PNG")


def test_disagreement_is_no_failure(stored: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for (name, trial), path in zip(SWEEP.trials().items(), stored.values(), strict=True):
        path.write_text(json.dumps(result(name, trial, {**PAPER, "vq-ema loses": -1.0})))
    code, out, _ = run(capsys)
    assert code == 0
    assert "| disagrees |" in out


def test_an_unfinished_sweep_is_one_sentence(
    stored: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, path = list(stored.items())[5]
    path.unlink()
    code, out, error = run(capsys)
    assert (code, out) == (2, "")
    assert error.startswith(f"error: 1 of the {len(stored)} trials")
    assert name in error
    assert "make findings" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "store/reports").exists()


def test_a_trial_whose_gradient_was_not_looked_at_is_one_sentence(
    stored: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Another sweep computed it: probe_draws is no part of its key."""
    name = "gs-soft-c64-k4-s0"
    whole = json.loads(stored[name].read_text())
    whole["probe"] = []
    stored[name].write_text(json.dumps(whole))
    code, out, error = run(capsys)
    assert (code, out) == (2, "")
    assert name in error
    assert "FRESH=1" in error
    assert error.count("\n") == 1
