"""What the launcher says last."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from components import tracking
from components.folder import begin
from components.store import DID_NOT_START, Store
from dvq import DvqError, checkpoint, events
from dvq.sweep import Sweep
from dvq.trial import Trial, values
from pipeline import conclusion
from pipeline.job import Job, remove
from pipeline.profile import Profile
from pipeline.submit import _log_excerpt, conclude

SWEEP = Sweep(name="s", base={"data": "cifar10-sample"}, grid={"estimator": ["gs-soft", "vq-ema", "vimco"]})


@pytest.mark.parametrize("profile", [None, Profile()])
def test_finished_trials_that_mlflow_lacks_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Profile | None
) -> None:
    """Its own faults are in the log alone, where nobody looks after a success. Containers get the same address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    trials, store = SWEEP.trials(), Store(tmp_path)
    (tmp_path / "kfp.log").touch()
    job = Job(SWEEP, trials, store, "", 1, tmp_path, profile)
    first, _, failed = trials
    monkeypatch.setattr(conclusion, "show", lambda *_: {failed: "why not"})
    for name, lacks in ((first, "MLflow lacks 1 of"), (None, "MLflow lacks 2 of")):
        console = Console(file=io.StringIO(), width=200)
        if name:
            folder = store.trial(trials[name].key())
            folder.mkdir(parents=True)
            tracking.mark_sent(folder, "s")
        assert conclude(job, 0, console) == 1
        assert isinstance(console.file, io.StringIO)
        assert lacks in console.file.getvalue()
        tracking.unmark_sent(store.trial(trials[first].key()), "s")
    for one in trials.values():
        store.trial(one.key()).mkdir(parents=True, exist_ok=True)
        tracking.mark_sent(store.trial(one.key()), "s")
    console = Console(file=io.StringIO(), width=200)
    conclude(job, 0, console)
    assert isinstance(console.file, io.StringIO)
    assert "MLflow" not in console.file.getvalue()


def finish(store: Store, trials: dict[str, Trial]) -> None:
    """Leave results of the trials in the store."""
    for name, one in trials.items():
        bits = 7.0 + one.seed / 10
        evaluation = {"split": "test", "bits_per_dim": bits, "bits_per_dim_se": 0.01, "rate": 0.5}
        evaluation["fitted_bits_per_dim"] = bits - 0.2
        found = {"name": name, "key": one.key(), "trial": values(one), "data": {"name": one.data}}
        found["evaluation"] = {**evaluation, "distortion": bits - 0.5}
        found["training"] = {"goodput": {"steps_lost": 0, "seconds_lost": 0, "attempts": 1}}
        store.trial(one.key()).mkdir(parents=True)
        (store.trial(one.key()) / "results.json").write_text(json.dumps(found))


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
def test_several_seeds_are_told_by_their_mean(seeds: list[int], tmp_path: Path) -> None:
    sweep, store = SWEEP.model_copy(update={"seeds": seeds}), Store(tmp_path)
    finish(store, sweep.trials())
    out = io.StringIO()
    assert conclusion.show(sweep, sweep.trials(), store, Console(file=out, width=80)) == {}
    text = out.getvalue()
    assert "gs-soft-c512-k8-s0 7.000 ± 0.010 6.800 0.500 6.500" in " ".join(text.split())
    assert ("means over seeds" in text) == (len(seeds) > 1)
    if len(seeds) > 1:
        told = [line.split() for line in text.partition("means over seeds")[2].splitlines()]
        assert told[3] == ["gs-soft-c512-k8", "3", "7.100", "±", "0.058", "–", "6.900", "±", "0.058"]


