"""What is looked at before any work: each wrong input is one sentence on standard error and exit status 2."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from components.store import Store
from dvq import DvqError
from dvq.config import Sweep, load_sweep
from dvq.fingerprints import FINGERPRINTS
from pipeline.profile import Profile, find_profile

SWEEPS = Path(__file__).parent / "sweeps"
PLACES = ("local", "docker")


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turn a DvqError into its sentence and exit status 2."""
    try:
        yield
    except DvqError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def outputs() -> Path:
    """Where logs, and by default the store and MLflow's database, are: ``outputs`` in the current folder."""
    return Path("outputs").absolute()


def find_sweep(name: str) -> Sweep:
    """The sweep of that name in pipeline/sweeps, or in the YAML file at that path; its trials are valid."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
    else:
        path = SWEEPS / f"{name}.yaml"
        known = sorted(one.stem for one in SWEEPS.glob("*.yaml"))
        if name not in known:
            raise DvqError(
                f"no sweep is called '{name}'; known: {', '.join(known)}; or give a file, SWEEP=path.yaml"
            )
    sweep = load_sweep(path)
    trials = sweep.trials()
    data = sorted({trial.data for trial in trials.values()})
    if len(data) > 1:
        raise DvqError(
            f"sweep '{sweep.name}': its trials name several datasets ({', '.join(data)}); make a sweep for each"
        )
    return sweep


def set_environment() -> Store:
    """Where tasks keep and track what they do, unless the environment says so already; the store."""
    home = outputs()
    place = os.environ.get("DVQ_STORE") or str(home / "store")
    if "://" in place:
        raise DvqError(f"DVQ_STORE = '{place}': the store is a folder; give a path")
    os.environ["DVQ_STORE"] = str(Path(place).absolute())
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    return Store(os.environ["DVQ_STORE"])


def whole_number(name: str, text: str) -> int:
    """The number ≥ 1 in ``text``."""
    if not text.isdecimal() or int(text) < 1:
        raise DvqError(f"{name} = '{text}': give a whole number of at least 1")
    return int(text)


def check_place(place: str) -> None:
    if place not in PLACES:
        raise DvqError(f"ON = '{place}': a sweep runs on this machine, ON=local or ON=docker; kfp is to come")


def find_containers(profile_name: str) -> Profile:
    """The profile of the tasks' containers, with an image that is there: its own, or the one of this checkout."""
    from pipeline import containers, image

    profile = find_profile(profile_name)
    name = profile.image or image.content().tag()
    containers.check_image(name)
    return profile.model_copy(update={"image": name})


def check_data(name: str, source: str, store: Store) -> None:
    """DvqError unless the dataset is in the store or can be prepared from ``source``."""
    from dvq import data

    if not data.is_prepared(name, store.data(FINGERPRINTS[name])):
        data.check_source(name, source)


def check_writable(folder: Path, remedy: str) -> None:
    """DvqError, ending in ``remedy``, unless files can be made in ``folder``, which is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DvqError(f"the folder {folder} can't be written ({error.strerror}); {remedy}") from None
