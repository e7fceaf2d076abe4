"""What a sweep will take, told from what was measured; and the budget that it must not exceed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.store import Store
from dvq import DvqError
from dvq.events import Events
from dvq.sweep import Sweep
from dvq.trial import values
from pipeline import forecast, submit
from pipeline.preflight import find_sweep
from pipeline.profile import Cluster, Profile

GPU = Profile(gpu=1, parallelism=4, cluster=Cluster())
BASE = {"data": "cifar10-sample", "batch_size": 100}
EVENTS = [
    (0, "state", "training"), (90, "metrics", ""),  # killed, an hour later started again
    (3690, "state", "training"), (3700, "metrics", ""), (3790, "metrics", ""),
    (4000, "state", "evaluating"),  # had to wait for a GPU, and was killed, an hour later started again
    (7600, "state", "evaluating"), (7605, "failure", ""),  # and the next day once more
    (90000, "state", "evaluating"), (90005, "state", "evaluated"),  # analyzed on the day after that
    (180000, "state", "analyzing"), (180100, "state", "finished"),
]  # fmt: skip
HELD = 90 + 10 + 90 + 5 + 5
Sweeps = Callable[..., Sweep]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def sweep(*estimators: str, steps: int = 1000, seeds: tuple[int, ...] = (0, 1), **grid: Any) -> Sweep:
    return Sweep(
        name="s",
        base={**BASE, "steps": steps},
        grid={"estimator": list(estimators), **grid},
        seeds=list(seeds),
    )


def finish(store: Store, of: Sweep, name: str, device: str = "cuda:0 (H200)", events: Any = EVENTS) -> None:
    """Let the store have a trial finished, which held its device for HELD seconds."""
    trial = of.trials()[name]
    folder = store.trial(trial.key())
    (folder / "events").mkdir(parents=True)
    lines = [
        {"time": 1e9 + at, "kind": kind, **({"state": state} if state else {"step": 1, "values": {}})}
        for at, kind, state in events
    ]
    (folder / "events/000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / f"{trial.steps:09d}").mkdir(parents=True)
    (folder / "checkpoints" / f"{trial.steps:09d}" / "checkpoint.json").write_text("{}")
    results = {"trial": values(trial), "training": {"seconds": 1.0}, "provenance": {"device": device}}
    (folder / "results.json").write_text(json.dumps(results))


def test_a_trial_like_another_takes_as_long(store: Store) -> None:
    """By its own kind of device; the steps that are done already count no more."""
    finish(store, sweep("vq-ema"), "vq-ema-c512-k8-s0")
    finish(store, sweep("vq-ema", seeds=(7,)), "vq-ema-c512-k8-s7", "cpu (AVX512)", [])
    found = forecast.plan(sweep("vq-ema", steps=3000, seeds=(0, 1)).trials(), store, GPU)
    assert dict(found.states) == {"finished": 0, "going on": 1, "failed before": 0, "new": 1}
    assert found.hours * 3600 == pytest.approx(HELD * (2 + 3))
    assert (found.guessed, found.unknown, found.devices) == (0, (), ("cuda:0 (H200)",))
    shared = GPU.model_copy(update={"cluster": Cluster(sharing=4)})
    assert forecast.plan(sweep("vq-ema").trials(), store, shared).hours * 3600 == pytest.approx(HELD / 4)
    several = GPU.model_copy(update={"gpu": 2})
    assert forecast.plan(sweep("vq-ema").trials(), store, several).hours * 3600 == pytest.approx(HELD * 2)


def test_of_trials_alike_the_slowest_counts(store: Store) -> None:
    """By its seconds of training where its events tell of none."""
    whole = sweep("vq-ema", seeds=(0, 1, 2, 3))
    for seed, seconds in ((0, 300), (1, 500), (2, 400)):
        held = [(0, "state", "training"), (seconds, "state", "finished")]
        finish(store, whole, f"vq-ema-c512-k8-s{seed}", events=held if seed else [])
    assert forecast.plan(whole.trials(), store, GPU).hours * 3600 == pytest.approx(500)
    assert [forecast.devices(Profile(cpu=cpu)) for cpu in (None, 4)] == [1, 4]


def test_trials_of_other_sweeps_tell_of_other_seeds_and_of_their_estimator(store: Store) -> None:
    """None of the sweep's own families is in the store."""
    finish(store, sweep("vq-ema"), "vq-ema-c512-k8-s0")
    found = forecast.plan(sweep("vq-ema", seeds=(7,)).trials(), store, GPU)
    assert (found.hours * 3600, found.guessed) == (pytest.approx(HELD), 0)
    found = forecast.plan(sweep("vq-ema", seeds=(7,), num_codes=[8]).trials(), store, GPU)
    assert (found.hours * 3600, found.guessed) == (pytest.approx(HELD), 1)


