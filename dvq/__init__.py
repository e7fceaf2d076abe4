"""Discrete latent variable models of images: training, evaluation in bits/dim, and what the codes learn.

Importing this package is free of torch, so that a configuration can be read, checked and keyed in
milliseconds; ``dvq.load`` and the submodules bring torch when they are used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dvq.saved import load as load

__version__ = "0.1.0"

NUMERICS = 4
"""Incremented by hand when an edit changes any number that a trial computes; it is part of every trial's key.

The golden loss curves (tests/dvq/test_golden.py) fail when numbers change and this does not."""


class DvqError(Exception):
    """Something that the user can fix: the message is one sentence that says what is wrong, where, and what to do.
    Any other exception is a bug and keeps its traceback."""


def __dir__() -> list[str]:
    return [*globals(), "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from dvq.saved import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
