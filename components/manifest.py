"""What a mirrored folder holds: the manifest, in the bucket, and the index, in the folder."""

import hashlib
import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from components.folder import State, write_json
from dvq import DvqError

FORMAT = 1
INDEX = ".mirror.json"
"""This file in the folder says which push the folder last equalled, and what its files were then."""


class Piece(NamedTuple):
    """A piece of a file, most often all of it."""

    object: str
    """its key behind the folder's place"""
    sha256: str
    size: int


def piece_of(name: str, content: bytes) -> Piece:
    """The piece that is all of the object ``name``."""
    return Piece(name, hashlib.sha256(content).hexdigest(), len(content))


def stored(content: bytes, pieces: list[Piece]) -> tuple[list[Piece], int]:
    """Which of a file's stored pieces to keep now that it holds ``content``, and where in it the rest begins.

    Pieces at the end that are less than twice as large as what was appended are stored again together with it: so
    pieces stay few, and little is sent twice.
    """
    kept: list[Piece] = []
    start = 0
    for piece in pieces:
        if piece_of(piece.object, content[start : start + piece.size]) != piece:
            break
        kept.append(piece)
        start += piece.size
    while start < len(content) and kept and kept[-1].size < 2 * (len(content) - start):
        start -= kept.pop().size
    return kept, start


@dataclass(frozen=True)
class Manifest:
    """A folder as it was pushed last."""

    owner: str = ""
    """the worker that pushed it"""
    push: int = 0
    """how many times the owner has pushed"""
    active: bool = False
    """whether the owner is still at work"""
    by: str = ""
    """where the owner is, in words"""
    state: dict[str, Any] = field(default_factory=dict)
    """of a trial, as ``components.folder.State`` has it"""
    files: dict[str, list[Piece]] = field(default_factory=dict)
    format: int = FORMAT

    def content(self) -> bytes:
        fields = asdict(self)
        return (json.dumps({**fields, "sha256": _digest(fields)}, indent=1) + "\n").encode()

    def objects(self) -> set[str]:
        return {piece.object for pieces in self.files.values() for piece in pieces}

    def steps(self) -> list[int]:
        """The steps of the checkpoints."""
        return sorted(int(path.split("/")[1]) for path in self.files if path.endswith("/checkpoint.json"))


class Known(NamedTuple):
    """A local file that is equal to stored pieces for as long as its size and time [ns] are these."""

    pieces: list[Piece]
    size: int
    time: int


def parse(content: bytes, named: str) -> Manifest:
    """The manifest in ``content``; DvqError if it is damaged or of another format."""
    try:
        found = json.loads(content)
        if found.pop("sha256") != _digest(found):
            raise ValueError("its SHA-256 differs")
        if found["format"] == FORMAT:
            files = {path: [Piece(*one) for one in pieces] for path, pieces in found["files"].items()}
            made = Manifest(**{**found, "files": files})
            _stay_inside({*files, *made.objects()})
            State(**(made.state or {"name": "new"})), made.steps()  # can be read
            return made
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DvqError(f"{named} is damaged ({error}); remove it to have all of it made anew") from None
    raise DvqError(
        f"{named} has format {found['format']}, and this version reads {FORMAT}; use the version that wrote it"
    )


def _stay_inside(names: set[str]) -> None:
    """ValueError for a path that leads out of the folder: whoever can write to the bucket could write there too."""
    for name in names:
        name.encode()  # an error if it holds half a character
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{name!r} leads out of its folder")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_index(folder: Path) -> tuple[Manifest, str, dict[str, Known]]:
    """The index: owner and number of the last push, who was about to become the owner, and the files as they were."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        known = {
            path: Known([Piece(*piece) for piece in pieces], *stamp)
            for path, (pieces, *stamp) in found["files"].items()
        }
        return Manifest(found["owner"], found["push"]), found["claim"], known
    except (OSError, ValueError, KeyError, TypeError):
        return Manifest(), "", {}


def save_index(folder: Path, manifest: Manifest, claim: str, known: dict[str, Known]) -> None:
    """Write the index; a reader sees the whole file or the one before."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / INDEX, {"owner": manifest.owner, "push": manifest.push, "claim": claim, "files": known}
    )


def paths(folder: Path) -> list[str]:
    """The paths of a folder's files, sorted (checkpoints before images), without those hidden or being written."""
    found: list[str] = []
    for place, folders, names in os.walk(folder):  # leaves out what is removed meanwhile
        folders[:] = sorted(name for name in folders if _whole(name))
        here = Path(place).relative_to(folder)
        found += [(here / name).as_posix() for name in sorted(names) if _whole(name)]
    return found


def _whole(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".partial")


def stamp(path: Path) -> tuple[int, int]:
    """A file's size and time [ns], which change when it is written; −1 if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def here() -> str:
    """Where this is, in words."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def new_owner() -> str:
    """A name that no other worker has, and that sorts by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"
