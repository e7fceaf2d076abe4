"""Write a sweep's report again from the store, without running trials: ``python -m pipeline.report SWEEP``."""

from contextlib import suppress

from rich.console import Console

from components import mlflow_server, reports
from pipeline import conclusion, preflight
from pipeline.command import SweepName, application


def report(name: SweepName = "smoke") -> None:
    """Write a sweep's report again; exit status 1 if one of its trials is not finished."""
    sweep = preflight.find_sweep(name)
    store = preflight.find_store()
    preflight.check_begun(sweep, store, name)
    console = Console()
    failures = conclusion.show(sweep, sweep.trials(), store, console)
    with suppress(Exception):  # reports.write prints what is wrong with MLflow's file, and writes the report
        mlflow_server.ensure_database()
    reports.write(sweep, store)
    conclusion.show_places(sweep, store, console)
    raise SystemExit(1 if failures else 0)


app = application(report)

if __name__ == "__main__":
    app()
