"""Where a trial's numbers come from, beside its configuration."""

import hashlib
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
    """The code's version, as git describes it, of uncommitted code with a hash of what differs from the commit,
    ``3aae92514113-dirty-1a2b3c4d``; "unknown" where there is no git, or no repository of this code."""
    try:
        # an error if this file is not git's: an environment may lie in another repository
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        version = _git("describe", "--always", "--dirty", "--abbrev=12").decode().strip()
        return f"{version}-{_changes()}" if version.endswith("-dirty") else version
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _changes() -> str:
    """8 hexadecimal digits of the SHA-256 over what differs from the commit, and over the modules of dvq and of
    components that git does not know."""
    digest = hashlib.sha256(_git("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv"))
    untracked = _git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "../components/*.py")
    for name in sorted(filter(None, untracked.split(b"\0"))):
        module = Path(__file__).parent / os.fsdecode(name)
        if module.is_file():  # an editor's lock is a link to nothing: .#config.py
            digest.update(name + b"\0" + module.read_bytes())
    return digest.hexdigest()[:8]


def _git(*arguments: str) -> bytes:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, check=True).stdout
