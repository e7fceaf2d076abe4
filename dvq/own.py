"""A user's own images, from a file of numpy arrays: checked, and named by their content."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dvq import DvqError, fingerprints
from dvq.advice import plain_name
from dvq.cifar10 import Images

WANTED = (
    "train_images and test_images, uint8 (N, height, width, 3) or, in gray, (N, height, width, 1), and, as you like, "
    "train_labels and test_labels (N,)"
)
LEAST = {"train": 20, "test": 2}
"""the least training and test images; of the former the split ``tune`` holds out a tenth"""


def read(source: str) -> dict[str, Images]:
    """The images and labels in a file of ``numpy.savez``, as ``dvq.data`` prepares them.

    The training images are shuffled, the same way each time: the split ``tune`` holds out their last tenth, which in
    a sorted file would be all of one kind.

    Args:
        source: the file; in it ``train_images`` and ``test_images``, uint8 (N, H, W, 3) or (N, H, W, 1), H and W
            multiples of 4, at least ``LEAST`` of each, and, where there are any, ``train_labels`` and
            ``test_labels`` (N,), 0 to 255.

    Raises:
        DvqError: there is no such file, or it holds something else.
    """
    given = _arrays(source)
    arrays = _half("train", given, source) | _half("test", given, source)
    train, test = (arrays[f"{half}_images"].shape[1:] for half in ("train", "test"))
    if train != test:
        raise DvqError(
            f"DATA={source}: train_images are of {_sizes(train)}, test_images of {_sizes(test)}; give one size"
        )
    order = np.random.RandomState(0).permutation(len(arrays["train_images"]))  # numpy keeps its numbers
    return arrays | {name: arrays[name][order] for name in ("train_images", "train_labels")}


def name(source: str | Path) -> str:
    """What a sweep calls the images in a file: ``birds@0123456789abcdef`` for those in ``birds.npz``, or, of another
    shape than CIFAR-10's, ``digits@28x28x1-0123456789abcdef``.

    Raises:
        DvqError: as :func:`read`; or the file's name cannot be part of the images' name.
    """
    stem = Path(source).stem
    called = fingerprints.own(stem, read(str(source)))
    if not fingerprints.OWN.fullmatch(called):
        better = plain_name(stem, "images")
        raise DvqError(
            f"DATA={source}: images have their file's name; call it {better}.npz, small letters, digits and hyphens"
        )
    return called


def check(name: str, source: str) -> None:
    """DvqError unless the images ``name`` are those in the file ``source``."""
    if not source:
        raise DvqError(f"the store has no images {name}; give the file that they are in, DATA=file.npz")
    actual = fingerprints.own(name.partition("@")[0], read(source))
    if actual != name:
        raise DvqError(f"DATA={source}: these are not the images {name}, but {actual}")


def shared(train: Images, test: Images) -> int:
    """How many of the test images are training images too, pixel for pixel."""
    test_pixels = {image.tobytes() for image in test}
    both = test_pixels.intersection(image.tobytes() for image in train)
    return sum(image.tobytes() in both for image in test)


def _sizes(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _arrays(source: str) -> dict[str, npt.NDArray[Any]]:
    if not source:
        raise DvqError(f"DATA: name the file of your images, DATA=file.npz; in it {WANTED}")
    if source.startswith("file:"):
        raise DvqError(f"DATA={source}: give the path alone, without file://")
    if "://" in source:
        raise DvqError(f"DATA={source}: images of your own come from a file; fetch it, and give that")
    try:
        path = Path(os.path.expanduser(source))
        if path.is_fifo():  # which would wait for ever
            raise OSError(errno.EINVAL, "it is a pipe; give a file")
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except OSError as error:
        raise DvqError(f"DATA={source}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise DvqError(f"DATA={source}: its arrays do not fit into memory; give fewer images") from None
    except Exception:  # zip, zlib, tokenize and numpy each raise errors of their own
        raise DvqError(
            f"DATA={source}: this is no whole file that numpy.savez writes; give one with {WANTED}"
        ) from None
    for key, array in arrays.items():
        if key not in fingerprints.ARRAYS or not isinstance(array, np.ndarray):
            raise DvqError(f"DATA={source}: '{key}' is none of its arrays; give {WANTED}")
    return arrays


def _half(half: str, given: dict[str, npt.NDArray[Any]], source: str) -> dict[str, Images]:
    """The training or the test half, checked."""
    images = given.get(f"{half}_images")
    if images is None:
        raise DvqError(f"DATA={source}: there is no {half}_images in it; give {WANTED}")
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < LEAST[half]:
        hint = f"; for gray images without channels: {half}_images[..., None]" if images.ndim == 3 else ""
        if images.dtype.kind in "fb" and images.size and images.min() >= 0 and images.max() <= 1:
            hint += f'; for numbers from 0 to 1: ({half}_images * 255).round().astype("uint8")'
        raise DvqError(
            f"DATA={source}: {half}_images is {images.dtype} {images.shape}; give uint8 (N, height, width, 3), "
            f"or 1 in gray, values from 0 to 255, at least {LEAST[half]} of them{hint}"
        )
    channels = fingerprints.CHANNELS
    if images.shape[1] in channels and images.shape[3] not in channels:
        raise DvqError(
            f"DATA={source}: {half}_images is {images.dtype} {images.shape}, channels first; give channels last, "
            f"{half}_images.transpose(0, 2, 3, 1)"
        )
    try:
        fingerprints.check_shape(images.shape[1:])
    except ValueError as error:
        raise DvqError(f"DATA={source}: {half}_images is {images.dtype} {images.shape}, {error}") from None
    if images.max() <= 1:
        raise DvqError(
            f"DATA={source}: {half}_images has no value above 1; give values from 0 to 255, "
            f"{half}_images * np.uint8(255) if they are binary"
        )
    labels = given.get(f"{half}_labels", np.zeros(len(images), np.uint8))
    fits = labels.shape == images.shape[:1] and labels.dtype.kind in "iu"
    if not fits or labels.min() < 0 or labels.max() > 255:
        raise DvqError(
            f"DATA={source}: {half}_labels is {labels.dtype} {labels.shape}; give {len(images)} integers "
            "from 0 to 255, or no labels"
        )
    return {f"{half}_images": images, f"{half}_labels": labels.astype(np.uint8)}
