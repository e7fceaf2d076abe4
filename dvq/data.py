"""Prepared images: uint8 arrays in a folder, with labels, splits, statistics and a fingerprint.

A prepared dataset holds ``train_images.npy`` (N, H, W, 3) or, in gray, (N, H, W, 1), ``train_labels.npy``
(N,), ``test_images.npy``, ``test_labels.npy``, all uint8, and ``data.json``: what it is, how many images each split
has, and the training images' mean and standard deviation per channel, in [0, 1].
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from dvq import DvqError, cifar10, disk, fingerprints, own
from dvq.cifar10 import Images, Progress
from dvq.fingerprints import ARRAYS, FORMAT, fingerprint, shape_of
from dvq.trial import Split, Trial

SAMPLE = Path(__file__).parent / "sample" / "cifar10-sample.npz"
PROGRESS = 5.0
"""seconds between two lines about a download"""
HELD_OUT = 10
"""the split ``tune`` holds out the last of this many equal parts of the training images"""


@dataclass(frozen=True)
class Data:
    """A prepared dataset, its arrays mapped from their files."""

    info: dict[str, Any]
    """data.json"""
    arrays: dict[str, Images]

    def training(self, split: Split) -> tuple[Images, Images]:
        """The images (N, H, W, 3) and labels (N,) to train on; for ``tune`` without those held out."""
        _check_split(split)
        end = self.info["train"] - (self.info["tune"] if split == "tune" else 0)
        return self.arrays["train_images"][:end], self.arrays["train_labels"][:end]

    def fits(self, trial: Trial) -> bool:
        """Whether these are the images that the trial names."""
        return fingerprints.fits(trial.data, self.info["fingerprint"], self.arrays)

    def check(self, trial: Trial) -> None:
        """DvqError unless these are the images that the trial names."""
        if not self.fits(trial):
            name = self.info["name"]
            raise DvqError(
                f"the trial is of {trial.data}, and these images are {name}; give it 'data': '{name}'"
            )

    def check_shape(self, trial: Trial) -> None:
        """DvqError unless a model of the trial takes these images."""
        if shape_of(self.arrays) != trial.image_shape:
            one, other = ("×".join(map(str, size)) for size in (trial.image_shape, shape_of(self.arrays)))
            raise DvqError(f"the model takes images of {one}, and {self.info['name']} are of {other}")

    def evaluation(self, split: Split) -> tuple[Images, Images]:
        """The images and labels to evaluate on: the test set, or for ``tune`` those held out of training."""
        _check_split(split)
        if split == "test":
            return self.arrays["test_images"], self.arrays["test_labels"]
        start = self.info["train"] - self.info["tune"]
        return self.arrays["train_images"][start:], self.arrays["train_labels"][start:]


def _check_split(split: str) -> None:
    if split not in get_args(Split):
        raise DvqError(f"there is no split '{split}'; known: {', '.join(get_args(Split))}")


def load(folder: Path) -> Data:
    """The prepared dataset in ``folder``; DvqError if there is none, or it is not whole."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        if info["format"] != FORMAT:
            raise ValueError(f"format {info['format']} instead of {FORMAT}")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        sizes = fingerprints.shape(info["name"])
        for name, array in arrays.items():
            shape = (info[name.split("_")[0]], *(sizes if "images" in name else ()))
            if array.shape != shape or array.dtype != np.uint8:
                raise ValueError(f"{name}.npy holds {array.dtype} {array.shape} instead of uint8 {shape}")
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise DvqError(f"{folder} holds no whole prepared dataset ({error}); prepare it again") from None
    return Data(info, arrays)


def is_prepared(name: str, folder: Path) -> bool:
    """Whether ``folder`` holds all of the dataset ``name``, by sizes and data.json; pixels are not read."""
    try:
        data = load(folder)
    except DvqError:
        return False
    return fingerprints.fits(name, str(data.info.get("fingerprint")), data.arrays)


def check_source(name: str, source: str) -> None:
    """DvqError unless ``name`` can be prepared from ``source``, as far as can be told without a download."""
    if name == "cifar10":
        cifar10.check(source)
    elif name != "cifar10-sample":
        own.check(name, source)


def prepare(name: str, source: str, folder: Path, progress: Progress | None = None) -> None:
    """Make ``folder`` hold the dataset ``name``: completely, or not at all.

    It is written beside ``folder`` and renamed. A second process that prepares the same waits for the first
    and finds its work; what a killed one left behind is removed by the next.

    Args:
        name: "cifar10", "cifar10-sample", which is bundled, or what :func:`dvq.own.name` calls images of one's own.
        source: where CIFAR-10 is, see :func:`dvq.cifar10.read`, or the file of one's own; the sample needs none.
        folder: nothing happens if it is whole already.
        progress: told about a download.

    Raises:
        DvqError: the source is missing, damaged, unreachable or holds other images, or ``folder`` is not writable.
    """
    fingerprints.of(name)  # DvqError if this cannot be a dataset's name
    folder = Path(folder)
    if is_prepared(name, folder):
        return
    with _writing(folder), _workspace(folder) as work:
        if is_prepared(name, folder):
            return
        _write(name, _read(name, source, work, progress), work)
        _publish(work, folder)


