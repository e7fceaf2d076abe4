"""Bring MLflow up to date with a sweep, whatever it had or lost: ``python -m pipeline.replay SWEEP``."""

import os

from components import reports, tracking
from pipeline import preflight, tracker


def replay(sweep: preflight.SweepName = "smoke") -> None:
    """Send MLflow all that it lacks of a sweep; exit status 1 if it could not take it."""
    found = preflight.find_sweep(sweep)
    store = preflight.find_store()
    preflight.check_begun(found, store, sweep)
    tracker.require()
    tracking.ensure_database()
    sent = reports.track(found, store, anew=True)
    reports.write(found, store, anew=True)
    uri = tracking.redacted(os.environ["MLFLOW_TRACKING_URI"])
    unfinished = len(found.trials()) - len(sent)
    rest = f"; {unfinished} unfinished, which are sent when they go on" if unfinished else ""
    print(f"{sum(sent.values())} of {len(sent)} trials are up to date in MLflow at {uri}{rest}")
    raise SystemExit(0 if all(sent.values()) else 1)


app = preflight.application(replay)

if __name__ == "__main__":
    app()
