"""A folder mirrored in S3: each push is visible as a whole or not at all, and only one worker at a time can push.

``<place>.json``, the manifest, names the folder's files and the objects that hold them, each with its SHA-256. An
object is written once, as ``<place>/<owner>-<push>/<path>``, a name that no other worker uses; then the manifest is
replaced, on the condition (If-Match) that it is still the one that this worker left. Who takes a folder over
replaces the manifest too: the earlier owner's condition fails from then on, however late it wakes.

What grows (events) is stored in pieces that are merged as they become many, so that it is not sent again and again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from components.bucket import Bucket, DamagedError
from components.manifest import (
    Known,
    Manifest,
    Piece,
    here,
    load_index,
    new_owner,
    parse,
    paths,
    piece_of,
    save_index,
    stamp,
    stored,
)
from components.s3 import ChangedError, MissingError
from dvq import DvqError

SILENCE = 120.0
"""Seconds without a push after which an owner that is at work counts as dead."""
POLL = 5.0
"""Seconds between two looks at whether another owner is still at work."""
GROWS, KEPT = "events/", "checkpoints/"


class OvertakenError(DvqError):
    """Another worker has taken the folder over."""


class Mirror:
    """The folder ``folder`` and its mirror at ``place`` of a bucket.

    ``describe`` gives what the manifest says of the folder's state.
    """

    def __init__(
        self, bucket: Bucket, place: str, folder: Path, describe: Callable[[Path], dict[str, Any]]
    ) -> None:
        self.bucket, self.place, self.folder, self._describe = bucket, place, folder, describe
        self.name = f"{bucket}/{place}"
        self.manifest, self._etag, self._pushes = Manifest(), "", 0
        self._index, self._claim, self._known = load_index(folder)

    def read(self) -> Manifest:
        """The manifest as it is now, which is what the rest is about; an empty one if there is none."""
        self.manifest, self._etag = self._read()
        return self.manifest

    def _read(self) -> tuple[Manifest, str]:
        try:
            content, etag = self.bucket.get(f"{self.place}.json")
        except MissingError:
            return Manifest(), ""
        return parse(content, f"{self.name}.json"), etag

    def claim(self) -> None:
        """Become the owner, and remove from the folder what the mirror has otherwise; while another owner is at
        work, wait for its end or its silence."""
        silent, seen = 0.0, ""
        while True:
            found = self.read()
            silent = silent + POLL if self._etag == seen else 0.0
            mine = found.owner in (self._index.owner, self._claim)
            if not found.active or mine or silent >= SILENCE:
                self._reconcile()
                garbage, uploads = self._garbage()
                self._claim = new_owner()
                self._remember(
                    self._index
                )  # before it is there: it may be, and this process dead, in between
                try:
                    self._publish(replace(found, owner=self._claim, push=0, active=True, by=here()))
                    break
                except OvertakenError:
                    continue
            if not seen:
                print(f"{self.name}: {found.by} is at work on it; waiting for it", flush=True)
            seen = self._etag
            time.sleep(POLL)
        self._remember(self.manifest)
        self.bucket.give_up(uploads)
        self._delete(garbage)

    def look(self, manifest: Manifest) -> None:
        """Take ``manifest`` for the mirror's, without becoming its owner; the folder loses what differs."""
        self.manifest = manifest
        if not self._ahead():
            self.read()  # a worker of this machine may have come further since that was seen
            self._reconcile()
            self._remember(self._index)

    def fetch(self, wanted: Callable[[str], bool] = lambda _: True) -> None:
        """Bring the files whose path is ``wanted`` to the folder, where it lacks them."""
        missing = [path for path in self.manifest.files if wanted(path) and not (self.folder / path).exists()]
        if missing:
            self.bucket.each(self._fetch, missing)
            self._remember(self._index)

    def push(self, active: bool = True) -> None:
        """Make the mirror what the folder is; ``active``: and stay at work.

        Raises:
            OvertakenError: another worker took the folder over; nothing of this push is visible.
        """
        before, number = self.manifest.objects(), self._pushes + 1
        files = self._upload(f"{self.manifest.owner}-{number:06d}")
        state = self._describe(self.folder)
        new = replace(self.manifest, push=number, active=active, state=state, files=files)
        self._pushes = number
        self._remember(new)  # before it is there, so that the folder never seems older than its mirror
        self._publish(new)
        self._delete(before - new.objects())

    def publish_once(self) -> None:
        """Store the folder, unless the mirror has one already."""
        if self.read().owner:
            return
        owner, (garbage, uploads) = new_owner(), self._garbage()
        self._known = {}
        try:
            self._publish(Manifest(owner, by=here(), files=self._upload(f"{owner}-{0:06d}")))
            self.bucket.give_up(uploads)
        except (OvertakenError, MissingError):  # another worker was faster, and gave up what this one was at
            if not self.read().owner:
                raise
            garbage = {name for name in self._garbage()[0] if name.startswith(owner)}
        self._delete(garbage)

    def remove(self) -> None:
        """Remove all of the mirror; a worker that is at it is refused from then on."""
        self.bucket.delete([f"{self.place}.json"])
        self.bucket.delete(self.bucket.list(f"{self.place}/"))

    def _publish(self, new: Manifest) -> None:
        """Replace the manifest, if it is still the one that this worker left."""
        key, content, etag = f"{self.place}.json", new.content(), self._etag
        while True:
            try:
                etag = self.bucket.put(key, content, etag)
                break
            except ChangedError:
                found, etag = self._read()
            if found == new:  # it was stored, and the answer was lost
                break
            if found.owner != new.owner:  # else over a push of its own that seemed to fail
                raise OvertakenError(
                    f"{self.name}: overtaken by {found.by or 'its removal'} while {here()} stood still or "
                    "could not reach it; what this process made since then is not published"
                )
        self.manifest, self._etag = new, etag

    def _ahead(self) -> bool:
        """Whether the folder holds all that the manifest does, and perhaps more: it is of this folder's worker."""
        owner, push = self.manifest.owner, self.manifest.push
        return (owner == self._index.owner and push <= self._index.push) or (
            owner == self._claim != "" and not push
        )

    def _reconcile(self) -> None:
        """Find out which local files are as in the manifest; the others go, unless the folder is ahead."""
        files, known, ahead = self.manifest.files, self._known, self._ahead()
        self._known = {
            path: one
            for path, one in known.items()
            if one.pieces == files.get(path) and stamp(self.folder / path) == one[1:]
        }
        for path in () if ahead else paths(self.folder):
            if path not in self._known:
                (self.folder / path).unlink()
        self._index = replace(self.manifest, push=max(self.manifest.push, self._index.push if ahead else 0))

    def _garbage(self) -> tuple[set[str], Sequence[dict[str, str]]]:
        """What workers before left behind: objects in no manifest, uploads that nobody finished.

        Looked at before this worker is the owner, it is garbage for good once it is: who pushed some of it is refused
        from then on. Looked at later, by a worker that stood still, it might be the next owner's.
        """
        found = {key.removeprefix(f"{self.place}/") for key in self.bucket.list(f"{self.place}/")}
        return found - self.manifest.objects(), self.bucket.unfinished(f"{self.place}/")

    def _delete(self, objects: set[str]) -> None:
        """Remove garbage; what can't be removed now is the next owner's to remove."""
        with suppress(DvqError):
            self.bucket.delete(f"{self.place}/{name}" for name in sorted(objects))

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
        """Fetch a file's pieces and make it of them, whole or not at all."""
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
        read, and what grows is read last: so it holds all that a listed checkpoint counts on. Checkpoints are opened
        first: however long the rest takes, and though training removes them, those that were listed are stored.
        """
        here_now = paths(self.folder)
        files = {path: pieces for path, pieces in self.manifest.files.items() if path not in self._known}
        self._known = {path: one for path, one in self._known.items() if path in here_now}
        now = {path: stamp(self.folder / path) for path in here_now}
        changed = [path for path in here_now if path not in self._known or self._known[path][1:] != now[path]]
        with ExitStack() as stack:
            opened: dict[str, BinaryIO] = {}
            for path in (path for path in changed if path.startswith(KEPT)):
                with suppress(FileNotFoundError):
                    opened[path] = stack.enter_context((self.folder / path).open("rb"))
            for path in sorted(changed, key=lambda path: path.startswith(GROWS)):
                try:
                    self._known[path] = Known(self._store(path, name, opened.get(path)), *now[path])
                except FileNotFoundError:  # removed meanwhile
                    self._known.pop(path, None)
        return files | {path: one.pieces for path, one in self._known.items()}

    def _store(self, path: str, name: str, opened: BinaryIO | None) -> list[Piece]:
        if path.startswith(GROWS):
            return self._append(path, name)
        key, file = f"{self.place}/{name}/{path}", self.folder / path
        return [
            Piece(
                f"{name}/{path}",
                *(self.bucket.store(opened, key) if opened else self.bucket.upload(file, key)),
            )
        ]

    def _append(self, path: str, name: str) -> list[Piece]:
        """Store the whole lines that were appended."""
        content = (self.folder / path).read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        kept, start = stored(content, self._known[path].pieces if path in self._known else [])
        if start < len(content):
            piece = piece_of(
                f"{name}/{path}.{start}", content[start:]
            )  # a name that the pieces before never have
            self.bucket.put(f"{self.place}/{piece.object}", content[start:])
            kept.append(piece)
        return kept

    def _remember(self, manifest: Manifest) -> None:
        """The folder is equal to ``manifest``, or ahead of it."""
        self._index = manifest
        save_index(self.folder, manifest, self._claim, self._known)
