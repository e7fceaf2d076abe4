"""What a sweep's results choose: on held-out images the setting of lowest bits/dim, on test images nothing."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from dvq.config import estimators, trial
from dvq.tables import Result, alike, complete, finite, mean_bits_per_dim
from dvq.trial import Trial

SIZES = ("num_codes", "num_latents")
FREE = ("code_dim", "seed")
"""numbers in which trials may differ without a warning, as in their estimator and ``SIZES``: figures compare these"""


def chosen(results: Sequence[Result]) -> list[Result]:
    """The results of the setting of lowest mean bits/dim over seeds, the lowest first. Only settings with the most
    finite results are compared: where some seeds diverged or failed, those that are left were lucky."""
    groups = alike(finite(results), "seed")
    lowest = min(groups, key=lambda group: (-len(group), mean_bits_per_dim(group)), default=[])
    return sorted(lowest, key=lambda result: float(result["evaluation"]["bits_per_dim"]))


def chosen_line(results: Sequence[Result]) -> str:
    """The setting chosen on held-out images, as a line of YAML for a sweep on test images: the estimator, and what
    differs from the defaults, except split and seed. Empty if nothing was chosen, or these are results on test
    images."""
    classes = estimators()
    tuned = (
        result
        for result in results
        if result["trial"].get("split") == "tune" and result["trial"]["estimator"] in classes
    )
    lowest = chosen(list(tuned))
    if not lowest:
        return ""
    fields = lowest[0]["trial"]
    names = classes[fields["estimator"]].model_fields.keys()
    one = trial({name: fields[name] for name in fields if name in names})
    line = {"estimator": one.estimator, **one.changed()}
    setting = {name: value for name, value in line.items() if name not in ("split", "seed")}
    return yaml.safe_dump(setting, sort_keys=False, default_flow_style=True, width=math.inf).strip()


def warning(trials: Iterable[Mapping[str, Any]]) -> str:
    """A warning if some of these trials on test images agree in estimator, C, K and everything that is not a number,
    but differ in another number than D and the seed: they invite a choice. Empty if there are none."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for fields in map(complete, trials):
        unkeyed = estimators().get(fields["estimator"], Trial).unkeyed()
        keyed = {name: value for name, value in fields.items() if name not in unkeyed}
        free = {
            name for name, x in keyed.items() if (x is None or type(x) in (int, float)) and name not in SIZES
        }
        same = json.dumps({name: keyed[name] for name in keyed.keys() - free}, sort_keys=True)
        groups.setdefault(same, []).append(keyed)
    names = dict.fromkeys(
        name
        for first, *others in groups.values()
        for name, value in first.items()
        if first["split"] == "test" and name not in FREE and any(one.get(name) != value for one in others)
    )
    if not names:
        return ""
    *before, last = names
    listed = f"{', '.join(before)} and {last}" if before else last
    return (
        f"its trials differ in {listed}: a choice among them by test images is no longer a test; split: tune holds "
        "out training images"
    )
