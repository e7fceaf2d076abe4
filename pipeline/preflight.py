"""Checks before any work: a wrong input is a DvqError, with which the command ends (pipeline/command.py)."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

from components import datasets, mlflow_server
from components.store import Store
from dvq import DvqError, data, own
from dvq.fingerprints import FINGERPRINTS
from dvq.sweep import LONGEST, Sweep, load_sweep
from pipeline.command import outputs
from pipeline.profile import DEFAULTS
from pipeline.stack import Stack

SWEEPS = Path(__file__).parent / "sweeps"
SIGNED = re.compile(r"[?&][^=&]*(signature|sig|token|secret)=", re.IGNORECASE)
"""in an address that is a password itself"""


def find_sweep(name: str) -> Sweep:
    """The sweep of that name in pipeline/sweeps, in the YAML file at that path, or of the one trial of a file in
    pipeline/results; DvqError if a trial is not valid."""
    if name.endswith((".yaml", ".yml", ".json")) or "/" in name:
        path = Path(name)
    else:
        path = SWEEPS / f"{name}.yaml"
        names = sorted(file.stem for file in SWEEPS.glob("*.yaml"))
        if name not in names:
            raise DvqError(
                f"no sweep is called '{name}'; known: {', '.join(names)}; or give a file, SWEEP=path.yaml"
            )
    sweep = sweep_of_results(path) if path.suffix == ".json" else load_sweep(path)
    trials = sweep.trials()
    for field in ("data", "split"):
        found = sorted({str(getattr(trial, field)) for trial in trials.values()})
        if len(found) > 1:
            raise DvqError(
                f"sweep '{sweep.name}': its trials differ in '{field}' ({', '.join(found)}), and do not compare; "
                "make a sweep for each"
            )
    return sweep


def sweep_of_results(path: Path) -> Sweep:
    """A sweep of the one trial whose results are in ``path``."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["trial"]
        seed = fields.pop("seed")
        return Sweep(
            name=re.sub("[^a-z0-9]+", "-", path.stem)[:LONGEST], base=fields, include=[{}], seeds=[seed]
        )
    except OSError as error:
        raise DvqError(f"results file {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DvqError(
            f"results file {path}: it holds no trial; give a file that make results wrote"
        ) from None


def find_store() -> Store:
    """The store. Sets the environment variables that lead tasks to it and to MLflow, unless they are set."""
    home = outputs()
    for name, value in Stack(home / "stack").environment().items():
        os.environ.setdefault(name, value)
    place = os.environ.get("DVQ_STORE") or str(home / "store")
    if ":/" in place and not place.startswith("s3://"):
        raise DvqError("DVQ_STORE: the store is a folder or s3://bucket/prefix; give one of these")
    os.environ["DVQ_STORE"] = place if place.startswith("s3://") else _absolute(place)
    os.environ["DVQ_CACHE"] = _absolute(os.environ.get("DVQ_CACHE") or str(home / "cache"))
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    if file := mlflow_server.database():  # a container has another working folder
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{file.absolute()}"
    store = Store.from_environment()
    assert store
    store.check()
    return store


def _absolute(folder: str) -> str:
    return str(Path(os.path.expanduser(folder)).absolute())


def check_begun(sweep: Sweep, store: Store, name: str) -> None:
    """DvqError if the store has nothing of the sweep, which the user called ``name``."""
    keys = [trial.key() for trial in sweep.trials().values()]
    store.look(keys)
    if all(store.state(key).name == "new" for key in keys):
        raise DvqError(
            f"the store {store.place} has none of the trials of sweep '{sweep.name}'; make submit-sweep SWEEP={name} "
            "computes them"
        )


def whole_number(name: str, text: str, most: int) -> int:
    """The number from 1 to ``most`` in ``text``."""
    if not text.isdecimal() or len(text) > len(str(most)) or not 1 <= int(text) <= most:
        raise DvqError(f"{name} = '{text}': give a whole number from 1 to {most}")
    return int(text)


def hours(text: str) -> float | None:
    """BUDGET in hours; None if there is none."""
    try:
        number = float(text) if text else None
    except ValueError:
        number = -1.0
    if number is not None and not 0 < number < float("inf"):
        raise DvqError(f"BUDGET = '{text}': give a number of hours")
    return number


def check_place(place: str) -> None:
    places = ("local", *DEFAULTS)
    if place not in places:
        raise DvqError(f"ON = '{place}': a sweep runs ON={', ON='.join(places)}")


def find_source(source: str, name: str) -> str:
    """The source of the dataset: DATA, as an absolute path if it is a path. Prints a warning if it is given for the
    sample, which needs none. DvqError for images of one's own, if the sweep is on others."""
    if mlflow_server.redacted(source) != source or SIGNED.search(source):
        raise DvqError(
            "DATA has a password or signature in its address, which logs would show; fetch it, and give the file"
        )
    if source.endswith(".npz") and name in FINGERPRINTS:
        raise DvqError(
            f"DATA={source}: images of your own, and the sweep is on {name}; make data DATA={source} says what to "
            "write as 'data' in its base"
        )
    if source and name == "cifar10-sample":
        print(
            "warning: DATA is not used, for this sweep is on the bundled sample of CIFAR-10; on all of it are those "
            "with 'data: cifar10' in their base",
            file=sys.stderr,
        )
        return ""
    path = Path(os.path.expanduser(source))
    return str(path.absolute()) if source and path.exists() else source


def check_data(name: str, source: str, store: Store) -> None:
    """DvqError unless the dataset is in the store or can be prepared from ``source``; or if ``source`` are other
    images."""
    if store.has_data(name):
        if name not in FINGERPRINTS and Path(source).is_file():  # it may have been edited since
            own.check(name, source)
        return
    if source.startswith("s3://"):
        datasets.check(source)
    else:
        data.check_source(name, source)


def check_cache(store: Store) -> None:
    """DvqError unless the store's folder on this machine can be written."""
    check_writable(store.root, "set DVQ_STORE, or DVQ_CACHE for a store in S3, to a folder that can")


def check_writable(folder: Path, remedy: str) -> None:
    """DvqError, ending in ``remedy``, unless files can be made in ``folder``, which is created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DvqError(f"the folder {folder} can't be written ({error.strerror}); {remedy}") from None
