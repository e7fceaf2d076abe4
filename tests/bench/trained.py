"""Training and evaluation of a trained model on one CPU thread: ``python tests/bench/trained.py MODEL``.

With its logits kept above the underflow of exp, and without (in the models of ``training.py``, which are untrained,
no exp underflows); and with its posterior computed once for all draws, and for each of them.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

import dvq
from dvq import data, latents, posterior
from dvq.device import exact, keep_memory
from dvq.evaluate import evaluate
from dvq.trainer import Trainer

ROUNDS, EVALUATED, DRAWS = 8, 200, 16


@contextmanager
def underflow() -> Iterator[None]:
    """Logits as they are."""
    before = posterior.LOWEST
    posterior.LOWEST = latents.LOWEST = -math.inf
    try:
        yield
    finally:
        posterior.LOWEST = latents.LOWEST = before


@contextmanager
def anew() -> Iterator[None]:
    """The posterior computed for each draw."""
    again = latents.Sample.again
    latents.Sample.again = None  # type: ignore[assignment]
    try:
        yield
    finally:
        latents.Sample.again = again


@exact()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the folder 'model' of a trial")
    parser.add_argument("--images", type=Path, help="its prepared images; without them the bundled sample's")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    images = data.load(args.images).training("test")[0] if args.images else data.read_sample()["train_images"]
    model = dvq.load(args.model)
    trainer = Trainer(
        model.trial.model_copy(update={"batch_size": 16}), images, torch.device("cpu"), torch.float32
    )
    trainer.model.load_state_dict(model.state_dict())
    some, few = (np.array(images[:count]) for count in (EVALUATED, EVALUATED // 8 + 1))
    work: dict[str, tuple[Callable[[], AbstractContextManager[None]], Callable[[], object]]] = {
        "training": (underflow, lambda: trainer.step(model.trial.steps)),
        "evaluation": (underflow, lambda: evaluate(model, some)),
        f"evaluation by {DRAWS} draws": (anew, lambda: evaluate(model, few, bound_samples=DRAWS)),
    }
    print(model.trial.describe())
    for name, (plainly, run) in work.items():
        ratios = []
        torch.set_flush_denormal(name == "training")  # as the pipeline does
        for turn in range(ROUNDS + 1):
            taken = []
            for way in (plainly, nullcontext):
                with way():
                    began = time.process_time()
                    run()
                    taken.append(time.process_time() - began)
            if turn:  # the first warms up
                ratios.append(taken[0] / taken[1])
        print(
            f"{name} {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as fast"
        )


if __name__ == "__main__":
    main()