def link(folder: Path, other: Path) -> None:
    """Make ``other`` hold the prepared dataset in ``folder`` too: hard links, or copies on another disk."""
    with _writing(other):
        other.mkdir(parents=True, exist_ok=True)
        (other / "data.json").unlink(missing_ok=True)
        for file in (*(f"{name}.npy" for name in ARRAYS), "data.json"):
            (other / file).unlink(missing_ok=True)
            try:
                os.link(folder / file, other / file)
            except OSError:
                shutil.copyfile(folder / file, other / file)


def statistics(images: Images) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Each channel's mean and standard deviation [1 = the pixel value 255], from counts of the 256 values."""
    channels = range(images.shape[-1])
    counts = np.zeros((len(channels), 256), np.int64)
    pieces = max(1, images.size // 3_000_000)  # bincount copies to 8 bytes a pixel
    for some in np.array_split(images, pieces):
        counts += [np.bincount(some[..., channel].ravel(), minlength=256) for channel in channels]
    pixels, values = counts.sum(axis=1), np.arange(256) / 255
    mean = counts @ values / pixels
    variance = counts @ values**2 / pixels - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))  # rounding may take that of a constant below 0


def read_sample(path: Path = SAMPLE) -> dict[str, Images]:
    """The bundled sample's four arrays."""
    with np.load(path) as file:
        return {name: file[name] if "labels" in name else unpack(file[name]) for name in ARRAYS}


def unpack(packed: Images) -> Images:
    """Images (N, 32, 32, 3) from their differences mod 256 over channels, rows and columns (3, N, 32, 32)."""
    for axis in (0, 2, 3):
        packed = np.cumsum(packed, axis=axis, dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(packed, 0, -1))


def print_progress() -> Progress:
    """A ``progress`` that prints a line, at most one in ``PROGRESS`` seconds: for output that is not a terminal."""
    last = -PROGRESS

    def line(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PROGRESS:
            last = time.monotonic()
            of = f" of {total / 1e6:.0f}" if total else ""
            print(f"downloading: {done / 1e6:.0f}{of} MB", flush=True)

    return line


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or f"no room: {error}"  # numpy's error for a short write has no strerror
        raise DvqError(
            f"the prepared images cannot be written to {folder} ({reason}); "
            "make room or name another folder with DVQ_STORE (they need up to 400 MB)"
        ) from error


@contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, for one process at a time. The lock file, which is empty, is left there."""
    work = folder.parent / f".{folder.name}.partial"
    with disk.locked(folder.parent / f".{folder.name}.lock"):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _read(name: str, source: str, scratch: Path, progress: Progress | None) -> dict[str, Images]:
    if name == "cifar10":
        return cifar10.read(str(source), scratch, progress)
    return read_sample() if name == "cifar10-sample" else own.read(str(source))


def _write(name: str, arrays: dict[str, Images], work: Path) -> None:
    digest = fingerprint(arrays)
    if not fingerprints.fits(name, digest, arrays):
        if name not in fingerprints.FINGERPRINTS:
            actual = fingerprints.own(name.partition("@")[0], arrays)
            raise DvqError(f"{name}: the images are {actual}; give the file that make data was given")
        right = fingerprints.of(name)
        raise DvqError(f"{name}: the images have the fingerprint {digest} instead of {right}; reinstall dvq")
    mean, std = statistics(arrays["train_images"])
    train, test = len(arrays["train_images"]), len(arrays["test_images"])
    info = {
        "format": FORMAT,
        "name": name,
        "fingerprint": digest,
        "label": fingerprints.label(name),
        "train": train,
    }
    info |= {"tune": train // HELD_OUT, "test": test, "mean": mean.tolist(), "std": std.tolist()}
    for array in ARRAYS:
        np.save(work / f"{array}.npy", arrays[array])
    (work / "data.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    for path in (*work.iterdir(), work):
        disk.sync(path)


def _publish(work: Path, folder: Path) -> None:
    """Rename ``work`` to ``folder``. If that has files already its dataset, a damaged one, is replaced file by file,
    data.json last, and whatever else it holds is kept."""
    try:
        work.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        (folder / "data.json").unlink(missing_ok=True)  # from here on the old dataset counts as incomplete
        disk.sync(folder)
        for path in sorted(work.iterdir(), key=lambda path: path.name == "data.json"):
            path.replace(folder / path.name)
        disk.sync(folder)
    disk.sync(folder.parent)
