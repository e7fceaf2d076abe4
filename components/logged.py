"""A finished trial in MLflow: its model, its scores on run and model, and the note on the run's page."""

import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, Metric
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking.context.registry import resolve_tags
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

import dvq
from dvq.fingerprints import Shape

REQUIREMENTS = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "mlflow")
"""of the logged model"""
FINAL = ("fitted_bits_per_dim", "autoregressive_bits_per_dim", "bound", "components_95_weighted")
"""The numbers sent beside the curves: few, since MLflow draws a chart of each."""


def send_model(server: MlflowClient, run: MlflowRun, name: str, shape: Shape, model: Path) -> str:
    """Log the trial's model as a pyfunc of code and safetensors, without a pickle; returns its id."""
    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))])
    method = ParamSchema([ParamSpec("method", "string", "encode")])
    # mlflow.pyfunc.log_model needs an active run, and ends it as FINISHED before the scores are sent.
    logged_model = server.create_logged_model(
        run.info.experiment_id,
        name.replace(".", "_"),  # MLflow allows no full stop
        run.info.run_id,
        tags=resolve_tags(),
        params=run.data.params,
    )
    # MLflow warns, despite filters, that a signature should come with type hints or examples.
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True):
        code = Path(scratch) / "dvq"
        shutil.copytree(
            Path(dvq.__file__).parent, code, ignore=shutil.ignore_patterns("sample", "__pycache__")
        )
        Model.log(
            None,
            mlflow.pyfunc,
            run_id=run.info.run_id,
            model_id=logged_model.model_id,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(model)},
            code_paths=[str(code)],
            signature=ModelSignature(inputs=images, params=method),
            # without what follows a build's +, which no package index has
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS],
        )
    return str(logged_model.model_id)


def ready_model(server: MlflowClient, run: MlflowRun) -> str | None:
    """The id of the run's model, if it arrived completely."""
    ids = [model.model_id for model in run.outputs.model_outputs] if run.outputs else []
    return next(
        (model for model in ids if server.get_logged_model(model).status == LoggedModelStatus.READY), None
    )


def delete_models(server: MlflowClient, run: MlflowRun) -> None:
    """Delete a run's models, unless one of them is a version of a registered model."""
    if server.search_model_versions(f"run_id = '{run.info.run_id}'"):
        return
    for model in server.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
    ):
        server.delete_logged_model(model.model_id)


def versions(server: MlflowClient, model: str, attempt: str) -> list[str]:
    """The versions of the registered model that are of this attempt."""
    try:
        versions = server.search_model_versions(f"name = '{model}'")
    except MlflowException:  # no such model yet
        return []
    return [str(version.version) for version in versions if version.tags.get("dvq.attempt") == attempt]


def send_scores(server: MlflowClient, run: MlflowRun, model: str, results: dict[str, Any], at: int) -> None:
    """Log the evaluation's numbers on the run and on its model, so that MLflow can compare models. MLflow keeps a
    point that is sent twice once.

    Args:
        server: MLflow's.
        run: as it is now, with the curves.
        model: its model's id.
        results: the content of results.json.
        at: when the trial finished [ms since 1970].
    """
    split, data = results["evaluation"]["split"], results["data"]
    components = results.get("analysis", {}).get("components_95_weighted_mean")
    numbers = {**results["evaluation"], "components_95_weighted": components}
    curves = (metric for metric in run.data._metric_objs if metric.key.startswith(f"{split}/"))
    points = [(metric.key, metric.value, metric.timestamp, metric.step) for metric in curves]
    last, final = results["trial"]["steps"], {name: numbers.get(name) for name in FINAL}
    points += [(f"{split}/{name}", metric, at, last) for name, metric in final.items() if metric is not None]
    about = {"model_id": model, "dataset_name": data["name"], "dataset_digest": data["fingerprint"][:16]}
    metrics = [Metric(*point, **about) for point in dict.fromkeys(points)]
    if speed := results["training"].get("images_per_second"):  # of all training, as in the report
        metrics.append(Metric("images_per_second", speed, at, last))
    server.log_batch(run.info.run_id, metrics=metrics)


def note(results: dict[str, Any], model: str) -> str:
    """The note at the head of the run's page, as Markdown."""
    evaluation = results["evaluation"]
    fitted = evaluation.get("fitted_bits_per_dim")
    fitted_text = (
        "" if fitted is None else f"; {fitted:.3f} with prior and batch normalization's statistics fitted"
    )
    return (
        f"`{results['name']}` on {results['data']['label']}, split {evaluation['split']}: "
        f"**{evaluation['bits_per_dim']:.3f} ± {evaluation['bits_per_dim_se']:.3f} bits/dim** "
        f"(rate {evaluation['rate']:.3f}, distortion {evaluation['distortion']:.3f}{fitted_text})\n\n"
        f'`dvq.load("models:/{model}")` loads its model'
    )
