"""The sources of CIFAR-10: every form that is taken, and every one that is refused in a sentence."""

import hashlib
import os
import pickle
import runpy
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from dvq import DvqError, cifar10, data
from dvq.fingerprints import FINGERPRINTS


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def left_behind(folder):
    """What lies beside ``folder``, but for the lock's empty file."""
    return [path for path in folder.parent.glob(f".{folder.name}*") if path.is_dir() or path.stat().st_size]


def sentence_of(function, *arguments):
    with pytest.raises(DvqError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refused(source, tmp_path, *parts, by_check=True):
    """``prepare`` says one sentence with each of ``parts`` and leaves nothing; check_source says the same."""
    folder = tmp_path / "store" / "prepared"
    sentence = sentence_of(data.prepare, "cifar10", str(source), folder)
    for part in parts:
        assert part in sentence
    assert not folder.exists()
    assert left_behind(folder) == []
    if by_check:
        assert sentence_of(data.check_source, "cifar10", str(source)) == sentence


@pytest.mark.parametrize(
    "form", ["batches", "parent", "archive", "archive's folder", "mirror", "unsized mirror", "odd mirror"]
)
def test_every_form_of_the_source_gives_the_same_arrays(form, official, server, tmp_path):
    source = {
        "batches": official.folder,
        "parent": official.folder.parent,
        "archive": official.archive,
        "archive's folder": official.archive.parent,
        "mirror": f"{server.address}/cifar",
        "unsized mirror": f"{server.address}/unsized",
        "odd mirror": f"{server.address}/odd",
    }[form]
    folder = tmp_path / "store" / "prepared"
    data.check_source("cifar10", str(source))
    data.prepare("cifar10", str(source), folder)
    arrays = data.load(folder).arrays
    assert all(np.array_equal(arrays[name], array) for name, array in official.arrays.items())
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.npy" for name in arrays), "data.json"}
    assert left_behind(folder) == []


def test_no_source_means_the_official_address(server, monkeypatch, tmp_path):
    assert cifar10.ADDRESS == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    monkeypatch.setattr(cifar10, "ADDRESS", f"{server.address}/official")
    data.prepare("cifar10", "", tmp_path / "prepared")
    assert server.requests == ["/official"]


def test_a_download_tells_its_progress(server, official, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(cifar10, "CHUNK", 1000)
    data.prepare("cifar10", f"{server.address}/cifar", tmp_path / "prepared", lambda *at: told.append(at))
    size = official.archive.stat().st_size
    assert told == [(done, size) for done in range(1000, size, 1000)] + [(size, size)]


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_batch_is_named_with_both_md5s(damage, official, tmp_path):
    path = official.folder / "data_batch_3"
    content = path.read_bytes()
    path.write_bytes(content[:-7] if damage == "truncated" else content[:900] + b"\x00\x01" + content[902:])
    parts = (str(path), cifar10.BATCH_MD5["data_batch_3"], md5(path), "get it again from")
    refused(official.folder, tmp_path, *parts)


def test_a_damaged_archive_is_named_with_both_md5s(official, tmp_path):
    content = official.archive.read_bytes()
    official.archive.write_bytes(content[: len(content) // 2])
    parts = (str(official.archive), cifar10.ARCHIVE_MD5, md5(official.archive), "get it again from")
    refused(official.archive, tmp_path, *parts)


def test_no_pickle_is_opened_before_its_md5_is_right(official, tmp_path):
    bomb, batch = tmp_path / "exploded", official.folder / "data_batch_1"
    batch.write_bytes(f"cos\nsystem\n(S'touch {bomb}'\ntR.".encode())
    refused(official.folder, tmp_path, "MD5")
    cifar10.BATCH_MD5["data_batch_1"] = md5(batch)  # and even with the right one it makes nothing but arrays
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        data.prepare("cifar10", str(official.folder), tmp_path / "prepared")
    assert not bomb.exists()


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch"])
def test_a_missing_batch_is_named(name, official, tmp_path):
    (official.folder / name).unlink()
    refused(official.folder, tmp_path, str(official.folder), f"{name} is missing", "get all of")


def test_a_batch_that_the_archive_lacks_is_named(official, tmp_path, monkeypatch):
    with tarfile.open(official.archive, "w:gz") as file:
        file.add(official.folder / "data_batch_1", "cifar-10-batches-py/data_batch_1")
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", md5(official.archive))
    refused(official.archive, tmp_path, "data_batch_2 is missing", by_check=False)


def test_a_batch_that_cannot_be_read_is_named(official, tmp_path):
    (official.folder / "data_batch_4").unlink()
    (official.folder / "data_batch_4").mkdir()
    refused(official.folder, tmp_path, "data_batch_4: cannot be read (Is a directory)", "set DATA to")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("nowhere", "there is no such file or folder"),
        ("empty", "in this folder are neither data_batch_1 to 5 and test_batch nor cifar-10-python.tar.gz"),
        ("picture.png", "this is not cifar-10-python.tar.gz"),
    ],
)
def test_another_thing_than_cifar10_is_refused(source, part, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    refused(tmp_path / source, tmp_path, part, source, "set DATA to")


def test_a_device_a_pipe_and_an_address_of_a_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", tmp_path / "pipe"):
        refused(source, tmp_path, "this is no file or folder, but a device or pipe; set DATA to")
    refused(f"file://{tmp_path}", tmp_path, "give the path alone, without file://")


@pytest.mark.parametrize(
    ("path", "part"),
    [("/missing", "answers 404 Not Found"), ("/page", "this is not cifar-10-python.tar.gz")],
)
def test_an_address_without_cifar10_is_refused(path, part, server, tmp_path):
    refused(server.address + path, tmp_path, server.address + path, part, "set DATA to")


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/cifar", "http://nowhere.invalid/cifar", "http://"])
def test_an_unreachable_address_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    refused(address, tmp_path, address, "cannot be reached", "set DATA to")


def test_a_broken_connection_is_refused(server, official, tmp_path):
    size = official.archive.stat().st_size
    parts = ("the connection broke", f"after {size // 2} of {size} bytes", "try again", "set DATA to")
    refused(f"{server.address}/cut", tmp_path, *parts, by_check=False)


def test_a_download_without_end_is_cut_off(server, official, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(cifar10, "CHUNK", 1000)
    with pytest.raises(DvqError, match=f"{server.address}/goes-on: the MD5 is .*another file; get it again"):
        cifar10.read(f"{server.address}/goes-on", tmp_path, lambda *at: told.append(at[0]))
    assert max(told) <= official.archive.stat().st_size + 1000


def test_a_server_that_stalls_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "TIMEOUT", 0.3)
    refused(f"{server.address}/stalls", tmp_path, "the connection broke", "timed out", by_check=False)


def test_a_damaged_download_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", "0" * 32)
    refused(f"{server.address}/cifar", tmp_path, f"{server.address}/cifar", "MD5", "0" * 32, by_check=False)


def test_other_images_are_not_taken_for_the_dataset(official, tmp_path, monkeypatch):
    found = FINGERPRINTS["cifar10"]
    monkeypatch.setitem(FINGERPRINTS, "cifar10", "another")
    refused(official.folder, tmp_path, "fingerprint", found, "another", by_check=False)


@pytest.fixture
def everything(tmp_path):
    """All of CIFAR-10, prepared."""
    source = os.environ.get("DVQ_TEST_CIFAR10")
    if not source:
        pytest.skip("DVQ_TEST_CIFAR10 names no folder with the official CIFAR-10 batches")
    data.prepare("cifar10", source, tmp_path / "everything")
    return tmp_path / "everything"


def test_all_of_cifar10(everything):
    start = time.monotonic()
    data.prepare("cifar10", "", everything)
    assert time.monotonic() - start < 0.1
    loaded = data.load(everything)
    assert [len(images) for images, _ in (loaded.training("tune"), loaded.evaluation("test"))] == [
        45_000,
        10_000,
    ]
    np.testing.assert_allclose(loaded.info["mean"], [0.4914, 0.482158, 0.446531], atol=1e-6)
    np.testing.assert_allclose(loaded.info["std"], [0.247032, 0.243485, 0.261588], atol=1e-6)
    assert {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in loaded.arrays.items()} == {
        "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
        "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
        "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
    }


def test_the_sample_is_drawn_from_all_of_cifar10_by_its_script(everything, tmp_path, capsys):
    script = runpy.run_path(str(Path(data.__file__).parent / "sample" / "make_sample.py"))
    script["main"](everything, tmp_path / "again.npz")
    assert FINGERPRINTS["cifar10-sample"] in capsys.readouterr().out
