"""The store in S3: all work is done in a local folder, the cache, and each trial's folder is mirrored in the bucket.

``DVQ_CACHE`` names the folder that holds the caches. What is in the bucket:

- ``trials/<key>.json``, a trial's manifest, and ``trials/<key>/…``, its objects
- ``data/<fingerprint>.json`` and ``data/<fingerprint>/…``, likewise, a prepared dataset
- ``reports/<sweep>/…``, a report as it is
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from components.bucket import Bucket
from components.folder import State
from components.manifest import Manifest, list_files, parse
from components.mirror import Mirror, OvertakenError
from components.s3 import MissingError
from components.store import Store, Work
from dvq import DvqError, checkpoint, disk

LOOK = 2.0
"""Seconds between two looks for a new checkpoint, which is pushed at once."""
HEARTBEAT = 30.0
"""Seconds between two pushes otherwise; less than components.mirror.SILENCE."""
LEAVING = 3.0
"""Seconds for which S3 is tried in a process that was told to end."""


class RemoteStore(Store):
    """A bucket, and the folder that is its cache."""

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        cache = os.environ.get("DVQ_CACHE") or Path.home() / ".cache" / "dvq"
        super().__init__(Path(cache) / self.bucket.name / self.bucket.prefix)
        self.place = str(self.bucket)
        self._listed: dict[str, str] = {}  # the manifests' ETags by trial
        self._manifests: dict[str, Manifest] = {}
        self._followed: dict[str, str] = {}  # and as they were when :meth:`follow` last fetched a trial

    def check(self) -> None:
        self.bucket.check()

    def check_writing(self) -> None:
        self.bucket.check_conditions()

    def look(self, keys: Iterable[str], *parts: str) -> None:
        """Manifests that did not change since a process of this machine read them are taken from the cache."""
        etags = self.bucket.list("trials/", "/")
        self._listed = {Path(name).stem: etag for name, etag in etags.items() if name.endswith(".json")}
        requested = set(keys)
        families = {key.rpartition("-")[0] for key in requested}
        relatives = [key for key in self._listed if key.rpartition("-")[0] in families]
        earlier = {key: manifest for key, manifest in self._manifests.items() if key in self._listed}
        manifests = self.bucket.map(self._manifest, relatives)
        self._manifests = earlier | dict(zip(relatives, manifests, strict=True))
        self.fetch(requested, *parts)

    def fetch(self, keys: Iterable[str], *parts: str) -> None:
        present = [key for key in sorted(keys) if any(self.has(key, part) for part in parts)]
        self.bucket.map(lambda key: self.bring(key, *parts), present)

    def follow(self, keys: Iterable[str]) -> None:
        requested = set(keys)
        self.look(requested)
        present = sorted(requested & self._listed.keys())
        changed = [key for key in present if self._followed.get(key) != self._listed[key]]
        self.bucket.map(lambda key: self.bring(key, "events", "results.json"), changed)
        self._followed.update({key: self._listed[key] for key in changed})

    def _manifest(self, key: str) -> Manifest:
        """A trial's manifest, from the cache if the bucket has the same."""
        cached, name = self.root / "manifests" / f"{key}.json", f"{self.place}/trials/{key}.json"
        # A damaged file in the cache is fetched again.
        with suppress(OSError, ValueError, DvqError):
            etag, _, content = cached.read_bytes().partition(b"\n")
            if etag.decode() == self._listed[key]:
                return parse(content, name)
        try:
            content, etag_now = self.bucket.get(f"trials/{key}.json")
        except MissingError:  # removed since it was listed
            return Manifest()
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_name(f".{key}.{os.getpid()}")
        partial.write_bytes(etag_now.encode() + b"\n" + content)
        partial.replace(cached)
        return parse(content, name)

    def bring(self, key: str, *parts: str) -> Path:
        """Fetch these parts, or all; none if this machine is at work on the trial, since its folder is ahead."""

        def busy() -> None:
            raise disk.BusyError

        with suppress(disk.BusyError), disk.locked(self._lock(key), busy):
            mirror = self._mirror(key)
            mirror.adopt(self._manifests[key])
            while True:
                with suppress(MissingError):  # a file was replaced since
                    mirror.fetch(lambda path: not parts or any(_is_of(path, part) for part in parts))
                    break
                mirror.adopt(mirror.read())
        return self.trial(key)

    def _mirror(self, key: str) -> Mirror:
        return Mirror(self.bucket, f"trials/{key}", self.trial(key))

    @contextmanager
    def working(self, key: str) -> Iterator[Work]:
        with super().working(key) as work:
            mirror = self._mirror(key)
            mirror.claim()
            trained = any(path.startswith("model/") for path in mirror.manifest.files)
            mirror.fetch(lambda path: not (trained and path.startswith("checkpoints/")))
            with _pushing(mirror, work):
                yield work

    @contextmanager
    def idle(self, key: str) -> Iterator[None]:
        with super().idle(key):
            self._mirror(key).check_idle()
            yield

    def remove(self, key: str) -> None:
        super().remove(key)
        self._mirror(key).remove()
        self._manifests.pop(key, None)

    def state(self, key: str) -> State:
        return self._manifests.get(key, Manifest()).state

    def silent(self, key: str) -> bool:
        return self._manifests.get(key, Manifest()).active

    def has(self, key: str, part: str) -> bool:
        files = self._manifests.get(key, Manifest()).files
        return any(_is_of(path, part) for path in files)

    def steps(self, key: str) -> list[int]:
        return self._manifests.get(key, Manifest()).steps()

    def keys(self) -> list[str]:
        """As of the last look."""
        return list(self._listed)

    def has_data(self, name: str) -> bool:
        return bool(self._dataset(name).read().owner) or super().has_data(name)

    def _dataset(self, name: str) -> Mirror:
        folder = self.data(name)
        return Mirror(self.bucket, f"data/{folder.name}", folder)

    def fetch_data(self, name: str) -> None:
        folder = self.data(name)
        with disk.locked(folder.with_name(f".{folder.name}.fetch")):
            mirror = self._dataset(name)
            if mirror.read().owner:
                mirror.fetch()

    def publish_data(self, name: str) -> None:
        self._dataset(name).publish_once()

    def publish_report(self, sweep: str) -> None:
        """The page is stored last: all that it shows is there before it."""
        folder, place = self.report(sweep), f"reports/{sweep}/"
        files = sorted(list_files(folder), key=lambda path: path == "report.html")
        for path in files:
            self.bucket.upload(folder / path, place + path)
        self.bucket.delete(self.bucket.list(place).keys() - {place + path for path in files})


