"""The files of a mirrored folder (components/mirror.py): fetched from the objects that hold them, and stored as
objects."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

from components.bucket import Bucket, DamagedError
from components.manifest import (
    Manifest,
    Piece,
    SyncedFile,
    list_files,
    load_index,
    parse,
    piece_of,
    pieces_to_keep,
    save_index,
    stamp,
)
from components.s3 import MissingError
from dvq import DvqError

EVENTS, CHECKPOINTS = "events/", "checkpoints/"
"""Where files are only appended to, and where training removes old ones."""


class Files:
    """The folder ``folder``, and its files' objects and manifest at ``place`` of a bucket."""

    def __init__(self, bucket: Bucket, place: str, folder: Path) -> None:
        self.bucket, self.place, self.folder = bucket, place, folder
        self.name = f"{bucket}/{place}"
        self.manifest, self._etag = Manifest(), ""
        self._index, self._claim, self._synced = load_index(folder)

    def read(self) -> Manifest:
        """Read the manifest, for the other methods; an empty one if there is none."""
        self.manifest, self._etag = self._read()
        return self.manifest

    def _read(self) -> tuple[Manifest, str]:
        try:
            content, etag = self.bucket.get(f"{self.place}.json")
        except MissingError:
            return Manifest(), ""
        return parse(content, f"{self.name}.json"), etag

    def fetch(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Fetch the files that the folder lacks and whose path is ``wanted``."""
        missing = [path for path in self.manifest.files if wanted(path) and not (self.folder / path).exists()]
        if missing:
            self.bucket.map(self._fetch, missing)
            self._save_index(self._index)

    def _fetch(self, path: str) -> None:
        target, pieces = self.folder / path, self.manifest.files[path]
        try:
            self._join(target, pieces)
        except DamagedError as error:
            if not path.startswith(CHECKPOINTS):
                raise DvqError(f"{error}; remove {self.name}.json to have all of it made anew") from None
            print(f"{error}; this checkpoint is left out", flush=True)
            del self.manifest.files[path]
            return
        except OSError as error:
            raise DvqError(
                f"{target} cannot be written ({error.strerror}); make room, or set DVQ_CACHE"
            ) from None
        self._synced[path] = SyncedFile(pieces, *stamp(target))

    def _join(self, target: Path, pieces: list[Piece]) -> None:
        """Fetch a file's pieces and join them, completely or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        parts = [target.with_name(f".{target.name}.{number}") for number in range(len(pieces))]
        for part, piece in zip(parts, pieces, strict=True):
            try:
                self.bucket.download(f"{self.place}/{piece.object}", part, piece.size, piece.sha256)
            except MissingError:
                now = self._read()[0]
                if (now.owner, now.push) != (self.manifest.owner, self.manifest.push):
                    raise  # it was replaced
                raise DamagedError(f"{self.name}/{piece.object} is not there any more") from None
        if len(parts) != 1:
            joined = target.with_name(f".{target.name}.joined")
            joined.write_bytes(b"".join(part.read_bytes() for part in parts))
            for part in parts:
                part.unlink()
            parts = [joined]
        parts[0].replace(target)

    def _upload(self, name: str) -> dict[str, list[Piece]]:
        """Store changed files in objects under ``name``; returns the files of the next manifest.

        Files that were never fetched stay as they are. The folder is listed first and events are read last, so that
        they include all that a listed checkpoint relies on. Checkpoints are opened before anything is stored, so that
        they can be stored even if training removes them meanwhile.
        """
        local_paths = list_files(self.folder)
        files = {path: pieces for path, pieces in self.manifest.files.items() if path not in self._synced}
        self._synced = {path: file for path, file in self._synced.items() if path in local_paths}
        stamps = {path: stamp(self.folder / path) for path in local_paths}
        changed = [
            path for path in local_paths if path not in self._synced or self._synced[path][1:] != stamps[path]
        ]
        with ExitStack() as stack:
            opened: dict[str, BufferedReader] = {}
            for path in (path for path in changed if path.startswith(CHECKPOINTS)):
                with suppress(FileNotFoundError):
                    opened[path] = stack.enter_context((self.folder / path).open("rb"))
            for path in sorted(changed, key=lambda path: path.startswith(EVENTS)):
                try:
                    self._synced[path] = SyncedFile(self._store(path, name, opened.get(path)), *stamps[path])
                except FileNotFoundError:  # removed meanwhile
                    self._synced.pop(path, None)
        return files | {path: file.pieces for path, file in self._synced.items()}

    def _store(self, path: str, name: str, opened: BufferedReader | None) -> list[Piece]:
        if path.startswith(EVENTS):
            return self._append(path, name)
        key, file = f"{self.place}/{name}/{path}", self.folder / path
        digest_and_size = self.bucket.store(opened, key) if opened else self.bucket.upload(file, key)
        return [Piece(f"{name}/{path}", *digest_and_size)]

    def _append(self, path: str, name: str) -> list[Piece]:
        """Store the complete lines that were appended."""
        content = (self.folder / path).read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        pieces, start = pieces_to_keep(content, self._synced[path].pieces if path in self._synced else [])
        if start < len(content):
            piece = piece_of(f"{name}/{path}.{start}", content[start:])
            self.bucket.put(f"{self.place}/{piece.object}", content[start:])
            pieces.append(piece)
        return pieces

    def _save_index(self, manifest: Manifest) -> None:
        """Record in the index that the folder has all of ``manifest``, and perhaps more."""
        self._index = manifest
        save_index(self.folder, manifest, self._claim, self._synced)
