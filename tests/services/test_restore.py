"""The way back from a backup of MLflow's database, as k8s/README.md has it, on a real PostgreSQL."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml

from pipeline.services import HOST, _postgres, create_database, postgres
from tests.services.conftest import free_ports, wait_for

K8S = Path(__file__).parents[2] / "k8s"


class Database:
    """A PostgreSQL with the database mlflow, as in its pod."""

    def __init__(self, port: int) -> None:
        self.settings = {"PGHOST": HOST, "PGPORT": str(port), "PGUSER": "mlflow", "PGPASSWORD": "secret"}
        self.ask("CREATE DATABASE mlflow", database="postgres")

    def ask(self, *statements: str, database: str = "mlflow") -> list[tuple[object, ...]]:
        """The last statement's rows."""
        place = {name.removeprefix("PG").lower(): value for name, value in self.settings.items()}
        with psycopg.connect(**place, dbname=database, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def run(self, command: str, stdin: str = os.devnull, **environment: str) -> None:
        """Run a shell's command, which finds PostgreSQL's programs."""
        path = f"{Path(_postgres('psql')[-1]).parent}:{os.environ['PATH']}"
        with open(stdin, "rb") as file:
            done = subprocess.run(
                command,
                shell=True,
                stdin=file,
                capture_output=True,
                text=True,
                env={**environment, "PATH": path},
            )
        assert done.returncode == 0, done.stderr


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    (port,) = free_ports(1)
    create_database(tmp_path / "data", {"password": "secret"})
    server = postgres(tmp_path / "data", port)
    process = subprocess.Popen(server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(server.ready)
    yield Database(port)
    process.send_signal(server.end)
    process.wait()


def test_a_backup_from_before_an_upgrade_comes_back(database: Database, tmp_path: Path) -> None:
    """An upgrade's tables refer to the older ones, which so cannot be dropped one by one."""
    database.ask("CREATE TABLE runs (id text PRIMARY KEY)", "INSERT INTO runs VALUES ('kept')")
    job = yaml.safe_load((K8S / "base/backup.yaml").read_text())["spec"]["jobTemplate"]
    _, _, dump = job["spec"]["template"]["spec"]["initContainers"][0]["command"]
    file = str(tmp_path / "mlflow.dump")
    its = database.settings
    uri = f"postgresql+psycopg://mlflow:{its['PGPASSWORD']}@{HOST}:{its['PGPORT']}/mlflow"  # as SQLAlchemy takes it
    database.run(dump.replace("/dump/mlflow.dump", file), MLFLOW_BACKEND_STORE_URI=uri)
    database.ask("CREATE TABLE newer (run text REFERENCES runs (id))", "INSERT INTO runs VALUES ('later')")
    text = (K8S / "README.md").read_text().replace("\\\n", "")
    (restore,) = re.findall(r"exec -i postgres-0 -- (pg_restore .*?) <", text)
    database.run(restore, file, **its)
    assert database.ask("SELECT id FROM runs") == [("kept",)]
    assert database.ask("SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == [("runs",)]
