"""A folder mirrored in S3: each push is visible as a whole or not at all, and only one worker at a time can push.

``<place>.json``, the manifest, names the folder's files and the objects that hold them, each with its SHA-256. An
object is written once, as ``<place>/<owner>-<push>/<path>``, a name that no other worker uses; then the manifest is
replaced, on the condition (If-Match) that it is still the one that this worker left. A worker that takes over a
folder also replaces the manifest, so the former owner's condition fails from then on, however late it wakes.

What grows (events) is stored in pieces that are merged as they become many, so that it is not sent again and again.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from components.files import Files
from components.folder import state
from components.manifest import Manifest, list_files, new_owner, stamp, this_process
from components.s3 import ChangedError, MissingError
from dvq import DvqError

SILENCE = 120.0
"""Seconds without a push after which an owner that is at work counts as dead."""
POLL = 5.0
"""Seconds between two looks at whether another owner is still at work."""


class OvertakenError(DvqError):
    """Another worker has taken the folder over."""


class Mirror(Files):
    """The folder ``folder`` and its mirror at ``place`` of a bucket."""

    def claim(self) -> None:
        """Become the owner, once any other owner has ended or fallen silent, and remove local files that differ from
        the mirror."""
        silence, seen_etag = 0.0, ""
        while True:
            manifest = self.read()
            silence = silence + POLL if self._etag == seen_etag else 0.0
            if not manifest.active or manifest.owner == self._claim or silence >= SILENCE:
                self._reconcile()
                garbage, uploads = self._garbage()
                self._claim = new_owner()
                self._save_index(self._index)  # first, for this process may end before the next line
                try:
                    self._publish(
                        replace(manifest, owner=self._claim, push=0, active=True, by=this_process())
                    )
                    break
                except OvertakenError:
                    continue
            if not seen_etag:
                print(f"{self.name}: {manifest.by} is at work on it; waiting for it", flush=True)
            seen_etag = self._etag
            time.sleep(POLL)
        self._save_index(self.manifest)
        self.bucket.abort_uploads(uploads)
        self._delete(garbage)

    def adopt(self, manifest: Manifest) -> None:
        """Take ``manifest`` as the mirror's, without becoming the owner, and remove local files that differ."""
        self.manifest = manifest
        if not self._is_ahead():
            self.read()  # a worker of this machine may have pushed since ``manifest`` was read
            self._reconcile()
            self._save_index(self._index)

    def push(self, active: bool = True) -> None:
        """Make the mirror equal to the folder, a trial's; ``active``: whether this worker continues.

        Raises:
            OvertakenError: another worker took the folder over; nothing of this push is visible.
        """
        old_objects, number = self.manifest.objects(), self._index.push + 1
        files = self._upload(f"{self.manifest.owner}-{number:06d}")
        new = replace(self.manifest, push=number, active=active, state=state(self.folder), files=files)
        self._save_index(new)  # before the manifest says so: the folder must never seem older than its mirror
        self._publish(new)
        self._delete(old_objects - new.objects())

    def publish_once(self) -> None:
        """Store the folder, unless the mirror has one already."""
        if self.read().owner:
            return
        owner, (garbage, uploads) = new_owner(), self._garbage()
        self._synced = {}
        try:
            self._publish(Manifest(owner, by=this_process(), files=self._upload(f"{owner}-{0:06d}")))
            self.bucket.abort_uploads(uploads)
        except (OvertakenError, MissingError):  # another worker was faster, and aborted this one's uploads
            if not self.read().owner:
                raise
            garbage = {name for name in self._garbage()[0] if name.startswith(owner)}
        self._delete(garbage)

    def check_idle(self) -> None:
        """DvqError if a worker on another machine is at work on the folder."""
        manifest = self.read()
        if manifest.active and manifest.owner != self._claim:
            seconds = SILENCE - self.bucket.age(f"{self.place}.json")
            if seconds > 0:
                raise DvqError(
                    f"{self.name}: {manifest.by} is at work on it; stop that first (if it died, try again in "
                    f"{seconds:.0f} s)"
                )

    def remove(self) -> None:
        """Remove the mirror; pushes of a worker that is still at work are refused from then on."""
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
                current, etag = self._read()
            if current == new:  # it was stored, and the answer was lost
                break
            if current.owner != new.owner:  # otherwise it was a push of our own that seemed to fail
                self._delete(new.objects() - current.objects())
                how = f"overtaken by {current.by} while {this_process()} stood still or could not reach it"
                if not current.owner:
                    how = f"removed, as FRESH=1 does, while {this_process()} was at work on it"
                raise OvertakenError(
                    f"{self.name}: {how}; what this process made since then is not published"
                )
        self.manifest, self._etag = new, etag

    def _is_ahead(self) -> bool:
        """Whether the folder has all of the manifest, and perhaps more, because the last push came from it."""
        owner, push = self.manifest.owner, self.manifest.push
        pushed = owner == self._index.owner and push <= self._index.push
        return pushed or (owner == self._claim != "" and push == 0)

    def _reconcile(self) -> None:
        """Find the local files that are as in the manifest, and remove the others unless the folder is ahead."""
        files, synced, ahead = self.manifest.files, self._synced, self._is_ahead()
        self._synced = {
            path: file
            for path, file in synced.items()
            if file.pieces == files.get(path) and stamp(self.folder / path) == file[1:]
        }
        for path in () if ahead else list_files(self.folder):
            if path not in self._synced:
                (self.folder / path).unlink()
        self._index = replace(self.manifest, push=max(self.manifest.push, self._index.push if ahead else 0))

    def _garbage(self) -> tuple[set[str], Sequence[dict[str, str]]]:
        """Objects that are in no manifest, and unfinished uploads, of earlier workers.

        They are listed before this worker becomes the owner: afterwards nobody else can publish them. Listed later,
        by a worker that was frozen meanwhile, they might be the next owner's.
        """
        objects = {key.removeprefix(f"{self.place}/") for key in self.bucket.list(f"{self.place}/")}
        return objects - self.manifest.objects(), self.bucket.unfinished_uploads(f"{self.place}/")

    def _delete(self, objects: set[str]) -> None:
        """Remove objects; those that can't be removed now are left to the next owner."""
        with suppress(DvqError):
            self.bucket.delete(f"{self.place}/{name}" for name in sorted(objects))
