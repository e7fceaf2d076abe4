"""The stack as services of this machine, and a sweep on it that leaves no password anywhere."""

import base64
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import psutil
import pytest
import yaml
from kfp.compiler import Compiler

from components import mlflow_server
from pipeline.definition import sweep_pipeline
from pipeline.services import create_database, endpoint
from pipeline.stack import Stack
from tests.services.conftest import wait_for

ROOT = Path(__file__).parents[2]
TINY = {
    "base": {
        "data": "cifar10-sample",
        "split": "tune",
        "features": 4,
        "num_latents": 2,
        "num_codes": 4,
        "code_dim": 4,
        "batch_size": 16,
        "steps": 5,
        "log_every": 1,
        "evaluate_every": 5,
        "bound_samples": 1,
    },
    "grid": {"estimator": ["gs-soft", "vq-ema"]},
    "champion": "tiny-model",
}
CANARY = "canary-5e0c7f"
"""a password that the user set, and that no fault nor record may show"""


class Home:
    """A folder in which commands are typed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AWS_", "DVQ_", "MLFLOW_"))
        } | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_USERNAME": "someone",
            "MLFLOW_TRACKING_PASSWORD": CANARY,
        }
        self.said = ""
        (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")

    def run(self, module: str, *arguments: str, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", f"pipeline.{module}", *arguments],
            cwd=self.folder,
            env={**self.environment, **more},
            capture_output=True,
            text=True,
            timeout=250,
        )
        self.said += done.stdout + done.stderr
        return done.returncode, done.stdout + done.stderr

    @property
    def stack(self) -> Stack:
        return Stack(self.folder / "outputs" / "stack")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("home"))
    try:
        yield made
    finally:
        made.stack.down()


def test_it_starts_once_and_says_where(home: Home) -> None:
    """Also when it is started twice at once."""
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: home.run("stack", "up"), range(2)))
    for code, said in both:
        assert code == 0, said
        assert f"the stack is up: MLflow {home.stack.address}" in said
    assert sum("starting S3" in said for _, said in both) == 1
    pids = home.stack.pids
    assert home.run("stack", "up")[0] == 0
    assert home.stack.pids == pids
    code, said = home.run("ui")
    assert (code, said.startswith(f"{home.stack.address}/#/experiments")) == (0, True), said
    file = home.folder / "outputs" / "stack" / "stack.json"
    assert oct(file.stat().st_mode)[-3:] == "600"
    assert oct(file.parent.stat().st_mode)[-3:] == "700"
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [secret for secret in home.stack.secret.values() if secret in lines]


def test_only_this_machine_reaches_it_and_no_other_site_by_a_browser(home: Home) -> None:
    stack = home.stack
    listening = {
        (name, at.laddr.ip, at.laddr.port)
        for name in stack.pids
        for process in stack._processes(name)
        for at in process.net_connections("tcp")
        if at.status == "LISTEN"
    }
    assert {address for _, address, _ in listening} == {"127.0.0.1"}
    assert {port for _, _, port in listening} >= set(stack.ports.values())
    statuses = []
    for host in ("127.0.0.1", "localhost", "elsewhere.example"):
        connection = http.client.HTTPConnection("127.0.0.1", stack.ports["mlflow"], timeout=30)
        at = f"{host}:{stack.ports['mlflow']}"
        connection.request("GET", "/api/2.0/mlflow/experiments/search?max_results=1", headers={"Host": at})
        statuses.append(connection.getresponse().status)
        connection.close()
    assert statuses == [200, 200, 403]


def test_a_sweep_uses_it_and_leaves_no_password(home: Home) -> None:
    code, said = home.run("submit", "tiny.yaml", "--jobs", "2")
    assert code == 0, said
    assert not (home.folder / "outputs" / "mlflow.db").exists()
    left = dict(everything(home))
    assert {"tracking", "s3 dvq", "s3 mlflow", "report", "kfp.log", "pipeline"} <= {
        name.partition(":")[0] for name in left
    }
    own = home.stack.secret
    for secret in (CANARY, own["secret_key"], own["password"]):
        forms = (secret.encode(), quote(secret).encode(), basic(secret))
        assert [name for name, content in left.items() if any(form in content for form in forms)] == []
    told = {name for name, content in left.items() if own["access_key"].encode() in content}
    assert {Path(name).name for name in told} <= {"s3.log"}  # the server's own, in a folder that is private


def basic(password: str) -> bytes:
    """As HTTP's basic authentication sends it."""
    return base64.b64encode(f"someone:{password}".encode())


