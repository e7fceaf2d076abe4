"""How training ends badly, in one sentence each: what its process raised, or how it died."""

import signal
import traceback
from pathlib import Path

from dvq import DvqError

CGROUP = Path("/sys/fs/cgroup")
UNUSABLE = 69
"""the exit code of a process whose machine cannot compute (EX_UNAVAILABLE in sysexits.h)"""


class UnusableError(DvqError):
    """This machine cannot compute, whatever the trial: the task fails, so that the next trials are not sent here
    too."""


def reason(error: Exception) -> str:
    """One sentence for a trial's record."""
    import torch  # which takes seconds

    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, DvqError):
        return first
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first:
        memory = first.partition("can't allocate memory: ")[2] or first[:160]
        return (
            f"out of memory: {memory}; use a smaller batch_size, num_codes or features, or a larger machine"
        )
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(Path(__file__).parent)]
    estimators = [frame for frame in ours if Path(frame.filename).parent.name == "estimators"]
    at = (estimators or ours)[-1:]  # an estimator's own line, though it was raised deeper
    place = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in at)
    return f"{type(error).__name__}: {first}{place}"


def death(code: int) -> str:
    """One sentence for how a process ended that could not report it itself."""
    if code == -signal.SIGKILL:
        cause = _memory_limit() or "most often the machine or container was out of memory"
        return f"training was killed by SIGKILL: {cause}"
    if code < 0:
        known = -code in set(signal.Signals)  # most of the real-time ones have no name
        return f"training was killed by {signal.Signals(-code).name if known else f'signal {-code}'}"
    return f"training ended with exit code {code}; its output is in the log"


def _memory_limit() -> str:
    """What to say if this container's memory limit killed a process, which the kernel counts; else empty."""
    for events_file, limit in (
        ("memory.events", "memory.max"),
        ("memory/memory.oom_control", "memory/memory.limit_in_bytes"),
    ):
        try:
            counts = dict(line.split() for line in (CGROUP / events_file).read_text().splitlines())
            bytes_allowed = (CGROUP / limit).read_text().strip()
        except (OSError, ValueError):
            continue
        if int(counts.get("oom_kill", 0)) and bytes_allowed.isdecimal() and int(bytes_allowed) < 2**60:
            return f"out of memory, over the container's limit of {int(bytes_allowed) / 2**20:.0f} MiB"
    return ""
