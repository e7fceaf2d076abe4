"""Bits/dim against C: the curves of figure 1(a), and the looks that tell them apart."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dvq.style import DASHES, MOST_GROUPS, method, style, varied, wrapped
from dvq.tables import Result, alike

FILLS = ("full", "none", "top", "bottom", "left", "right")
"""fill styles of the markers: like dashes, they tell an estimator's settings apart, but also where a curve is one
point"""


class Curve(NamedTuple):
    """One setting along C, at one K, and how it is drawn."""

    num_latents: int
    points: dict[int, list[Result]]
    """the results of all seeds by C, ascending; continuous latent variables, which have no C, are under 0"""
    label: str
    colour: str
    marker: str
    dashes: Any
    fill: str


def curves(results: Sequence[Result]) -> list[Curve]:
    """A curve for each setting and K. If there are more than six settings, those of one estimator (of VQ-VAE: of one
    gradient) look the same, and their label says how many they are: none is picked, least of all by test images."""
    settings = [(_setting(trials), trials) for trials in _along(results)]
    if len({(trials[0]["trial"]["estimator"], setting) for setting, trials in settings}) > MOST_GROUPS:
        settings = _methods([trials for _, trials in settings])
    looks: dict[str, list[str]] = {}
    drawn = []
    for name, trials in settings:
        trial = trials[0]["trial"]
        label, colour, marker = style(trial["estimator"])
        names = looks.setdefault(trial["estimator"], [])
        names += [name] if name not in names else []
        at = names.index(name) % MOST_GROUPS
        label = wrapped(f"{label}, {name}".rstrip(", "))
        look = label, colour, marker, DASHES[at], FILLS[at]
        drawn.append(Curve(trial["num_latents"], _points(trials), *look))
    return drawn


def _methods(along: Sequence[list[Result]]) -> list[tuple[str, list[Result]]]:
    """The settings, each under the name of its whole method (:func:`dvq.style.method`)."""
    methods: dict[tuple[str, str | None], list[list[Result]]] = {}
    for trials in along:
        methods.setdefault(method(trials[0]), []).append(trials)
    named = []
    for lines in methods.values():
        settings = len({_setting(trials) for trials in lines})
        shared = _setting([result for trials in lines for result in trials])
        name = ", ".join(filter(None, (shared, f"{settings} settings" if settings > 1 else "")))
        named += [(name, trials) for trials in lines]
    return named


def spread(seeds: Sequence[Result]) -> tuple[float, float]:
    """The range of bits/dim over seeds; for a single seed ± its standard error over images."""
    bits = [result["evaluation"]["bits_per_dim"] for result in seeds]
    error = 0.0 if len(bits) > 1 else seeds[0]["evaluation"].get("bits_per_dim_se", 0.0)
    return min(bits) - error, max(bits) + error


def _along(results: Sequence[Result]) -> list[list[Result]]:
    """The results in lists within which only C and the seed differ. FSQ's levels decide C, so different levels are
    one curve too, unless some of them have the same C."""
    levels = {
        (str(t["levels"]), t["num_codes"]) for t in (result["trial"] for result in results) if "levels" in t
    }
    distinct = len({codes for _, codes in levels}) == len(levels)
    return alike(results, "seed", "num_codes", *(["levels"] if distinct else []))


def _setting(trials: Sequence[Result]) -> str:
    """What the names of all of a curve's trials say of their setting: FSQ's levels may differ along it."""
    names = [varied(result).split(", ") for result in trials]
    return ", ".join(part for part in names[0] if all(part in other for other in names))


def _points(trials: Sequence[Result]) -> dict[int, list[Result]]:
    points: dict[int, list[Result]] = {}
    for result in sorted(trials, key=lambda result: int(result["trial"].get("num_codes", 0))):  # stable
        points.setdefault(result["trial"].get("num_codes", 0), []).append(result)
    return points
