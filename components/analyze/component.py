"""analyze: what the codebooks learned."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def analyze(
    data: Input[Dataset],
    model: Input[Model],
    evaluation: Input[Metrics],
    analysis: Output[Artifact],
    experiment: str = "",
    record_failure: bool = False,
):
    """What the codebooks learned: their principal components, and what images have where a code is chosen; then the
    trial's results are complete.

    Args:
        data: what evaluate was given.
        model: what train made.
        evaluation: what evaluate made.
        experiment: the MLflow experiment to track in; empty for none.
        record_failure: whether a trial's failure is only recorded in the store, as in a sweep, whose report names it;
            else the task fails.

    Returns:
        analysis: results.json, analysis.npz, patches.npz, pictures.npz and figures/.
    """
    from pathlib import Path

    from components import exit_on_error, judging

    inputs = Path(data.path), Path(model.path), Path(evaluation.path)
    with exit_on_error():
        judging.analyze(*inputs, Path(analysis.path), experiment, record_failure)
