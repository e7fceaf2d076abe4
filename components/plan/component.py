"""plan: the trials of a sweep that are still to do."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan(sweep: str, limit: int = 0, experiment: str = "") -> list[str]:
    """The sweep's trials that the store does not have finished, each as what it sets over the sweep's base.

    Args:
        sweep: the sweep as JSON (``dvq.sweep.Sweep``).
        limit: at most so many, those that failed before at the end; 0 for all.
        experiment: the MLflow experiment in which a finished trial must be complete too; empty for none.

    Returns:
        Output: one text a trial: ``estimator=gs-soft num_codes=512 seed=0``.
    """
    from components import exit_on_error, trials
    from dvq.config import overrides
    from dvq.sweep import read_sweep

    with exit_on_error():
        parsed = read_sweep(sweep)
        points = trials.unfinished(parsed, limit, experiment)
    print(f"{len(points)} of {len(parsed.points())} trials to do now")
    return [overrides(point) for point in points]
