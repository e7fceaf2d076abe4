"""The bundled sample of CIFAR-10."""

import hashlib

import numpy as np

from dvq import cifar10, data
from dvq.fingerprints import FINGERPRINTS, LABELS


def test_the_sample_s_readme_is_true():
    readme = (data.SAMPLE.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(data.SAMPLE.read_bytes()).hexdigest() in readme
    assert FINGERPRINTS["cifar10-sample"] in readme
    for published in (cifar10.ARCHIVE_MD5, *cifar10.BATCH_MD5.values()):
        assert published in readme


def test_the_sample_needs_no_source_and_every_split_of_it_is_balanced(tmp_path):
    data.check_source("cifar10-sample", "")
    data.prepare("cifar10-sample", "", tmp_path / "prepared")
    loaded = data.load(tmp_path / "prepared")
    assert loaded.info["label"] == LABELS["cifar10-sample"]
    for (images, labels), each in [
        (loaded.training("test"), 200),
        (loaded.training("tune"), 180),
        (loaded.evaluation("test"), 50),
        (loaded.evaluation("tune"), 20),
    ]:
        assert images.shape == (10 * each, 32, 32, 3)
        assert np.bincount(labels).tolist() == [each] * 10
