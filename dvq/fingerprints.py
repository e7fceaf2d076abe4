"""Which images a trial's data are, by a name that says it: the SHA-256 over the prepared arrays is known beforehand.

The fingerprint is part of every trial's key, and ``dvq.data`` refuses to write arrays that differ from it.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator

from dvq import DvqError

FORMAT = 1
"""the version of a prepared dataset's folder and of its fingerprint"""
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")

FINGERPRINTS: dict[str, str] = {
    "cifar10": "fc090d887c1f7dca203842407178255c8b67625c2a38205f2a7302941d22d5a6",
    "cifar10-sample": "6433030c7ebd526df9271565e847e6046775e314350868fc358ae27720059334",
}

LABELS: dict[str, str] = {
    "cifar10": "CIFAR-10",
    "cifar10-sample": "bundled sample of CIFAR-10 (not comparable with published numbers)",
}

OWN = re.compile(r"[a-z0-9][a-z0-9-]*@[0-9a-f]{16}")
"""the name of images of one's own: their file's, and the first digits of their fingerprint"""


def fingerprint(arrays: Mapping[str, npt.NDArray[np.uint8]]) -> str:
    """SHA-256 over the four arrays' names, shapes and bytes; a dataset's own name is not in it."""
    digest = hashlib.sha256(f"dvq data {FORMAT}\n".encode())
    for name in ARRAYS:
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).data)
    return digest.hexdigest()


def of(name: str) -> str:
    """The fingerprint of the images ``name``: all of it, or of one's own images the first 16 digits.

    Raises:
        DvqError: images are not called so.
    """
    try:
        return FINGERPRINTS.get(_checked(name)) or name.partition("@")[2]
    except ValueError as error:
        raise DvqError(f"images '{name}': {error}") from None


def fits(name: str, found: str) -> bool:
    """Whether ``found`` is the fingerprint of the images ``name``."""
    return found.startswith(of(name))


def label(name: str) -> str:
    """The images ``name``, as people read it."""
    return LABELS.get(name, name)


def _checked(name: str) -> str:
    if name not in FINGERPRINTS and not OWN.fullmatch(name):
        raise ValueError(
            f"known are {', '.join(FINGERPRINTS)}; for images of your own, make data DATA=file.npz says what to write"
        )
    return name


DataName = Annotated[str, AfterValidator(_checked)]