def _is_of(path: str, part: str) -> bool:
    """Whether the file is this part of a trial, or in this folder of it."""
    return path == part or path.startswith(f"{part}/")


@contextmanager
def _pushing(mirror: Mirror, work: Work) -> Iterator[None]:
    """Push each new checkpoint, heartbeats in between, and everything at the end. Faults of S3 are raised only at the
    end."""
    ended = threading.Event()
    thread = threading.Thread(target=_push_until, args=(mirror, work, ended), daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        mirror.bucket.patience = LEAVING
        ended.set()
        thread.join()
        if not work.lost:
            with suppress(DvqError, OSError):
                mirror.push(active=False)
        raise
    ended.set()
    thread.join()
    work.check()
    mirror.push(active=False)


def _push_until(mirror: Mirror, work: Work, ended: threading.Event) -> None:
    pushed, reached = time.monotonic(), max(checkpoint.steps(work.folder), default=0)
    while not ended.wait(LOOK):
        now = max(checkpoint.steps(work.folder), default=0)
        if now == reached and time.monotonic() - pushed < HEARTBEAT:
            continue
        try:
            mirror.push()
        except OvertakenError as error:
            work.lost = error
            return
        except (DvqError, OSError) as error:
            print(f"{error}; the work goes on, and this is tried again", flush=True)
        pushed, reached = time.monotonic(), now
