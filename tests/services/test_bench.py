"""The benchmarks that no other test runs a part of still run: they call what is inside the store and the tracking."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("store.py --rounds 1 --mib 1", r"\| down \| \d+ \| \d+ \| [\d.]+ "),
        ("tracking.py --steps 2 --rounds 1", r"hanging +held its caller for [\d.]+ ms"),
        ("scale.py --trials 8", r"report \d+ KiB"),
    ],
)
def test_a_benchmark_runs_to_its_end(command: str, told: str) -> None:
    name, *options = command.split()
    script = Path(__file__).parents[1] / "bench" / name
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(told, done.stdout)
