"""From a trial's folder to its model's artifact, and back.

A step works in the trial's folder in the store, where the other steps find its results. Without a store, or with
other weights or images than the trial's own, it works in a temporary folder: only a trial's own results are kept
under its key.
"""

import filecmp
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.folder import read_json, write_json
from components.store import Store, Work
from dvq import DvqError
from dvq.config import trial as make_trial
from dvq.data import Data
from dvq.trial import Trial, values

HISTORY = ("events", "images")
"""the folders that tell how training went"""
RUN = "run.json"
"""the artifact's copy of trial.json in the trial's folder, with the trial's name and attempt"""


def make_artifact(folder: Path, trial: Trial, model: Path) -> None:
    """Make the model's artifact: ``trial.json``, the weights if there are any, and, without a store from which the
    next steps could take it, how training went."""
    model.mkdir(parents=True, exist_ok=True)
    if (folder / "model").exists():
        shutil.copytree(folder / "model", model, dirs_exist_ok=True)
    else:
        write_json(model / "trial.json", values(trial))
    if Store.from_environment() is None and (folder / "trial.json").exists():
        shutil.copy(folder / "trial.json", model / RUN)
        for part in HISTORY:
            if (folder / part).exists():
                shutil.copytree(folder / part, model / part, dirs_exist_ok=True)


def fail_unless_recorded(reason: str, record: bool) -> None:
    """Raise ``reason`` if there is one, unless failures are recorded instead (``record``) and a store holds them."""
    if reason and not (record and Store.from_environment()):
        raise DvqError(reason)


def read_artifact(model: Path) -> tuple[Trial, bool]:
    """The trial of a model's artifact, and whether it was trained (rather than failed)."""
    fields = read_json(model / "trial.json")
    if fields is None:
        raise DvqError(f"{model}: no model here: trial.json is missing; give what train made")
    return make_trial(fields, where=str(model)), (model / "model.safetensors").exists()


@contextmanager
def working(trial: Trial) -> Iterator[Work]:
    """The trial's folder in the store, or a temporary one if there is no store."""
    store = Store.from_environment()
    if store is None:
        with tempfile.TemporaryDirectory(prefix="dvq-trial-") as folder:
            yield Work(Path(folder))
    else:
        with store.working(trial.key()) as work:
            yield work


@contextmanager
def working_on(trial: Trial, data: Data, model: Path) -> Iterator[Work]:
    """The trial's folder in the store, if ``model`` and ``data`` are the trial's own; else a temporary one with the
    artifact's content."""
    store, own_images = Store.from_environment(), data.fits(trial)
    if store and own_images:
        store.look([trial.key()])
        if store.has(trial.key(), "model"):
            with store.working(trial.key()) as work:
                if _same(work.folder / "model", model):
                    yield work
                    return
            print(
                f"{model}: not the weights that the store has of trial {trial.key()}; judged apart",
                flush=True,
            )
    with tempfile.TemporaryDirectory(prefix="dvq-trial-") as scratch:
        folder = Path(scratch)
        for part in HISTORY:
            if (model / part).exists():
                shutil.copytree(model / part, folder / part)
        shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns(RUN, *HISTORY))
        if (model / RUN).exists():
            shutil.copy(model / RUN, folder / "trial.json")
        yield Work(folder, own=own_images and store is None)


def _same(model: Path, other: Path) -> bool:
    weights = (model / "model.safetensors", other / "model.safetensors")
    return all(path.exists() for path in weights) and filecmp.cmp(*weights, shallow=False)
