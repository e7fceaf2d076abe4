"""Say what the sweep ``findings`` shows of the paper's findings: python -m pipeline.findings"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from components.store import Store
from dvq import DvqError
from dvq.findings import OPEN, Claim, Miniature, bits_per_dim, claims, draw, label, over
from dvq.sweep import Sweep
from pipeline import preflight
from pipeline.command import application


def findings() -> None:
    """Print what the finished sweep shows of the paper's findings, as Markdown, and draw it."""
    sweep = preflight.find_sweep("findings")
    store = preflight.find_store()
    mini = Miniature(sweep.base, finished(sweep, store))
    all_claims = claims(mini)
    print(markdown(mini, all_claims))
    path = store.report(sweep.name) / "findings.png"
    draw(mini, path)
    print(f"\nfigure: {path}")


def finished(sweep: Sweep, store: Store) -> list[dict[str, Any]]:
    """The results of all the sweep's trials; DvqError if one is not finished."""
    results, missing = store.outcomes(sweep.trials())
    if missing:
        raise DvqError(
            f"{len(missing)} of the {len(results) + len(missing)} trials of sweep '{sweep.name}' are not finished, "
            f"the first is {next(iter(missing))}; run the sweep: make findings"
        )
    return results


def markdown(mini: Miniature, all_claims: Sequence[Claim]) -> str:
    """The claims and the numbers of every setting, as two tables."""
    seeds = sorted({len(results) for results in mini.settings.values()})
    lines = [
        f"Mean ± standard error over {' or '.join(map(str, seeds))} seeds; a difference under two standard "
        f"errors says nothing: {OPEN}. With three seeds chance alone is beyond them, in each direction, 4 to 9 times "
        "in 100.\n",
        "| | the paper | the miniature | |\n| --- | --- | --- | --- |",
        *(f"| {claim.number} | {claim.says} | {claim.shows} | {claim.verdict()} |" for claim in all_claims),
        "\n| estimator | C | K | bits/dim, fitted | rate | distortion | perplexity |",
        "| --- |" + " --- |" * 6,
    ]
    for (name, *size), results in sorted(mini.settings.items()):
        bits = over(results, bits_per_dim)
        rate, distortion, perplexity = (
            fmean(result["evaluation"][term] for result in results)
            for term in ("rate", "distortion", "perplexity")
        )
        numbers = f"{bits.mean:.3f} ± {bits.error:.3f} | {rate:.3f} | {distortion:.3f} | {perplexity:.1f}"
        lines.append(f"| {label(name)} | {' | '.join(map(str, size))} | {numbers} |")
    return "\n".join(lines)


app = application(findings)

if __name__ == "__main__":
    app()
