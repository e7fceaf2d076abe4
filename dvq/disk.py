"""Files that a reader, or the machine after a power cut, finds complete or not at all; and locks."""

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
"""The error numbers of a disk that is full or read-only."""


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, content: str | bytes) -> None:
    """Write under another name, sync, and rename: a reader sees the whole new file or the old one."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
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
    """Yield an empty folder to fill, which is then synced and takes the place of ``folder``; after an error nothing
    of it is left."""
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
    """Hold the lock file ``path``; if another process holds it, ``busy`` is called and then the lock waited for. The
    system releases it when the last process that inherited it ends, however it ends."""
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
    """Hold ``folder``, which is made if it is not there, for this caller; BusyError if another is at work in it.
    Where a network's file system cannot lock a folder, it is assumed that there is no other."""
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
        with suppress(OSError):  # explicitly: a process that was forked meanwhile holds the lock too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def locks() -> Path:
    """The folder of this user's locks on GPUs, the same for all launches on a machine: so neither TMPDIR, which each
    launch sets for itself, nor a container's /tmp. ``DVQ_LOCKS`` names another."""
    folder = Path(os.environ.get("DVQ_LOCKS") or f"/tmp/dvq-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # anyone can make it in /tmp
        raise DvqError(f"{folder} is another user's; name a folder for the locks on GPUs with DVQ_LOCKS")
    return folder
