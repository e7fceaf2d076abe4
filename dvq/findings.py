"""The paper's findings in miniature: what a small sweep with seeds shows of each, and whether it agrees."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from dvq import DvqError
from dvq.analyze import analyze
from dvq.style import look, new_figure, save_png, style
from dvq.tables import Result

Measure = Callable[[Result], float]
ESTIMATORS = ("gs-soft", "vimco", "vq-ema")
AGREES, DISAGREES, OPEN = "agrees", "disagrees", "can't tell"
POSITIONS = 64
DROWNED = 1e6  # a variance above this means that the draws did not find the mean gradient in its noise
FEW = 5  # principal components, by the paper


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error, which is infinite for one seed."""

    mean: float
    error: float = 0.0

    @classmethod
    def over(cls, values: Sequence[float]) -> "Estimate":
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
        return cls(fmean(values), error)

    def __sub__(self, other: "Estimate") -> "Estimate":
        return Estimate(self.mean - other.mean, math.hypot(self.error, other.error))

    def __neg__(self) -> "Estimate":
        return Estimate(-self.mean, self.error)

    def log(self, base: float) -> "Estimate":
        """Its logarithm, with the error to first order; unknown where the mean is not positive."""
        if self.mean <= 0:
            return Estimate(math.nan, math.inf)
        return Estimate(math.log(self.mean, base), abs(self.error / self.mean / math.log(base)))

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


class Claim(NamedTuple):
    """A finding of the paper, and what was measured of it."""

    number: int
    says: str
    shows: str
    differences: tuple[Estimate, ...]
    """each is positive where the miniature is as the paper says"""

    def verdict(self) -> str:
        """A difference speaks for or against the paper only beyond two standard errors: with three seeds chance alone
        goes beyond them, in each direction, 4 times in 100 where four means are compared, 6 where two, 9 where it is
        one. Seeds are not paired."""
        if any(difference.mean < -2 * difference.error for difference in self.differences):
            return DISAGREES
        return (
            AGREES if all(difference.mean > 2 * difference.error for difference in self.differences) else OPEN
        )


class Setting(NamedTuple):
    """What the sweep varies beside the seed."""

    estimator: str
    num_codes: int
    num_latents: int


class Miniature:
    """The sweep's results by setting; C and K vary one at a time from the sweep's ``base``."""

    def __init__(self, base: dict[str, Any], results: Iterable[Result]) -> None:
        self.center = Setting("", base["num_codes"], base["num_latents"])
        self.settings: dict[Setting, list[Result]] = {}
        for result in results:
            setting = Setting(*(result["trial"][field] for field in Setting._fields))
            self.settings.setdefault(setting, []).append(result)

    def along(self, estimator: str, field: str) -> dict[int, list[Result]]:
        """The results that are off the center in ``field`` at most, by its rising values."""
        line = self.center._replace(estimator=estimator)
        values = sorted(getattr(setting, field) for setting in self.settings)
        on_it = {value: line._replace(**{field: value}) for value in values}
        return {value: self.settings[setting] for value, setting in on_it.items() if setting in self.settings}

    def central(self, estimator: str) -> list[Result]:
        return self.settings[self.center._replace(estimator=estimator)]


def label(estimator: str) -> str:
    return style(estimator)[0]


def over(results: Sequence[Result], measure: Measure) -> Estimate:
    return Estimate.over([measure(result) for result in results])


def bits_per_dim(result: Result) -> float:
    """With normalization and prior fitted to the training images: in so few steps both lag behind, the prior the more
    the fewer codes are used, and estimators would differ by that lag alone."""
    return float(result["evaluation"]["fitted_bits_per_dim"])


def as_evaluated(result: Result) -> float:
    """With the normalization and prior that training reached."""
    return float(result["evaluation"]["bits_per_dim"])


def signal(result: Result) -> float:
    """‖E g‖² / E‖g − E g‖² of the gradient after training, 1/variance: unlike the variance, this has a mean over
    seeds where the draws hardly tell E g from 0. It is 0 where the probe gives no variance: a little too high."""
    *_, last = result.get("probe") or [{}]
    if "bias" not in last:
        raise DvqError(
            f"trial '{result['name']}' was computed without a look at its gradient, for another sweep; with "
            "probe_draws in this one, compute it anew: FRESH=1"
        )
    return 1 / float(last.get("variance", math.inf))


