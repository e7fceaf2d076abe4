"""The figures of a sweep and of a trial.

Results are the contents of ``results.json`` files, in the sweep's order; analyses are by the trials' names.
Everything is drawn on ``matplotlib.figure.Figure`` objects, which belong to no window and no global state.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from dvq.analyze import Analysis, Floats
from dvq.curves import Curve, curves, spread
from dvq.style import Analyses, Group, counted, legend, look, new_figure, shown, style
from dvq.tables import Result, discrete, mean_bits_per_dim

PAPER = {
    "VQ-VAE, best C: 4.81": 4.81,
    "VQ-VAE, van den Oord et al. 2017: 4.67": 4.67,
    "continuous, Gregor et al. 2016: 4.54": 4.54,
    "GS-Soft, C = 512: 4.61": 4.61,
}
"""bits/dim on all of CIFAR-10 that the paper reports; the last is a mark at its C, the others are lines"""
PAPER_CODES = 512
APART = 0.5  # bits/dim: results further than this above the paper's numbers get axes of their own
MOST_COLUMNS = 8


def papers(results: Sequence[Result]) -> dict[str, float]:
    """The paper's numbers beside results on the test images of all of CIFAR-10; beside others none."""
    same = all(
        result["data"]["name"] == "cifar10" and result["trial"]["split"] == "test" for result in results
    )
    return PAPER if same else {}


@look
def figure_1a(results: Sequence[Result]) -> Figure:
    """Bits/dim against C: the mean over seeds and their range, a curve a setting and a panel a K, and the paper's
    numbers as marks, where they are of the same images. Marks at the same C stand side by side."""
    trials = [result["trial"] for result in results]
    paper = papers(results)
    settings = curves(results)
    sizes = sorted({curve.num_latents for curve in settings})
    least = min(result["evaluation"]["bits_per_dim"] for result in results)
    apart = least > max(paper.values(), default=least) + APART
    figure = new_figure("Bits/dim against codebook size", results, max(10, 4.8 + 2.6 * len(sizes)), 4.6)
    rows: dict[str, Any] = {"nrows": 2, "height_ratios": [3, 1]} if apart else {}
    panels = figure.subplots(ncols=len(sizes), squeeze=False, sharex=True, sharey="row", **rows)
    apart_by = _codes_axis(panels[0, 0], settings, [PAPER_CODES] * bool(paper))
    for column, latents in zip(panels.T, sizes, strict=True):
        _sizes(column[0], [curve for curve in settings if curve.num_latents == latents], apart_by)
        if paper:
            _paper(column[-1])
        column[0].set_title(f"K = {latents}")
        column[-1].set_xlabel("C, codes in a codebook")
    panels[-1, 0].set_ylabel("bits/dim,\nthe paper")
    panels[0, 0].set_ylabel(f"{' and '.join(sorted({trial['split'] for trial in trials}))} bits/dim")
    drawn = [artist for axes in panels.flat for artist in axes.get_legend_handles_labels()[0]]
    named = {artist.get_label(): artist for artist in drawn}
    ours = [named[label] for label in named if label not in PAPER]
    heading = [Line2D([], [], lw=0, label="\nthe paper, on all of CIFAR-10")] if paper else []
    legend(figure, [*ours, *heading, *(named[label] for label in paper)], "dvq")
    return figure


def _codes_axis(axes: Axes, settings: Sequence[Curve], others: Sequence[int]) -> float:
    """Make the axis of C for the curves and for ``others``; returns how many octaves apart marks at the same C are to
    be drawn, so that all their bars are seen."""
    ticks = sorted({*others, *(codes for curve in settings for codes in curve.points if codes)})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(ticks[0] / math.sqrt(2), ticks[-1] * math.sqrt(2))
    return min(0.02 * (math.log2(ticks[-1] / ticks[0]) + 1), 0.4 / len(settings))


def _sizes(axes: Axes, settings: Sequence[Curve], apart_by: float) -> None:
    total = Counter(codes for curve in settings for codes in curve.points)
    before: Counter[int] = Counter()
    for curve in settings:
        means = [mean_bits_per_dim(seeds) for seeds in curve.points.values()]
        low, high = zip(*map(spread, curve.points.values()), strict=True)
        drawn: dict[str, Any] = {"color": curve.colour, "ls": curve.dashes, "lw": 1.8, "label": curve.label}
        if 0 in curve.points:  # a continuous latent variable has no C
            axes.axhline(means[0], **drawn)
            axes.axhspan(low[0], high[0], color=curve.colour, alpha=0.12, lw=0)
            continue
        at = [codes * 2 ** (apart_by * (before[codes] - (total[codes] - 1) / 2)) for codes in curve.points]
        before.update(curve.points.keys())
        drawn |= {"mfc": "white"} if curve.fill == "none" else {"fillstyle": curve.fill, "mfcalt": "white"}
        axes.plot(at, means, marker=curve.marker, **drawn)
        axes.vlines(at, low, high, color=curve.colour, lw=3, alpha=0.4, zorder=1.9)


