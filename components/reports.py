"""What report does: write a sweep's page from the store."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components import tracking
from components.store import Store
from components.tracking import TrialRun
from dvq import DvqError, disk
from dvq.sweep import Sweep, read_sweep

if TYPE_CHECKING:
    from dvq.analyze import Analysis
    from dvq.patches import Patches
    from dvq.pictures import Pictures

A = TypeVar("A", bound=disk.Arrays)
TRIAL = ("name", "bits_per_dim", "fitted_bits_per_dim", "autoregressive_bits_per_dim", "rate", "distortion")
SETTING = ("name", "seeds", "bits_per_dim", "above", "fitted_bits_per_dim", "fitted_above")
"""the columns of a trial and of a setting that MLflow's page has room for"""


def report(sweep_json: str, page: Path | None = None) -> Path:
    """Write the sweep's report, and copy its page to ``page``; returns its path.

    Raises:
        DvqError: there is no store, or it is full; or, after everything is written, trials failed.
    """
    store = Store.from_environment()
    if store is None:
        raise DvqError("report: DVQ_STORE is not set; a report is made from the results in a store")
    sweep = read_sweep(sweep_json)
    try:
        path, failures = write(sweep, store)
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, page)
    except OSError as error:
        if error.errno not in disk.NO_ROOM:
            raise
        place = error.filename or store.report(sweep.name)
        raise DvqError(
            f"the report cannot be written to {place}: {error.strerror}; make room, and give the same command again"
        ) from None
    if failures:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise DvqError(f"{len(failures)} of {len(sweep.trials())} trials failed: {reasons}")
    return path


def write(sweep: Sweep, store: Store, anew: bool = False) -> tuple[Path, dict[str, str]]:
    """Write the sweep's report to the store and to MLflow; returns its path, and by name why trials are not finished.

    Processes of one machine do so one after another, such as launches that waited for the same trial. ``anew``: send
    it to MLflow even if it is marked as sent.
    """
    lock = store.report(sweep.name).with_name(f".{sweep.name}.lock")
    with disk.locked(lock, lambda: print("waiting for another launch that writes this report", flush=True)):
        if anew:
            tracking.unmark_sent(store.report(sweep.name), sweep.name)
        return _write(sweep, store)


def _write(sweep: Sweep, store: Store) -> tuple[Path, dict[str, str]]:
    from dvq import report as page
    from dvq.choices import chosen

    results, analyses, failures = gather(sweep, store)
    path = page.write(
        store.report(sweep.name), sweep, results, analyses, failures, *_pictures_and_patches(results, store)
    )
    track(sweep, store)
    tracking.send_report(sweep.name, path.parent, _note(sweep.description, results, failures), bool(failures))
    if sweep.champion and (best := chosen(results)):
        tracking.set_champion(sweep.champion, sweep.name, dict(best[0]))
    store.publish_report(sweep.name)
    return path, failures


def gather(sweep: Sweep, store: Store) -> "tuple[list[dict[str, Any]], dict[str, Analysis], dict[str, str]]":
    """The results of the sweep's trials, their analyses by name, and by name why others are not finished."""
    from dvq.analyze import Analysis

    results, failures = store.outcomes(sweep.trials())
    return results, _load(Analysis, "analysis.npz", results, store), failures


def _pictures_and_patches(
    results: list[dict[str, Any]], store: Store
) -> "tuple[dict[str, Pictures], dict[str, Patches]]":
    """The pictures and patches of the trials that figures of single trials show, by name."""
    from dvq.patches import Patches
    from dvq.pictures import Pictures
    from dvq.style import shown

    shown_results = [group.results[0] for group in shown(results)]
    pictures = _load(Pictures, "pictures.npz", shown_results, store)
    return pictures, _load(Patches, "patches.npz", shown_results, store)


def _load(kind: type[A], file: str, results: Iterable[Mapping[str, Any]], store: Store) -> dict[str, A]:
    """The arrays in the file of that name, of the trials that have it, by trial."""
    keys = {result["name"]: result["key"] for result in results}
    store.fetch(keys.values(), file)
    paths = {name: store.trial(key) / file for name, key in keys.items()}
    return {name: kind.load(path) for name, path in paths.items() if path.exists()}


def track(sweep: Sweep, store: Store, anew: bool = False) -> dict[str, bool]:
    """Send MLflow what it lacks of the sweep's finished and failed trials; returns, by name, whether it has all now.
    Other trials are sent by the processes at work on them. ``anew``: ask MLflow even about trials marked as sent."""
    keys, sent = {name: trial.key() for name, trial in sweep.trials().items()}, dict[str, bool]()
    store.look(keys.values(), "results.json", "tracked.json")
    for name, key in keys.items():
        state = store.state(key).name
        if state not in ("finished", "failed") or (state == "failed" and _is_retried(store, key)):
            continue
        sent[name] = TrialRun(store.trial(key), sweep.name).settled()
        if anew or not sent[name]:
            with store.working(key) as work:
                if anew:
                    tracking.unmark_sent(work.folder, sweep.name)
                sent[name] = TrialRun(work.folder, sweep.name, name).sync()
        if not (sent[name] or anew):  # the report does not wait for each in turn
            break
    return sent


def _is_retried(store: Store, key: str) -> bool:
    """Whether a process is at work on the trial, whose state says so only once it trains: seconds, or with a store in
    S3 half a minute, after it took the trial for hours."""
    try:
        with store.idle(key):
            return False
    except DvqError:
        return True


def _note(description: str, results: list[dict[str, Any]], failures: dict[str, str]) -> str:
    """A line that says what the sweep is, and its table, as Markdown."""
    from dvq.tables import certificate, rows, settings

    lines = _table(rows(results, {}), TRIAL) if results else []
    if several := settings(results):
        lines += ["", *_table(several, SETTING)]
    label = f"{results[0]['data']['label']}, certificate `{certificate(results)}`" if results else ""
    label = " ".join(filter(None, (description, label and f"On {label}")))
    failed = [f"- {name} is not finished: {reason}" for name, reason in failures.items()]
    return "\n".join([label, "", *lines, "", *failed])


def _table(table: list[dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    """The lines of a table of those columns; MLflow's pages leave no space between columns of their own."""
    from dvq.tables import filled, formatted

    used = filled(table, keys)
    cells = [
        [heading for heading, _ in used.values()],
        *([formatted(row, key) for key in used] for row in table),
    ]
    head, *body = (f"| {' | '.join(f'{cell}&emsp;' for cell in line)} |" for line in cells)
    return [head, "|" + " --- |" * len(used), *body]
