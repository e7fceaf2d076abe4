"""Where the time of a training step goes, by kind of work: ``python tests/bench/where.py [--device cuda]``

The step runs operation by operation under PyTorch's profiler; each operation's own time (on a GPU that of its
kernels) counts for the first kind, of KINDS, that its name or the name of one it belongs to is of. On a GPU the step
as it is used, recorded and replayed, is timed as well: what it takes beyond its kernels are the gaps between them.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from training import SIZES, USUAL, case, ceiling, chosen_device, device_name, flops, seconds

from dvq.device import exact
from dvq.randomness import noise
from dvq.trainer import Trainer

KINDS = {
    "optimizer": ("Optimizer.",),
    "likelihood": ("_TiledNLL",),
    "latent variables": ("latents", "_Relaxed", "_Scored", "_LookUp"),
    "convolutions": ("convolution", "Convolution"),
    "normalization": ("batch_norm", "BatchNorm"),
}
OTHER = "other: ReLU, casts, sums"
GAPS = "between kernels"
PARTS = ("relax", "score", "codes", "vectors", "rate", "log_p", "follow", "revive", "signal")
"""of the latent variables, told to the profiler"""
STEPS = 10


def told(trainer: Trainer) -> Trainer:
    """The trainer, its latent variables' methods named for the profiler."""
    latents = trainer.model.latents
    for part in PARTS:
        method = getattr(latents, part, None)
        if method:
            setattr(latents, part, _named(method))
    return trainer


def _named(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def named(*args: Any, **options: Any) -> Any:
        with record_function("latents"):
            return method(*args, **options)

    return named


def kind(event: Any) -> str:
    """Of an operation, by its name and those of the operations that it belongs to, outermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for name in reversed(names):
        for found, marks in KINDS.items():
            if any(mark in name for mark in marks):
                return found
    return OTHER


def spent(events: Iterable[Any], on_gpu: bool) -> Counter[str]:
    """Seconds by kind."""
    times: Counter[str] = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            times[kind(event)] += own * 1e-6
    return times


def kernels(trainer: Trainer, steps: int = STEPS) -> Counter[str]:
    """Seconds a step by kind, the step run operation by operation."""
    device, one = trainer.device, trainer.trial
    on_gpu = device.type == "cuda"

    def step(at: int) -> None:
        trainer.advance(trainer.minibatch(at), noise(one.seed, at, device), at)

    step(0), step(1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        for at in range(2, steps + 2):
            step(at)
        if on_gpu:
            torch.cuda.synchronize()
    return Counter({name: time / steps for name, time in spent(found.events(), on_gpu).items()})


def where(size: str, estimator: str, batch: int, device: torch.device) -> dict[str, Any]:
    """The seconds of a step by kind, of the whole step, and its share of the ceiling."""
    one, images = case(size, estimator, batch)
    times = kernels(told(Trainer(one, images, device, torch.float32)))
    trainer = Trainer(one, images, device, torch.float32)
    count = 50 if device.type == "cuda" else 1
    rounds = [
        seconds(lambda turn=turn: [trainer.step(turn * count + at) for at in range(count)], device) / count
        for turn in range(4)
    ][1:]
    whole = statistics.median(rounds)
    if device.type == "cuda":
        times[GAPS] = whole - sum(times.values())
    best = max(ceiling(size, device) for _ in range(4))
    return {
        "size": size,
        "estimator": estimator,
        "seconds_a_step": whole,
        "images_per_second": batch / whole,
        "share_of_ceiling": flops(size, estimator, 4) * batch / whole / best,
        "seconds_by_kind": dict(times.most_common()),
    }


def markdown(found: list[dict[str, Any]]) -> str:
    names = [*KINDS, OTHER, *([GAPS] if any(GAPS in one["seconds_by_kind"] for one in found) else [])]
    lines = [f"| | images/s | of the ceiling | ms a step | {' | '.join(names)} |"]
    lines.append("| --- |" + " --- |" * (len(names) + 3))
    for one in found:
        each = " | ".join(f"{one['seconds_by_kind'].get(name, 0) * 1e3:.2f}" for name in names)
        lines.append(
            f"| {one['estimator']}, {one['size']} | {one['images_per_second']:.0f} "
            f"| {one['share_of_ceiling']:.0%} | {one['seconds_a_step'] * 1e3:.2f} | {each} |"
        )
    return "\n".join(lines) + "\n"


@exact()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--batch", type=int, help="16 on a CPU, 64 on a GPU")
    parser.add_argument("--estimators", nargs="+", default=["gs-soft", "vq-ema", "vimco"])
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, help="those of 64 maps on a CPU, of 256 in bfloat16 on a GPU"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/where"), help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    on_gpu = args.device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine")
    args.device = chosen_device(args.device)
    batch = args.batch or (64 if on_gpu else 16)
    sizes = args.sizes or USUAL[args.device.type]
    found = [where(size, name, batch, args.device) for size in sizes for name in args.estimators]
    about = {"device": device_name(args.device), "torch": torch.__version__, "batch": batch, "steps": found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    text = f"{about['device']}, torch {about['torch']}, batch {batch}; ms a step\n\n{markdown(found)}"
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