def claims(mini: Miniature) -> list[Claim]:
    """The paper's findings; DvqError where a gradient was not looked at."""
    return [*codebook_size(mini), *score_function(mini), *noise(mini), *rates(mini), *components(mini)]


def codebook_size(mini: Miniature) -> Iterator[Claim]:
    def lost(name: str, measure: Measure = bits_per_dim) -> Estimate:
        """Relative to the center, which was fixed beforehand: the lowest of the measured values would be low by its
        noise too."""
        sizes = mini.along(name, "num_codes")
        return over(sizes[max(sizes)], measure) - over(sizes[mini.center.num_codes], measure)

    def shown(name: str) -> str:
        return f"{compared}{loss[name]}, not fitted {lost(name, as_evaluated)}"

    compared = (
        f"bits/dim at C = {max(mini.along('vq-ema', 'num_codes'))} less that at C = {mini.center.num_codes}: "
    )
    loss = {name: lost(name) for name in ESTIMATORS}
    yield Claim(1, "VQ-VAE degrades as C grows", shown("vq-ema"), (loss["vq-ema"],))
    for name in ("gs-soft", "vimco"):
        yield Claim(1, f"{label(name)} does not degrade", shown(name), (-loss[name],))
    more = loss["vq-ema"] - loss["gs-soft"]
    yield Claim(1, "VQ-VAE degrades more than GS-Soft", f"difference of the two: {more}", (more,))


def score_function(mini: Miniature) -> Iterator[Claim]:
    for field, letter in (("num_codes", "C"), ("num_latents", "K")):
        good, bad = mini.along("gs-soft", field), mini.along("vimco", field)
        gaps = {at: over(bad[at], bits_per_dim) - over(good[at], bits_per_dim) for at in bad}
        shown = ", ".join(f"{gap} at {letter} = {at}" for at, gap in gaps.items())
        growth = gaps[max(gaps)] - gaps[min(gaps)]
        says = f"VIMCO falls behind GS-Soft as {letter} grows"
        yield Claim(2, says, f"bits/dim above GS-Soft's: {shown}; growth {growth}", (growth,))


def noise(mini: Miniature) -> Iterator[Claim]:
    power = {}  # a in variance ∝ L^a, from the smallest and the largest L
    for name, grows in (("vimco", True), ("gs-soft", False)):
        signals = {at: over(some, signal) for at, some in mini.along(name, "num_latents").items()}
        base = max(signals) / min(signals)
        power[name] = signals[min(signals)].log(base) - signals[max(signals)].log(base)
        shown = ", ".join(
            f"{1 / estimate.mean:.3g} at L = {POSITIONS * at}" for at, estimate in signals.items()
        )
        says = f"the variance of {label(name)}'s gradient {'grows' if grows else 'does not grow'} with L"
        evidence = power[name] if grows else -power[name]
        yield Claim(2, says, f"variance/‖E g‖² {shown}; as L to the power {power[name]}", (evidence,))
    more = power["vimco"] - power["gs-soft"]
    yield Claim(2, "VIMCO's grows faster than GS-Soft's", f"difference of the powers: {more}", (more,))


def rates(mini: Miniature) -> Iterator[Claim]:
    """By the rate under the best prior: under the trained one it falls as long as that still learns the codes'
    frequencies."""

    def moved(name: str, term: str) -> Estimate:
        return over(mini.central(name), lambda result: result["curves"][-1][term] - result["curves"][0][term])

    rate = {name: moved(name, "rate_least") for name in ESTIMATORS}
    shown = {}
    for name in ESTIMATORS:
        points = mini.central(name)[0]["curves"]
        steps = f"from step {points[0]['step']} to {points[-1]['step']}"
        shown[name] = (
            f"{steps}: rate {rate[name]}, under the trained prior {moved(name, 'rate')}, "
            f"distortion {moved(name, 'distortion')}"
        )
    for name in ("gs-soft", "vimco"):
        says = f"{label(name)} adds rate as its distortion falls"
        yield Claim(3, says, shown[name], (rate[name], -moved(name, "distortion")))
    less = rate["gs-soft"] - Estimate(abs(rate["vq-ema"].mean), rate["vq-ema"].error)
    says = "VQ-VAE's rate stays: it moves less than GS-Soft's rises"
    yield Claim(3, says, f"{shown['vq-ema']}; GS-Soft's rise less this move {less}", (less,))


