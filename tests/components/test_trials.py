"""A trial's way through train, evaluate and analyze, with a store, without one, and with failures."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import dvq
from components import exit_on_error, judging, tracking, trials
from components.folder import State, begin, read_json, state, write_json
from components.store import Store
from dvq import DvqError, autoregressive, events, failures, goodput
from dvq.config import trial
from dvq.fingerprints import FINGERPRINTS
from dvq.pictures import Pictures
from dvq.sweep import Sweep
from tests.components.conftest import BASE, run


def test_a_trial_becomes_results(store: Store, prepared: Path, tmp_path: Path) -> None:
    numbers = run("estimator=gs-soft seed=3 evaluate_every=2", prepared, tmp_path)
    key = trial({**BASE, "estimator": "gs-soft", "seed": 3}).key()
    results = store.results(key)
    assert results is not None
    assert store.state(key) == State("finished")
    assert results["name"] == "gs-soft-c4-k2-s3"
    assert results["data"]["fingerprint"] == FINGERPRINTS["cifar10-sample"]
    assert results["evaluation"]["images"] == 500
    assert results["evaluation"]["bits_per_dim"] == numbers["bits_per_dim"]
    assert [point["step"] for point in results["curves"]] == [2, 4]
    assert results["curves"][-1]["bits_per_dim"] == pytest.approx(numbers["bits_per_dim"], rel=1e-6)
    assert results["provenance"]["threads"] == 1
    assert results["evaluation"]["provenance"]["commit"] == results["provenance"]["commit"]
    drawn = {f"figures/{name}.png" for name in ("explained_variance", "codebooks", "codes", "pictures")}
    for made in {"results.json", "analysis.npz", "patches.npz", "pictures.npz"} | drawn:
        assert (tmp_path / "analysis" / made).stat().st_size > 0
    states = [event["state"] for event in events.read(store.trial(key)) if event["kind"] == "state"]
    assert states == ["training", "evaluating", "evaluated", "analyzing", "finished"]


@pytest.mark.parametrize("with_store", [True, False])
def test_a_failure_fails_its_step_unless_a_sweep_records_it(
    with_store: bool, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else somebody's pipeline would be green, and its metrics empty."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVQ_STORE", str(tmp_path / "store") if with_store else "")
    diverges = ("estimator=gs-soft learning_rate=1e30", json.dumps(BASE), prepared, tmp_path / "model", "")
    with pytest.raises(DvqError, match="training diverged: at step "):
        trials.train(*diverges)
    with pytest.raises(DvqError, match="it has no weights, for its training failed"):
        judging.evaluate(prepared, tmp_path / "model", tmp_path / "evaluation")
    with pytest.raises(DvqError, match="there is no evaluation of the model"):
        judging.analyze(prepared, tmp_path / "model", tmp_path / "evaluation", tmp_path / "analysis", "")
    trials.train("estimator=gs-soft", json.dumps(BASE), prepared, tmp_path / "model", "")
    monkeypatch.setattr("dvq.evaluate.evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(DvqError, match="evaluating: ZeroDivisionError"):
        judging.evaluate(prepared, tmp_path / "model", tmp_path / "evaluation")
    if not with_store:
        with pytest.raises(DvqError, match="training diverged"):  # nothing could record it
            trials.train(*diverges, record=True)


@pytest.mark.parametrize(
    ("overrides", "base", "says"),
    [
        ("estimator=vq-ema", "{", r"base: this is no JSON \(.*\); give an object of fields, or \{\}"),
        ("estimator=vq-ema", "[1]", r"base: \[1\] is no JSON object"),
        (
            '{"estimator": "vq-ema"}',
            "{}",
            r"'\{estimator:' sets no field; write estimator=gs-soft num_codes=512",
        ),
        ("gs-soft, seed 0", "{}", r"'gs-soft,' sets no field"),
    ],
)
def test_what_is_wrong_with_a_trial_is_one_sentence(
    overrides: str, base: str, says: str, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(DvqError, match=says):
        trials.train(overrides, base, prepared, tmp_path / "model", "")
    assert not (tmp_path / "model").exists()


def test_a_component_ends_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_error():
        raise DvqError("what is wrong; what to do")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: what is wrong; what to do\n"
    with pytest.raises(ZeroDivisionError), exit_on_error():
        raise ZeroDivisionError


def test_a_finished_trial_is_not_computed_again(store: Store, prepared: Path, tmp_path: Path) -> None:
    first = run("estimator=vq-ema", prepared, tmp_path / "a")
    folder = store.trial(trial({**BASE, "estimator": "vq-ema"}).key())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert run("estimator=vq-ema", prepared, tmp_path / "b") == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert (tmp_path / "b" / "analysis" / "results.json").exists()


def test_a_plan_with_a_limit_has_those_last_that_failed(store: Store) -> None:
    """So that a sweep larger than a run gets to its end, however many of its trials fail."""
    sweep = Sweep(name="s", base=BASE, grid={"estimator": ["vq-ema"]}, seeds=[0, 1, 2, 3])
    for seed in (0, 2):
        failed = trial({**BASE, "estimator": "vq-ema", "seed": seed})
        begin(store.trial(failed.key()), failed, f"s{seed}")
        events.Events(store.trial(failed.key())).failure("out of memory")
    died = trial({**BASE, "estimator": "vq-ema", "seed": 1})  # without a word, before its first checkpoint
    begin(store.trial(died.key()), died, "s1")
    events.Events(store.trial(died.key())).state("training")
    assert [one["seed"] for one in trials.unfinished(sweep)] == [0, 1, 2, 3]
    assert [one["seed"] for one in trials.unfinished(sweep, 3)] == [3, 1, 0]
    assert [one["seed"] for one in trials.unfinished(sweep, 9)] == [3, 1, 0, 2]


def test_a_plan_with_a_limit_has_those_late_whose_worker_died_without_a_word(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whatever step, behind those that are new, and before those that failed."""
    sweep = Sweep(name="s", base=BASE, grid={"estimator": ["vq-ema"]}, seeds=[0, 1, 2])
    died, failed, _ = (one.key() for one in sweep.trials().values())
    (store.trial(died) / "checkpoints" / "000000002").mkdir(parents=True)
    (store.trial(died) / "checkpoints" / "000000002" / "checkpoint.json").write_text("{}")
    events.Events(store.trial(failed)).failure("it diverged")
    assert [one["seed"] for one in trials.unfinished(sweep, 9)] == [0, 2, 1]
    monkeypatch.setattr(Store, "silent", lambda _, key: key == died)
    assert [one["seed"] for one in trials.unfinished(sweep, 9)] == [2, 0, 1]


