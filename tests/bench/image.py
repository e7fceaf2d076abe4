"""Seconds that `make image` takes after nothing changed, and after a line of dvq did: ``tests/bench/image.py``.

A copy of the checkout is changed, never the checkout; the images that this makes are removed.
"""

import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from pipeline import containers, image


def timed(folder: Path) -> tuple[float, str, int]:
    """Seconds, the tag, and how many steps of the Dockerfile were not in the daemon's cache."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pipeline.image"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    ran = told.count("---> Running in")
    return time.perf_counter() - began, told.split()[-1], ran


def main() -> None:
    client = containers.connect()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name, path in image.content().files.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(path.read_bytes())
        ignore = Path("docker/Dockerfile.dockerignore")
        (copy / ignore).write_bytes((image.ROOT / ignore).read_bytes())
        first, tag, _ = timed(copy)
        again, same, _ = timed(copy)
        assert same == tag
        with (copy / "dvq/__init__.py").open("a") as file:
            file.write(f"# {uuid.uuid4()}\n")
        changed, other, steps = timed(copy)
        assert other != tag
        client.images.remove(other)
        client.images.get(tag).tag("dvq", tag.rpartition(":")[2].rpartition("-")[0])
    print(
        f"unchanged {again:.1f} s; a line of dvq changed {changed:.1f} s ({steps} steps run); first {first:.1f} s"
    )


if __name__ == "__main__":
    main()
