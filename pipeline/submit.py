"""Run a sweep: look at everything first, start the pipeline, show how it goes, print the results.

python -m pipeline.submit SWEEP [--on local|docker] [--jobs 2] [--profile NAME] [--data SOURCE] [--fresh]
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from components.store import Store
from dvq.config import Sweep
from dvq.events import Tail
from dvq.fingerprints import FINGERPRINTS, LABELS
from dvq.trial import Trial
from pipeline import local, preflight, results
from pipeline.containers import ENDED
from pipeline.profile import Profile
from pipeline.progress import FAILED, FINISHED, LOOK, Row, display

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
ERROR = re.compile(r"[\w.]*(Error|Exception): ")
DOWNLOAD = re.compile(r"downloading: .*")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Job:
    """A sweep that was looked at and can start."""

    sweep: Sweep
    trials: Mapping[str, Trial]
    store: Store
    arguments: Mapping[str, str]
    jobs: int
    folder: Path
    """of this launch's log"""
    profile: Profile | None
    """of the containers, where the tasks are some"""


@app.command()
def submit(
    sweep: Annotated[str, typer.Argument(help="a name in pipeline/sweeps, or a YAML file")] = "smoke",
    on: Annotated[str, typer.Option(help="where it runs: local or docker")] = "local",
    jobs: Annotated[str, typer.Option(help="trials at a time; by default the profile's, or 2")] = "",
    data: Annotated[str, typer.Option(help="where CIFAR-10 is: an archive, a folder or an address")] = "",
    profile: Annotated[str, typer.Option(help="a name in pipeline/profiles, or a YAML file")] = "docker",
    fresh: Annotated[bool, typer.Option(help="compute its trials anew")] = False,
) -> None:
    """Run a sweep; what the store has is not computed again."""
    with preflight.one_sentence():
        job = prepare(sweep, on, jobs, data, profile)
        job.store.look([trial.key() for trial in job.trials.values()], "results.json")
        if fresh:
            remove(job)
    raise SystemExit(run(job, Console()))


def prepare(name: str, on: str, jobs: str, source: str, profile_name: str) -> Job:
    """Everything that can be told before any work; DvqError for what is wrong."""
    preflight.check_place(on)
    profile = preflight.find_containers(profile_name) if on == "docker" else None
    number = preflight.whole_number("JOBS", jobs or str(profile.parallelism if profile else 2))
    sweep = preflight.find_sweep(name)
    trials = sweep.trials()
    store = preflight.set_environment()
    data = next(iter(trials.values())).data
    if Path(source).exists() and source:
        source = str(Path(source).absolute())
    arguments = {
        "sweep": sweep.model_dump_json(),
        "base": json.dumps(sweep.base),
        "data_name": data,
        "source": source,
        "experiment": sweep.name,
    }
    folder = preflight.outputs() / "logs" / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{sweep.name}"
    local.check(folder, arguments)
    preflight.check_data(data, source, store)
    fault = preflight.check_tracking()
    if fault:
        print(
            f"warning: {fault}; the sweep runs all the same, and make replay sends MLflow the rest",
            file=sys.stderr,
        )
    preflight.check_writable(
        store.root, "set DVQ_STORE, or DVQ_CACHE for a store in S3, to a folder that can"
    )
    preflight.check_writable(folder, "run from a folder that can")
    return Job(sweep, trials, store, arguments, number, folder, profile)


def remove(job: Job) -> None:
    """Remove the sweep's trials from the store, and say which."""
    removed = [name for name, trial in job.trials.items() if job.store.has(trial.key(), "trial.json")]
    for name in removed:
        job.store.remove(job.trials[name].key())
    print(f"removed from {job.store.place}: {', '.join(removed) or 'nothing'}")


def run(job: Job, console: Console) -> int:
    """Run the pipeline and say how it goes; the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    rows = [_row(name, trial, job.store) for name, trial in job.trials.items()]
    began = time.time()
    results.say(
        console, f"sweep {job.sweep.name}: {len(rows)} trials on {LABELS[job.arguments['data_name']]}"
    )
    try:
        with local.running(job.arguments, job.jobs, job.folder, job.profile) as process:
            _watch(process, rows, began, job, console)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on")
        return 130
    return conclude(job, process.returncode, console)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _row(name: str, trial: Trial, store: Store) -> Row:
    row = Row(name, trial, Tail(store.trial(trial.key())))
    found = store.results(trial.key())
    if found:
        row.state, row.step, row.bits_per_dim = FINISHED, trial.steps, found["evaluation"]["bits_per_dim"]
        row.news.append(f"{FINISHED} before: {row.bits_per_dim:.3f} bits/dim")
    else:
        row.step = row.base = store.reached(trial)
    return row


def _watch(
    process: "subprocess.Popen[bytes]", rows: list[Row], began: float, job: Job, console: Console
) -> None:
    with display(console, job.jobs) as shown:
        while True:
            code = process.poll()
            for row in rows:
                row.update(began)
            shown.show(rows, _note(rows, job) if code is None else "")
            if code is not None:
                return
            time.sleep(LOOK)


def _note(rows: list[Row], job: Job) -> str:
    """What goes on beside the trials."""
    name = job.arguments["data_name"]
    if not (job.store.data(FINGERPRINTS[name]) / "data.json").exists():
        told = DOWNLOAD.findall((job.folder / "kfp.log").read_text(encoding="utf-8", errors="replace"))
        return f"preparing {name}" + (f": {told[-1]}" if told else "")
    return "writing the report" if all(row.state in (FINISHED, FAILED) for row in rows) else ""


def conclude(job: Job, code: int, console: Console) -> int:
    """Print what the sweep came to; 0 if every trial finished and the pipeline succeeded, else 1."""
    failures = results.show(job.sweep, job.trials, job.store, console)
    for line in _because(code, failures, job.folder / "kfp.log"):
        results.say(console, line)
    results.where(job.sweep, job.store, console)
    results.say(console, f"log:    {job.folder / 'kfp.log'}")
    return 1 if failures or code != 0 else 0


def _because(code: int, failures: Mapping[str, str], log: Path) -> list[str]:
    """What kfp's log tells beyond the trials' own reasons."""
    text = COLOUR.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in text.splitlines() if line.strip(" -")]
    deaths = [line for line in lines if line.startswith(ENDED) and not line.endswith("exit code 1")]
    if deaths and {results.DID_NOT_START, results.DID_NOT_FINISH} & set(failures.values()):
        return deaths
    if results.DID_NOT_START in failures.values():
        errors = [line for line in lines if ERROR.match(line)]
        sentences = [line.partition(": ")[2] for line in errors if line.startswith("dvq.DvqError: ")]
        return [*sentences, *errors, f"the pipeline ended with exit status {code}"][:1]
    if code != 0 and not failures:
        return ["the pipeline failed after the trials; the end of its log:", *lines[-15:]]
    return []


if __name__ == "__main__":
    app()
