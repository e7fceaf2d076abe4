"""What prepare_data does: it takes a prepared dataset from the store, or makes it and gives it to the store."""

from pathlib import Path, PurePosixPath
from typing import Any

from components.bucket import Bucket
from components.s3 import MissingError
from components.store import Store
from dvq import DvqError, data, disk, fingerprints


def prepare(name: str, source: str, path: Path) -> dict[str, Any]:
    """Make ``path`` hold the dataset ``name``; its data.json."""
    fingerprints.of(name)  # DvqError if this cannot be a dataset's name
    store = Store.from_environment()
    folder = store.data(name) if store else path
    if store:
        store.fetch_data(name)
    if not data.is_prepared(name, folder):
        _make(name, source, folder)
    if store:
        store.publish_data(name)
        data.link(folder, path)
    return data.load(path).info


def _make(name: str, source: str, folder: Path) -> None:
    progress = data.print_progress()
    if not source.startswith("s3://"):
        data.prepare(name, source, folder, progress)
        return
    bucket, key = _object(source)
    size, etag = _found(bucket, key)
    archive = folder.parent / f".{PurePosixPath(key).name}"
    lock = archive.with_name(f"{archive.name}.lock")
    with disk.locked(lock):  # one process fetches it, and the others wait
        if not data.is_prepared(name, folder):
            bucket.download(key, archive, size, etag=etag, progress=progress)
            try:
                data.prepare(name, str(archive), folder)
            finally:
                archive.unlink()


def check(source: str) -> None:
    """DvqError unless there is such an object in S3; what is in it is checked when it is here."""
    bucket, key = _object(source)
    bucket.patience = 0.0
    _found(bucket, key)


def _object(source: str) -> tuple[Bucket, str]:
    bucket = Bucket(source, "DATA")
    key, bucket.prefix = bucket.prefix.rstrip("/"), ""
    if not key:
        raise DvqError(f"DATA = '{source}': it names a bucket alone; give s3://bucket/key, the file's")
    return bucket, key


def _found(bucket: Bucket, key: str) -> tuple[int, str]:
    try:
        return bucket.size(key)
    except MissingError:
        raise DvqError(f"DATA={bucket}/{key}: there is no such object in {bucket.server}") from None
