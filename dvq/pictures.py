"""What a model makes of images: the first of its split, their reconstructions, and samples of its prior."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from dvq.disk import Arrays
from dvq.style import counted, in_colour, look, new_figure, shown
from dvq.tables import Result

if TYPE_CHECKING:
    from dvq.model import Model

Images = NDArray[np.uint8]
COLUMNS = 16
"""images side by side in a picture"""
SCALE = 3
"""screen pixels along each side of an image's pixel"""


@dataclass(frozen=True)
class Pictures(Arrays):
    """The pictures of one trial, each uint8 (N, H, W, 3), gray ones (N, H, W, 1)."""

    images: Images
    reconstructions: Images
    """the mean of p(x|z) at a hard sample z ~ q(z|x) of each image"""
    samples: Images
    """the mean of p(x|z) for draws z ~ p(z), or of an autoregressive prior, in no relation to the images"""


def take(model: "Model", images: Images, codes: ArrayLike | None = None) -> Pictures:
    """The pictures of a trained model for the first of ``images`` (M, H, W, 3). The samples are decoded from
    ``codes`` (N, H/4, W/4, K), draws of an autoregressive prior, if given; else they are of the model's own prior."""
    first = np.array(images[:COLUMNS])
    reconstructions = model.reconstruct(first, model.generator(0))
    samples = (
        model.sample(len(first), model.generator(0)) if codes is None else model.decode(np.asarray(codes))
    )
    return Pictures(first, reconstructions.cpu().numpy(), samples.cpu().numpy())


def mosaic(images: Images, reconstructions: Images) -> Images:
    """Images (N, H, W, 3 or 1) side by side above their reconstructions, a pixel ``SCALE`` wide and high."""
    rows = np.stack([in_colour(images), in_colour(reconstructions)])  # (2, N, H, W, 3)
    apart = np.pad(rows, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    whole = np.concatenate(apart.transpose(0, 2, 1, 3, 4).reshape(2, apart.shape[2], -1, 3))
    return whole[:-1, :-1].repeat(SCALE, axis=0).repeat(SCALE, axis=1)


@look
def of_trial(pictures: Pictures, title: str) -> Figure:
    """The images, their reconstructions and the samples of one trial."""
    figure = new_figure(title, [], 10, 2.4)
    _draw(figure, list(vars(pictures).items()))
    return figure


@look
def of_sweep(results: Sequence[Result], pictures: Mapping[str, Pictures]) -> Figure:
    """The images; then, of each trial that is shown (its first seed), a row of reconstructions; then the samples."""
    groups = [(group.label, group.results[0]) for group in shown(results)]
    drawn = [
        (label, pictures[result["name"]], result) for label, result in groups if result["name"] in pictures
    ]
    title = counted("Reconstructions, and samples of the prior", len(drawn), results)
    figure = new_figure(title, results, 10, 1.2 + 1.2 * len(drawn))
    rows = [("images", drawn[0][1].images)]
    rows += [
        (f"{label}\nreconstructions", shown_pictures.reconstructions) for label, shown_pictures, _ in drawn
    ]
    for label, shown_pictures, result in drawn:
        prior = ", AR prior" if "samples" in result["evaluation"] else ""
        rows.append((f"{label}\nsamples{prior}", shown_pictures.samples))
    _draw(figure, rows)
    return figure


def _draw(figure: Figure, rows: Sequence[tuple[str, Images]]) -> None:
    """Images (N, H, W, 3) side by side, a row of the figure each, behind its label."""
    for axes, (label, images) in zip(figure.subplots(len(rows)), rows, strict=True):
        # (N, H, W + 2, 3)
        apart = np.pad(in_colour(images), ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
        axes.imshow(apart.transpose(1, 0, 2, 3).reshape(images.shape[1], -1, 3), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(label, rotation=0, ha="right", va="center", size=8)