def _paper(axes: Axes) -> None:
    *lines, (mark, bits) = PAPER.items()
    for (label, value), dashes in zip(lines, ("--", ":", "-."), strict=True):
        axes.axhline(value, color="0.4", ls=dashes, lw=1.2, label=label, zorder=1)
    axes.plot(PAPER_CODES, bits, "*", ms=13, mfc="none", mec=style("gs-soft")[1], label=mark, zorder=3)


@look
def figure_1b(results: Sequence[Result], analyses: Analyses) -> Figure:
    """Fraction of the codebooks' variance against the number of principal components: the mean and the range
    over codebooks (and seeds), of all codes and weighted by usage."""
    groups = _analyzed(results, analyses)
    title = counted("Variance of the codes that principal components explain", len(groups), discrete(results))
    figure = new_figure(title, results, 10, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    widths = np.linspace(3.0, 1.2, len(groups))  # so that curves that coincide are all seen
    for (group, group_analyses), width in zip(groups, widths, strict=True):
        drawn = {"color": group.colour, "ls": group.dashes, "marker": group.marker, "label": group.label}
        drawn["lw"] = width
        _explained(panels[0], np.concatenate([analysis.explained for analysis in group_analyses]), **drawn)
        _explained(
            panels[1], np.concatenate([analysis.explained_weighted for analysis in group_analyses]), **drawn
        )
    _explained_axes(panels)
    legend(figure, panels[0].get_legend_handles_labels()[0])
    return figure


@look
def explained_variance(analysis: Analysis, title: str) -> Figure:
    """Figure 1(b) of one trial."""
    figure = new_figure(title, [], 8, 3.8)
    panels = figure.subplots(1, 2, sharey=True)
    _explained(panels[0], analysis.explained, color="#0072b2", marker="o")
    _explained(panels[1], analysis.explained_weighted, color="#0072b2", marker="o")
    _explained_axes(panels)
    return figure


def _analyzed(results: Sequence[Result], analyses: Analyses) -> list[tuple[Group, list[Analysis]]]:
    """The groups to show, with their analyses; continuous latent variables have none and are left out."""
    groups = shown([result for result in results if result["name"] in analyses])
    return [(group, [analyses[result["name"]] for result in group.results]) for group in groups]


def _explained(axes: Axes, explained: Floats, **drawn: Any) -> None:
    n = np.arange(explained.shape[1])
    axes.plot(n, explained.mean(axis=0), ms=3, **drawn)
    axes.fill_between(n, explained.min(axis=0), explained.max(axis=0), color=drawn["color"], alpha=0.15, lw=0)


def _explained_axes(panels: Sequence[Axes]) -> None:
    for axes, title in zip(panels, ("all codes", "codes weighted by usage"), strict=True):
        axes.axhline(0.95, color="0.5", lw=1, ls=":")
        axes.annotate("95%", (1, 0.94), xycoords=("axes fraction", "data"), ha="right", va="top", size=8)
        axes.set(title=title, xlabel="number of principal components", ylim=(0, 1.03))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("fraction of variance explained")


@look
def figure_1c(results: Sequence[Result]) -> Figure:
    """Distortion against rate along training: a curve a trial with an arrow to its second evaluation and a
    large mark at its last; faint, to a hollow mark, the same under the best prior of the codes; on a grey
    diagonal bits/dim, their sum, is the same."""
    groups = shown(results)
    figure = new_figure(counted("Rate and distortion along training", len(groups), results), results, 10, 5)
    axes = figure.subplots()
    axes.grid(False)
    axes.margins(y=0.1)  # room for the diagonals' numbers
    lagging = [_training(axes, group, result["curves"]) for group in groups for result in group.results]
    _diagonals(axes)
    axes.set(xlabel="rate [bits/dim]", ylabel="distortion [bits/dim]")
    hint = "large mark: end of training\n"
    hint += "faint, hollow: rate if the prior were\nthe best for the codes\n" if any(lagging) else ""
    handles = [
        Line2D([], [], color=one.colour, ls=one.dashes, lw=1.2, marker=one.marker, ms=6, label=one.label)
        for one in groups
    ]
    legend(figure, handles, f"{hint}grey: equal bits/dim")
    return figure


def _training(axes: Axes, group: Group, curve: Sequence[Result]) -> bool:
    """Draw the path of one trial; returns whether the rate under the best prior is known, and drawn too."""
    curve = [point for point in curve if math.isfinite(point["rate"] + point["distortion"])]
    points = np.array([(point["rate"], point["distortion"]) for point in curve])
    drawn: dict[str, Any] = {"color": group.colour, "marker": group.marker}
    axes.plot(*points.T, ls=group.dashes, lw=1.2, ms=2.5, **drawn)
    axes.plot(*points[-1], ms=9, mec="white", **drawn)
    arrow = {"arrowstyle": "-|>", "color": group.colour, "mutation_scale": 14, "lw": 0}
    axes.annotate("", points[:2][-1], points[0], arrowprops=arrow)
    if not all("rate_least" in point for point in curve):
        return False
    least = np.array([(point["rate_least"], point["distortion"]) for point in curve])
    axes.plot(*least.T, color=group.colour, ls=group.dashes, lw=1, alpha=0.4)
    axes.plot(*least[-1], ms=6, mfc="white", mew=1, **drawn)
    return True


def _diagonals(axes: Axes) -> None:
    """Lines of constant rate + distortion, each with its number where it leaves the frame."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    small: dict[str, Any] = {"color": "0.4", "size": 8, "bbox": {"fc": "white", "ec": "none", "pad": 0}}
    small["zorder"] = 1.5  # under the trials' paths
    above = bottom + 0.015 * (top - bottom)
    ticks = np.asarray(MaxNLocator(8).tick_values(left + bottom, right + top))
    digits = next(n for n in range(9) if np.allclose(ticks.round(n), ticks))
    for bits in ticks:
        axes.plot([left, right], [bits - left, bits - right], color="0.8", lw=0.8, zorder=1, label="_")
        if bottom <= bits - right <= top:
            axes.text(right, bits - right, f" {bits:.{digits}f}", va="center", **small)
        elif left + 0.02 * (right - left) < bits - above < right:
            axes.text(bits - above, above, f"{bits:.{digits}f}", ha="center", va="bottom", **small)
    axes.set(xlim=(left, right), ylim=(bottom, top))


@look
def figure_2(results: Sequence[Result], analyses: Analyses) -> Figure:
    """The codes of each latent variable (columns) of a trial a row, on the first three principal components,
    coloured by their norm; rings are codes that were never used. Of several seeds the first is drawn."""
    rows = _analyzed(results, analyses)
    most = max((len(group_analyses[0].norms) for _, group_analyses in rows), default=1)
    columns = min(MOST_COLUMNS, most)
    size = min(2.25, 11 / columns)  # inches a panel
    drawn, height = 1 + size * columns, 0.6 + (size + 0.2) * len(rows)
    title = counted("The codes on their first three principal components", len(rows), discrete(results))
    title += f"; the first {columns} of {most} codebooks" if most > columns else ""
    figure = new_figure(title, results, max(10, drawn), height)
    panels = figure.subplots(max(1, len(rows)), columns, squeeze=False, subplot_kw={"projection": "3d"})
    for row, (group, group_analyses) in zip(panels, rows, strict=False):
        _codebooks(figure, row, group_analyses[0], drawn)
        row[0].set_title(group.label, loc="left", pad=18)
    return figure


@look
def codebooks_3d(analysis: Analysis, title: str) -> Figure:
    """Figure 2 of one trial: up to 16 latent variables."""
    columns = min(4, len(analysis.norms))
    rows = min(4, -(-len(analysis.norms) // columns))
    drawn = 1 + 2 * columns
    figure = new_figure(title, [], max(8, drawn), 0.4 + 2.15 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, subplot_kw={"projection": "3d"})
    _codebooks(figure, panels.ravel(), analysis, drawn)
    return figure


def _codebooks(figure: Figure, panels: Any, analysis: Analysis, drawn: float) -> None:
    """The codebooks, a panel each, in the figure's left ``drawn`` inches: its title may be wider."""
    norm = Normalize(analysis.norms.min(), analysis.norms.max())
    dots: dict[str, Any] = {"s": 6, "depthshade": False, "clip_on": False}  # codes may be at the edge
    for k, axes in enumerate(panels):
        if k >= len(analysis.norms):
            axes.remove()
            continue
        x, used = analysis.projections[k], analysis.usage[k] > 0
        colours = ScalarMappable(norm, "viridis").to_rgba(analysis.norms[k])
        axes.scatter(*x[used].T, c=colours[used], lw=0, **dots)
        axes.scatter(*x[~used].T, facecolors="none", edgecolors=colours[~used], lw=0.5, **dots)
        reach = max(float(np.abs(x).max()), 1e-6)  # the same on the three axes, so that shapes are true
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), zlim=(-reach, reach))
        axes.set(xticklabels=[], yticklabels=[], zticklabels=[])
        axes.set_box_aspect((1, 1, 1), zoom=1.3)
        for n, name in enumerate((axes.set_xlabel, axes.set_ylabel, axes.set_zlabel), start=1):
            name(f"PC {n}", labelpad=-15, size=7, color="0.4")
        place: dict[str, Any] = {"xycoords": "axes fraction", "xytext": (0, 5), "textcoords": "offset points"}
        axes.annotate(f"k = {k + 1}, ±{reach:.2g}", (1.05, 1), **place, size=8, ha="right", va="bottom")
    bar = figure.colorbar(ScalarMappable(norm, "viridis"), ax=panels[: len(analysis.norms)], shrink=0.7).ax
    bar.set_title("norm", size=8)
    # else the bars' numbers may be cut off
    rect = (0.01, 0, 0.95 * drawn / figure.get_figwidth(), 0.985)
    figure.set_layout_engine("constrained", rect=rect)
