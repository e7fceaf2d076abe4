"""A sweep's outcome: its table, what failed and why, and where to look further."""

import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from rich.console import Console
from rich.table import Table

from components import tracking
from components.store import DID_NOT_FINISH, DID_NOT_START, Store
from dvq.choices import chosen, chosen_line
from dvq.fingerprints import label
from dvq.sweep import Sweep
from dvq.tables import certificate, filled, fitted_first, formatted, rows, settings
from dvq.trial import Trial
from pipeline.profile import Cluster

TRIAL = (
    *("name", "bits_per_dim", "fitted_bits_per_dim", "autoregressive_bits_per_dim"),
    *("rate", "distortion", "dead_codes"),
)
SETTING = ("name", "seeds", "bits_per_dim", "above", "fitted_bits_per_dim")
"""the columns of a trial and of a setting that fit into 80 characters"""


def show(sweep: Sweep, trials: Mapping[str, Trial], store: Store, console: Console) -> dict[str, str]:
    """Print the finished trials by bits/dim, and why others are not finished; returns these reasons by name."""
    finished, failures = store.outcomes(trials)
    if finished:
        _show_finished(sweep, trials, finished, console)
    if choice := chosen_line(finished):
        say(console, f"then, on test images: {choice}")
    if sweep.champion and os.environ.get("MLFLOW_TRACKING_URI") and (best := chosen(finished)):
        among = ", the lowest seed of the setting of lowest mean over seeds" if len(best) > 1 else ""
        say(console, f"best, for models:/{sweep.champion}@champion: {best[0]['name']}{among}")
    if failures:
        say(
            console,
            f"\n{len(failures)} of {len(trials)} trials {_outcome(failures)}; "
            "the next make submit-sweep of this sweep tries them:",
        )
    for name, reason in failures.items():
        say(console, f"  {name}: {reason}", prose=True)
    return failures


def _show_finished(
    sweep: Sweep, trials: Mapping[str, Trial], finished: list[dict[str, Any]], console: Console
) -> None:
    """Print the tables of trials and of settings, how to read them, and what interruptions cost."""
    data = label(next(iter(trials.values())).data)
    split = finished[0]["evaluation"]["split"]
    say(console, f"\n{sweep.name} on {data}", prose=True)
    say(
        console,
        f"split {split}; bits/dim = distortion + rate, ± the standard error over images;\n"
        "fitted: the same with prior and batch normalization's statistics estimated anew\n"
        "on the training images; in short runs both lag behind the weights",
    )
    if any("autoregressive_bits_per_dim" in result["evaluation"] for result in finished):
        say(console, "AR prior: with an autoregressive prior of the codes in place of the factorial one")
    if not console.is_terminal:  # so that no name is broken in a file
        console.width = max(map(len, trials)) + 80
    console.print(_table(rows(finished, {}), TRIAL))
    if seed_means := settings(finished):
        say(
            console,
            "\nmeans over seeds, ± the standard error over trainings (a 95% interval: ± 12.7 of\n"
            "them with two seeds, 4.3 with three, 2.8 with five); above lowest: seed by seed",
        )
        console.print(_table(seed_means, SETTING))
    if lowest_fitted := fitted_first(seed_means or rows(finished, {})):
        value = formatted(lowest_fitted, "fitted_bits_per_dim")
        say(console, f"by fitted bits/dim another is lowest: {lowest_fitted['name']}, {value}", prose=True)
    say(console, f"certificate {certificate(finished)}: equal when every number is equal, bit for bit")
    lost_work = goodput([result["training"]["goodput"] for result in finished])
    if lost_work:
        say(console, lost_work)


def _outcome(failures: Mapping[str, str]) -> str:
    """What happened to the trials that are not finished, as a predicate."""
    if set(failures.values()) == {DID_NOT_START}:
        return "are not computed"
    failed = set(failures.values()) - {DID_NOT_START, DID_NOT_FINISH}
    some_unfinished = len(failed) < len(set(failures.values()))
    return ("failed or are not finished" if some_unfinished else "failed") if failed else "are not finished"


def untracked(sweep: Sweep, finished: Iterable[str], store: Store, cluster: Cluster | None) -> int:
    """How many of the ``finished`` trials MLflow lacks, by what a cluster's pods recorded, which may reach it under
    another address than this machine; 0 if the pods or this machine have no MLflow."""
    variables = chain(*cluster.config_maps.values(), *cluster.secrets.values()) if cluster else ()
    if not os.environ.get("MLFLOW_TRACKING_URI") or "MLFLOW_TRACKING_URI" not in variables:
        return 0
    keys = list(finished)
    store.look(keys, "tracked.json")
    return sum(not tracking.is_sent_anywhere(store.trial(key), sweep.name) for key in keys)


def goodput(trials: list[dict[str, Any]]) -> str:
    """What interruptions cost, over the finished trials; empty if there were none."""
    steps, seconds = (sum(trial[key] for trial in trials) for key in ("steps_lost", "seconds_lost"))
    count = sum(max(0, trial["attempts"] - 1) for trial in trials)
    message = (
        f"goodput {count} interruption{'s' * (count > 1)}, after which {steps} step{'s' * (steps != 1)}, "
    )
    message += f"{seconds:.0f} s of training, {'was' if steps == 1 else 'were'} made again"
    return message if count else ""


def say(console: Console, line: str, prose: bool = False) -> None:
    """Print a line without markup, colours and line breaks; in a terminal ``prose`` is wrapped between words."""
    console.print(line, markup=False, highlight=False, soft_wrap=not (prose and console.is_terminal))


def _table(table_rows: list[dict[str, Any]], keys: tuple[str, ...]) -> Table:
    table, used = Table(box=None, pad_edge=False, header_style="bold"), filled(table_rows, keys)
    for heading, form in used.values():
        table.add_column(heading, justify="right" if form else "left", no_wrap=bool(form), overflow="fold")
    for row in table_rows:
        table.add_row(*(formatted(row, key) for key in used))
    return table


def show_places(sweep: Sweep, store: Store, console: Console) -> None:
    """Print where the report is and how to look at the runs."""
    page = store.report(sweep.name) / "report.html"
    if page.exists():
        say(console, f"\nreport: {page}")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        say(console, "runs:   make ui")
