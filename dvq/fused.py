"""Element-wise work on a GPU fused into few kernels by PyTorch's compiler, where that can run."""

import functools
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def able() -> bool:
    """Whether there are a GPU, Triton, and the C compiler and Python headers that Triton needs; if only the latter
    are missing, that is said once. ``DVQ_FUSE=0`` turns fusing off."""
    if os.environ.get("DVQ_FUSE") == "0" or not torch.cuda.is_available() or not has_triton():
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler and Path(sysconfig.get_path("include"), "Python.h").exists():
        return True
    lacks = "Python's headers (Debian: python3-dev)" if compiler else "a C compiler (gcc)"
    print(f"steps on the GPU are not fused, and slower: {lacks} is not here", file=sys.stderr, flush=True)
    return False


def fused(plain: Callable[P, R]) -> Callable[P, R]:
    """``plain``, compiled for each shape that it is called with, or, where that cannot be, as it stands."""
    compiled = functools.cache(lambda: _compile(plain))

    @functools.wraps(plain)
    def either(*args: P.args, **named: P.kwargs) -> R:
        return (compiled() if able() else plain)(*args, **named)

    return either


def _compile(plain: Callable[P, R]) -> Callable[P, R]:
    """Kernels are not chosen by timing them: the process that resumes this one's training might choose others."""
    from torch._inductor import config

    repeats: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True}
    return torch.compile(plain, dynamic=False, options=repeats if hasattr(config, "deterministic") else None)
