"""The prepared dataset: what it holds, and that it is whole or not there."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dvq import DvqError, cifar10, data, disk
from dvq.fingerprints import FINGERPRINTS, LABELS


@pytest.fixture
def folder(tmp_path):
    """Where a test prepares."""
    return tmp_path / "store" / "prepared"


@pytest.fixture
def prepared(official, folder):
    """The stand-in for CIFAR-10, prepared."""
    data.prepare("cifar10", str(official.folder), folder)
    return folder


def whole(folder, name="cifar10"):
    """Whether the pixels and labels are right and nothing else lies about, but for the lock's empty file."""
    rest = [
        path for path in folder.parent.iterdir() if path != folder and (path.is_dir() or path.stat().st_size)
    ]
    return data.fingerprint(data.load(folder).arrays) == FINGERPRINTS[name] and not rest


def test_a_prepared_dataset_describes_itself(official, prepared):
    info = data.load(prepared).info
    pixels = official.arrays["train_images"] / 255
    np.testing.assert_allclose(info.pop("mean"), pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(info.pop("std"), pixels.std((0, 1, 2)), rtol=1e-9)
    assert data.statistics(np.full((40, 8, 8, 1), 7, np.uint8))[1] == 0  # where rounding is below 0
    many = np.zeros((6, 1000, 1000, 1), np.uint8)  # counted in pieces
    many[0] = 255
    assert np.concatenate(data.statistics(many)) == pytest.approx([1 / 6, 5**0.5 / 6])
    numbers = {"format": 1, "train": 100, "tune": 10, "test": 20}
    texts = {"name": "cifar10", "fingerprint": FINGERPRINTS["cifar10"], "label": LABELS["cifar10"]}
    assert info == numbers | texts


def test_pixel_values_from_0_to_255_survive(prepared):
    first = data.load(prepared).arrays["train_images"][0]
    assert first.dtype == np.uint8
    assert first.ravel().tolist() == [value % 256 for value in range(3072)]


def test_the_splits(official, prepared):
    loaded, arrays = data.load(prepared), official.arrays
    for found, half, rows in [
        (loaded.training("test"), "train", slice(None)),
        (loaded.training("tune"), "train", slice(0, 90)),
        (loaded.evaluation("test"), "test", slice(None)),
        (loaded.evaluation("tune"), "train", slice(90, None)),
    ]:
        np.testing.assert_array_equal(found[0], arrays[f"{half}_images"][rows])
        np.testing.assert_array_equal(found[1], arrays[f"{half}_labels"][rows])


def test_the_arrays_are_mapped_and_cannot_be_changed(prepared):
    images, _ = data.load(prepared).training("test")
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_the_fingerprint_is_a_hash_of_names_shapes_and_bytes(official):
    expected = hashlib.sha256(b"dvq data 1\n")
    shapes = ["(100, 32, 32, 3)", "(100,)", "(20, 32, 32, 3)", "(20,)"]
    for name, shape in zip(
        ["train_images", "train_labels", "test_images", "test_labels"], shapes, strict=True
    ):
        expected.update(f"{name} {shape}\n".encode() + official.arrays[name].tobytes())
    assert data.fingerprint(official.arrays) == expected.hexdigest()


def test_what_is_prepared_is_left_alone(prepared):
    before = {path: path.stat().st_ino for path in prepared.iterdir()}
    (prepared.parent / ".prepared.lock").unlink()
    data.prepare("cifar10", "/nowhere", prepared)
    assert {path: path.stat().st_ino for path in prepared.iterdir()} == before
    assert list(prepared.parent.iterdir()) == [
        prepared
    ]  # no lock: it may lie on a disk that can't be written
    assert not data.is_prepared("cifar10-sample", prepared)


@pytest.mark.parametrize(
    "damage", ["no array", "short array", "type", "no data.json", "broken data.json", "format", "train"]
)
def test_a_damaged_dataset_is_noticed_and_prepared_again(damage, official, prepared):
    document, array = prepared / "data.json", prepared / "train_images.npy"
    if damage == "short array":
        array.write_bytes(array.read_bytes()[:-1])
    elif damage == "type":
        np.save(array, np.load(array).view(np.int8))
    elif damage in ("no array", "no data.json"):
        (array if damage == "no array" else document).unlink()
    else:
        info = json.dumps(json.loads(document.read_text()) | {damage: 90})
        document.write_text("{" if damage == "broken data.json" else info)
    assert not data.is_prepared("cifar10", prepared)
    with pytest.raises(DvqError, match="holds no whole prepared dataset"):
        data.load(prepared)
    data.prepare("cifar10", str(official.folder), prepared)
    assert whole(prepared)


def test_the_repair_of_a_damaged_dataset_ends_with_its_data_json(official, prepared, monkeypatch):
    replaced, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: replaced.append(to.name) or replace(path, to))
    (prepared / "test_labels.npy").unlink()
    data.prepare("cifar10", str(official.folder), prepared)
    assert replaced[-1] == "data.json"
    assert sorted(replaced) == sorted(path.name for path in prepared.iterdir())


