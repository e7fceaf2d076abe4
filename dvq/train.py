"""Training a trial: the loop, what it writes along the way, and how it goes on after any interruption.

Run as ``python -m dvq.train FOLDER --data DATA`` it trains the trial that FOLDER/trial.json describes.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq import DvqError, checkpoint, disk, events, failures, goodput
from dvq.config import estimators
from dvq.config import trial as make_trial
from dvq.data import Data, load
from dvq.device import check, exact, keep_memory, pick
from dvq.evaluate import evaluate
from dvq.events import Events
from dvq.model import Model
from dvq.pictures import COLUMNS, mosaic
from dvq.probe import probe
from dvq.provenance import provenance
from dvq.randomness import noise_seed
from dvq.saved import publish
from dvq.style import save_png
from dvq.trainer import Trainer
from dvq.trial import Trial


class Interrupted(BaseException):
    """SIGTERM or SIGINT came: write a checkpoint and end."""


@contextmanager
def _as_before() -> Iterator[None]:
    """torch's settings for the whole process are as they were behind this block; in it gradients are on, and no
    autocast or default type of the caller's changes numbers."""
    threads, kept = torch.get_num_threads(), bool(torch.tensor(1e-40) * 1)
    dtype = torch.get_default_dtype()
    # a number under 1e-38, as hopeless codes' weights are, costs a CPU as much as 100 others
    torch.set_flush_denormal(True)
    torch.set_default_dtype(torch.float32)  # the initial weights are drawn in it
    full = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    try:
        with torch.inference_mode(False), torch.enable_grad(), next(full), next(full):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.set_flush_denormal(not kept)


def curve_point(terms: Tensor, last_step: int, trial: Trial) -> dict[str, float]:
    """The means over the steps of ``terms`` (steps, 3); DvqError where one is not finite."""
    if not torch.isfinite(terms).all():
        row, column = (~torch.isfinite(terms)).nonzero()[0].tolist()
        step, name = last_step - len(terms) + 1 + row, ("surrogate", "distortion", "rate")[column]
        raise DvqError(
            f"training diverged: at step {step} the {name} is {terms[row, column].item()}; "
            "lower the learning rate or look at the options that differ from the defaults"
        )
    _, distortion, rate = (terms.double().mean(0) * trial.bits_per_nat).tolist()
    return {"bits_per_dim": distortion + rate, "distortion": distortion, "rate": rate}


