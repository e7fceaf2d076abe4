"""The committed component.yaml of each component."""

import shutil
from pathlib import Path

import pytest
from kfp import components

from pipeline import compile as compiling


def test_they_are_what_the_components_compile_to() -> None:
    assert compiling.stale_files() == {}


def test_an_old_one_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in compiling.COMPONENTS:
        (tmp_path / name).mkdir()
        shutil.copy(compiling.FOLDER / name / "README.md", tmp_path / name)
    monkeypatch.setattr(compiling, "FOLDER", tmp_path)
    assert compiling.main([]) == 0
    assert compiling.main(["--check"]) == 0
    old = tmp_path / "train" / "component.yaml"
    old.write_text(old.read_text().replace("dvq", "dvr"))
    capsys.readouterr()
    assert compiling.main(["--check"]) == 1
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("name", compiling.COMPONENTS)
def test_a_foreign_pipeline_can_load_it(name: str) -> None:
    loaded = components.load_component_from_file(str(compiling.FOLDER / name / "component.yaml"))
    assert loaded.component_spec.inputs.keys() == compiling.COMPONENTS[name].component_spec.inputs.keys()
