"""dvq as a library: what the README shows of it, as in a notebook whose cells are run again."""

import json
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import dvq
from dvq import DvqError, autoregressive, config, data, disk, events, saved
from dvq.estimators import ESTIMATORS
from dvq.estimators.gs_soft import GSSoft
from dvq.evaluate import evaluate, fit
from dvq.likelihood import plain_nll
from dvq.model import Model
from dvq.randomness import seeded
from dvq.sweep import load_sweep
from dvq.train import main, train
from dvq.trainer import Trainer
from dvq.training import Training
from dvq.trial import values

CELL = re.compile(r"```python\n(from pathlib import Path\n\nimport dvq\n.*?)```", re.DOTALL)


def test_the_readmes_cell_runs_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = CELL.findall((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"))
    few = {"training, steps=20": "training, steps=2", "prior.sample(16)": "prior.sample(1)"}
    few |= {f"{half}(trial.split)[0]": f"{half}(trial.split)[0][:60]" for half in ("evaluation", "training")}
    for piece, less in few.items():
        assert piece in cell
        cell = cell.replace(piece, less)
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {}
    exec(cell, first)
    assert 7 < first["found"]["fitted_bits_per_dim"] < 9
    again: dict[str, Any] = {}
    exec(cell, again)
    assert again["found"] == first["found"]

    longer = cell.replace(
        '"steps": 20', '"steps": 22'
    )  # in the same folder, from a thread that gets no signals
    assert longer != cell
    found: dict[str, Any] = {}
    thread = threading.Thread(target=exec, args=(longer, found))
    thread.start()
    thread.join()
    assert found["model"].trial.steps == 22
    assert found["found"] != first["found"]
    assert sorted(path.name for path in (tmp_path / "my-trial").glob("model*")) == ["model"]

    with pytest.raises(DvqError, match="the trial is of cifar10, and these images are cifar10-sample"):
        exec(cell.replace('"data": "cifar10-sample", ', "").replace("my-trial", "other"), {})
    assert not (tmp_path / "other").exists()


def test_the_pieces_of_the_readme_beside_the_code_train(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(dvq.__file__).with_name("README.md")).read_text(encoding="utf-8")
    (cell,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict[str, Any] = {}
    with seeded(0):
        exec(cell, found)
    assert found["vectors"].shape == (4, 100, 8)
    assert found["codes"].shape == (4, 100)
    assert found["mine"].encoder(found["minibatch"]).shape == (4, 32 * 8 * 8, 8)
    assert 7 < float(capsys.readouterr().out) < 9


def test_a_loss_in_a_loop_of_ones_own_takes_no_other_numbers_for_pixel_values() -> None:
    """Of those from 0 to 1, as a DataLoader gives them, nearly all were the likelihood's 0."""
    model = Model(config.trial(TINY))
    images = torch.from_numpy(data.read_sample()["train_images"][:2])
    with pytest.raises(DvqError, match=r"images are float32 .*; \(x \* 255\)\.round\(\)\.byte\(\)"):
        model.trial.loss(model, images / 255, torch.Generator(), 0)


class OwnDecoder(torch.nn.Module):
    """What dvq/README.md asks of a decoder that is replaced whole; its ``hidden`` is something else than ours."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.Sequential(torch.nn.BatchNorm2d(6), torch.nn.ConvTranspose2d(6, 768, 4, 4))

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        h = vectors.transpose(0, 1).reshape(-1, 8, 8, 6).permute(0, 3, 1, 2)
        return self.hidden(h).permute(0, 2, 3, 1).flatten(1, 2)  # type: ignore[no-any-return]

    def nll(
        self, vectors: torch.Tensor, images: torch.Tensor, weigh: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert weigh is None
        nll = plain_nll(self(vectors), images.flatten(1, 2))
        return nll.sum(), nll.detach()


def test_a_decoder_that_is_replaced_whole_is_trained_judged_and_fitted() -> None:
    model, some = Model(config.trial(TINY)), data.read_sample()["train_images"][:8]
    model.decoder = OwnDecoder()  # type: ignore[assignment]
    model.trial.loss(model, torch.from_numpy(some), torch.Generator(), 0).surrogate.backward()
    found = evaluate(model, some, training=some)
    assert found["fitted_bits_per_dim"] == evaluate(fit(model, some), some)["bits_per_dim"]
    assert found["fitted_bits_per_dim"] != found["bits_per_dim"]


SMALL: dict[str, Any] = {"data": "cifar10-sample", "features": 4, "num_latents": 2}
TINY: dict[str, Any] = {
    "estimator": "gs-soft",
    **SMALL,
    "num_codes": 4,
    "code_dim": 3,
    "residual_blocks": 1,
    "batch_size": 4,
    "steps": 6,
    "evaluate_every": 100,
    "checkpoint_every": 100,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> data.Data:
    folder = tmp_path_factory.mktemp("sample")
    data.prepare("cifar10-sample", "", folder)
    return data.load(folder)


def test_fewer_steps_in_a_folder_with_more_are_refused(images: data.Data, tmp_path: Path) -> None:
    """Its weights were published as those of fewer steps."""
    train(config.trial(TINY), images, tmp_path)
    before = (tmp_path / "model" / "training.json").read_bytes()
    with pytest.raises(
        DvqError, match="has a checkpoint of step 6, and the trial ends at 3; give it a folder"
    ):
        train(config.trial({**TINY, "steps": 3}), images, tmp_path)
    assert (tmp_path / "model" / "training.json").read_bytes() == before


def test_training_leaves_the_process_as_it_was(images: data.Data, tmp_path: Path) -> None:
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            train(config.trial(TINY), images, tmp_path, device=torch.device("cpu"))  # type: ignore[arg-type]
        assert torch.get_num_threads() == 2
        assert torch.tensor(1e-40) * 1 > 0, "denormal numbers are numbers again"
        assert torch.equal(torch.get_rng_state(), random_state)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        torch.set_flush_denormal(True)
        torch.set_default_dtype(torch.float64)  # of which 1e-40 is no denormal number
        train(config.trial(TINY), images, tmp_path)
        assert torch.tensor(1e-40, dtype=torch.float32) * 1 == 0, "they were none before"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def test_threads_begin_with_the_weights_of_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(one: Any) -> Model:
        time.sleep(0.01)  # in which another thread would seed
        return Model(one)

    monkeypatch.setattr("dvq.trainer.Model", slow)
    noise = np.zeros((4, 32, 32, 3), np.uint8)
    trials = [config.trial({**TINY, "num_codes": 512, "num_latents": 16, "seed": seed}) for seed in range(4)]

    def codebook(one: Any) -> torch.Tensor:
        return Trainer(one, noise, torch.device("cpu"), torch.float32).model.latents.codebook

    alone = [codebook(one) for one in trials]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(codebook, trials * 4))
    assert all(torch.equal(one, other) for one, other in zip(alone * 4, together, strict=True))


def test_interrupting_a_cell_keeps_what_it_computed(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config.trial(TINY)
    train(whole, images, tmp_path / "whole")
    step = Trainer.step

    def interrupted(self: Trainer, number: int) -> torch.Tensor:
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        patched.setattr(Training, "_look", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            train(whole, images, tmp_path / "cell")
    assert [event["state"] for event in events.read(str(tmp_path / "cell"))] == ["training", "interrupted"]  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "cell" / "checkpoints").iterdir()] == ["000000003"]
    train(whole, images, tmp_path / "cell")
    found, right = (dvq.load(tmp_path / name / "model").state_dict() for name in ("cell", "whole"))
    assert all(torch.equal(found[name], right[name]) for name in right)


def test_a_cell_that_names_an_estimator_can_be_run_again(images: data.Data, tmp_path: Path) -> None:
    def cell() -> type[GSSoft]:
        class Mine(GSSoft):
            estimator: Literal["mine"] = "mine"  # type: ignore[assignment]

        return Mine

    fields = {name: value for name, value in TINY.items() if name != "estimator"}
    with pytest.raises(DvqError, match=r"'mine' is not in the list .*ESTIMATORS.append\(Mine\)"):
        train(cell()(**fields), images, tmp_path)
    assert not (tmp_path / "events").exists()
    before = list(ESTIMATORS)
    try:
        ESTIMATORS.append(cell())
        ESTIMATORS.append(later := cell())
        made = config.trial({**TINY, "estimator": "mine"})
        assert type(made) is later
        train(made, images, tmp_path)
        assert dvq.load(tmp_path / "model").trial == made
    finally:
        ESTIMATORS[:] = before


def test_a_model_in_training_is_judged_as_evaluated_and_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = Model(config.trial(TINY)).eval()
    some = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    right = model.bits_per_dim(some, model.generator(0))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    assert torch.equal(model.bits_per_dim(some, model.generator(0)), right)
    model.reconstruct(some), model.encode(some), model.sample(np.int64(2))  # type: ignore[arg-type]
    with pytest.raises(DvqError):
        model.decode(torch.zeros(1))
    assert model.training
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    x = torch.full((1, 32, 32, 3), 7.0)
    model.encoder(x)
    assert (x == 7).all(), "what is given is not written to"


def test_a_training_that_is_done_is_left_as_it_is(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says which code trained it, whatever code finds it done."""
    one = config.trial({**TINY, "steps": 2})
    summary = train(one, images, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr("dvq.training.provenance", lambda _: {"commit": "another"})
    assert train(one, images, tmp_path) == summary
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    longer = train(one.model_copy(update={"steps": 3}), images, tmp_path)
    assert (longer["steps"], longer["provenance"]["commit"]) == (3, "another")


def test_what_is_round_it_changes_no_number(images: data.Data, tmp_path: Path) -> None:
    one, some = config.trial({**TINY, "steps": 2}), images.evaluation("test")[0][:20]

    def numbers(folder: Path) -> list[torch.Tensor]:
        train(one, images, folder)
        model = dvq.load(folder / "model")
        found = (
            evaluate(model, some)["bits_per_dim"],
            evaluate(model, some, training=some)["fitted_bits_per_dim"],
        )
        prior, codes = autoregressive.fit(model, some, steps=2), model.encode(some, model.generator(0))
        bits = fit(dvq.load(folder / "model"), some).bits_per_dim(some, model.generator(0))
        with torch.no_grad():
            likely = prior(codes)
        weights = torch.cat([x.flatten().double() for x in model.state_dict().values()])
        return [
            torch.tensor(found, dtype=torch.float64),
            codes,
            bits,
            likely,
            prior.sample(2, model.generator(0)),
            weights,
        ]

    right = numbers(tmp_path / "plain")
    torch.set_default_dtype(torch.float64)
    try:
        double = numbers(tmp_path / "double")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = numbers(tmp_path / "mixed")
    torch.set_float32_matmul_precision("medium")  # bfloat16 on a CPU that has it, TF32 on a GPU
    try:
        rounded = numbers(tmp_path / "rounded")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for found in (double, mixed, rounded):
        assert [torch.equal(x.double(), y.double()) for x, y in zip(found, right, strict=True)] == [True] * 6
    with torch.device("meta"), seeded(1):
        assert torch.empty(0).device.type == "cpu", "a GPU's numbers would have another seed"


def test_bfloat16_is_of_each_steps_weights(images: data.Data, tmp_path: Path) -> None:
    """An autocast round the training keeps what an inner one cached: the first step's."""
    one = config.trial({**TINY, "cpu_precision": "bfloat16", "learning_rate": 0.01})
    train(one, images, tmp_path)
    trainer = Trainer(one, images.training("test")[0], torch.device("cpu"), torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        for step in range(6):
            trainer.step(step)
    found = dvq.load(tmp_path / "model").state_dict()
    for name, right in trainer.model.state_dict().items():
        torch.testing.assert_close(found[name], right, msg=name)
    alone = Trainer(one, images.training("test")[0], torch.device("cpu"), torch.float32)
    for step in range(6):
        alone.step(step)
    for name, right in trainer.model.state_dict().items():
        assert torch.equal(alone.model.state_dict()[name], right), name


def test_an_evaluation_that_is_interrupted_leaves_the_model_in_its_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(config.trial(TINY)).train()
    model.encoder.eval()
    some = np.zeros((2, 32, 32, 3), np.uint8)
    evaluate(model, some)
    assert (model.training, model.encoder.training, model.decoder.training) == (True, False, True)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.latents, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, some)
    assert (model.training, model.encoder.training, model.decoder.training) == (True, False, True)


def test_two_trainings_do_not_share_a_folder(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "trial.json").write_text(json.dumps({"trial": values(config.trial(TINY))}))
    before = {path: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "a"), "--data", str(tmp_path / "none")])
    monkeypatch.setattr("dvq.train.load", lambda _: images)
    with disk.alone(tmp_path / "a"):
        with pytest.raises(DvqError, match="another process or thread is training in it"):
            train(config.trial(TINY), images, tmp_path / "a")
        assert main() == 1
        assert {path: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before, (
            "no failure of its own"
        )
        child = os.fork() or os._exit(time.sleep(20) or 0)
    with disk.alone(tmp_path / "a"):  # which a child that was forked meanwhile does not hold
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (tmp_path / "file").touch()
    with pytest.raises(DvqError, match=r"file can't be made or read \(File exists\); name another"):
        train(config.trial(TINY), images, tmp_path / "file")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"device": "gpu"}, "device 'gpu': torch"),
        ({"device": "mps"}, "none here"),
        ({"threads": 0}, "give 1 or more"),
    ],
)
def test_a_device_that_is_not_there(
    given: dict[str, Any], told: str, images: data.Data, tmp_path: Path
) -> None:
    with pytest.raises(DvqError, match=told):
        train(config.trial(TINY), images, tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_images_with_their_labels_are_not_images(images: data.Data) -> None:
    model = Model(config.trial(TINY))
    with pytest.raises(DvqError, match=r"evaluate are a tuple: give its array of images"):
        evaluate(model, images.evaluation("test"))  # type: ignore[arg-type]


def test_draws_of_neighbouring_seeds_are_others() -> None:
    torch.manual_seed(0)
    model = Model(config.trial(TINY)).double()  # two sums of the same are equal
    some = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    first, second = (evaluate(model, some, seed=seed, bound_samples=2) for seed in (0, 1))
    draws = abs(first["bits_per_dim"] - second["bits_per_dim"]) / 2**0.5
    assert draws != pytest.approx(first["draws_se"], rel=1e-6)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (evaluate, "bound_samples", 0),
        (evaluate, "bound_samples", 2.0),
        (evaluate, "bound_samples", torch.tensor(2.0)),
        (evaluate, "batch_size", -1),
        (evaluate, "batch_size", np.array([1, 2])),
        (fit, "batch_size", -1),
    ],
)
def test_numbers_of_draws_and_images_are_whole(function: Any, name: str, value: Any) -> None:
    model, some = Model(config.trial(TINY)), np.zeros((2, 32, 32, 3), np.uint8)
    with pytest.raises(DvqError, match=re.escape(f"{name} = {value!r}: give a whole number of at least 1")):
        function(model, some, **{name: value})


