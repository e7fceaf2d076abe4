"""Objects in an S3 bucket, checked from end to end: S3 verifies the SHA-256 of what it receives, and we verify that
of what it returns."""

import base64
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from components.s3 import THREADS, ChangedError, Connection, MissingError
from dvq import DvqError

PART = 16 << 20
"""Bytes of a part of a multipart upload; an object that is not larger is sent whole."""
CHUNK = 1 << 20
Progress = Callable[[int, int], None]
T = TypeVar("T")
R = TypeVar("R")


class DamagedError(DvqError):
    """An object's bytes are not those that were stored."""


class Bucket(Connection):
    """A bucket; keys are relative to the prefix."""

    def __init__(self, url: str, named: str = "DVQ_STORE") -> None:
        super().__init__(url, named)
        self._uploads: dict[tuple[str, int, int, int], _Upload] = {}

    def check(self) -> None:
        """DvqError unless the bucket can be listed now, with these credentials."""
        patience, self.patience = self.patience, 0.0
        try:
            self.call("list_objects_v2", Prefix=self.prefix, MaxKeys=1)
        finally:
            self.patience = patience

    def check_conditions(self) -> None:
        """DvqError unless the server heeds the conditions of :meth:`put`, which let only one of two workers
        publish."""
        key = f"probe-{uuid.uuid4().hex}"
        self.put(key, b"", "")
        try:
            for etag in ("", f'"{"0" * 32}"'):
                with suppress(ChangedError):
                    self.put(key, b"changed", etag)
                    raise DvqError(
                        f"{self.server} ignores If-None-Match and If-Match when it stores an object, so that two "
                        "workers could own one trial; take an S3 that heeds them, as Amazon's and SeaweedFS do"
                    )
        finally:
            self.delete([key])

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``function`` of every item, several at a time."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(function, items))

    def get(self, key: str) -> tuple[bytes, str]:
        """A small object's content and its ETag; MissingError if there is none."""

        def attempt() -> tuple[bytes, str]:
            answer = self.client.get_object(Bucket=self.name, Key=self.prefix + key)
            return answer["Body"].read(), answer["ETag"]

        return self.patiently(attempt)

    def size(self, key: str) -> tuple[int, str]:
        """An object's size [bytes] and its ETag; MissingError if there is none."""
        answer = self.call("head_object", Key=self.prefix + key)
        return answer["ContentLength"], answer["ETag"]

    def put(self, key: str, content: bytes, etag: str | None = None) -> str:
        """Store an object; its ETag.

        Args:
            key: its name.
            content: all of it.
            etag: only if the object is still the one with this ETag, or, for "", if there is none.

        Raises:
            ChangedError: the condition does not hold.
        """
        condition = {} if etag is None else {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
        checksum = _checksum(content)
        try:
            answer = self.call(
                "put_object", Key=self.prefix + key, Body=content, ChecksumSHA256=checksum, **condition
            )
        except MissingError:
            raise ChangedError from None
        return str(answer["ETag"])

    def upload(self, path: Path, key: str) -> tuple[str, int]:
        """Store a file; its SHA-256 in hexadecimal digits, and its size."""
        with path.open("rb") as file:
            return self.store(file, key)

    def store(self, file: BufferedReader, key: str) -> tuple[str, int]:
        """As :meth:`upload`, for a file that is open: it is stored even if another file has its name by now.

        If this process failed to store a large file before, only the missing parts are sent.
        """
        found = os.fstat(file.fileno())
        if found.st_size <= PART:
            content = file.read()
            self.put(key, content)
            return hashlib.sha256(content).hexdigest(), len(content)
        same = (key, found.st_ino, found.st_size, found.st_mtime_ns)  # parts of another file are of no use
        unfinished = self._uploads.setdefault(same, _Upload(self, key))
        unfinished.send(file, found.st_size)
        del self._uploads[same]
        return hashlib.file_digest(file, "sha256").hexdigest(), found.st_size

    def download(
        self,
        key: str,
        path: Path,
        size: int,
        sha256: str = "",
        etag: str = "",
        progress: Progress | None = None,
    ) -> None:
        """Fetch an object to ``path``, completely or not at all; what an earlier attempt got of it is not fetched
        again.

        Args:
            key: its name.
            path: where; what is there is replaced.
            size: its size [bytes].
            sha256: its SHA-256, if that is known.
            etag: otherwise its ETag, so that all parts are of the same object.
            progress: told about it.

        Raises:
            DamagedError: its bytes are not those of the SHA-256, or not so many, twice.
        """
        partial = path.with_name(f".{path.name}.{(sha256 or etag).strip(chr(34))[:16]}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            self._append(key, partial, size, etag, progress or (lambda *_: None))
            with partial.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            length = partial.stat().st_size
            if found == (sha256 or found) and length == size:
                partial.replace(path)
                return
            partial.unlink()
            differs = f"its SHA-256 is {found} instead of {sha256}"
            if not sha256:
                differs = f"it has {length} bytes instead of {size}"
            told = f"{self}/{key} is damaged: {differs}"
            if last:
                raise DamagedError(told)
            print(f"{told}; fetching it again", flush=True)

    def _append(self, key: str, partial: Path, size: int, etag: str, progress: Progress) -> None:
        """Fetch what ``partial`` lacks; where the connection breaks, go on from there."""
        partial.touch()
        condition = {"IfMatch": etag} if etag else {}

        def attempt() -> bool:
            """Whether there is more to fetch: if something came before the connection broke, that is progress and no
            failure."""
            start = partial.stat().st_size
            part = {"Range": f"bytes={start}-", **condition} if start else condition
            answer = self.client.get_object(Bucket=self.name, Key=self.prefix + key, **part)
            try:
                with partial.open("ab") as file:
                    for chunk in answer["Body"].iter_chunks(CHUNK):
                        file.write(chunk)
                        progress(file.tell(), size)
            except Exception as error:
                if partial.stat().st_size == start or not self.passes(error):
                    raise
                return True
            return False

        try:
            while partial.stat().st_size < size and self.patiently(attempt):
                continue
        except ChangedError:
            partial.unlink()
            raise DvqError(f"{self}/{key} was replaced while it was fetched; try again") from None

    def list(self, prefix: str, delimiter: str = "") -> dict[str, str]:
        """The ETags by key of the objects under ``prefix``, up to a delimiter; a thousand names a request."""
        found: dict[str, str] = {}
        following: dict[str, str] = {}
        while True:
            page = self.call("list_objects_v2", Prefix=self.prefix + prefix, Delimiter=delimiter, **following)
            for one in page.get("Contents", ()):
                found[one["Key"].removeprefix(self.prefix)] = one["ETag"]
            if not page.get("IsTruncated"):
                return found
            following = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these objects.

        Raises:
            DvqError: some could not be removed, which S3 reports in a successful answer.
        """
        left = [{"Key": self.prefix + key} for key in keys]
        for start in range(0, len(left), 1000):
            some = {"Objects": left[start : start + 1000], "Quiet": True}
            for error in self.call("delete_objects", Delete=some).get("Errors", ()):
                raise DvqError(f"{self}: {error['Key']} cannot be deleted ({error['Code']})")

    def unfinished(self, prefix: str) -> Sequence[dict[str, str]]:
        """The multipart uploads under ``prefix`` that nobody finished yet, for :meth:`give_up`."""
        found = self.call("list_multipart_uploads", Prefix=self.prefix + prefix).get("Uploads", ())
        return [{"Key": one["Key"], "UploadId": one["UploadId"]} for one in found]

    def give_up(self, uploads: Iterable[dict[str, str]]) -> None:
        """End these multipart uploads."""
        for one in uploads:
            with suppress(MissingError):
                self.call("abort_multipart_upload", **one)


class _Upload:
    """A multipart upload that knows which parts the server has acknowledged."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket, self._key = bucket, bucket.prefix + key
        self._id = ""
        self._parts: dict[int, dict[str, Any]] = {}

    def send(self, file: BufferedReader, size: int) -> None:
        """Send what is missing, several parts at a time, and complete the object."""
        bucket, where = self._bucket, {"Key": self._key}
        if not self._id:
            self._id = bucket.call("create_multipart_upload", **where, ChecksumAlgorithm="SHA256")["UploadId"]

        def one(number: int) -> None:
            content = os.pread(file.fileno(), PART, (number - 1) * PART)
            part = {"PartNumber": number, "ChecksumSHA256": _checksum(content)}
            answer = bucket.call("upload_part", **where, UploadId=self._id, Body=content, **part)
            self._parts[number] = {**part, "ETag": answer["ETag"]}

        numbers = range(1, -(-size // PART) + 1)
        try:
            bucket.each(one, [number for number in numbers if number not in self._parts])
            parts = {"Parts": [self._parts[number] for number in numbers]}
            bucket.call("complete_multipart_upload", **where, UploadId=self._id, MultipartUpload=parts)
        except MissingError:  # completed, and the answer was lost; or given up by another worker
            self._id, self._parts = "", {}
            bucket.call("head_object", **where)


def _checksum(content: bytes) -> str:
    """SHA-256 as S3 writes it."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
