"""The compiled pipeline carries, for each task, what its profile says, and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker.utils import parse_bytes
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2 as kubernetes
from kfp.pipeline_spec import pipeline_spec_pb2

from components import IMAGE
from dvq import DvqError
from dvq.config import overrides
from dvq.sweep import Sweep
from pipeline import cluster, definition
from pipeline.local import ONE_THREAD
from pipeline.profile import DEFAULTS, PROFILES, Cluster, Profile, Toleration, find_profile

ROOT = Path(__file__).parents[2]
TASKS = {"plan", "prepare-data", "train", "evaluate", "analyze", "report"}
TRAIN = {"train", "evaluate"}
SHIPPED = sorted(path.stem for path in PROFILES.glob("*.yaml"))
CLUSTERS = [name for name in SHIPPED if find_profile(name).cluster]
EVERYTHING = Profile(
    gpu=2, cpu=3.5, memory="6Gi", shared_memory="1Gi", parallelism=7, image="r.example.org/x/dvq:1",
    cluster=Cluster(
        accelerator="nvidia.com/gpu.shared", sharing=4, node_selector={"pool": "gpu"},
        tolerations=[
            Toleration(key="spot", value="true", effect="NoExecute", seconds=30), Toleration()
        ],
        pull_secrets=["regcred"], pull_policy="Always", retries=5, timeout=3600, limit=9, ttl=60, user=1234,
        config_maps={"here": ["MLFLOW_TRACKING_URI"]}, secrets={"keys": ["AWS_ACCESS_KEY_ID"], "more": ["A_B"]},
        labels={"team": "vision", "kueue.x-k8s.io/priority-class": "low"},
        annotations={"karpenter.sh/do-not-disrupt": "true"},
    ),
)  # fmt: skip


def documents(profile: Profile) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compiled pipeline, and what it says of its place."""
    found = profile.model_copy(update={"image": profile.image or IMAGE})
    spec, platform = yaml.safe_load_all(cluster.compiled(found, profile.parallelism, "s3://dvq/store"))
    return spec, platform["platforms"]["kubernetes"]


def expected(profile: Profile, name: str) -> dict[str, Any]:
    """A task's settings on Kubernetes, as its profile says them."""
    its = profile.cluster
    assert its
    labels = {**its.labels, "app.kubernetes.io/part-of": "dvq"}
    made: dict[str, Any] = {
        "imagePullPolicy": its.pull_policy,
        "podMetadata": {"labels": labels},
        "securityContext": {"runAsUser": str(its.user), "runAsGroup": str(its.user), "runAsNonRoot": True},
        "configMapAsEnv": [(name, names, False) for name, names in its.config_maps.items()],
        "secretAsEnv": [(name, names, False) for name, names in its.secrets.items()],
        "imagePullSecret": its.pull_secrets,
    }
    if name in TRAIN:
        if its.annotations:
            made["podMetadata"]["annotations"] = its.annotations
        made["nodeSelector"] = {"labels": its.node_selector} if its.node_selector else []
        made["tolerations"] = [
            {
                key: value
                for key, value in (
                    ("key", one.key), ("operator", one.operator), ("value", one.value), ("effect", one.effect),
                    ("tolerationSeconds", one.seconds and str(one.seconds)),
                )
                if value
            }
            for one in its.tolerations
        ]  # fmt: skip
        made["activeDeadlineSeconds"] = str(its.timeout) if its.timeout else []
        if profile.shared_memory:
            made["emptyDirMounts"] = [
                {
                    "volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory",
                    "sizeLimit": profile.shared_memory,
                }
            ]  # fmt: skip
    return {key: value for key, value in made.items() if value}


def simple(task: dict[str, Any]) -> dict[str, Any]:
    """kfp's form of a task's settings, without what it repeats."""
    made = dict(task)
    for kind, key in (("configMapAsEnv", "configMap"), ("secretAsEnv", "secret")):
        found = []
        for one in task.get(kind, ()):
            variables = [(pair[f"{key}Key"], pair["envVar"]) for pair in one["keyToEnv"]]
            assert all(here == there for here, there in variables)
            found.append((one[f"{key}Name"], [here for here, _ in variables], one["optional"]))
        made[kind] = found
    made["imagePullSecret"] = [one["secretName"] for one in task.get("imagePullSecret", ())]
    return {key: value for key, value in made.items() if value}


