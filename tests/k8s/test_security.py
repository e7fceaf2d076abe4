"""Who may do what in the cluster: Pod Security as the namespace enforces it, and the network policies."""

import base64
import copy
import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipeline.pods import LABEL
from tests.k8s.conftest import OURS, PASSWORDS, Built, containers

Pod = dict[str, Any]


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


@pytest.mark.parametrize("overlay", [*OURS, *PASSWORDS])
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


def may(
    policies: list[dict[str, Any]],
    way: str,
    mine: dict[str, str],
    other: Peer,
    port: int,
    protocol: str = "TCP",
) -> bool:
    """Whether the policies of this namespace let the pod ``mine`` reach (Egress) or be reached by ``other``."""
    specs = [one["spec"] for one in policies if way in one["spec"]["policyTypes"]]
    about = [spec for spec in specs if selects(spec["podSelector"], mine)]
    side = {"Ingress": "from", "Egress": "to"}[way]
    return not about or any(
        (side not in rule or any(meets(peer, *other) for peer in rule[side]))
        and any(
            (port, protocol) == (one["port"], one.get("protocol", "TCP")) for one in rule.get("ports", ())
        )
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
        ("mlflow", 5000, (HERE, named("gc")), True),
        ("mlflow", 5000, (RUNS, named("gc")), False),
        ("s3", 8333, (HERE, named("gc")), False),
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
        ("postgres", 5432, (HERE, named("gc")), True),
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
    for server in ("mlflow", "backup", "gc", "postgres", "s3"):
        # Pods of kube-system, or an address outside: NodeLocal DNSCache, Cloud DNS.
        for policies, dns, protocol in product((single, production), (names, outside), ("UDP", "TCP")):
            assert may(policies, "Egress", named(server), dns, 53, protocol)
        assert not may(single, "Egress", named(server), outside, 443)
    for port, allowed in ((443, True), (5432, True), (22, False)):
        for server in ("mlflow", "backup", "gc"):
            assert may(production, "Egress", named(server), outside, port) is allowed
    for policies in (single, production):
        assert may(policies, "Egress", named("gc"), (HERE, named("mlflow")), 5000)
        assert may(policies, "Ingress", named("mlflow"), (HERE, named("gc")), 5000)


def test_what_of_s3_asks_for_no_key_is_on_loopback(built: Built) -> None:
    """Also where the cluster enforces no policy."""
    spec = built.pods("overlays/single-node")["s3"]["spec"]
    (s3,) = spec["containers"]
    given = dict(one.removeprefix("-").partition("=")[::2] for one in s3["args"])
    bound = {name: value for name, value in given.items() if name == "ip" or name.endswith("ip.bind")}
    assert bound == {"ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.ip.bind": "0.0.0.0"}
    assert "server" in given  # mini has no address for S3 alone
    assert given["s3.iam"] == "false"
    assert [port["containerPort"] for port in s3["ports"]] == [int(given["s3.port"])]


def test_s3s_grpc_asks_for_a_certificate_that_nobody_has(built: Built) -> None:
    """SeaweedFS leaves that port open, without a word, if it does not find all three."""
    spec = built.pods("overlays/single-node")["s3"]["spec"]
    (s3,) = spec["containers"]
    files = {one["value"] for one in s3["env"] if one["name"].startswith("WEED_GRPC_")}
    assert sum(one["name"].startswith("WEED_GRPC_") for one in s3["env"]) == 3
    assert files == {"/keys/grpc.pem"}
    assert "/keys" in [mount["mountPath"] for mount in s3["volumeMounts"]]
    (keys,) = [one["secret"] for one in spec["volumes"] if one["name"] == "keys"]
    assert "grpc.pem" in built.one("overlays/single-node", "Secret", keys["secretName"])["data"]
    context = ssl.create_default_context(cafile=built.folder / "servers/grpc.pem")
    context.load_cert_chain(built.folder / "servers/grpc.pem")


def decoded(secret: dict[str, Any]) -> dict[str, str]:
    return {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}


def test_runs_have_no_key_of_mlflows_bucket(built: Built) -> None:
    """Two identities of SeaweedFS, each with its bucket and nothing of an administrator's."""
    single = "overlays/single-node"
    given = json.loads(decoded(built.one(single, "Secret", "s3-"))["s3.json"])["identities"]
    pairs = {"runs": decoded(built.one("runs", "Secret", "dvq")),
             "mlflow": decoded(built.one(single, "Secret", "mlflow-s3"))}  # fmt: skip
    buckets = {"runs": "dvq", "mlflow": built.one(single, "ConfigMap", "dvq")["data"]["MLFLOW_BUCKET"]}
    assert [one["name"] for one in given] == list(buckets)
    for one in given:
        (pair,), its = one["credentials"], pairs[one["name"]]
        assert (pair["accessKey"], pair["secretKey"]) == (
            its["AWS_ACCESS_KEY_ID"],
            its["AWS_SECRET_ACCESS_KEY"],
        )
        assert sorted(one["actions"]) == [
            f"{action}:{buckets[one['name']]}" for action in ("List", "Read", "Tagging", "Write")
        ]
    assert len({pair["AWS_ACCESS_KEY_ID"] for pair in pairs.values()}) == 2
    pods = built.pods(single)
    (s3,), (mlflow,), (upload,) = (pods[name]["spec"]["containers"] for name in ("s3", "mlflow", "backup"))
    assert "-s3.config=/keys/s3.json" in s3["args"]
    assert "envFrom" not in s3  # SeaweedFS takes AWS's keys in its environment for an administrator's
    for one in (mlflow, upload):
        (secret,) = [source["secretRef"]["name"] for source in one["envFrom"] if "secretRef" in source]
        assert secret.startswith("mlflow-s3-")


@pytest.mark.parametrize("name", ["keys/s3.env", "base/s3.env"])
def test_without_a_key_there_is_no_s3_that_lets_all_in(built: Built, tmp_path: Path, name: str) -> None:
    """As with a role on EKS: kubectl misses s3.json then, should it be asked for SeaweedFS."""
    folder = tmp_path / "k8s"
    shutil.copytree(built.folder, folder)
    (folder / name).write_text("")
    subprocess.run([folder / "configure"], check=True, capture_output=True)
    assert not (folder / "servers/s3.json").exists()
    (folder / name).write_text("AWS_ACCESS_KEY_ID=new\nAWS_SECRET_ACCESS_KEY=pair\n")
    subprocess.run([folder / "configure"], check=True, capture_output=True)
    assert '"accessKey": "new", "secretKey": "pair"' in (folder / "servers/s3.json").read_text()


def test_nobody_reaches_a_task(built: Built) -> None:
    (policy,) = [one for one in built.manifests["runs"] if one["kind"] == "NetworkPolicy"]
    assert policy["spec"] == {"podSelector": {"matchLabels": dict([LABEL])}, "policyTypes": ["Ingress"]}
