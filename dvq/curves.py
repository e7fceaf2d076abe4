"""Bits/dim against C: the curves of figure 1(a), and what each is told from the others by."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dvq.style import DASHES, MOST_GROUPS, style, told, varied
from dvq.tables import Result, alike

FILLS = ("full", "none", "top", "bottom", "left", "right")
"""of the marks of an estimator's settings, as its curves have the dashes: a single point shows no dashes"""


class Curve(NamedTuple):
    """One setting along C, at one K, and how it is drawn."""

    num_latents: int
    points: dict[int, list[Result]]
    """the seeds' evaluations by C, in ascending order; a continuous latent variable has no C, and has them by 0"""
    label: str
    colour: str
    marker: str
    dashes: Any
    fill: str


def curves(results: Sequence[Result]) -> list[Curve]:
    """A curve a setting and K. If there are more than six settings, a curve an estimator and K: of its lowest mean
    bits/dim at each C, which its label says."""
    found = [(_setting(trials), trials) for trials in _along(results)]
    settings: dict[str, list[str]] = {}
    for setting, trials in found:
        names = settings.setdefault(trials[0]["trial"]["estimator"], [])
        names += [setting] if setting not in names else []
    many = sum(map(len, settings.values())) > MOST_GROUPS
    made: dict[tuple[str, int, str | int], Curve] = {}
    for number, (setting, trials) in enumerate(found):
        estimator, latents = trials[0]["trial"]["estimator"], trials[0]["trial"]["num_latents"]
        label, colour, marker = style(estimator)
        names, points = settings[estimator], _points(trials)
        if many and len(names) > 1:
            label += f", lowest of {len(names)} settings"
            before = made.get((estimator, latents, ""))
            points = _lowest(before.points, points) if before else points
            made[estimator, latents, ""] = Curve(
                latents, points, told(label), colour, marker, DASHES[0], FILLS[0]
            )
            continue
        at = names.index(setting) % MOST_GROUPS
        label = told(f"{label}, {setting}".rstrip(", "))
        made[estimator, latents, number] = Curve(
            latents, points, label, colour, marker, DASHES[at], FILLS[at]
        )
    return list(made.values())


def mean(seeds: Sequence[Result]) -> float:
    """The mean bits/dim over seeds."""
    return float(np.mean([one["bits_per_dim"] for one in seeds]))


def spread(seeds: Sequence[Result]) -> tuple[float, float]:
    """The range of bits/dim over seeds; of a single one ± its standard error over images."""
    bits = [one["bits_per_dim"] for one in seeds]
    error = 0.0 if len(bits) > 1 else seeds[0].get("bits_per_dim_se", 0.0)
    return min(bits) - error, max(bits) + error


def _along(results: Sequence[Result]) -> list[list[Result]]:
    """The results in lists that differ in C and the seed. FSQ's levels make C, so that they are one curve too, unless
    some of them make the same."""
    made = {(str(t["levels"]), t["num_codes"]) for t in (one["trial"] for one in results) if "levels" in t}
    one_each = len({codes for _, codes in made}) == len(made)
    return alike(results, "seed", "num_codes", *(["levels"] if one_each else []))


def _setting(trials: Sequence[Result]) -> str:
    """What all of a curve's trials say of their setting: FSQ's levels may differ along it."""
    said = [varied(one).split(", ") for one in trials]
    return ", ".join(part for part in said[0] if all(part in other for other in said))


def _points(trials: Sequence[Result]) -> dict[int, list[Result]]:
    points: dict[int, list[Result]] = {}
    for one in sorted(trials, key=lambda one: int(one["trial"].get("num_codes", 0))):  # stable
        points.setdefault(one["trial"].get("num_codes", 0), []).append(one["evaluation"])
    return points


def _lowest(one: dict[int, list[Result]], other: dict[int, list[Result]]) -> dict[int, list[Result]]:
    """At each C the seeds of the lower mean."""
    there = {codes: [points[codes] for points in (one, other) if codes in points] for codes in {*one, *other}}
    return {codes: min(there[codes], key=mean) for codes in sorted(there)}
