"""The image, as far as it can be told without a daemon."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dvq import DvqError
from pipeline import image
from pipeline.profile import find_profile


def test_what_the_environment_says_to_pip_counts_before_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip has it, whose listing has the environment first."""
    told = """:env:.index-url='https://env.example.org/simple'
global.index-url='https://file.example.org/simple'
global.extra-index-url='https://a.example.org/simple https://b.example.org/simple'
install.extra-index-url='https://c.example.org/simple'
global.timeout='60'
"""
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told))
    assert image.pip_settings() == {
        "index-url": ["https://env.example.org/simple"],
        "extra-index-url": ["https://c.example.org/simple"],
    }


def test_an_image_for_other_machines_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Mac builds for itself does not start on a cluster's nodes."""
    for name in ("TORCH", "BASE"):
        monkeypatch.delenv(name, raising=False)
    names = {
        image.content("2.13.0", platform=platform).tag() for platform in ("", "linux/amd64", "linux/arm64")
    }
    assert len(names) == 3
    for name in ("nvidia", "gke", "eks"):
        cluster = find_profile(name).cluster
        assert cluster
        assert cluster.platform == "linux/amd64"
        wanted = image.content(cluster.torch, platform=cluster.platform).tag()
        assert image.name(find_profile(name), pushed=False) == wanted


@pytest.mark.parametrize(
    "place", ["https://r.example.org/me", "r.example.org/Me", "r.example.org/me dvq", "r:port/me"]
)
def test_a_registry_that_no_image_can_be_in_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY", place)
    with pytest.raises(DvqError, match="give host/path, without https://"):
        image.name(find_profile("nvidia"), pushed=True)


@pytest.mark.parametrize("place", ["localhost:5000", "me", "r.example.org:443/my-team/x_y/z.1/"])
def test_a_registrys_host_and_path(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY", place)
    assert image.name(find_profile("nvidia"), pushed=True).startswith(f"{place.rstrip('/')}/dvq:")


def test_an_installed_package_says_that_images_want_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "ROOT", tmp_path)
    with pytest.raises(DvqError, match="made from a clone of the project"):
        image.content("2.13.0")
