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
    tensor = _tensor(given, "images")
    height, width, channels = single = trial.image_shape
    instead, shape = f"give uint8 (B, {height}, {width}, {channels}), values 0 to 255", tuple(tensor.shape)
    is_tensor = isinstance(given, Tensor)
    if tensor.dtype != torch.uint8:
        to_bytes = "byte()" if is_tensor else 'astype("uint8")'
        small = tensor.is_floating_point() and bool((tensor <= 1).all())
        hint = f"(x * 255).round().{to_bytes}" if small else f"x.{to_bytes}, if its values go from 0 to 255"
        raise DvqError(f"images are {_told(tensor)}: {instead}; {hint}")
    if tensor.ndim != 4 or shape[1:] != single or not len(tensor):
        turn = "permute" if is_tensor else "transpose"
        axes = "(0, 2, 3, 1)" if tensor.ndim == 4 else "(1, 2, 0)[None]"
        hints: dict[tuple[int, ...], str] = {
            (channels, height, width): f"; for channels first: x.{turn}{axes}",
        }
        if tensor.ndim == 3:
            hints[single] = "; for one image: x[None]"
        if channels == 1 and shape[-2:] == (height, width):
            hints.setdefault(shape[-3:], "; for gray images without channels: x[..., None]")
        raise DvqError(f"images are {_told(tensor)}: {instead}{hints.get(shape[-3:], '')}")
    return tensor.to(device)


def arrays(given: ArrayLike, trial: Trial, what: str) -> NDArray[np.uint8]:
    """Many images, which are not copied; a DvqError that names ``what`` unless they have the shape of the trial's."""
    if isinstance(given, tuple):
        raise DvqError(f"{what} are a tuple: give its array of images, as in data.evaluation(split)[0]")
    array = np.asarray(given)
    if array.dtype != np.uint8 or array.shape[1:] != trial.image_shape or not len(array):
        shape = ", ".join(map(str, trial.image_shape))
        raise DvqError(f"{what} are {array.dtype} {array.shape}: give uint8 (N, {shape}), values 0 to 255")
    return array


def count(given: Any, what: str) -> int:
    """How many samples, steps or images; a DvqError that names ``what`` unless a whole number of at least 1."""
    try:
        number = operator.index(given)
    except TypeError:  # of tensors and arrays too
        number = 0
    if number < 1:
        raise DvqError(f"{what} = {given!r}: give a whole number of at least 1")
    return number


def discrete(trial: Trial) -> Discrete:
    """The trial; DvqError if its latent variables are continuous."""
    if not isinstance(trial, Discrete):
        raise DvqError(f"a {trial.estimator} model has no codes: its latent variables are continuous")
    return trial


def stochastic(trial: Trial) -> Stochastic:
    """The trial; DvqError if its posterior gives no probabilities of codes."""
    checked = discrete(trial)
    if isinstance(checked, Stochastic):
        return checked
    raise DvqError(
        f"a {trial.estimator} model has no probabilities of codes: an image has one, which encode gives"
    )


def prior(fitted: Trial, trial: Trial) -> None:
    """DvqError unless a prior that was fitted to a model of the trial ``fitted`` is one of this trial's codes."""
    theirs, ours = ((*one.grid, one.num_latents, one.num_codes) for one in map(discrete, (fitted, trial)))
    if theirs != ours:
        told = ("{}×{} positions of {} codes among {}".format(*one) for one in (theirs, ours))
        raise DvqError("the prior is of {}, the model of {}: give one that was fitted to it".format(*told))


def codes(given: Any, trial: Trial, device: torch.device) -> Tensor:
    """The codes (B, H/4, W/4, K) as an int64 tensor on ``device``; DvqError if ``trial`` has no such codes."""
    count = discrete(trial).num_codes
    tensor = _tensor(given, "codes")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DvqError(f"codes are {_told(tensor)}: give integers, as encode does")
    height, width, k = single = (*trial.grid, trial.num_latents)
    if tensor.ndim != 4 or tuple(tensor.shape[1:]) != single or not len(tensor):
        raise DvqError(f"codes are {_told(tensor)}: give (B, {height}, {width}, {k}), as encode does")
    tensor = tensor.long()
    least, most = int(tensor.min()), int(tensor.max())
    if least < 0 or most >= count:
        raise DvqError(f"codes go from {least} to {most}: this model's go from 0 to {count - 1}")
    return tensor.to(device)


def vectors(given: Any, trial: Trial, like: Tensor) -> Tensor:
    """The vectors (B, H/4, W/4, K, D), of the kind of ``like``; DvqError if ``trial`` has no such vectors."""
    tensor = _tensor(given, "vectors")
    height, width, k, d = single = (*trial.grid, trial.num_latents, trial.code_dim)
    if not (tensor.is_floating_point() and tensor.numel() and tensor.shape[1:] == single):
        raise DvqError(
            f"vectors are {_told(tensor)}: give floating-point numbers (B, {height}, {width}, {k}, {d}), as "
            "vectors(codes) does"
        )
    return tensor.to(like)


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


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
