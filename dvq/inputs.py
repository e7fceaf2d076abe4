"""Checks of what a trained model is given: other images or codes would be an error deep inside, or wrong numbers."""

import operator
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dvq import DvqError
from dvq.trial import Discrete, Stochastic, Trial


def images(given: Any, trial: Trial, device: torch.device) -> Tensor:
    """The images as a uint8 tensor on ``device``; DvqError unless they have the shape of the trial's."""
    found = _tensor(given, "images")
    height, width, channels = of_one = trial.image_shape
    wanted, shape = f"give uint8 (B, {height}, {width}, {channels}), values 0 to 255", tuple(found.shape)
    tensor = isinstance(given, Tensor)
    if found.dtype != torch.uint8:
        to_bytes = "byte()" if tensor else 'astype("uint8")'
        small = found.is_floating_point() and bool((found <= 1).all())
        hint = f"(x * 255).round().{to_bytes}" if small else f"x.{to_bytes}, if its values go from 0 to 255"
        raise DvqError(f"images are {_told(found)}: {wanted}; {hint}")
    if found.ndim != 4 or shape[1:] != of_one or not len(found):
        turn = "permute" if tensor else "transpose"
        axes = "(0, 2, 3, 1)" if found.ndim == 4 else "(1, 2, 0)[None]"
        hints: dict[tuple[int, ...], str] = {
            (channels, height, width): f"; for channels first: x.{turn}{axes}",
            of_one: "; for one image: x[None]",
        }
        if channels == 1 and shape[-2:] == (height, width):
            hints.setdefault(shape[-3:], "; for gray images without channels: x[..., None]")
        raise DvqError(f"images are {_told(found)}: {wanted}{hints.get(shape[-3:], '')}")
    return found.to(device)


def arrays(given: ArrayLike, trial: Trial, what: str) -> NDArray[np.uint8]:
    """Many images, which are not copied; a DvqError that names ``what`` unless they have the shape of the trial's."""
    if isinstance(given, tuple):
        raise DvqError(f"{what} are a tuple: give its array of images, as in data.evaluation(split)[0]")
    found = np.asarray(given)
    if found.dtype != np.uint8 or found.shape[1:] != trial.image_shape or not len(found):
        wanted = ", ".join(map(str, trial.image_shape))
        raise DvqError(f"{what} are {found.dtype} {found.shape}: give uint8 (N, {wanted}), values 0 to 255")
    return found


def count(given: Any, what: str) -> int:
    """How many samples, steps or images; a DvqError that names ``what`` unless a whole number of at least 1."""
    try:
        found = operator.index(given)
    except TypeError:  # of tensors and arrays too
        found = 0
    if found < 1:
        raise DvqError(f"{what} = {given!r}: give a whole number of at least 1")
    return found


def discrete(trial: Trial) -> Discrete:
    """The trial; DvqError if its latent variables are continuous."""
    if not isinstance(trial, Discrete):
        raise DvqError(f"a {trial.estimator} model has no codes: its latent variables are continuous")
    return trial


def stochastic(trial: Trial) -> Stochastic:
    """The trial; DvqError if its posterior gives no probabilities of codes."""
    found = discrete(trial)
    if isinstance(found, Stochastic):
        return found
    raise DvqError(
        f"a {trial.estimator} model has no probabilities of codes: an image has one, which encode gives"
    )


def codes(given: Any, trial: Trial, device: torch.device) -> Tensor:
    """The codes (B, H/4, W/4, K) as an int64 tensor on ``device``; DvqError if ``trial`` has no such codes."""
    count = discrete(trial).num_codes
    found = _tensor(given, "codes")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise DvqError(f"codes are {_told(found)}: give integers, as encode does")
    height, width, k = of_one = (*trial.grid, trial.num_latents)
    if found.ndim != 4 or tuple(found.shape[1:]) != of_one or not len(found):
        raise DvqError(f"codes are {_told(found)}: give (B, {height}, {width}, {k}), as encode does")
    found = found.long()
    least, most = int(found.min()), int(found.max())
    if least < 0 or most >= count:
        raise DvqError(f"codes go from {least} to {most}: this model's go from 0 to {count - 1}")
    return found.to(device)


def generator(given: Any, device: torch.device) -> torch.Generator:
    """The generator; if there is none, a new one seeded from torch's global random numbers (``torch.manual_seed``):
    with a fixed seed, successive calls would share their noise."""
    if given is None:
        return torch.Generator(device).manual_seed(int(torch.randint(2**63 - 1, ())))
    if not isinstance(given, torch.Generator):
        raise DvqError(f"the generator is a {type(given).__name__}: give model.generator(seed)")
    return given


def _tensor(given: Any, what: str) -> Tensor:
    try:
        return given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))  # a copy, in order
    except (TypeError, ValueError, RuntimeError):
        raise DvqError(f"{what} are a {type(given).__name__}: give a tensor or a numpy array") from None


def _told(found: Tensor) -> str:
    return f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
