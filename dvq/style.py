"""What the pictures share: an estimator's colour, the look of an axis, which trials there is room for, the files."""

import hashlib
import re
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.style import context
from numpy.typing import NDArray

from dvq.analyze import Analysis
from dvq.tables import Result, alike, finite, mean_bits_per_dim
from dvq.trial import Trial

Analyses = Mapping[str, Analysis]

# Okabe and Ito's colours, which people with any colour vision can tell apart; the markers say it once more.
STYLES = {
    "gs-soft": ("GS-Soft", "#0072b2", "o"),
    "gs-hard": ("GS-Hard", "#56b4e9", "s"),
    "reinmax": ("ReinMax", "#882255", "p"),
    "vimco": ("VIMCO", "#cc79a7", "^"),
    "nvil": ("NVIL", "#d55e00", "v"),
    "rloo": ("RLOO", "#aa4499", ">"),
    "vq-ema": ("VQ-VAE, EMA", "#009e73", "D"),
    "vq-loss": ("VQ-VAE, loss", "#e69f00", "P"),
    "fsq": ("FSQ", "#332288", "<"),
    "gaussian": ("Gaussian VAE", "#000000", "X"),
}
OTHERS = ("#999933", "#ddcc77", "#661100")
MARKERS = ("*", "8", "h")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)))

MOST_GROUPS = len(DASHES)
PAPERS_SIZE = {"num_codes": 64, "num_latents": 16}
"""of the codebooks that the paper shows"""
FULL = {name: Trial.model_fields[name].default for name in ("steps", "features", "batch_size")}
look = context(
    [
        "default",
        {
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "figure.titlesize": 11,
            "font.size": 10,
            "grid.color": "0.9",
            "legend.fontsize": 9,
            "legend.frameon": False,
            "legend.handlelength": 3.2,
            "lines.markersize": 5.5,
            "savefig.dpi": 150,
        },
    ]
)
"""decorator: what the function draws has the look of all figures, whatever style the user has. While it draws, the
setting is the whole process's, so threads must not draw at the same time"""


def style(estimator: str) -> tuple[str, str, str]:
    """(label, colour, marker) of an estimator, the same in every figure."""
    at, colour = divmod(zlib.crc32(estimator.encode()) % (len(OTHERS) * len(MARKERS)), len(OTHERS))
    return STYLES.get(estimator, (estimator, OTHERS[colour], MARKERS[at]))


def partly_trained(trial: Mapping[str, Any]) -> bool:
    """Whether a trial was trained for fewer than 100,000 steps, or by smaller minibatches or in a smaller network
    than the paper's."""
    return any(trial.get(name, least) < least for name, least in FULL.items())


def notice(results: Sequence[Result]) -> str:
    """What keeps the numbers from being compared with the paper's; empty if nothing does."""
    others = sorted({result["data"]["name"] for result in results} - {"cifar10"})
    if others:
        images = "bundled sample" if others == ["cifar10-sample"] else f"images {', '.join(others)}"
        return f"{images}: not comparable with the paper's numbers"
    limits = {
        "held-out training images": any(result["trial"]["split"] != "test" for result in results),
        "partial training, or a small network": any(partly_trained(result["trial"]) for result in results),
    }
    limited = "; ".join(limit for limit, applies in limits.items() if applies)
    return f"{limited}: not comparable with the paper's numbers" if limited else ""


class Group(NamedTuple):
    """Trials that differ in nothing but their seed, and how they are drawn."""

    results: list[Result]
    label: str
    colour: str
    marker: str
    dashes: Any


def shown(results: Sequence[Result]) -> list[Group]:
    """What a figure of single trials has room for, in the sweep's order, of those of finite bits/dim: all settings if
    they are at most six; if not, one of each estimator (of VQ-VAE one of each gradient), at C = 64 and K = 16 as in
    the paper if that is there, and of several the one of lowest mean bits/dim; then the lowest of the rest, until
    they are six."""
    groups = alike(finite(results), "seed")
    if len(groups) > MOST_GROUPS:
        groups = _chosen(groups)
    count: Counter[str] = Counter()
    drawn = []
    for group in groups:
        trial = group[0]["trial"]
        label, colour, marker = style(trial["estimator"])
        codes = f", C = {trial['num_codes']}" if "num_codes" in trial else ""
        setting = varied(group[0])
        label += f"{codes}, K = {trial['num_latents']}" + (f", {setting}" if setting else "")
        drawn.append(
            Group(group, wrapped(label), colour, marker, DASHES[count[trial["estimator"]] % len(DASHES)])
        )
        count[trial["estimator"]] += 1
    return drawn


