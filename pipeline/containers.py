"""Tasks as containers: kfp's DockerRunner, with settings from the profile and the environment.

The containers of a launch have its folder as a label. ``python -m pipeline.containers FOLDER SECONDS`` ends them.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, Mount

from components import mlflow_server
from dvq import DvqError, disk
from pipeline.profile import Profile

LABEL = "dvq.launch"
PASSED = re.compile(r"DVQ_(STORE|CACHE|RECORD|FUSE)|MLFLOW_.*|AWS_.*|.*_NUM_THREADS")
"""The environment variables that reach the tasks."""
LOOPBACK = re.compile(r"localhost|127\..*|::1")
ENDED = "container of "
"""the beginning of the log's line about a container that failed"""


def connect() -> docker.DockerClient:
    """The daemon's client; DvqError if none answers."""
    try:
        return docker.from_env()
    except (DockerException, ValueError) as error:  # ValueError: the port is not a number
        place = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
        if "PermissionError" in str(error):
            raise DvqError(
                f"the Docker daemon at {place} is not open to this user: usermod -aG docker NAME, and log in anew"
            ) from None
        raise DvqError(
            f"no Docker daemon answers at {place}; install one (on Debian: apt-get install docker.io) and start "
            "it, or set DOCKER_HOST"
        ) from None


def reason(error: DockerException) -> str:
    """The daemon's message in one line, without the request's address."""
    explanation = error.explanation if isinstance(error, APIError) else None
    return (str(explanation or error).splitlines() or [""])[0]


def has_image(client: docker.DockerClient, image: str) -> bool:
    """Whether the daemon has the image."""
    try:
        client.images.get(image)
    except ImageNotFound:
        return False
    return True


def check_image(image: str) -> None:
    """DvqError unless the daemon has the image or can pull it."""
    client = connect()
    try:
        if not has_image(client, image):
            client.images.pull(image)
    except DockerException as error:
        raise DvqError(
            f"the image {image} is not here and cannot be pulled ({reason(error)}): make image"
        ) from None


def check_pushed(image: str) -> None:
    """DvqError if the image is not in its registry; not checked without a daemon that can ask."""
    try:
        connect().images.get_registry_data(image)
    except NotFound as error:
        raise DvqError(
            f"the image {image} is not in its registry ({reason(error)}): make image PUSH=1"
        ) from None
    except (DvqError, DockerException):  # the nodes may reach a registry that this machine does not
        return


