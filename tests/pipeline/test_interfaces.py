"""The components for others: their READMEs' examples run, and their interfaces change only with their versions."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import compile as compiling
from pipeline import interfaces
from pipeline.interfaces import Interface

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
ORDER = ("prepare_data", "plan", "train", "evaluate", "analyze", "report")
RUN = """
import json, sys, warnings
warnings.simplefilter("ignore")
from kfp import local
runner = local.SubprocessRunner(use_venv=False)
local.init(runner, pipeline_root=sys.argv[1] + "/root", workspace_root=sys.argv[1] + "/workspace")
exec(sys.argv[2])
(made,) = example().outputs.values()
print("MADE", json.dumps(made if isinstance(made, list) else made.path))
"""
BASE: dict[str, Any] = {
    "version": "1.2.3",
    "inputs": {"data": "Dataset", "experiment": "String?"},
    "outputs": {"model": "Model"},
}


def test_every_example_runs(tmp_path: Path) -> None:
    """One after the other in one store, from the text that readers copy."""
    environment = {
        **os.environ, "DVQ_STORE": str(tmp_path / "store"), "MLFLOW_TRACKING_URI": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    made = {}
    assert set(ORDER) == set(compiling.COMPONENTS)
    for name in ORDER:
        (code,) = EXAMPLE.findall((compiling.FOLDER / name / "README.md").read_text())
        assert len(code.splitlines()) <= 15
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(tmp_path / name), code],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
        made[name] = yaml.safe_load(re.findall("^MADE (.*)$", done.stdout, re.MULTILINE)[0])
    assert made["plan"] == ["estimator=vq-ema num_codes=8 seed=0"]
    assert (Path(made["prepare_data"]) / "train_images.npy").exists()
    assert (Path(made["train"]) / "model.safetensors").exists()
    assert '"bits_per_dim"' in Path(made["evaluate"]).read_text()
    assert (Path(made["analyze"]) / "results.json").exists()
    assert "vq-ema-c8-k8-s0" in Path(made["report"]).read_text()


@pytest.mark.parametrize(
    ("part", "value", "version", "told"),
    [
        ("inputs", {"experiment": "String?"}, "1.9.0", "the input 'data' is gone: that wants version 2.0.0"),
        (
            "inputs",
            {"data": "Model", "experiment": "String?"},
            "1.3.0",
            "the input 'data' was Dataset and is Model",
        ),
        (
            "inputs",
            {"data": "Dataset", "experiment": "String"},
            "1.3.0",
            "the input 'experiment' was optional",
        ),
        ("inputs", {**BASE["inputs"], "more": "String"}, "1.3.0", "the input 'more' is new and required"),
        ("outputs", {}, "1.3.0", "the output 'model' is gone"),
        ("outputs", {"model": "Artifact"}, "1.3.0", "the output 'model' was Model and is Artifact"),
        (
            "inputs",
            {**BASE["inputs"], "more": "String?"},
            "1.2.4",
            "'more' is new: that wants version 1.3.0",
        ),
        (
            "inputs",
            {"data": "Dataset?", "experiment": "String?"},
            "1.2.3",
            "the input 'data' is optional now",
        ),
        (
            "outputs",
            {"model": "Model", "more": "Metrics"},
            "1.2.9",
            "'more' is new: that wants version 1.3.0",
        ),
        ("inputs", BASE["inputs"], "1.2.2", "version 1.2.2 is older than the released 1.2.3"),
    ],
)
def test_an_interface_wants_its_version(part: str, value: dict[str, str], version: str, told: str) -> None:
    old, new = Interface(**BASE), Interface(**{**BASE, part: value, "version": version})
    fault = interfaces.fault("train", old, new)
    assert told in fault
    assert fault.startswith("components/train/metadata.yaml: ")
    right = "2.0.0" if "2.0.0" in fault else "1.3.0"
    assert interfaces.fault("train", old, new.model_copy(update={"version": right})) == ""


def test_what_is_committed_is_as_released() -> None:
    assert compiling.faults() == []
    assert set(interfaces.released()) == set(compiling.COMPONENTS)


def test_a_break_fails_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By what really is compiled: a release that had one input more, and one component more."""
    known = interfaces.released()
    train = known["train"]
    had = train.model_copy(update={"inputs": {**train.inputs, "epochs": "Integer"}})
    monkeypatch.setattr(interfaces, "released", lambda: {**known, "train": had, "tune": train})
    monkeypatch.setattr(interfaces, "write", lambda _: pytest.fail("a wrong release was recorded"))
    for arguments in (["--check"], ["--release"]):
        assert compiling.main(arguments) == 1
        told = capsys.readouterr().out
        assert "the component 'tune' is gone" in told
        assert "components/train/metadata.yaml: the input 'epochs' is gone: that wants version 2.0.0" in told


@pytest.mark.parametrize("name", ORDER)
def test_metadata(name: str) -> None:
    """As kubeflow/pipelines-components has it, with a version of its own."""
    found = yaml.safe_load((compiling.FOLDER / name / "metadata.yaml").read_text())
    assert list(found) == ["name", "version", "stability", "dependencies", "tags"]
    assert found["name"] == name
    assert found["stability"] in ("alpha", "beta", "stable")
    assert found["dependencies"]["kubeflow"] == [{"name": "Pipelines", "version": ">=2.17"}]


def test_a_readme_that_drifted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiling.readme("train", compiling.COMPONENTS["train"])
    monkeypatch.setattr(interfaces, "version", lambda _: "9.9.9")
    after = compiling.readme("train", compiling.COMPONENTS["train"])
    assert before != after
    assert "Version 9.9.9." in after
    assert compiling.FOLDER / "train" / "README.md" in compiling.stale_files()
