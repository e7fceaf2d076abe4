"""Training: minibatches, the optimizer, and what is written along the way.

Run as ``python -m dvq.train FOLDER --data DATA`` it trains the trial that FOLDER/trial.json describes.
"""

import argparse
import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq import DvqError
from dvq.config import trial as make_trial
from dvq.data import Data, load
from dvq.evaluate import evaluate
from dvq.events import Events
from dvq.latents import kmeans
from dvq.model import BITS_PER_DIM, POSITIONS, Model, save
from dvq.probe import probe
from dvq.trial import Discrete, Trial

SHOWN = 16  # images in a picture of reconstructions


@functools.lru_cache(maxsize=2)
def permutation(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the images."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(images)


def minibatch(step: int, batch_size: int, images: int, seed: int) -> NDArray[np.int64]:
    """The images of step 0, 1, …: consecutive pieces of the epochs' permutations laid end to end.

    A function of the step alone, so that a run can go on from any step. No image is ever dropped: a
    minibatch may hold the end of one epoch and the beginning of the next.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // images
    parts = [
        permutation(images, seed, epoch)[places[epochs == epoch] % images] for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


def noise(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of a step, likewise a function of the step alone."""
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


class Trainer:
    """A model, its optimizer, and one step of both."""

    def __init__(
        self, trial: Trial, images: NDArray[np.uint8], device: torch.device, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(trial.seed)
        self.trial, self.images, self.device = trial, images, device
        self.model = Model(trial).to(device, dtype)
        if isinstance(trial, Discrete) and trial.codebook_init == "kmeans":
            self._place_codebooks(trial)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=trial.learning_rate, fused=True)

    @torch.no_grad()
    def _place_codebooks(self, trial: Discrete) -> None:
        """Begin with the clusters of the first minibatches' encodings, ten or more for each code."""
        count = math.ceil(10 * trial.num_codes / (trial.batch_size * POSITIONS))
        encodings = torch.cat([self.model.encoder(self.minibatch(step)) for step in range(count)], 1)
        self.model.latents.place(kmeans(encodings, trial.num_codes, noise(trial.seed, 0, self.device)))

    def minibatch(self, step: int) -> Tensor:
        """The uint8 images (B, 32, 32, 3) of a step."""
        index = minibatch(step, self.trial.batch_size, len(self.images), self.trial.seed)
        return torch.from_numpy(self.images[index]).to(self.device)

    def step(self, step: int) -> Tensor:
        """Train on minibatch ``step``; the surrogate, distortion and rate, (3,) [nats an image]."""
        trial = self.trial
        loss = trial.loss(self.model, self.minibatch(step), noise(trial.seed, step, self.device), step)
        loss.surrogate.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([loss.surrogate.detach(), loss.distortion, loss.rate])


def curve_point(terms: Tensor, last_step: int) -> dict[str, float]:
    """The means over the steps of ``terms`` (steps, 3); DvqError where one is not finite."""
    if not torch.isfinite(terms).all():
        row, column = (~torch.isfinite(terms)).nonzero()[0].tolist()
        step, name = last_step - len(terms) + 1 + row, ("surrogate", "distortion", "rate")[column]
        raise DvqError(
            f"training diverged: at step {step} the {name} is {terms[row, column].item()}; "
            "lower the learning rate or look at the options that differ from the defaults"
        )
    _, distortion, rate = (terms.double().mean(0) * BITS_PER_DIM).tolist()
    return {"bits_per_dim": distortion + rate, "distortion": distortion, "rate": rate}


def train(trial: Trial, data: Data, folder: Path, device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Train ``trial`` and leave in ``folder``: events/, images/ and, last, model/.

    Args:
        trial: what to train.
        data: a prepared dataset.
        folder: the trial's folder.
        device: where to train; on a CPU with ``threads`` threads, which are part of the numbers.

    Returns:
        steps, seconds, speed and provenance, which are in model/training.json too.

    Raises:
        DvqError: the loss is not finite; names step and term.
    """
    torch.set_num_threads(threads)
    events = Events(folder)
    events.state("training")
    images, _ = data.training(trial.split)
    judged, _ = data.evaluation(trial.split)
    trainer = Trainer(trial, images, torch.device(device), torch.float32)
    terms: list[Tensor] = []
    began = since = time.perf_counter()
    trained = 0.0  # seconds in training steps alone
    for step in range(trial.steps):
        terms.append(trainer.step(step))
        done = step + 1
        if done % trial.log_every == 0 or done == trial.steps:
            point = curve_point(torch.stack(terms).cpu(), step)
            seconds = time.perf_counter() - since
            trained += seconds
            speed = len(terms) * trial.batch_size / seconds
            events.metrics(done, {f"train/{k}": v for k, v in point.items()} | {"images_per_second": speed})
            terms.clear()
            since = time.perf_counter()
        if done % trial.evaluate_every == 0 or done == trial.steps:
            paused = time.perf_counter()
            _look(trainer.model, trial, judged, folder, events, done)
            _probe(trainer, events, step)
            since += time.perf_counter() - paused
    summary = {
        "steps": trial.steps,
        "seconds": time.perf_counter() - began,
        "images_per_second": trial.steps * trial.batch_size / trained,
        "provenance": provenance(device, threads),
    }
    _publish(trainer.model, summary, folder)
    return summary


def _look(
    model: Model, trial: Trial, judged: NDArray[np.uint8], folder: Path, events: Events, step: int
) -> None:
    """Evaluate on all evaluation images, and draw some reconstructions."""
    from dvq.figures import reconstructions, save_png

    result = evaluate(model, judged)
    told = ("bits_per_dim", "distortion", "rate", "perplexity", "dead_codes")
    events.metrics(step, {f"{trial.split}/{name}": result[name] for name in told if name in result})
    shown = torch.from_numpy(np.array(judged[:SHOWN])).to(next(model.parameters()).device)
    model.eval()
    picture = reconstructions(shown.cpu().numpy(), model.reconstruct(shown).cpu().numpy())
    model.train()
    path = Path("images") / f"reconstructions-{step:08d}.png"
    (folder / "images").mkdir(exist_ok=True)
    save_png(picture, folder / path)
    events.image(step, "reconstructions", str(path))


def _probe(trainer: Trainer, events: Events, step: int) -> None:
    """Bias and variance of the gradient on the minibatch of ``step``, where the trial asks for it."""
    draws = getattr(trainer.trial, "probe_draws", 0)
    if draws:
        generator = noise(trainer.trial.seed + 1, step, trainer.device)
        events.metrics(step + 1, probe(trainer.model, trainer.minibatch(step), draws, generator, step))


def _publish(model: Model, summary: dict[str, Any], folder: Path) -> None:
    """Write model/ under another name and rename it: it is there whole or not at all."""
    partial = folder / "model.partial"
    save(model, partial)
    (partial / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    partial.rename(folder / "model")


def provenance(device: str, threads: int) -> dict[str, Any]:
    """What decides the numbers beside the configuration: code, library, kernels, machine."""
    name = (
        torch.cuda.get_device_name() if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    )
    return {
        "commit": os.environ.get("DVQ_COMMIT") or _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "threads": threads,
    }


def _commit() -> str:
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def failure_reason(error: Exception) -> str:
    """One sentence for a trial's record."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, DvqError):
        return first
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in first:
        return f"out of memory: {first[-160:]}; use a smaller batch_size, num_codes or features, or a larger machine"
    return f"{type(error).__name__}: {first}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    try:
        document = json.loads((args.folder / "trial.json").read_text(encoding="utf-8"))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        train(make_trial(document["trial"]), load(args.data), args.folder, device)
    except Exception as error:
        Events(args.folder).failure(failure_reason(error))
        if not isinstance(error, DvqError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
