"""Run a sweep: check everything first, start the pipeline, show its progress, print the results.

python -m pipeline.submit SWEEP [--on local|docker|kfp] [--jobs 2] [--profile NAME] [--data SOURCE] [--fresh] …
"""

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from components import tracking
from components.store import DID_NOT_FINISH, DID_NOT_START
from dvq import DvqError, choices, fingerprints
from dvq.trial import values
from pipeline import conclusion, containers, forecast, image, local, preflight, tracker
from pipeline.command import ProfileName, SweepName, application, outputs
from pipeline.job import Job, remove
from pipeline.profile import DEFAULTS, JOBS, Profile, find_profile
from pipeline.progress import FAILED, FINISHED, Row
from pipeline.watch import rows, watch

ERROR = re.compile(r"([\w.]*(Error|Exception)|error): (?!\d+ of \d+ trials failed: )")
"""begins a line that says why something failed; the report's last line only repeats the trials' reasons"""
KFP_FAILURE = "finished with status FAILURE"
"""marks kfp's own last error, which does not say why"""
ENDING = (signal.SIGTERM, signal.SIGHUP)
DOWNLOAD = re.compile(r"downloading: .*")


def submit(
    sweep: SweepName = "smoke",
    on: Annotated[str, typer.Option(help="where it runs: local, docker or kfp")] = "local",
    jobs: Annotated[str, typer.Option(help="trials at a time; by default the profile's, or 2")] = "",
    data: Annotated[
        str,
        typer.Option(help="where CIFAR-10 is: archive, folder or address; or your own images' file"),
    ] = "",
    profile: ProfileName = "",
    fresh: Annotated[bool, typer.Option(help="compute its trials anew")] = False,
    wait: Annotated[bool, typer.Option(help="on kfp: follow it to its end")] = False,
    budget: Annotated[str, typer.Option(help="hours of GPUs that the forecast must not exceed")] = "",
    dry_run: Annotated[bool, typer.Option(help="print what would run, and start nothing")] = False,
) -> None:
    """Run a sweep; what the store has is not computed again."""
    preflight.check_place(on)
    if on == "local" and profile:
        raise DvqError(
            f"PROFILE = '{profile}': this machine's own processes have none; give ON=docker or ON=kfp"
        )
    limits = None if on == "local" else find_profile(profile or DEFAULTS[on])
    if on == "kfp" and limits and limits.cluster is None:
        raise DvqError(
            "ON=kfp: the profile has no 'cluster'; name one that has: PROFILE=nvidia, gke, eks, kind"
        )
    job = checked_job(sweep, jobs, data, limits, fresh)
    budget_hours = preflight.hours(budget) or (limits.budget if limits else None)
    if dry_run or budget_hours:
        place = limits or _own_processes()
        plan = forecast.plan(job.trials, job.store, place, fresh)
        if dry_run:
            _print_plan(plan, job, place, on, budget_hours)
        forecast.check(plan, budget_hours, place)
    if dry_run:
        return
    job.store.check_writing()
    if on == "kfp":
        from pipeline import cluster

        raise SystemExit(cluster.run(job, Console(), wait, fresh))
    job = prepare(job)
    if fresh:
        remove(job)
    raise SystemExit(run(job, Console(), fresh))


def checked_job(name: str, jobs: str, source: str, profile: Profile | None, fresh: bool = False) -> Job:
    """The sweep as a job, after all checks; DvqError for anything wrong, also with existing results unless they are
    computed anew (``fresh``)."""
    number = preflight.whole_number("JOBS", jobs or str(profile.parallelism if profile else 2), JOBS)
    sweep = preflight.find_sweep(name)
    trials = sweep.trials()
    for field, need in sweep.idle():
        print(f"warning: sweep '{sweep.name}': {field} changes nothing without {need}", file=sys.stderr)
    if warning := choices.warning(map(values, trials.values())):
        print(f"note: sweep '{sweep.name}': {warning}", file=sys.stderr)
    store = preflight.find_store()
    source = preflight.find_source(source, next(iter(trials.values())).data)
    folder = outputs() / "logs" / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{sweep.name}"
    job = Job(sweep, trials, store, source, number, folder, profile)
    store.look(job.keys(), "results.json")
    for trial in () if fresh else trials.values():
        store.finished(trial)
    return job


def _own_processes() -> Profile:
    """What a trial takes as a process of this machine."""
    from dvq import device  # whose torch takes seconds to import

    return Profile(gpu=min(device.gpus(), 1))


def _print_plan(plan: forecast.Plan, job: Job, profile: Profile, on: str, budget: float | None) -> None:
    name = image.name(profile, pushed=on == "kfp") if on != "local" else "none: processes of this machine"
    print(f"{job.sweep.name}, ON={on}, the store {job.store.place}; nothing is started")
    for line in forecast.lines(plan, profile, job.jobs, name, budget):
        print(f"  {line}")