def test_the_plan_looks_at_the_store_alone() -> None:
    """A finished trial that MLflow lacks would hold GPUs only to be sent, which report does."""
    spec, _ = documents(EVERYTHING)
    assert spec["root"]["dag"]["tasks"]["plan"]["inputs"]["parameters"].keys() == {"sweep", "limit"}


@pytest.mark.parametrize("name", [*CLUSTERS, "everything"])
def test_each_task_has_what_the_profile_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVQ_RECORD", "0")
    monkeypatch.setenv("DVQ_FUSE", "0")
    profile = EVERYTHING if name == "everything" else find_profile(name)
    its = profile.cluster
    assert its
    spec, platform = documents(profile)
    executors = spec["deploymentSpec"]["executors"]
    assert {task.removeprefix("exec-") for task in executors} == TASKS
    for task in TASKS:
        assert simple(platform["deploymentSpec"]["executors"][f"exec-{task}"]) == expected(profile, task)
        container = executors[f"exec-{task}"]["container"]
        assert container["image"] == (profile.image or IMAGE)
        told = {one["name"]: one["value"] for one in container["env"]}
        device = {"DVQ_DEVICE": "cuda"} if task in TRAIN and profile.gpu else {}
        assert told == {
            **ONE_THREAD,
            **device,
            "PYTHONUNBUFFERED": "1",
            "DVQ_STORE": "s3://dvq/store",
            "DVQ_RECORD": "0",
            "DVQ_FUSE": "0",
        }
        limits, resources = (profile if task in TRAIN else its.light), container["resources"]
        cpu, memory = f"{limits.cpu:g}", limits.memory
        assert memory
        assert (resources["resourceCpuLimit"], resources["resourceCpuRequest"]) == (cpu, cpu)
        assert (resources["resourceMemoryLimit"], resources["resourceMemoryRequest"]) == (memory, memory)
        gpu = resources.get("accelerator", {})
        wanted = {"resourceType": its.accelerator, "resourceCount": str(profile.gpu)}
        assert {key: gpu.get(key) for key in wanted} == (
            wanted if task in TRAIN and profile.gpu else dict.fromkeys(wanted)
        )
    trials = [
        task for one in spec["components"].values() for task in one.get("dag", {}).get("tasks", {}).values()
    ]
    assert {one["retryPolicy"]["maxRetryCount"] for one in trials if "retryPolicy" in one} == {its.retries}
    assert "retryPolicy" not in spec["root"]["dag"]["tasks"]["report"]
    planned = spec["root"]["dag"]["tasks"]["plan"]["inputs"]["parameters"]["limit"]
    assert planned == {"runtimeValue": {"constant": its.limit}}
    (loop,) = [one["iteratorPolicy"] for one in trials if "iteratorPolicy" in one]
    assert loop == {"parallelismLimit": profile.parallelism}
    assert platform.get("pipelineConfig") == ({"resourceTtlOnCompletion": its.ttl} if its.ttl else None)


@pytest.mark.parametrize("name", CLUSTERS)
def test_kfp_s_own_schema_takes_it(name: str) -> None:
    spec, platform = documents(find_profile(name))
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    found = {"platforms": {"kubernetes": platform}}
    json_format.ParseDict(found, pipeline_spec_pb2.PlatformSpec())
    for task in platform["deploymentSpec"]["executors"].values():
        json_format.ParseDict(task, kubernetes.KubernetesExecutorConfig())


def test_its_size_does_not_grow_with_the_sweep() -> None:
    """A thousand trials: under KFP's limits, however many there are."""
    assert len(cluster.compiled(EVERYTHING, 64, "s3://dvq/store")) < 100 << 10
    grid = {"estimator": ["gs-soft", "vq-ema"], "num_codes": [128, 512], "num_latents": [4, 16]}
    sweep = Sweep(name="large", base={"steps": 100000}, grid=grid, seeds=list(range(125)))
    items = json.dumps([overrides(point) for point in sweep.points()])
    assert len(sweep.trials()) == 1000
    assert max(len(items), len(sweep.model_dump_json())) < cluster.PARAMETER == 64 << 10


def test_it_is_the_same_pipeline_as_on_this_machine() -> None:
    spec, _ = documents(EVERYTHING)
    here = json_format.MessageToDict(definition.sweep_pipeline(EVERYTHING.parallelism).pipeline_spec)
    assert spec["components"].keys() == here["components"].keys()
    assert spec["root"]["inputDefinitions"] == here["root"]["inputDefinitions"]
    there = {name: task.get("dependentTasks") for name, task in spec["root"]["dag"]["tasks"].items()}
    assert there == {name: task.get("dependentTasks") for name, task in here["root"]["dag"]["tasks"].items()}


