"""What prepare_data does: take a prepared dataset from the store, or make it and put it there."""

from pathlib import Path, PurePosixPath

from components.bucket import Bucket
from components.s3 import MissingError
from components.store import Store
from dvq import DvqError, data, disk, fingerprints


def prepare(name: str, source: str, path: Path) -> data.Data:
    """Put the dataset ``name`` at ``path``, and return it."""
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
    return data.load(path)


def _make(name: str, source: str, folder: Path) -> None:
    progress = data.print_progress()
    if not source.startswith("s3://"):
        data.prepare(name, source, folder, progress)
        return
    bucket, key = _bucket_and_key(source)
    size, etag = _size_and_etag(bucket, key)
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
    """DvqError unless S3 has the object; its content is checked after the download."""
    bucket, key = _bucket_and_key(source)
    bucket.patience = 0.0
    _size_and_etag(bucket, key)


def _bucket_and_key(source: str) -> tuple[Bucket, str]:
    bucket = Bucket(source, "DATA")
    key, bucket.prefix = bucket.prefix.rstrip("/"), ""
    if not key:
        raise DvqError(f"DATA = '{source}': it names a bucket alone; give s3://bucket/key, the file's")
    return bucket, key


def _size_and_etag(bucket: Bucket, key: str) -> tuple[int, str]:
    try:
        return bucket.size(key)
    except MissingError:
        raise DvqError(f"DATA={bucket}/{key}: there is no such object in {bucket.server}") from None