def test_a_finished_trial_that_its_experiment_lacks_is_in_the_plan(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    sweep = Sweep(name="s", base=BASE, grid={"estimator": ["vq-ema"]})
    (one,) = sweep.trials().values()
    begin(store.trial(one.key()), one, "x")
    write_json(store.trial(one.key()) / "results.json", {})
    tracking.mark_sent(store.trial(one.key()), "another")
    assert trials.unfinished(sweep, experiment="s") == sweep.points()
    assert trials.unfinished(sweep) == [], "where nothing is to be tracked"
    tracking.mark_sent(store.trial(one.key()), "s")
    assert trials.unfinished(sweep, experiment="s") == []


def test_a_longer_trial_goes_on_from_a_shorter_one(store: Store, prepared: Path, tmp_path: Path) -> None:
    """And comes to the same as if it had been asked for at once."""
    run("estimator=vq-ema", prepared, tmp_path / "short")
    long = {**BASE, "estimator": "vq-ema", "steps": 8}
    assert store.reached_step(trial(long)) == 4
    run("estimator=vq-ema steps=8", prepared, tmp_path / "long")
    folder = store.trial(trial(long).key())
    assert goodput.read(folder) == {"attempts": 1, "steps_lost": 0, "seconds_lost": 0.0}
    assert store.state(trial({**BASE, "estimator": "vq-ema"}).key()).name == "finished"

    resumed = store.results(folder.name)
    shutil.rmtree(store.root / "trials")
    run("estimator=vq-ema steps=8", prepared, tmp_path / "once")
    once = store.results(folder.name)
    assert resumed is not None
    assert once is not None
    assert resumed["evaluation"] == once["evaluation"]
    assert resumed["curves"] == once["curves"]


def test_an_autoregressive_prior_asks_for_no_training(store: Store, prepared: Path, tmp_path: Path) -> None:
    run("estimator=vq-ema", prepared, tmp_path / "without")
    run("estimator=vq-ema autoregressive_steps=2", prepared, tmp_path / "with")
    without, found = (
        store.results(trial({**BASE, "estimator": "vq-ema", "autoregressive_steps": n}).key()) for n in (0, 2)
    )
    assert without is not None
    assert found is not None
    assert found["training"]["goodput"] == {"attempts": 1, "steps_lost": 0, "seconds_lost": 0.0}
    assert found["curves"] == without["curves"], "of the same training"
    told = dict(found["evaluation"])
    assert told.pop("rate_autoregressive") != pytest.approx(told["rate"], rel=1e-6)
    assert told.pop("autoregressive_bits_per_dim") < 10
    assert told.pop("autoregressive_bits_per_dim_se") > 0
    assert np.shape(codes := told.pop("samples")) == (16, 8, 8, BASE["num_latents"])
    model = dvq.load(tmp_path / "with" / "model")
    drawn = Pictures.load(tmp_path / "with" / "analysis" / "pictures.npz")
    assert np.array_equal(drawn.samples, model.decode(np.asarray(codes)).numpy())
    prior = autoregressive.load(store.trial(found["key"]) / "model")
    assert np.array_equal(prior.sample(16, model.generator(0)), codes)
    assert told == without["evaluation"]


def test_the_end_of_the_shorter_trial_is_not_the_longer_ones(
    store: Store, prepared: Path, tmp_path: Path
) -> None:
    run("estimator=vq-ema", prepared, tmp_path / "short")
    short, long = (trial({**BASE, "estimator": "vq-ema", "steps": steps}) for steps in (4, 8))
    told = [event.get("state") for event in events.read(store.trial(short.key()))]
    assert told[-1] == "finished"
    begin(store.trial(long.key()), long, "long", store.shorter_trial(long))
    told = [event.get("state") for event in events.read(store.trial(long.key()))]
    assert "finished" not in told
    assert "evaluating" not in told


def test_what_is_wrong_with_a_shorter_trial_is_the_longer_ones_failure(
    store: Store, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of a trial that goes on from its own checkpoints."""
    run("estimator=vq-ema", prepared, tmp_path / "short")
    long = store.trial(trial({**BASE, "estimator": "vq-ema", "steps": 8}).key())

    def changes(*_: object, **__: object) -> None:
        raise shutil.Error([("a checkpoint", "its copy", "No such file")])

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", changes)
        trials.train("estimator=vq-ema steps=8", json.dumps(BASE), prepared, tmp_path / "model", "", True)
    assert "changed while it was copied" in state(long).reason
    assert not (long / "trial.json").exists()
    run("estimator=vq-ema steps=8", prepared, tmp_path / "again")
    assert state(long).name == "finished"

    shutil.rmtree(long / "model")
    (long / "results.json").unlink()
    monkeypatch.setattr(Store, "shorter_trial", lambda *_: 1 / 0)
    run("estimator=vq-ema steps=8", prepared, tmp_path / "its own")
    assert state(long).name == "finished"


def was(folder: Path, **fields: object) -> None:
    """Make what is kept in a trial's folder tell of other values, as from before an edit of defaults."""
    for path in (folder / "trial.json", folder / "results.json"):
        if document := read_json(path):
            write_json(path, {**document, "trial": {**document["trial"], **fields}})


def test_what_another_default_computed_is_not_taken_for_this_ones(
    store: Store, prepared: Path, tmp_path: Path
) -> None:
    """An edited default is not in the key."""
    run("estimator=gs-soft", prepared, tmp_path / "short")
    sweep = Sweep(name="s", base=BASE, grid={"estimator": ["gs-soft"]})
    (name, one), long = (
        next(iter(sweep.trials().items())),
        trial({**BASE, "estimator": "gs-soft", "steps": 8}),
    )
    folder = store.trial(one.key())
    was(folder, log_every=7, a_field_that_is_gone=1, data="the-same@by-another-name")
    assert store.outcomes(sweep.trials())[1] == {}, "these change no number"

    was(folder, temperature=0.25)
    told = f"trial {one.key()}: it was computed with temperature 0.25, and the default is 0.5 now; FRESH=1 computes"
    with pytest.raises(DvqError, match=re.escape(told)):
        store.outcomes(sweep.trials())
    (folder / "results.json").unlink()
    for steps, asked in (("", one), (" steps=8", long)):  # trained already; and one that would go on from it
        trials.train(f"estimator=gs-soft{steps}", json.dumps(BASE), prepared, tmp_path / "model", "", True)
        assert store.state(asked.key()).reason.startswith(told)
    store.remove(one.key())
    run("estimator=gs-soft", prepared, tmp_path / "anew")
    assert [found["name"] for found in store.outcomes(sweep.trials())[0]] == [name]


def test_a_folder_of_another_format_is_refused(store: Store, prepared: Path, tmp_path: Path) -> None:
    one = trial({**BASE, "estimator": "vq-ema"})
    begin(store.trial(one.key()), one, "x")
    path = store.trial(one.key()) / "trial.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format": 1', '"format": 2'), encoding="utf-8")
    before = path.read_bytes()
    run("estimator=vq-ema", prepared, tmp_path)
    found = store.state(one.key())
    assert "has format 2, and this version reads 1" in found.reason
    assert path.read_bytes() == before


def test_without_a_store_the_artifacts_are_complete(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the results in a store hold: the name that tells trials apart and the curves too."""
    point, found = "estimator=vq-ema learning_rate=0.002 evaluate_every=2", []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for place in ("", str(tmp_path / "store")):
        monkeypatch.setenv("DVQ_STORE", place)
        out = tmp_path / f"out{place and '-store'}"
        numbers = run(point, prepared, out)
        results = json.loads((out / "analysis" / "results.json").read_text(encoding="utf-8"))
        assert results["evaluation"]["bits_per_dim"] == numbers["bits_per_dim"]
        assert (out / "model" / "model.safetensors").exists()
        found.append({key: results[key] for key in ("name", "key", "evaluation", "curves", "analysis")})
    assert found[0] == found[1]
    assert found[0]["name"] == "vq-ema-c4-k2-s0-learning-rate-0.002"
    assert len(found[0]["curves"]) == 2


def test_a_trial_that_raises_is_a_failure_with_its_reason(
    store: Store, prepared: Path, tmp_path: Path
) -> None:
    assert run("estimator=gs-soft learning_rate=1e30", prepared, tmp_path) == {}
    found = store.state(trial({**BASE, "estimator": "gs-soft", "learning_rate": 1e30}).key())
    assert found.name == "failed"
    assert "training diverged: at step " in found.reason


def test_out_of_memory_is_a_failure_with_its_reason(store: Store, prepared: Path, tmp_path: Path) -> None:
    run("estimator=gs-soft num_codes=2000000000", prepared, tmp_path)
    found = store.state(trial({**BASE, "estimator": "gs-soft", "num_codes": 2_000_000_000}).key())
    assert found.name == "failed"
    assert found.reason.startswith("out of memory: ")


def test_a_failure_is_tried_again(store: Store, prepared: Path, tmp_path: Path) -> None:
    one = trial({**BASE, "estimator": "vq-ema"})
    begin(store.trial(one.key()), one, "x")
    events.Events(store.trial(one.key())).failure("the disk was full")
    assert store.state(one.key()) == State("failed", "the disk was full")
    run("estimator=vq-ema", prepared, tmp_path)
    assert store.state(one.key()).name == "finished"


def test_a_machine_without_its_gpu_fails_the_step_too(
    store: Store, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a cluster would send trial after trial to the node whose GPU is broken."""
    key = trial({**BASE, "estimator": "vq-ema"}).key()
    model, out = tmp_path / "model", tmp_path / "evaluation"
    monkeypatch.setenv("DVQ_DEVICE", "cuda")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SystemExit, match=str(failures.UNUSABLE)):
        trials.train("estimator=vq-ema", json.dumps(BASE), prepared, model, "")
    assert store.state(key).name == "interrupted", "what waits for another machine has not failed"
    assert "sees no GPU" in store.state(key).reason
    monkeypatch.delenv("DVQ_DEVICE")
    trials.train("estimator=vq-ema", json.dumps(BASE), prepared, model, "")
    monkeypatch.setenv("DVQ_DEVICE", "cuda")
    with pytest.raises(SystemExit, match=str(failures.UNUSABLE)):
        judging.evaluate(prepared, model, out)
    assert "sees no GPU" in store.state(key).reason


def test_a_child_that_says_nothing_has_not_failed_as_the_one_before(
    store: Store, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that cannot be imported since."""
    one = trial({**BASE, "estimator": "vq-ema"})
    folder = store.trial(one.key())
    begin(folder, one, "name")
    events.Events(folder).failure("training diverged")
    monkeypatch.setattr(trials.sys, "executable", shutil.which("false"))
    trials.train("estimator=vq-ema", json.dumps(BASE), prepared, tmp_path / "model", "", record=True)
    assert state(folder).reason == "training ended with exit code 1; its output is in the log"


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (-signal.SIGKILL, "SIGKILL"),
        (-signal.SIGSEGV, "SIGSEGV"),
        (-40, "killed by signal 40"),
        (3, "exit code 3"),
    ],
)
def test_any_death_has_a_sentence(code: int, says: str) -> None:
    assert says in failures.death(code)


def test_a_line_that_is_still_being_written_is_no_event(tmp_path: Path) -> None:
    diary = events.Events(tmp_path)
    diary.state("training")
    (tmp_path / "events" / "000001.jsonl").write_text('{"kind": "state", "st', encoding="utf-8")
    assert [event["kind"] for event in events.read(tmp_path)] == ["state"]
    assert events.read(tmp_path).__next__()["pid"] == os.getpid()
    assert state(tmp_path).name == "interrupted"


def test_what_the_system_leaves_beside_events_is_none(tmp_path: Path) -> None:
    """As a Mac on disks of other systems."""
    events.Events(tmp_path).state("training")
    (tmp_path / "events" / "._000000.jsonl").write_bytes(b"\0\5\x16\7")
    events.Events(tmp_path).state("evaluating")
    assert [event["state"] for event in events.read(tmp_path)] == ["training", "evaluating"]


def test_a_damaged_line_costs_its_event_alone(tmp_path: Path) -> None:
    """What a power cut leaves: without this neither could the trial be told of, nor would it go on."""
    events.Events(tmp_path).state("training")
    (tmp_path / "events" / "000001.jsonl").write_bytes(b"\0" * 20 + b"\n")
    events.Events(tmp_path).failure("for a reason")
    assert state(tmp_path).reason == "for a reason"
