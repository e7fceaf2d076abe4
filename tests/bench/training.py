"""Training's speed and memory against the plain version and vector-quantize-pytorch: ``make bench``.

All variants make their steps in turn, round by round in one process, so that the machine's own changes of speed touch
all alike: on a CPU process time of one step on one thread, on a GPU wall time of 20, synchronized. A ratio is made
within a round. The share of the ceiling is the model's own FLOPs (PyTorch's counter on the plain version, forward and
backward) in that time over the fastest large matrix product of the same run: float32, or bf16
where a size says so, as on a GPU it does unless others are asked for (for a CPU with AMX or AVX512-BF16:
`--sizes "bfloat16 F=256 K=8 C=512"`); then PyTorch's autocast is a variant too.
dvq's steps flush denormal numbers, as its training does; the others leave PyTorch as it begins.
"""

import argparse
import functools
import gc
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import LIBRARY, PLAIN, Library, Plain
from torch.utils.flop_counter import FlopCounterMode

from dvq.config import trial
from dvq.device import exact, pick
from dvq.trainer import Trainer
from dvq.trial import Trial

SIZES = {
    "F=64 K=8 C=512": {"features": 64, "num_latents": 8, "num_codes": 512, "code_dim": 16},
    "F=64 K=16 C=512": {"features": 64, "num_latents": 16, "num_codes": 512, "code_dim": 16},
    "F=256 K=8 C=128": {"features": 256, "num_latents": 8, "num_codes": 128, "code_dim": 32},
    "F=256 K=8 C=512": {"features": 256, "num_latents": 8, "num_codes": 512, "code_dim": 32},
    "F=256 K=16 C=128": {"features": 256, "num_latents": 16, "num_codes": 128, "code_dim": 32},
    "F=256 K=16 C=512": {"features": 256, "num_latents": 16, "num_codes": 512, "code_dim": 32},
}
BFLOAT16 = "bfloat16 "  # a size's prefix
FLOAT32 = {"precision": "float32", "cpu_precision": "float32"}
USUAL = {"cpu": list(SIZES)[:2], "cuda": [BFLOAT16 + size for size in list(SIZES)[2:]]}
SIZES |= {size: {**fields, **FLOAT32} for size, fields in SIZES.items()} | {
    size: {**SIZES[size.removeprefix(BFLOAT16)], **dict.fromkeys(FLOAT32, "bfloat16")}
    for size in USUAL["cuda"]
}
LEVELS = {128: (8, 4, 4), 512: (8, 8, 8)}  # FSQ's for a size's C
Step = Callable[[int], object]


def case(size: str, estimator: str, batch: int) -> tuple[Trial, np.ndarray]:
    other = {"gaussian": ["num_codes"], "fsq": ["num_codes", "code_dim"]}.get(estimator, [])
    fields = {name: x for name, x in SIZES[size].items() if name not in other}
    fields |= {"levels": LEVELS[SIZES[size]["num_codes"]]} if estimator == "fsq" else {}
    one = trial({**fields, "estimator": estimator, "data": "cifar10-sample", "batch_size": batch})
    return one, np.random.default_rng(0).integers(0, 256, (4 * batch, 32, 32, 3), dtype=np.uint8)


def torch_step(
    make: Callable[[Trial], Plain], mixed: bool, one: Trial, images: np.ndarray, device: torch.device
) -> Step:
    torch.manual_seed(0)
    model = make(one).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=one.learning_rate)

    def step(at: int) -> None:
        start = at * one.batch_size % len(images)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            loss = model(torch.from_numpy(images[start : start + one.batch_size]).to(device)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dvq_step(one: Trial, images: np.ndarray, device: torch.device) -> Step:
    trainer = Trainer(one, images, device, torch.float32)

    def step(at: int) -> None:
        torch.set_flush_denormal(True)  # as in training
        trainer.step(at)
        torch.set_flush_denormal(False)

    return step


def float32_step(one: Trial, images: np.ndarray, device: torch.device) -> Step:
    return dvq_step(one.model_copy(update=FLOAT32), images, device)


VARIANTS: dict[str, Callable[[Trial, np.ndarray, torch.device], Step]] = {
    "plain": functools.partial(torch_step, Plain, False),
    "plain, autocast": functools.partial(torch_step, Plain, True),
    "library": functools.partial(torch_step, Library, False),
    "library, autocast": functools.partial(torch_step, Library, True),
    "dvq, float32": float32_step,
    "dvq": dvq_step,
}


def variants(size: str, estimator: str) -> list[str]:
    left_out = set() if estimator in LIBRARY else {"library", "library, autocast"}
    if not size.startswith(BFLOAT16):
        left_out |= {"plain, autocast", "library, autocast", "dvq, float32"}
    return [name for name in VARIANTS if name not in left_out]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Process time on a CPU; wall time, to the end of what was launched, on a GPU."""
    if device.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def ceiling(size: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product, in the precision of the convolutions."""
    n, dtype = 2048 if device.type == "cpu" else 8192, torch.bfloat16 if BFLOAT16 in size else torch.float32
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / seconds(lambda: a @ a, device)


def flops(size: str, estimator: str, batch: int) -> int:
    """The model's own, of forward and backward, an image."""
    one, images = case(size, estimator, batch)
    model = Plain(one)
    with FlopCounterMode(display=False) as counter:
        model(torch.from_numpy(images[:batch])).mean().backward()
    return counter.get_total_flops() // batch


def measure(
    size: str, estimators: list[str], rounds: int, batch: int, device: torch.device
) -> tuple[dict[tuple[str, str], list[float]], float]:
    """Seconds a step of each estimator's variants in each round, and the ceiling [FLOP/s]."""
    steps = {
        (estimator, name): VARIANTS[name](*case(size, estimator, batch), device)
        for estimator in estimators
        for name in variants(size, estimator)
    }
    times: dict[tuple[str, str], list[float]] = {who: [] for who in steps}
    count, best, at = 1 if device.type == "cpu" else 20, 0.0, 0
    for turn in range(rounds + 1):  # the first warms up
        print(f"{size}: round {turn} of {rounds}", file=sys.stderr)
        best = max(best, ceiling(size, device))
        for who, step in steps.items():
            spent = seconds(lambda step=step, at=at: [step(at + i) for i in range(count)], device)
            times[who] += [spent / count] if turn else []
        at += count
    return times, best


def peak(size: str, estimator: str, name: str, device: torch.device) -> float | None:
    """Peak memory of two steps at batch 64, over what this process takes before them [MiB]; None where neither a
    GPU nor Linux tells it."""
    torch.set_num_threads(1)
    step = VARIANTS[name](*case(size, estimator, 64), device)
    if device.type == "cuda":
        gc.collect()  # of the variant before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(0), step(1)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    step(0), step(1)
    return (resident("VmHWM") - before) / 2**10


def resident(field: str) -> int:
    """This process's memory [KiB], as Linux tells it."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def peaks(size: str, estimators: list[str], device: torch.device) -> dict[tuple[str, str], float | None]:
    """:func:`peak` of each variant; on a CPU in a process of its own, for memory there is the process's."""
    print(f"{size}: peak memory", file=sys.stderr)
    whom = [(estimator, name) for estimator in estimators for name in variants(size, estimator)]
    if device.type == "cuda":
        return {who: peak(size, *who, device) for who in whom}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["dvq.trainer", "plain", "torch._dynamo"])  # seconds, once
    with ProcessPoolExecutor(2, processes, max_tasks_per_child=1) as pool:
        found = [pool.submit(peak, size, *who, device) for who in whom]
        return {who: one.result() for who, one in zip(whom, found, strict=True)}


