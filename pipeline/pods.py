"""A profile's settings for the pods of each task on a cluster."""

from collections.abc import Mapping
from typing import Any

from kfp import kubernetes

from pipeline.local import ONE_THREAD
from pipeline.profile import TRAINS, Cluster, Profile

LABEL = ("app.kubernetes.io/part-of", "dvq")
"""of every pod: k8s/ admits pods with it to MLflow and S3"""


def settle(task: Any, name: str, profile: Profile, environment: Mapping[str, str]) -> Any:
    """Apply ``profile`` and the variables of ``environment`` to the task of the component ``name``."""
    cluster = profile.cluster
    assert cluster
    _limits(task, profile, cluster, name in TRAINS)
    if name != "report":  # it fails if a trial is not finished, and would again
        task.set_retry(num_retries=cluster.retries, backoff_duration="30s", backoff_factor=2.0)
    # Unbuffered, so that a pod's output is in its log before the pod dies.
    for variable, value in {**ONE_THREAD, "PYTHONUNBUFFERED": "1", **environment}.items():
        task.set_env_variable(variable, value)
    for source, variables in cluster.config_maps.items():
        kubernetes.use_config_map_as_env(task, source, dict(zip(variables, variables, strict=True)))
    for source, variables in cluster.secrets.items():
        kubernetes.use_secret_as_env(task, source, dict(zip(variables, variables, strict=True)))
    for key, value in [*cluster.labels.items(), LABEL]:
        kubernetes.add_pod_label(task, key, value)
    for key, value in cluster.annotations.items() if name in TRAINS else ():
        kubernetes.add_pod_annotation(task, key, value)
    kubernetes.set_image_pull_policy(task, cluster.pull_policy)
    if cluster.pull_secrets:
        kubernetes.set_image_pull_secrets(task, cluster.pull_secrets)
    kubernetes.set_security_context(
        task, run_as_user=cluster.user, run_as_group=cluster.user, run_as_non_root=True
    )
    return task


def _limits(task: Any, profile: Profile, cluster: Cluster, trains: bool) -> None:
    size = profile if trains else cluster.light
    if size.cpu:
        task.set_cpu_request(f"{size.cpu:g}").set_cpu_limit(f"{size.cpu:g}")
    if size.memory:
        task.set_memory_request(size.memory).set_memory_limit(size.memory)
    if not trains:
        return
    if profile.gpu:
        task.set_accelerator_type(cluster.accelerator).set_accelerator_limit(profile.gpu)
        task.set_env_variable("DVQ_DEVICE", "cuda")
    if profile.shared_memory:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=profile.shared_memory)
    for key, value in cluster.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in cluster.tolerations:
        kubernetes.add_toleration(
            task,
            toleration.key or None,
            toleration.operator,
            toleration.value or None,
            toleration.effect or None,
            toleration.seconds,
        )
    if cluster.timeout:
        kubernetes.set_timeout(task, cluster.timeout)
