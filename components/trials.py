"""What plan and train do: choose the trials to compute, and train one, from its last checkpoint if it has one.

A failure is recorded in the trial's events, and fails the step. In a sweep (``record``) the step succeeds instead,
the following steps leave the trial alone, and the report names the failure. If the machine cannot compute, the trial
counts as interrupted, and the step fails in any case.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from components.artifacts import fail_unless_recorded, make_artifact, working
from components.folder import State, begin, state
from components.store import Store, Work
from components.tracking import TrialRun
from dvq import DvqError, failures
from dvq.config import Point, point
from dvq.config import trial as make_trial
from dvq.data import load
from dvq.events import Events, sizes
from dvq.sweep import Sweep, short_name
from dvq.trial import Trial, values

SYNC_SECONDS = 5
INTERRUPTED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)


def unfinished(sweep: Sweep, limit: int = 0, experiment: str = "") -> list[Point]:
    """The sweep's points that are not finished in the store, or not complete in ``experiment``, ``limit`` at most.

    With a limit, trials that began but reached no checkpoint, or whose last worker died silently (perhaps its pod was
    out of memory), come later, and those that failed come last, so that they do not block the others in every run.

    Raises:
        DvqError: the sweep has no trial, a wrong one, or one twice; or the limit is below 0.
    """
    if limit < 0:
        raise DvqError(f"limit = {limit}: give how many trials at most, or 0 for all")
    pairs = zip(sweep.points(), sweep.trials().values(), strict=True)
    todo = [(point, trial.key()) for point, trial in pairs]
    if store := Store.from_environment():
        store.look([key for _, key in todo], "tracked.json")
        todo = [(point, key) for point, key in todo if not _is_done(store, key, experiment)]
        if limit:
            todo.sort(key=lambda item: _postponement(store.state(item[1]), store.silent(item[1])))
    return [point for point, _ in todo[: limit or None]]


def _postponement(state: State, silent: bool) -> int:
    """0, 1 or 2: trials with a higher number are computed later."""
    if state.name == "failed":
        return 2
    return int(silent or (state.name == "interrupted" and not state.step))


def _is_done(store: Store, key: str, experiment: str) -> bool:
    return store.state(key).name == "finished" and TrialRun(store.trial(key), experiment).settled()


def train(
    overrides: str, base: str, data: Path, model: Path, experiment: str, record: bool = False
) -> dict[str, Any]:
    """Train the trial in a child process, unless the store has its model, and copy the model to ``model``.

    ``model`` gets ``trial.json`` in any case, and the weights if there are any.

    Returns:
        the artifact's metadata.

    Raises:
        DvqError: the trial is wrong; or, unless failures are recorded, its training failed.
    """
    settings = point(overrides)
    trial = make_trial({**_parse_base(base), **settings}, where=f"trial '{overrides}'")
    reason, fault, store = "", _data_fault(data, trial), Store.from_environment()
    fail_unless_recorded(fault, record)
    with working(trial) as work:
        folder, name = work.folder, short_name(trial, settings)
        run = TrialRun(folder, experiment, name)
        try:
            if fault:
                raise DvqError(fault)
            new = not (folder / "trial.json").exists()
            begin(folder, trial, name, store.shorter_trial(trial) if store and new else None)
            if (folder / "model").exists():
                run.sync()  # under its name in this sweep, which the later steps do not know
            else:
                reason = _train_in_child(work, data, run)
        except DvqError as error:
            work.check()
            reason = str(error)
            if not (fault and (folder / "model").exists()):  # it was trained on its own images
                Events(folder).failure(reason)
        make_artifact(folder, trial, model)
    fail_unless_recorded(reason, record)
    # KFP takes no null.
    fields = {field: value for field, value in values(trial).items() if value is not None}
    return {"framework": "pytorch", "name": name, "key": trial.key(), **fields}


def _data_fault(data: Path, trial: Trial) -> str:
    """Why the images are not the trial's; empty if they are."""
    try:
        load(data).check(trial)
    except DvqError as error:
        return str(error)
    return ""


def _parse_base(base: str) -> dict[str, Any]:
    try:
        fields = json.loads(base)
    except ValueError as error:
        raise DvqError(f"base: this is no JSON ({error}); give an object of fields, or {{}}") from None
    if not isinstance(fields, dict):
        raise DvqError(f"base: {base} is no JSON object; give one of fields, or {{}}")
    return fields


def _train_in_child(work: Work, data: Path, run: TrialRun) -> str:
    """Train in a child process, so that its death can be recorded whatever the cause; returns why it failed, or "".

    SIGTERM is passed on to the child, which writes a last checkpoint. The child inherits the folder's lock, in case
    it outlives this process.
    """
    command = [sys.executable, "-m", "dvq.train", str(work.folder), "--data", str(data)]
    files_before = sizes(work.folder).keys()
    child = subprocess.Popen(command, pass_fds=() if work.lock is None else (work.lock,))
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            try:
                code = child.wait(SYNC_SECONDS)
                break
            except subprocess.TimeoutExpired:
                work.check()
                run.sync_soon()
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
        if work.lost:
            child.kill()
            child.wait()
    if code in INTERRUPTED:
        run.finish()
        sys.exit(INTERRUPTED[-1])
    if code == failures.UNUSABLE:
        run.finish()
        sys.exit(code)
    # The child died before its first event: the last reason in the folder is of an earlier attempt.
    silent = sizes(work.folder).keys() == files_before
    if code != 0 and (silent or state(work.folder).name != "failed"):
        Events(work.folder).failure(failures.death(code))
    run.finish()
    return state(work.folder).reason if code != 0 else ""
