"""The pipeline on this machine, in a process group of its own: by kfp's SubprocessRunner, or its DockerRunner.

The launcher (:mod:`pipeline.submit`) starts ``python -m pipeline.local``, which runs the pipeline. Tasks are
processes of its group, or containers with the launch's label. The launcher keeps this process's standard input open
as long as it lives; when that is closed, however the launcher died, the group and the containers are ended.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from components import IMAGE
from dvq import DvqError
from pipeline import containers
from pipeline.profile import Profile

GRACE = 10
"""Seconds between SIGTERM and SIGKILL: time for a checkpoint."""

ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
"""One thread for each trial: several trials share the machine, and the number of threads decides the last bits of
the results."""

ARGUMENT = 96 << 10
"""Bytes of an argument as JSON, at most: kfp passes a task's inputs in one word of its command line, of which Linux
takes 128 KiB."""

MAKE_DATABASE = "from components import mlflow_server; mlflow_server.ensure_database()"
"""Creates MLflow's tables before several tasks would; in a process of its own, since importing MLflow is slow."""


def check(folder: Path, arguments: Mapping[str, str]) -> None:
    """DvqError if kfp cannot run from this folder, or would silently change or lose an argument."""
    if " " in sys.executable:
        raise DvqError(
            f"kfp's local runner breaks on the space in Python's path '{sys.executable}'; "
            "move the project to a folder without spaces in its path"
        )
    # kfp replaces "python3" by the interpreter's path in all of a task's command line.
    if "python3" in str(folder):
        raise DvqError(
            f"kfp's local runner would rewrite 'python3' in the path '{folder}' and lose every output; "
            "run from a folder without 'python3' in its path"
        )
    for name, value in arguments.items():
        for word in ("python3", "{{$"):  # the latter begins kfp's own placeholders
            if word in value:
                raise DvqError(
                    f"kfp's local runner would rewrite '{word}' in {name}; use a text or path without it"
                )
        if (size := len(json.dumps(value))) > ARGUMENT:
            raise DvqError(
                f"kfp's local runner takes {ARGUMENT >> 10} KiB of {name}, and it has {-(-size >> 10)}; move what "
                "trials share to 'base', or make two sweeps of it"
            )


@contextlib.contextmanager
def running(
    arguments: Mapping[str, str], jobs: int, folder: Path, profile: Profile | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """The process that runs the pipeline, with its log in ``folder``/kfp.log; tasks are containers if there is a
    ``profile``.

    On leaving, what still runs is ended, and the tasks' temporary files are removed.
    """
    work = folder / "work"
    temporary = work / "tmp"
    try:
        temporary.mkdir(parents=True)
    except FileExistsError:
        raise DvqError(f"{folder} is another launch's, of the same second; type it again") from None
    environment = {**os.environ, **ONE_THREAD, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1"}
    with (folder / "kfp.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.local"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    assert process.stdin
    try:
        job = {
            "arguments": dict(arguments),
            "jobs": jobs,
            "folder": str(folder),
            "profile": profile and profile.model_dump(),
        }
        with contextlib.suppress(BrokenPipeError):  # it died at once; its log and exit status tell
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        yield process
    finally:
        try:
            end(process)
            if profile:
                containers.end(folder, GRACE)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End ``process`` and all that it started, after at most GRACE seconds for the tasks, or a second Ctrl-C.

    kfp is killed first: it would take the end of a task for a failure and start the next one.
    """
    try:
        process.kill()
        process.wait()
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while _signal_group(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
    except KeyboardInterrupt:
        pass
    finally:
        _signal_group(process.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to the process group; returns whether there was a process in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS says the latter when only zombies are left
        return False
    return True


def main() -> None:
    """The child process: it reads the job, a line of JSON, from standard input, whose end means that the launcher
    died."""
    lifeline = os.fdopen(os.dup(0), "rb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # the tasks get no standard input
    job = json.loads(lifeline.readline())
    profile, folder = job["profile"] and Profile(**job["profile"]), Path(job["folder"])
    ending = f"{shlex.quote(sys.executable)} -m pipeline.containers {shlex.quote(str(folder))} {GRACE}"
    script = f"trap '' TERM; kill -TERM 0; {ending if profile else f'sleep {GRACE}'}; "
    script += f"rm -rf {shlex.quote(str(folder / 'work'))}; kill -KILL 0"
    threading.Thread(target=_end_with_launcher, args=(lifeline, script), daemon=True).start()
    _run(job["arguments"], job["jobs"], folder, profile)


def _end_with_launcher(lifeline: IO[bytes], script: str) -> None:
    lifeline.read()
    # Replacing this process by a shell ends kfp at once, before it starts another task, and keeps the process group.
    os.execv("/bin/sh", ["sh", "-c", script])


def _run(arguments: dict[str, str], jobs: int, folder: Path, profile: Profile | None) -> None:
    tracked = bool(os.environ.get("MLFLOW_TRACKING_URI"))
    database = subprocess.Popen([sys.executable, "-c", MAKE_DATABASE]) if tracked else None
    from kfp import local

    from pipeline.definition import sweep_pipeline

    lift_cap(jobs)
    warnings.filterwarnings("ignore", message=".*custom or non-Python base image", category=RuntimeWarning)
    # kfp deletes a given workspace after the run, but leaves its default one behind if it is killed.
    root = str(folder / "work/root")
    runner: Any = local.SubprocessRunner(use_venv=False)
    if profile:
        runner = containers.runner(profile, folder, arguments["source"])
    local.init(runner, pipeline_root=root, workspace_root=root + "-workspace")
    if database:
        database.wait()
    sweep_pipeline(jobs, profile.image if profile else IMAGE)(**arguments)


def lift_cap(jobs: int) -> None:
    """Let kfp's local loop run ``jobs`` iterations at a time; its constructor sets a cap of 2."""
    from kfp.local.orchestrator import enhanced_dag_orchestrator as orchestrator

    class Uncapped(orchestrator.ParallelExecutor):  # type: ignore[misc]
        def __init__(self, max_workers: int | None = None) -> None:
            super().__init__(max_workers)
            self.conservative_max: Any = jobs

    orchestrator.ParallelExecutor = Uncapped


if __name__ == "__main__":
    main()
