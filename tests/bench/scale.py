"""A sweep of a thousand trials: ``python tests/bench/scale.py [--trials 1000]``.

Seconds, and bytes, of what its launcher does: read and validate it, compile it for a cluster, plan it with a store in
which none, half or all of its trials are finished, and write the report.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import yaml

from components import reports
from components.store import Store
from dvq.config import overrides
from dvq.sweep import Sweep, load_sweep
from dvq.trial import values
from pipeline import cluster, forecast
from pipeline.profile import find_profile

FINISHED = Path(__file__).parents[1] / "fixtures/store-v1/trials/4ea7d39563b3c980-10"
T = TypeVar("T")


def timed(told: str, work: Callable[[], T]) -> T:
    """What ``work`` returns; its seconds are printed."""
    began = time.perf_counter()
    result = work()
    print(f"{told:32} {time.perf_counter() - began:6.2f} s", flush=True)
    return result


def write(path: Path, trials: int) -> None:
    """A sweep of that many trials."""
    grid = {"estimator": ["gs-soft", "vq-ema"], "num_codes": [128, 512], "num_latents": [4, 16]}
    path.write_text(
        yaml.safe_dump({"base": {"data": "cifar10-sample"}, "grid": grid, "seeds": list(range(trials // 8))})
    )


def finish(store: Store, sweep: Sweep) -> None:
    """Let the store have all of them, with the results of one, and codebooks of their own sizes."""
    result: dict[str, Any] = json.loads((FINISHED / "results.json").read_text())
    for name, trial in sweep.trials().items():
        folder = store.trial(trial.key())
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "events").mkdir()
        (folder / "events/000000.jsonl").write_bytes((FINISHED / "events/000000.jsonl").read_bytes())
        own = {**result, "name": name, "key": trial.key(), "trial": values(trial)}
        (folder / "results.json").write_text(json.dumps(own))
        with np.load(FINISHED / "analysis.npz") as found:
            np.savez(folder / "analysis.npz", **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    trials = parser.parse_args().trials
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "large.yaml")
        write(path, trials)
        os.environ["DVQ_STORE"] = f"{folder}/store"
        store = Store(f"{folder}/store")
        sweep = timed("read the sweep and validate it", lambda: load_sweep(path))
        timed("its trials", sweep.trials)
        profile = find_profile("nvidia").model_copy(update={"image": "dvq"})
        text = timed("compile it for a cluster", lambda: cluster.compiled(profile, 64, "s3://dvq/store"))
        items = json.dumps([overrides(point) for point in sweep.points()])
        print(f"compiled {len(text) / 1024:.0f} KiB, {trials} trials {len(items) / 1024:.0f} KiB")
        timed("plan it, nothing finished", lambda: forecast.plan(sweep.trials(), store, profile))
        finish(store, sweep)
        found = timed("plan it, all finished", lambda: forecast.plan(sweep.trials(), store, profile))
        assert found.states["finished"] == trials
        page = timed("report", lambda: reports.report(sweep.model_dump_json()))
        for one in list(sweep.trials().values())[::2]:
            (store.trial(one.key()) / "results.json").unlink()
        timed("plan it, half finished", lambda: forecast.plan(sweep.trials(), store, profile))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"report {page.stat().st_size / 1024:.0f} KiB; peak memory of all this {peak:.2f} GiB")


if __name__ == "__main__":
    main()
