import json

import numpy as np
import pytest
from kfp.dsl import Dataset

from components.prepare_data.component import prepare_data
from dvq import data
from dvq.fingerprints import FINGERPRINTS, LABELS

SAMPLE = FINGERPRINTS["cifar10-sample"]


def run(path, name="cifar10-sample", source=""):
    artifact = Dataset(name="data", uri=str(path))
    prepare_data.python_func(name=name, source=source, data=artifact)
    return artifact


def test_alone_the_artifact_is_complete(tmp_path, monkeypatch):
    monkeypatch.delenv("DVQ_STORE", raising=False)
    artifact = run(tmp_path / "root" / "data")
    loaded = data.load(tmp_path / "root" / "data")
    assert data.fingerprint(loaded.arrays) == SAMPLE
    assert artifact.metadata == {
        "name": "cifar10-sample",
        "label": LABELS["cifar10-sample"],
        "fingerprint": SAMPLE,
        "train": 2000,
        "tune": 200,
        "test": 500,
    }


def test_with_a_store_it_is_prepared_once_and_linked(tmp_path, monkeypatch):
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    run(tmp_path / "one")
    stored = tmp_path / "store" / "data" / SAMPLE / "train_images.npy"
    inode = stored.stat().st_ino
    artifact = run(tmp_path / "two")
    assert stored.stat().st_ino == inode
    for path in (tmp_path / "one", tmp_path / "two"):
        assert (path / "train_images.npy").stat().st_ino == inode
        assert json.loads((path / "data.json").read_text())["fingerprint"] == SAMPLE
    assert artifact.metadata["fingerprint"] == SAMPLE


def test_deleting_the_artifact_leaves_the_store_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    run(tmp_path / "one")
    for file in (tmp_path / "one").iterdir():
        file.unlink()
    stored = data.load(tmp_path / "store" / "data" / SAMPLE)
    assert np.array_equal(stored.arrays["test_images"], data.read_sample()["test_images"])


def test_a_bad_source_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    with pytest.raises(SystemExit, match="1"):
        run(tmp_path / "one", "cifar10", str(tmp_path / "nowhere"))
    told = capsys.readouterr().err
    assert told.startswith(f"error: DATA={tmp_path}/nowhere: there is no such file or folder; ")
    assert told.count("\n") == 1
    assert not (tmp_path / "one").exists()
