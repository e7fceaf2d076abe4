"""The official CIFAR-10 python batches: found, downloaded, verified and read.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html. The batches are pickles; nothing is unpickled before its MD5 is
known to be the published one, and then only what an array needs.
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from dvq import DvqError

Progress = Callable[[int, int], None]
"""Called during a download with the bytes received and the bytes in all (0 if the server does not say)."""
Images = npt.NDArray[np.uint8]

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_SIZE = 170_498_071
"""bytes; what goes on behind them is another file"""
FOLDER = "cifar-10-batches-py"
BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
TIMEOUT = 30.0
"""seconds without an answer after which a server counts as unreachable"""
CHUNK = 1 << 20
"""bytes between two reports of a download's progress"""
GIVE = f"set DATA to a local {ARCHIVE}, a folder that holds it or its batches, or a mirror's address"


def check(source: str) -> None:
    """DvqError unless :func:`read` can use ``source``: files need the right MD5s, an address must answer."""
    place = _locate(source)
    if isinstance(place, str):
        with _open(place, timeout=TIMEOUT / 3) as response:
            _require_gzip(_receive(response, place, 2), place)
    elif place.is_file():
        _verify_archive(place, str(place))
    else:
        for _ in _batches(place):
            pass


def read(source: str, scratch: Path, progress: Progress | None = None) -> dict[str, Images]:
    """The images and labels of all of CIFAR-10, in the official order.

    Args:
        source: the archive or the folder of its batches, a folder that holds either, an http(s) address of
            the archive, or "" for the official one.
        scratch: an existing folder, where a download lies as long as it is needed.
        progress: told about a download.

    Returns:
        ``train_images`` (50000, 32, 32, 3), ``train_labels`` (50000,), ``test_images`` (10000, 32, 32, 3)
        and ``test_labels`` (10000,), all uint8.
    """
    place = _locate(source)
    if isinstance(place, str):
        address, place = place, scratch / ARCHIVE
        try:
            _download(address, place, progress)
            return _arrays(place, address)
        finally:
            place.unlink(missing_ok=True)
    return _arrays(place, str(place))


def _arrays(place: Path, named: str) -> dict[str, Images]:
    if place.is_file():
        _verify_archive(place, named)
    batches = {name: _decode(content) for name, content in _batches(place)}
    train = [batches[name] for name in BATCH_MD5 if name.startswith("data_batch")]
    test_images, test_labels = batches["test_batch"]
    return {
        "train_images": np.concatenate([images for images, _ in train]),
        "train_labels": np.concatenate([labels for _, labels in train]),
        "test_images": test_images,
        "test_labels": test_labels,
    }


def _locate(source: str) -> str | Path:
    """An address, the archive's path, or the folder that holds the batches themselves."""
    if not source or source.startswith(("http://", "https://")):
        return source or ADDRESS
    if source.startswith("file:"):
        raise DvqError(f"DATA={source}: give the path alone, without file://")
    path = Path(os.path.expanduser(source))
    with _reading(path):
        if not path.exists():
            raise DvqError(f"DATA={source}: there is no such file or folder; {GIVE}")
        if path.is_file():
            with path.open("rb") as file:
                _require_gzip(file.read(2), str(path))
            return path
        if not path.is_dir():
            raise DvqError(f"DATA={source}: this is no file or folder, but a device or pipe; {GIVE}")
        for folder in (path, path / FOLDER):
            if any((folder / name).exists() for name in BATCH_MD5):
                return folder
        if (path / ARCHIVE).is_file():
            return path / ARCHIVE
    raise DvqError(
        f"DATA={source}: in this folder are neither data_batch_1 to 5 and test_batch nor {ARCHIVE}; {GIVE}"
    )


def _batches(place: Path) -> Iterator[tuple[str, bytes]]:
    """Each batch's name and verified bytes; DvqError for one that is missing or differs from the official."""
    seen = set()
    for name, content in _members(place):
        _verify(hashlib.md5(content, usedforsecurity=False).hexdigest(), BATCH_MD5[name], str(place / name))
        seen.add(name)
        yield name, content
    for name in BATCH_MD5:
        if name not in seen:
            raise DvqError(f"{place}: {name} is missing; get all of {ARCHIVE} from {ADDRESS}")


def _members(place: Path) -> Iterator[tuple[str, bytes]]:
    """The name and bytes of each batch that is there."""
    if place.is_dir():
        for name in BATCH_MD5:
            if (place / name).exists():
                with _reading(place / name):
                    content = (place / name).read_bytes()
                yield name, content
        return
    with tarfile.open(place, "r|gz") as archive:
        for member in archive:
            file, name = archive.extractfile(member), PurePosixPath(member.name).name
            if file and name in BATCH_MD5:
                yield name, file.read()


def _verify_archive(path: Path, named: str) -> None:
    with _reading(path), path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    _verify(digest, ARCHIVE_MD5, named)


def _verify(digest: str, expected: str, named: str) -> None:
    if digest != expected:
        raise DvqError(
            f"{named}: the MD5 is {digest}, the official file's is {expected}: it is damaged, cut short or "
            f"another file; get it again from {ADDRESS}"
        )


def _require_gzip(head: bytes, named: str) -> None:
    if head[:2] != b"\x1f\x8b":
        raise DvqError(f"{named}: this is not {ARCHIVE} (it is no gzip file at all); {GIVE}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DvqError(f"{path}: cannot be read ({error.strerror or error}); {GIVE}") from error


class _Unpickler(pickle.Unpickler):
    """Makes bytes, numbers, lists, dicts and numeric arrays; refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy.core.multiarray", "_reconstruct":
                return lambda _, shape, code: np.ndarray(shape, code)
            case "numpy", "ndarray" | "dtype":
                return getattr(np, name)
        raise pickle.UnpicklingError(f"a CIFAR-10 batch has no use for {module}.{name}")


def _decode(content: bytes) -> tuple[Images, Images]:
    """A batch's images (N, 32, 32, 3) and labels (N,); its rows are 1024 reds, then greens, then blues."""
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(batch[b"labels"], np.uint8)


def _open(address: str, timeout: float) -> http.client.HTTPResponse:
    from urllib.error import HTTPError  # a fifth of this module's import time, and seldom needed
    from urllib.request import urlopen

    try:
        response: http.client.HTTPResponse = urlopen(address, timeout=timeout)
    except HTTPError as error:
        raise DvqError(f"{address} answers {error.code} {error.reason}; {GIVE}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DvqError(f"{address} cannot be reached ({getattr(error, 'reason', error)}); {GIVE}") from None
    return response


def _receive(response: http.client.HTTPResponse, address: str, size: int) -> bytes:
    try:
        return response.read(size)
    except (OSError, http.client.HTTPException) as error:
        raise DvqError(f"{address}: the connection broke ({error}); try again, or {GIVE}") from None


def _download(address: str, path: Path, progress: Progress | None) -> None:
    done = 0
    with _open(address, TIMEOUT) as response, path.open("wb") as file:
        total = response.length or 0
        while done <= ARCHIVE_SIZE and (chunk := _receive(response, address, CHUNK)):
            if not done:
                _require_gzip(chunk, address)
            file.write(chunk)
            done += len(chunk)
            if progress:
                progress(done, total)
    if done < min(total, ARCHIVE_SIZE):
        raise DvqError(f"{address}: the connection broke after {done} of {total} bytes; try again, or {GIVE}")
