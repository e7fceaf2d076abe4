"""Guards: what the pipeline relies on in kfp, and kfp's silent faults that it goes round.

The project's own pipeline runs here with stubs in place of its components; each stub writes down when and with
what it ran.
"""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp import compiler, dsl, local
from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output
from kfp.local import subprocess_task_handler
from kfp.local.orchestrator import enhanced_dag_orchestrator

from dvq.config import overrides
from dvq.sweep import Sweep
from pipeline import definition
from pipeline.local import lift_cap

pytestmark = pytest.mark.filterwarnings("ignore:.*custom or non-Python base image:RuntimeWarning")
Run = Callable[..., list[dict[str, Any]]]


@dsl.component(base_image="dvq", install_kfp_package=False)
def plan(sweep: str, experiment: str = "") -> list[str]:  # noqa: ARG001
    import json

    return list(json.loads(sweep))


@dsl.component(base_image="dvq", install_kfp_package=False)
def prepare_data(name: str, source: str, data: Output[Dataset]):  # noqa: ARG001
    from pathlib import Path

    Path(data.path).write_text(f"images of {name}")


@dsl.component(base_image="dvq", install_kfp_package=False)
def train(
    trial: str,
    base: str,
    data: Input[Dataset],
    model: Output[Model],
    experiment: str = "",
    record_failure: bool = False,
):
    import json
    import os
    import time
    from pathlib import Path

    began = time.time()
    if trial == "bad":
        raise SystemExit(3)
    time.sleep(0.5)
    told = {"trial": trial, "base": base, "data": Path(data.path).read_text(), "experiment": experiment}
    assert record_failure
    record = {"task": "train", **told, "began": began, "ended": time.time()}
    Path(os.environ["RECORDS"], f"train-{trial}.json").write_text(json.dumps(record))
    Path(model.path).write_text(trial)


@dsl.component(base_image="dvq", install_kfp_package=False)
def evaluate(
    data: Input[Dataset],  # noqa: ARG001
    model: Input[Model],
    evaluation: Output[Metrics],
    record_failure: bool = False,
):
    from pathlib import Path

    assert record_failure
    Path(evaluation.path).write_text(f"evaluation of {Path(model.path).read_text()}")


@dsl.component(base_image="dvq", install_kfp_package=False)
def analyze(
    data: Input[Dataset],  # noqa: ARG001
    model: Input[Model],
    evaluation: Input[Metrics],
    analysis: Output[Artifact],  # noqa: ARG001
    experiment: str = "",  # noqa: ARG001
    record_failure: bool = False,
):
    import json
    import os
    from pathlib import Path

    assert record_failure
    trial = Path(model.path).read_text()
    record = {"task": "analyze", "trial": trial, "evaluation": Path(evaluation.path).read_text()}
    Path(os.environ["RECORDS"], f"analyze-{trial}.json").write_text(json.dumps(record))


@dsl.component(base_image="dvq", install_kfp_package=False)
def report(sweep: str, page: Output[HTML]):  # noqa: ARG001
    import json
    import os
    import time
    from pathlib import Path

    record = {"task": "report", "trial": "", "began": time.time()}
    Path(os.environ["RECORDS"], "report.json").write_text(json.dumps(record))


STUBS = (plan, prepare_data, train, evaluate, analyze, report)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the pipeline over ``items``; the stubs' records."""
    records = tmp_path / "records"
    records.mkdir()
    monkeypatch.setenv("RECORDS", str(records))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # each of kfp's tasks leaves a folder there
    monkeypatch.setattr(builtins, "print", print)  # kfp's threads exchange it and lose the right one
    monkeypatch.setattr(
        enhanced_dag_orchestrator, "ParallelExecutor", enhanced_dag_orchestrator.ParallelExecutor
    )
    for stub in STUBS:
        monkeypatch.setattr(definition, stub.name.replace("-", "_"), stub)

    def run(items: list[str], jobs: int = 2) -> list[dict[str, Any]]:
        lift_cap(jobs)
        root, workspace = str(tmp_path / "root"), str(tmp_path / "workspace")
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=root, workspace_root=workspace)
        arguments = {"base": "{}", "data_name": "cats", "source": "", "experiment": "zoo"}
        try:
            definition.sweep_pipeline(jobs)(sweep=json.dumps(items), **arguments)
        except RuntimeError as error:
            (records / "error.json").write_text(
                json.dumps({"task": "error", "trial": "", "said": str(error)})
            )
        return [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))]

    return run


