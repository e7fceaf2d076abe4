"""What a GPU would run, as far as a CPU can tell: the recorded step, its precision, who gets which device."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dvq import DvqError, device, disk
from dvq.codes import code_sums, ordered_code_sums
from dvq.config import estimators, trial
from dvq.device import pick, take
from dvq.evaluate import evaluate
from dvq.failures import UnusableError
from dvq.recorded import Recorded
from dvq.trainer import Trainer
from tests.sizes import taken

IMAGES = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
SMALL = "noise@16x16x3-0123456789abcdef"
SCHEDULES = {"kl_warmup": 5, "temperature": 1.0, "final_temperature": 0.2, "annealing_steps": 4}
SCHEDULES |= {"decay_after": 2, "decay_half_life": 3}
WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
}


def trainer(estimator: str, dtype: torch.dtype = torch.float64, **options: Any) -> Trainer:
    sizes = {"num_latents": 2, "code_dim": 4, "features": 8, "num_codes": 6, "batch_size": 6, **options}
    one = trial({"estimator": estimator, "data": "cifar10-sample", **taken(estimator, sizes)})
    height, width, _ = one.image_shape
    return Trainer(one, IMAGES[:, :height, :width], torch.device("cpu"), dtype)


@pytest.mark.parametrize("estimator", sorted(estimators()))
def test_the_recorded_step_is_the_step(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With images, their order and the schedules in fixed places, over the end of a block and of an epoch."""
    monkeypatch.setattr("dvq.recorded.BLOCK", 5)
    plain, fixed = trainer(estimator, **SCHEDULES), trainer(estimator, **SCHEDULES)
    recorded = Recorded(fixed)
    for step in (*range(8), 20):
        torch.testing.assert_close(recorded.step(step), plain.step(step), rtol=1e-9, atol=0)
    for (name, found), (_, right) in zip(fixed.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9, msg=name)


class NoWaits(TorchDispatchMode):
    """Fails at operations for which the host would wait for the device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition(".")[0]
        assert name not in WAITS, f"the host would wait for the device at {name}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", sorted(estimators()))
@pytest.mark.parametrize(
    "options", [{}, {"revive_below": 1.0, "backward": "one", "temperature": 2.0, "gradient": "rotation"}]
)
def test_nothing_in_a_step_waits_for_the_device(estimator: str, options: dict[str, Any]) -> None:
    recorded = Recorded(trainer(estimator, torch.float32, **SCHEDULES | options))
    recorded.step(0)  # the optimizer makes its state
    recorded.feed(1)
    with NoWaits():
        recorded.advance()


def test_a_wait_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaits():
        torch.ones(1).item()


@pytest.mark.parametrize(
    ("estimator", "head"),
    [
        *((estimator, "1x1") for estimator in ("gs-soft", "vimco", "vq-ema", "fsq", "gaussian")),
        *((estimator, "transposed") for estimator in ("gs-soft", "vq-ema")),
    ],
)
def test_bfloat16_changes_bits_per_dim_by_less_than_0_005(estimator: str, head: str) -> None:
    """After some training in it; evaluation knows nothing of it. The gradients point the same way but for the
    codes that it flips. Small images, for a CPU without bfloat16 of its own takes a minute for 32×32."""
    fields = {"features": 32, "output_head": head, "learning_rate": 3e-3, "data": SMALL, "samples": 2}
    images = IMAGES[:, :16, :16]
    one, other, float32 = (
        trainer(estimator, torch.float32, cpu_precision=precision, **fields)
        for precision in ("bfloat16", "bfloat16", "float32")
    )
    for step in range(5):
        found = one.step(step)
        assert torch.equal(other.step(step), found)
        assert not torch.equal(float32.step(step), found)
    losses = {}
    for mixed in (True, False):
        one.model.mix(mixed)
        generator = torch.Generator().manual_seed(0)
        loss = one.trial.loss(one.model, torch.from_numpy(images), generator, 9)
        gradient = torch.autograd.grad(loss.surrogate, list(one.model.parameters()), allow_unused=True)
        flat = torch.cat([g.flatten() for g in gradient if g is not None])
        losses[mixed] = (
            (loss.distortion + loss.rate) * one.trial.bits_per_nat,
            flat,
            evaluate(one.model, images),
        )
    (low, low_gradient, judged), (high, high_gradient, expected) = losses[True], losses[False]
    assert low.dtype == torch.float32
    assert not torch.equal(low_gradient, high_gradient)
    assert abs(low - high) < 0.005
    # batch normalization's running means moved with the second pass, by less than this
    assert judged["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], abs=0.05)
    assert torch.cosine_similarity(low_gradient, high_gradient, dim=0) > (
        0.99 if estimator == "gaussian" else 0.7
    )


def test_the_code_sums_of_a_gpu_are_those_of_a_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(3, 50, 4, dtype=torch.float64, generator=generator)
    codes = torch.randint(7, (3, 50), generator=generator)
    torch.testing.assert_close(ordered_code_sums(terms, codes, 9), code_sums(terms, codes, 9))


HOLD = (
    "import sys; from dvq.device import take; from pathlib import Path; "
    "print(take(2, Path(sys.argv[1])), flush=True); sys.stdin.read()"
)


def test_trials_spread_over_the_gpus_and_a_dead_one_gives_its_place_back(tmp_path: Path) -> None:
    held = []
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout
        held.append((process, int(process.stdout.readline())))
    assert [gpu for _, gpu in held] == [0, 1, 0]
    second = held[1][0]
    second.kill()
    second.wait()
    assert take(2, tmp_path) == 1
    for process, _ in held:
        process.kill()
        process.wait()


@pytest.mark.parametrize("named", [False, True])
def test_the_places_are_in_one_folder_for_all_launches(
    named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """TMPDIR is each launch's own."""
    asked: list[Path] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)  # the first kernel
    monkeypatch.setattr(device, "take", lambda _, folder: asked.append(folder) or 1)
    monkeypatch.setenv("TMPDIR", "/elsewhere")
    monkeypatch.delenv("DVQ_LOCKS", raising=False)
    if named:
        monkeypatch.setenv("DVQ_LOCKS", str(tmp_path / "locks"))
    assert pick() == torch.device("cuda", 1)
    assert asked == [tmp_path / "locks" if named else Path(f"/tmp/dvq-{os.getuid()}")]
    assert asked[0].stat().st_uid == os.getuid()


