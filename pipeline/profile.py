"""A profile: the limits and the image of a sweep's tasks in the place where they run."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvq import DvqError
from dvq.sweep import Loader

PROFILES = Path(__file__).parent / "profiles"
DEFAULTS = {"docker": "docker", "kfp": "nvidia"}
"""The default profile of each place that has profiles."""
TRAINS = ("train", "evaluate")
"""The components that use a GPU and take the profile's own limits; the others are light."""
JOBS = 1000
"""trials at a time, at most"""
Size = Annotated[str, Field(pattern=r"^[1-9]\d*(Ki|Mi|Gi)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
"""of a Kubernetes object"""
Variables = dict[Name, list[Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]]]
"""environment variables by the ConfigMap or Secret that holds them under these keys"""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Toleration(_Strict):
    """A taint that a pod tolerates."""

    key: str = ""
    """empty: every taint"""
    value: str = ""
    operator: Literal["Exists", "Equal"] = Field(
        default_factory=lambda given: "Equal" if given.get("value") else "Exists"
    )
    """Equal where there is a value, which Kubernetes refuses beside Exists"""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""] = ""
    """empty: every effect"""
    seconds: Annotated[int, Field(ge=0)] | None = None
    """for which NoExecute is tolerated"""


class Light(_Strict):
    """The limits of plan, prepare_data, analyze and report, which need no GPU."""

    cpu: float = Field(1, gt=0)
    memory: Size = "4Gi"


class Cluster(_Strict):
    """The address of Kubeflow Pipelines, and the settings of its pods beside the profile's limits."""

    host: str = ""
    """KFP's address, https://kubeflow.example.org/pipeline; KFP_HOST in the environment wins"""
    namespace: str = ""
    """of the runs, in multi-user Kubeflow; empty for the plain installation; KFP_NAMESPACE wins"""
    ca: str = ""
    """a file with the certificates of the authority that vouches for ``host``; KFP_CA wins"""
    service_account: str = ""
    """of the runs' pods; empty for KFP's own"""
    registry: str = ""
    """where `make image PUSH=1` puts the image, host/path; REGISTRY wins"""
    torch: str = ""
    """the image's build of torch; empty for the one of this environment; TORCH wins"""
    platform: str = Field("", pattern=r"^(linux/[a-z0-9/]+)?$")
    """the nodes', that the image is built for: linux/amd64; empty for that of the machine that builds it"""
    pull_secrets: list[Name] = []
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    accelerator: str = Field("nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """the resource's name; where GPUs are shared by time-slicing or MPS often nvidia.com/gpu.shared"""
    sharing: int = Field(1, ge=1)
    """pods to which the cluster gives one and the same GPU"""
    node_selector: dict[str, str] = {}
    """of the pods that use a GPU, or, without GPUs, that train and evaluate"""
    tolerations: list[Toleration] = []
    """of the same pods"""
    light: Light = Light()
    limit: int = Field(128, ge=1)
    """trials of one run, at most; the next run goes on. Argo keeps a run's state in an object of 1 MiB and ends a run
    that outgrows it; a trial takes about 4 KiB of it, estimated from the compiled pipeline, not measured"""
    retries: int = Field(2, ge=0)
    """of a task whose pod fails; KFP 2.17 ignores them in the loop over trials, where the store goes on"""
    timeout: int | None = Field(None, ge=60)
    """seconds for a task that trains or evaluates"""
    ttl: int | None = Field(None, ge=0)
    """seconds after which the pods of a run that ended are removed"""
    config_maps: Variables = {"dvq": ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"]}
    secrets: Variables = {"dvq": ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]}
    labels: dict[str, str] = {}
    """of every pod; Kueue's priority is one, kueue.x-k8s.io/priority-class"""
    annotations: dict[str, str] = {}
    """of the pods that train and evaluate, such as one that keeps an autoscaler from moving them"""
    user: int = Field(10001, ge=1)
    """the numeric user and group of the containers"""


class Profile(_Strict):
    """Limits of one task; sizes as Kubernetes writes them (512Mi, 4Gi)."""

    cpu: float | None = Field(None, gt=0)
    memory: Size | None = None
    shared_memory: Size | None = None
    """of /dev/shm"""
    gpu: int = Field(0, ge=0)
    """of a pod; a container sees all GPUs of the machine, over which trials spread, unless this is 0"""
    parallelism: int = Field(2, ge=1, le=JOBS)
    """trials at a time, unless JOBS says it"""
    image: str = ""
    """another image than the one that `make image` builds of this checkout"""
    images_per_second: dict[str, Annotated[float, Field(gt=0)]] = {}
    """measured here, by estimator: for the forecast of trials of which no similar one is finished"""
    budget: float | None = Field(None, gt=0)
    """hours of GPUs (or of CPUs, where there are none) that a forecast must not exceed; BUDGET wins"""
    cluster: Cluster | None = None
    """for ON=kfp"""


PARTS: dict[int | str, type[BaseModel]] = {"cluster": Cluster, "light": Light, "tolerations": Toleration}
"""of a profile, by the key that they have in it"""


def find_profile(name: str) -> Profile:
    """The profile of that name in pipeline/profiles, or in the YAML file at that path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else PROFILES / f"{name}.yaml"
    try:
        return Profile.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader) or {})
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise DvqError(f"PROFILE = '{name}': {error.strerror}; known: {known}; or give a file") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        within = next((PARTS[key] for key in reversed(first["loc"][:-1]) if key in PARTS), Profile)
        keys = f"; keys there: {', '.join(within.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise DvqError(f"{path}: {where}: {first['msg']}{keys}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # as of a date in month 13
        raise DvqError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
