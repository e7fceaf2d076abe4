"""Writing so that a reader, or the machine after a power cut, finds a file whole or not at all."""

import os
from pathlib import Path

from dvq import DvqError


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
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def locks() -> Path:
    """The folder of this user's locks on GPUs, one for all launches on a machine: not TMPDIR, which each has of its
    own, nor a container's /tmp. ``DVQ_LOCKS`` names another."""
    folder = Path(os.environ.get("DVQ_LOCKS") or f"/tmp/dvq-{os.getuid()}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # /tmp is everybody's
        raise DvqError(f"{folder} is another user's; name a folder for the locks on GPUs with DVQ_LOCKS")
    return folder
