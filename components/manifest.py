"""The manifest of a mirrored folder, in the bucket, and its index, in the folder."""

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
"""The file in the folder that records the last push that the folder equalled, and the files of then."""


class Piece(NamedTuple):
    """A piece of a file, usually all of it."""

    object: str
    """its key behind the folder's place"""
    sha256: str
    size: int


def piece_of(name: str, content: bytes) -> Piece:
    """The piece that the whole object ``name`` holds."""
    return Piece(name, hashlib.sha256(content).hexdigest(), len(content))


def pieces_to_keep(content: bytes, pieces: list[Piece]) -> tuple[list[Piece], int]:
    """The stored pieces of a file to keep now that it holds ``content``, and the offset from which to store the rest.

    Last pieces that are less than twice as large as what was appended are stored again together with it, which keeps
    pieces few and sends little twice.
    """
    reused: list[Piece] = []
    start = 0
    for piece in pieces:
        if piece_of(piece.object, content[start : start + piece.size]) != piece:
            break
        reused.append(piece)
        start += piece.size
    while start < len(content) and reused and reused[-1].size < 2 * (len(content) - start):
        start -= reused.pop().size
    return reused, start


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
    state: State = field(default_factory=State)
    """of a trial"""
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


class SyncedFile(NamedTuple):
    """A local file that equals stored pieces as long as its size and time [ns] are these."""

    pieces: list[Piece]
    size: int
    time: int


def parse(content: bytes, name: str) -> Manifest:
    """The manifest in ``content``; DvqError if it is damaged or of another format."""
    try:
        fields = json.loads(content)
        if fields.pop("sha256") != _digest(fields):
            raise ValueError("its SHA-256 differs")
        if fields["format"] == FORMAT:
            files = {path: [Piece(*piece) for piece in pieces] for path, pieces in fields["files"].items()}
            manifest = Manifest(**{**fields, "files": files, "state": State(**fields["state"])})
            _stay_inside({*files, *manifest.objects()})
            manifest.steps()  # can be read
            return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DvqError(f"{name} is damaged ({error}); remove it to have all of it made anew") from None
    raise DvqError(
        f"{name} has format {fields['format']}, and this version reads {FORMAT}; use the version that wrote it"
    )


def _stay_inside(names: set[str]) -> None:
    """ValueError for a path out of the folder: it would let those who can write to the bucket write anywhere here."""
    for name in names:
        name.encode()  # ValueError for half a surrogate pair
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError(f"{name!r} leads out of its folder")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def load_index(folder: Path) -> tuple[Manifest, str, dict[str, SyncedFile]]:
    """The index: a manifest with the last push's owner and number, the name that a claim has chosen, the files."""
    try:
        fields = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        synced = {
            path: SyncedFile([Piece(*piece) for piece in pieces], *stamp)
            for path, (pieces, *stamp) in fields["files"].items()
        }
        return Manifest(fields["owner"], fields["push"]), fields["claim"], synced
    except (OSError, ValueError, KeyError, TypeError):
        return Manifest(), "", {}


def save_index(folder: Path, manifest: Manifest, claim: str, synced: dict[str, SyncedFile]) -> None:
    """Write the index, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / INDEX, {"owner": manifest.owner, "push": manifest.push, "claim": claim, "files": synced}
    )


def list_files(folder: Path) -> list[str]:
    """The paths of a folder's files, sorted (checkpoints before images), without hidden and unfinished ones."""
    files: list[str] = []
    for place, folders, names in os.walk(folder):  # leaves out what is removed meanwhile
        folders[:] = sorted(name for name in folders if _is_complete(name))
        parent = Path(place).relative_to(folder)
        files += [(parent / name).as_posix() for name in sorted(names) if _is_complete(name)]
    return files


def _is_complete(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".partial")


def stamp(path: Path) -> tuple[int, int]:
    """A file's size and time [ns], which change when it is written; −1 if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def this_process() -> str:
    """This process and its machine, in words."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def new_owner() -> str:
    """A unique name for a worker, which sorts by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:8]}"