def test_settings_are_told_by_their_differences(tmp_path: Path) -> None:
    sweep = SWEEP.model_copy(
        update={"seeds": [0, 1], "grid": {"estimator": ["vq-ema"], "num_codes": [16, 32]}}
    )
    finish(Store(tmp_path), sweep.trials())
    for key in [one.key() for name, one in sweep.trials().items() if "c32" in name]:
        path = Store(tmp_path).trial(key) / "results.json"
        found = json.loads(path.read_text())
        found["evaluation"]["bits_per_dim"] += 0.5 + found["trial"]["seed"] / 100
        path.write_text(json.dumps(found))
    out = io.StringIO()
    conclusion.show(sweep, sweep.trials(), Store(tmp_path), Console(file=out, width=80, force_terminal=True))
    lines = re.sub(r"\x1b\[\d*m", "", out.getvalue()).partition("means over seeds")[2].splitlines()
    assert "+0.505 ± 0.005" in lines[4]
    assert max(map(len, lines)) <= 80
    assert "by fitted" not in out.getvalue()
    for one in sweep.trials().values():
        path = Store(tmp_path).trial(one.key()) / "results.json"
        found = json.loads(path.read_text())
        found["evaluation"]["fitted_bits_per_dim"] = 6.5 - one.num_codes / 100
        path.write_text(json.dumps(found))
    conclusion.show(sweep, sweep.trials(), Store(tmp_path), Console(file=out, width=80))
    assert "by fitted bits/dim another is lowest: vq-ema-c32-k8, 6.180 ± 0.000" in out.getvalue()


def test_bits_under_an_autoregressive_prior_have_a_column_where_there_are_some(tmp_path: Path) -> None:
    def told() -> str:
        out = io.StringIO()
        conclusion.show(SWEEP, SWEEP.trials(), Store(tmp_path), Console(file=out, width=80))
        return out.getvalue()

    finish(Store(tmp_path), SWEEP.trials())
    assert "AR prior" not in told()
    path = Store(tmp_path).trial(next(iter(SWEEP.trials().values())).key()) / "results.json"
    found = json.loads(path.read_text())
    found["evaluation"]["autoregressive_bits_per_dim"] = 6.543
    path.write_text(json.dumps(found))
    assert "AR prior: with an autoregressive prior" in told()
    assert "6.800     6.543  0.500" in told()


def test_what_interruptions_cost_is_told_where_there_were_some() -> None:
    undisturbed = {"attempts": 1, "steps_lost": 0, "seconds_lost": 0.0}
    cost = [undisturbed, {"attempts": 3, "steps_lost": 5, "seconds_lost": 2.0}]
    assert conclusion.goodput(cost).startswith("goodput 2 interruptions, after which 5 steps, 2 s of")
    once = conclusion.goodput([{"attempts": 2, "steps_lost": 1, "seconds_lost": 0.0}])
    assert once == "goodput 1 interruption, after which 1 step, 0 s of training, was made again"
    assert conclusion.goodput([undisturbed]) == ""


def test_in_a_file_no_name_is_broken(tmp_path: Path) -> None:
    swept = {"learning_rate": [0.0012345, 0.0023456], "kl_warmup": [1000], "distance_scale": [0.75]}
    sweep = SWEEP.model_copy(update={"grid": {"estimator": ["gs-soft"], **swept}})
    finish(Store(tmp_path), sweep.trials())
    out = io.StringIO()
    conclusion.show(sweep, sweep.trials(), Store(tmp_path), Console(file=out, width=80))
    for name in sweep.trials():
        assert f"\n{name}  7.000" in out.getvalue()


def test_what_held_out_images_chose_is_told_for_a_sweep_on_test_images(tmp_path: Path) -> None:
    for split in ("tune", "test"):
        sweep = SWEEP.model_copy(update={"base": {"data": "cifar10-sample", "split": split}, "seeds": [1, 0]})
        finish(Store(tmp_path), sweep.trials())
        out = io.StringIO()
        conclusion.show(sweep, sweep.trials(), Store(tmp_path), Console(file=out, width=80))
        line = "\nthen, on test images: {estimator: gs-soft, data: cifar10-sample}\n"
        assert (line in out.getvalue()) == (split == "tune")


