"""What the codes stand for: of each, the mean of the patches of images where it is chosen.

Neurophysiology knows it as the spike-triggered average (de Boer & Kuyper 1968): what a linear code would respond to.

Shapes: K latent variables, each with a codebook of C codes, of which the n most used are kept; patches of S×S pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dvq.disk import Arrays
from dvq.style import counted, in_colour, look, new_figure, shown
from dvq.tables import Result, discrete

if TYPE_CHECKING:
    from dvq.model import Model

AROUND = 4
"""pixels of a patch to each side of the 4×4 that a latent variable is over"""
SIDE = 4 + 2 * AROUND  # S
CODES = 16
"""codes of a codebook that are kept, at most"""
PLACES = 64_000
"""how many places are looked at, about: those of 1,000 images of CIFAR-10"""
ROWS = 4
"""codebooks of a trial in a sweep's figure, at most"""
RARE = 0.01
"""a code is drawn if it is used at least this fraction as often as its codebook's most used: a mean over few patches
shows those few"""
CONTRAST = 0.98
"""quantile of the differences in a row that the figure shows at full contrast"""


@dataclass(frozen=True)
class Patches(Arrays):
    """The patches of one trial; what :func:`take` returns."""

    codes: NDArray[np.int64]
    """(K, n): each codebook's most used codes, the most used first"""
    share: NDArray[np.float64]
    """(K, n): the fraction of all places where the code is chosen"""
    differences: NDArray[np.float32]
    """(K, n, S, S, 3), gray ones (K, n, S, S, 1): the mean of the patches where the code is chosen, less the mean of
    all patches [of 256 levels]; 0 for a code that is never chosen"""


def take(model: "Model", images: NDArray[np.uint8]) -> Patches:
    """The patches of a trained model's most used codes, by the codes z ~ q(z|x) (VQ-VAE: the nearest) of the first of
    ``images`` (M, H, W, 3). Beyond an image's edge its outermost pixels are repeated.

    Raises:
        DvqError: other images, or a model whose latent variables are continuous.
    """
    images = np.array(images[: -(-PLACES // model.trial.positions)])
    at_once = max(1, model.trial.images_at_once // 5)
    pieces = np.split(images, range(at_once, len(images), at_once))
    generator = model.generator(0)
    piece_codes = [model.encode(piece, generator).cpu().numpy() for piece in pieces]  # each (B, H/4, W/4, K)
    codes = np.concatenate(piece_codes).reshape(-1, model.trial.num_latents).T  # (K, N)
    counts = np.stack([np.bincount(one, minlength=model.latents.codebook.shape[1]) for one in codes])
    most = (-counts).argsort(axis=1, kind="stable")[:, :CODES]
    times = np.take_along_axis(counts, most, axis=1)
    occurs = codes[:, None] == most[..., None]  # (K, n, N)
    size = (SIDE, SIDE, images.shape[-1])
    sums, total = np.zeros((*most.shape, math.prod(size))), np.zeros(math.prod(size))
    done = 0
    for piece in pieces:
        patches = _patches(piece)
        chosen = occurs[..., done : done + len(patches)].astype(np.float32)
        done += len(patches)
        sums += chosen @ patches  # whole numbers under 2²⁴: exact
        total += patches.sum(axis=0, dtype=np.float64)
    means = sums / times.clip(min=1)[..., None]
    differences = np.where(times[..., None], means - total / codes.shape[1], 0)
    share = times / codes.shape[1]
    return Patches(most, share, differences.reshape(*most.shape, *size).astype(np.float32))


def _patches(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The patches (N, S·S·channels) around the places of images (B, H, W, channels), in the order of the codes."""
    beyond = (AROUND, AROUND)
    padded = np.pad(images, ((0, 0), beyond, beyond, (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SIDE, SIDE), (1, 2))[:, ::4, ::4]
    return np.moveaxis(windows, 3, 5).reshape(-1, SIDE * SIDE * images.shape[3]).astype(np.float32)


@look
def of_trial(patches: Patches, title: str) -> Figure:
    """The most used codes of every codebook of one trial, a row each."""
    rows = len(patches.codes)
    figure = new_figure(title, [], 10, 0.5 + 0.58 * rows)
    _draw(figure.subplots(), patches, rows)
    return figure


@look
def of_sweep(results: Sequence[Result], patches: Mapping[str, Patches]) -> Figure:
    """Of each trial that is shown (its first seed) the most used codes of the first codebooks, a row each."""
    groups = [(group.label, group.results[0]["name"]) for group in shown(results)]
    drawn = [(label, patches[name]) for label, name in groups if name in patches]
    rows = [min(ROWS, len(one.codes)) for _, one in drawn]
    title = counted("The most used codes", len(drawn), discrete(results))
    figure = new_figure(title, results, 10, 0.6 + sum(0.25 + 0.58 * n for n in rows))
    panels = figure.subplots(len(drawn), squeeze=False, height_ratios=rows).ravel()
    for axes, (label, one), n in zip(panels, drawn, rows, strict=True):
        _draw(axes, one, n)
        axes.set_title(label.replace("\n  ", " "), loc="left", size=9)
    return figure


def _draw(axes: Axes, patches: Patches, rows: int) -> None:
    """The first ``rows`` codebooks, each at its own contrast, which its label gives; above each code its share."""
    above, step = 5, SIDE + 2  # pixels over a code for its share, and from one code to the next
    tall = SIDE + above
    picture = np.full((rows * tall, CODES * step, 3), 255, np.uint8)
    labels = []
    for k, differences in enumerate(patches.differences[:rows]):
        used = patches.share[k] >= RARE * patches.share[k, 0]
        contrast = 127 / max(float(np.quantile(np.abs(differences[used]), CONTRAST)), 1)
        shades = in_colour((128 + contrast * differences).clip(0, 255).astype(np.uint8))
        labels.append(f"k = {k + 1}, ×{contrast:.1f}")
        for column in np.flatnonzero(used):
            top, left = k * tall + above, column * step
            picture[top : top + SIDE, left : left + SIDE] = shades[column]
            share = f"{patches.share[k, column]:.1%}"
            axes.text(left + SIDE / 2, top - 1, share, ha="center", va="bottom", size=6)
    axes.imshow(picture, interpolation="nearest")
    axes.set_yticks(np.arange(rows) * tall + above + SIDE / 2, labels=labels, size=8)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
