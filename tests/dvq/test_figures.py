"""What the figures show: axes, curves, marks and words."""

import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib import colormaps, rc_context, rcParams
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

from dvq import figures, style, tables
from dvq.analyze import analyze

SAMPLE = "bundled sample: not comparable with the paper's numbers"


def result(estimator, codes, latents, seed, bits, **more):
    """The contents of a results.json, as far as figures read it."""
    trial = {
        "estimator": estimator,
        "num_codes": codes,
        "num_latents": latents,
        "seed": seed,
        "split": "test",
    }
    told = "".join(f"-{key}-{value}" for key, value in more.items())
    return {
        "name": f"{estimator}-c{codes}-k{latents}-s{seed}{told}",
        "trial": {key: value for key, value in (trial | more).items() if value is not None},
        "data": {"name": "cifar10"},
        "evaluation": {"bits_per_dim": bits},
        "curves": [{"rate": 0.1 * n, "distortion": bits - 0.3 + 1 / n} for n in (1, 2, 3)],
    }


def sweep(estimators=("gs-soft", "vq-ema"), sizes=(16, 64, 256), latents=(4,), seeds=(0, 1)):
    """bits/dim is 5 + C/1000 + seed/10."""
    points = itertools.product(estimators, sizes, latents, seeds)
    return [result(e, c, k, s, 5 + c / 1000 + s / 10) for e, c, k, s in points]


def analyses(results, dead=0):
    rng = np.random.default_rng(0)
    usage = np.ones((4, 16), int)
    usage[:, :dead] = 0
    return {one["name"]: analyze(rng.normal(size=(4, 16, 5)), usage) for one in results}


def words(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_certificate_is_of_all_that_evaluations_found():
    results = sweep()
    whole = tables.certificate(results)
    assert tables.certificate(results[::-1]) == whole
    results[1]["evaluation"]["fitted_bits_per_dim"] = 1.0
    assert tables.certificate(results) != whole


@pytest.mark.parametrize("other", [{"data": {"name": "cifar10-sample"}}, {"trial": {"split": "tune"}}])
def test_the_papers_numbers_stand_beside_nothing_but_the_test_images(other):
    results = [one | {key: one[key] | new for key, new in other.items()} for one in sweep()]
    drawn = figures.figure_1a(results)
    assert not [text for text in words(drawn) + legend(drawn) if "paper, on" in text or text in figures.PAPER]


def test_a_setting_is_told_in_the_legend_by_its_fields():
    more = {"code_dim": 4, "codebook_init": "kmeans", "kl_warmup": 3000}
    one = result("gs-soft", 64, 4, 0, 5.0)
    told = "-".join(f"{key.replace('_', '-')}-{value}" for key, value in more.items())
    one |= {"name": f"{one['name']}-{told}", "trial": one["trial"] | more}
    said = "code_dim 4, codebook_init kmeans, kl_warmup 3000"
    assert style.varied(one).split() == said.split()
    for drawn, begin in ((figures.figure_1a, "GS-Soft, "), (figures.figure_1c, "GS-Soft, C = 64, K = 4, ")):
        (entry,) = [entry for entry in legend(drawn([one])) if "code_dim" in entry]
        assert " ".join(entry.split()) == begin + said
        assert max(map(len, entry.splitlines())) <= 36


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("temperature-1-code-dim-4", "temperature 1, code_dim 4"),  # 1.0 in the results
        ("cpu-precision-bfloat16", "cpu_precision bfloat16"),  # and not precision
        ("final-temperature-0.1-annealing-steps-10000", "final_temperature 0.1, annealing_steps 10000"),
        ("levels-3-3", "levels 3-3"),
        ("of-an-older-version", "of-an-older-version"),
    ],
)
def test_no_setting_is_lost_or_invented(rest, said):
    fields = (
        "temperature",
        "final_temperature",
        "annealing_steps",
        "steps",
        "code_dim",
        "precision",
        "levels",
    )
    one = result("gs-soft", 64, 4, 0, 5.0) | {"name": f"gs-soft-c64-k4-s0-{rest}"}
    one["trial"] |= dict.fromkeys((*fields, "cpu_precision"), 1.0)
    assert " ".join(style.varied(one).split()) == said


