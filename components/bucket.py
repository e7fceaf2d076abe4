"""Objects in an S3 bucket. S3 verifies the SHA-256 of what it receives, and we verify that of what it returns."""

import base64
import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

from components.s3 import THREADS, ChangedError, Connection, MissingError
from dvq import DvqError

PART = 16 << 20
"""Bytes in a part of a multipart upload; an object of at most this size is sent whole."""
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
        """DvqError unless the server heeds the conditions of :meth:`put`: otherwise two workers could own a trial."""
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

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Apply ``function`` to all items, several at a time."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(function, items))

    def get(self, key: str) -> tuple[bytes, str]:
        """A small object's content and its ETag; MissingError if there is none."""

        def attempt() -> tuple[bytes, str]:
            answer = self.client.get_object(Bucket=self.name, Key=self.prefix + key)
            return answer["Body"].read(), answer["ETag"]

        return self.retry(attempt)

    def size(self, key: str) -> tuple[int, str]:
        """An object's size [bytes] and its ETag; MissingError if there is none."""
        answer = self.call("head_object", Key=self.prefix + key)
        return answer["ContentLength"], answer["ETag"]

    def age(self, key: str) -> float:
        """Seconds since an object was stored, by the server's clock; MissingError if there is none."""
        answer = self.call("head_object", Key=self.prefix + key)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return float((now - answer["LastModified"]).total_seconds())

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
        """Like :meth:`upload`, for an open file, whose path may be another file's by now.

        If an earlier attempt of this process to store a large file failed, only the missing parts are sent.
        """
        status = os.fstat(file.fileno())
        if status.st_size <= PART:
            content = file.read()
            self.put(key, content)
            return hashlib.sha256(content).hexdigest(), len(content)
        # parts of another file are of no use
        identity = (key, status.st_ino, status.st_size, status.st_mtime_ns)
        upload = self._uploads.setdefault(identity, _Upload(self, key))
        upload.send(file, status.st_size)
        del self._uploads[identity]
        return hashlib.file_digest(file, "sha256").hexdigest(), status.st_size

    def download(
        self,
        key: str,
        path: Path,
        size: int,
        sha256: str = "",
        etag: str = "",
        progress: Progress | None = None,
    ) -> None:
        """Fetch an object to ``path``, completely or not at all, going on from where an earlier attempt stopped.

        Args:
            key: its name.
            path: the file to write; an existing one is replaced.
            size: its size [bytes].
            sha256: its SHA-256, if known.
            etag: its ETag if not, so that all parts are of the same object.
            progress: called with the bytes fetched so far and the size.

        Raises:
            DamagedError: twice, its SHA-256 or its size was wrong.
        """
        partial = path.with_name(f".{path.name}.{(sha256 or etag).strip(chr(34))[:16]}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        for last_attempt in (False, True):
            self._append(key, partial, size, etag, progress or (lambda *_: None))
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            length = partial.stat().st_size
            if digest == (sha256 or digest) and length == size:
                partial.replace(path)
                return
            partial.unlink()
            difference = f"its SHA-256 is {digest} instead of {sha256}"
            if not sha256:
                difference = f"it has {length} bytes instead of {size}"
            message = f"{self}/{key} is damaged: {difference}"
            if last_attempt:
                raise DamagedError(message)
            print(f"{message}; fetching it again", flush=True)

    def _append(self, key: str, partial: Path, size: int, etag: str, progress: Progress) -> None:
        """Fetch the rest of ``partial``; after a broken connection, go on from there."""
        partial.touch()
        condition = {"IfMatch": etag} if etag else {}

        def attempt() -> bool:
            """Whether there may be more to fetch; a connection that breaks after some bytes is no failure."""
            start = partial.stat().st_size
            part = {"Range": f"bytes={start}-", **condition} if start else condition
            answer = self.client.get_object(Bucket=self.name, Key=self.prefix + key, **part)
            try:
                with partial.open("ab") as file:
                    for chunk in answer["Body"].iter_chunks(CHUNK):
                        file.write(chunk)
                        progress(file.tell(), size)
            except Exception as error:
                if partial.stat().st_size == start or not self.is_transient(error):
                    raise
                return True
            return False

        try:
            while partial.stat().st_size < size and self.retry(attempt):
                continue
        except ChangedError:
            partial.unlink()
            raise DvqError(f"{self}/{key} was replaced while it was fetched; try again") from None

    def list(self, prefix: str, delimiter: str = "") -> dict[str, str]:
        """The ETags by key of the objects under ``prefix``, up to a delimiter."""
        etags: dict[str, str] = {}
        following: dict[str, str] = {}
        while True:
            page = self.call("list_objects_v2", Prefix=self.prefix + prefix, Delimiter=delimiter, **following)
            for entry in page.get("Contents", ()):
                etags[entry["Key"].removeprefix(self.prefix)] = entry["ETag"]
            if not page.get("IsTruncated"):
                return etags
            following = {"ContinuationToken": page["NextContinuationToken"]}

    def delete(self, keys: Iterable[str]) -> None:
        """Remove these objects.

        Raises:
            DvqError: some could not be removed, which S3 says in an answer with status 200.
        """
        objects = [{"Key": self.prefix + key} for key in keys]
        for start in range(0, len(objects), 1000):
            batch = {"Objects": objects[start : start + 1000], "Quiet": True}
            for error in self.call("delete_objects", Delete=batch).get("Errors", ()):
                raise DvqError(f"{self}: {error['Key']} cannot be deleted ({error['Code']})")

    def unfinished_uploads(self, prefix: str) -> Sequence[dict[str, str]]:
        """The unfinished multipart uploads under ``prefix``, for :meth:`abort_uploads`."""
        uploads = self.call("list_multipart_uploads", Prefix=self.prefix + prefix).get("Uploads", ())
        return [{"Key": upload["Key"], "UploadId": upload["UploadId"]} for upload in uploads]

    def abort_uploads(self, uploads: Iterable[dict[str, str]]) -> None:
        """Abort these multipart uploads."""
        for upload in uploads:
            with suppress(MissingError):
                self.call("abort_multipart_upload", **upload)


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

        def send_part(number: int) -> None:
            content = os.pread(file.fileno(), PART, (number - 1) * PART)
            part = {"PartNumber": number, "ChecksumSHA256": _checksum(content)}
            answer = bucket.call("upload_part", **where, UploadId=self._id, Body=content, **part)
            self._parts[number] = {**part, "ETag": answer["ETag"]}

        numbers = range(1, -(-size // PART) + 1)
        try:
            bucket.map(send_part, [number for number in numbers if number not in self._parts])
            parts = {"Parts": [self._parts[number] for number in numbers]}
            bucket.call("complete_multipart_upload", **where, UploadId=self._id, MultipartUpload=parts)
        except MissingError:  # completed, and the answer was lost; or given up by another worker
            self._id, self._parts = "", {}
            bucket.call("head_object", **where)


def _checksum(content: bytes) -> str:
    """SHA-256 as S3 writes it."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()
