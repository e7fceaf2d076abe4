"""The report: a table, figures, and one page that holds everything and loads nothing."""

import base64
import copy
import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dvq import choices, report, tables
from dvq.analyze import analyze
from dvq.captions import FIGURES
from dvq.patches import Patches
from dvq.pictures import Pictures
from dvq.sweep import Sweep, load_sweep
from dvq.trial import values

FAILURES = {"vimco-c16-k4-s0": "training was killed by <SIGKILL> & more"}
SWEEPS = sorted((Path(__file__).parents[2] / "pipeline" / "sweeps").glob("*.yaml"))
EVIL = '<script>alert("x")</script>'


def smoke(description=""):
    return Sweep(name="smoke", description=description, base={"steps": 200}, grid={"num_codes": [16, 256]})


def result(estimator, codes, bits):
    found = analyze(np.random.default_rng(codes).normal(size=(4, codes, 8)))
    numbers = {"bits_per_dim": bits, "rate": 0.25, "distortion": bits - 0.25, "bits_per_dim_se": 0.0123}
    return {
        "format": 1,
        "name": f"{estimator}-c{codes}-k4-s0",
        "key": f"{estimator}{codes}",
        "trial": {
            "estimator": estimator,
            "num_codes": codes,
            "num_latents": 4,
            "seed": 0,
            "steps": 200,
            "split": "test",
        },
        "data": {
            "name": "cifar10-sample",
            "label": "bundled sample of CIFAR-10",
            "fingerprint": "0123456789abcdef",
        },
        "provenance": {"commit": "c0ffee", "torch": "2.13.0", "device": "cpu", "threads": 1},
        "training": {"steps": 200, "seconds": 60.0, "images_per_second": 101.4},
        "evaluation": {"split": "test", "images": 500, **numbers, "perplexity": 7.5, "dead_codes": 3},
        "analysis": found.summary(),
        "curves": [{"step": step, "rate": 0.2, "distortion": 7 - step / 100} for step in (100, 200)],
    }, found


def three():
    """Three results, the best neither first nor last, and their analyses."""
    made = [result("gs-soft", 16, 7.2), result("gs-soft", 256, 6.9), result("vq-ema", 16, 7.0)]
    return [one for one, _ in made], {one["name"]: found for one, found in made}