def at_once(records: list[dict[str, Any]]) -> int:
    """The most train tasks that ran at the same time."""
    trained = [record for record in records if record["task"] == "train"]
    return max(sum(one["began"] <= other["began"] < one["ended"] for one in trained) for other in trained)


def test_each_item_meets_its_own_parameters_and_artifacts(run: Run) -> None:
    records = run(["a", "b", "c"])
    trained = {record["trial"]: record for record in records if record["task"] == "train"}
    assert set(trained) == {"a", "b", "c"}
    for record in trained.values():
        assert (record["base"], record["data"], record["experiment"]) == ("{}", "images of cats", "zoo")
    analyzed = {record["trial"]: record["evaluation"] for record in records if record["task"] == "analyze"}
    assert analyzed == {name: f"evaluation of {name}" for name in "abc"}


@pytest.mark.parametrize("jobs", [1, 4])
def test_jobs_is_the_number_of_trials_at_a_time(run: Run, jobs: int) -> None:
    assert at_once(run(list("abcde"), jobs)) == jobs


def test_a_dead_task_stops_neither_siblings_nor_report(run: Run) -> None:
    records = run(["a", "bad", "c", "d"])
    assert {record["trial"] for record in records if record["task"] == "analyze"} == {"a", "c", "d"}
    (reported,) = [record for record in records if record["task"] == "report"]
    assert reported["began"] >= max(record.get("ended", 0) for record in records)
    (failure,) = [record for record in records if record["task"] == "error"]
    assert "train" in failure["said"]


def test_an_empty_plan_goes_straight_to_the_report(run: Run) -> None:
    assert [record["task"] for record in run([])] == ["report"]


def compiled(tmp_path: Path, jobs: int = 2) -> dict[str, Any]:
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(definition.sweep_pipeline(jobs), str(path))
    assert path.stat().st_size < 100 * 1024
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task of every (nested) pipeline by its name."""
    dags = [spec["root"]["dag"], *(one["dag"] for one in spec["components"].values() if "dag" in one)]
    return {name: task for dag in dags for name, task in dag["tasks"].items()}


def test_report_depends_on_the_trials_alone_and_runs_whatever_became_of_them(tmp_path: Path) -> None:
    task = tasks(compiled(tmp_path))["report"]
    assert task["dependentTasks"] == ["trials"]
    assert task["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert {next(iter(value)) for value in task["inputs"]["parameters"].values()} == {
        "componentInputParameter"
    }


def test_no_output_parameter_of_a_task_enters_the_loop(tmp_path: Path) -> None:
    """It would be replaced by the loop's item, without a word."""
    inside = compiled(tmp_path)["components"]["comp-trials"]["dag"]["tasks"]
    (loop,) = inside.values()
    assert loop["iteratorPolicy"] == {"parallelismLimit": 2}
    assert all("componentInputParameter" in value for value in loop["inputs"]["parameters"].values())


def test_nothing_is_cached_or_installed(tmp_path: Path) -> None:
    spec = compiled(tmp_path)
    steps = {name: task for name, task in tasks(spec).items() if name not in ("trials", "for-loop-1")}
    assert set(steps) == {"plan", "prepare-data", "train", "evaluate", "analyze", "report"}
    assert not any(task["cachingOptions"].get("enableCache") for task in steps.values())
    assert "pip install" not in json.dumps(spec)


def test_a_thousand_trials_fit() -> None:
    """A cluster takes 128 KiB of arguments; the compiled pipeline does not grow with the sweep at all."""
    codes = list(range(2, 102))
    sweep = Sweep(
        name="big", grid={"estimator": ["gs-soft", "vq-ema"], "num_codes": codes}, seeds=[*range(5)]
    )
    items = [overrides(point) for point in sweep.points()]
    assert len(items) == 1000
    assert len(json.dumps(items)) < 64 * 1024
    assert len(sweep.model_dump_json()) < 64 * 1024


def test_kfp_still_rewrites_what_pipeline_local_refuses() -> None:
    """When this fails kfp has mended it, and the refusals in pipeline.local.check can go."""
    command = [
        *plan.component_spec.implementation.container.command,
        "--executor_input",
        "/data/python3/cifar",
    ]
    rewritten = subprocess_task_handler.replace_python_executable(command, "/a b/python")
    assert rewritten[-1] == "/data//a b/python/cifar"
    assert "_KFP_RUNTIME=true /a b/python -m kfp" in " ".join(rewritten)
