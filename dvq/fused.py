"""Element by element work on a GPU in few kernels, by PyTorch's compiler, where it can run."""

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def able() -> bool:
    """Whether there are a GPU, Triton, and what it builds with, a C compiler and Python's headers (Debian's package
    python3-dev); ``DVQ_FUSE=0`` says no."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    builds = bool(compiler) and headers and os.environ.get("DVQ_FUSE") != "0"
    return builds and torch.cuda.is_available() and has_triton()


def fused(plain: Callable[P, R]) -> Callable[P, R]:
    """``plain``, compiled for each shape that it is called with, or, where that cannot be, as it stands."""
    compiled = functools.cache(lambda: torch.compile(plain, dynamic=False))

    @functools.wraps(plain)
    def either(*args: P.args, **named: P.kwargs) -> R:
        return (compiled() if able() else plain)(*args, **named)

    return either
