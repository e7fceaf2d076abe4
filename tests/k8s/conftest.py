"""The manifests as kustomize builds them, by the pinned kubectl, with secrets made for the tests."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OURS = ("overlays/single-node", "overlays/production")
BUILT = (*OURS, "runs")
PASSWORDS = ("overlays/single-node-passwords", "overlays/production-passwords")
"""OURS with auth/, as the README has it"""
SECRETS = ("*.env", "*.pem", "s3.json", "basic_auth.ini")
Manifests = list[dict[str, Any]]


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """A pod's, with those that run before the others."""
    return [*spec.get("initContainers", ()), *spec["containers"]]


class Built:
    """Every kustomization's manifests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "k8s", folder, ignore=shutil.ignore_patterns(*SECRETS))
        subprocess.run([folder / "configure"], check=True, capture_output=True)
        for ours, name in zip(OURS, PASSWORDS, strict=True):
            shutil.copytree(folder / ours, folder / name)
            file = folder / name / "kustomization.yaml"
            content = yaml.safe_load(file.read_text())
            file.write_text(
                yaml.safe_dump({**content, "components": [*content.get("components", ()), "../../auth"]})
            )
        self.manifests = {name: self.build(name) for name in (*BUILT, *PASSWORDS)}

    def build(self, name: str) -> Manifests:
        kubectl = Path(sys.executable).with_name("kubectl")
        done = subprocess.run(
            [kubectl, "kustomize", self.folder / name], capture_output=True, text=True, check=True
        )
        return [one for one in yaml.safe_load_all(done.stdout) if one]

    def all(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, manifests in self.manifests.items():
            for one in manifests:
                yield name, one

    def one(self, overlay: str, kind: str, name: str) -> dict[str, Any]:
        """The only object of that kind and name, or name before its hash."""
        (found,) = [
            one
            for one in self.manifests[overlay]
            if one["kind"] == kind and one["metadata"]["name"].startswith(name)
        ]
        return found

    def pods(self, overlay: str) -> dict[str, dict[str, Any]]:
        """The pods' templates by the name of what makes them."""
        found = {}
        for one in self.manifests[overlay]:
            spec = one.get("spec", {})
            spec = spec["jobTemplate"]["spec"] if one["kind"] == "CronJob" else spec
            if "template" in spec:
                found[one["metadata"]["name"]] = spec["template"]
        return found


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("k8s") / "k8s")
