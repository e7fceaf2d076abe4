"""Training that is killed at any instant ends with the same bits as training that is not.

``make soak`` does the same with 200 kills (the environment variable DVQ_KILLS).
"""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvq import DvqError, checkpoint, config, disk, events, goodput
from dvq.config import trial
from dvq.data import load
from dvq.estimators.gs_soft import GSSoft
from dvq.model import Model
from dvq.probe import probe
from dvq.randomness import minibatch, noise_seed
from dvq.train import train
from dvq.trainer import Trainer
from dvq.training import Interrupted, Training, curve_point
from dvq.trial import Loss, Trial, values

KILLS = int(os.environ.get("DVQ_KILLS", "20"))
TINY: dict[str, Any] = {
    "estimator": "gs-soft",
    "data": "noise@0000000000000000",
    "features": 4,
    "num_latents": 2,
    "num_codes": 4,
    "code_dim": 3,
    "residual_blocks": 1,
    "batch_size": 4,
    "steps": 30,
    "log_every": 7,
    "evaluate_every": 10,
    "checkpoint_every": 4,
}
WRITES = {"checkpoint": "checkpoints/.partial-*", "publish": ".partial-model"}
MOMENTS = ("any", "checkpoint", "any", "publish")
processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of a few images."""
    folder = tmp_path_factory.mktemp("data")
    random_images = np.random.Generator(np.random.PCG64(0))
    for name, count in (("train", 30), ("test", 8)):
        images = random_images.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.save(folder / f"{name}_images.npy", images)
        np.save(folder / f"{name}_labels.npy", np.zeros(count, dtype=np.uint8))
    info = {"format": 1, "name": TINY["data"], "fingerprint": "0" * 64, "train": 30, "tune": 3, "test": 8}
    (folder / "data.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def new_folder(path: Path, one: Trial) -> Path:
    path.mkdir()
    (path / "trial.json").write_text(json.dumps({"trial": values(one)}), encoding="utf-8")
    return path


def _train(folder: Path, prepared: Path) -> None:
    from dvq.train import main

    sync = os.fsync

    def slow(file: int) -> None:
        """A disk slow enough for a write of it to be cut off."""
        time.sleep(0.002)
        sync(file)

    os.fsync = slow
    sys.argv = ["train", str(folder), "--data", str(prepared)]
    sys.exit(main())


def start(folder: Path, prepared: Path) -> BaseProcess:
    """A training process of its own; the server that it is forked from has imported all, which saves seconds."""
    processes.set_forkserver_preload(["dvq.train", "dvq.figures", "torch._dynamo"])
    process = processes.Process(target=_train, args=(folder, prepared))
    process.start()
    return process


def outcome(folder: Path) -> dict[str, Any]:
    """All that training made, but for times and speeds."""
    measured = [
        (event["step"], {name: x for name, x in event["values"].items() if name != "images_per_second"})
        for event in events.read(folder)
        if event["kind"] == "metrics"
    ]
    pictures = {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}
    return {
        "model": (folder / "model" / "model.safetensors").read_bytes(),
        "metrics": measured,
        "images": pictures,
        "image events": [event["path"] for event in events.read(folder) if event["kind"] == "image"],
    }


def undisturbed(path: Path, one: Trial, prepared: Path) -> dict[str, Any]:
    train(one, load(prepared), new_folder(path, one))
    return outcome(path)


def partials(folder: Path, write: str) -> set[tuple[str, int]]:
    """What is begun and not renamed into place, each with the time of its last change."""
    found = set()
    for path in folder.glob(WRITES[write]):
        with suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def kill(process: BaseProcess, folder: Path, moment: str, dice: random.Random) -> str:
    """SIGKILL at a random instant, or as soon as a checkpoint or the model begins to be written.

    Returns:
        the write that it cut off, or "between" them; "late" if the process had ended.
    """
    earlier = {write: partials(folder, write) for write in WRITES}
    if moment == "any":
        process.join(dice.uniform(0.0, 1.0))
    else:
        while process.is_alive() and not partials(folder, moment) - earlier[moment]:
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.004))
    process.kill()
    process.join()
    if process.exitcode != -signal.SIGKILL:
        return "late"
    return next((write for write in WRITES if partials(folder, write) - earlier[write]), "between")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("estimator", ["gs-soft", "vq-ema"])
def test_killed_at_any_instant_it_ends_with_the_same_bits(
    estimator: str, tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, dice = trial({**TINY, "estimator": estimator, "normalization_until": 13}), random.Random(estimator)
    expected = undisturbed(tmp_path / "undisturbed", one, prepared)
    cut: Counter[str] = Counter()
    rounds = 0
    while cut.total() - cut["late"] < KILLS / 2 or not all(cut[write] for write in WRITES):
        rounds += 1
        folder = new_folder(tmp_path / f"round{rounds}", one)
        while not (folder / "model").exists():
            process = start(folder, prepared)
            moment = MOMENTS[cut.total() % len(MOMENTS)]
            cut[kill(process, folder, moment, dice)] += 1
            assert process.exitcode in (0, -signal.SIGKILL)
        assert outcome(folder) == expected
    assert goodput.read(folder)["attempts"] >= 1
    with capsys.disabled():
        print(f"\n{estimator}: killed in {dict(cut)} in {rounds} rounds, each to the same bits")


def test_the_comparison_can_fail(tmp_path: Path, prepared: Path) -> None:
    """A negative control: going on with the optimizer's moments lost gives other bits."""
    one = trial(TINY)
    expected = undisturbed(tmp_path / "undisturbed", one, prepared)
    folder = interrupted(tmp_path / "resumed", one, prepared, step=12)
    state = folder / "checkpoints" / "000000012" / "state.safetensors"
    tensors = load_file(state)
    save_file({n: torch.zeros_like(t) if n.endswith("exp_avg") else t for n, t in tensors.items()}, state)
    forge(state)
    train(one, load(prepared), folder)
    found = outcome(folder)
    assert found["model"] != expected["model"]
    assert found["metrics"][1:] != expected["metrics"][1:]


