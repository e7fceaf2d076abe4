"""What identifies a trial's images: a name that tells their shape, and a SHA-256 over the prepared arrays.

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

OWN = re.compile(r"[a-z0-9][a-z0-9-]*@(?:([1-9]\d*)x([1-9]\d*)x([1-9]\d*)-)?([0-9a-f]{16})", re.ASCII)
"""the names of a user's own images: their file's name; height, width and channels, unless these are CIFAR-10's; and
the first digits of their fingerprint"""

Shape = tuple[int, int, int]
CIFAR10: Shape = 32, 32, 3
CHANNELS: dict[int, tuple[str, ...]] = {1: ("gray",), 3: ("red", "green", "blue")}
LARGEST = 128


def fingerprint(arrays: Mapping[str, npt.NDArray[np.uint8]]) -> str:
    """SHA-256 over the four arrays' names, shapes and bytes; a dataset's own name is not in it."""
    digest = hashlib.sha256(f"dvq data {FORMAT}\n".encode())
    for name in ARRAYS:
        digest.update(f"{name} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).data)
    return digest.hexdigest()


def of(name: str) -> str:
    """The fingerprint of the images ``name``: all of it, or of a user's own images the first 16 digits.

    Raises:
        DvqError: this cannot be the name of images.
    """
    try:
        return FINGERPRINTS.get(_checked(name)) or name[-16:]
    except ValueError as error:
        raise DvqError(f"images '{name}': {error}") from None


def shape(name: str) -> Shape:
    """Height, width and channels of the images ``name``."""
    own = OWN.fullmatch(name)
    return (int(own[1]), int(own[2]), int(own[3])) if own and own[1] else CIFAR10


def shape_of(arrays: Mapping[str, npt.NDArray[np.uint8]]) -> Shape:
    """Height, width and channels of images."""
    height, width, channels = arrays["train_images"].shape[1:]
    return height, width, channels


def own(stem: str, arrays: Mapping[str, npt.NDArray[np.uint8]]) -> str:
    """The name of a user's own images that come from a file called ``stem``."""
    sizes = "x".join(map(str, shape_of(arrays)))
    return f"{stem}@{sizes + '-' if shape_of(arrays) != CIFAR10 else ''}{fingerprint(arrays)[:16]}"


def check_shape(shape: tuple[int, ...]) -> None:
    """ValueError unless there is a network for such images."""
    height, width, channels = shape
    if height % 4 or width % 4 or not 4 <= min(height, width) <= max(height, width) <= LARGEST:
        raise ValueError(
            f"images of {height}×{width}: the network halves height and width twice; make them multiples of 4, "
            f"{LARGEST} at most"
        )
    if channels not in CHANNELS:
        raise ValueError(f"images of {channels} channels: make them 1 (gray) or 3 (red, green, blue)")


def fits(name: str, digest: str, arrays: Mapping[str, npt.NDArray[np.uint8]]) -> bool:
    """Whether ``arrays`` of the fingerprint ``digest`` are the images called ``name``."""
    return digest.startswith(of(name)) and shape_of(arrays) == shape(name)


def label(name: str) -> str:
    """The images ``name``, in words for people."""
    return LABELS.get(name, name)


def _checked(name: str) -> str:
    if name not in FINGERPRINTS and not OWN.fullmatch(name):
        raise ValueError(
            f"known are {', '.join(FINGERPRINTS)}; for images of your own, make data DATA=file.npz says what to write"
        )
    check_shape(shape(name))
    return name


DataName = Annotated[str, AfterValidator(_checked)]