def test_the_papers_numbers_stand_beside_no_other_images():
    results = [one | {"data": {"name": "birds@0123456789abcdef"}} for one in sweep()]
    drawn = figures.figure_1a(results)
    assert not [text for text in words(drawn) + legend(drawn) if "paper, on" in text or text in figures.PAPER]
    assert any(
        "images birds@0123456789abcdef: not comparable with the paper's" in text for text in words(drawn)
    )
    assert [axes.get_title() for axes in drawn.axes] == ["K = 4"]


def curves(axes):
    return (line for line in axes.lines if line.get_label() not in figures.PAPER and line.get_label() != "_")


def test_figure_1a_is_the_mean_and_range_over_seeds():
    figure = figures.figure_1a(sweep(latents=(4, 8)))
    assert [axes.get_title() for axes in figure.axes] == ["K = 4", "K = 8"]
    axes = figure.axes[0]
    gs, vq = curves(axes)
    assert gs.get_xdata() * vq.get_xdata() == pytest.approx(np.square([16, 64, 256])), "side by side"
    assert vq.get_xdata() / gs.get_xdata() == pytest.approx(np.full(3, 2**0.1))
    assert gs.get_ydata() == pytest.approx([5.066, 5.114, 5.306])
    assert [gs.get_color(), vq.get_color()] == [style.style(name)[1] for name in ("gs-soft", "vq-ema")]
    ranges = axes.collections[0].get_segments()
    assert ranges[2][:, 0] == pytest.approx(gs.get_xdata()[[2, 2]])
    assert ranges[2][:, 1] == pytest.approx([5.256, 5.356])
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == (
        "log",
        "C, codes in a codebook",
        "test bits/dim",
    )
    assert [text.get_text() for text in axes.get_xticklabels()] == ["16", "64", "256", "512"]


def test_a_single_seed_has_its_standard_error_in_figure_1a():
    one, two = (sweep(estimators=("gs-soft",), seeds=seeds) for seeds in ((0,), (0, 1)))
    for each in (*one, *two):
        each["evaluation"]["bits_per_dim_se"] = 0.02
    ranges = figures.figure_1a(one).axes[0].collections[0].get_segments()
    assert ranges[0] == pytest.approx(np.array([[16, 4.996], [16, 5.036]]))
    bits = [each["evaluation"]["bits_per_dim"] for each in two if each["trial"]["num_codes"] == 16]
    ranges = figures.figure_1a(two).axes[0].collections[0].get_segments()
    assert ranges[0][:, 1] == pytest.approx(bits), "two have their range alone"


def test_figure_1a_bears_the_papers_numbers():
    figure = figures.figure_1a(sweep())
    assert len(figure.axes) == 1
    marks = {
        line.get_label(): line.get_ydata()[0]
        for line in figure.axes[0].lines
        if line.get_label() in figures.PAPER
    }
    assert sorted(marks.values()) == [4.54, 4.61, 4.67, 4.81]
    assert all(label.endswith(str(value)) for label, value in marks.items())
    star = next(line for line in figure.axes[0].lines if line.get_label().startswith("GS-Soft, C = 512"))
    assert star.get_xdata() == [512]
    assert legend(figure) == ["GS-Soft", "VQ-VAE, EMA", "\nthe paper, on all of CIFAR-10", *figures.PAPER]


def test_results_far_above_the_papers_have_axes_of_their_own():
    far = [one | {"evaluation": {"bits_per_dim": 7.0}} for one in sweep()]
    ours, papers = figures.figure_1a(far).axes
    assert len(list(curves(ours))) == 2
    assert not list(curves(papers))
    assert len(papers.lines) == 4
    assert ours.get_ylim()[0] > 6


