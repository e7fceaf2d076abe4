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
):
    """Principal components of the codebooks, as figures and numbers; then the trial's results are complete.

    Args:
        data: a prepared dataset.
        model: what train made.
        evaluation: what evaluate made.
        analysis: results.json, analysis.npz, pictures.npz and figures/.
        experiment: the MLflow experiment to track in; empty for none.
    """
    from pathlib import Path

    from components import trials

    trials.analyze(Path(data.path), Path(model.path), Path(evaluation.path), Path(analysis.path), experiment)
