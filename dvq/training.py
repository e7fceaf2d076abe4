"""The loop of training: what it writes along the way, and how it goes on after any interruption."""

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvq import DvqError, checkpoint, events, goodput
from dvq.data import Data
from dvq.evaluate import evaluate
from dvq.events import Events
from dvq.minutely import Minutely
from dvq.pictures import COLUMNS, mosaic
from dvq.probe import probe
from dvq.provenance import provenance
from dvq.randomness import noise_seed
from dvq.saved import publish
from dvq.style import save_png
from dvq.trainer import Trainer
from dvq.trial import Loss, Trial


class Interrupted(BaseException):
    """SIGTERM or SIGINT came: write a checkpoint and end."""


def curve_point(terms: Tensor, last_step: int, trial: Trial, logged: Sequence[str] = ()) -> dict[str, float]:
    """The means over the steps of ``terms`` (steps, 3 + L), in bits/dim but for what is ``logged``, of which those
    that are not finite are left out; DvqError where a term of the loss is not."""
    finite = torch.isfinite(terms[:, :3])
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        step, name = last_step - len(terms) + 1 + row, Loss._fields[column]
        raise DvqError(
            f"training diverged: at step {step} the {name} is {terms[row, column].item()}; "
            "lower the learning rate or look at the options that differ from the defaults"
        )
    _, distortion, rate, *own_terms = terms.double().mean(0).tolist()
    distortion, rate = distortion * trial.bits_per_nat, rate * trial.bits_per_nat
    own = {name: mean for name, mean in zip(logged, own_terms, strict=True) if math.isfinite(mean)}
    return {"bits_per_dim": distortion + rate, "distortion": distortion, "rate": rate} | own


class Training:
    """A trial in training.

    A checkpoint is the state right after a step, before the curves and evaluations that are due at that step;
    resuming begins with those (:meth:`_look`). So neither the weights nor the events depend on how often a trial was
    interrupted, or on the number of steps that it was first asked for.
    """

    def __init__(self, trial: Trial, data: Data, folder: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trial, self.folder = trial, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.provenance = provenance(device)  # when training ends, git may be at another version
        last = checkpoint.latest(folder, trial.family())
        if last and last.step > trial.steps:
            raise DvqError(
                f"{folder} has a checkpoint of step {last.step}, and the trial ends at {trial.steps}; give it a "
                "folder of its own"
            )
        goodput.begin(folder, last.step if last else 0)
        events.truncate(folder, last.about["events"] if last else {})
        self.events = Events(folder)
        self.events.state("training")
        self.evaluation_images, _ = data.evaluation(trial.split)
        self.trainer = Trainer(trial, data.training(trial.split)[0], torch.device(device), torch.float32)
        self.done = 0
        self.terms: list[Tensor] = []  # of the steps since the last point of the curves
        self.seconds = self.seconds_at_point = 0.0  # spent in training steps
        self.stopping: int | None = None  # by which signal
        self.looking = False
        if last:
            self._go_on(last)
        self.events_before = events.sizes(folder)
        self.saved = self.done if last else None
        self.saved_at = self.since = time.perf_counter()
        self.minutely = Minutely()

    def _go_on(self, last: checkpoint.Checkpoint) -> None:
        self.trainer.restore(last.tensors)
        self.terms = [terms.to(self.trainer.device) for terms in last.tensors["terms"]]
        self.trainer.logged = last.about.get("logged", [])  # earlier versions logged nothing
        self.done, self.seconds = last.step, last.about["seconds"]
        self.seconds_at_point = last.about["seconds_at_point"]
        print(f"going on from step {self.done}", flush=True)

    def stop(self, number: int = signal.SIGTERM, *_: object) -> None:
        """Handle SIGTERM or SIGINT: end after the current step, or at once if an evaluation is under way."""
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
        terms, logged = torch.stack(self.terms).cpu(), self.trainer.logged or []
        curve_point(terms, self.done - 1, self.trial, logged)  # nothing that diverged is ever kept
        tensors = self.trainer.state() | {"terms": terms}
        self._clock()
        about = {
            "family": self.trial.family(),
            "logged": logged,
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
                self._evaluate()
                self._probe()
            finally:
                self.since = time.perf_counter()
        self.looking = False
        if point:
            self.terms, self.seconds_at_point = [], self.seconds
        self.events_before = events.sizes(self.folder)

    def _point(self) -> None:
        terms, logged = torch.stack(self.terms).cpu(), self.trainer.logged or []
        values = curve_point(terms, self.done - 1, self.trial, logged)
        self._clock()
        speed = len(self.terms) * self.trial.batch_size / (self.seconds - self.seconds_at_point)
        named = {f"train/{name}": value for name, value in values.items()}
        self.events.metrics(self.done, named | {"images_per_second": speed})
        bits, of = values["bits_per_dim"], f"{self.done:,} of {self.trial.steps:,} steps"
        self.minutely.say(
            f"{self.trial.describe()}: {of}, {bits:.3f} bits/dim in training, {speed:.0f} images/s"
        )

    def _evaluate(self) -> None:
        """Evaluate on all evaluation images, and draw some reconstructions."""
        model = self.trainer.model
        result = evaluate(model, self.evaluation_images)
        names = ("bits_per_dim", "distortion", "rate", "perplexity", "dead_codes", "rate_least")
        split = self.trial.split
        self.events.metrics(self.done, {f"{split}/{name}": result[name] for name in names if name in result})
        shown = np.asarray(self.evaluation_images[:COLUMNS])
        picture = mosaic(shown, model.reconstruct(shown, model.generator(0)).cpu().numpy())
        path = Path("images") / f"reconstructions-{self.done:08d}.png"
        (self.folder / "images").mkdir(exist_ok=True)
        save_png(picture, self.folder / path)
        self.events.image(self.done, "reconstructions", str(path))

    def _probe(self) -> None:
        """Bias and variance of the gradient on the last step's minibatch, where the trial asks for it."""
        draws, step = getattr(self.trial, "probe_draws", 0), self.done - 1
        if draws:
            generator = torch.Generator(self.trainer.device).manual_seed(noise_seed(self.trial.seed, step, 1))
            numbers = probe(self.trainer.model, self.trainer.minibatch(step), draws, generator, step)
            self.events.metrics(self.done, numbers)
