"""The sweep on a cluster: compiled, uploaded, started, and, if asked for, followed to its end."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from components import datasets
from dvq import DvqError
from dvq.config import overrides
from dvq.fingerprints import FINGERPRINTS, label
from pipeline import conclusion, containers, definition, forecast, image, pods, preflight
from pipeline.compile import compiled as as_yaml
from pipeline.connection import UnreachableError
from pipeline.job import Job, remove
from pipeline.kubeflow import CANCELED, SUCCEEDED, Kubeflow, Run
from pipeline.profile import Profile
from pipeline.watch import rows, watch

LOOK = 10.0
"""Seconds between two looks at the cluster."""
PATIENCE = 600.0
"""Seconds for which KFP may be out of reach while a run is followed."""
QUIET = 600.0
"""Seconds without news from any trial after which the table says where to look."""
PARAMETER = 64 << 10
"""Bytes of a parameter, at most: KFP and Kubernetes refuse some above 128 KiB, with errors that hide the cause."""


def run(job: Job, console: Console, wait: bool, fresh: bool) -> int:
    """Submit the sweep, unless it is under way; with ``wait`` follow it, and submit it again while that brings
    progress. Returns the exit status."""
    profile = check(job)
    assert profile.cluster
    kubeflow, limit = Kubeflow(profile.cluster), profile.cluster.limit
    experiment = kubeflow.experiment(job.sweep.name)
    under_way = partial(find_run, job, kubeflow, experiment, followed=wait and not fresh)
    running, job = under_way(), bring_data(job)
    version = kubeflow.upload(compiled(profile, job.jobs, job.store.place), definition.NAME)
    submit = partial(start, job, kubeflow, experiment, version, console)
    plan, started = forecast.plan(job.trials, job.store, profile, fresh), time.time()
    running = running or under_way()  # somebody may have started one, for all this takes minutes
    if fresh:  # after all checks
        remove(job)
    conclusion.say(console, f"sweep {job.sweep.name}: {len(job.trials)} trials on {label(job.data)}")
    if sum(plan.states.values()) - plan.states["finished"] > limit:
        conclusion.say(
            console, f"{limit} of them in each run; the next one goes on, by WAIT=1 or this command"
        )
    current = running or submit()
    if not wait:
        conclusion.say(console, f"the same command with WAIT=1 follows it; make cancel RUN={current} ends it")
        return 0
    try:
        ended = follow(job, kubeflow, current, console)
        while (before := _progress(job)) and ended.state != CANCELED and (unfinished := _unfinished(job)):
            conclusion.say(console, f"{len(unfinished)} trials are left: submitting it again")
            current = submit_again(kubeflow, experiment, submit, console)
            ended = follow(job, kubeflow, current, console)
            if _progress(job) <= before:
                break
    except KeyboardInterrupt:
        print(
            f"no longer followed; it goes on: the same command follows it, make cancel RUN={current} ends it"
        )
        return 130
    return conclude(job, plan, profile, ended, started, console)


def find_run(job: Job, kubeflow: Kubeflow, experiment: str, followed: bool) -> str | None:
    """The id of the sweep's run that is under way, if one is; DvqError unless it is to be ``followed``."""
    running = kubeflow.going(experiment)
    if running and not followed:
        raise DvqError(
            f"the sweep '{job.sweep.name}' is under way: {kubeflow.link(running)}; WAIT=1 follows it, "
            f"make cancel RUN={running} ends it"
        )
    return running


def check(job: Job) -> Profile:
    """The profile, with the image's name; DvqError if the sweep cannot run on the cluster."""
    profile = job.profile
    assert profile
    assert profile.cluster
    if "://" not in job.store.place:
        raise DvqError(
            f"ON=kfp: pods cannot reach this machine's folder {job.store.place}; set DVQ_STORE=s3://bucket/prefix, "
            "and AWS_ENDPOINT_URL to its server as it is reached from here"
        )
    largest_run = sorted(map(overrides, job.sweep.points()), key=len)[-profile.cluster.limit :]
    for name, value in {**job.arguments, "the trials of a run": json.dumps(largest_run)}.items():
        if (size := len(value.encode())) > PARAMETER:
            raise DvqError(
                f"the sweep '{job.sweep.name}' is too large for one pipeline ({name}: {-(-size >> 10)} KiB of "
                f"{PARAMETER >> 10}); move what trials share to 'base', or make two sweeps of it"
            )
    name = image.name(profile, pushed=True)
    if profile.cluster.pull_policy != "Never":
        if not (profile.image or image.registry(profile)):
            raise DvqError("ON=kfp: name the registry of the image, REGISTRY=host/path or cluster.registry")
        containers.check_pushed(name)
    return profile.model_copy(update={"image": name})


