"""Prepared data from S3 and through it, with the server killed on the way."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from components import datasets, s3
from components.store import Store
from dvq import DvqError, data, own
from dvq.fingerprints import FINGERPRINTS
from tests.dvq.conftest import official as official  # noqa: PLC0414, a fixture
from tests.services.conftest import SeaweedFS
from tests.services.proxy import Proxy, answer_up_to, cut


@pytest.fixture
def archive(proxy: Proxy, official: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The archive's address in S3."""
    monkeypatch.setattr(s3, "PATIENCE", 60.0)
    assert os.environ["AWS_ENDPOINT_URL"] == proxy.address
    bucket, key = datasets._bucket_and_key(f"s3://dvq/{tmp_path.name}/cifar-10-python.tar.gz")
    bucket.upload(official.archive, key)
    monkeypatch.setenv("DVQ_STORE", f"s3://dvq/{tmp_path.name}/store")
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path / "one"))
    return f"{bucket}/{key}"


def test_data_comes_from_s3_and_goes_through_it(
    archive: str, proxy: Proxy, seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed while the archive comes and while the arrays go."""
    datasets.check(archive)
    broken = proxy.at(r"GET .*tar.gz", answer_up_to(100_000))
    killed = [
        proxy.at(rf"PUT .*/{name}", cut(seaweed.restart)) for name in ("train_images.npy", r"\w+.json$")
    ]
    made = datasets.prepare("cifar10", archive, tmp_path / "made").info
    assert broken.is_set()
    assert all(one.is_set() for one in killed)
    monkeypatch.setenv("DVQ_CACHE", str(tmp_path / "two"))
    store = Store.from_environment()
    assert store is not None
    assert store.has_data("cifar10")
    proxy.clear()
    assert datasets.prepare("cifar10", "https://127.0.0.1:9/never", tmp_path / "fetched").info == made
    arrays = data.load(tmp_path / "fetched").arrays
    assert data.fingerprint(arrays) == FINGERPRINTS["cifar10"]
    assert not [line for line in proxy.requests if line.startswith("PUT")]


def test_a_source_in_s3_needs_no_store(archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVQ_STORE")
    datasets.prepare("cifar10", archive, tmp_path / "made")
    assert data.is_prepared("cifar10", tmp_path / "made")


def test_images_of_ones_own_come_from_s3(archive: str, tmp_path: Path) -> None:
    images = np.arange(22 * 3072, dtype=np.uint64).astype(np.uint8).reshape(22, 32, 32, 3)
    np.savez(tmp_path / "birds.npz", train_images=images[:20], test_images=images[20:])
    bucket, key = datasets._bucket_and_key(archive.replace("cifar-10-python.tar.gz", "birds.npz"))
    bucket.upload(tmp_path / "birds.npz", key)
    name = own.name(str(tmp_path / "birds.npz"))
    assert datasets.prepare(name, f"{bucket}/{key}", tmp_path / "made").info["train"] == 20
    assert datasets.prepare(name, "", tmp_path / "again").info["name"] == name  # from the store
    with pytest.raises(DvqError, match="the images are birds@"):
        datasets.prepare("birds@0123456789abcdef", f"{bucket}/{key}", tmp_path / "other")
    store = Store.from_environment()
    assert store
    assert not list(store.root.rglob(".birds.npz")), "what was refused is not kept"


def test_a_wrong_source_is_one_sentence(archive: str, tmp_path: Path) -> None:
    for source, says in (
        (f"{archive}x", "there is no such object"),
        ("s3://B/x", "give s3://bucket"),
        ("s3://abc", "a bucket alone"),
    ):
        with pytest.raises(DvqError, match=says):
            datasets.check(source)
        with pytest.raises(DvqError, match=says):
            datasets.prepare("cifar10", source, tmp_path / "made")
