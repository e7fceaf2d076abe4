"""A profile: what a sweep's tasks may take, and the image they run, in the place where they run."""

import re
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvq import DvqError

PROFILES = Path(__file__).parent / "profiles"
UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
SIZE = r"^[1-9]\d*(Ki|Mi|Gi)?$"


class Profile(BaseModel):
    """Limits of one task; sizes as Kubernetes writes them (512Mi, 4Gi)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: float | None = Field(None, gt=0)
    memory: str | None = Field(None, pattern=SIZE)
    shared_memory: str | None = Field(None, pattern=SIZE)
    """of /dev/shm"""
    gpu: int = Field(0, ge=0)
    parallelism: int = Field(2, ge=1)
    """trials at a time, unless JOBS says it"""
    image: str = ""
    """another image than the one that `make image` builds of this checkout"""


def size(text: str) -> int:
    """``512Mi`` in bytes."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def find_profile(name: str) -> Profile:
    """The profile of that name in pipeline/profiles, or in the YAML file at that path."""
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else PROFILES / f"{name}.yaml"
    try:
        return Profile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        known = ", ".join(sorted(one.stem for one in PROFILES.glob("*.yaml")))
        raise DvqError(f"PROFILE = '{name}': {error.strerror}; known: {known}; or give a file") from None
    except yaml.YAMLError as error:
        raise DvqError(f"{path} is no YAML: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        known = ", ".join(Profile.model_fields)
        raise DvqError(f"{path}: {where}: {first['msg']}; a profile's keys: {known}") from None
