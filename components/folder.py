"""A trial's folder: its beginning, its state, and its JSON files."""

import json
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvq import DvqError, checkpoint, disk, events
from dvq.trial import Trial, values

FORMAT = 1
"""The version of a trial's folder."""


@dataclass(frozen=True)
class State:
    """A trial's state: new, interrupted, failed or finished."""

    name: str = "new"
    reason: str = ""
    """why it failed, or was interrupted because the machine could not compute"""
    step: int = 0
    """of the last checkpoint, from which training would go on"""


def state(folder: Path) -> State:
    """The state of the trial in ``folder``, read from what is there."""
    if (folder / "results.json").exists():
        return State("finished")
    step = max(checkpoint.steps(folder), default=0)
    current = State("interrupted", step=step) if (folder / "checkpoints").exists() else State("new")
    for event in events.read(folder):
        if event["kind"] == "failure":
            current = State("failed", event["reason"], step)
        elif event["kind"] == "state" or current.name == "new":
            current = State("interrupted", event.get("reason", ""), step)
    return current


def begin(folder: Path, trial: Trial, name: str, shorter: Path | None = None) -> None:
    """Prepare the trial's folder: an existing one stays as it is, a new one gets a ``shorter`` trial's checkpoints.

    Raises:
        DvqError: the folder was written by a version with another format, or, as the shorter trial's, with another
            default of a field.
    """
    document = read_json(folder / "trial.json")
    if document is not None:
        if document["format"] != FORMAT:
            raise DvqError(
                f"{folder} has format {document['format']}, and this version reads {FORMAT}; "
                "compute anew (FRESH=1), or use the version that wrote it"
            )
        check_values(trial, document)
        return
    if shorter:
        check_values(trial, read_json(shorter / "trial.json") or {})
    clear(folder)
    folder.mkdir(parents=True)
    if shorter:
        _copy_progress(shorter, folder)
    for step in checkpoint.steps(folder):
        if step > trial.steps:
            shutil.rmtree(checkpoint.place(folder, step))
    _drop_events_after_last_checkpoint(folder)
    document = {
        "format": FORMAT,
        "name": name,
        "key": trial.key(),
        "attempt": uuid.uuid4().hex,
        "trial": values(trial),
    }
    write_json(folder / "trial.json", document)


def check_values(trial: Trial, document: Mapping[str, Any]) -> None:
    """DvqError if a default was edited since ``document`` was written, which the key does not show.

    Args:
        trial: the trial as it is now.
        document: the trial.json or results.json of ``trial``, or of a shorter one of its family. A field that only
            one of the two has was added or removed since, and changes nothing.
    """
    stored = document.get("trial", {})
    free = {"steps", "autoregressive_steps", *trial.unkeyed(), *trial.changed()}
    for field, value in values(trial).items():
        if field not in free and stored.get(field, value) != value:
            raise DvqError(
                f"trial {document.get('key', trial.key())}: it was computed with {field} {stored[field]}, and the "
                f"default is {value} now; FRESH=1 computes it anew"
            )


def _copy_progress(shorter: Path, folder: Path) -> None:
    """Copy what training goes on from: checkpoints first, since the files that they rely on only grow."""
    for part in ("checkpoints", "images", "events"):
        if (shorter / part).exists():
            try:
                shutil.copytree(shorter / part, folder / part, ignore=shutil.ignore_patterns(".*"))
            except shutil.Error as error:
                raise DvqError(_copy_failure(shorter, [str(why) for *_, why in error.args[0]])) from None


def _copy_failure(shorter: Path, reasons: list[str]) -> str:
    """Why a shorter trial's files could not be copied."""
    other_reasons = [why for why in reasons if "No such file" not in why]
    if other_reasons:
        return f"{shorter} cannot be copied, to go on from it ({other_reasons[0]})"
    return f"{shorter} changed while it was copied, for it is in training; the same command tries again"


def clear(folder: Path) -> None:
    """Remove a trial's folder, if it is there. It is renamed first: what a process that is killed meanwhile leaves of
    it would pass for the trial, finished even."""
    removed = folder.with_name(f".{folder.name}.removed")
    try:
        if removed.exists():  # of a process that was killed
            shutil.rmtree(removed)
        if folder.exists():
            folder.rename(removed)
            shutil.rmtree(removed)
    except OSError as error:
        raise DvqError(f"{error.filename or folder} cannot be removed ({error.strerror})") from None


def _drop_events_after_last_checkpoint(folder: Path) -> None:
    """Remove the events after the last checkpoint, among them the end of the shorter trial."""
    for step in checkpoint.steps(folder)[-1:]:
        with suppress(DvqError):  # damaged: training goes on from the one before, and says so
            document = read_json(checkpoint.place(folder, step) / "checkpoint.json") or {}
            events.truncate(folder, document.get("events", {}))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at ``path``, None if there is no such file; DvqError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise damaged(path, "it is a folder") from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return content


def damaged(path: Path, why: str) -> DvqError:
    """The error for a damaged file of a trial's folder."""
    return DvqError(f"{path}: damaged ({why}); delete this trial's folder to compute it anew")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the JSON object to ``path``, completely or not at all."""
    disk.replace(path, json.dumps(content, indent=1) + "\n")