def everything(home: Home) -> Iterator[tuple[str, bytes]]:
    """All that the sweep left: what was said, files, objects, MLflow's records and the compiled pipeline."""
    yield "said", home.said.encode()
    outputs = home.folder / "outputs"
    for path in outputs.rglob("*"):
        if path.is_file() and outputs / "stack" not in path.parents:
            yield f"{path.name}:{path}", path.read_bytes()
            if path.name == "report.html":
                yield "report", path.read_bytes()
    stack = home.stack
    s3 = boto3.client(
        "s3",
        endpoint_url=endpoint(stack.ports),
        aws_access_key_id=stack.secret["access_key"],
        aws_secret_access_key=stack.secret["secret_key"],
        region_name="us-east-1",
    )
    for bucket in ("dvq", "mlflow"):
        for item in s3.list_objects_v2(Bucket=bucket)["Contents"]:
            yield f"s3 {bucket}:{item['Key']}", s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**home.environment, **stack.environment()}.items():
            patch.setenv(name, value)
        compiled = home.folder / "pipeline.yaml"
        Compiler().compile(sweep_pipeline(2), str(compiled))
        yield "pipeline", compiled.read_bytes()
        client = mlflow_server.client()
        for experiment in client.search_experiments():
            for run in client.search_runs([experiment.experiment_id]):
                yield f"tracking:{run.info.run_id}", json.dumps(run.to_dictionary()).encode()
        for version in client.search_model_versions():
            yield f"model:{version.version}", repr(version).encode()
    for path in (outputs / "stack" / "logs").iterdir():
        yield f"log:{path}", path.read_bytes()


def test_its_champion_loads_with_pickle_forbidden_and_says_where_it_comes_from(home: Home) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", home.stack.address)
        version = mlflow_server.client().get_model_version_by_alias("tiny-model", "champion")
        experiment = mlflow_server.client().get_experiment_by_name("tiny")
        runs = mlflow_server.client().search_runs([experiment.experiment_id], "tags.`dvq.key` LIKE '%'")
    best = min(runs, key=lambda run: run.data.metrics["tune/bits_per_dim"])
    assert version.run_id == best.info.run_id
    assert {name: version.tags[f"dvq.{name}"] for name in ("sweep", "trial", "key")} == {
        "sweep": "tiny",
        "trial": best.info.run_name,
        "key": best.data.tags["dvq.key"],
    }
    assert version.tags["dvq.commit"] == best.data.tags["dvq.commit"]
    assert len(version.tags["dvq.fingerprint"]) == 64
    script = (
        "import mlflow, numpy, dvq; images = numpy.zeros((2, 32, 32, 3), dtype=numpy.uint8)\n"
        "import torch; served = mlflow.pyfunc.load_model('models:/tiny-model@champion')\n"
        "model = dvq.load('models:/tiny-model@champion')\n"
        "torch.manual_seed(0); codes = served.predict(images)\n"
        "torch.manual_seed(0); same = model.encode(torch.from_numpy(images)).numpy()\n"
        "print(codes.shape, (codes == same).all())"
    )
    settings = {"MLFLOW_TRACKING_URI": home.stack.address, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**home.environment, **settings},
        cwd=home.folder,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ["(2, 8, 8, 2) True"], done.stderr


