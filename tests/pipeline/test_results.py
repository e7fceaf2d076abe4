"""Results that are kept in the repository: a file a trial, and tables and figures made from these files alone."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.store import Store
from dvq import NUMERICS, DvqError, kept, report
from dvq.analyze import Analysis, analyze
from dvq.config import trial
from dvq.style import notice, partly_trained
from dvq.sweep import load_sweep
from dvq.trial import Trial, values
from pipeline import preflight, results

SWEEP = """
base: {data: cifar10}
include:
  - {estimator: gs-soft, num_codes: 64, num_latents: 16}
  - {estimator: vq-ema, num_codes: 128, learning_rate: 5.0e-5}
  - {estimator: gaussian}
  - {estimator: gs-soft, num_codes: 256, steps: 2000}
  - {estimator: vq-ema, num_codes: 32, features: 32}
"""
TUNED = """
base: {data: cifar10, split: tune}
include: [{estimator: vimco, num_codes: 16}, {estimator: vq-ema, num_codes: 64, num_latents: 16}]
"""
README = "# dvq\n\n<!-- results, written by make results -->\nold\n<!-- end of results -->\n\nThe rest.\n"
DRAW, SAVE = report.draw, kept.save_png
FULL = (
    "gs-soft-c64-k16-s0-100000-f6004403",
    "vq-ema-c128-k8-s0-100000-3a810a0c",
    "gaussian-k8-s0-100000-44136fa3",
)
PARTIAL = ("gs-soft-c256-k8-s0-2000-65188f76", "vq-ema-c32-k8-s0-100000-39146cb2")
TUNE = ("vq-ema-c64-k16-s0-tune-100000-a00149ea", "vimco-c16-k8-s0-tune-100000-d915fbc1")


def finish(store: Store, one: Trial, bits: float) -> None:
    """Leave the results of ``one`` in the store."""
    fields, folder = values(one), store.trial(one.key())
    folder.mkdir(parents=True)
    evaluation = {"split": one.split, "images": 10_000, "bits_per_dim": bits, "bits_per_dim_se": 0.01}
    evaluation |= {"rate": 0.5, "distortion": bits - 0.5, "bound": bits - 0.02}
    provenance = {"commit": "c0ffee", "device": "cuda:0 (a GPU)", "torch": "2.13.0"}
    result: dict[str, Any] = {"format": 1, "name": "as the sweep says", "key": one.key(), "trial": fields}
    if "num_codes" in fields:
        k, c = fields["num_latents"], fields["num_codes"]
        usage = np.arange(k * c).reshape(k, c)
        found = analyze(np.random.default_rng(0).normal(size=(k, c, 4)), usage)
        found.save(folder / "analysis.npz")
        evaluation |= {"usage": usage.tolist(), "perplexity": 7.5, "dead_codes": 1, "rate_uniform": 1.25}
        result["analysis"] = found.summary()
    result |= {
        "data": {"name": one.data, "label": "CIFAR-10", "fingerprint": "f" * 64},
        "provenance": provenance,
        "training": {"steps": one.steps, "seconds": 90.0, "images_per_second": 1.0},
        "evaluation": {**evaluation, "provenance": provenance},
        "curves": [{"step": step, "rate": 0.4, "distortion": 7 - step / 1e6} for step in (1000, 2000)],
    }
    (folder / "results.json").write_text(json.dumps(result))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A repository with the README's section, and a store with all trials of ``sweep.yaml`` finished; and the results
    of a trial on held-out images, which are kept already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(report, "draw", lambda *_: {})  # takes seconds
    monkeypatch.setattr(kept, "save_png", lambda *_: None)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    (tmp_path / "tuned.yaml").write_text(TUNED)
    for name, bits in (("sweep", 4.5), ("tuned", 4.6)):
        for place, one in enumerate(load_sweep(tmp_path / f"{name}.yaml").trials().values()):
            finish(Store(tmp_path / "store"), one, bits + place / 100)
    assert run("tuned.yaml", capsys)[0] == 0
    return tmp_path


def run(sweep: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as stopped:
        results.app([sweep])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, *capsys.readouterr()


def files(root: Path) -> set[str]:
    return {path.stem for path in (root / results.FOLDER).glob("*.json")}


def between(text: str, begin: str, end: str) -> str:
    assert begin in text
    return text.partition(begin)[2].partition(end)[0]


def test_each_trial_is_a_file_that_is_also_its_sweep(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = run("sweep.yaml", capsys)
    assert (code, error) == (0, "")
    assert files(root) == {*FULL, *PARTIAL, *TUNE}
    assert out.splitlines() == [f"kept {one}.json" for one in (*FULL, *PARTIAL)]
    for one in load_sweep(root / "sweep.yaml").trials().values():
        path = root / results.FOLDER / f"{kept.name(one)}.json"
        again = preflight.find_sweep(str(path))
        assert [found.key() for found in again.trials().values()] == [one.key()]
        made, stored = json.loads(path.read_text()), Store(root / "store").results(one.key())
        assert stored
        assert {**made, "name": stored["name"]}.items() >= stored.items()
        assert (made["sweep"], made["numerics"]) == ("sweep", NUMERICS)


@pytest.mark.parametrize(
    ("commit", "says"),
    [
        ("c0ffee-dirty-1a2b3c4d", "uncommitted code, c0ffee-dirty-1a2b3c4d; commit"),
        ("unknown", "code that is in no clone"),
    ],
)
@pytest.mark.parametrize("what", ["trained", "evaluated"])
def test_what_nobody_could_compute_again_is_not_kept(
    what: str, commit: str, says: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, *_ = load_sweep(root / "sweep.yaml").trials().values()
    path = Store(root / "store").trial(one.key()) / "results.json"
    found = json.loads(path.read_text())
    made = found if what == "trained" else found["evaluation"]
    made["provenance"] = {**found["provenance"], "commit": commit}
    path.write_text(json.dumps(found))
    shutil.rmtree(Store(root / "store").trial(other.key()))
    _, out, _ = run("sweep.yaml", capsys)
    assert f"not kept: gs-soft-c64-k16-s0: it was {what} by {says}" in out
    assert "not kept: vq-ema-c128-k8-s0-learning-rate-5e-05: it did not start" in out
    assert files(root) == {FULL[2], *PARTIAL, *TUNE}


def test_full_partial_and_tuning_never_share_a_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep.yaml", capsys)
    text = (root / results.FOLDER / "README.md").read_text()
    for heading, names in (("Trained in full", FULL), ("Partial", PARTIAL), ("Held-out", TUNE)):
        told = between(text, f"## {heading}", "\n## ")
        assert {name for name in files(root) if f"({name}.json)" in told} == set(names)
    for number in ("4.61", "4.81", "4.67", "4.54", "4.82", "4.6 "):
        assert number in between(text, "## The paper's numbers", "\n## ")


def test_a_row_says_what_was_measured(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep.yaml", capsys)
    told = "VQ-VAE, EMA | 128 | 8 | 100,000 | learning_rate 5e-05 | 4.510 ± 0.010 | 0.500 | 4.010 "
    told += "| – | 5.260 | 7.5 | 1/1024"
    for page, place, more in (
        (root / "README.md", "pipeline/results/", ""),
        (root / results.FOLDER / "README.md", "", " 1.5 | cuda:0 (a GPU) | c0ffee |"),
    ):
        lines = page.read_text().splitlines()
        rows = {row.split("|")[-2].strip(): row for row in lines if row.startswith("| ")}
        assert rows[f"[json]({place}{FULL[1]}.json)"].startswith(f"| {told} |{more}")
        gaussian = rows[f"[json]({place}{FULL[2]}.json)"]
        assert gaussian.count("–") == 4
        assert " (S = 16) |" in gaussian


def test_a_table_says_once_what_its_rows_share(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep.yaml", capsys)
    sample, *_ = kept.load(root / results.FOLDER)
    shared = {"features": 64, "estimator": "gs-soft", "residual_blocks": 4, "num_codes": 8}
    some = [
        {**sample, "name": name, "trial": values(trial({**shared, **more}))}
        for name, more in (("one", {"seed": 1}), ("two", {"temperature": 0.1}))
    ]
    told, empty, head, _, one, two = kept.table(some, "here/").splitlines()
    assert (told, empty) == ("All with features 64, residual_blocks 4.", "")
    assert "uniform" not in head  # no VQ-VAE is among them
    assert one.startswith("| GS-Soft | 8 | 8 | 100,000 | seed 1 | ")
    assert "| temperature 0.1 |" in two
    assert two.endswith("| [json](here/two.json) |")
    for each in some:
        each["evaluation"] = {**each["evaluation"], "bound": None}
    assert "L_S" in head
    assert "L_S" not in kept.table(some, "")
    (head, _, row) = kept.table(some[:1], "").splitlines()
    assert "| seed 1, features 64, residual_blocks 4 |" in row


def test_the_readme_shows_what_was_trained_in_full(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep.yaml", capsys)
    text = (root / "README.md").read_text()
    assert text.startswith(README.partition("old")[0])
    assert text.endswith(README.partition("old")[2])
    assert {name for name in files(root) if name in text} == set(FULL)
    assert "4.61" in text
    for name in ("figure_1a", "figure_1b", "figure_1c", "figure_2"):
        assert f"(pipeline/results/figures/{name}.png)" in text


def test_tables_and_figures_come_from_the_files_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "draw", DRAW)
    monkeypatch.setattr(kept, "save_png", SAVE)
    run("sweep.yaml", capsys)
    before = {path: path.read_bytes() for path in (root / results.FOLDER).rglob("*.*")}
    assert len([path for path in before if path.suffix == ".png"]) == 4
    shutil.rmtree(root / "store")
    code, out, error = run("sweep.yaml", capsys)
    assert (code, out) == (2, "")
    assert "nothing to keep" in error
    results.write_pages(root)
    assert {path: path.read_bytes() for path in (root / results.FOLDER).rglob("*.*")} == before


def test_figures_leave_partial_training_out_or_say_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[set[str]] = []
    monkeypatch.setattr(report, "draw", lambda _, found, *__: drawn.append({one["name"] for one in found}))
    run("sweep.yaml", capsys)
    for name in FULL:
        (root / results.FOLDER / f"{name}.json").unlink()
    results.write_pages(root)
    there = kept.load(root / results.FOLDER)
    assert "partial" in notice([one for one in there if one["name"] in PARTIAL])
    assert drawn == [
        {"gs-soft-c64-k16-s0", "vq-ema-c128-k8-s0-learning-rate-5e-05", "gaussian-k8-s0"},
        {"gs-soft-c256-k8-s0-steps-2000", "vq-ema-c32-k8-s0-features-32"},
    ]
    text = (root / "README.md").read_text()
    assert "None of our models has been trained in full yet. In partial training" in text
    assert {name for name in files(root) if name in text} == set(PARTIAL)
    for name in (*PARTIAL, *TUNE):
        (root / results.FOLDER / f"{name}.json").unlink()
    results.write_pages(root)
    assert "None of our models has been trained in full yet.\n<!--" in (root / "README.md").read_text()


def test_continuous_latents_alone_have_no_figure_1a(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "draw", DRAW)
    monkeypatch.setattr(report, "save_png", SAVE)
    run("sweep.yaml", capsys)
    for name in (*FULL[:2], *PARTIAL, *TUNE):
        (root / results.FOLDER / f"{name}.json").unlink()
    results.write_pages(root)
    linked = re.findall(r"\(figures/(.*)\)", (root / results.FOLDER / "README.md").read_text())
    assert (
        linked == [path.name for path in (root / results.FOLDER / "figures").iterdir()] == ["figure_1c.png"]
    )


def test_figures_name_what_tells_trials_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(report, "draw", lambda _, found, *__: drawn.extend(one["name"] for one in found))
    base = {"estimator": "vq-ema", "features": 32, "learning_rate": 1e-3}
    ends: list[dict[str, Any]] = [
        {"steps": 10},
        {"steps": 20},
        {"steps": 20, "commitment": 1.0, "autoregressive_steps": 9},  # no figure shows the prior
        {"steps": 20, "commitment": 1.0, "log_every": 7},  # the same training, kept without it too
    ]
    kept.draw(Path(), [{"trial": values(trial({**base, **end}))} for end in ends])
    assert drawn == [f"vq-ema-c512-k8-s0-steps-{end}" for end in ("10", "20", "20-commitment-1.0")]
    kept.draw(Path(), [])


def test_only_the_codebooks_of_figure_2_are_kept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep.yaml", capsys)
    there = kept.load(root / results.FOLDER)
    assert [one["name"] for one in there if "codebooks" in one] == [FULL[0], TUNE[0]]
    made = next(one for one in there if "codebooks" in one)
    whole = Analysis.load(Store(root / "store").trial(made["key"]) / "analysis.npz")
    for part in kept.CODEBOOKS:
        np.testing.assert_allclose(made["codebooks"][part], getattr(whole, part), rtol=1e-4)


def test_codebooks_trained_without_the_held_out_images_are_drawn_for_lack_of_others(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        kept.figures, "figure_2", lambda found, _: drawn.append([one["trial"]["estimator"] for one in found])
    )
    run("sweep.yaml", capsys)
    (root / results.FOLDER / f"{FULL[0]}.json").unlink()
    results.write_pages(root)
    assert drawn == [["gs-soft"], ["vq-ema"]]
    assert "figures/figure_2.png" in (root / "README.md").read_text()
    (root / results.FOLDER / f"{TUNE[0]}.json").unlink()
    results.write_pages(root)
    assert len(drawn) == 2
    assert "figures/figure_2.png" not in (root / "README.md").read_text()


@pytest.mark.parametrize("name", ["smoke", "no-such-sweep"])
def test_the_sample_and_unknown_sweeps_are_refused(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(name, capsys)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert files(root) == set(TUNE)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"trial": {"estimator": "gs-soft"}}', '{"trial": 5}', "[" * 100_000]
)
def test_a_file_that_is_no_result_is_one_sentence(content: str, tmp_path: Path) -> None:
    path = tmp_path / "gs-soft.json"
    path.write_text(content)
    with pytest.raises(DvqError, match="it holds no trial"):
        preflight.find_sweep(str(path))
    with pytest.raises(DvqError, match="no results of a trial"):
        kept.load(tmp_path)
    with pytest.raises(DvqError, match="No such file"):
        preflight.find_sweep(str(tmp_path / "none.json"))


def test_the_tables_here_are_those_of_the_files_here() -> None:
    root = Path(__file__).parents[2]
    there = kept.load(root / results.FOLDER)
    assert (root / results.FOLDER / "README.md").read_text() == kept.page(there, results.FOLDER)
    assert kept.section(there, results.FOLDER) in (root / "README.md").read_text()
    assert sorted(path.stem for path in (root / results.FOLDER).glob("*.json")) == sorted(
        kept.name(trial(one["trial"])) for one in there
    )


def test_tuning_takes_as_much_care_of_each_estimator_and_no_test_image() -> None:
    trials = preflight.find_sweep("tune").trials().values()
    assert {one.split for one in trials} == {"tune"}
    counts = {
        name: Counter(one.steps for one in trials if one.estimator == name) for name in ("gs-soft", "vq-ema")
    }
    assert counts["gs-soft"] == counts["vq-ema"]
    assert {one.normalization for one in trials if one.estimator == "vimco"} == {"batch", "none"}


def test_the_sweeps_for_gpus_share_their_trials() -> None:
    first, second = (
        {one.key() for one in preflight.find_sweep(name).trials().values()} for name in ("figure1", "figure2")
    )
    assert second <= first


def test_the_sweeps_of_the_papers_numbers_train_all_in_full_and_alike() -> None:
    trials = [one for name in ("paper", "gaussian") for one in preflight.find_sweep(name).trials().values()]
    assert not any(partly_trained(values(one)) for one in trials)
    there = [trial(one["trial"]) for one in kept.load(preflight.SWEEPS.parent / "results")]
    full = [one for one in there if one.split == "test" and not partly_trained(values(one))]
    longer = preflight.find_sweep("longer").trials().values()
    trained = {
        (one.family(), one.steps) for one in [*trials, *longer]
    }  # whatever prior was fitted afterwards
    assert {(one.family(), one.steps) for one in full} <= trained
    alike = ("split", "steps", "normalization_until", "learning_rate", "decay_after", "decay_half_life")
    assert len({tuple(getattr(one, field) for field in alike) for one in trials}) == 1


def test_a_name_says_what_a_trial_is_and_differs_with_whatever_it_sets() -> None:
    points: list[dict[str, Any]] = [
        {},
        {"seed": 1},
        {"learning_rate": 1e-3},
        {"learning_rate": 1e-4},
        {"steps": 2000},
    ]
    points += [{"num_codes": 64}, {"split": "tune"}, {"estimator": "gs-hard"}, {"temperature": 0.25}]
    names = [kept.name(trial({"estimator": "gs-soft", **at})) for at in points]
    assert len(set(names)) == len(points)
    assert re.fullmatch("gs-soft-c512-k8-s0-100000-[0-9a-f]{8}", names[0])
    assert names[6].startswith("gs-soft-c512-k8-s0-tune-100000-")
    assert kept.name(trial({"estimator": "gs-soft", "log_every": 7})) == names[0]
