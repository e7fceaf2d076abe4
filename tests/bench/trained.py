"""Training and evaluation of a trained model on one CPU thread, with its logits kept above the underflow of exp and
without: ``python tests/bench/trained.py MODEL``. In the models of ``training.py``, which are untrained, no exp
underflows."""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import dvq
from dvq import data, latents, posterior
from dvq.device import exact, keep_memory
from dvq.evaluate import evaluate
from dvq.trainer import Trainer

ROUNDS, EVALUATED = 8, 200


@contextmanager
def lowest(value: float) -> Iterator[None]:
    before = posterior.LOWEST
    posterior.LOWEST = latents.LOWEST = value
    try:
        yield
    finally:
        posterior.LOWEST = latents.LOWEST = before


@exact()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the folder 'model' of a trial")
    parser.add_argument("--images", type=Path, help="its prepared images; without them the bundled sample's")
    args = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as in training
    images = data.load(args.images).training("test")[0] if args.images else data.read_sample()["train_images"]
    model = dvq.load(args.model)
    trainer = Trainer(
        model.trial.model_copy(update={"batch_size": 16}), images, torch.device("cpu"), torch.float32
    )
    trainer.model.load_state_dict(model.state_dict())
    work = {
        "training": lambda: trainer.step(model.trial.steps),
        "evaluation": lambda: evaluate(model, np.array(images[:EVALUATED])),
    }
    print(model.trial.describe())
    for name, run in work.items():
        ratios = []
        for turn in range(ROUNDS + 1):
            taken = []
            for value in (-math.inf, posterior.LOWEST):
                with lowest(value):
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