def test_few_names_of_metrics_however_many_latent_variables(home: Home) -> None:
    """What there is of each is in evaluation.json, the run's artifact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", home.stack.address)
        experiment = mlflow_server.client().get_experiment_by_name("tiny")
        for run in mlflow_server.client().search_runs([experiment.experiment_id], "tags.`dvq.key` LIKE '%'"):
            assert len(run.data.metrics) <= 12
            path = mlflow_server.client().download_artifacts(run.info.run_id, "evaluation.json")
            ledger = json.loads(Path(path).read_text(encoding="utf-8"))["ledger"]
            assert len(ledger["latents"]) == 2


def test_it_starts_again_as_it_was_after_a_kill(home: Home) -> None:
    before, runs = home.stack, recorded(home)
    busy = psutil.Process(before.pids["postgres"]).children()[0]
    busy.suspend()  # it outlives PostgreSQL, and lets no other start
    for pid in before.pids.values():
        os.kill(pid, signal.SIGKILL)  # MLflow's own child stays behind, as a stray
    code, said = home.run("submit", "tiny.yaml")
    assert code == 2
    assert "error: the stack was started, and" in said
    with socket.create_server(("127.0.0.1", before.ports["postgres"])):  # another's by now
        assert home.run("stack", "up")[0] == 0
    assert home.stack.ports["postgres"] != before.ports["postgres"]
    assert not busy.is_running()
    assert home.stack.secret == before.secret
    assert recorded(home) == runs


def test_a_lost_database_is_made_again_by_replay(home: Home) -> None:
    runs = recorded(home)
    assert len(runs) == 3
    home.run("stack", "down")
    shutil.rmtree(home.folder / "outputs" / "stack" / "postgres")
    assert home.run("stack", "up")[0] == 0
    code, said = home.run("replay", "tiny.yaml")
    assert code == 0, said
    assert "2 of 2 trials are up to date in MLflow at http://127.0.0.1:" in said
    assert recorded(home) == runs
    assert home.run("replay", "tiny.yaml")[0] == 0
    assert recorded(home) == runs


def recorded(home: Home) -> dict[str, Any]:
    """Status, parameters and every point of the sweep's runs, by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", home.stack.address)
        client = mlflow_server.client()
        experiment = client.get_experiment_by_name("tiny")
        return {
            run.info.run_name: (
                run.info.status,
                run.data.params,
                {
                    name: [
                        (point.step, point.timestamp, point.value)
                        for point in client.get_metric_history(run.info.run_id, name)
                    ]
                    for name in run.data.metrics
                },
            )
            for run in client.search_runs([experiment.experiment_id])
        }


def test_a_database_that_was_half_made_is_made_anew(tmp_path: Path) -> None:
    """PostgreSQL's initdb writes first what a whole database is known by."""
    data, script = tmp_path / "postgres", "import sys, pathlib; from pipeline import services\n"
    script += "services.create_database(pathlib.Path(sys.argv[1]), {'password': 'one'})"
    with subprocess.Popen([sys.executable, "-c", script, data], cwd=ROOT, start_new_session=True) as making:
        wait_for(lambda: list(tmp_path.rglob("PG_VERSION")))
        os.killpg(making.pid, signal.SIGKILL)
    create_database(data, {"password": "another"})
    assert (data / "global" / "pg_control").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["postgres"]


def test_one_whose_start_was_cut_short_is_refused(home: Home) -> None:
    """As by a terminal that was closed: its services are sessions of their own, and go on."""
    assert home.run("stack", "up")[0] == 0
    stack = home.stack
    stack._stop("mlflow", signal.SIGTERM)
    del stack.pids["mlflow"]
    stack._save()
    code, said = home.run("submit", "tiny.yaml")
    assert (code, "error: the stack was started, and not all of it runs: no mlflow; make" in said) == (
        2,
        True,
    )
    assert home.run("stack", "up")[0] == 0
    assert home.stack.whole()


def test_it_ends_nothing_but_its_own(home: Home) -> None:
    """A process that has the number of a service's by now lives on."""
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        stack = home.stack
        pids = dict(stack.pids)
        stack.pids = {**pids, "mlflow": other.pid}
        stack._save()
        code, said = home.run("stack", "down")
        assert (code, other.poll()) == (0, None), said
        stack.pids = {"mlflow": pids["mlflow"]}
        stack._save()
        assert home.run("stack", "down") == (0, "the stack is down\n")
        assert home.run("stack", "down") == (0, "the stack was down\n")
        code, said = home.run("ui")
        assert (code, "no sweep was tracked in it yet" in said) == (2, True), said
    finally:
        other.kill()
        other.wait()
