"""What evaluate and analyze do with a trained model; existing results are not computed again."""

import hashlib
import math
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.artifacts import fail_unless_recorded, read_artifact, working, working_on
from components.folder import FORMAT, read_json, state, write_json
from components.tracking import TrialRun
from dvq import DvqError, events, failures
from dvq.data import Data, load
from dvq.events import Events
from dvq.trial import Trial, values

DRAWN = 256
"""an autoregressive prior draws position by position, so models with more positions than this are not sampled"""


@contextmanager
def _step(folder: Path, name: str, done: str) -> Iterator[None]:
    """Record the step ``name``, and its end as ``done`` or an error in it, in the trial's events."""
    log = Events(folder)
    log.state(name)
    try:
        yield
    except failures.UnusableError as error:
        log.state("interrupted", failures.reason(error))
        print(f"error: {error}", file=sys.stderr)
        sys.exit(failures.UNUSABLE)
    except Exception as error:
        traceback.print_exc()
        log.failure(f"{name}: {failures.reason(error)}")
    else:
        log.state(done)


def evaluate(data: Path, model: Path, evaluation: Path, record: bool = False) -> dict[str, Any]:
    """Evaluate the model on every image of the trial's split, and write the result to ``evaluation``; for the trial's
    own images also to the store. For other images of that shape there is no ``fitted_bits_per_dim``.

    Returns:
        the finite numbers of the result.

    Raises:
        DvqError: there is no model; or, unless failures are recorded, the images do not fit or the evaluation failed.
    """
    trial, trained = read_artifact(model)
    result, reason = None, "" if trained else f"{model}: it has no weights, for its training failed"
    images = _load_images(data, trial, "evaluating", record) if trained else None
    if images:
        with working_on(trial, images, model) as work:
            result = read_json(work.folder / "evaluation.json")
            if result is None:
                with _step(work.folder, "evaluating", "evaluated"):
                    result = _evaluate(images, model, trial, work.folder)
                    write_json(work.folder / "evaluation.json", result)
                reason = state(work.folder).reason
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    write_json(evaluation, result or {})
    fail_unless_recorded(reason, record)
    numbers = {name: value for name, value in (result or {}).items() if isinstance(value, int | float)}
    # NaN is no JSON, which a cluster's KFP refuses.
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _evaluate(images: Data, model: Path, trial: Trial, folder: Path) -> dict[str, Any]:
    from dvq import autoregressive, device
    from dvq import load as load_model
    from dvq.evaluate import evaluate as evaluate_model
    from dvq.pictures import COLUMNS
    from dvq.provenance import provenance

    device.keep_memory()
    place = device.pick()
    loaded, split = load_model(model).to(place), trial.split
    training = images.training(split)[0] if images.fits(trial) else None
    evaluation_images, samples, prior = images.evaluation(split)[0], trial.bound_samples, None
    if training is not None and (steps := getattr(trial, "autoregressive_steps", 0)):
        prior = autoregressive.fit(loaded, training, steps, seed=trial.seed)
        autoregressive.save(prior, folder / "model")
    evaluation = evaluate_model(
        loaded, evaluation_images, bound_samples=samples, training=training, prior=prior
    )
    if prior and trial.positions <= DRAWN:
        evaluation["samples"] = prior.sample(COLUMNS, loaded.generator(0)).tolist()
    made_by = provenance(str(place))  # may be other code, or another machine, than trained it
    return {"split": split, **evaluation, "provenance": {**made_by, **_digests(images, model)}}


def _load_images(data: Path, trial: Trial, doing: str, record: bool) -> Data | None:
    """The prepared images, of the shape that the model takes; None if there are none and that was recorded."""
    try:
        images = load(data)
        images.check_shape(trial)
    except DvqError as error:
        fail_unless_recorded(str(error), record)
        with working(trial) as work:
            Events(work.folder).failure(f"{doing}: {error}")
        return None
    return images


