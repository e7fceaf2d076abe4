"""The store in S3: everything happens in a folder, the cache, and each trial's folder is mirrored in the bucket.

``DVQ_CACHE`` names the folder that holds the caches. What is in the bucket:

- ``trials/<key>.json``, a trial's manifest, and ``trials/<key>/…``, its objects
- ``data/<fingerprint>.json`` and ``data/<fingerprint>/…``, likewise, a prepared dataset
- ``reports/<sweep>/…``, a report as it is
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from components.bucket import Bucket
from components.folder import State, state
from components.manifest import Manifest, parse, paths
from components.mirror import Mirror, OvertakenError
from components.s3 import MissingError
from components.store import Store, Work
from dvq import DvqError, checkpoint, disk

LOOK = 2.0
"""Seconds between two looks for a new checkpoint, which is pushed at once."""
HEARTBEAT = 30.0
"""Seconds between two pushes otherwise; less than components.mirror.SILENCE."""
LEAVING = 3.0
"""Seconds of patience with S3 in a process that was told to end."""


class RemoteStore(Store):
    """A bucket, and the folder that is its cache."""

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        cache = os.environ.get("DVQ_CACHE") or Path.home() / ".cache" / "dvq"
        super().__init__(Path(cache) / self.bucket.name / self.bucket.prefix)
        self.place = str(self.bucket)
        self._listed: dict[str, str] = {}  # the manifests' ETags by trial
        self._manifests: dict[str, Manifest] = {}
        self._followed: dict[str, str] = {}  # likewise, when the trial was last brought

    def check(self) -> None:
        self.bucket.check()

    def check_writing(self) -> None:
        self.bucket.check_conditions()

    def look(self, keys: Iterable[str], *names: str) -> None:
        """A manifest that did not change since any process last read it is taken from the cache."""
        found = self.bucket.list("trials/", "/")
        self._listed = {Path(name).stem: etag for name, etag in found.items() if name.endswith(".json")}
        asked = set(keys)
        families = {key.rpartition("-")[0] for key in asked}
        wanted = [key for key in self._listed if key.rpartition("-")[0] in families]
        kept = {key: one for key, one in self._manifests.items() if key in self._listed}  # of earlier looks
        self._manifests = kept | dict(zip(wanted, self.bucket.each(self._manifest, wanted), strict=True))
        if names:
            having = [key for key in sorted(asked) if any(self.has(key, name) for name in names)]
            self.bucket.each(lambda key: self.bring(key, names.__contains__), having)

    def follow(self, keys: Iterable[str]) -> None:
        asked = set(keys)
        self.look(asked)
        there = sorted(asked & self._listed.keys())
        changed = [key for key in there if self._followed.get(key) != self._listed[key]]
        self.bucket.each(lambda key: self.bring(key, _told), changed)
        self._followed.update({key: self._listed[key] for key in changed})

    def _manifest(self, key: str) -> Manifest:
        """A trial's manifest, from the cache if the bucket has the same."""
        cached, named = self.root / "manifests" / f"{key}.json", f"{self.place}/trials/{key}.json"
        # What the cache has may be damaged, and is asked for then.
        with suppress(OSError, ValueError, DvqError):
            etag, _, content = cached.read_bytes().partition(b"\n")
            if etag.decode() == self._listed[key]:
                return parse(content, named)
        try:
            content, etag_now = self.bucket.get(f"trials/{key}.json")
        except MissingError:  # removed since it was listed
            return Manifest()
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_name(f".{key}.{os.getpid()}")
        partial.write_bytes(etag_now.encode() + b"\n" + content)
        partial.replace(cached)
        return parse(content, named)

    def bring(self, key: str, wanted: Callable[[str], bool] = lambda _: True) -> Path:
        """Bring the files that are ``wanted``; none if this machine is at work on the trial, for its folder is
        ahead."""

        def busy() -> None:
            raise disk.BusyError

        with suppress(disk.BusyError), disk.locked(self._lock(key), busy):
            mirror = self._mirror(key)
            mirror.look(self._manifests[key])
            while True:
                with suppress(MissingError):  # of a file that was replaced since
                    mirror.fetch(wanted)
                    break
                mirror.look(mirror.read())
        return self.trial(key)

    def _mirror(self, key: str) -> Mirror:
        return Mirror(self.bucket, f"trials/{key}", self.trial(key), lambda folder: asdict(state(folder)))

    @contextmanager
    def working(self, key: str) -> Iterator[Work]:
        with super().working(key) as work:
            mirror = self._mirror(key)
            mirror.claim()
            trained = any(path.startswith("model/") for path in mirror.manifest.files)
            mirror.fetch(lambda path: not (trained and path.startswith("checkpoints/")))
            with _pushing(mirror, work):
                yield work

    def remove(self, key: str) -> None:
        super().remove(key)
        self._mirror(key).remove()
        self._manifests.pop(key, None)

    def state(self, key: str) -> State:
        found = self._manifests.get(key)
        return State(**(found.state if found and found.state else {"name": "new"}))

    def silent(self, key: str) -> bool:
        return self._manifests.get(key, Manifest()).active

    def has(self, key: str, part: str) -> bool:
        files = self._manifests.get(key, Manifest()).files
        return part in files or any(path.startswith(f"{part}/") for path in files)

    def steps(self, key: str) -> list[int]:
        return self._manifests.get(key, Manifest()).steps()

    def keys(self) -> list[str]:
        """As the last look found them."""
        return list(self._listed)

    def has_data(self, name: str) -> bool:
        return bool(self._dataset(name).read().owner) or super().has_data(name)

    def _dataset(self, name: str) -> Mirror:
        folder = self.data(name)
        return Mirror(self.bucket, f"data/{folder.name}", folder, lambda _: {})

    def fetch_data(self, name: str) -> None:
        folder = self.data(name)
        with disk.locked(folder.with_name(f".{folder.name}.fetch")):
            mirror = self._dataset(name)
            if mirror.read().owner:
                mirror.fetch()

    def publish_data(self, name: str) -> None:
        self._dataset(name).publish_once()

    def publish_report(self, sweep: str) -> None:
        """The page last: whoever sees it can see all that it shows."""
        folder, place = self.report(sweep), f"reports/{sweep}/"
        found = sorted(paths(folder), key=lambda path: path == "report.html")
        for path in found:
            self.bucket.upload(folder / path, place + path)
        self.bucket.delete(self.bucket.list(place).keys() - {place + path for path in found})


def _told(path: str) -> bool:
    """Whether the file says how a trial goes or what it came to."""
    return path.startswith("events/") or path == "results.json"


@contextmanager
def _pushing(mirror: Mirror, work: Work) -> Iterator[None]:
    """Push each new checkpoint, a heartbeat in between, and at the end everything. Until then a fault of S3 stops
    nothing; at the end it is raised."""
    ended = threading.Event()
    thread = threading.Thread(target=_push_along, args=(mirror, work, ended), daemon=True)
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


def _push_along(mirror: Mirror, work: Work, ended: threading.Event) -> None:
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