def test_the_champion_is_named_where_there_is_a_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = SWEEP.model_copy(
        update={"champion": "mine", "base": {"data": "cifar10-sample", "split": "tune"}, "seeds": [1, 0]}
    )
    finish(Store(tmp_path), sweep.trials())
    for uri in ("sqlite:///x.db", ""):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        out = io.StringIO()
        conclusion.show(sweep, sweep.trials(), Store(tmp_path), Console(file=out, width=80))
        best = "best, for models:/mine@champion: gs-soft-c512-k8-s0, the lowest seed of the setting of lowest mean"
        assert (best in out.getvalue()) == bool(uri)


def test_a_champion_that_mlflow_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own faults are in the log alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    sweep = SWEEP.model_copy(update={"champion": "mine"})
    job = Job(sweep, SWEEP.trials(), Store(tmp_path), "", 1, tmp_path, None)
    for one in job.trials.values():
        job.store.trial(one.key()).mkdir(parents=True)
        tracking.mark_sent(job.store.trial(one.key()), "s")
    monkeypatch.setattr(conclusion, "show", lambda *_: {})
    lacks = "tracking: the champion of s is not up to date in MLflow (Invalid value)"
    for log in (lacks, "    champion: models:/mine@champion is gs-soft"):
        (tmp_path / "kfp.log").write_text(log)
        console = Console(file=io.StringIO(), width=200)
        conclude(job, 0, console)
        assert isinstance(console.file, io.StringIO)
        assert ("MLflow lacks the champion: make replay" in console.file.getvalue()) == (log is lacks)


def test_runs_are_where_they_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker, told in (("sqlite:///x.db", "runs:   make ui\n"), ("", "")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker)
        console = Console(file=io.StringIO())
        conclusion.show_places(SWEEP, Store(tmp_path), console)
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue() == told


def test_fresh_trials_go_on_from_no_shorter_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials, store = SWEEP.trials(), Store(tmp_path)
    name, *_ = trials
    checkpoint.write(store.trial(f"{trials[name].family()}-300"), 300, {}, {"events": {}})  # another sweep's
    begin(store.trial(trials[name].key()), trials[name], name)
    events.Events(store.trial(trials[name].key())).state("training")
    assert store.reached_step(trials[name]) == 0  # it was begun before the other was there
    remove(Job(SWEEP, trials, store, "", 1, tmp_path, None))
    assert capsys.readouterr().out.endswith(f": {name}\n")
    assert store.state(trials[name].key()).name == "new"
    assert store.reached_step(trials[name]) == 0
    assert store.shorter_trial(trials[name])  # which is left, and left alone
    assert store.has(trials[name].key(), "trial.json")


def test_where_one_trial_is_at_work_fresh_removes_none(tmp_path: Path) -> None:
    trials, store = SWEEP.trials(), Store(tmp_path)
    for name, trial in trials.items():
        begin(store.trial(trial.key()), trial, name)
    *_, last = (trial.key() for trial in trials.values())
    with store.working(last), pytest.raises(DvqError, match=f"{last} is being computed by another process"):
        remove(Job(SWEEP, trials, store, "", 1, tmp_path, None))
    assert all(store.has(trial.key(), "trial.json") for trial in trials.values())


def test_why_nothing_started_is_not_the_reports_repetition() -> None:
    log = (
        "yaml.parser.ParserError: expected ',' or ']'\n"
        "dvq.DvqError: 1 of 2 trials failed: a: it did not start\n"
    )
    assert _log_excerpt(1, {"a": DID_NOT_START}, log) == ["yaml.parser.ParserError: expected ',' or ']'"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("    error: the report cannot be written", ": the report cannot be written"),
        ("    AttributeError: no fileno\n    OSError: [Errno 5] it", ": OSError: [Errno 5] it"),
        ("nothing", "; the end of its log:"),
    ],
)
def test_why_a_report_failed_is_not_kfps_own_end(text: str, says: str) -> None:
    log = f"{text}\nFile kfp.py\nRuntimeError: Pipeline 'x' finished with status FAILURE. Inner task\n"
    assert _log_excerpt(1, {}, log)[0] == f"the pipeline failed after the trials{says}"