def test_continuous_latents_are_a_line_with_the_range_over_seeds():
    both = [result("gaussian", None, 4, seed, 4.9 + seed / 10) for seed in (0, 1)]
    both += [result("gs-soft", codes, 4, 0, 5.0) for codes in (16, 64)]
    axes = figures.figure_1a(both).axes[0]
    line, gs = curves(axes)
    assert line.get_ydata() == pytest.approx([4.95, 4.95])
    (band,) = axes.patches
    assert [band.get_y(), band.get_y() + band.get_height()] == pytest.approx([4.9, 5.0])
    assert gs.get_xdata() == pytest.approx([16, 64]), "what is alone at its C stands there"


def test_an_estimators_settings_are_curves_that_differ_in_look_and_label():
    several = [result("gs-soft", c, 4, 0, 5.0 + t, temperature=t) for c in (16, 64) for t in (0.5, 1)]
    figure = figures.figure_1a(several)
    told = ["GS-Soft, temperature 0.5", "GS-Soft, temperature 1"]
    assert [entry.replace("\N{NO-BREAK SPACE}", " ") for entry in legend(figure)[:2]] == told
    one, other = curves(figure.axes[0])
    assert (one.get_color(), one.get_marker()) == (other.get_color(), other.get_marker())
    assert one.get_linestyle() != other.get_linestyle()
    assert (one.get_markerfacecolor(), other.get_markerfacecolor()) == (one.get_color(), "white")
    assert [line.get_ydata()[0] for line in (one, other)] == pytest.approx([5.5, 6.0])


def test_of_more_than_six_settings_each_estimators_look_the_same_and_none_is_chosen():
    bits = {(16, t): 5.0 - t / 10 for t in (1, 2, 3)} | {(64, t): 5.0 + t / 10 for t in (1, 2, 3)}
    many = [
        result(name, codes, 4, seed, found + seed / 100, temperature=t)
        for name in ("gs-soft", "gs-hard")
        for (codes, t), found in bits.items()
        for seed in (0, 1)
    ]
    assert len(legend(figures.figure_1a(many))) == 6 + 5, "six are few enough"
    both = [*many, result("vimco", 16, 4, 0, 5.0)]
    figure = figures.figure_1a(both)
    assert legend(figure)[:3] == [
        *(f"{name}, 3 settings" for name in ("GS-Soft", "GS-Hard")),
        "VIMCO",
    ]
    lines = list(curves(figure.axes[0]))
    assert [line.get_label() for line in lines].count("GS-Soft, 3 settings") == 3
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}) == 3
    found = sorted(tuple(line.get_ydata()) for line in lines[:3])
    assert found == [pytest.approx((5.005 - t / 10, 5.005 + t / 10)) for t in (3, 2, 1)]


def test_levels_that_differ_along_a_curve_are_not_its_name():
    some = [
        result("fsq", 4, 4, 0, 5.0, levels=[2, 2], commitment=1),
        result("fsq", 9, 4, 0, 5.0, levels=[3, 3], commitment=1),
    ]
    assert legend(figures.figure_1a(some))[0].replace("\N{NO-BREAK SPACE}", " ") == "FSQ, commitment 1"


@pytest.mark.parametrize(
    ("field", "value", "says"), [("name", "cifar10-sample", SAMPLE), ("split", "tune", "held-out")]
)
def test_every_sweep_figure_says_what_cannot_be_compared(field, value, says):
    comparable, other = sweep(), sweep()
    for one in other:
        one["data" if field == "name" else "trial"][field] = value
    for draw in (
        figures.figure_1a,
        figures.figure_1c,
        lambda results: figures.figure_1b(results, analyses(results)),
        lambda results: figures.figure_2(results, analyses(results)),
    ):
        assert says in "".join(words(draw(other)))
        assert "not comparable" not in "".join(words(draw(comparable)))


