"""Images of one's own: brought to the store, named, and trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dvq import DvqError
from pipeline import data, preflight


def draw(path: Path, train: int = 40, test: int = 6, seed: int = 0) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (train, 32, 32, 3), np.uint8)
    np.savez(path, train_images=images, test_images=255 - images[:test])


def prepared(source: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What is said, and the warnings."""
    with pytest.raises(SystemExit) as stopped:
        data.app([source])
    assert stopped.value.code == 0
    out, error = capsys.readouterr()
    return out, error


def test_a_sweep_of_ones_own_images(
    launcher: Any,
    write_sweep: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name that is printed is all that the sweep needs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVQ_STORE", raising=False)
    draw(tmp_path / "birds.npz")
    said, warned = prepared("birds.npz", capsys)
    assert said.startswith(
        "40 training images, of which 'split: tune' holds out 4, and 6 test images are in the store"
    )
    assert warned == ""
    name = said.rpartition("data: ")[2].strip()
    (tmp_path / "birds.npz").unlink()
    write_sweep({"data": name}, grid={"estimator": ["vq-ema"]})
    code, output = launcher.run()
    assert code == 0, output
    assert f"tiny on {name}" in output
    report = (tmp_path / "outputs/store/reports/tiny/report.html").read_text(encoding="utf-8")
    assert f"images {name}: not comparable with the paper" in report


def test_test_images_among_the_training_images_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    images = np.full((30, 32, 32, 3), 255, np.uint8)
    np.savez(tmp_path / "white.npz", train_images=images, test_images=images[:3])
    said, warned = prepared(str(tmp_path / "white.npz"), capsys)
    assert "data: white@" in said
    assert warned.startswith("warning: 3 of the 3 test images are training images too")


def test_a_file_that_was_edited_is_not_taken_for_what_the_store_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    source = str(tmp_path / "birds.npz")
    draw(tmp_path / "birds.npz")
    name, store = prepared(source, capsys)[0].rpartition("data: ")[2].strip(), preflight.find_store()
    preflight.check_data(name, source, store)
    draw(tmp_path / "birds.npz", seed=1)
    with pytest.raises(DvqError, match=f"these are not the images {name}, but birds@"):
        preflight.check_data(name, source, store)
    preflight.check_data(name, "", store)


def test_no_images_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        data.app([str(tmp_path / "birds.npz")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: DATA=")
