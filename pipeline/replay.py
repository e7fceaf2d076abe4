"""Bring MLflow up to date with a sweep, even after it lost data: ``python -m pipeline.replay SWEEP``."""

import os

from components import mlflow_server, reports
from pipeline import preflight, tracker
from pipeline.command import SweepName, application


def replay(name: SweepName = "smoke") -> None:
    """Send MLflow all that it lacks of a sweep; exit status 1 if that fails."""
    sweep = preflight.find_sweep(name)
    store = preflight.find_store()
    preflight.check_begun(sweep, store, name)
    tracker.require()
    mlflow_server.ensure_database()
    sent = reports.track(sweep, store, anew=True)
    reports.write(sweep, store, anew=True)
    uri = mlflow_server.redacted(os.environ["MLFLOW_TRACKING_URI"])
    unfinished = len(sweep.trials()) - len(sent)
    unfinished_text = f"; {unfinished} unfinished, which are sent when they go on" if unfinished else ""
    print(f"{sum(sent.values())} of {len(sent)} trials are up to date in MLflow at {uri}{unfinished_text}")
    raise SystemExit(0 if all(sent.values()) else 1)


app = application(replay)

if __name__ == "__main__":
    app()
