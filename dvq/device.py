"""The device that a process computes on, reproducible results there, and how its memory is kept."""

import ctypes
import fcntl
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from dvq import DvqError, disk
from dvq.failures import UnusableError

_held: list[IO[str]] = []
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # in malloc.h


def pick() -> torch.device:
    """The CPU, or the visible GPU that the fewest of this user's processes hold.

    So the trials of a sweep spread over a workstation's GPUs, and share them when there are more trials than GPUs.
    The GPU is held until the process ends, however it ends.

    ``DVQ_DEVICE=cpu`` takes the CPU.

    Raises:
        UnusableError: the environment wants a GPU, ``DVQ_DEVICE=cuda``, and there is none to be seen; or the driver
            does not start.
        DvqError: ``DVQ_DEVICE`` has another value.
    """
    count = gpus()
    if not count:
        if os.environ.get("DVQ_DEVICE") == "cuda":  # the GPU is paid for: better no trial than a slow one
            raise UnusableError(
                f"DVQ_DEVICE=cuda, but torch {torch.__version__} sees no GPU: is it a build with CUDA, and the "
                "folder of the driver's libcuda.so.1 in LD_LIBRARY_PATH?"
            )
        return torch.device("cpu")
    device = torch.device("cuda", take(count, disk.locks()))
    try:
        torch.cuda.set_device(device)
        torch.zeros((), device=device)
    except RuntimeError as error:
        reason = _first_line(error)
        remedy = "is its driver new enough?" if "driver" in reason else "is it free, and whole?"
        raise UnusableError(
            f"torch {torch.__version__}, which is built for CUDA {torch.version.cuda}, cannot use the GPU "
            f"({reason}); {remedy}"
        ) from None
    return device


def gpus() -> int:
    """The number of GPUs that :func:`pick` takes one of; DvqError if ``DVQ_DEVICE`` has another value."""
    wanted = os.environ.get("DVQ_DEVICE", "")
    if wanted not in ("", "cpu", "cuda"):
        raise DvqError(
            f"DVQ_DEVICE = '{wanted}': give cuda, cpu, or nothing, which takes a GPU where there is one"
        )
    return 0 if wanted == "cpu" else torch.cuda.device_count()


def check(device: object, threads: int) -> None:
    """DvqError if torch has no such device here, or cannot compute with so many threads."""
    try:
        torch.empty(0, device=torch.device(str(device)))
    except (RuntimeError, AssertionError) as error:
        raise DvqError(
            f"device '{device}': torch {torch.__version__} has none here ({_first_line(error)})"
        ) from None
    if threads < 1:
        raise DvqError(f"threads = {threads}: give 1 or more")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "").rstrip(".")


@contextmanager
def exact() -> Iterator[None]:
    """In this block what is computed repeats bit for bit, and float32 is float32: GPUs do not round the factors of
    convolutions (as PyTorch lets them by default) or products (``torch.set_float32_matmul_precision``) to TF32, nor
    CPUs to bfloat16. These settings are the whole process's; afterwards they are as before."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    backends: Any = torch.backends  # of which the type checker does not know all
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    operations = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    precisions = [operation.fp32_precision for operation in operations]
    deterministic, products, convolutions = cudnn.deterministic, "highest", False
    # PyTorch has these settings twice, and cannot read the older ones where the newer ones disagree with them
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        convolutions = cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32, cudnn.deterministic = False, True
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        cudnn.allow_tf32, cudnn.deterministic = convolutions, deterministic
        for operation, precision in zip(operations, precisions, strict=True):
            operation.fp32_precision = precision


@contextmanager
def tensor_float32(allowed: bool, on: torch.device) -> Iterator[None]:
    """In this block a GPU's float32 products may (or may not) round their factors to 10 bits (TF32), which is several
    times as fast. The setting is the whole process's and is restored afterwards; on a CPU nothing changes."""
    products = torch.backends.cuda.matmul
    if on.type != "cuda" or products.allow_tf32 == allowed:
        yield
        return
    before, products.allow_tf32 = products.allow_tf32, allowed
    try:
        yield
    finally:
        products.allow_tf32 = before


def take(count: int, folder: Path) -> int:
    """Lock one of ``count`` GPUs, by files in ``folder``: the first of those that the fewest processes hold."""
    for share in itertools.count():
        for gpu in range(count):
            file = (folder / f"gpu{gpu}-{share}.lock").open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            _held.append(file)  # closed, and so released, by the process's end
            return gpu
    raise AssertionError


def keep_memory() -> None:
    """Keep the memory of freed tensors for this process.

    Otherwise glibc returns the pages of large tensors to the system, which has to clear new ones at the next step: an
    eighth of a step with 256 maps on a CPU. Other C libraries have no ``mallopt``; nothing is changed there.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell:
        tell(M_MMAP_MAX, 0)  # large blocks come from the heap,
        tell(M_TRIM_THRESHOLD, -1)  # whose end is never given back
