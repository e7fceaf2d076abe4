"""dvq as a library: what the README shows of it, as in a notebook whose cells are run again."""

import re
import threading
from pathlib import Path
from typing import Any

import pytest

from dvq import DvqError

CELL = re.compile(r"```python\n(from pathlib import Path\n\nimport dvq\n.*?)```", re.DOTALL)


def test_the_readmes_cell_runs_and_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = CELL.findall((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {}
    exec(cell, first)
    assert 7 < first["found"]["fitted_bits_per_dim"] < 9
    again: dict[str, Any] = {}
    exec(cell, again)
    assert again["found"] == first["found"]

    longer = cell.replace(
        '"steps": 20', '"steps": 22'
    )  # in the same folder, from a thread that gets no signals
    assert longer != cell
    found: dict[str, Any] = {}
    thread = threading.Thread(target=exec, args=(longer, found))
    thread.start()
    thread.join()
    assert found["model"].trial.steps == 22
    assert found["found"] != first["found"]
    assert sorted(path.name for path in (tmp_path / "my-trial").glob("model*")) == ["model"]

    with pytest.raises(DvqError, match="the trial is of cifar10, and these images are cifar10-sample"):
        exec(cell.replace('"data": "cifar10-sample", ', "").replace("my-trial", "other"), {})
    assert not (tmp_path / "other").exists()
