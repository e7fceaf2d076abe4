"""Keep a sweep's results in the repository: python -m pipeline.results SWEEP (make results)

``pipeline/results`` holds a JSON file for each finished trial on all of CIFAR-10. The tables and figures there, and
the README's, are made from these files alone. Each file is also a sweep of its one trial:
``make submit-sweep SWEEP=pipeline/results/<file>`` computes it again.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import reports
from dvq import DvqError, disk, kept
from dvq.fingerprints import label
from pipeline import preflight
from pipeline.command import SweepName, application

ROOT = Path(__file__).parents[1]
FOLDER = Path("pipeline/results")
SECTION = re.compile(r"(<!-- results.*?-->)\n.*?(<!-- end of results -->)", re.DOTALL)


def keep(name: SweepName) -> None:
    """Keep the sweep's finished trials, and make tables and figures anew from all kept ones."""
    sweep = preflight.find_sweep(name)
    store = preflight.find_store()
    data = next(iter(sweep.trials().values())).data
    if data != "cifar10":
        raise DvqError(f"sweep '{sweep.name}' is on {label(data)}; only results on all of CIFAR-10 are kept")
    results, analyses, missing = reports.gather(sweep, store)
    if not results:
        raise DvqError(
            f"the store {store.place} has none of sweep '{sweep.name}' finished; there is nothing to keep"
        )
    missing |= {result["name"]: reason for result in results if (reason := uncommitted(result))}
    for result in (result for result in results if result["name"] not in missing):
        print(f"kept {kept.write(result, analyses.get(result['name']), sweep.name, ROOT / FOLDER).name}")
    for name, reason in missing.items():
        print(f"not kept: {name}: {reason}")
    write_pages(ROOT)


def uncommitted(result: Mapping[str, Any]) -> str:
    """Why nobody could compute a result again, because its code is in no commit; empty if it is in one."""
    for action, provenance in (
        ("trained", result["provenance"]),
        ("evaluated", result["evaluation"]["provenance"]),
    ):
        commit = str(provenance.get("commit", ""))
        if commit == "unknown":
            return f"it was {action} by code that is in no clone, of no known commit; compute it from one"
        if "-dirty" in commit:
            return f"it was {action} by uncommitted code, {commit}; commit that, and compute it anew, FRESH=1"
    return ""


def write_pages(root: Path) -> None:
    """Write the tables and figures, and the README's section, from the results that are kept."""
    folder = root / FOLDER
    results = kept.load(folder)
    kept.draw(folder / "figures", results)
    disk.replace(folder / "README.md", kept.page(results, FOLDER))
    readme = root / "README.md"
    section = kept.section(results, FOLDER)
    text = readme.read_text(encoding="utf-8")
    disk.replace(readme, SECTION.sub(lambda match: f"{match[1]}\n{section}\n{match[2]}", text))


app = application(keep)

if __name__ == "__main__":
    app()