class Training:
    """A trial in training.

    A checkpoint is the state right after a step, before what is due at that step is looked at; going on from
    it begins with that look. So neither the weights nor the events tell how often a trial was interrupted,
    nor with how many steps it was first asked for.
    """

    def __init__(self, trial: Trial, data: Data, folder: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trial, self.folder = trial, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.provenance = provenance(device)  # when training ends, git may be at another version
        found = checkpoint.latest(folder, trial.family(), lambda told: print(told, flush=True))
        if found and found.step > trial.steps:
            raise DvqError(
                f"{folder} has a checkpoint of step {found.step}, and the trial ends at {trial.steps}; give it a "
                "folder of its own"
            )
        goodput.begin(folder, found.step if found else 0)
        events.truncate(folder, found.about["events"] if found else {})
        self.events = Events(folder)
        self.events.state("training")
        self.judged, _ = data.evaluation(trial.split)
        self.trainer = Trainer(trial, data.training(trial.split)[0], torch.device(device), torch.float32)
        self.done = 0
        self.terms: list[Tensor] = []  # of the steps since the last point of the curves
        self.seconds = self.seconds_at_point = 0.0  # spent in training steps
        self.stopping: int | None = None  # by which signal
        self.looking = False
        if found:
            self._go_on(found)
        self.events_before = events.sizes(folder)
        self.saved = self.done if found else None
        self.saved_at = self.since = time.perf_counter()

    def _go_on(self, found: checkpoint.Checkpoint) -> None:
        self.trainer.restore(found.tensors)
        self.terms = [terms.to(self.trainer.device) for terms in found.tensors["terms"]]
        self.done, self.seconds = found.step, found.about["seconds"]
        self.seconds_at_point = found.about["seconds_at_point"]
        print(f"going on from step {self.done}", flush=True)

    def stop(self, number: int = signal.SIGTERM, *_: object) -> None:
        """SIGTERM or SIGINT: end after the step, or, in the middle of a look, at once."""
        if not self.stopping:
            self.stopping = number
            if self.looking:
                raise Interrupted
        elif number == signal.SIGINT == self.stopping:  # once more: a person does not wait
            raise KeyboardInterrupt

    def run(self) -> dict[str, Any]:
        """Train to the last step and publish the model; the summary that the results name."""
        try:
            if self.done:
                self._look()
            while self.done < self.trial.steps:
                self.terms.append(self.trainer.step(self.done))
                self.done += 1
                if self._checkpoint_due():
                    self._checkpoint()
                if self.stopping:
                    raise Interrupted
                self._look()
        except Interrupted:
            self._checkpoint()
            Events(self.folder).state("interrupted")
            raise
        summary = {
            "steps": self.trial.steps,
            "seconds": self.seconds,
            "images_per_second": self.trial.steps * self.trial.batch_size / self.seconds,
            "goodput": goodput.read(self.folder),
            "provenance": self.provenance,
        }
        publish(self.trainer.model, summary, self.folder)
        return summary

    def _checkpoint_due(self) -> bool:
        last = self.done == self.trial.steps
        old = time.perf_counter() - self.saved_at > self.trial.checkpoint_seconds
        return last or old or self.done % self.trial.checkpoint_every == 0

    def _checkpoint(self) -> None:
        if self.saved == self.done:  # stopped right after one was due
            return
        terms = torch.stack(self.terms).cpu()
        curve_point(terms, self.done - 1, self.trial)  # nothing that diverged is ever kept
        tensors = self.trainer.state() | {"terms": terms}
        self._clock()
        about = {
            "family": self.trial.family(),
            "seconds": self.seconds,
            "seconds_at_point": self.seconds_at_point,
            "events": self.events_before,
        }
        self.events.sync()  # the checkpoint counts on them
        checkpoint.write(self.folder, self.done, tensors, about)
        self.saved = self.done
        self.saved_at = self.since = time.perf_counter()

    def _clock(self) -> None:
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def _look(self) -> None:
        """What is due at this step: a point of the curves, an evaluation."""
        last = self.done == self.trial.steps
        point = last or self.done % self.trial.log_every == 0
        evaluation = last or self.done % self.trial.evaluate_every == 0
        if not (point or evaluation):
            return
        self.looking = True
        if point:
            self._point()
        if evaluation:
            self._clock()
            try:
                _evaluate(self.trainer.model, self.trial, self.judged, self.folder, self.events, self.done)
                _probe(self.trainer, self.events, self.done - 1)
            finally:
                self.since = time.perf_counter()
        self.looking = False
        if point:
            self.terms, self.seconds_at_point = [], self.seconds
        self.events_before = events.sizes(self.folder)

    def _point(self) -> None:
        values = curve_point(torch.stack(self.terms).cpu(), self.done - 1, self.trial)
        self._clock()
        speed = len(self.terms) * self.trial.batch_size / (self.seconds - self.seconds_at_point)
        named = {f"train/{name}": value for name, value in values.items()}
        self.events.metrics(self.done, named | {"images_per_second": speed})


def train(trial: Trial, data: Data, folder: Path, device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Train ``trial``, or go on with it, and leave in ``folder``: checkpoints/, events/, images/ and, last,
    model/. SIGTERM ends it after a checkpoint, and so does SIGINT, with a KeyboardInterrupt, where this is the main
    thread.

    Args:
        trial: what to train.
        data: a prepared dataset.
        folder: the trial's folder.
        device: where to train; on a CPU with ``threads`` threads, which are part of the numbers.

    Returns:
        steps, seconds, speed, goodput and provenance, which are in model/training.json too. Of a training that is
        done already these are what it left, and nothing is written.

    Raises:
        DvqError: ``data`` are other images than the trial's; its estimator is not in the list; there is no such
            device; another process is training in the folder, or it has more steps of the trial; the loss is not
            finite (names step and term); a checkpoint is of another configuration or cannot be written.
    """
    folder = Path(folder)
    data.check(trial)
    check(device, threads)
    if trial.estimator not in estimators():
        raise DvqError(
            f"'{trial.estimator}' is not in the list of estimators, and its models could not be loaded: "
            f"dvq.estimators.ESTIMATORS.append({type(trial).__name__})"
        )
    if str(device).startswith("cuda"):
        exact()
    with _as_before(), disk.alone(folder):
        if (done := _done(trial, folder)) is not None:
            return done
        training = Training(trial, data, folder, str(device), threads)
        if threading.current_thread() is not threading.main_thread():
            return training.run()  # which no signal reaches
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background job has it
            numbers.append(signal.SIGINT)
        earlier = {number: signal.signal(number, training.stop) for number in numbers}
        try:
            summary = training.run()
            if training.stopping == signal.SIGINT:  # while the model was published
                raise KeyboardInterrupt
            return summary
        except Interrupted:
            if training.stopping == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)


def _done(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """What a training left that has made all its steps and published its model; None if there is no such."""
    last = folder / "checkpoints" / f"{trial.steps:09d}" / "checkpoint.json"
    try:
        about = json.loads(last.read_text(encoding="utf-8"))
        summary: dict[str, Any] = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
        return summary if (about["family"], summary["steps"]) == (trial.family(), trial.steps) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _evaluate(
    model: Model, trial: Trial, judged: NDArray[np.uint8], folder: Path, diary: Events, step: int
) -> None:
    """Evaluate on all evaluation images, and draw some reconstructions."""
    result = evaluate(model, judged)
    told = ("bits_per_dim", "distortion", "rate", "perplexity", "dead_codes", "rate_least")
    diary.metrics(step, {f"{trial.split}/{name}": result[name] for name in told if name in result})
    shown = np.asarray(judged[:COLUMNS])
    picture = mosaic(shown, model.reconstruct(shown, model.generator(0)).cpu().numpy())
    path = Path("images") / f"reconstructions-{step:08d}.png"
    (folder / "images").mkdir(exist_ok=True)
    save_png(picture, folder / path)
    diary.image(step, "reconstructions", str(path))


def _probe(trainer: Trainer, diary: Events, step: int) -> None:
    """Bias and variance of the gradient on the minibatch of ``step``, where the trial asks for it."""
    draws = getattr(trainer.trial, "probe_draws", 0)
    if draws:
        generator = torch.Generator(trainer.device).manual_seed(noise_seed(trainer.trial.seed, step, 1))
        diary.metrics(step + 1, probe(trainer.model, trainer.minibatch(step), draws, generator, step))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    keep_memory()
    try:
        document = json.loads((args.folder / "trial.json").read_text(encoding="utf-8"))
        train(make_trial(document["trial"]), load(args.data), args.folder, str(pick()))
    except (Interrupted, KeyboardInterrupt):
        return 128 + signal.SIGTERM
    except failures.UnusableError as error:
        Events(args.folder).state("interrupted", failures.reason(error))
        print(f"error: {error}", file=sys.stderr)
        return failures.UNUSABLE
    except Exception as error:
        Events(args.folder).failure(failures.reason(error))
        if not isinstance(error, DvqError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
