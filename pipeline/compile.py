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


def compiled(made: Any) -> str:
    """A component, or a pipeline, as YAML."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "made.yaml"
        compiler.Compiler().compile(made, str(path))
        return path.read_text(encoding="utf-8")


def readme(name: str, component: Any) -> str:
    """The component's README, with its tables brought up to date."""
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    spec = component.component_spec
    lines = [f"Version {interfaces.version(name)}.", "", "| input | type | |", "| --- | --- | --- |"]
    for key, one in (spec.inputs or {}).items():
        default = f"; default `{one.default!r}`" if one.optional else ""
        lines.append(f"| `{key}` | {_kind(one.type)}{default} | {_line(one.description or '')} |")
    lines += ["", "| output | type | |", "| --- | --- | --- |"]
    for key, one in (spec.outputs or {}).items():
        lines.append(f"| `{key}` | {_kind(one.type)} | {_line(one.description or '')} |")
    table = "\n".join(lines)
    return TABLES.sub(lambda found: f"{found[1]}\n{table}\n{found[2]}", text)


def _kind(schema: Any) -> str:
    return str(schema).partition("@")[0].removeprefix("system.")


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".").replace("|", "\\|")


def wanted() -> dict[Path, str]:
    """The committed files that are generated from the components, and what they should hold."""
    found = {}
    for name, component in COMPONENTS.items():
        found[FOLDER / name / "component.yaml"] = compiled(component)
        found[FOLDER / name / "README.md"] = readme(name, component)
    return found


def stale() -> dict[Path, str]:
    """Those of them that hold something else."""
    return {
        path: text
        for path, text in wanted().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }


def faults() -> list[str]:
    """The components that need another version, each as a sentence."""
    known = interfaces.released()
    new = {name: interfaces.interface(name, component) for name, component in COMPONENTS.items()}
    gone = [f"the component '{name}' is gone, which a release had" for name in known if name not in new]
    told = [interfaces.fault(name, known[name], one) for name, one in new.items() if name in known]
    return gone + [one for one in told if one]


def main(arguments: list[str]) -> int:
    old, wrong = stale(), faults()
    for told in wrong:
        print(told)
    if "--check" in arguments:
        for path in old:
            print(f"{path.relative_to(FOLDER.parent)} is not what its component makes: run make components")
        return 1 if old or wrong else 0
    for path, text in old.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(FOLDER.parent)}")
    if "--release" in arguments and not wrong:
        interfaces.write({name: interfaces.interface(name, one) for name, one in COMPONENTS.items()})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