def test_a_failed_trial_is_not_told_as_new(store: Store) -> None:
    whole = sweep("vq-ema")
    Events(store.trial(whole.trials()["vq-ema-c512-k8-s0"].key())).failure("killed")
    assert dict(forecast.plan(whole.trials(), store, GPU).states) == {
        "finished": 0, "going on": 0, "failed before": 1, "new": 1,
    }  # fmt: skip


def test_finished_trials_take_nothing(store: Store) -> None:
    for seed in (0, 1):
        finish(store, sweep("vq-ema"), f"vq-ema-c512-k8-s{seed}")
    found = forecast.plan(sweep("vq-ema").trials(), store, GPU)
    assert found.hours == 0
    assert forecast.lines(found, GPU, 4, "image", None) == [
        "trials   2 finished",
        "forecast nothing to compute",
    ]
    anew = forecast.plan(sweep("vq-ema").trials(), store, GPU, fresh=True)
    assert anew.states == {"finished": 0, "going on": 0, "failed before": 0, "new": 2}
    assert anew.hours * 3600 == pytest.approx(2 * HELD)


def test_others_are_guessed_by_the_slowest_of_their_estimator(store: Store) -> None:
    whole = sweep("vq-ema", "gs-soft", num_codes=[8, 512], seeds=(0,))
    finish(store, whole, "vq-ema-c8-k8-s0")
    found = forecast.plan(whole.trials(), store, GPU)
    assert found.guessed == 1
    assert "; 1 trial taken as the slowest of" in "".join(forecast.lines(found, GPU, 2, "image", None))
    assert found.unknown == ("gs-soft-c8-k8-s0", "gs-soft-c512-k8-s0")
    with pytest.raises(DvqError, match=r"2 of the trials \(the first: gs-soft-c8-k8-s0\); run a short one"):
        forecast.check(found, 100, GPU)
    told = GPU.model_copy(update={"images_per_second": {"gs-soft": 1000.0, "vq-ema": 1.0}})
    found = forecast.plan(whole.trials(), store, told)
    assert found.hours * 3600 == pytest.approx(1000 * 100 * (1 / 1000 + 1 / 1000 + 1))
    assert (found.guessed, found.unknown) == (3, ())


def test_nothing_is_guessed_from_images_of_another_size(store: Store) -> None:
    finish(store, sweep("vq-ema"), "vq-ema-c512-k8-s0")
    large = sweep("vq-ema", num_codes=[8], data=["birds@128x128x3-0123456789abcdef"])
    found = forecast.plan(large.trials(), store, GPU)
    assert (found.guessed, len(found.unknown)) == (0, 2)


def test_a_budget_refuses_what_is_over_it(store: Store) -> None:
    finish(store, sweep("vq-ema"), "vq-ema-c512-k8-s0")
    found = forecast.plan(sweep("vq-ema", seeds=tuple(range(73))).trials(), store, GPU)
    assert found.hours == pytest.approx(72 * HELD / 3600) == 4.0
    forecast.check(found, 4.01, GPU)
    forecast.check(found, None, GPU)
    with pytest.raises(
        DvqError, match=r"the forecast of 4\.00 GPU-hours is over the budget of 3\.9: raise BUDGET"
    ):
        forecast.check(found, 3.9, GPU)
    lines = forecast.lines(found, GPU, 4, "r/dvq:1", 3.9)
    assert lines[0] == "trials   1 finished, 72 new"
    assert lines[1] == "at once  4 trials, each 1 nvidia.com/gpu"
    assert lines[2] == "pods     219, and a driver for each; 2 of a trial's 3 hold its GPU"
    assert lines[3] == "devices  4 GPU at most"
    assert GPU.cluster
    few = GPU.model_copy(update={"cluster": GPU.cluster.model_copy(update={"limit": 30})})
    several = forecast.lines(found, few, 4, "r/dvq:1", 3.9)
    assert several[1] == "runs     3, each of 30 trials at most"
    assert several[3].startswith("pods     225,")
    assert (
        lines[5]
        == "forecast 4.00 GPU-hours, 1.00 hours or more on the clock, by images/s measured on cuda:0 (H200)"
    )