def compare(
    size: str, estimators: list[str], rounds: int, batch: int, device: torch.device
) -> dict[str, Any]:
    """All that is told of one size."""
    times, best = measure(size, estimators, rounds, batch, device)
    memory = peaks(size, estimators, device)
    found: dict[str, Any] = {"size": size, "ceiling_gflops": best / 1e9, "estimators": {}}
    for estimator in estimators:
        work = flops(size, estimator, 4)
        found["estimators"][estimator] = {"gflop_an_image": work / 1e9, "variants": {}}
        for name in variants(size, estimator):
            spent = times[estimator, name]
            ratios = [a / b for a, b in zip(spent, times[estimator, "dvq"], strict=True)]
            speed, middle = batch / statistics.median(spent), statistics.median(ratios)
            found["estimators"][estimator]["variants"][name] = {
                "seconds_a_step": spent,
                "images_per_second": speed,
                "share_of_ceiling": speed * work / best,
                "dvq_is_faster_by": {"median": middle, "min": min(ratios), "max": max(ratios)},
                "peak_mib_at_64": memory[estimator, name],
            }
    return found


def markdown(about: dict[str, Any], sizes: list[dict[str, Any]]) -> str:
    lines = [f"{about['device']}, torch {about['torch']}, batch {about['batch']}, {about['rounds']} rounds"]
    for one in sizes:
        lines += ["", f"**{one['size']}**, ceiling {one['ceiling_gflops']:.0f} GFLOP/s", ""]
        lines += ["| estimator | variant | images/s | dvq is faster by | of the ceiling | peak MiB |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for estimator, found in one["estimators"].items():
            for name, it in found["variants"].items():
                ratio = "{median:.2f} ({min:.2f} to {max:.2f})".format(**it["dvq_is_faster_by"])
                told = "" if name == "dvq" else ratio
                lines.append(
                    f"| {estimator} | {name} | {it['images_per_second']:.1f} | {told} "
                    f"| {it['share_of_ceiling']:.0%} | {it['peak_mib_at_64'] or 0:.0f} |"
                )
    return "\n".join(lines) + "\n"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    named = [line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, one thread"


def chosen_device(device: torch.device) -> torch.device:
    """The device as training has it: one thread of a CPU, or a GPU that few hold."""
    torch.set_num_threads(1)
    return pick() if device.type == "cuda" else device


@exact()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, help="16 on a CPU, 64 on a GPU")
    parser.add_argument("--estimators", nargs="+", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="F=64 on a CPU; 256 in bfloat16 on a GPU")
    parser.add_argument("--full", action="store_true", help="all sizes, but for those in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"), help="writes OUT.json and OUT.md")
    args = parser.parse_args()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU on this machine")
    args.device = chosen_device(args.device)
    batch = args.batch or (16 if args.device.type == "cpu" else 64)
    about = {"device": device_name(args.device), "torch": torch.__version__}
    about |= {"batch": batch, "rounds": args.rounds}
    chosen = list(SIZES)[:6] if args.full else args.sizes or USUAL[args.device.type]
    sizes = [compare(size, args.estimators, args.rounds, batch, args.device) for size in chosen]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    json_path, md_path = args.out.with_suffix(".json"), args.out.with_suffix(".md")
    json_path.write_text(json.dumps({**about, "sizes": sizes}, indent=1) + "\n", encoding="utf-8")
    md_path.write_text(markdown(about, sizes), encoding="utf-8")
    print(f"{markdown(about, sizes)}\nwritten: {json_path}, {md_path}")


if __name__ == "__main__":
    main()