def test_a_model_may_be_loaded_while_another_is_made(tmp_path: Path) -> None:
    """As by an estimator that begins with another's codebooks: it waited for itself."""
    saved.save(Model(config.trial(TINY)), tmp_path)

    def load() -> None:
        with seeded(1):
            dvq.load(tmp_path)
            drawn.append(torch.rand(()))

    drawn: list[torch.Tensor] = []
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    with seeded(1):
        assert drawn == [torch.rand(())], "and of the other's random numbers it takes none"


def test_a_prior_of_codes_is_not_one_of_continuous_latent_variables() -> None:
    codes, some = Model(config.trial(TINY)), np.zeros((2, 32, 32, 3), np.uint8)
    gaussian = {key: value for key, value in TINY.items() if key != "num_codes"} | {"estimator": "gaussian"}
    model = Model(config.trial(gaussian))
    with pytest.raises(DvqError, match="a gaussian model has no codes"):
        evaluate(model, some, prior=autoregressive.Autoregressive(codes))


@pytest.mark.parametrize("field", ["num_codes", "num_latents"])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_prior_of_another_models_codes_is_refused(field: str, more: int) -> None:
    one = Model(config.trial(TINY))
    other = Model(config.trial(TINY | {field: TINY[field] + more}))
    with pytest.raises(DvqError, match=r"^the prior is of 8×8 .*, the model of 8×8 .*: give one"):
        evaluate(other, np.zeros((2, 32, 32, 3), np.uint8), prior=autoregressive.Autoregressive(one))