def test_few_groups_are_all_shown():
    assert [group.label for group in style.shown(sweep())] == [
        f"{name}, C = {codes}, K = 4" for name in ("GS-Soft", "VQ-VAE, EMA") for codes in (16, 64, 256)
    ]
    assert [len(group.results) for group in style.shown(sweep())] == [2] * 6
    looks = {(group.colour, str(group.dashes)) for group in style.shown(sweep())}
    assert len(looks) == 6


def test_what_is_not_finite_is_not_shown():
    """Neither here nor where the pictures of what is shown are loaded: of several seeds the first finite one is."""
    diverged = sweep()
    for one, bits in zip(diverged[:3], (np.nan, 5.0, np.inf), strict=True):
        one["evaluation"]["bits_per_dim"] = bits
    assert [group.results for group in style.shown(diverged)][:2] == [[diverged[1]], [diverged[3]]]


def chosen(results):
    """The settings that are shown, told by estimator, C and K, and by the rest of their names."""
    return [
        " ".join(group.label.replace("\N{NO-BREAK SPACE}", " ").split()) for group in style.shown(results)
    ]


def test_of_many_groups_each_estimators_lowest_is_shown_and_then_the_lowest():
    """The mean over seeds counts: GS-Soft's C = 256 has the lowest training of all, and the highest mean."""
    many = [*sweep(latents=(8,)), result("fsq", 64, 8, 0, 9.0), result("gaussian", None, 8, 0, 8.0)]
    many[4]["evaluation"]["bits_per_dim"] = 1.0
    many[5]["evaluation"]["bits_per_dim"] = 99.0
    told = ["GS-Soft, C = 16, K = 8", "GS-Soft, C = 64, K = 8", "VQ-VAE, EMA, C = 16, K = 8"]
    told += ["VQ-VAE, EMA, C = 64, K = 8", "FSQ, C = 64, K = 8", "Gaussian VAE, K = 8"]
    assert chosen(many) == told
    assert sorted(chosen(many[::-1])) == sorted(told)


def test_of_many_groups_those_of_the_papers_size_are_shown():
    """Of two of them that of lowest bits/dim; and with six estimators and more nothing else."""
    every = list(style.STYLES)[:7]
    many = sweep(estimators=every, sizes=(16, 64), latents=(8, 16), seeds=(0,))
    assert chosen(many) == [f"{style.style(name)[0]}, C = 64, K = 16" for name in every]
    many += [result("gs-soft", 64, 16, 0, 5.01, temperature=2.0)]
    assert "GS-Soft, C = 64, K = 16, temperature 2.0" in chosen(many)
    assert "GS-Soft, C = 64, K = 16" not in chosen(many)


def test_each_of_an_estimators_gradients_is_shown():
    many = sweep(estimators=list(style.STYLES)[:7], sizes=(16,), seeds=(0,))
    many += [result("vq-ema", 16, 4, 0, 9.0, gradient="rotation")]
    assert chosen(many)[-1] == "VQ-VAE, EMA, C = 16, K = 4, gradient rotation"
    assert len(chosen(many)) == 8
    for temperature in (1, 2):
        many += [result("vq-ema", 16, 4, 0, 8.0 + temperature, gradient="rotation", temperature=temperature)]
    rotation = "VQ-VAE, EMA, gradient rotation, 3 settings"
    drawn = [
        " ".join(entry.replace("\N{NO-BREAK SPACE}", " ").split())
        for entry in legend(figures.figure_1a(many))
    ]
    assert ["VQ-VAE, EMA", rotation] == [entry for entry in drawn if "EMA" in entry]


