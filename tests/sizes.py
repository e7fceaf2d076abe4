"""The sizes that a test gives to every estimator, as each of them takes them."""

from collections.abc import Mapping
from typing import Any

from dvq.config import estimators

LEVELS = (4, 3)
"""of the estimators whose levels decide C and D: an even number and an odd one, 12 codes of 2 dimensions"""


def taken(estimator: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in ``wanted`` that ``estimator`` has; where levels decide C and D, levels in their place."""
    known = estimators()[estimator].model_fields
    fields = {name: value for name, value in wanted.items() if name in known}
    if "levels" not in known or not fields.keys() & {"num_codes", "code_dim"}:
        return fields
    return {"levels": LEVELS} | {
        name: x for name, x in fields.items() if name not in ("num_codes", "code_dim")
    }