def prepare(job: Job) -> Job:
    """The job, ready to run on this machine, with the image of its containers; DvqError if something is missing."""
    if job.profile:
        image_name = image.name(job.profile, pushed=False)
        containers.check_image(image_name)
        job = replace(job, profile=job.profile.model_copy(update={"image": image_name}))
    local.check(job.folder, job.arguments)
    preflight.check_data(job.data, job.source, job.store)
    fault = tracker.check()
    if fault:
        print(
            f"warning: {fault}; the sweep runs all the same, and make replay sends MLflow the rest",
            file=sys.stderr,
        )
    preflight.check_cache(job.store)
    preflight.check_writable(job.folder, "run from a folder that can")
    return job


def run(job: Job, console: Console, fresh: bool = False) -> int:
    """Run the pipeline on this machine and show its progress; returns the exit status."""
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)
    shown, started = rows(job), time.time()
    trials, dataset = f"{len(shown)} trial{'s' * (len(shown) > 1)}", fingerprints.label(job.data)
    conclusion.say(console, f"sweep {job.sweep.name}: {trials} on {dataset}", prose=True)
    try:
        with local.running(job.arguments, job.jobs, job.folder, job.profile) as process:
            try:
                watch(job, shown, started, console, lambda: (process.poll() is not None, _note(shown, job)))
            except KeyboardInterrupt:
                print(
                    f"ending the trials at a checkpoint, {local.GRACE} seconds at most; a second Ctrl-C ends them at "
                    "once, without one",
                    flush=True,
                )
                raise
    except KeyboardInterrupt:
        print(f"interrupted; the same command{' without FRESH=1' * fresh} goes on")
        return 130
    return conclude(job, process.returncode, console)


def _interrupt(*_: object) -> NoReturn:
    """Like Ctrl-C, but a second signal changes nothing: make passes on a SIGTERM that its whole group got."""
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    raise KeyboardInterrupt


def _note(shown: list[Row], job: Job) -> str:
    """What is going on apart from the trials."""
    if not (job.store.data(job.data) / "data.json").exists():
        downloads = DOWNLOAD.findall(_log(job))
        return f"preparing {job.data}" + (f": {downloads[-1]}" if downloads else "")
    return "writing the report" if all(row.state in (FINISHED, FAILED) for row in shown) else ""


def _log(job: Job) -> str:
    """What kfp and the tasks have printed so far."""
    return (job.folder / "kfp.log").read_text(encoding="utf-8", errors="replace")


def conclude(job: Job, code: int, console: Console) -> int:
    """Print the sweep's outcome; 0 if every trial finished and the pipeline succeeded, else 1."""
    failures = conclusion.show(job.sweep, job.trials, job.store, console)
    log = _log(job)
    for line in _log_excerpt(code, failures, log):
        conclusion.say(console, line)
    finished = [trial for name, trial in job.trials.items() if name not in failures]
    behind = [one for one in finished if not tracking.is_sent(job.store.trial(one.key()), job.sweep.name)]
    if behind and os.environ.get("MLFLOW_TRACKING_URI"):
        conclusion.say(
            console,
            f"MLflow lacks {len(behind)} of the finished trials: the log says why; once that is mended, make replay "
            "sends a sweep's",
        )
    elif finished and not _has_champion(job, log):
        conclusion.say(console, "MLflow lacks the champion: make replay names it; the log says why")
    conclusion.show_places(job.sweep, job.store, console)
    conclusion.say(console, f"log:    {job.folder / 'kfp.log'}")
    return 1 if failures or code != 0 else 0


def _has_champion(job: Job, log: str) -> bool:
    """Whether MLflow took the sweep's champion, if it names one, by the report's log."""
    if not (job.sweep.champion and os.environ.get("MLFLOW_TRACKING_URI")):
        return True
    return f"the champion of {job.sweep.name} {tracking.BEHIND}" not in log


def _log_excerpt(code: int, failures: Mapping[str, str], log: str) -> list[str]:
    """The lines of kfp's log that say more than the trials' own reasons."""
    lines = [line.strip() for line in image.COLOUR.sub("", log).splitlines() if line.strip(" -")]
    deaths = [
        line for line in lines if line.startswith(containers.ENDED) and not line.endswith("exit code 1")
    ]
    if deaths and {DID_NOT_START, DID_NOT_FINISH} & set(failures.values()):
        return deaths
    errors = [line for line in lines if ERROR.match(line)]
    sentences = [line.removeprefix("error: ") for line in errors if line.startswith("error: ")]
    if DID_NOT_START in failures.values():
        return [*sentences, *errors, f"the pipeline ended with exit status {code}"][:1]
    if code != 0 and not failures:
        if reasons := [line for line in sentences or errors if KFP_FAILURE not in line]:
            return [f"the pipeline failed after the trials: {reasons[-1]}"]
        return ["the pipeline failed after the trials; the end of its log:", *lines[-15:]]
    return []


app = application(submit)

if __name__ == "__main__":
    app()
