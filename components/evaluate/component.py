"""evaluate: a model's ELBO in bits/dim."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(data: Input[Dataset], model: Input[Model], evaluation: Output[Metrics]):
    """The single-sample ELBO with hard samples, on every image of the trial's evaluation split.

    Args:
        data: a prepared dataset.
        model: what train made.
        evaluation: bits_per_dim, rate and distortion [bits/dim] with standard errors, fitted_bits_per_dim (with
            batch normalization and prior fitted to the training images), and the codes' usage.
    """
    from pathlib import Path

    from components import trials

    for name, value in trials.evaluate(Path(data.path), Path(model.path), Path(evaluation.path)).items():
        evaluation.log_metric(name, value)