def _chosen(groups: Sequence[list[Result]]) -> list[list[Result]]:
    """Those of many groups that :func:`shown` names; which they are does not depend on their order."""
    lowest = sorted(
        groups, key=lambda group: (mean_bits_per_dim(group), min(result["name"] for result in group))
    )
    papers = [group for group in lowest if PAPERS_SIZE.items() <= group[0]["trial"].items()]
    first: dict[tuple[str, str | None], list[Result]] = {}
    for group in [*papers, *lowest]:
        first.setdefault(method(group[0]), group)
    chosen = {id(group) for group in first.values()}
    others = [id(group) for group in lowest if id(group) not in chosen]
    chosen.update(others[: max(0, MOST_GROUPS - len(chosen))])
    return [group for group in groups if id(group) in chosen]


def method(result: Result) -> tuple[str, str | None]:
    """What a figure shows at least one setting of: the estimator, and its gradient if it has several."""
    return result["trial"]["estimator"], result["trial"].get("gradient")


def counted(title: str, drawn: int, results: Sequence[Result]) -> str:
    """A figure's title, and how many of the results' settings are drawn, if not all."""
    settings = len(alike(results, "seed"))
    return title if drawn == settings else f"{title}: {drawn} of {settings} settings"


def varied(result: Result) -> str:
    """What a result's name tells of its setting beyond estimator, C, K and seed: ``code_dim 4, kl_warmup 3000``, with
    spaces at which no line is broken between fields and values."""
    settings = result["name"].partition(f"-s{result['trial']['seed']}-")[2]
    slugs = sorted((field.replace("_", "-") for field in result["trial"]), key=len, reverse=True)
    # the longest of those that begin at a place
    fields = list(re.finditer(f"(?:^|-)({'|'.join(slugs)})-", settings))
    if not fields or fields[0].start():
        return settings
    ends = [*(one.start() for one in fields[1:]), len(settings)]
    return ", ".join(
        f"{one[1].replace('-', '_')}\N{NO-BREAK SPACE}{settings[one.end() : end]}"
        for one, end in zip(fields, ends, strict=True)
    )


def tint(estimator: str, name: str) -> str:
    """The estimator's colour, made lighter by up to a half, depending on the trial's name: for runs side by side."""
    lighter = hashlib.sha256(name.encode()).digest()[0] % 6 / 10
    red, green, blue = (part + (1 - part) * lighter for part in to_rgb(style(estimator)[1]))
    return to_hex((red, green, blue))


def wrapped(label: str) -> str:
    """A legend's entry, in lines that leave room for the figure."""
    return "\n".join(textwrap.wrap(label, 36, subsequent_indent="  "))


def new_figure(title: str, results: Sequence[Result], width: float, height: float) -> Figure:
    """An empty figure [inches] with its title, in lines that it has room for, and under it the notice."""
    figure = Figure(figsize=(width, height), layout="constrained")
    lines = "\n".join(textwrap.wrap(title, int(10.5 * width)))
    figure.suptitle(f"{lines}\n{notice(results)}".strip(), x=0.01, ha="left")
    return figure


def legend(figure: Figure, handles: Iterable[Artist], title: str = "") -> None:
    """A legend to the right of the axes, where it covers no data."""
    below = "\n\n" + title  # the figure's title and notice
    figure.legend(
        handles=list(handles), title=below, title_fontsize=9, loc="outside right upper", alignment="left"
    )


def in_colour(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, H, W, 3) as they are, gray ones (N, H, W, 1) in three equal channels."""
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def save_png(picture: Figure | NDArray[np.uint8], path: Path) -> None:
    """Writes a figure, or an image (H, W, 3) pixel by pixel, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Figure):
        look(picture.savefig)(path, format="png")
    else:  # without the look, for trainings in threads write their reconstructions at once
        imsave(path, picture, format="png", origin="upper")
