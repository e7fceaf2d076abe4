"""The files of a mirrored folder (components/mirror.py): fetched from the objects that hold them, and stored as
objects."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

from components.bucket import Bucket, DamagedError
from components.manifest import (
    Known,
    Manifest,
    Piece,
    load_index,
    parse,
    paths,
    piece_of,
    save_index,
    stamp,
    stored,
)
from components.s3 import MissingError
from dvq import DvqError

GROWS, KEPT = "events/", "checkpoints/"
"""The files that are appended to, and those of which training removes old ones."""


class Files:
    """The folder ``folder``, and its files' objects and manifest at ``place`` of a bucket."""

    def __init__(self, bucket: Bucket, place: str, folder: Path) -> None:
        self.bucket, self.place, self.folder = bucket, place, folder
        self.name = f"{bucket}/{place}"
        self.manifest, self._etag = Manifest(), ""
        self._index, self._claim, self._known = load_index(folder)

    def read(self) -> Manifest:
        """Read the manifest, on which the other methods then work; an empty one if there is none."""
        self.manifest, self._etag = self._read()
        return self.manifest

    def _read(self) -> tuple[Manifest, str]:
        try:
            content, etag = self.bucket.get(f"{self.place}.json")
        except MissingError:
            return Manifest(), ""
        return parse(content, f"{self.name}.json"), etag

    def fetch(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Bring the files whose path is ``wanted`` to the folder, where it lacks them."""
        missing = [path for path in self.manifest.files if wanted(path) and not (self.folder / path).exists()]
        if missing:
            self.bucket.each(self._fetch, missing)
            self._remember(self._index)

    def _fetch(self, path: str) -> None:
        target, pieces = self.folder / path, self.manifest.files[path]
        try:
            self._join(target, pieces)
        except DamagedError as error:
            if not path.startswith(KEPT):
                raise DvqError(f"{error}; remove {self.name}.json to have all of it made anew") from None
            print(f"{error}; this checkpoint is left out", flush=True)
            del self.manifest.files[path]
            return
        except OSError as error:
            raise DvqError(
                f"{target} cannot be written ({error.strerror}); make room, or set DVQ_CACHE"
            ) from None
        self._known[path] = Known(pieces, *stamp(target))

    def _join(self, target: Path, pieces: list[Piece]) -> None:
        """Fetch a file's pieces and join them, completely or not at all."""
        target.parent.mkdir(parents=True, exist_ok=True)
        parts = [target.with_name(f".{target.name}.{number}") for number in range(len(pieces))]
        for part, one in zip(parts, pieces, strict=True):
            try:
                self.bucket.download(f"{self.place}/{one.object}", part, one.size, one.sha256)
            except MissingError:
                now = self._read()[0]
                if (now.owner, now.push) != (self.manifest.owner, self.manifest.push):
                    raise  # it was replaced
                raise DamagedError(f"{self.name}/{one.object} is not there any more") from None
        if len(parts) != 1:
            joined = target.with_name(f".{target.name}.joined")
            joined.write_bytes(b"".join(part.read_bytes() for part in parts))
            for part in parts:
                part.unlink()
            parts = [joined]
        parts[0].replace(target)

    def _upload(self, name: str) -> dict[str, list[Piece]]:
        """Store what changed in objects under ``name``; the files as the manifest is to have them.

        Files that are not here were never fetched, and stay as they are. The folder is listed before anything is
        read, and what grows is read last, so that it has all that a listed checkpoint relies on. Checkpoints are
        opened first, so that those that were listed are stored however long the rest takes, even if training removes
        them.
        """
        here_now = paths(self.folder)
        files = {path: pieces for path, pieces in self.manifest.files.items() if path not in self._known}
        self._known = {path: one for path, one in self._known.items() if path in here_now}
        now = {path: stamp(self.folder / path) for path in here_now}
        changed = [path for path in here_now if path not in self._known or self._known[path][1:] != now[path]]
        with ExitStack() as stack:
            opened: dict[str, BufferedReader] = {}
            for path in (path for path in changed if path.startswith(KEPT)):
                with suppress(FileNotFoundError):
                    opened[path] = stack.enter_context((self.folder / path).open("rb"))
            for path in sorted(changed, key=lambda path: path.startswith(GROWS)):
                try:
                    self._known[path] = Known(self._store(path, name, opened.get(path)), *now[path])
                except FileNotFoundError:  # removed meanwhile
                    self._known.pop(path, None)
        return files | {path: one.pieces for path, one in self._known.items()}

    def _store(self, path: str, name: str, opened: BufferedReader | None) -> list[Piece]:
        if path.startswith(GROWS):
            return self._append(path, name)
        key, file = f"{self.place}/{name}/{path}", self.folder / path
        found = self.bucket.store(opened, key) if opened else self.bucket.upload(file, key)
        return [Piece(f"{name}/{path}", *found)]

    def _append(self, path: str, name: str) -> list[Piece]:
        """Store the whole lines that were appended."""
        content = (self.folder / path).read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        kept, start = stored(content, self._known[path].pieces if path in self._known else [])
        if start < len(content):
            # A name that no earlier piece has.
            piece = piece_of(f"{name}/{path}.{start}", content[start:])
            self.bucket.put(f"{self.place}/{piece.object}", content[start:])
            kept.append(piece)
        return kept

    def _remember(self, manifest: Manifest) -> None:
        """Record that the folder has all of ``manifest``, or is ahead of it."""
        self._index = manifest
        save_index(self.folder, manifest, self._claim, self._known)