@pytest.mark.parametrize(
    ("name", "selector", "taints"),
    [
        ("nvidia", {}, {"nvidia.com/gpu"}),
        (
            "gke", {"cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true"},
            {"nvidia.com/gpu", "cloud.google.com/gke-spot"},
        ),
        (
            "eks", {"karpenter.k8s.aws/instance-gpu-name": "a10g", "karpenter.sh/capacity-type": "spot"},
            {"nvidia.com/gpu"},
        ),
        ("kind", {}, set()),
    ],
)  # fmt: skip
def test_the_nodes_that_a_profile_is_for(name: str, selector: dict[str, str], taints: set[str]) -> None:
    """The labels and taints that the providers give their GPU nodes: without one of them pods wait for ever."""
    found = find_profile(name)
    assert found.cluster
    assert found.cluster.node_selector == selector
    assert {(one.key, one.effect) for one in found.cluster.tolerations} == {
        (key, "NoSchedule") for key in taints
    }


def test_the_profiles_that_are_shipped() -> None:
    assert SHIPPED == ["docker", "eks", "gke", "kind", "nvidia"]
    assert set(DEFAULTS.values()) <= set(SHIPPED)
    assert [name for name in CLUSTERS if not find_profile(name).gpu] == ["kind"]
    eks = find_profile("eks").cluster
    assert eks
    assert not eks.secrets  # the role's credentials would lose against keys in the environment
    assert "AWS_ENDPOINT_URL" not in eks.config_maps["dvq"]
    # GKE's nodes mount the driver there, and no runtime tells the loader.
    assert "LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in (ROOT / "docker/Dockerfile").read_text()
    for name in CLUSTERS:
        found = find_profile(name)
        shared, memory = (parse_bytes(f"{one}".rstrip("i")) for one in (found.shared_memory, found.memory))
        assert shared < memory  # which it counts towards


@pytest.mark.parametrize(
    ("given", "operator"),
    [
        ({}, "Exists"), ({"key": "a"}, "Exists"), ({"key": "a", "value": "b"}, "Equal"),
        ({"key": "a", "operator": "Equal"}, "Equal"),
    ],
)  # fmt: skip
def test_a_toleration_as_kubernetes_takes_it(given: dict[str, str], operator: str) -> None:
    """A value beside Exists is refused, when the pod is made."""
    assert Toleration.model_validate(given).operator == operator


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gpus: 1", "gpus: Extra inputs are not permitted; keys there: cpu, memory"),
        ("cluster: {node: x}", "cluster.node: Extra inputs are not permitted; keys there: host, namespace"),
        (
            "cluster: {light: {gpu: 1}}",
            "cluster.light.gpu: Extra inputs are not permitted; keys there: cpu, memory",
        ),
        (
            "cluster: {tolerations: [{name: x}]}",
            "cluster.tolerations.0.name: Extra inputs are not permitted; keys there: key, value, operator",
        ),
        ("memory: 4GB", "memory: String should match pattern"),
        ("cluster: {accelerator: gpu}", "cluster.accelerator: String should match"),
        ("cluster: {secrets: {Bad_Name: [A]}}", "cluster.secrets.Bad_Name"),
        ("cluster: {secrets: {dvq: [not-a-variable]}}", "cluster.secrets.dvq.0: String should match"),
        ("cluster: {user: 0}", "cluster.user: Input should be greater than or equal to 1"),
        (
            "cluster: {tolerations: [{operator: Is}]}",
            "cluster.tolerations.0.operator: Input should be 'Exists'",
        ),
        ("budget: 0", "budget: Input should be greater than 0"),
        ("a: [", "is no YAML"),
        ("gpu: 1\ngpu: 2", "is no YAML: 'gpu' stands there twice"),
        ("gpu: 2024-13-45", "is no YAML: month must be in 1..12"),
        ("gpu: " + "1" * 5000, "is no YAML: Exceeds the limit"),
        ("{a: " * 3000, "is no YAML: maximum recursion depth exceeded"),
        ("cluster: &a {labels: *a}", "cluster.labels"),
    ],
)
def test_a_wrong_profile_is_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DvqError) as caught:
        find_profile(str(path))
    assert told in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