@pytest.fixture
def sweep():
    return three()


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A report, drawn once: its figures take seconds."""
    results, analyses = three()
    grey = np.full((16, 32, 32, 3), 128, np.uint8)
    pictures = {one["name"]: Pictures(grey, grey, grey) for one in results}
    folder = tmp_path_factory.mktemp("reports") / "smoke"
    share, differences = np.full((4, 16), 1 / 16), np.ones((4, 16, 12, 12, 3), np.float32)
    codes = {one["name"]: Patches(np.indices((4, 16))[1], share, differences) for one in results}
    return report.write(folder, smoke(f"A try {EVIL}"), results, analyses, FAILURES, pictures, codes)


@pytest.fixture
def written(drawn, tmp_path):
    """A copy of it, for one test."""
    return Path(shutil.copytree(drawn.parent, tmp_path / "reports" / "smoke")) / drawn.name


def test_rows_are_sorted_by_bits_per_dim_and_failures_come_last(sweep):
    rows = tables.rows(sweep[0], FAILURES)
    assert [row["name"] for row in rows] == [
        "gs-soft-c256-k4-s0",
        "vq-ema-c16-k4-s0",
        "gs-soft-c16-k4-s0",
        *FAILURES,
    ]
    assert rows[-1] == {"name": "vimco-c16-k4-s0", "reason": FAILURES["vimco-c16-k4-s0"]}
    best = rows[0]
    assert {
        key: best[key] for key in ("estimator", "num_codes", "num_latents", "seed", "steps", "split", "data")
    } == {
        "estimator": "gs-soft",
        "num_codes": 256,
        "num_latents": 4,
        "seed": 0,
        "steps": 200,
        "split": "test",
        "data": "cifar10-sample",
    }
    assert (best["bits_per_dim"], best["bits_per_dim_se"], best["rate"]) == (6.9, 0.0123, 0.25)
    assert (best["perplexity"], best["dead_codes"], best["images_per_second"]) == (7.5, 3, 101.4)
    assert best["components_95"] == sweep[0][1]["analysis"]["components_95_mean"]
    assert [tables.formatted(best, key) for key in ("bits_per_dim", "rate", "dead_codes")] == [
        "6.900 ± 0.012",
        "0.250",
        "3/1024",
    ]


def test_numbers_that_are_not_there_or_not_finite_are_none_and_sort_last(sweep):
    results = sweep[0]
    results[0]["evaluation"]["bits_per_dim"] = math.nan
    del results[1]["analysis"], results[1]["trial"]["num_codes"], results[1]["evaluation"]["perplexity"]
    rows = tables.rows(results, {})
    assert [row["bits_per_dim"] for row in rows] == [6.9, 7.0, None]
    assert choices.chosen(results) == [results[1]]
    assert choices.chosen(results[:1]) == []
    assert rows[0]["num_codes"] is rows[0]["components_95"] is rows[0]["perplexity"] is None
    assert "–" in report.page(smoke(), results, {}, {})


@pytest.mark.parametrize("bits", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_drawn(bits, sweep, tmp_path):
    results, analyses = sweep
    for one in results:
        one["evaluation"]["bits_per_dim"] = bits
    assert report.draw(tmp_path, results, analyses, {}, {}) == {}


def test_settings_are_means_over_seeds_with_the_error_of_trainings(sweep):
    results = sweep[0]
    assert tables.settings(results) == []
    for one, seed, bits in ((0, 1, 7.4), (0, 2, 7.6), (2, 1, 7.1)):
        other = copy.deepcopy(results[one])
        other["trial"]["seed"], other["evaluation"]["bits_per_dim"] = seed, bits
        other["name"] = other["name"].replace("-s0", f"-s{seed}")
        results.append(other)
    whole, part = tables.settings(results)
    assert (part["name"], part["seeds"]) == ("vq-ema-c16-k4", 2)
    assert part["trial"].items() | {("seed", 0)} == results[2]["trial"].items()
    assert (whole["name"], whole["seeds"]) == ("gs-soft-c16-k4", 3)
    assert part["bits_per_dim"] == pytest.approx(7.05)
    assert part["bits_per_dim_se"] == pytest.approx(0.05)
    assert whole["bits_per_dim_se"] == pytest.approx(0.2 / 3**0.5)
    assert [tables.formatted(part, key) for key in tables.filled([whole, part])] == [
        "vq-ema-c16-k4",
        "2",
        "7.050 ± 0.050",
        "2",
        "-0.250 ± 0.050",  # of seeds 0 and 1, which both have
        "0.250 ± 0.000",
        "6.750 ± 0.000",
        "7.5",
        "3/64",
    ]
    page = report.page(smoke(), results, {}, {})
    assert (
        page.index("Settings, over seeds") < page.index("7.050 ± 0.050") < page.index("Trials, by bits/dim")
    )
    results[0]["evaluation"]["bits_per_dim"] = math.nan
    assert [one["bits_per_dim"] for one in tables.settings(results)] == [part["bits_per_dim"], None]


def seeds(results, *bits):
    """The trainings of each setting, by their bits/dim for seeds 0, 1, …"""
    made = []
    for one, found in zip(results, bits, strict=True):
        for seed, value in enumerate(found):
            made.append(copy.deepcopy(one))
            made[-1]["trial"]["seed"], made[-1]["evaluation"]["bits_per_dim"] = seed, value
    return made


def test_the_lowest_mean_over_seeds_is_chosen_and_not_the_lowest_of_all_trainings(sweep):
    lucky, steady, single = (7.9, 6.0, 7.9), (7.1, 7.0, 7.2), (6.5,)
    made = seeds(sweep[0], lucky, steady, single)
    assert [one["evaluation"]["bits_per_dim"] for one in choices.chosen(made)] == [7.0, 7.1, 7.2]
    assert choices.chosen(seeds(sweep[0], (7.0,), (math.nan,), single))[0]["trial"]["estimator"] == "vq-ema"
    made = seeds(sweep[0], (6.0, math.nan), (7.0, 7.1), (math.nan, 5.0))
    assert choices.chosen(made)[0]["trial"]["num_codes"] == 256, (
        "a setting whose training diverged is not chosen"
    )
    assert choices.chosen(made[:2]) == made[:1], "unless there is no other"
    assert choices.chosen(made[1:2]) == choices.chosen([]) == []
    made = seeds(sweep[0], (6.0, 6.1), (7.0, 7.1, 7.2), single)
    assert choices.chosen(made)[0]["trial"]["num_codes"] == 256, "nor one with a training that failed"
    assert [row["num_codes"] for row in tables.settings(made)] == [256, 16], "nor does it stand first"
    for one, fitted in zip(made, (5.0, 5.0, 6.0, 6.0, 6.0, 5.0), strict=True):
        one["evaluation"]["fitted_bits_per_dim"] = fitted
    assert tables.fitted_first(tables.settings(made)) is None, "or is said to be the lowest when fitted"


def test_held_out_images_choose_a_line_for_a_sweep_on_test_images(sweep, tmp_path):
    assert choices.chosen_line(sweep[0]) == ""
    made = copy.deepcopy(sweep[0])
    for one, rate in zip(made, (5e-4, 5e-5, 5e-4), strict=True):
        one["trial"] |= {"split": "tune", "learning_rate": rate, "log_every": 7, "a_field_that_is_gone": 1}
        one["evaluation"]["split"] = "tune"
    line = "{estimator: gs-soft, num_latents: 4, steps: 200, learning_rate: 5.0e-05, num_codes: 256}"
    assert choices.chosen_line(made) == line
    assert choices.chosen_line([*made, *seeds(sweep[0][:1], (1.0, 1.0))]) == line, (
        "those on test images choose nothing"
    )
    gone = {**made[0], "trial": {**made[0]["trial"], "estimator": "gone"}}
    assert choices.chosen_line([gone]) == ""
    (tmp_path / "then.yaml").write_text(f"include:\n  - {line}\n")
    (one,) = load_sweep(tmp_path / "then.yaml").trials().values()
    assert (one.split, one.learning_rate, one.num_codes) == ("test", 5e-5, 256)
    text = Page(report.page(smoke(), made, {}, {})).text
    assert f"Then, on test images: {line}" in text
    assert "held-out training images (split: tune)" in text


def test_a_choice_by_test_images_is_said_to_be_none(sweep):
    def told(**content):
        made = Sweep(name="s", base={"num_codes": 64}, **content)
        return choices.warning(values(one) for one in made.trials().values())

    soft = {"estimator": ["gs-soft"]}
    rates, others = {**soft, "learning_rate": [1e-3, 1e-4]}, {**soft, "normalization": ["batch", "none"]}
    assert told(grid=rates).startswith(
        "its trials differ in learning_rate: a choice among them by test images"
    )
    assert "in decay_after and temperature:" in told(
        grid=soft, include=[{"estimator": "gs-soft", "temperature": 0.1, "decay_after": 5}]
    )
    sizes = {
        "estimator": ["gs-soft", "vq-ema"],
        "num_codes": [8, 9],
        "num_latents": [4, 8],
        "code_dim": [4, 8],
    }
    levels = [{"estimator": "fsq", "levels": [n, 3], "code_dim": 2, "num_codes": 3 * n} for n in (3, 6)]
    alone = [{"estimator": "vq-ema"}, {"estimator": "vimco", "learning_rate": 1e-3}]
    for content in (
        {"grid": sizes, "seeds": [0, 1]},
        {"include": levels},
        {"include": alone},
        {"grid": others},
    ):
        assert told(**content) == ""
    assert told(grid={**rates, "split": ["tune"]}) == ""
    for path in SWEEPS:
        assert choices.warning(map(values, load_sweep(path).trials().values())) == "", path
    made = copy.deepcopy(sweep[0][:1]) * 2
    made[1] = {**made[1], "trial": {**made[1]["trial"], "learning_rate": 0.1}}
    assert "Its trials differ in learning_rate: a choice" in Page(report.page(smoke(), made, {}, {})).text
    assert "choice" not in Page(report.page(smoke(), sweep[0], {}, {})).text


def test_results_that_are_older_than_a_field_have_its_default():
    old = {"trial": {"estimator": "gs-soft", "seed": 0}}
    new = {"trial": {"estimator": "gs-soft", "seed": 1, "autoregressive_steps": 0}}
    other = {"trial": {"estimator": "gs-soft", "seed": 1, "autoregressive_steps": 5}}
    assert tables.alike([old, new, other], "seed") == [[old, new], [other]]


def test_settings_are_compared_seed_by_seed(sweep):
    """Seeds of one number that differ much, settings that differ little, and always: pairs show it, means hide it."""
    made = seeds(sweep[0], (7.0, 7.5, 8.0), (7.1, 7.61, 8.1), (7.3, 7.4, 8.2))
    lowest, near, noisy = rows = tables.settings(made)
    assert (lowest["above"], lowest["pairs"]) == (None, None)
    assert (near["above"], near["above_se"]) == pytest.approx((0.31 / 3, 0.01 / 3))
    assert near["bits_per_dim_se"] > 0.25
    assert (noisy["above"], noisy["above_se"]) == pytest.approx((0.4 / 3, 0.12018504))
    assert [*map(tables.told_apart, rows[1:])] == [True, False]
    page = Page(report.page(smoke(), made, {}, {})).text
    assert "lowest mean over seeds: gs-soft-c16-k4, 7.500 ± 0.289 bits/dim" in page
    assert "by fitted" not in page
    for one in made:
        one["evaluation"]["fitted_bits_per_dim"] = 8 - one["evaluation"]["bits_per_dim"] / 10
    page = report.page(smoke(), made, {}, {})
    other = tables.fitted_first(tables.settings(made))
    assert other is not None
    for some in ((None, 5.4), (5.4, None)):
        assert tables.fitted_first([{"fitted_bits_per_dim": bits} for bits in some]) is None, "not known"
    assert f"lowest mean over seeds by fitted bits/dim: {other['name']}, " in page
    assert "1 of 2 other settings cannot be told from it (95%, each by itself)" in page
    assert tables.settings(made[:3])[0]["above"] is None


def test_settings_without_common_seeds_are_not_compared(sweep):
    """Nor is one of which a training diverged; and one seed is no difference."""
    made = seeds(sweep[0], (7.0, 7.1), (9.0, 9.1), (9.5, math.nan))
    for one in made[2:4]:
        one["trial"]["seed"] += 1  # one seed in common
    rows = tables.settings(made)
    assert [row["above"] for row in rows] == [None, None, None]
    page = Page(report.page(smoke(), made, {}, {})).text
    assert "cannot be told" not in page
    assert "2 cannot be compared: no two seeds in common with it" in page


def test_what_is_lowest_by_other_seeds_alone_tells_nothing_apart(sweep):
    """Of the seeds that both have it is higher each time."""
    rows = tables.settings(seeds(sweep[0][:2], (7.0, 7.5, 8.0, 3.0), (6.9, 7.39, 7.9)))
    assert rows[1]["above"] == pytest.approx(-0.31 / 3)
    assert not tables.told_apart(rows[1])


@pytest.mark.parametrize(("pairs", "half"), [*enumerate(tables.INTERVAL, 2), (40, 2.26)])
def test_an_interval_is_wider_for_fewer_trainings(pairs, half):
    assert tables.INTERVAL == (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # t(.975; n − 1)
    row = {"pairs": pairs, "above_se": 0.01}
    assert not tables.told_apart(row | {"above": 0.0099 * half})
    assert tables.told_apart(row | {"above": 0.0101 * half})


def test_sizes_that_all_rows_share_are_said_once(written):
    page = Page(written.read_text())
    assert "All with K 4, seed 0, steps 200." in page.text
    assert {"C", "bits/dim"} <= {text.strip() for text in re.findall(r"<button>(.*?)<", written.read_text())}
    assert not re.search(r"<button>(K|seed|steps)<", written.read_text())


def test_the_certificate_holds_names_and_exact_numbers_only(sweep):
    results = sweep[0]
    certificate = tables.certificate(results)
    assert re.fullmatch("[0-9a-f]{16}", certificate)
    assert tables.certificate(results[::-1]) == certificate
    for where, key, value, same in (
        ("evaluation", "bits_per_dim", math.nextafter(7.2, 8), False),
        ("evaluation", "rate", 0.26, False),
        ("evaluation", "distortion", 6.0, False),
        ("evaluation", "usage", [[1, 2]], False),
        ("evaluation", "images", 499, False),
        ("training", "seconds", 1.0, True),
        ("provenance", "commit", "other", True),
        ("evaluation", "provenance", {"commit": "other"}, True),
    ):
        changed = copy.deepcopy(results)
        changed[0][where][key] = value
        assert (tables.certificate(changed) == certificate) == same, key
    assert tables.certificate([{**results[0], "name": "other"}, *results[1:]]) != certificate
    assert tables.certificate(results[1:]) != certificate


def _columns(results):
    """Those of the table in which a trial has something, but for the sizes that all share."""
    shared = ("num_latents", "seed", "steps")
    return [key for key in tables.filled(tables.rows(results, {})) if key not in shared]


def test_the_page_names_every_trial_and_failure_and_what_it_was_made_from(written, sweep):
    page = Page(written.read_text())
    for told in (
        *(one["name"] for one in sweep[0]),
        *FAILURES,
        *FAILURES.values(),
        "1 of 4 trials not finished",
        "3 of 4 trials finished",
        "6.900 ± 0.012",
        "bundled sample: not comparable with the paper's numbers",
        "bundled sample of CIFAR-10, fingerprint 0123456789ab",
        "c0ffee",
        "2.13.0",
        "(distortion + rate) / (3072 ln 2)",
        "make submit-sweep SWEEP=smoke if it is one of dvq's own sweeps, else SWEEP=path/to/smoke.yaml",
        tables.certificate(sweep[0]),
    ):
        assert told in page.text, told
    assert page.text.index("trials not finished") < page.text.index(
        "gs-soft-c256-k4-s0", page.text.index("lowest") + 60
    )
    assert len(page.all("tr")) == 1 + 3
    assert len(page.all("button")) == len(page.all("th")) == len(_columns(sweep[0]))


def test_the_page_embeds_its_pictures_and_loads_nothing(written):
    page = Page(written.read_text())
    pictures = page.all("img")
    assert [picture["alt"] for picture in pictures] == [title for title, _ in FIGURES.values()]
    for picture, name in zip(pictures, FIGURES, strict=True):
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert png == (written.parent / "figures" / f"{name}.png").read_bytes()
        assert FIGURES[name][1] in page.text
    assert {key for _, attributes in page.tags for key in attributes} & {
        "href",
        "srcset",
        "action",
        "data",
    } == set()
    assert [attributes for tag, attributes in page.tags if "src" in attributes] == pictures
    assert not page.all("link")
    assert not re.search(r"https?:|@import|url\(|fetch\(", written.read_text())
    assert "prefers-color-scheme: dark" in written.read_text()


def test_a_caption_says_where_not_every_setting_is_drawn(sweep):
    results = sweep[0]
    assert "Not every setting" not in report.page(smoke(), results, {}, {"figure_1c": b""})
    for codes in (2, 4, 8, 32, 64):
        results.append(copy.deepcopy(results[0]))
        results[-1]["trial"]["num_codes"] = codes
    assert "Not every setting" in report.page(smoke(), results, {}, {"figure_1c": b""})
    assert "Not every setting" not in report.page(smoke(), results, {}, {"figure_1a": b""})
    continuous = copy.deepcopy(results)
    continuous[1]["trial"] |= {"estimator": "gaussian"}
    del continuous[1]["trial"]["num_codes"], continuous[0]
    for name, said in (("figure_1b", False), ("figure_1c", True), ("figure_2", False), ("codes", True)):
        page = report.page(smoke(), continuous, {}, {name: b""})
        assert ("Not every setting" in page) == said, "seven settings, and six of them have codes"
    for one in results[:2]:
        one["evaluation"]["bits_per_dim"] = math.nan
    assert "Not every setting" not in report.page(smoke(), results, {}, {"figure_1c": b""}), "six are drawn"


def test_everything_is_escaped(sweep):
    results = copy.deepcopy(sweep[0])
    results[0]["evaluation"]["bits_per_dim"] = 1.0  # the best is named above the table, too
    results[0]["name"] = results[0]["trial"]["estimator"] = EVIL
    results[0]["data"]["label"] = results[0]["provenance"]["commit"] = results[0]["provenance"][EVIL] = EVIL
    evil = Sweep.model_construct(name=EVIL, description=EVIL, base={EVIL: EVIL})
    text = report.page(evil, results, {EVIL: f'"{EVIL}'}, {})
    assert EVIL not in text
    assert text.count(html.escape(EVIL)) >= 10
    assert len(Page(text).all("script")) == 1


def test_a_cell_is_sorted_by_its_exact_value(written, sweep):
    values = [cell["data-value"] for cell in Page(written.read_text()).all("td")]
    columns = _columns(sweep[0])
    assert values[columns.index("bits_per_dim") :: len(columns)] == ["6.9", "7.0", "7.2"]
    dead = [float(share) for share in values[columns.index("dead_codes") :: len(columns)]]
    assert dead == [3 / 1024, 3 / 64, 3 / 64]
    assert [cell.get("title") for cell in Page(written.read_text()).all("td")][:: len(columns)] == [
        "key gs-soft256",
        "key vq-ema16",
        "key gs-soft16",
    ]


def test_the_table_is_written_as_json(written, sweep):
    table = json.loads((written.parent / "table.json").read_text())
    assert (table["rows"], table["settings"]) == (tables.rows(sweep[0], FAILURES), [])
    (written.parent / "again.yaml").write_text(table["definition"])
    asked, again = smoke(f"A try {EVIL}"), load_sweep(written.parent / "again.yaml")
    assert again.model_copy(update={"name": "smoke"}) == asked
    (written.parent / "again.yaml").unlink()
    assert html.escape(table["definition"]) in written.read_text()
    assert (table["sweep"], table["certificate"]) == ("smoke", tables.certificate(sweep[0]))
    assert sorted(path.name for path in written.parent.iterdir()) == ["figures", "report.html", "table.json"]


def test_a_second_report_replaces_the_first(written):
    report.write(written.parent, smoke(), [], {}, FAILURES, {}, {})
    page = Page(written.read_text())
    assert "1 of 1 trials not finished" in page.text
    assert "nothing to draw" in page.text
    assert "(distortion + rate) / (3072 ln 2)" in page.text
    assert not page.all("img")
    assert not list((written.parent / "figures").iterdir())


def test_continuous_latents_have_no_codebooks_to_draw(sweep, tmp_path):
    page = Page(report.write(tmp_path, smoke(), sweep[0], {}, {}, {}, {}).read_text())
    assert [picture["alt"][:11] for picture in page.all("img")] == ["Figure 1(a)", "Figure 1(c)"]
    assert "not finished" not in page.text