def interrupted(path: Path, one: Trial, prepared: Path, step: int) -> Path:
    """A trial whose training was cut off after the checkpoint of ``step``."""
    folder, write = new_folder(path, one), checkpoint.write

    def cut(where: Path, at: int, *rest: Any) -> Path:
        written = write(where, at, *rest)
        if at == step:
            raise KeyboardInterrupt
        return written

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(checkpoint, "write", cut)
        train(one, load(prepared), folder)
    return folder


def forge(state: Path) -> None:
    """Give a changed state the checksum that it should have."""
    import hashlib

    about = json.loads((state.parent / "checkpoint.json").read_text(encoding="utf-8"))
    about["sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
    (state.parent / "checkpoint.json").write_text(json.dumps(about), encoding="utf-8")


def test_sigterm_writes_a_checkpoint_and_says_interrupted(tmp_path: Path, prepared: Path) -> None:
    one = trial({**TINY, "steps": 100_000, "checkpoint_every": 100_000})
    folder = new_folder(tmp_path / "trial", one)
    process = start(folder, prepared)
    while not [event for event in events.read(folder) if event["kind"] == "metrics"]:
        time.sleep(0.01)
    process.terminate()
    process.join(30)
    assert process.exitcode == 128 + signal.SIGTERM
    assert [e["state"] for e in events.read(folder) if e["kind"] == "state"][-1] == "interrupted"
    (step,) = checkpoint.steps(folder)
    assert step >= 7


@pytest.mark.parametrize("shorter", [14, 15, 20])
def test_more_steps_go_on_from_fewer_to_the_same_bits(shorter: int, tmp_path: Path, prepared: Path) -> None:
    """14 and 20 are on the schedules of points and evaluations, 15 is on none."""
    short, long = trial({**TINY, "steps": shorter}), trial(TINY)
    assert short.family() == long.family()
    expected = undisturbed(tmp_path / "at once", long, prepared)
    folder = new_folder(tmp_path / "in two", short)
    train(short, load(prepared), folder)
    shutil.rmtree(folder / "model")
    train(long, load(prepared), folder)
    assert outcome(folder)["model"] == expected["model"]
    assert outcome(folder)["metrics"] == expected["metrics"]


class Followed(GSSoft):
    """GS-Soft with numbers of its own along training."""

    estimator: Literal["followed"] = "followed"  # type: ignore[assignment]

    def loss(self, model: Model, images: Tensor, generator: torch.Generator, step: Any) -> Loss:
        followed = {"step": step, "odd": math.nan if step == 8 else torch.tensor(2.0)}
        return super().loss(model, images, generator, step)._replace(logged=followed)


def test_numbers_of_ones_own_go_on_as_their_means(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the shorter trial ended between two points of the curves; a mean that is not finite is left out."""
    monkeypatch.setattr(config, "ESTIMATORS", [Followed])
    one = Followed(**{**TINY, "estimator": "followed"})
    for steps in (15, 21):
        train(one.model_copy(update={"steps": steps}), load(prepared), tmp_path)
    found = [
        (event["step"], event["values"].get("train/step"), event["values"].get("train/odd"))
        for event in events.read(tmp_path)
        if "train/rate" in event.get("values", {})
    ]
    assert found == [(7, 3.0, 2.0), (14, 10.0, None), (21, 17.0, 2.0)]


def test_a_checkpoint_of_a_version_that_logged_nothing_is_read(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write

    def earlier(folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> Path:
        return write(folder, step, tensors, {name: x for name, x in about.items() if name != "logged"})

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", earlier)
        train(trial({**TINY, "steps": 14}), load(prepared), tmp_path / "in two")
    for folder in ("in two", "at once"):
        train(trial({**TINY, "steps": 20}), load(prepared), tmp_path / folder)
    assert outcome(tmp_path / "in two")["model"] == outcome(tmp_path / "at once")["model"]


def test_who_is_stopped_at_a_checkpoint_writes_it_once(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, written, write = trial({**TINY, "checkpoint_every": 5}), [], checkpoint.write
    training = Training(one, load(prepared), tmp_path, "cpu", 1)

    def stopped(folder: Path, step: int, *rest: Any) -> None:
        written.append(step)
        training.stop()
        write(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "write", stopped)
    with pytest.raises(Interrupted):
        training.run()
    assert written == [5]


def test_with_the_split_tune_it_trains_without_the_images_that_judge_it(
    tmp_path: Path, prepared: Path
) -> None:
    data = load(prepared)
    training = Training(trial({**TINY, "split": "tune", "steps": 2}), data, tmp_path, "cpu", 1)
    np.testing.assert_array_equal(training.trainer.images, data.arrays["train_images"][:27])
    np.testing.assert_array_equal(training.evaluation_images, data.arrays["train_images"][27:])
    training.run()
    told = {name.partition("/")[0] for event in events.read(tmp_path) for name in event.get("values", {})}
    assert told == {"train", "tune", "images_per_second"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, of which a step takes 1 and an evaluation 1,000."""
    now = [0.0]

    def takes(seconds: float, function: Any) -> Any:
        def timed(*given: Any) -> Any:
            now[0] += seconds
            return function(*given)

        return timed

    for module in ("training", "minutely"):
        monkeypatch.setattr(f"dvq.{module}.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Trainer, "step", takes(1.0, Trainer.step))
    monkeypatch.setattr(Training, "_evaluate", takes(1000.0, lambda *_: None))
    return now


def test_the_seconds_of_training_are_its_steps(tmp_path: Path, prepared: Path, clock: list[float]) -> None:
    """Neither its evaluations' nor those between two attempts."""
    one = trial({**TINY, "steps": 20})
    folder = interrupted(tmp_path / "trial", one, prepared, step=12)
    clock[0] += 5000.0
    summary = train(one, load(prepared), folder)
    assert (summary["seconds"], summary["images_per_second"]) == (20.0, 4.0)
    speeds = [event["values"]["images_per_second"] for event in events.read(folder) if "values" in event]
    assert speeds == [4.0] * 3


@pytest.mark.usefixtures("clock")
def test_a_line_a_minute_says_how_far_training_is(
    tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trial({**TINY, "steps": 130, "log_every": 10, "evaluate_every": 1000, "checkpoint_every": 1000})
    train(one, load(prepared), tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in said] == [
        f"gs-soft-c4-k2-s0: {step} of 130 steps" for step in (60, 120)
    ]
    assert all(line.endswith(" bits/dim in training, 4 images/s") for line in said)


def test_an_evaluation_that_is_cut_off_is_no_training(
    tmp_path: Path, prepared: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial({**TINY, "steps": 10, "log_every": 5, "evaluate_every": 5, "checkpoint_every": 100})
    training = Training(one, load(prepared), tmp_path, "cpu", 1)

    def cut_off(*_: Any) -> None:
        clock[0] += 1000.0
        training.stop()

    with monkeypatch.context() as patch, pytest.raises(Interrupted):  # noqa: PT012
        patch.setattr(Training, "_evaluate", cut_off)
        training.run()
    assert checkpoint.steps(tmp_path) == [5]
    assert train(one, load(prepared), tmp_path)["seconds"] == 10.0
    speeds = [event["values"]["images_per_second"] for event in events.read(tmp_path) if "values" in event]
    assert speeds == [4.0] * 2


def test_a_checkpoint_is_due_after_its_seconds_whatever_the_steps(
    tmp_path: Path, prepared: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(checkpoint, "write", lambda _, step, *__: written.append(step))
    seldom = {"evaluate_every": 1000, "checkpoint_every": 1000, "checkpoint_seconds": 5.0}
    train(trial({**TINY, **seldom, "steps": 14}), load(prepared), tmp_path)
    assert (written, clock[0]) == ([6, 12, 14], 1014.0)


def test_a_point_of_the_curves_is_the_mean_over_its_steps() -> None:
    one, terms = trial(TINY), torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 6.0]])
    nats = {name: bits / one.bits_per_nat for name, bits in curve_point(terms, 1, one).items()}
    assert nats == pytest.approx({"distortion": 2.0, "rate": 4.0, "bits_per_dim": 6.0})


def test_the_step_that_diverged_is_named() -> None:
    terms = torch.ones(3, 3)
    terms[1, 2] = torch.inf
    with pytest.raises(DvqError, match="at step 8 the rate is inf"):
        curve_point(terms, 9, trial(TINY))


def test_the_gradient_is_looked_at_after_the_evaluations_step(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial({**TINY, "steps": 4, "evaluate_every": 2, "probe_draws": 2})
    given: list[Any] = []
    monkeypatch.setattr("dvq.training.probe", lambda *some: given.append(some) or probe(*some))
    train(one, load(prepared), tmp_path)
    for (_, images, draws, generator, step), last in zip(given, (1, 3), strict=True):
        right = load(prepared).arrays["train_images"][minibatch(last, 4, 30, one.seed)]
        np.testing.assert_array_equal(images, right)
        # in noise that is not the step's own
        assert (draws, step, generator.initial_seed()) == (2, last, noise_seed(one.seed, last, 1))
    looks = [event["step"] for event in events.read(tmp_path) if "probe/bias" in event.get("values", {})]
    assert looks == [2, 4]


def test_lost_work_is_counted(tmp_path: Path, prepared: Path) -> None:
    one = trial({**TINY, "checkpoint_every": 10})
    folder = interrupted(tmp_path / "trial", one, prepared, step=20)
    shutil.rmtree(folder / "checkpoints" / "000000020")
    train(one, load(prepared), folder)
    found = goodput.read(folder)
    assert (found["attempts"], found["steps_lost"]) == (
        2,
        4,
    )  # a point at 14 was kept by no checkpoint but 10's
    assert found["seconds_lost"] > 0


def test_time_between_attempts_is_not_lost_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(events.time, "time", lambda: clock[0])
    first = events.Events(tmp_path)
    first.state("training")
    first.metrics(10, {"train/rate": 1.0})
    clock[0] = 30_000.0  # hours later it goes on, and is killed at step 14
    second = events.Events(tmp_path)
    second.state("training")
    for step, clock[0] in ((12, 30_015.0), (14, 30_030.0)):
        second.metrics(step, {"train/rate": 1.0})
    goodput.begin(tmp_path, 10)
    assert goodput.read(tmp_path) == {"attempts": 1, "steps_lost": 4, "seconds_lost": 30.0}


def test_events_that_a_power_cut_took_are_not_made_up(tmp_path: Path) -> None:
    """Nothing can bring them back; what is appended later must be read all the same."""
    diary = events.Events(tmp_path)
    diary.metrics(1, {"a": 1.0})
    place = events.sizes(tmp_path)
    (name,) = place
    os.truncate(tmp_path / "events" / name, 0)
    events.truncate(tmp_path, place)
    assert (tmp_path / "events" / name).read_bytes() == b""


def test_a_checkpoint_has_its_events_on_the_disk(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    write, sync = checkpoint.write, events.Events.sync
    monkeypatch.setattr(checkpoint, "write", lambda *given: (done.append("checkpoint"), write(*given)))
    monkeypatch.setattr(events.Events, "sync", lambda diary: (done.append("events"), sync(diary)))
    train(trial({**TINY, "steps": 4}), load(prepared), tmp_path)
    assert done == ["events", "checkpoint"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "json"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(
    damage: str, tmp_path: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = trial(TINY)
    expected = undisturbed(tmp_path / "undisturbed", one, prepared)
    folder = interrupted(tmp_path / "trial", one, prepared, step=16)
    state = folder / "checkpoints" / "000000016" / "state.safetensors"
    content = bytearray(state.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    state.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    if damage == "gone":
        state.unlink()
    if damage == "json":
        (state.parent / "checkpoint.json").write_text("{", encoding="utf-8")
    train(one, load(prepared), folder)
    told = capsys.readouterr().out
    assert "000000016 is damaged" in told
    assert "going on from step 12" in told
    assert outcome(folder) == expected


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "has format 99, and this version reads 1"),
        ({"family": "x"}, "of another configuration"),
    ],
)
def test_a_foreign_checkpoint_is_refused_and_nothing_is_overwritten(
    change: dict[str, Any], says: str, tmp_path: Path, prepared: Path
) -> None:
    one = trial(TINY)
    folder = interrupted(tmp_path / "trial", one, prepared, step=16)
    path = folder / "checkpoints" / "000000016" / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(DvqError, match=says):
        train(one, load(prepared), folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial(TINY)
    folder = interrupted(tmp_path / "trial", one, prepared, step=16)

    def full(path: Path) -> None:
        if "checkpoints" in path.parts:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", full)
        with pytest.raises(
            DvqError, match=r"step 20 cannot be written .*No space left on device.*the last one is kept"
        ):
            train(one, load(prepared), folder)
    assert checkpoint.steps(folder) == [12, 16]
    assert not list((folder / "checkpoints").glob(".partial*"))
    train(one, load(prepared), folder)
    assert outcome(folder) == undisturbed(tmp_path / "undisturbed", one, prepared)


@pytest.mark.parametrize("estimator", ["gs-soft", "vimco", "nvil"])
def test_what_diverged_is_never_kept(estimator: str, tmp_path: Path, prepared: Path) -> None:
    one = trial({**TINY, "estimator": estimator, "learning_rate": 1e30, "checkpoint_every": 1})
    folder = new_folder(tmp_path / "trial", one)
    with pytest.raises(DvqError, match=r"training diverged: at step \d+ the \w+ is (nan|inf)"):
        train(one, load(prepared), folder)
    for step in checkpoint.steps(folder):
        found = checkpoint.latest(folder, one.family())
        assert found is not None
        assert torch.isfinite(found.tensors["terms"]).all(), step


def test_what_killed_checkpoints_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Those that are due by time are of other steps after each kill."""
    for left in (".partial-000000002", ".earlier-000000001"):
        (tmp_path / "checkpoints" / left).mkdir(parents=True)
        (tmp_path / "checkpoints" / left / "state.safetensors").touch()
    checkpoint.write(tmp_path, 3, {"weights": torch.rand(10)}, {"family": "x"})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000003"]


def test_a_checkpoint_is_on_the_disk_whole_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, tuple[int, list[int]]] = {}

    def sync(descriptor: int) -> None:
        file = os.fstat(descriptor)
        synced[file.st_ino] = (file.st_size, checkpoint.steps(tmp_path))

    monkeypatch.setattr(os, "fsync", sync)
    made = checkpoint.write(tmp_path, 3, {"weights": torch.rand(1000)}, {"family": "x"})
    files = [made / name for name in ("state.safetensors", "checkpoint.json")]
    assert [synced[path.stat().st_ino] for path in files] == [(path.stat().st_size, []) for path in files]
    assert synced[made.parent.stat().st_ino][1] == [3]
