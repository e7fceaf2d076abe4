"""Goodput: how much of what was computed was kept, and what interruptions cost."""

import json
from pathlib import Path
from typing import Any

from dvq import disk, events


def read(folder: Path) -> dict[str, Any]:
    """``attempts``, and ``steps_lost`` and ``seconds_lost`` to interruptions, of the trial in ``folder``.

    Lost work is inferred from the events, so what was lost after the last point of the curves is not counted.
    """
    try:
        recorded: dict[str, Any] = json.loads((folder / "goodput.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {"attempts": 0, "steps_lost": 0, "seconds_lost": 0.0}
    return recorded


def begin(folder: Path, step: int) -> None:
    """Record an attempt that resumes from ``step``; later steps that the events tell of were computed in vain."""
    totals = read(folder)
    history = list(events.read(folder))
    points = [event for event in history if event["kind"] == "metrics"]
    lost = [event for event in points if event["step"] > step]
    if lost:
        useful = [event["time"] for event in points if event["step"] <= step]
        totals["steps_lost"] += lost[-1]["step"] - step
        # not the time when nothing ran
        began = [event["time"] for event in history if event.get("state") == "training"]
        totals["seconds_lost"] += max(0.0, lost[-1]["time"] - max([*useful, *began], default=lost[0]["time"]))
    totals["attempts"] += 1
    disk.replace(folder / "goodput.json", json.dumps(totals))
