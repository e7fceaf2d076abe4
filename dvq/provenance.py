"""Where a trial's numbers come from, beside its configuration."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def provenance(device: str) -> dict[str, Any]:
    """What decides the numbers beside the configuration: code, library, kernels, machine."""
    import torch

    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = ", ".join(filter(None, (processor(), torch.backends.cpu.get_cpu_capability())))
    return {
        "commit": os.environ.get("DVQ_COMMIT") or commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """The processor's model; empty where the system does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str:
    """The code's version, as git describes it; "unknown" where there is no git, or no repository of this code."""
    file = Path(__file__)
    here = ("ls-files", "--error-unmatch", file.name)  # an environment may lie in another repository
    try:
        for ask in (here, ("describe", "--always", "--dirty", "--abbrev=12")):
            command = ["git", "-C", str(file.parent), *ask]
            told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told
