"""A folder mirrored in S3: each push is visible as a whole or not at all, and only one worker at a time can push.

``<place>.json``, the manifest, names the folder's files and the objects that hold them, each with its SHA-256. An
object is written once, as ``<place>/<owner>-<push>/<path>``, a name that no other worker uses; then the manifest is
replaced, on the condition (If-Match) that it is still the one that this worker left. A worker that takes a folder
over replaces the manifest too, so the earlier owner's condition fails from then on, however late it wakes.

What grows (events) is stored in pieces that are merged as they become many, so that it is not sent again and again.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from components.bucket import Bucket
from components.files import Files
from components.manifest import Manifest, here, new_owner, paths, stamp
from components.s3 import ChangedError, MissingError
from dvq import DvqError

SILENCE = 120.0
"""Seconds without a push after which an owner that is at work counts as dead."""
POLL = 5.0
"""Seconds between two looks at whether another owner is still at work."""


class OvertakenError(DvqError):
    """Another worker has taken the folder over."""


class Mirror(Files):
    """The folder ``folder`` and its mirror at ``place`` of a bucket.

    ``describe`` returns what the manifest is to say of the folder's state.
    """

    def __init__(
        self, bucket: Bucket, place: str, folder: Path, describe: Callable[[Path], dict[str, Any]]
    ) -> None:
        super().__init__(bucket, place, folder)
        self._describe, self._pushes = describe, 0

    def claim(self) -> None:
        """Become the owner, and remove from the folder what differs from the mirror; while another owner is at work,
        wait until it ends or falls silent."""
        silent, seen = 0.0, ""
        while True:
            found = self.read()
            silent = silent + POLL if self._etag == seen else 0.0
            mine = found.owner in (self._index.owner, self._claim)
            if not found.active or mine or silent >= SILENCE:
                self._reconcile()
                garbage, uploads = self._garbage()
                self._claim = new_owner()
                self._remember(self._index)  # first, for this process may end before the next line
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
        """Take ``manifest`` for the mirror's, without becoming its owner, and remove from the folder what differs."""
        self.manifest = manifest
        if not self._ahead():
            self.read()  # a worker of this machine may have come further since that was seen
            self._reconcile()
            self._remember(self._index)

    def push(self, active: bool = True) -> None:
        """Make the mirror equal to the folder; ``active``: whether this worker goes on working.

        Raises:
            OvertakenError: another worker took the folder over; nothing of this push is visible.
        """
        before, number = self.manifest.objects(), self._pushes + 1
        files = self._upload(f"{self.manifest.owner}-{number:06d}")
        state = self._describe(self.folder)
        new = replace(self.manifest, push=number, active=active, state=state, files=files)
        self._pushes = number
        self._remember(new)  # before the manifest says so: the folder must never seem older than its mirror
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
        """Remove all of the mirror; a worker that is at work on it is refused from then on."""
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
            if found.owner != new.owner:  # otherwise it was a push of our own that seemed to fail
                self._delete(new.objects() - found.objects())
                raise OvertakenError(
                    f"{self.name}: overtaken by {found.by or 'its removal'} while {here()} stood still or "
                    "could not reach it; what this process made since then is not published"
                )
        self.manifest, self._etag = new, etag

    def _ahead(self) -> bool:
        """Whether the folder holds all that the manifest does, and perhaps more, because the last push came from
        it."""
        owner, push = self.manifest.owner, self.manifest.push
        pushed = owner == self._index.owner and push <= self._index.push
        return pushed or (owner == self._claim != "" and push == 0)

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
        """What earlier workers left behind: objects in no manifest, uploads that nobody finished.

        This has to be listed before this worker becomes the owner: once it is, whoever stored these objects can no
        longer publish them. Listed later, by a worker that stood still meanwhile, they might be the next owner's.
        """
        found = {key.removeprefix(f"{self.place}/") for key in self.bucket.list(f"{self.place}/")}
        return found - self.manifest.objects(), self.bucket.unfinished(f"{self.place}/")

    def _delete(self, objects: set[str]) -> None:
        """Remove garbage; what can't be removed now is the next owner's to remove."""
        with suppress(DvqError):
            self.bucket.delete(f"{self.place}/{name}" for name in sorted(objects))
