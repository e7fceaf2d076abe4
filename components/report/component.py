"""report: a sweep's table and figures."""

from kfp import dsl
from kfp.dsl import HTML, Output

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(sweep: str, page: Output[HTML]):
    """One page with the sweep's table and figures, from the store; fails, after writing it, if a trial failed.

    Args:
        sweep: the sweep as JSON (``dvq.sweep.Sweep``).

    Returns:
        page: the page.
    """
    from pathlib import Path

    from components import exit_on_error, reports

    with exit_on_error():
        reports.report(sweep, Path(page.path))
