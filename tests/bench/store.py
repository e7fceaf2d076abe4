"""The store's throughput next to plain boto3 transfers: ``python tests/bench/store.py`` (needs .venv/bin/weed).

A trial's checkpoint of one size, pushed to a SeaweedFS on this machine and fetched back, and the same file by boto3's
upload_file and download_file; interleaved in rounds, so that the machine's own changes of speed touch both alike. The
store's times hold what it does beyond the transfer: SHA-256 of all, both ways, and the manifest.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import boto3

from components.bucket import Bucket
from components.mirror import Mirror
from tests.services.conftest import SeaweedFS


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def round_of(bucket: Bucket, folder: Path, mib: int, number: int) -> dict[str, float]:
    """Seconds of each way, of a file with new content."""
    path = folder / "here" / "checkpoints" / "1" / "state"
    here = Mirror(bucket, f"trials/{number}", folder / "here")
    there = Mirror(bucket, f"trials/{number}", folder / str(number))
    here.claim()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(mib << 20))

    def fetch() -> None:
        there.adopt(there.read())
        there.fetch()

    plain, client = f"plain/{number}", boto3.client("s3")
    ways: dict[str, Callable[[], object]] = {
        "plain up": lambda: client.upload_file(str(path), bucket.name, plain),
        "store up": lambda: here.push(active=False),
        "plain down": lambda: client.download_file(bucket.name, plain, str(folder / "plain")),
        "store down": fetch,
    }
    names = ("plain up", "store up", "plain down", "store down")
    order = names if number % 2 else ("store up", "plain up", "store down", "plain down")
    spent = {name: timed(ways[name]) for name in order}
    assert (folder / str(number) / "checkpoints/1/state").read_bytes() == path.read_bytes()
    here.remove()
    client.delete_object(Bucket=bucket.name, Key=plain)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        server = SeaweedFS(Path(scratch) / "seaweed", "dvq")
        try:
            server.start()
            os.environ.update(server.environment())
            bucket = Bucket("s3://dvq")
            rounds = [round_of(bucket, Path(scratch), args.mib, number) for number in range(args.rounds + 1)][
                1:
            ]
        finally:
            server.kill()
    results = [compare(way, rounds, args.mib) for way in ("up", "down")]
    print("| way | plain boto3, MiB/s | store, MiB/s | ratio (min to max) |\n| --- | --- | --- | --- |")
    for one in results:
        ratio = one["ratio"]
        told = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        print(f"| {one['way']} | {one['plain']:.0f} | {one['store']:.0f} | {told} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def compare(way: str, rounds: list[dict[str, float]], mib: int) -> dict[str, Any]:
    """Median throughputs [MiB/s], and the store's against plain's, round by round."""
    plain, store = ([mib / one[f"{name} {way}"] for one in rounds] for name in ("plain", "store"))
    ratios = [b / a for a, b in zip(plain, store, strict=True)]
    ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {"way": way, "plain": statistics.median(plain), "store": statistics.median(store), "ratio": ratio}


if __name__ == "__main__":
    main()
