"""Everything random in training, as functions of seed and step alone: the order of the images, and the noise.

So there is no generator state to save, and a run can resume from any step.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


@functools.lru_cache(maxsize=2)
def permutation(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the images."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(images)


def minibatch(step: int, batch_size: int, images: int, seed: int) -> NDArray[np.int64]:
    """The images of step 0, 1, …: consecutive pieces of the epochs' permutations laid end to end.

    No image is ever dropped: a minibatch may hold the end of one epoch and the beginning of the next.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = places // images
    parts = [
        permutation(images, seed, epoch)[places[epochs == epoch] % images] for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


_SEEDED = threading.RLock()  # an estimator may load a model while its own is made


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In this block torch's global random numbers start from ``seed``, and are drawn on the CPU and in float32
    whatever the caller's defaults; afterwards they continue as before it. They belong to the whole process, so other
    threads wait before a block of their own."""
    with _SEEDED, torch.random.fork_rng(devices=[]), torch.device("cpu"):
        dtype = torch.get_default_dtype()
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def noise_seed(seed: int, step: int, *stream: int) -> int:
    """The seed of a step's random numbers, or of another ``stream`` of them."""
    return int(np.random.SeedSequence([seed, step, *stream]).generate_state(1, np.uint64)[0] >> 1)


def noise(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of a step."""
    return torch.Generator(device).manual_seed(noise_seed(seed, step))
