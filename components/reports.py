"""What report does: a sweep's page from the store."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from components import tracking
from components.store import Store, Work
from components.tracking import TrialRun
from dvq import DvqError
from dvq.config import Sweep


def report(sweep_json: str, page: Path | None = None) -> Path:
    """Write the sweep's report to the store and to MLflow; its path.

    Raises:
        DvqError: no store, or, after everything is written, trials that failed, each with its reason.
    """
    from dvq.analyze import Analysis
    from dvq.report import write

    store = Store.from_environment()
    if store is None:
        raise DvqError("report: DVQ_STORE is not set; a report is made from the results in a store")
    sweep = Sweep.model_validate_json(sweep_json)
    results, analyses, failures = [], {}, {}
    trials = sweep.trials()
    store.look([trial.key() for trial in trials.values()], "results.json", "analysis.npz")
    for name, trial in trials.items():
        found = store.results(trial.key())
        if found is None:
            state = store.state(trial.key())
            failures[name] = state.reason or f"it did not finish ({state.name}): see the log"
            continue
        results.append({**found, "name": name})
        if store.has(trial.key(), "analysis.npz"):
            analyses[name] = Analysis.load(store.trial(trial.key()) / "analysis.npz")
    path = write(store.report(sweep.name), sweep.name, sweep.description, results, analyses, failures)
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, page)
    track(sweep, store)
    tracking.report(sweep.name, path.parent, _note(results, failures), bool(failures))
    if sweep.champion and results:
        best = min(results, key=lambda one: one["evaluation"]["bits_per_dim"])
        tracking.champion(sweep.champion, sweep.name, best)
    store.publish_report(sweep.name)
    if failures:
        named = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise DvqError(f"{len(failures)} of {len(results) + len(failures)} trials failed: {named}")
    return path


def track(sweep: Sweep, store: Store, anew: bool = False) -> list[str]:
    """Send MLflow what it lacks of the sweep's trials; those that it still lacks, by name. ``anew``: ask it, whatever
    is noted."""
    lacking, trials = [], sweep.trials()
    store.look([trial.key() for trial in trials.values()], "results.json", "tracked.json")
    for name, trial in trials.items():
        key = trial.key()
        if TrialRun(store.trial(key), sweep.name).settled() and not anew:
            continue
        finished = (
            store.state(key).name == "finished"
        )  # else another process may be at work on it, which is let be
        with store.working(key) if finished else nullcontext(Work(store.bring(key))) as work:
            if anew:
                tracking.forget(work.folder, sweep.name)
            if not TrialRun(work.folder, sweep.name).sync():
                lacking.append(name)
    return lacking


def _note(results: list[dict[str, Any]], failures: dict[str, str]) -> str:
    """The table as Markdown."""
    from dvq.report import certificate, rows

    lines = ["| trial | bits/dim | rate | distortion |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row['name']} | {row['bits_per_dim']:.3f} | {row['rate']:.3f} | {row['distortion']:.3f} |"
        for row in rows(results, {})
    ]
    label = f"{results[0]['data']['label']}, certificate `{certificate(results)}`" if results else ""
    failed = [f"- {name} failed: {reason}" for name, reason in failures.items()]
    return "\n".join([label, "", *lines, "", *failed])