def fresh(trial: dict[str, Any]) -> float:
    """Components for 95% of the variance of codebooks before training, where ``codebook_init`` is normal, as in the
    sweep ``findings``."""
    codes = np.random.default_rng(0).normal(size=(16, trial["num_codes"], trial["code_dim"]))
    return float(analyze(codes).summary()["components_95_mean"])


def components(mini: Miniature) -> Iterator[Claim]:
    for name in ESTIMATORS:
        some = mini.central(name)
        for key, which in (("components_95_mean", "all"), ("components_95_weighted_mean", "used")):
            estimate = Estimate.over([result["analysis"][key] for result in some])
            says = f"fewer than {FEW} components explain {label(name)}'s codes ({which})"
            shown = f"95% of the variance in {estimate.mean:.1f} ± {estimate.error:.1f} components"
            untrained = which == "all" and abs(estimate.mean - (begun := fresh(some[0]["trial"]))) < 0.5
            if untrained:  # that is how they began, whatever training would make of them
                shown += f", as before training ({begun:.1f})"
            yield Claim(4, says, shown, (Estimate(0, math.inf) if untrained else Estimate(FEW) - estimate,))


@look
def draw(mini: Miniature, path: Path) -> None:
    """Write a PNG: bits/dim against C and K, the gradient's variance against L, the rate along training."""
    results = [result for some in mini.settings.values() for result in some]
    figure = new_figure(
        "The paper's findings in miniature: mean and standard error over seeds", results, 10, 7.5
    )
    sizes, latents, variances, along = figure.subplots(2, 2).flat
    variances.set(xscale="log", yscale="log")  # scales forget the ticks that were set before
    for name in ESTIMATORS:
        called, colour, marker = style(name)
        drawn: dict[str, Any] = {"color": colour, "marker": marker, "label": called}
        for axes, field in ((sizes, "num_codes"), (latents, "num_latents")):
            bits = {at: over(some, bits_per_dim) for at, some in mini.along(name, field).items()}
            if len(bits) > 1:
                _curve(axes, bits, **drawn)
                axes.set_xscale("log", base=2)
                axes.set_xticks(list(bits), labels=map(str, bits))
        points = zip(*(result["curves"] for result in mini.central(name)), strict=True)
        _curve(
            along, {at[0]["step"]: Estimate.over([one["rate_least"] for one in at]) for at in points}, **drawn
        )
        if name != "vq-ema":
            by_size = {POSITIONS * at: some for at, some in mini.along(name, "num_latents").items()}
            variances.plot(list(by_size), [1 / over(some, signal).mean for some in by_size.values()], **drawn)
            dots = [(at, 1 / signal(one)) for at, some in by_size.items() for one in some]
            variances.plot(
                *zip(*(dot for dot in dots if dot[1] < DROWNED), strict=True), "o", ms=2, color=colour
            )
            variances.set_xticks(list(by_size), labels=map(str, by_size))
            variances.set_xticks([], minor=True)
    variances.set(xlabel="L, latent variables", ylabel="variance / ‖mean gradient‖²")
    sizes.set(xlabel="C, codes in a codebook", ylabel="bits/dim, fitted")
    latents.set(xlabel="K, latent variables a position", ylabel="bits/dim, fitted")
    along.set(xlabel="step", ylabel="rate under the best prior [bits/dim]")
    sizes.legend()
    save_png(figure, path)


def _curve(axes: Any, points: dict[int, Estimate], **drawn: Any) -> None:
    means = [estimate.mean for estimate in points.values()]
    errors = [estimate.error for estimate in points.values()]
    axes.errorbar(list(points), means, errors, capsize=3, **drawn)
