"""What all commands share: their usual arguments, their folder, and how they end."""

import contextlib
import errno
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from dvq import DvqError, disk

SweepName = Annotated[str, typer.Argument(metavar="sweep", help="a name in pipeline/sweeps, or a YAML file")]
ProfileName = Annotated[str, typer.Option(help="a name in pipeline/profiles, or a YAML file")]
REFUSED = (errno.EACCES, errno.ENAMETOOLONG)
"""Errors about a file that the user named; others, except those of a full disk, are bugs."""


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn a DvqError, or an error of a disk that is full or not writable, into a sentence and exit status 2."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see pipeline/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack ±; standard error escapes it
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except DvqError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in disk.NO_ROOM + REFUSED:
            raise
        place = error.filename or "the disk"
        remedy = "; make room, or set DVQ_STORE to a folder that can be written"
        message = f"{place}: {error.strerror}" + remedy * (error.errno in disk.NO_ROOM)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def application(*commands: Callable[..., None]) -> typer.Typer:
    """A program of these commands, which ends with a sentence on a DvqError."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    for command in commands:
        app.command()(exit_on_error()(command))
    return app


def outputs() -> Path:
    """The folder of logs, and by default of the store and MLflow's database: ``outputs`` in the current folder."""
    return Path("outputs").absolute()
