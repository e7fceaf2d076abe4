"""Draw the bundled sample from CIFAR-10 and write it: python dvq/sample/make_sample.py PREPARED_CIFAR10

PREPARED_CIFAR10 is a folder that ``dvq.data.prepare("cifar10", …)`` wrote. README.md says what is drawn.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

from dvq.cifar10 import Images
from dvq.data import SAMPLE, load, read_sample
from dvq.fingerprints import fingerprint

PER_CLASS = {"train": 200, "test": 50}


def draw(arrays: dict[str, Images]) -> dict[str, Images]:
    """Row 10·r + c is the r-th image of class c in the official order, so that any 10 rows from a multiple of
    10 on hold one image of each class, and the last 200 training images, the split ``tune``, 20 of each."""
    drawn: dict[str, Images] = {}
    for half, number in PER_CLASS.items():
        labels = arrays[f"{half}_labels"]
        rows = np.stack([np.flatnonzero(labels == c)[:number] for c in range(10)], axis=1).ravel()
        drawn |= {f"{half}_images": arrays[f"{half}_images"][rows], f"{half}_labels": labels[rows]}
    return drawn


def pack(images: Images) -> Images:
    """Differences mod 256 over channels, rows and columns (3, N, 32, 32): they zip a third smaller."""
    packed = np.moveaxis(images, -1, 0)
    for axis in (0, 2, 3):
        packed = np.diff(packed, axis=axis, prepend=np.uint8(0))
    return packed


def main(prepared: Path, path: Path = SAMPLE) -> None:
    """Write the sample to ``path`` and print its fingerprint and hash."""
    drawn = draw(load(prepared).arrays)
    packed = {name: pack(array) if "images" in name else array for name, array in drawn.items()}
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **packed)
    same = all(np.array_equal(array, drawn[name]) for name, array in read_sample(path).items())
    if not same:
        raise AssertionError("unpacked, the sample differs from what was drawn")
    print(f"fingerprint {fingerprint(drawn)}\nSHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
