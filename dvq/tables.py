"""A sweep's tables: a row a trial, and of several seeds a row a setting."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from dvq.config import estimators
from dvq.trial import Trial

Result = Mapping[str, Any]
Row = dict[str, Any]

# of the trials and of the settings; column: (its heading, how its numbers are printed; "" for text)
COLUMNS = {
    "name": ("trial", ""),
    "estimator": ("estimator", ""),
    "num_codes": ("C", "d"),
    "num_latents": ("K", "d"),
    "seed": ("seed", "d"),
    "bits_per_dim": ("bits/dim", ".3f"),
    "fitted_bits_per_dim": ("fitted", ".3f"),
    "autoregressive_bits_per_dim": ("AR prior", ".3f"),
    "bound": ("L_S", ".3f"),
    "rate": ("rate", ".3f"),
    "distortion": ("distortion", ".3f"),
    "perplexity": ("perplexity", ".1f"),
    "dead_codes": ("dead", "d"),
    "components_95": ("PCs", ".1f"),
    "components_95_weighted": ("PCs, used", ".1f"),
    "images_per_second": ("images/s", ".0f"),
    "steps": ("steps", "d"),
}
SETTINGS = {
    "name": ("setting", ""),
    "seeds": ("seeds", "d"),
    "bits_per_dim": COLUMNS["bits_per_dim"],
    "pairs": ("common seeds", "d"),
    "above": ("above lowest", "+.3f"),
    "fitted_bits_per_dim": COLUMNS["fitted_bits_per_dim"],
    "fitted_above": ("above, fitted", "+.3f"),
    **{key: COLUMNS[key] for key in ("autoregressive_bits_per_dim", "rate", "distortion", "perplexity")},
    "dead_codes": ("dead", ".0f"),
}
MEANS = [key for key in SETTINGS if key in COLUMNS and key != "name"]
INTERVAL = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""half a 95% interval of a mean over 2, 3, … 10 trainings, in its standard errors (Student's t); less for more"""


def rows(results: Sequence[Result], failures: Mapping[str, str]) -> list[Row]:
    """The table: a row a finished trial, sorted by bits/dim, then a row (``name``, ``reason``) a failure.

    A number that a trial does not have, or that is not finite, is None.
    """
    table = sorted(map(_row, results), key=_bits)
    return [*table, *({"name": name, "reason": reason} for name, reason in failures.items())]


def _row(result: Result) -> Row:
    trial, evaluation, analysis = result["trial"], result["evaluation"], result.get("analysis", {})
    row = {
        **{key: trial.get(key) for key in ("estimator", "num_codes", "num_latents", "seed", "steps")},
        **{key: evaluation.get(key) for key in ("bits_per_dim", "bits_per_dim_se", "rate", "distortion")},
        **{
            key: evaluation.get(key)
            for key in ("fitted_bits_per_dim", "autoregressive_bits_per_dim", "bound")
        },
        **{key: evaluation.get(key) for key in ("perplexity", "dead_codes")},
        "name": result["name"],
        "key": result.get("key"),
        "trial": trial,
        "components_95": analysis.get("components_95_mean"),
        "components_95_weighted": analysis.get("components_95_weighted_mean"),
        "images_per_second": result["training"].get("images_per_second"),
        "split": evaluation["split"],
        "data": result["data"]["name"],
    }
    return _finite(row)


def _finite(row: Row) -> Row:
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _bits(row: Row) -> float:
    return math.inf if row["bits_per_dim"] is None else float(row["bits_per_dim"])


def finite(results: Sequence[Result]) -> list[Result]:
    """The results whose bits/dim is finite."""
    return [result for result in results if math.isfinite(result["evaluation"]["bits_per_dim"])]


def mean_bits_per_dim(results: Sequence[Result]) -> float:
    """The mean bits/dim of a setting's results, one for each seed."""
    return fmean(result["evaluation"]["bits_per_dim"] for result in results)


def discrete(results: Sequence[Result]) -> list[Result]:
    """The results of latent variables that have codes."""
    return [result for result in results if "num_codes" in result["trial"]]


def certificate(results: Sequence[Result]) -> str:
    """16 hexadecimal digits of the SHA-256 over the trials' names and all that their evaluations found, whatever
    their order: two reports with the same one hold the same numbers, bit for bit."""
    exact = {
        result["name"]: {key: value for key, value in result["evaluation"].items() if key != "provenance"}
        for result in results
    }
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()[:16]


def fitted_first(table: Sequence[Row]) -> Row | None:
    """The row of lowest fitted bits/dim, where that is another than the first, which has the lowest bits/dim, and
    every row has it; of settings only those with as many seeds are compared."""
    table = [row for row in table if row.get("seeds") == table[0].get("seeds")]
    fitted = [row.get("fitted_bits_per_dim") for row in table]
    if not fitted or None in fitted:
        return None
    lowest = min(table, key=lambda row: float(row["fitted_bits_per_dim"]))
    return None if lowest is table[0] else lowest