def _digests(images: Data, model: Path) -> dict[str, str]:
    """Hashes of the images and weights that an evaluation is of."""
    weights = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    return {"data": images.info["fingerprint"], "weights": weights}


def analyze(
    data: Path, model: Path, evaluation: Path, analysis: Path, experiment: str, record: bool = False
) -> None:
    """Analyze the codebooks, publish the trial's results and copy all to ``analysis``.

    Raises:
        DvqError: there is no model, or the evaluation is of other images or weights; or, unless failures are
            recorded, an earlier step or the analysis failed.
    """
    trial, trained = read_artifact(model)
    result = read_json(evaluation)
    images, reason = _load_images(data, trial, "analyzing", record) if trained and result else None, ""
    analysis.mkdir(parents=True, exist_ok=True)
    if not (images and result):
        if record:
            with working(trial) as work:
                TrialRun(work.folder, experiment).sync()
        reason = f"{evaluation}: there is no evaluation of the model, for training or evaluation failed"
        fail_unless_recorded(reason, record)
        return
    for name, digest in _digests(images, model).items():
        if result.get("provenance", {}).get(name) != digest:
            raise DvqError(
                f"{evaluation}: the evaluation is of other {name}; give those that evaluate was given"
            )
    with working_on(trial, images, model) as work:
        folder = work.folder
        if not (folder / "evaluation.json").exists():  # it was evaluated without a store
            write_json(folder / "evaluation.json", result)
        if not (folder / "results.json").exists():
            with _step(folder, "analyzing", "finished"):
                _analyze(images, model, result, folder, read_json(folder / "trial.json") or {})
            reason = state(folder).reason
        _copy_to_artifact(folder, analysis)
        if work.own:
            TrialRun(folder, experiment).sync()
    fail_unless_recorded(reason, record)


def _copy_to_artifact(folder: Path, analysis: Path) -> None:
    """Copy what an analysis made, from the trial's folder to the artifact's."""
    for name in ("results.json", "analysis.npz", "patches.npz", "pictures.npz"):
        if (folder / name).exists():
            shutil.copy(folder / name, analysis / name)
    if (folder / "figures").exists():
        shutil.copytree(folder / "figures", analysis / "figures", dirs_exist_ok=True)


def _analyze(
    data: Data, model_path: Path, evaluation: dict[str, Any], folder: Path, document: dict[str, Any]
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
        "evaluation": evaluation,
        "curves": _curves(folder, f"{model.trial.split}/"),
        "probe": _curves(folder, "probe/"),
    }
    title = f"{results['name']}, {data.info['label']}"
    images = data.evaluation(model.trial.split)[0]
    shown = pictures.take(model, images, evaluation.get("samples"))
    shown.save(folder / "pictures.npz")
    drawn = {"pictures": pictures.of_trial(shown, title)}
    if "usage" in evaluation:
        analysis = analyze_codebooks(model.latents.codebook.detach().numpy(), np.asarray(evaluation["usage"]))
        analysis.save(folder / "analysis.npz")
        drawn["explained_variance"] = figures.explained_variance(analysis, title)
        drawn["codebooks"] = figures.codebooks_3d(analysis, title)
        code_patches = patches.take(model, images)
        code_patches.save(folder / "patches.npz")
        drawn["codes"] = patches.of_trial(code_patches, title)
        results["analysis"] = analysis.summary()
    for name, figure in drawn.items():
        style.save_png(figure, folder / "figures" / f"{name}.png")
    write_json(folder / "results.json", results)


def _curves(folder: Path, prefix: str) -> list[dict[str, float]]:
    """The metrics along training whose names begin with ``prefix``, from the events."""
    points = []
    for event in events.read(folder):
        numbers = event.get("values", {})
        selected = {name.removeprefix(prefix): x for name, x in numbers.items() if name.startswith(prefix)}
        if selected:
            points.append({"step": event["step"], **selected})
    return points
