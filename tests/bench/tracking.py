"""What tracking costs a training step: ``python tests/bench/tracking.py``.

Seconds of a training step (its own clock, in training.json) without tracking, with MLflow's sqlite database, and with
a server that takes connections and never answers, interleaved in rounds; as ratios to the step without tracking. Then
the longest that the process beside training was held by a look at what there is to send.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from components import trials
from components.tracking import TrialRun
from dvq import data
from dvq.events import Events

BASE: dict[str, Any] = {
    "data": "cifar10-sample",
    "features": 8,
    "num_latents": 2,
    "num_codes": 16,
    "code_dim": 16,
    "batch_size": 16,
    "bound_samples": 1,
    "log_every": 1,
    "evaluate_every": 100_000,
}


def step_seconds(folder: Path, prepared: Path, steps: int, tracking: str) -> float:
    """Of a trial that is trained from the beginning, with a point of its curves at every step."""
    os.environ["MLFLOW_TRACKING_URI"] = tracking
    os.environ["DVQ_STORE"] = str(folder / "store")
    trials.train(
        "estimator=gs-soft", json.dumps({**BASE, "steps": steps}), prepared, folder / "model", "bench"
    )
    summary = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
    return float(summary["seconds"] / summary["steps"])


def held(folder: Path, tracking: str) -> float:
    """The longest that one of 1,000 calls took, each after a new point [s]."""
    os.environ["MLFLOW_TRACKING_URI"] = tracking
    (trial,) = (folder / "store" / "trials").glob("[!.]*")  # beside its lock
    run, diary, longest = TrialRun(trial, "held"), Events(trial), 0.0
    for step in range(1_000):
        diary.metrics(step, {"train/rate": 0.0})
        began = time.perf_counter()
        run.sync_soon()
        longest = max(longest, time.perf_counter() - began)
        time.sleep(0.002)
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with (
        tempfile.TemporaryDirectory() as scratch,
        socket.create_server(("127.0.0.1", 0), backlog=64) as silent,
    ):
        home = Path(scratch)
        data.prepare("cifar10-sample", "", home / "data")
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variants = {"without": "", "sqlite": f"sqlite:///{home / 'mlflow.db'}", "hanging": hanging}
        found: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(args.rounds):
            for name, address in variants.items():
                folder = home / f"{name}-{number}"
                found[name].append(step_seconds(folder, home / "data", args.steps, address))
        print(
            f"a step without tracking: {1000 * statistics.median(found['without']):.2f} ms, a point at every step"
        )
        for name in ("sqlite", "hanging"):
            ratios = [one / plain for one, plain in zip(found[name], found["without"], strict=True)]
            shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name:8} × {statistics.median(ratios):.2f} (rounds: {shown})")
        for name in ("sqlite", "hanging"):
            print(
                f"{name:8} held its caller for {1000 * held(home / f'{name}-0', variants[name]):.2f} ms at most"
            )


if __name__ == "__main__":
    main()