def bring_data(job: Job) -> Job:
    """Upload data of this machine to the store, where pods can reach it; returns the job to run then."""
    source, name = job.source, job.data
    if source.startswith("s3://") or (name in FINGERPRINTS and (not source or "://" in source)):
        return job  # the pods find it
    preflight.check_data(name, source, job.store)
    preflight.check_cache(job.store)
    if job.store.has_data(name):
        job.store.publish_data(name)  # it may be only in this machine's cache
    else:
        print(f"uploading {name} from {source} to {job.store.place}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            datasets.prepare(name, source, Path(folder, "data"))
    return replace(job, source="")


def compiled(profile: Profile, jobs: int, store: str) -> str:
    """The pipeline as YAML for KFP."""
    cluster = profile.cluster
    assert cluster
    steps = {name: os.environ[name] for name in ("DVQ_RECORD", "DVQ_FUSE") if name in os.environ}

    def settle(task: object, name: str) -> object:
        return pods.settle(task, name, profile, {"DVQ_STORE": store, **steps})

    return as_yaml(definition.sweep_pipeline(jobs, profile.image, settle, cluster.ttl, cluster.limit))


def start(job: Job, kubeflow: Kubeflow, experiment: str, version: tuple[str, str], console: Console) -> str:
    """Start a run of the sweep's pipeline; returns its id."""
    name = f"{job.sweep.name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    run_id = kubeflow.start(name, experiment, version, job.arguments)
    conclusion.say(console, f"run:    {kubeflow.link(run_id)}")
    conclusion.say(console, f"mlflow: {_mlflow(job.sweep.name)}")
    return run_id


def submit_again(kubeflow: Kubeflow, experiment: str, submit: Callable[[], str], console: Console) -> str:
    """Start another run and return its id, trying again while KFP does not answer. If a run was made but the answer
    was lost, its id is returned."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if running := kubeflow.going(experiment):
                conclusion.say(console, f"run:    {kubeflow.link(running)}")
            return running or submit()
        except UnreachableError:
            if time.monotonic() > deadline:
                raise
        time.sleep(LOOK)


def _mlflow(sweep: str) -> str:
    """MLflow's page of the sweep, if its address is known here."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    if not uri.startswith("http"):
        return "set MLFLOW_TRACKING_URI to see its address here (k8s/README.md)"
    return f"{uri.rstrip('/')}/#/experiments?searchFilter={sweep}"


def follow(job: Job, kubeflow: Kubeflow, run_id: str, console: Console) -> Run:
    """Show how the run goes, from its beginning, until it ends."""
    look, started = Look(job, kubeflow, run_id), time.time()
    with suppress(UnreachableError):
        started = kubeflow.created_at(run_id)
    job.store.look(job.keys(), "results.json")
    watch(job, rows(job), started, console, look)
    return look.run


class Look:
    """Looks at the run, and brings the trials' events, every LOOK seconds."""

    def __init__(self, job: Job, kubeflow: Kubeflow, run_id: str) -> None:
        self._job, self._kubeflow = job, kubeflow
        self.run = Run(run_id, "PENDING")
        self._next = 0.0
        self._last_answer = self._last_progress = time.monotonic()
        self._progress = -1

    def __call__(self) -> tuple[bool, str]:
        now = time.monotonic()
        if now < self._next:
            return False, self._note(now)
        self._next = now + LOOK
        try:
            self.run = self._kubeflow.look(self.run.id)
            self._last_answer = now
        except UnreachableError:
            if now - self._last_answer > PATIENCE:
                raise
        self._job.store.follow(self._job.keys())
        progress = _progress(self._job)
        if progress != self._progress:
            self._progress, self._last_progress = progress, now
        return not self.run.going, self._note(now)

    def _note(self, now: float) -> str:
        note = f"run {self.run.state.lower()}"
        if self._last_answer < self._next - LOOK:
            return f"{note}; KFP does not answer, asking again"
        if now - self._last_progress > QUIET:
            namespace = self._kubeflow.namespace or "kubeflow"
            note += f"; no trial has moved for {(now - self._last_progress) / 60:.0f} minutes: "
            note += f"kubectl -n {namespace} get pods -l {'='.join(pods.LABEL)}, and describe one that waits"
        return note


def _progress(job: Job) -> int:
    """The number of steps that are done and kept, over all trials, plus one for each trial that finished or
    failed."""
    store, done = job.store, 0
    for trial in job.trials.values():
        state = store.state(trial.key()).name
        done += trial.steps + 1 if state == "finished" else store.reached_step(trial) + (state == "failed")
    return done


def _unfinished(job: Job) -> list[str]:
    """The trials that neither finished nor failed."""
    states = {name: job.store.state(trial.key()).name for name, trial in job.trials.items()}
    return [name for name, state in states.items() if state in ("interrupted", "new")]


def conclude(
    job: Job, plan: forecast.Plan, profile: Profile, ended: Run, started: float, console: Console
) -> int:
    """Print the sweep's outcome; 0 if every trial finished and the run succeeded, else 1."""
    failures = conclusion.show(job.sweep, job.trials, job.store, console)
    for fault in ended.faults if failures or ended.state != SUCCEEDED else ():
        conclusion.say(console, f"  the cluster: {fault}")
    spent = forecast.hours_spent(job.trials.values(), job.store, profile, started)
    forecasted = "no forecast" if plan.unknown else f"forecast {plan.hours:.2f}"
    conclusion.say(console, f"{forecast.unit(profile)}: {spent:.2f} spent, {forecasted}")
    finished = [trial.key() for name, trial in job.trials.items() if name not in failures]
    if lacking := conclusion.untracked(job.sweep, finished, job.store, profile.cluster):
        conclusion.say(
            console,
            f"MLflow lacks {lacking} of the finished trials: the log of the run's task 'report' says why; once that "
            "is mended, make replay sends a sweep's",
        )
    report = f"{job.store.place}/reports/{job.sweep.name}/report.html"
    conclusion.say(console, f"\nrun {ended.state.lower()}; report: {report}")
    return 0 if ended.state == SUCCEEDED and not failures else 1
