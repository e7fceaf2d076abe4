"""Checkpoints: everything that training needs to resume. Each is complete, or is not there.

``checkpoints/<step>/`` holds ``state.safetensors`` and ``checkpoint.json``: format, family, step, the sizes of
the event files at that moment, and the state's SHA-256. It is written under another name, synced and renamed; the
last two are kept, in case one is damaged later.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvq import DvqError, disk

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from."""

    step: int
    """steps done"""
    tensors: "dict[str, Tensor]"
    about: dict[str, Any]
    """what was given to :func:`write`"""


def place(folder: Path, step: int) -> Path:
    """Where in a trial's folder the checkpoint of a step is."""
    return folder / "checkpoints" / f"{step:09d}"


def write(folder: Path, step: int, tensors: "dict[str, Tensor]", about: dict[str, Any]) -> Path:
    """Write the checkpoint of ``step``, then remove all but the last two; its path.

    Raises:
        DvqError: it cannot be written (a full disk, say); the earlier ones are untouched.
    """
    from safetensors.torch import save

    path = place(folder, step)
    content = save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    document = {"format": FORMAT, "step": step, "sha256": digest, **about}
    try:
        with disk.whole(path) as partial:
            (partial / "state.safetensors").write_bytes(content)
            (partial / "checkpoint.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DvqError(
            f"checkpoint of step {step} cannot be written to {path.parent} ({error.strerror}); the last one "
            "is kept, and training goes on from it when there is room"
        ) from None
    leftovers = path.parent.glob(".*")  # partial ones, of processes that were killed
    for old in (*leftovers, *(place(folder, step) for step in steps(folder)[:-KEPT])):
        shutil.rmtree(old, ignore_errors=True)
    return path


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a trial's folder, ascending."""
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def latest(folder: Path, family: str) -> Checkpoint | None:
    """The last undamaged checkpoint, or None; a line is printed for each damaged one.

    Raises:
        DvqError: a checkpoint of another configuration, or of a format that this version does not read.
    """
    from safetensors.torch import load

    for step in reversed(steps(folder)):
        path = place(folder, step)
        try:
            about = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            content = (path / "state.safetensors").read_bytes()
            damage = "" if hashlib.sha256(content).hexdigest() == about["sha256"] else "its SHA-256 differs"
        except (OSError, ValueError, KeyError, TypeError) as error:
            damage = str(error)
        if damage:
            print(f"checkpoint {path} is damaged ({damage}); it is left out", flush=True)
            continue
        if about["format"] != FORMAT:
            raise DvqError(
                f"checkpoint {path} has format {about['format']}, and this version reads {FORMAT}; "
                "compute anew (FRESH=1, of a sweep that has it shorter too), or use the version that wrote it"
            )
        if about["family"] != family:
            raise DvqError(
                f"checkpoint {path} is of another configuration ({about['family']}, not {family}); "
                "compute anew (FRESH=1), or give the trial a folder of its own"
            )
        return Checkpoint(step, load(content), about)
    return None
