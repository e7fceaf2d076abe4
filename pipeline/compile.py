"""Compile the components: ``python -m pipeline.compile`` writes each component.yaml and its README's tables.

``--check`` compares them with what is there, and the interfaces with the released ones; ``--release`` records these.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler

from pipeline import interfaces
from pipeline.definition import COMPONENTS
from pipeline.interfaces import FOLDER

TABLES = re.compile(r"(<!-- interface.*?-->)\n.*?(<!-- end -->)", re.DOTALL)


def compiled(component: Any) -> str:
    """A component, or a pipeline, as YAML."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "made.yaml"
        compiler.Compiler().compile(component, str(path))
        return path.read_text(encoding="utf-8")


def readme(name: str, component: Any) -> str:
    """The component's README, with its tables brought up to date."""
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    spec = component.component_spec
    lines = [f"Version {interfaces.version(name)}.", "", "| input | type | |", "| --- | --- | --- |"]
    for key, parameter in (spec.inputs or {}).items():
        default = f"; default `{parameter.default!r}`" if parameter.optional else ""
        lines.append(f"| `{key}` | {_kind(parameter.type)}{default} | {_line(parameter.description or '')} |")
    lines += ["", "| output | type | |", "| --- | --- | --- |"]
    for key, output in (spec.outputs or {}).items():
        lines.append(f"| `{key}` | {_kind(output.type)} | {_line(output.description or '')} |")
    table = "\n".join(lines)
    return TABLES.sub(lambda match: f"{match[1]}\n{table}\n{match[2]}", text)


def _kind(schema: Any) -> str:
    return str(schema).partition("@")[0].removeprefix("system.")


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".").replace("|", "\\|")


def generated_files() -> dict[Path, str]:
    """The committed files that are generated from the components, with their content."""
    files = {}
    for name, component in COMPONENTS.items():
        files[FOLDER / name / "component.yaml"] = compiled(component)
        files[FOLDER / name / "README.md"] = readme(name, component)
    return files


def stale_files() -> dict[Path, str]:
    """The generated files whose committed content differs."""
    return {
        path: text
        for path, text in generated_files().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def faults() -> list[str]:
    """The components that need another version, each as a sentence."""
    released = interfaces.released()
    new = {name: interfaces.interface(name, component) for name, component in COMPONENTS.items()}
    removed = [f"the component '{name}' is gone, which a release had" for name in released if name not in new]
    messages = [
        interfaces.fault(name, released[name], interface)
        for name, interface in new.items()
        if name in released
    ]
    return removed + [message for message in messages if message]


def main(arguments: list[str]) -> int:
    outdated, errors = stale_files(), faults()
    for error in errors:
        print(error)
    if "--check" in arguments:
        for path in outdated:
            print(f"{path.relative_to(FOLDER.parent)} is not what its component makes: run make components")
        return 1 if outdated or errors else 0
    for path, text in outdated.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(FOLDER.parent)}")
    if "--release" in arguments and not errors:
        interfaces.write(
            {name: interfaces.interface(name, component) for name, component in COMPONENTS.items()}
        )
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