def settings(profile: Profile, folder: Path, source: str) -> dict[str, Any]:
    """The arguments of ``docker run`` for each task of the launch whose folder is ``folder``.

    What tasks share with this machine (the store, MLflow's database, the data's ``source``) has the same path in the
    container, and their files belong to the user who launches them.
    """
    passed = {name: value for name, value in os.environ.items() if PASSED.fullmatch(name)}
    # dvq.device spreads the trials over all GPUs; a count of n would give each container the first n.
    gpus = [DeviceRequest(count=-1, capabilities=[["gpu"]])] if profile.gpu else []
    locks = disk.locks() if gpus else None
    # DVQ_DEVICE: no fallback to a CPU. Triton's cache is not in /tmp, where Docker forbids executing files.
    compiled = str(folder / "work/tmp/triton")
    on_gpus = {"DVQ_DEVICE": "cuda", "DVQ_LOCKS": str(locks), "TRITON_CACHE_DIR": compiled} if locks else {}
    # Docker's 4G is Kubernetes' 4Gi.
    memory, shared = (size and size.removesuffix("i") for size in (profile.memory, profile.shared_memory))
    return {
        "environment": {**passed, **on_gpus, "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder / "work/tmp")},
        "mounts": list(_mounts(passed, {folder / "work", *([locks] if locks else [])}, source)),
        "network_mode": "host" if _on_loopback([source, *passed.values()]) else "bridge",
        "user": f"{os.getuid()}:{os.getgid()}",
        "labels": {LABEL: str(folder)},
        "read_only": True,
        "tmpfs": {"/tmp": "size=64m"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "device_requests": gpus,
        "nano_cpus": profile.cpu and int(profile.cpu * 1e9),
        "mem_limit": memory,
        "memswap_limit": memory,  # unless set, as much again of swap would be allowed
        "shm_size": shared,
    }


def _mounts(environment: Mapping[str, str], written: set[Path], source: str) -> Iterator[Mount]:
    if store := environment.get("DVQ_STORE", ""):
        written.add(Path(environment["DVQ_CACHE"] if "://" in store else store))
    if file := mlflow_server.database(environment.get("MLFLOW_TRACKING_URI", "")):
        written.add(file.absolute().parent)  # with its journal and the artifacts
    for path in written:
        path.mkdir(parents=True, exist_ok=True)
        yield Mount(str(path), str(path), "bind")
    for value in {source, *environment.values()}:  # and certificates, credentials
        if value.startswith("/") and Path(value).exists() and Path(value) not in written:
            yield Mount(value, value, "bind", read_only=True)


def _on_loopback(addresses: Any) -> bool:
    """Whether an address is on this machine's loopback, which only containers on the host's network reach."""
    return any(LOOPBACK.fullmatch(urlsplit(url).hostname or "") for url in addresses if "://" in url)


def runner(profile: Profile, folder: Path, source: str) -> Any:
    """kfp's DockerRunner, changed to report how each container ended."""
    from kfp import local
    from kfp.local import docker_task_handler

    docker_task_handler.run_docker_container = run_container
    return local.DockerRunner(**settings(profile, folder, source))


def run_container(
    client: docker.DockerClient, image: str, command: list[str], volumes: Mapping[str, Any], **options: Any
) -> int:
    """Run a task's container and return its exit code, after its log.

    This replaces kfp's own, which lets the daemon remove the container and takes a missing one for a success: this
    one removes it after reading its exit code.
    """
    container = client.containers.create(image, command, volumes=volumes, **options)
    try:
        container.start()
        for part in container.logs(stream=True):
            sys.stdout.buffer.write(part)
            sys.stdout.flush()
        code = int(container.wait(timeout=None)["StatusCode"])
        container.reload()
        if code != 0:
            _print_line(f"{ENDED}{_task_name(command)}: {_how_it_ended(code, container)}")
        return code
    except NotFound:
        _print_line(f"{ENDED}{_task_name(command)}: removed by another hand")
        return 1
    finally:
        with contextlib.suppress(NotFound):
            container.remove(force=True)


def _print_line(sentence: str) -> None:
    """Print a line in one write, so that other containers' output does not break it."""
    sys.stdout.buffer.write(f"\n{sentence}\n".encode())
    sys.stdout.flush()


def _how_it_ended(code: int, container: Container) -> str:
    memory = container.attrs["HostConfig"]["Memory"]
    if container.attrs["State"]["OOMKilled"]:
        limit = f"over its limit of {memory / 2**20:.0f} MiB" if memory else "of the machine"
        return f"exit code {code}, out of memory, {limit}"
    killed = f" ({signal.Signals(code - 128).name})" if code - 128 in set(signal.Signals) else ""
    return f"exit code {code}{killed}"


def _task_name(command: list[str]) -> str:
    """The component, and the trial if it has one, from the command of kfp's executor."""
    flag = "--function_to_execute"
    name = command[command.index(flag) + 1] if flag in command else "a task"
    for argument in command:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return f"{name} {json.loads(argument)['inputs']['parameterValues']['trial']}"
    return name


def end(folder: Path, grace: float) -> None:
    """End the launch's containers: SIGTERM to all their processes, SIGKILL after ``grace`` seconds, or at a second
    Ctrl-C; print a warning if the daemon does not answer.

    The daemon itself would signal only the first process, kfp's shell, which ignores SIGTERM.
    """
    try:
        _end(folder, grace)
    except KeyboardInterrupt:
        end(folder, 0)
    except (DvqError, DockerException, OSError) as error:  # OSError: from the HTTP client
        print(
            f"warning: containers may still run ({str(error).partition(';')[0]}); once the daemon answers: "
            f"docker rm -f $(docker ps -aq --filter {shlex.quote(f'label={LABEL}={folder}')})",
            file=sys.stderr,
        )


def _end(folder: Path, grace: float) -> None:
    client, ours = connect(), {"label": f"{LABEL}={folder}"}
    deadline = time.monotonic() + grace
    terminated: set[str] = set()
    while running := client.containers.list(filters=ours, ignore_removed=True):
        late = time.monotonic() > deadline
        with ThreadPoolExecutor(len(running)) as pool:
            new = [container for container in running if container.id not in terminated]
            list(pool.map(_kill, running) if late else pool.map(_terminate, new))
        terminated |= {str(container.id) for container in running}
        time.sleep(0.1)
    for container in client.containers.list(True, filters=ours, ignore_removed=True):
        with contextlib.suppress(APIError):
            container.remove(force=True)


def _terminate(container: Container) -> None:
    with contextlib.suppress(APIError):  # it ended meanwhile
        container.exec_run(["sh", "-c", "kill -TERM -1"])


def _kill(container: Container) -> None:
    with contextlib.suppress(APIError):
        container.kill()


if __name__ == "__main__":
    end(Path(sys.argv[1]), float(sys.argv[2]))
