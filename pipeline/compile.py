"""Compile the components: ``python -m pipeline.compile`` writes each component.yaml, ``--check`` compares."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler

from components.analyze.component import analyze
from components.evaluate.component import evaluate
from components.plan.component import plan
from components.prepare_data.component import prepare_data
from components.report.component import report
from components.train.component import train

COMPONENTS: dict[str, Any] = {
    "plan": plan,
    "prepare_data": prepare_data,
    "train": train,
    "evaluate": evaluate,
    "analyze": analyze,
    "report": report,
}
FOLDER = Path(__file__).parent.parent / "components"


def compiled(component: Any) -> str:
    """The component as YAML."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "component.yaml"
        compiler.Compiler().compile(component, str(path))
        return path.read_text(encoding="utf-8")


def stale() -> list[Path]:
    """The committed files that differ from what the components compile to."""
    paths = {FOLDER / name / "component.yaml": component for name, component in COMPONENTS.items()}
    return [
        path
        for path, component in paths.items()
        if not path.exists() or path.read_text(encoding="utf-8") != compiled(component)
    ]


def main(arguments: list[str]) -> int:
    old = stale()
    if "--check" in arguments:
        for path in old:
            print(
                f"{path.relative_to(FOLDER.parent)} is not what its component compiles to: run make components"
            )
        return 1 if old else 0
    for path in old:
        path.write_text(compiled(COMPONENTS[path.parent.name]), encoding="utf-8")
        print(f"wrote {path.relative_to(FOLDER.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
