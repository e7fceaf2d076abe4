"""plan: the trials of a sweep."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def plan(sweep: str) -> list[str]:
    """The sweep's trials, each as what it sets over the sweep's base.

    Args:
        sweep: the sweep as JSON (``dvq.config.Sweep``).

    Returns:
        one text a trial: ``estimator=gs-soft num_codes=512 seed=0``.
    """
    from dvq.config import Sweep, overrides

    checked = Sweep.model_validate_json(sweep)
    checked.trials()
    return [overrides(point) for point in checked.points()]