def settings(results: Sequence[Result]) -> list[Row]:
    """A row a setting that was trained with several seeds, sorted by bits/dim; first those with the most finite
    results, which alone :func:`dvq.choices.chosen` compares.

    It holds ``name``, ``seeds``, the configuration without the seed as ``trial``, the means of ``MEANS`` over the
    seeds, and the means over the ``pairs`` of trainings with the same seed by which bits/dim and its fitted form are
    ``above`` and ``fitted_above`` those of the first row; ``_se`` behind a mean's name is its standard error over
    trainings. None where a training has no such number, it is not finite, or there are fewer than two pairs.
    """
    groups = [group for group in alike(results, "seed") if len(group) > 1]
    made = [(_setting(group), group) for group in groups]
    made.sort(key=lambda one: (-len(finite(one[1])), _bits(one[0])))
    return [_finite(row | _above(group, made[0][1])) for row, group in made]


def _setting(group: Sequence[Result]) -> Row:
    trial, table = group[0]["trial"], [_row(one) for one in group]
    size = f"-k{trial['num_latents']}"
    row: Row = {
        "name": group[0]["name"].replace(f"{size}-s{trial['seed']}", size, 1),
        "seeds": len(group),
        "trial": {key: value for key, value in trial.items() if key != "seed"},
        **{key: trial.get(key) for key in ("num_codes", "num_latents")},
    }
    for key in MEANS:
        row |= _mean(key, [math.nan if one[key] is None else one[key] for one in table])
    return _finite(row)


def _above(group: Sequence[Result], lowest: Sequence[Result]) -> Row:
    """How far a setting is from the ``lowest``, training by training of the same seed."""
    ours, theirs = ({one["trial"]["seed"]: one["evaluation"] for one in found} for found in (group, lowest))
    pairs = [] if group is lowest else [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    row: Row = {"pairs": None if group is lowest else len(pairs)}
    for name, key in (("above", "bits_per_dim"), ("fitted_above", "fitted_bits_per_dim")):
        row |= _mean(name, [one.get(key, math.nan) - other.get(key, math.nan) for one, other in pairs])
    return row


def _mean(name: str, values: Sequence[float]) -> Row:
    """The mean, and its standard error; of fewer than two numbers None."""
    if len(values) < 2:
        return {name: None, f"{name}_se": None}
    return {
        name: float(np.mean(values)),
        f"{name}_se": float(np.std(values, ddof=1)) / math.sqrt(len(values)),
    }


def told_apart(row: Row) -> bool:
    """Whether a setting that is ``above`` the lowest is so beyond a 95% interval of their difference, by itself. The
    lowest was picked by the same numbers, so equal settings are told apart more often than 5 times in 100: 9 times
    with eight settings and three seeds, 18 with twenty and ten."""
    return bool(row["above"] > INTERVAL[min(row["pairs"], 10) - 2] * row["above_se"])


def filled(table: Sequence[Row], keys: Collection[str] = ()) -> dict[str, tuple[str, str]]:
    """The columns in which some row has something, of all or of those in ``keys``."""
    columns = _columns(table[0])
    return {key: columns[key] for key in keys or columns if any(row[key] is not None for row in table)}


def _columns(row: Row) -> dict[str, tuple[str, str]]:
    return SETTINGS if "seeds" in row else COLUMNS


def formatted(row: Row, key: str) -> str:
    """A number of a trial or a setting as the tables print it: bits/dim with their standard error if they have one,
    dead codes with how many codes there are."""
    value, form = row[key], _columns(row)[key][1]
    if value is None:
        return "–"
    text = format(value, form)
    if form.endswith(".3f") and row.get(f"{key}_se") is not None:
        text += f" ± {row[f'{key}_se']:.3f}"
    if key == "dead_codes" and row["num_codes"] is not None:
        text += f"/{row['num_codes'] * row['num_latents']}"
    return text


def complete(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a result, which may be older than some fields: those get their defaults."""
    defaults = estimators().get(fields["estimator"], Trial).model_fields.items()
    return {**{name: field.default for name, field in defaults if not field.is_required()}, **fields}


def alike(results: Sequence[Result], *but: str) -> list[list[Result]]:
    """The results in lists within which only the named fields differ, and fields that change no number."""
    lists: dict[str, list[Result]] = {}
    for result in results:
        left_out = estimators().get(result["trial"]["estimator"], Trial).unkeyed().union(but)
        fields = {key: x for key, x in complete(result["trial"]).items() if key not in left_out}
        lists.setdefault(json.dumps(fields, sort_keys=True), []).append(result)
    return list(lists.values())
