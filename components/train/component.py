"""train: one trial, by the estimator that it names."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(trial: str, base: str, data: Input[Dataset], model: Output[Model], experiment: str = ""):
    """Train a discrete latent variable model of images.

    Args:
        trial: what the trial sets over ``base``: ``estimator=gs-soft num_codes=512 seed=0``.
        base: what all trials of the sweep share, as a JSON object; ``{}`` for the defaults.
        data: a prepared dataset.
        model: trial.json, and model.safetensors unless the trial failed.
        experiment: the MLflow experiment to track in; empty for none.
    """
    from pathlib import Path

    from components import trials

    trials.train(trial, base, Path(data.path), Path(model.path), experiment)