def test_other_images_in_the_folder_are_never_taken_for_those_it_had(prepared, monkeypatch):
    """The new ones are brought one array at a time."""
    replace, done = Path.replace, []

    def cut(path, to):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(to.name)
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        data.prepare("cifar10-sample", "", prepared)
    assert len(done) == 2
    assert not (prepared / "data.json").exists()  # of as many images it would fit
    assert not data.is_prepared("cifar10", prepared)
    assert not data.is_prepared("cifar10-sample", prepared)


def test_a_prepared_dataset_is_on_the_disk_whole_before_it_has_its_name(official, folder, monkeypatch):
    synced = {}

    def sync(descriptor):
        file = os.fstat(descriptor)
        synced[file.st_ino] = (file.st_size, folder.exists())

    monkeypatch.setattr(os, "fsync", sync)
    data.prepare("cifar10", str(official.folder), folder)
    files = [path.stat() for path in folder.iterdir()]
    assert [synced[file.st_ino] for file in files] == [(file.st_size, False) for file in files]
    assert synced[folder.parent.stat().st_ino][1]


def test_other_files_in_the_folder_are_kept(official, folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    data.prepare("cifar10", str(official.folder), folder)
    assert (folder / "thesis.tex").read_text() == "years of work"
    assert whole(folder)


@pytest.mark.parametrize("links", [True, False])
def test_link_shares_the_files_or_copies_them(links, prepared, tmp_path, monkeypatch):
    def other_disk(*_):
        raise OSError("Invalid cross-device link")

    if not links:
        monkeypatch.setattr(os, "link", other_disk)
    artifact = tmp_path / "artifacts" / "data"
    for _ in range(2):  # a task that runs again finds its artifact's folder there
        data.link(prepared, artifact)
    assert whole(artifact)
    shared = (artifact / "train_images.npy").samefile(prepared / "train_images.npy")
    assert shared is links


def test_progress_is_printed_every_few_seconds_and_at_the_end(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    line = data.print_progress()
    for megabytes, now[0] in [(1, 100.0), (2, 104.0), (3, 106.0), (4, 107.0)]:
        line(megabytes * 1_000_000, 4_000_000)
    expected = [f"downloading: {megabytes} of 4 MB" for megabytes in (1, 3, 4)]
    assert capsys.readouterr().out.splitlines() == expected


# Not written


def test_an_unwritable_destination_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DvqError, match=r"file/data/x \(Not a directory\).* DVQ_STORE") as caught:
        data.prepare("cifar10-sample", "", tmp_path / "file" / "data" / "x")
    assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # write() fails as it does on a full disk
    try:
        with pytest.raises(DvqError, match=r"cannot be written to .*prepared .no room.*make room") as caught:
            data.prepare("cifar10-sample", "", folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == [".prepared.lock"]


def test_of_a_file_that_has_no_room_nothing_stays_but_the_one_before(tmp_path):
    disk.replace(tmp_path / "x.json", "before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*x\.json'$"):
            disk.replace(tmp_path / "x.json", "afterwards")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(("where", "step"), [(data, "statistics"), (disk, "sync"), (data, "_publish")])
def test_an_interruption_leaves_nothing(where, step, official, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    source = str(official.folder)
    with monkeypatch.context() as patch:
        patch.setattr(where, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            data.prepare("cifar10", source, folder)
    assert [path.name for path in folder.parent.iterdir()] == [".prepared.lock"]
    data.prepare("cifar10", source, folder)
    assert whole(folder)


def start(*arguments):
    """``prepare`` in a process of its own."""
    code = (
        "import sys, pathlib; from dvq import data; data.prepare(*sys.argv[1:3], pathlib.Path(sys.argv[3]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


def test_processes_that_prepare_the_same_at_once(folder):
    for process in [start("cifar10-sample", "", folder) for _ in range(3)]:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert whole(folder, "cifar10-sample")


def test_all_wait_for_one_download(server, folder):
    arguments = ("cifar10", f"{server.address}/cifar", folder)
    threads = [threading.Thread(target=data.prepare, args=arguments) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert server.requests == ["/cifar"]
    assert whole(folder)


def test_a_killed_process_leaves_nothing_half_written(server, official, folder):
    process = start("cifar10", f"{server.address}/stalls", folder)
    download = folder.parent / ".prepared.partial" / cifar10.ARCHIVE
    until = time.monotonic() + 30
    while not download.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert download.exists()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not folder.exists()
    data.prepare("cifar10", str(official.folder), folder)  # neither kept out nor misled by what is left
    assert whole(folder)
    assert not (folder / cifar10.ARCHIVE).exists()


def test_importing_the_module_brings_no_torch():
    code = "import sys, dvq.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_split_that_is_none_is_one_sentence(prepared):
    for images in (data.load(prepared).training, data.load(prepared).evaluation):
        with pytest.raises(DvqError, match="there is no split 'train'; known: test, tune"):
            images("train")


def test_names_that_are_none_and_folders_as_text(tmp_path):
    with pytest.raises(DvqError, match="images 'cifar100': known are cifar10, cifar10-sample; for images of"):
        data.prepare("cifar100", "", tmp_path)
    data.prepare("cifar10-sample", "", str(tmp_path / "images"))
    assert data.is_prepared("cifar10-sample", tmp_path / "images")
