"""A trial's events: what happened and what was measured, as lines of JSON appended to numbered files.

``events/000000.jsonl``, ``events/000001.jsonl``, …: every process that appends opens the next file, so that no two
ever write to the same one. A line is ``{"kind": …, "time": seconds since 1970, …}``:

- ``state``: ``state`` is training, interrupted, evaluating, evaluated, analyzing or finished; ``pid`` of the process;
  and, of an interruption because the machine cannot compute, the ``reason``
- ``metrics``: ``step`` and ``values`` {name: number}
- ``failure``: ``reason``, one sentence
- ``image``: ``step``, ``name`` and ``path`` (relative to the trial's folder) of a picture
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Events:
    """Appends to the next numbered file of ``folder``/events; each line is flushed as it is written."""

    def __init__(self, folder: Path) -> None:
        directory = folder / "events"
        directory.mkdir(parents=True, exist_ok=True)
        number = max((int(path.stem) for path in directory.glob("[0-9]*.jsonl")), default=-1) + 1
        self._file = (directory / f"{number:06d}.jsonl").open("x", encoding="utf-8")

    def _append(self, **event: Any) -> None:
        self._file.write(json.dumps({"time": time.time(), **event}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all is on the disk."""
        os.fsync(self._file.fileno())

    def state(self, state: str, reason: str = "") -> None:
        self._append(kind="state", state=state, pid=os.getpid(), **({"reason": reason} if reason else {}))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._append(kind="metrics", step=step, values=values)

    def failure(self, reason: str) -> None:
        self._append(kind="failure", reason=reason)

    def image(self, step: int, name: str, path: str) -> None:
        self._append(kind="image", step=step, name=name, path=path)


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of the trial in ``folder``, oldest first; a line that is still being written, or damaged, is left
    out."""
    return Tail(Path(folder)).fresh()


class Tail:
    """A reader of a trial's events as they are appended: each look returns what is new since the last."""

    def __init__(self, folder: Path) -> None:
        self._directory = folder / "events"
        self._read: dict[Path, int] = {}  # bytes

    def fresh(self) -> Iterator[dict[str, Any]]:
        read, self._read = self._read, {}  # files that are gone are forgotten: a new attempt begins anew
        for path in sorted(self._directory.glob("[0-9]*.jsonl")):
            self._read[path] = read.get(path, 0)
            for line in _lines(path, self._read[path]):
                self._read[path] += len(line)
                with contextlib.suppress(ValueError):  # damaged, or the file was replaced meanwhile
                    yield json.loads(line)


def _lines(path: Path, start: int) -> Iterator[bytes]:
    """The whole lines from byte ``start`` on, one in memory at a time; the rest is still being written."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # gone: the trial starts again
        file.seek(start)
        yield from (line for line in file if line.endswith(b"\n"))


def sizes(folder: Path) -> dict[str, int]:
    """The files of events and their sizes: a place that :func:`truncate` can go back to."""
    return {path.name: path.stat().st_size for path in sorted((folder / "events").glob("[0-9]*.jsonl"))}


def truncate(folder: Path, to: dict[str, int]) -> None:
    """Forget all events after a place that :func:`sizes` gave. Files of later events stay, empty, so that no number
    is used twice: whoever follows the files would take a new one for one that it has read."""
    for path in sorted((folder / "events").glob("[0-9]*.jsonl"), reverse=True):
        os.truncate(path, min(path.stat().st_size, to.get(path.name, 0)))  # a larger size would append zeros
