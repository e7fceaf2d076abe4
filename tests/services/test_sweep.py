"""A sweep with its store in S3, from the command line: the local one's certificate, bit for bit."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.services.conftest import SeaweedFS
from tests.services.proxy import Proxy

ROOT = Path(__file__).parents[2]
SWEEP = {
    "base": {
        "data": "cifar10-sample",
        "features": 4,
        "num_latents": 2,
        "num_codes": 4,
        "code_dim": 4,
        "batch_size": 16,
        "steps": 4,
        "bound_samples": 1,
    },
    "grid": {"estimator": ["gs-soft", "vq-ema"]},
}


def command(folder: Path, name: str, *arguments: str) -> tuple[int, str]:
    """A command of the project, run in ``folder``; its exit status and output."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SWEEP))
    done = subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", "tiny.yaml", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("proxy")
def test_a_sweep_with_s3_has_the_local_ones_certificate(
    seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    told = {}
    for place in ("", f"s3://dvq/{tmp_path.name}"):
        monkeypatch.setenv("DVQ_STORE", place)
        code, output = command(tmp_path / ("s3" if place else "local"), "submit")
        assert code == 0, output
        told[place] = re.findall(r"certificate (\w{16})", output)
        assert len(told[place]) == 1
    assert len({certificate[0] for certificate in told.values()}) == 1

    code, output = command(tmp_path / "elsewhere", "explain")
    assert code == 0, output
    assert output.count("finished: it is not computed again") == 2
    assert f"0 of 2 trials to compute; the store is s3://dvq/{tmp_path.name}" in output
    code, output = command(tmp_path / "elsewhere", "report")
    assert code == 0, output
    assert re.findall(r"certificate (\w{16})", output) == told[f"s3://dvq/{tmp_path.name}"]
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) > 50
    assert not [path for path in left if seaweed.secret_key.encode() in path.read_bytes()]
    assert not [path for path in left if seaweed.access_key.encode() in path.read_bytes()]


def test_what_is_wrong_is_one_sentence(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for url, key, says in (
        ("s3://not-there/x", "", "has no bucket 'not-there'"),
        ("s3://dvq/x", "wrong", "refuses the credentials for bucket 'dvq'"),
    ):
        monkeypatch.setenv("DVQ_STORE", url)
        if key:
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
        code, output = command(tmp_path, "submit")
        assert code == 2
        assert output.count("\n") == 1
        assert output.startswith(f"error: S3 at {proxy.address.removeprefix('http://')} ")
        assert says in output
