"""plan: the trials of a sweep that are still to do."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan(sweep: str, limit: int = 0) -> list[str]:
    """The sweep's trials that the store does not have finished, each as what it sets over the sweep's base.

    Args:
        sweep: the sweep as JSON (``dvq.config.Sweep``).
        limit: at most so many, those that failed before at the end; 0 for all.

    Returns:
        one text a trial: ``estimator=gs-soft num_codes=512 seed=0``.
    """
    from components import trials
    from dvq.config import Sweep, overrides

    checked = Sweep.model_validate_json(sweep)
    points = trials.unfinished(checked, limit)
    print(f"{len(points)} of {len(checked.points())} trials to do now")
    return [overrides(point) for point in points]