def test_paths_may_be_text_and_load_is_among_the_names(tmp_path: Path) -> None:
    saved.save(Model(config.trial(TINY)), str(tmp_path / "model"))
    assert "load" in dir(dvq)
    assert dvq.load(str(tmp_path / "model")).trial == config.trial(TINY)
    (tmp_path / "one.yaml").write_text("base: {estimator: gs-soft}\n")
    assert load_sweep(str(tmp_path / "one.yaml")).name == "one"


def test_a_generator_is_one() -> None:
    model = Model(config.trial(TINY))
    with pytest.raises(DvqError, match=r"the generator is a int: give model.generator\(seed\)"):
        model.sample(3, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_models_load_whatever_torchs_default_type_is(
    kind: torch.dtype, images: data.Data, tmp_path: Path
) -> None:
    train(config.trial({"estimator": "fsq", "levels": [3, 4], **SMALL, "steps": 1}), images, tmp_path)
    right, random_state = dvq.load(tmp_path / "model"), torch.get_rng_state()
    torch.set_default_dtype(kind)
    try:
        found = dvq.load(tmp_path / "model")
    finally:
        torch.set_default_dtype(torch.float32)
    ours, theirs = ([*one.parameters(), *one.buffers()] for one in (found, right))
    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state), "loading draws none of torch's own numbers"


