"""Element by element work on a GPU in few kernels, by PyTorch's compiler, where it can run."""

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
    """Whether there are a GPU, Triton, and what it builds with, a C compiler and Python's headers; where only these
    are lacking it says so once. ``DVQ_FUSE=0`` says no."""
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
    """Its kernels are not chosen by timing them, lest the process that goes on after this one choose others."""
    from torch._inductor import config

    repeats: dict[str, str | int | bool | Callable[..., Any]] = {"deterministic": True}
    return torch.compile(plain, dynamic=False, options=repeats if hasattr(config, "deterministic") else None)
