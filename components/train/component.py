"""train: one trial, by the estimator that it names."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    trial: str,
    data: Input[Dataset],
    model: Output[Model],
    base: str = "{}",
    experiment: str = "",
    record_failure: bool = False,
):
    """Train a discrete latent variable model of images.

    Args:
        trial: what the trial sets over ``base``, values in JSON: ``estimator=gs-soft num_codes=512 seed=0``.
        data: a prepared dataset.
        base: what all trials of the sweep share, as a JSON object; ``{}`` for the defaults.
        experiment: the MLflow experiment to track in; empty for none.
        record_failure: whether a trial's failure is only recorded in the store, as in a sweep, whose report names it;
            else the task fails.

    Returns:
        model: trial.json, and model.safetensors unless the trial failed; its metadata are its configuration.
    """
    from pathlib import Path

    from components import exit_on_error, trials

    with exit_on_error():
        metadata = trials.train(trial, base, Path(data.path), Path(model.path), experiment, record_failure)
        model.metadata.update(metadata)
