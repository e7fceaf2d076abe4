"""A sweep's tables: a row a trial, and of several seeds a row a setting."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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
    **{key: COLUMNS[key] for key in ("bits_per_dim", "fitted_bits_per_dim", "rate", "distortion")},
}


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
        **{key: evaluation.get(key) for key in ("fitted_bits_per_dim", "bound", "perplexity", "dead_codes")},
        "name": result["name"],
        "key": result.get("key"),
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


def certificate(results: Sequence[Result]) -> str:
    """16 hexadecimal digits of the SHA-256 over the trials' names and all that their evaluations found, whatever
    their order: two reports with the same one hold the same numbers, bit for bit."""
    exact = {
        result["name"]: {key: value for key, value in result["evaluation"].items() if key != "provenance"}
        for result in results
    }
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()[:16]


def best(results: Sequence[Result]) -> Result | None:
    """The trial with the lowest bits/dim, of those where it is finite."""
    finite = [one for one in results if math.isfinite(one["evaluation"]["bits_per_dim"])]
    return min(finite, key=lambda one: float(one["evaluation"]["bits_per_dim"]), default=None)


def settings(results: Sequence[Result]) -> list[Row]:
    """A row a setting that was trained with several seeds, sorted by bits/dim: ``name``, ``seeds``, the means over
    seeds of ``bits_per_dim``, ``fitted_bits_per_dim``, ``rate`` and ``distortion``, and with ``_se`` behind the
    names of the first two the standard errors of these means over trainings. None where a training has no such
    number, or it is not finite."""
    made = []
    for group in alike(results, "seed"):
        if len(group) == 1:
            continue
        trial = group[0]["trial"]
        size = f"-k{trial['num_latents']}"
        row: Row = {
            "name": group[0]["name"].replace(f"{size}-s{trial['seed']}", size, 1),
            "seeds": len(group),
        }
        for key in ("bits_per_dim", "fitted_bits_per_dim", "rate", "distortion"):
            found = np.array([one["evaluation"].get(key, math.nan) for one in group])
            row[key] = float(found.mean())
            if key.endswith("bits_per_dim"):
                row[f"{key}_se"] = float(found.std(ddof=1)) / math.sqrt(len(found))
        made.append(_finite(row))
    return sorted(made, key=_bits)


def shown(row: Row, key: str) -> str:
    """A number of a trial or a setting as the tables print it: with its standard error if it has one, dead codes
    with how many codes there are."""
    value = row[key]
    if value is None:
        return "–"
    text = format(value, (COLUMNS.get(key) or SETTINGS[key])[1])
    if row.get(f"{key}_se") is not None:
        text += f" ± {row[f'{key}_se']:.3f}"
    if key == "dead_codes" and row["num_codes"] is not None:
        text += f"/{row['num_codes'] * row['num_latents']}"
    return text


def alike(results: Sequence[Result], *but: str) -> list[list[Result]]:
    """The results in lists that differ only in the named fields, and in those that change no number."""
    lists: dict[str, list[Result]] = {}
    for result in results:
        left_out = estimators().get(result["trial"]["estimator"], Trial).unkeyed().union(but)
        fields = {key: value for key, value in result["trial"].items() if key not in left_out}
        lists.setdefault(json.dumps(fields, sort_keys=True), []).append(result)
    return list(lists.values())
