"""A finished trial in MLflow: its model, its numbers on run and model, and what is said of it first."""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.entities import LoggedModelStatus, Metric
from mlflow.exceptions import MlflowException

from dvq.fingerprints import Shape

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

REQUIREMENTS = ("torch", "numpy", "pydantic", "pyyaml", "safetensors", "mlflow")
"""of the logged model"""
FINAL = ("fitted_bits_per_dim", "autoregressive_bits_per_dim", "bound", "components_95_weighted")
"""The numbers sent beside the curves: few, since MLflow draws a chart of each."""


def send(server: "MlflowClient", run: "MlflowRun", name: str, shape: Shape, model: Path) -> str:
    """The trial's model as a pyfunc made from code and safetensors: nothing in it is a pickle; its id."""
    import mlflow
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    import dvq

    images = Schema([TensorSpec(np.dtype(np.uint8), (-1, *shape))])
    method = ParamSchema([ParamSpec("method", "string", "encode")])
    # mlflow.pyfunc.log_model wants an active run, whose end is FINISHED: too early, for the numbers come after it.
    made = server.create_logged_model(
        run.info.experiment_id,
        name.replace(".", "_"),  # MLflow allows no full stop
        run.info.run_id,
        tags=resolve_tags(),
        params=run.data.params,
    )
    # MLflow wants type hints or examples where a signature is given, and shows that whatever the filters
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True):
        code = Path(scratch) / "dvq"
        shutil.copytree(
            Path(dvq.__file__).parent, code, ignore=shutil.ignore_patterns("sample", "__pycache__")
        )
        Model.log(
            None,
            mlflow.pyfunc,
            run_id=run.info.run_id,
            model_id=made.model_id,
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(model)},
            code_paths=[str(code)],
            signature=ModelSignature(inputs=images, params=method),
            pip_requirements=[f"{name}=={_version(name)}" for name in REQUIREMENTS],
        )
    return str(made.model_id)


def ready_model(server: "MlflowClient", run: "MlflowRun") -> str | None:
    """The id of the run's model, if all of it arrived."""
    ids = [one.model_id for one in run.outputs.model_outputs] if run.outputs else []
    return next((one for one in ids if server.get_logged_model(one).status == LoggedModelStatus.READY), None)


def discard(server: "MlflowClient", run: "MlflowRun") -> None:
    """Delete the models of a run, unless a version of a registered model is made of one."""
    if server.search_model_versions(f"run_id = '{run.info.run_id}'"):
        return
    for one in server.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
    ):
        server.delete_logged_model(one.model_id)


def versions(server: "MlflowClient", model: str, attempt: str) -> list[str]:
    """The versions that were made of this attempt."""
    try:
        found = server.search_model_versions(f"name = '{model}'")
    except MlflowException:  # no such model yet
        return []
    return [str(one.version) for one in found if one.tags.get("dvq.attempt") == attempt]


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package).partition("+")[0]


def score(server: "MlflowClient", run: "MlflowRun", model: str, results: dict[str, Any], at: int) -> None:
    """Log the evaluation's numbers on the run and on its model, so that MLflow can compare models. Sending a point
    twice does no harm: MLflow keeps it once.

    Args:
        server: MLflow's.
        run: as it is now, with the curves.
        model: its model's id.
        results: the content of results.json.
        at: when the trial finished [ms since 1970].
    """
    split, data = results["evaluation"]["split"], results["data"]
    components = results.get("analysis", {}).get("components_95_weighted_mean")
    known = {**results["evaluation"], "components_95_weighted": components}
    measured = (one for one in run.data._metric_objs if one.key.startswith(f"{split}/"))
    points = [(one.key, one.value, one.timestamp, one.step) for one in measured]
    last, final = results["trial"]["steps"], {name: known.get(name) for name in FINAL}
    points += [(f"{split}/{name}", one, at, last) for name, one in final.items() if one is not None]
    about = {"model_id": model, "dataset_name": data["name"], "dataset_digest": data["fingerprint"][:16]}
    metrics = [Metric(*point, **about) for point in dict.fromkeys(points)]
    if speed := results["training"].get("images_per_second"):  # of all training, as in the report
        metrics.append(Metric("images_per_second", speed, at, last))
    server.log_batch(run.info.run_id, metrics=metrics)


def note(results: dict[str, Any], model: str) -> str:
    """What the run's page says first."""
    found = results["evaluation"]
    fitted = found.get("fitted_bits_per_dim")
    more = "" if fitted is None else f"; {fitted:.3f} with prior and batch normalization's statistics fitted"
    return (
        f"`{results['name']}` on {results['data']['label']}, split {found['split']}: "
        f"**{found['bits_per_dim']:.3f} ± {found['bits_per_dim_se']:.3f} bits/dim** "
        f"(rate {found['rate']:.3f}, distortion {found['distortion']:.3f}{more})\n\n"
        f'`dvq.load("models:/{model}")` loads its model'
    )
