"""Write a sweep's report again from the store, without running trials: ``python -m pipeline.report SWEEP``."""

from contextlib import suppress

from rich.console import Console

from components import reports, tracking
from pipeline import conclusion, preflight


def report(sweep: preflight.SweepName = "smoke") -> None:
    """Write a sweep's report again; exit status 1 if a trial of it is not finished."""
    found = preflight.find_sweep(sweep)
    store = preflight.find_store()
    preflight.check_begun(found, store, sweep)
    console = Console()
    failures = conclusion.show(found, found.trials(), store, console)
    with suppress(Exception):  # what ails MLflow's file is said below, and the report is written all the same
        tracking.ensure_database()
    reports.write(found, store)
    conclusion.where(found, store, console)
    raise SystemExit(1 if failures else 0)


app = preflight.application(report)

if __name__ == "__main__":
    app()