def test_the_figures_say_how_many_settings_they_leave_out():
    many = [*sweep(sizes=(16, 64, 256, 512)), result("gaussian", None, 4, 0, 5.0)]
    found = analyses(many[:-1])
    assert figures.figure_1c(many).get_suptitle() == "Rate and distortion along training: 6 of 9 settings"
    for draw in (figures.figure_1b, figures.figure_2):
        assert draw(many, found).get_suptitle().endswith(": 6 of 8 settings"), "the Gaussian has no codes"
    assert not [text for text in words(figures.figure_1c(sweep())) if "settings" in text]


def test_where_codebooks_are_kept_of_some_the_figures_of_codebooks_show_them():
    many = sweep(sizes=(16, 64, 128, 256, 512))
    found = analyses([one for one in many if one["trial"]["num_codes"] == 512])
    said = [f"{name}, C = 512, K = 4" for name in ("GS-Soft", "VQ-VAE, EMA")]
    assert legend(figures.figure_1b(many, found)) == said


def test_an_unknown_estimator_has_its_own_fixed_colour():
    assert style.style("mine") == style.style("mine")
    assert style.style("mine")[0] == "mine"
    assert len({style.style(name)[1] for name in style.STYLES}) == len(style.STYLES)


def test_runs_have_their_estimators_colour_in_shades():
    names = [f"gs-soft-c{codes}-k4-s0" for codes in (16, 32, 64, 128)]
    shades = [np.array(to_rgb(style.tint("gs-soft", name))) for name in names]
    white, pure = np.ones(3), np.array(to_rgb(style.style("gs-soft")[1]))
    for shade in shades:
        lighter = (shade - pure) / (white - pure)
        assert np.ptp(lighter) < 0.02, "but for what eight bits round"
        assert -0.01 < lighter[0] < 0.52
    assert len({tuple(shade) for shade in shades}) > 1


def test_figure_1b_shows_all_codes_beside_the_used():
    results = sweep(sizes=(16,))
    found = analyses(results, dead=5)
    figure = figures.figure_1b(results, found)
    everything, used = figure.axes
    assert [everything.get_title(), used.get_title()] == ["all codes", "codes weighted by usage"]
    assert everything.get_ylabel() == "fraction of variance explained"
    seeds = [found[f"gs-soft-c16-k4-s{seed}"] for seed in (0, 1)]
    for axes, field in ((everything, "explained"), (used, "explained_weighted")):
        assert axes.get_xlabel() == "number of principal components"
        first, second = axes.lines[:2]
        assert first.get_linewidth() > second.get_linewidth(), "the one below is seen where they coincide"
        mean = np.mean([getattr(seed, field) for seed in seeds], axis=(0, 1))
        assert axes.lines[0].get_ydata() == pytest.approx(mean)
        assert axes.lines[0].get_xdata() == pytest.approx(np.arange(6))
        assert len(axes.collections) == 2  # a range an estimator
    assert legend(figure) == ["GS-Soft, C = 16, K = 4", "VQ-VAE, EMA, C = 16, K = 4"]


def test_figure_1c_goes_through_the_evaluations_and_ends_in_a_mark():
    figure = figures.figure_1c(sweep(sizes=(16,)))
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rate [bits/dim]", "distortion [bits/dim]")
    first, end = axes.lines[:2]
    assert first.get_xdata() == pytest.approx([0.1, 0.2, 0.3])
    assert first.get_ydata() == pytest.approx([5.716, 5.216, 4.716 + 1 / 3])
    assert end.get_xydata() == pytest.approx(first.get_xydata()[-1:])
    assert end.get_markersize() > first.get_markersize()
    diagonals = [line for line in axes.lines if line.get_color() == "0.8"]
    assert len(diagonals) > 3
    sums = [line.get_xdata() + line.get_ydata() for line in diagonals]
    assert all(one[0] == pytest.approx(one[1]) for one in sums)
    named = {float(text.get_text()) for text in axes.texts if text.get_text()}
    assert named
    assert named <= {round(float(one[0]), 6) for one in sums}
    assert len(legend(figure)) == 2  # a label an estimator, whatever the seeds


