"""Write a sweep's report again from the store, without running trials: ``python -m pipeline.report SWEEP``."""

from typing import Annotated

import typer
from rich.console import Console

from components import reports
from dvq import DvqError
from pipeline import conclusion, preflight


def report(
    sweep: Annotated[str, typer.Argument(help="a name in pipeline/sweeps, or a YAML file")] = "smoke",
) -> None:
    """Write a sweep's report again; exit status 1 if a trial of it is not finished."""
    found = preflight.find_sweep(sweep)
    store = preflight.set_environment()
    preflight.check_begun(found, store, sweep)
    console = Console()
    failures = conclusion.show(found, found.trials(), store, console)
    try:
        reports.report(found.model_dump_json())
    except DvqError:
        if not failures:  # else it is written, and names them
            raise
    conclusion.where(found, store, console)
    raise SystemExit(1 if failures else 0)


app = preflight.application(report)

if __name__ == "__main__":
    app()