def test_what_was_spent_counts_from_its_beginning(store: Store) -> None:
    whole = sweep("vq-ema")
    finish(store, whole, "vq-ema-c512-k8-s0")
    trials = whole.trials().values()
    assert forecast.hours_spent(trials, store, GPU, 0) * 3600 == pytest.approx(HELD)
    assert forecast.hours_spent(trials, store, GPU, 1e9 + 60) * 3600 == pytest.approx(HELD - 60)
    assert forecast.hours_spent(trials, store, GPU, 1e9 + 7603) * 3600 == pytest.approx(2 + 5)
    assert forecast.hours_spent(trials, store, GPU, 1e9 + 90010) == 0
    finish(store, whole, "vq-ema-c512-k8-s1")
    two = GPU.model_copy(update={"gpu": 2})
    assert forecast.hours_spent(trials, store, two, 0) * 3600 == pytest.approx(2 * 2 * HELD)


@pytest.mark.parametrize("damage", ["{", '{"provenance": {"device": "cuda"}, "trial": {}}'])
def test_what_is_wrong_with_other_sweeps_trials_is_left_out(damage: str, store: Store) -> None:
    """As are the store's locks."""
    finish(store, sweep("vq-ema"), "vq-ema-c512-k8-s0")
    finish(store, sweep("gs-soft"), "gs-soft-c512-k8-s0")
    (store.root / "trials" / ".vq-ema-1.lock").touch()
    (store.trial(sweep("gs-soft").trials()["gs-soft-c512-k8-s0"].key()) / "results.json").write_text(damage)
    found = forecast.plan(sweep("vq-ema", seeds=(7,)).trials(), store, GPU)
    assert (found.hours * 3600, found.unknown) == (pytest.approx(HELD), ())
    assert len(store.keys()) == 2


def test_a_sweeps_own_trials_tell_more_than_others(store: Store) -> None:
    """A guess is of its own slowest; a device that told of nothing is not named."""
    finish(store, sweep("vq-ema"), "vq-ema-c512-k8-s0")
    slow = [(0, "state", "training"), (5000, "state", "finished")]
    finish(store, sweep("vq-ema", num_codes=[16]), "vq-ema-c16-k8-s0", "cuda:0 (slow)", slow)
    found = forecast.plan(sweep("vq-ema", num_codes=[8, 512]).trials(), store, GPU)
    assert (found.hours * 3600, found.guessed) == (pytest.approx(3 * HELD), 2)
    assert found.devices == ("cuda:0 (H200)",)


def test_for_a_sweep_that_is_finished_no_other_is_looked_at(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep("vq-ema", seeds=(0,))
    finish(store, whole, "vq-ema-c512-k8-s0", "cpu (AVX512)")
    looked: list[str] = []
    monkeypatch.setattr(Store, "look", lambda _, keys: looked.extend(keys))
    assert forecast.plan(whole.trials(), store, GPU).states["finished"] == 1
    assert looked == [one.key() for one in whole.trials().values()]


@pytest.mark.parametrize(("gpus", "unit"), [(0, "CPU"), (4, "GPU")])
def test_trials_of_this_machine_are_forecast_by_what_they_would_run_on(
    gpus: int, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DVQ_STORE", str(tmp_path))
    monkeypatch.delenv("DVQ_DEVICE", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    another = find_sweep("smoke").model_copy(update={"seeds": [7]})
    finish(Store(tmp_path), another, next(iter(another.trials())))
    submit.submit("smoke", dry_run=True)
    told = capsys.readouterr().out
    assert f"devices  2 {unit} at most" in told
    assert ("measured on cuda:0 (H200)" in told) == (gpus > 0)
