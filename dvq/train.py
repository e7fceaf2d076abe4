"""Training a trial in a folder.

Run as ``python -m dvq.train FOLDER --data DATA`` it trains the trial that FOLDER/trial.json describes.
"""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dvq import DvqError, checkpoint, disk, failures
from dvq.config import estimators
from dvq.config import trial as make_trial
from dvq.data import Data, load
from dvq.device import check, exact, keep_memory, pick
from dvq.events import Events
from dvq.training import Interrupted, Training
from dvq.trial import Trial


@contextmanager
def _as_before() -> Iterator[None]:
    """Restore torch's process-wide settings after this block; in it gradients are on, an autocast of the caller's is
    off, and :func:`dvq.device.exact` holds."""
    denormal = torch.tensor(1e-40, dtype=torch.float32, device="cpu")
    threads, denormals_kept = torch.get_num_threads(), bool(denormal * 1)
    # a denormal number, below 1e-38, as a hopeless code's weight is, costs a CPU as much as 100 others
    torch.set_flush_denormal(True)
    full = (torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda"))
    try:
        with exact(), torch.inference_mode(False), torch.enable_grad(), next(full), next(full):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(not denormals_kept)


def train(trial: Trial, data: Data, folder: Path, device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Train ``trial``, or go on with it, and leave in ``folder``: checkpoints/, events/, images/ and, last,
    model/. SIGTERM ends it after a checkpoint, and so does SIGINT, with a KeyboardInterrupt, where this is the main
    thread.

    Args:
        trial: what to train.
        data: a prepared dataset.
        folder: the trial's folder.
        device: where to train; on a CPU with ``threads`` threads, which are part of the numbers.

    Returns:
        steps, seconds, speed, goodput and provenance, which are in model/training.json too. Of a training that is
        done already these are what it left, and nothing is written.

    Raises:
        DvqError: ``data`` are other images than the trial's; its estimator is not in the list; there is no such
            device; another process is training in the folder, or it has more steps of the trial; the loss is not
            finite (names step and term); a checkpoint is of another configuration or cannot be written.
    """
    folder = Path(folder)
    data.check(trial)
    check(device, threads)
    if trial.estimator not in estimators():
        raise DvqError(
            f"'{trial.estimator}' is not in the list of estimators, and its models could not be loaded: "
            f"dvq.estimators.ESTIMATORS.append({type(trial).__name__})"
        )
    with _as_before(), disk.alone(folder):
        if (done := _done(trial, folder)) is not None:
            return done
        training = Training(trial, data, folder, str(device), threads)
        with _stopped_by_signals(training):
            return training.run()


@contextmanager
def _stopped_by_signals(training: Training) -> Iterator[None]:
    """In this block SIGTERM and SIGINT stop ``training``; for SIGINT the block then ends with a KeyboardInterrupt. In
    any thread but the main one this does nothing, since Python delivers signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored in a shell's background job
        numbers.append(signal.SIGINT)
    earlier = {number: signal.signal(number, training.stop) for number in numbers}
    try:
        yield
        if training.stopping == signal.SIGINT:  # it came while the model was being published
            raise KeyboardInterrupt
    except Interrupted:
        if training.stopping == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _done(trial: Trial, folder: Path) -> dict[str, Any] | None:
    """What a training left that has made all its steps and published its model; None if there is no such."""
    last = checkpoint.place(folder, trial.steps)
    try:
        about = json.loads((last / "checkpoint.json").read_text(encoding="utf-8"))
        summary: dict[str, Any] = json.loads((folder / "model" / "training.json").read_text(encoding="utf-8"))
        return summary if (about["family"], summary["steps"]) == (trial.family(), trial.steps) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    keep_memory()
    try:
        document = json.loads((args.folder / "trial.json").read_text(encoding="utf-8"))
        train(make_trial(document["trial"]), load(args.data), args.folder, str(pick()))
    except (Interrupted, KeyboardInterrupt):
        return 128 + signal.SIGTERM
    except disk.BusyError as error:  # the folder's events are the other's to write
        print(f"error: {error}", file=sys.stderr)
        return 1
    except failures.UnusableError as error:
        Events(args.folder).state("interrupted", failures.reason(error))
        print(f"error: {error}", file=sys.stderr)
        return failures.UNUSABLE
    except Exception as error:
        Events(args.folder).failure(failures.reason(error))
        if not isinstance(error, DvqError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
