"""Goodput: how much of what was computed was kept, and what interruptions cost."""

import json
from pathlib import Path
from typing import Any

from dvq import disk, events


def read(folder: Path) -> dict[str, Any]:
    """``attempts``, and ``steps_lost`` and ``seconds_lost`` to interruptions, of the trial in ``folder``.

    Lost work is told from the events, so of what was lost since the last point of the curves nothing is known.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "goodput.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {"attempts": 0, "steps_lost": 0, "seconds_lost": 0.0}
    return found


def begin(folder: Path, step: int) -> None:
    """Note an attempt that goes on from ``step``; what the events tell of later steps was computed in vain."""
    found = read(folder)
    told = list(events.read(folder))
    points = [event for event in told if event["kind"] == "metrics"]
    lost = [event for event in points if event["step"] > step]
    if lost:
        kept = [event["time"] for event in points if event["step"] <= step]
        found["steps_lost"] += lost[-1]["step"] - step
        # not while it lay still
        began = [event["time"] for event in told if event.get("state") == "training"]
        found["seconds_lost"] += max(0.0, lost[-1]["time"] - max([*kept, *began], default=lost[0]["time"]))
    found["attempts"] += 1
    disk.replace(folder / "goodput.json", json.dumps(found))
