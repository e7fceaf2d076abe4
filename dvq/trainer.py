"""One step of training: the minibatch, the noise, the model and its optimizer."""

import math
import os
import re
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dvq import DvqError
from dvq.codes import kmeans
from dvq.device import tensor_float32
from dvq.model import Model
from dvq.randomness import minibatch, noise, seeded
from dvq.recorded import Recorded
from dvq.trial import LearnedCodes, Loss, Trial

CURVES = ("bits_per_dim", "distortion", "rate")
"""what training follows of every estimator"""


def checked(loss: object, estimator: str) -> Loss:
    """What an estimator's ``loss`` returned; DvqError unless it is three scalars, the first to be differentiated, and
    numbers that are logged."""
    if not isinstance(loss, Loss):
        raise DvqError(
            f"{estimator}: its loss returned a {type(loss).__name__}; return Loss(surrogate, distortion, rate), "
            "of dvq.trial"
        )
    for name, term in zip(Loss._fields[:3], loss, strict=False):
        if not isinstance(term, Tensor) or term.ndim:
            actual = f"{tuple(term.shape)} tensor" if isinstance(term, Tensor) else type(term).__name__
            raise DvqError(
                f"{estimator}: its loss returned a {actual} as the {name}; return a tensor without dimensions "
                "[nats an image]"
            )
    if not loss.surrogate.requires_grad:
        raise DvqError(
            f"{estimator}: its loss returned a surrogate that hangs on no parameter; do not detach it"
        )
    for name, number in loss.logged.items():
        actual = _unlogged(number, loss.surrogate.device)
        if actual or name in CURVES or not re.fullmatch(r"\w[\w.-]*", name):
            raise DvqError(
                f"{estimator}: its loss logs {actual or 'a number'} as '{name}'; log a number, on the loss's device, "
                f"by a name of letters, digits, '_', '-' and '.' that is not {', '.join(CURVES[:-1])} or {CURVES[-1]}"
            )
    return loss


def _unlogged(number: object, device: torch.device) -> str:
    """What ``number`` is, or empty if it can be logged: a recorded step cannot copy a tensor to its device."""
    if not isinstance(number, Tensor):
        return "" if isinstance(number, int | float) else f"a {type(number).__name__}"
    if number.ndim:
        return f"a {tuple(number.shape)} tensor"
    return "" if number.device == device else f"a tensor on the {number.device}"


def numbers(loss: Loss) -> Tensor:
    """The surrogate, the distortion and the rate, and what is logged: (3 + L,), detached."""
    like = loss.surrogate
    logged = [
        x.to(like.dtype) if isinstance(x, Tensor) else like.new_full((), x) for x in loss.logged.values()
    ]
    return torch.stack([*loss[:3], *logged]).detach()


class Trainer:
    """A model, its optimizer, and one step of both."""

    def __init__(
        self, trial: Trial, images: NDArray[np.uint8], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.trial, self.images, self.device = trial, images, device
        on_gpu = device.type == "cuda"
        with seeded(trial.seed):
            self.model = Model(trial).to(device, dtype)
        self.model.mix((trial.precision if on_gpu else trial.cpu_precision) == "bfloat16")
        if isinstance(trial, LearnedCodes) and trial.codebook_init == "kmeans":
            self._place_codebooks(trial)
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=trial.learning_rate, fused=True, capturable=on_gpu
        )
        self.logged: list[str] | None = None  # the names of what the loss logs, from the first step on
        self.fixed = False  # batch normalization's means and variances
        recording = on_gpu and os.environ.get("DVQ_RECORD") != "0"  # only rounding in schedules differs
        self.recorded = Recorded(self) if recording else None

    @torch.no_grad()
    def _place_codebooks(self, trial: LearnedCodes) -> None:
        """Begin with the clusters of the first minibatches' encodings, ten or more for each code."""
        encoded = len(self.images) * trial.positions
        if encoded < trial.num_codes:
            raise DvqError(
                f"codebook_init: kmeans finds {trial.num_codes} codes among as many encodings, and "
                f"{len(self.images)} training images have {encoded}; take fewer codes, or codebook_init: normal"
            )
        count = math.ceil(10 * trial.num_codes / (trial.batch_size * trial.positions))
        encodings = torch.cat([self.model.encoder(self.minibatch(step)) for step in range(count)], 1)
        self.model.latents.place(kmeans(encodings, trial.num_codes, noise(trial.seed, 0, self.device)))

    def minibatch(self, step: int) -> Tensor:
        """The uint8 images (B, H, W, 3) of a step."""
        index = minibatch(step, self.trial.batch_size, len(self.images), self.trial.seed)
        return torch.from_numpy(self.images[index]).to(self.device)

    def step(self, step: int) -> Tensor:
        """Train on minibatch ``step``; surrogate, distortion, rate [nats an image] and what is logged, (3 + L,)."""
        fixed = self.trial.normalization_fixed_at(step)
        if fixed != self.fixed:
            self.model.fix_normalization(fixed)
            self.fixed = fixed
            if self.recorded:
                self.recorded.forget()
        if self.recorded:
            return self.recorded.step(step)
        return self.advance(self.minibatch(step), noise(self.trial.seed, step, self.device), step)

    def advance(self, images: Tensor, generator: torch.Generator, step: int | Tensor) -> Tensor:
        """Train on ``images``."""
        loss = checked(self.trial.loss(self.model, images, generator, step), self.trial.estimator)
        self._check_logged(list(loss.logged))
        terms = numbers(loss)
        with tensor_float32(self.model.mixed, self.device):
            loss.surrogate.backward()
        if not self.optimizer.state:  # the first step
            self._check_gradients()
        rate = self.trial.learning_rate_at(step)
        if isinstance(rate, Tensor) and rate.is_cuda:
            rate = rate.float()  # the fused kernel reads no other
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return terms

    def _check_logged(self, names: list[str]) -> None:
        if self.logged is None:
            self.logged = names
        if self.logged != names:
            now, before = (", ".join(them) or "nothing" for them in (names, self.logged))
            raise DvqError(
                f"{self.trial.estimator}: its loss logs {now}, and at its first step it logged {before}; log the "
                "same at every step, or compute anew (FRESH=1)"
            )

    def _check_gradients(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                raise DvqError(
                    f"{self.trial.estimator}: {name} gets no gradient from the loss; use it in the surrogate, or "
                    "give it requires_grad=False"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the next steps depend on, by name."""
        for name, tensor in self.model.state_dict().items():
            yield f"model.{name}", tensor
        for i, parameter in enumerate(self.model.parameters()):
            for name, tensor in self.optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{i}.{name}", tensor

    def state(self) -> dict[str, Tensor]:
        """:meth:`tensors`, on the CPU. There is no generator's state: the order of the images and the noise are
        functions of the step."""
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave, bit for bit. Parameters without a gradient have no moments there."""
        self.model.load_state_dict(
            {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        )
        for i, parameter in enumerate(self.model.parameters()):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                saved = state.get(f"optimizer.{i}.{name}")
                if saved is None:
                    continue
                # moments are stored as their parameter is (NHWC): the fused kernel walks both in one order
                like = torch.zeros((), device=self.device) if name == "step" else torch.zeros_like(parameter)
                self.optimizer.state[parameter][name] = like.copy_(saved)
