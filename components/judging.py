"""What evaluate and analyze do with a trained model; what is there already is not computed again."""

import hashlib
import math
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.artifacts import fail, read_artifact, working, working_on
from components.folder import FORMAT, read_json, state, write_json
from components.store import Store
from components.tracking import TrialRun
from dvq import DvqError, events, failures
from dvq.data import Data, load
from dvq.events import Events
from dvq.trial import Trial, values

DRAWN = 256
"""an autoregressive prior is sampled only up to this many positions, for it takes one after the other"""


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
        diary.failure(f"{name}: {failures.reason(error)}")


def evaluate(data: Path, model: Path, evaluation: Path, record: bool = False) -> dict[str, Any]:
    """Evaluate the model on every image of the trial's split; ``evaluation`` gets the result, and the store too if
    these are the trial's own images. For others, which have the same shape, there is no ``fitted_bits_per_dim``.

    Returns:
        the numbers among it that are finite.

    Raises:
        DvqError: no model, or no images that it takes; unless failures are recorded, why there is no result.
    """
    trial, trained = read_artifact(model)
    result, reason = None, "" if trained else f"{model}: it has no weights, for its training failed"
    images = _images(data, trial, "evaluating", record) if trained else None
    if images:
        with working_on(trial, images, model) as work:
            result = read_json(work.folder / "evaluation.json")
            if result is None:
                with _step(work.folder, "evaluating"):
                    result = _evaluate(images, model, trial)
                    write_json(work.folder / "evaluation.json", result)
                reason = "" if result else state(work.folder).reason
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    write_json(evaluation, result or {})
    fail(reason, record)
    numbers = {name: one for name, one in (result or {}).items() if isinstance(one, int | float)}
    # NaN is no JSON, which a cluster's KFP refuses.
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _evaluate(images: Data, model: Path, trial: Trial) -> dict[str, Any]:
    from dvq import autoregressive, device
    from dvq import load as load_model
    from dvq.evaluate import evaluate as judge
    from dvq.pictures import COLUMNS
    from dvq.provenance import provenance

    device.keep_memory()
    place = device.pick()
    loaded, split = load_model(model).to(place), trial.split
    seen = images.training(split)[0] if images.fits(trial) else None
    shown, samples, prior = images.evaluation(split)[0], trial.bound_samples, None
    if seen is not None and (steps := getattr(trial, "autoregressive_steps", 0)):
        prior = autoregressive.fit(loaded, seen, steps, seed=trial.seed)
    found = judge(loaded, shown, bound_samples=samples, training=seen, prior=prior)
    if prior and trial.positions <= DRAWN:
        found["samples"] = prior.sample(COLUMNS, loaded.generator(0)).tolist()
    made_by = provenance(str(place))  # may be other code, or another machine, than trained it
    return {"split": split, **found, "provenance": {**made_by, **_judged(images, model)}}


def _images(data: Path, trial: Trial, doing: str, record: bool) -> Data | None:
    """The prepared images, of the shape that the model takes; None if that fails and the failure is recorded."""
    try:
        found = load(data)
        found.check_shape(trial)
    except DvqError as error:
        fail(str(error), record)
        with working(trial) as work:
            Events(work.folder).failure(f"{doing}: {error}")
        return None
    return found


def _judged(images: Data, model: Path) -> dict[str, str]:
    """What an evaluation is of, by hashes."""
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    return {"data": images.info["fingerprint"], "weights": weights}


def analyze(
    data: Path, model: Path, evaluation: Path, analysis: Path, experiment: str, record: bool = False
) -> None:
    """Analyze the codebooks and publish the trial's results, last of all; ``analysis`` gets all that is made.

    Raises:
        DvqError: no model, or an evaluation of other images or weights; unless failures are recorded, why there are
            no results.
    """
    trial, trained = read_artifact(model)
    judged = read_json(evaluation)
    images, reason = _images(data, trial, "analyzing", record) if trained and judged else None, ""
    analysis.mkdir(parents=True, exist_ok=True)
    if not (images and judged):
        if record:
            with working(trial) as work:
                TrialRun(work.folder, experiment).sync()
        fail(f"{evaluation}: there is no evaluation of the model, for training or evaluation failed", record)
        return
    for what, one in _judged(images, model).items():
        if judged.get("provenance", {}).get(what) != one:
            raise DvqError(
                f"{evaluation}: the evaluation is of other {what}; give those that evaluate was given"
            )
    with working_on(trial, images, model) as work:
        folder = work.folder
        if not (folder / "evaluation.json").exists():  # it was evaluated without a store
            write_json(folder / "evaluation.json", judged)
        if not (folder / "results.json").exists():
            with _step(folder, "analyzing"):
                _analyze(images, model, judged, folder, read_json(folder / "trial.json") or {})
            if (folder / "results.json").exists():
                Events(folder).state("finished")
            else:
                reason = state(folder).reason
        _copy(folder, analysis)
        # What was judged apart from the store's trial is not its run's either.
        if images.fits(trial) and (work.lock is not None or Store.from_environment() is None):
            TrialRun(folder, experiment).sync()
    fail(reason, record)


def _copy(folder: Path, analysis: Path) -> None:
    """Copy what an analysis made, from the trial's folder to the artifact's."""
    for name in ("results.json", "analysis.npz", "patches.npz", "pictures.npz"):
        if (folder / name).exists():
            shutil.copy(folder / name, analysis / name)
    if (folder / "figures").exists():
        shutil.copytree(folder / "figures", analysis / "figures", dirs_exist_ok=True)


def _analyze(
    data: Data, model_path: Path, judged: dict[str, Any], folder: Path, document: dict[str, Any]
) -> None:
    import numpy as np

    from dvq import figures, patches, pictures, style
    from dvq import load as load_model
    from dvq.analyze import analyze as analyze_codebooks

    model = load_model(model_path)
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
    images = data.evaluation(model.trial.split)[0]
    seen = pictures.take(model, images, judged.get("samples"))
    seen.save(folder / "pictures.npz")
    drawn = {"pictures": pictures.of_trial(seen, title)}
    if "usage" in judged:
        found = analyze_codebooks(model.latents.codebook.detach().numpy(), np.asarray(judged["usage"]))
        found.save(folder / "analysis.npz")
        drawn["explained_variance"] = figures.explained_variance(found, title)
        drawn["codebooks"] = figures.codebooks_3d(found, title)
        stand_for = patches.take(model, images)
        stand_for.save(folder / "patches.npz")
        drawn["codes"] = patches.of_trial(stand_for, title)
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