@pytest.mark.parametrize("bits", [np.nan, np.inf])
def test_figure_1c_leaves_out_evaluations_that_are_not_finite(bits, tmp_path):
    """An arrow from one could not be drawn, and ended the report."""
    (one,) = sweep(estimators=("gs-soft",), sizes=(16,), seeds=(0,))
    one["curves"][0]["distortion"] = bits
    figure = figures.figure_1c([one])
    style.save_png(figure, tmp_path / "figure.png")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0.2, pytest.approx(0.3)]


def test_the_numbers_of_figure_1cs_diagonals_stand_inside_the_frame():
    """That of 6.3 leaves it in the lower left corner, and has no room there."""
    results = sweep(estimators=("vq-ema",), sizes=(16,), seeds=(0,))
    results[0]["curves"] = [{"rate": 0.044, "distortion": 7.702}, {"rate": 0.486, "distortion": 6.404}]
    axes = figures.figure_1c(results).axes[0]
    written = [text for text in axes.texts if text.get_text()]
    assert {"6.6", "8.1"} <= {text.get_text().strip() for text in written}
    assert not [text for text in written if text.get_position()[0] < axes.get_xlim()[0]]


def test_figure_1c_shows_the_rate_under_the_best_prior_too():
    """The trained prior follows the codes' frequencies, so that its rate falls where the codes tell more."""
    results = sweep(estimators=("vq-ema",), sizes=(16,), seeds=(0,))
    assert "best" not in "".join(words(figures.figure_1c(results)))
    for n, point in enumerate(results[0]["curves"]):
        point["rate_least"] = 0.01 * n
    figure = figures.figure_1c(results)
    path, _, least, hollow = figure.axes[0].lines[:4]
    assert least.get_xdata() == pytest.approx([0.0, 0.01, 0.02])
    assert least.get_ydata() == pytest.approx(path.get_ydata())
    assert least.get_alpha() < 0.5
    assert hollow.get_xydata() == pytest.approx(least.get_xydata()[-1:])
    assert (hollow.get_markerfacecolor(), hollow.get_marker()) == ("white", path.get_marker())
    assert "faint, hollow: rate if the prior were" in figure.legends[0].get_title().get_text()


def test_the_legend_of_figure_1c_shows_marks_that_can_be_told_apart():
    """Those along the paths are so small that an X is a dot."""
    figure = figures.figure_1c([result("gaussian", None, 4, 0, 5.0)])
    (entry,) = figure.legends[0].get_lines()
    assert (entry.get_marker(), entry.get_color()) == ("X", "#000000")
    assert entry.get_markersize() >= 5


@pytest.mark.parametrize("latents", [1, 8])
def test_figure_2_cuts_no_code_off_and_writes_on_none(latents):
    results = sweep(estimators=("fsq",), sizes=(27,), seeds=(0,))
    cube = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3), axis=-1).reshape(1, 27, 3).repeat(latents, axis=0)
    found = dataclasses.replace(analyze(cube), projections=cube)  # its corners at the corners of the box
    figure = figures.figure_2(results, {results[0]["name"]: found})
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert [dots.get_clip_on() for dots in axes.collections] == [False, False]
    (told,) = axes.texts
    assert told.get_text() == "k = 1, ±1"
    used = axes.collections[0]
    places = used.get_offset_transform().transform(used.get_offsets())
    box = told.get_window_extent()
    assert len(places) == 27
    assert not [place for place in places if box.contains(*place)]
    (label,) = [text for text in axes.findobj(Text) if text.get_text().startswith("FSQ")]
    assert not label.get_window_extent().overlaps(box)


