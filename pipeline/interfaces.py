"""The components' inputs, outputs and versions, and whether a change of the former needs a new version.

``components/<name>/metadata.yaml`` has the version; ``components/interfaces.yaml``, which `make release-components`
writes, the inputs and outputs of the last release. A new major version is needed where other people's pipelines
would break: an input or output is removed or changes its type, an optional input becomes required, or a new one is
required. Mere additions need a new minor version.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent.parent / "components"
RECORD = FOLDER / "interfaces.yaml"
HEAD = "# What each component took and gave at its last release. Written by `make release-components`, not by hand.\n"


class Interface(BaseModel):
    """A version's inputs and outputs, with their types; an optional input's ends with a question mark."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


def version(name: str) -> str:
    """The component's version, of its metadata.yaml."""
    return str(yaml.safe_load((FOLDER / name / "metadata.yaml").read_text(encoding="utf-8"))["version"])


def interface(name: str, component: Any) -> Interface:
    """The component as it is."""
    spec = component.component_spec
    inputs = {
        key: f"{parameter.type}{'?' if parameter.optional else ''}"
        for key, parameter in (spec.inputs or {}).items()
    }
    outputs = {key: str(output.type) for key, output in (spec.outputs or {}).items()}
    return Interface(version=version(name), inputs=inputs, outputs=outputs)


def released() -> dict[str, Interface]:
    """The components as they were released."""
    content = yaml.safe_load(RECORD.read_text(encoding="utf-8"))
    return {name: Interface.model_validate(fields) for name, fields in content.items()}


def write(interfaces: Mapping[str, Interface]) -> None:
    """Record a release."""
    content = {name: interface.model_dump() for name, interface in interfaces.items()}
    RECORD.write_text(HEAD + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def broken(old: Interface, new: Interface) -> Iterator[str]:
    """What breaks a pipeline that was made for ``old``."""
    for key, kind in old.inputs.items():
        if key not in new.inputs:
            yield f"the input '{key}' is gone"
        elif new.inputs[key].rstrip("?") != kind.rstrip("?"):
            yield f"the input '{key}' was {kind.rstrip('?')} and is {new.inputs[key].rstrip('?')}"
        elif kind.endswith("?") and not new.inputs[key].endswith("?"):
            yield f"the input '{key}' was optional"
    for key, kind in new.inputs.items():
        if key not in old.inputs and not kind.endswith("?"):
            yield f"the input '{key}' is new and required"
    for key, kind in old.outputs.items():
        if key not in new.outputs:
            yield f"the output '{key}' is gone"
        elif new.outputs[key] != kind:
            yield f"the output '{key}' was {kind} and is {new.outputs[key]}"


def added(old: Interface, new: Interface) -> Iterator[str]:
    """What ``new`` has beyond ``old``, which breaks nothing."""
    yield from (f"the input '{key}' is new" for key in new.inputs if key not in old.inputs)
    yield from (f"the output '{key}' is new" for key in new.outputs if key not in old.outputs)
    for key, kind in old.inputs.items():
        if not kind.endswith("?") and new.inputs.get(key, "").endswith("?"):
            yield f"the input '{key}' is optional now"


def fault(name: str, old: Interface, new: Interface) -> str:
    """Empty, or why ``new`` needs another version, as a sentence."""
    was, now = (tuple(map(int, interface.version.split("."))) for interface in (old, new))
    breaks, adds = list(broken(old, new)), list(added(old, new))
    where = f"components/{name}/metadata.yaml"
    if now < was:
        return f"{where}: version {new.version} is older than the released {old.version}"
    if breaks and now[0] == was[0]:
        return f"{where}: {'; '.join(breaks)}: that wants version {was[0] + 1}.0.0 (released: {old.version})"
    if adds and now[:2] == was[:2]:
        return f"{where}: {'; '.join(adds)}: that wants version {was[0]}.{was[1] + 1}.0 (released: {old.version})"
    return ""