def test_another_users_folder_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp is everybody's: another could have laid links there to files of this user's."""
    monkeypatch.setenv("DVQ_LOCKS", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(DvqError, match="is another user's; name a folder for the locks on GPUs"):
        disk.locks()


def test_a_gpu_that_is_wanted_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod that has a GPU which torch cannot see must say so, not train on its CPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("DVQ_DEVICE", raising=False)
    assert pick() == torch.device("cpu")
    monkeypatch.setenv("DVQ_DEVICE", "cuda")
    with pytest.raises(DvqError, match="sees no GPU: is it a build with CUDA"):
        pick()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("DVQ_DEVICE", "cpu")
    assert pick() == torch.device("cpu")
    monkeypatch.setenv("DVQ_DEVICE", "gpu")
    with pytest.raises(DvqError, match="DVQ_DEVICE = 'gpu': give cuda, cpu, or nothing"):
        pick()


def test_a_gpu_that_cannot_be_used_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The number of GPUs comes from NVML, which answers all the same."""

    def old(_: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nUpdate it.")

    monkeypatch.setenv("DVQ_LOCKS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", old)
    with pytest.raises(
        UnusableError, match=r"cannot use the GPU \(The NVIDIA driver .* 12020\)\); is its driver"
    ):
        pick()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UnusableError, match=r"2\.00 MiB\); is it free, and whole"):
        pick()


ROUNDING: dict[str, Any] = {
    "PyTorch's own": lambda: None,
    "for products": lambda: torch.set_float32_matmul_precision("medium"),
    "by the older settings": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "by the newer settings": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "on a GPU alone": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
}


def settings() -> list[object]:
    """How PyTorch rounds the factors of float32's products; None where it cannot tell, its settings at odds."""
    cuda, cudnn, mkldnn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    newer = [cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv]
    found: list[object] = [operation.fp32_precision for operation in newer]
    older: list[Callable[[], object]] = [
        lambda: cuda.matmul.allow_tf32,
        lambda: cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    for setting in older:
        try:
            found.append(setting())
        except RuntimeError:
            found.append(None)
    return [*found, cudnn.deterministic]


@pytest.mark.parametrize("rounding", ROUNDING)
def test_what_is_computed_exactly_is_not_rounded(rounding: str) -> None:
    """The settings, since no CPU rounds to TF32; in a process of their own, which PyTorch cannot put back."""
    program = f"""if True:
        import torch
        from dvq import config
        from dvq.model import Model
        from tests.dvq.test_device import ROUNDING, settings
        small = {{"features": 32, "num_latents": 2, "num_codes": 8, "code_dim": 4}}
        model, seen = Model(config.trial({{"estimator": "vq-ema", "data": "cifar10-sample", **small}})), []
        model.decoder.register_forward_pre_hook(lambda *_: seen.append(settings()))
        ROUNDING[{rounding!r}]()
        before = settings()
        model.sample(1)
        assert seen == [["ieee"] * 5 + [False, False, "highest", True]], seen
        assert settings() == before, (settings(), before)
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_training_keeps_the_pages_of_large_tensors() -> None:
    """64 MiB are 16,384 pages, which the system gives until the heap has found its size, and not at every step."""
    code = """if True:
        import resource, torch
        from dvq.device import keep_memory

        torch.set_num_threads(1), keep_memory()
        pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        counts = [pages() for _ in range(20) if torch.ones(2**24) is not None]
        print(min(after - before for before, after in zip(counts, counts[1:])))
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 1000