def test_figure_2_has_a_row_a_trial_and_a_column_a_latent():
    results = sweep(sizes=(16,))
    found = analyses(results, dead=5)
    figure = figures.figure_2(results, found)
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.name == "3d"]
    assert len(panels) == 2 * 4
    used, dead = panels[0].collections
    assert (len(used.get_offsets()), len(dead.get_offsets())) == (11, 5)
    assert len(dead.get_facecolor()) == 0  # rings
    norms = found["gs-soft-c16-k4-s0"].norms
    colours = colormaps["viridis"]((norms[0] - norms.min()) / (norms.max() - norms.min()))
    assert np.sort(used.get_facecolor(), axis=0) == pytest.approx(np.sort(colours[5:], axis=0))  # far to near
    assert np.sort(dead.get_edgecolor(), axis=0) == pytest.approx(np.sort(colours[:5], axis=0))
    assert [panels[0].get_title("left"), panels[4].get_title("left")] == [
        "GS-Soft, C = 16, K = 4",
        "VQ-VAE, EMA, C = 16, K = 4",
    ]
    assert "norm" in words(figure)
    wide = {results[0]["name"]: analyze(np.random.default_rng(0).normal(size=(16, 5, 4)))}
    assert (
        len([axes for axes in figures.figure_2(results, wide).axes if axes.name == "3d"])
        == figures.MOST_COLUMNS
    )


def test_few_codebooks_stand_at_the_left_under_the_title():
    (one,) = sweep(estimators=("gs-soft",), sizes=(16,), latents=(1,), seeds=(0,))
    found = analyze(np.random.default_rng(0).normal(size=(1, 16, 5)))
    for figure in (figures.figure_2([one], {one["name"]: found}), figures.codebooks_3d(found, "a trial")):
        figure.draw_without_rendering()
        assert max(axes.get_position().x1 for axes in figure.axes) < 0.5


@pytest.mark.parametrize("shape", [(1, 2, 1), (5, 8, 3), (20, 4, 2)])
@pytest.mark.filterwarnings("error")
def test_figures_of_one_trial(shape, tmp_path):
    for codebook in (np.random.default_rng(0).normal(size=shape), np.ones(shape)):
        found = analyze(codebook)
        for figure in (figures.explained_variance(found, "a trial"), figures.codebooks_3d(found, "a trial")):
            assert "a trial" in words(figure)
            style.save_png(figure, tmp_path / "figures" / "one.png")
            assert imread(tmp_path / "figures" / "one.png").shape[2] == 4
    panels = [axes for axes in figure.axes if axes.name == "3d"]
    assert len(panels) == min(16, shape[0])


def test_a_users_own_style_changes_no_picture(tmp_path):
    """That of a matplotlibrc, say: TeX, which may be lacking and takes no underscore, and images upside down."""

    def drawn(folder):
        style.save_png(figures.figure_1a(sweep()), folder / "figure.png")
        style.save_png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), folder / "image.png")
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    right = drawn(tmp_path / "plain")
    with rc_context({"text.usetex": True, "image.origin": "lower", "axes.facecolor": "black"}):
        assert drawn(tmp_path / "styled") == right
        assert rcParams["text.usetex"]


def test_an_image_is_written_without_a_style(tmp_path, monkeypatch):
    """Trainings in threads write theirs at once, and matplotlib's settings are the whole process's."""
    monkeypatch.setattr(style, "imsave", lambda *_, **__: seen.append(rcParams["axes.grid"]))
    seen = []
    style.save_png(np.zeros((4, 4, 3), np.uint8), tmp_path / "image.png")
    assert seen == [False]


def test_fields_that_change_no_number_tell_no_trials_apart():
    """Trials that sweeps share have those of the sweep that computed them first."""
    results = [result("gs-soft", 16, 4, seed, 7.0, log_every=10 + seed, probe_draws=seed) for seed in (0, 1)]
    assert len(tables.alike(results, "seed")) == 1
    assert len(tables.alike(results)) == 2
    assert len(tables.alike([*results, result("gs-soft", 16, 4, 2, 7.0, temperature=0.1)], "seed")) == 2