def test_all_is_on_the_models_device_whatever_torchs_default_is(images: data.Data, tmp_path: Path) -> None:
    one, some = config.trial({**TINY, "steps": 2}), images.evaluation("test")[0][:20]

    def numbers(folder: Path) -> dict[str, Any]:
        train(one, images, folder)
        return evaluate(dvq.load(folder / "model"), some, training=some, bound_samples=2)

    right = numbers(tmp_path / "plain")
    with torch.device("meta"):  # in a notebook rather a GPU
        assert numbers(tmp_path / "elsewhere") == right


def test_interrupts_that_a_shell_ignores_are_ignored(images: data.Data, tmp_path: Path) -> None:
    """As those of a background job are."""
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        training = Training(config.trial({**TINY, "steps": 1}), images, tmp_path / "a", "cpu", 1)
        training.stop(signal.SIGTERM)
        training.stop(signal.SIGINT)  # does not spare the checkpoint that SIGTERM asked for
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Training, "_look", lambda *_: signal.raise_signal(signal.SIGINT))
            train(config.trial({**TINY, "steps": 1}), images, tmp_path / "b")
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert dvq.load(tmp_path / "b" / "model").trial.steps == 1


def test_an_interrupt_while_the_model_is_published_is_not_lost(
    images: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dvq.training.publish", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(config.trial({**TINY, "steps": 1}), images, tmp_path)


@pytest.mark.parametrize("estimator", ["gs-soft", "vimco"])
def test_a_loss_is_not_rounded_by_an_autocast_around_it(estimator: str) -> None:
    """Where it ended at all, and not in a TypeError, its posterior was of bfloat16."""
    model = Model(config.trial({**TINY, "estimator": estimator}))
    some, noise = torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.Generator()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(DvqError, match=r"leave it out, and call model\.mix\(True\)"):
            model.trial.loss(model, some, noise, 0)
        model.encode(some), evaluate(model, some.numpy())
    model.mix(True)
    assert torch.isfinite(model.trial.loss(model, some, noise, 0).surrogate)


def test_a_part_that_is_frozen_stays_frozen() -> None:
    model = Model(config.trial(TINY)).train()
    model.encoder.eval()
    model.sample(1)
    assert (model.encoder.training, model.decoder.training) == (False, True)
