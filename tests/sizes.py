"""The sizes that a test gives to every estimator, as each of them takes them."""

from collections.abc import Mapping
from typing import Any

from dvq.config import estimators

LEVELS = (4, 3)
"""of the estimators whose levels decide C and D: an even number and an odd one, 12 codes of 2 dimensions"""


def taken(estimator: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in ``wanted`` that ``estimator`` has and does not derive from others; where levels decide C and D,
    levels in their place."""
    cls = estimators()[estimator]
    derived = wanted.keys() & {"num_codes", "code_dim"} & cls.unkeyed()
    levels = {"levels": LEVELS} if derived and "levels" in cls.model_fields else {}
    return levels | {name: wanted[name] for name in wanted if name in cls.model_fields.keys() - derived}
