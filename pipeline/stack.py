"""MLflow's server with PostgreSQL and S3 behind it, on this machine: python -m pipeline.stack up | down

All of it is in outputs/stack: the data, logs/, and stack.json with the ports, the generated passwords and the process
ids, which only its owner can read. However it ended, it starts again with the same data and passwords.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvq import DvqError, disk
from pipeline.command import application, outputs
from pipeline.services import HOST, PORTS, Service, create_database, endpoint, keys, services

START, STOP = 180, 20
"""Seconds for a service to answer, and to end."""
STORE = "s3://dvq/store"
MARK = "DVQ_STACK"
"""The variable in the environment of the services' processes that names the stack's folder."""


class Stack:
    """The stack in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "stack.json"
        self.secret = {name: secrets.token_hex(20) for name in ("access_key", "secret_key", "password")}
        self.ports: dict[str, int] = {}
        self.pids: dict[str, int] = {}
        try:
            document: dict[str, Any] = json.loads(self._file.read_text(encoding="utf-8"))
            self.secret, self.ports, self.pids = document["secret"], document["ports"], document["pids"]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError):
            raise DvqError(f"{self._file} is damaged, and with it the passwords: remove {folder}") from None

    @property
    def address(self) -> str:
        """MLflow's address."""
        return f"http://{HOST}:{self.ports['mlflow']}"

    def environment(self) -> dict[str, str]:
        """The environment variables that lead a sweep to the stack; empty if it is down.

        Raises:
            DvqError: it was started, and a service does not run: it died, or whoever started it did.
        """
        if not self.pids:
            return {}
        alive = [name for name in self.pids if self._processes(name)]
        dead = [name for name in self._services() if name not in alive]
        if dead:
            raise DvqError(
                f"the stack was started, and not all of it runs: no {', no '.join(dead)}; make stack-up starts it "
                "again with all that it keeps, make stack-down lets sweeps run without it"
            )
        store = {"DVQ_STORE": STORE, "AWS_ENDPOINT_URL": endpoint(self.ports), **keys(self.secret)}
        # The user's own store or S3 settings take precedence (the data may come from that S3); a region alone is
        # neither.
        own = (store.keys() - {"AWS_DEFAULT_REGION"}) & os.environ.keys()
        return {"MLFLOW_TRACKING_URI": self.address} | ({} if own else store)

    def whole(self) -> bool:
        """Whether all services run and answer."""
        return bool(self.pids) and all(
            name in self.pids and self._processes(name) and service.ready()
            for name, service in self._services().items()
        )

    def up(self) -> None:
        """Start the services, after ending those that still run."""
        self.down()
        if not self.ports or not all(map(_free, self.ports.values())):
            self.ports = _free_ports()
        create_database(self.folder / "postgres", self.secret)
        try:
            for name, service in self._services().items():
                self._start(name, service)
        except BaseException:  # Ctrl-C too
            self.down()
            raise

    def down(self) -> bool:
        """End the services, the last first; returns whether one ran."""
        ran = [name for name in reversed(self.pids) if self._processes(name)]
        for name in ran:
            self._stop(name, self._services()[name].end)
        self.pids = {}
        self._save()
        return bool(ran)

    def _services(self) -> dict[str, Service]:
        return services(self.folder, self.ports, self.secret)

    def _start(self, name: str, service: Service) -> None:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as out:
            process = subprocess.Popen(
                service.command,
                env={**os.environ, **service.environment, MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.pids[name] = process.pid
        self._save()
        deadline = time.monotonic() + START
        while not service.ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise DvqError(f"the stack's {name} does not start; its log, {log}, may say why")
            time.sleep(0.2)

    def _stop(self, name: str, end: signal.Signals) -> None:
        """Ask a service's process group to end, then kill the rest."""
        import psutil

        def signal_to(processes: list[psutil.Process], number: signal.Signals) -> None:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

        remaining = self._processes(name)
        if grouped := [process for process in remaining if self._grouped(name, process)]:
            signal_to(grouped, end)
            _, remaining = psutil.wait_procs(remaining, STOP)
        signal_to(remaining, signal.SIGKILL)
        psutil.wait_procs(remaining, STOP)

    def _processes(self, name: str) -> list[Any]:
        """The service's processes: its group, and PostgreSQL's children, which leave it.

        Those finish their work even if their parent was killed, and until then no other PostgreSQL can start. They
        are recognized by their working folder.
        """
        try:
            import psutil
        except ImportError:  # after make clean, which leaves the folder
            raise DvqError(
                f"{self.folder} is a stack's, and what it needs is not installed: make stack-up"
            ) from None

        data = self.folder.resolve() / name
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                at_data = process.name() == "postgres" and Path(process.cwd()) == data
                if at_data or self._grouped(name, process):
                    processes.append(process)
        return processes

    def _grouped(self, name: str, process: Any) -> bool:
        """Whether the process is in the service's group, and not in another that reuses the group's number."""
        import psutil

        with contextlib.suppress(psutil.Error, ProcessLookupError):
            ours = os.getpgid(process.pid) == self.pids[name]
            return ours and process.environ().get(MARK) == str(self.folder)
        return False

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        partial = self._file.with_suffix(".partial")
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"secret": self.secret, "ports": self.ports, "pids": self.pids}, file, indent=1)
        partial.replace(self._file)


def _free(port: int) -> bool:
    try:
        socket.create_server((HOST, port)).close()
    except OSError:
        return False
    return True


def _free_ports() -> dict[str, int]:
    sockets = {name: socket.create_server((HOST, 0)) for name in PORTS}
    ports: dict[str, int] = {name: opened.getsockname()[1] for name, opened in sockets.items()}
    for opened in sockets.values():
        opened.close()
    return ports


@contextlib.contextmanager
def _here() -> Iterator[Stack]:
    """The stack of the current folder, locked for this process."""
    folder = outputs() / "stack"
    with disk.locked(folder / "lock"):
        yield Stack(folder)


def up() -> None:
    """Start the stack."""
    with _here() as stack:
        if not stack.whole():
            print("starting S3, PostgreSQL and MLflow: up to a minute", flush=True)
            stack.up()
        print(
            f"the stack is up: MLflow {stack.address}, S3 {endpoint(stack.ports)}; logs in {stack.folder / 'logs'}"
        )
        print("make submit-sweep uses it; make stack-down ends it and keeps its data")


def down() -> None:
    """End the stack; its data stays."""
    with _here() as stack:
        print("the stack is down" if stack.down() else "the stack was down")


app = application(up, down)

if __name__ == "__main__":
    app()
