"""What train, evaluate and analyze do with a trial's folder, each going on from what is there.

A failure is data: it is recorded in the trial's events, the step that met it succeeds, the following steps
leave the trial alone, and the report names it. A machine that cannot compute is no failure of
the trial's: it counts as interrupted, and the step fails.
"""

import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.folder import FORMAT, State, begin, read_json, state, write_json
from components.store import Store, Work
from components.tracking import TrialRun
from dvq import DvqError, events, failures
from dvq.config import Point, Sweep, point, short_name
from dvq.config import trial as make_trial
from dvq.data import Data, load
from dvq.events import Events
from dvq.trial import Trial, values

SYNC_SECONDS = 5
INTERRUPTED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM)


def unfinished(sweep: Sweep, limit: int = 0) -> list[Point]:
    """The sweep's points that the store does not have finished, or that its experiment does not have whole; with a
    ``limit`` so many at most, and last those that failed before, behind those that began and came to no checkpoint
    (their pod may have been out of memory), lest they stand in the others' way each time.

    Raises:
        DvqError: no trial, one that is wrong, or one that stands in the sweep twice.
    """
    trials = sweep.trials().values()
    store = Store.from_environment()
    if store:
        store.look([trial.key() for trial in trials], "tracked.json")
    points = [point for point in sweep.points() if not (store and _done(store, sweep, point))]
    if store and limit:
        points.sort(key=lambda one: _patience(store.state(sweep.trial(one).key())))
    return points[: limit or None]


def _patience(state: State) -> int:
    return 2 if state.name == "failed" else int(state.name == "interrupted" and not state.step)


def _done(store: Store, sweep: Sweep, point: Point) -> bool:
    key = sweep.trial(point).key()
    return store.state(key).name == "finished" and TrialRun(store.trial(key), sweep.name).settled()


@contextmanager
def _working(trial: Trial) -> Iterator[Work]:
    """Work on the trial's folder in the store; without a store, in one that is removed afterwards."""
    store = Store.from_environment()
    if store is None:
        with tempfile.TemporaryDirectory(prefix="dvq-trial-") as folder:
            yield Work(Path(folder))
    else:
        with store.working(trial.key()) as work:
            yield work


def train(overrides: str, base: str, data: Path, model: Path, experiment: str) -> None:
    """Train the trial in a child process, unless the store has its model, and copy the model to ``model``.

    ``model`` gets ``trial.json`` in any case, and the weights if there are any.
    """
    at = point(overrides)
    trial = make_trial({**json.loads(base), **at}, where=f"trial '{overrides}'")
    with _working(trial) as work:
        folder, name = work.folder, short_name(trial, at)
        run = TrialRun(folder, experiment, name)
        if (folder / "model").exists():
            run.sync()  # by this sweep's name, which the steps behind do not know
        else:
            try:
                shorter = None if (folder / "trial.json").exists() else _shorter(trial)
                begin(folder, trial, name, shorter)
                _train_in_child(work, data, run)
            except DvqError as error:
                work.check()
                Events(folder).failure(str(error))
        model.mkdir(parents=True, exist_ok=True)
        if (folder / "model").exists():
            shutil.copytree(folder / "model", model, dirs_exist_ok=True)
        else:
            write_json(model / "trial.json", values(trial))


def _shorter(trial: Trial) -> Path | None:
    store = Store.from_environment()
    if store is None:
        return None
    store.look([trial.key()])
    return store.shorter(trial)


def _train_in_child(work: Work, data: Path, run: TrialRun) -> None:
    """A process of its own, so that any death of it can be told and recorded. SIGTERM is passed on to it, and
    its last checkpoint waited for. It holds the folder's lock too, in case that it outlives this one."""
    command = [sys.executable, "-m", "dvq.train", str(work.folder), "--data", str(data)]
    child = subprocess.Popen(command, pass_fds=() if work.lock is None else (work.lock,))
    earlier = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            try:
                code = child.wait(SYNC_SECONDS)
                break
            except subprocess.TimeoutExpired:
                work.check()
                run.sync_soon()
    finally:
        signal.signal(signal.SIGTERM, earlier)
        if work.lost:
            child.kill()
            child.wait()
    if code in INTERRUPTED:
        run.finish()
        sys.exit(INTERRUPTED[-1])
    if code == failures.UNUSABLE:
        run.finish()
        sys.exit(code)
    if code != 0 and state(work.folder).name != "failed":
        Events(work.folder).failure(failures.death(code))
    run.finish()


