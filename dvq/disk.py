"""Files that a reader, or the machine after a power cut, finds whole or not at all; and locks."""

import errno
import fcntl
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import numpy as np

from dvq import DvqError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What the system says of a disk that is full, or not to be written."""


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write under another name, sync, and rename: a reader sees the whole file or the one before."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say whose file it was
        with suppress(OSError):
            partial.unlink()
        raise


@dataclass(frozen=True)
class Arrays:
    """Arrays that are kept in a file together."""

    def save(self, path: Path) -> None:
        """Write the arrays to ``path``, which ends in ``.npz``."""
        np.savez_compressed(path, **asdict(self))
        sync(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The inverse of :meth:`save`.

        Raises:
            DvqError: the file is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**arrays)
        except (EOFError, TypeError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise DvqError(
                f"{path} is damaged ({error}); remove its folder, or give FRESH=1, to have the trial computed anew"
            ) from None


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, then synced, that takes the place of ``folder``; of a failed one nothing stays."""
    partial, earlier = (folder.with_name(f".{what}-{folder.name}") for what in ("partial", "earlier"))
    for left in (partial, earlier):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        if folder.exists():
            folder.rename(earlier)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def locked(path: Path, busy: Callable[[], None] = lambda: None) -> Iterator[int]:
    """Hold the lock that is the file ``path``; ``busy`` is called before waiting for one that another process
    holds. The system gives it back when the last process that has it ends, however it does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


class BusyError(DvqError):
    """Another process or thread is at work in a folder."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder, made if it is not there, is this caller's; BusyError where another is at work in it. Some networks'
    file systems lock no folder, and are trusted."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise DvqError(
            f"the folder {folder} can't be made or read ({error.strerror}); name another"
        ) from None
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(
                    f"{folder}: another process or thread is training in it; wait, or name another"
                ) from None
        yield
    finally:
        with suppress(OSError):  # said, for a process that was forked meanwhile holds the lock too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def locks() -> Path:
    """The folder of this user's locks on GPUs, one for all launches on a machine: not TMPDIR, which each has of its
    own, nor a container's /tmp. ``DVQ_LOCKS`` names another."""
    folder = Path(os.environ.get("DVQ_LOCKS") or f"/tmp/dvq-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # /tmp is everybody's
        raise DvqError(f"{folder} is another user's; name a folder for the locks on GPUs with DVQ_LOCKS")
    return folder
