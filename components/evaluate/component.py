"""evaluate: a model's ELBO in bits/dim."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    data: Input[Dataset], model: Input[Model], evaluation: Output[Metrics], record_failure: bool = False
):
    """The single-sample ELBO with hard samples, on every image of the trial's evaluation split.

    Args:
        data: a prepared dataset; other than the trial's own, its images are of the same shape.
        model: what train made.
        record_failure: whether a trial's failure is only recorded in the store, as in a sweep, whose report names it;
            else the task fails.

    Returns:
        evaluation: bits_per_dim, rate and distortion [bits/dim] with standard errors, fitted_bits_per_dim (with
            batch normalization and prior fitted to the training images), with the trial's autoregressive_steps also
            autoregressive_bits_per_dim, and the codes' usage.
    """
    from pathlib import Path

    from components import exit_on_error, judging

    with exit_on_error():
        numbers = judging.evaluate(Path(data.path), Path(model.path), Path(evaluation.path), record_failure)
        for name, value in numbers.items():
            evaluation.log_metric(name, value)