@contextmanager
def _step(folder: Path, name: str) -> Iterator[None]:
    diary = Events(folder)
    diary.state(name)
    try:
        yield
    except failures.UnusableError as error:
        diary.state("interrupted", failures.reason(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(failures.UNUSABLE)
    except Exception as error:
        traceback.print_exc()
        diary.failure(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def _open(model: Path) -> tuple[Trial, bool]:
    """The trial of a model's artifact, and whether it was trained (rather than failed)."""
    trial = make_trial(read_json(model / "trial.json") or {}, where=str(model))
    return trial, (model / "model.safetensors").exists()


def evaluate(data: Path, model: Path, evaluation: Path) -> dict[str, Any]:
    """Evaluate the model on every image of the trial's split; ``evaluation`` and the store get the result."""
    trial, trained = _open(model)
    with _working(trial) as work:
        result = read_json(work.folder / "evaluation.json")
        if trained and result is None:
            from dvq import device
            from dvq import load as load_model
            from dvq.evaluate import evaluate as judge
            from dvq.provenance import provenance

            device.keep_memory()
            with _step(work.folder, "evaluating"):
                place = device.pick()
                prepared, judged = load(data), load_model(model).to(place)
                prepared.check(trial)
                images, seen = prepared.evaluation(trial.split)[0], prepared.training(trial.split)[0]
                found = judge(judged, images, bound_samples=trial.bound_samples, training=seen)
                made_by = provenance(str(place))  # it may be another than trained it
                result = {"split": trial.split, **found, "provenance": made_by}
                write_json(work.folder / "evaluation.json", result)
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    write_json(evaluation, result or {})
    return {
        name: value
        for name, value in (result or {}).items()
        if isinstance(value, int | float)
        and math.isfinite(value)  # NaN is no JSON, which a cluster's KFP refuses
    }


def analyze(data: Path, model: Path, evaluation: Path, analysis: Path, experiment: str) -> None:
    """Analyze the codebooks and publish the trial's results, last of all; ``analysis`` gets all that is made."""
    trial, trained = _open(model)
    judged = read_json(evaluation)
    with _working(trial) as work:
        folder = work.folder
        if trained and judged and not (folder / "results.json").exists():
            with _step(folder, "analyzing"):
                _analyze(load(data), model, judged, folder, read_json(folder / "trial.json") or {})
            if (folder / "results.json").exists():
                Events(folder).state("finished")
        analysis.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "analysis.npz", "pictures.npz"):
            if (folder / name).exists():
                shutil.copy(folder / name, analysis / name)
        if (folder / "figures").exists():
            shutil.copytree(folder / "figures", analysis / "figures", dirs_exist_ok=True)
        TrialRun(folder, experiment).sync()


def _analyze(
    data: Data, model_path: Path, judged: dict[str, Any], folder: Path, document: dict[str, Any]
) -> None:
    import numpy as np

    from dvq import figures, pictures, style
    from dvq import load as load_model
    from dvq.analyze import analyze as analyze_codebooks

    model = load_model(model_path)
    data.check(model.trial)
    training = read_json(model_path / "training.json") or {}
    results = {
        "format": FORMAT,
        "name": document.get("name", model.trial.describe()),
        "key": model.trial.key(),
        "trial": values(model.trial),
        "data": data.info,
        "provenance": training.pop("provenance", {}),
        "training": training,
        "evaluation": judged,
        "curves": _curves(folder, f"{model.trial.split}/"),
        "probe": _curves(folder, "probe/"),
    }
    title = f"{results['name']}, {data.info['label']}"
    seen = pictures.take(model, data.evaluation(model.trial.split)[0])
    seen.save(folder / "pictures.npz")
    drawn = {"pictures": pictures.of_trial(seen, title)}
    if "usage" in judged:
        found = analyze_codebooks(model.latents.codebook.detach().numpy(), np.asarray(judged["usage"]))
        found.save(folder / "analysis.npz")
        drawn["explained_variance"] = figures.explained_variance(found, title)
        drawn["codebooks"] = figures.codebooks_3d(found, title)
        results["analysis"] = found.summary()
    for name, figure in drawn.items():
        style.save_png(figure, folder / "figures" / f"{name}.png")
    write_json(folder / "results.json", results)


def _curves(folder: Path, prefix: str) -> list[dict[str, float]]:
    """What was measured along training under names that begin with ``prefix``, from the events."""
    points = []
    for event in events.read(folder):
        numbers = event.get("values", {})
        found = {name.removeprefix(prefix): x for name, x in numbers.items() if name.startswith(prefix)}
        if found:
            points.append({"step": event["step"], **found})
    return points
