"""Who may import whom, and what must not be imported where seconds count."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ANYWHERE = {
    "dvq": {"dvq", "numpy", "pydantic", "safetensors", "torch", "yaml"},
    "components": {"components", "dvq", "kfp", "numpy"},
    "pipeline": {"components", "pipeline", "kfp", "docker", "pydantic", "rich", "typer", "yaml"},
}
"""what every module of a layer may import beside the standard library"""
DVQ_IN_PIPELINE = {
    "dvq",
    "dvq.choices",
    "dvq.config",
    "dvq.data",
    "dvq.device",
    "dvq.disk",
    "dvq.events",
    "dvq.findings",
    "dvq.fingerprints",
    "dvq.kept",
    "dvq.own",
    "dvq.provenance",
    "dvq.sweep",
    "dvq.tables",
    "dvq.trial",
}
ADAPTERS = {
    "dvq/figures.py": {"matplotlib"},
    "dvq/patches.py": {"matplotlib"},
    "dvq/pictures.py": {"matplotlib"},
    "dvq/style.py": {"matplotlib"},
    "components/logged.py": {"mlflow"},
    "components/mlflow_server.py": {"mlflow"},
    "components/runs.py": {"mlflow", "PIL"},
    "components/s3.py": {"boto3", "botocore", "tenacity"},
    "components/tracking.py": {"mlflow"},
    "components/pyfunc.py": {"mlflow", "torch"},
    "pipeline/connection.py": {"kfp_server_api", "urllib3"},
    "pipeline/kubeflow.py": {"kfp_server_api"},
    "pipeline/stack.py": {"psutil"},
    "pipeline/tracker.py": {"certifi"},
}
"""what one module may import besides"""


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules named in import statements, wherever they stand."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = [name for name in names if (ROOT / f"{name.replace('.', '/')}.py").exists()]
            yield from parts or [node.module]  # from dvq import train is dvq.train


@pytest.mark.parametrize("layer", ANYWHERE)
def test_a_layer_imports_only_what_it_may(layer: str) -> None:
    paths = sorted((ROOT / layer).rglob("*.py"))
    assert paths
    for path in paths:
        name = str(path.relative_to(ROOT))
        allowed = ANYWHERE[layer] | ADAPTERS.get(name, set()) | sys.stdlib_module_names
        for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if layer == "pipeline" and module.partition(".")[0] == "dvq":
                assert module in DVQ_IN_PIPELINE, f"{name} imports {module}"
            else:
                assert module.partition(".")[0] in allowed, f"{name} imports {module}"


def test_a_component_imports_only_kfp_at_its_top() -> None:
    """Its body is all that a task gets to see, and kfp's executor has to load the file without torch."""
    paths = sorted((ROOT / "components").glob("*/component.py"))
    assert len(paths) == 6
    for path in paths:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = (
                set(imports(ast.Module([node], [])))
                if isinstance(node, ast.Import | ast.ImportFrom)
                else set()
            )
            assert named <= {"kfp", "kfp.dsl", "components"}, f"{path.parent.name}: {named}"


@pytest.mark.parametrize(
    "module",
    ["pipeline.submit", "pipeline.explain", "components.remote", "components.trials", "components.judging"],
)
def test_no_seconds_are_spent_on_imports(module: str) -> None:
    slow = {"boto3", "kfp", "matplotlib", "mlflow", "torch"}
    code = f"import sys, {module}; print(*sorted({slow} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
