"""Results that are kept: a JSON file a trial, and the tables and figures made from these files alone."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dvq import NUMERICS, DvqError, disk, figures, report
from dvq.analyze import Analysis
from dvq.captions import FIGURES
from dvq.config import estimators, trial
from dvq.style import PAPERS_SIZE, partly_trained, save_png, style
from dvq.sweep import short_name
from dvq.tables import discrete
from dvq.trial import Discrete, Stochastic, Trial

Result = dict[str, Any]
CODEBOOKS = ("explained", "explained_weighted", "projections", "norms")
TAKEN = ("estimator", "num_codes", "num_latents", "data", "split", "steps")
"""fields that have columns of their own, or that a table's title says"""
DETAILS = ("minutes", "device", "code", "evaluated by")
"""columns of the folder's page, which the project's README has no room for"""

PUBLISHED = """\
| on all of CIFAR-10, test bits/dim | | source |
| --- | --- | --- |
| GS-Soft, C = 512 | 4.61 | the paper |
| VQ-VAE at its best C | 4.81 | the paper |
| VQ-VAE | 4.67 | van den Oord et al. 2017, "Neural Discrete Representation Learning" |
| VAE; VIMCO | 4.51; 5.14 | the same |
| a deep convolutional VAE | 4.54 | Gregor et al. 2016, "Towards Conceptual Compression", as both of these cite it |
| VQ-VAE | about 4.82 | github.com/bshall/VectorQuantizedVAE, another implementation of the paper |
| GS-Soft | about 4.6 | github.com/bshall/VectorQuantizedVAE |"""

PARTIAL = "fewer steps than 100,000, or a smaller network: nothing here compares with the paper's numbers"


def write(result: Mapping[str, Any], analysis: Analysis | None, sweep: str, folder: Path) -> Path:
    """Write the results to their file in ``folder``; its path."""
    one = trial(result["trial"])
    evaluation = {key: value for key, value in result["evaluation"].items() if key != "samples"}
    document = {**result, "evaluation": evaluation, "name": name(one), "sweep": sweep, "numerics": NUMERICS}
    if analysis and PAPERS_SIZE.items() <= document["trial"].items():
        document["codebooks"] = {part: _rounded(getattr(analysis, part).tolist()) for part in CODEBOOKS}
    path = folder / f"{document['name']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in document.items())
    disk.replace(path, f"{{\n{lines}\n}}\n")
    return path


def name(one: Trial) -> str:
    """``gs-soft-c512-k8-s0-102000-1f2e3d4c``: what a trial is, its steps, and a hash of all that it sets."""
    chosen = json.dumps(one.changed(), sort_keys=True).encode()
    split = "" if one.split == "test" else f"-{one.split}"
    return f"{one.describe()}{split}-{one.steps}-{hashlib.sha256(chosen).hexdigest()[:8]}"


def _rounded(numbers: Any) -> Any:
    """Five digits of each number in nested lists: what a figure can show."""
    return [_rounded(one) for one in numbers] if isinstance(numbers, list) else float(f"{numbers:.5g}")


def load(folder: Path) -> list[Result]:
    """All results that are kept, by estimator, K, C and bits/dim."""
    order = list(estimators())

    def place(result: Result) -> tuple[int, int, int, float]:
        fields, bits = result["trial"], result["evaluation"]["bits_per_dim"]
        return order.index(fields["estimator"]), fields["num_latents"], fields.get("num_codes", 0), bits

    return sorted(map(_read, sorted(folder.glob("*.json"))), key=place)


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        result["evaluation"]["bits_per_dim"], trial(result["trial"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DvqError) as error:
        raise DvqError(f"{path}: no results of a trial ({error}); remove it, or make results anew") from None
    return result


def draw(folder: Path, results: Sequence[Result]) -> None:
    """Draw the figures of what was trained in full; if there is nothing, those of partial training, and they say so.
    Figures of codebooks fall back on trainings without the held-out images too. Legends leave out what all the trials
    have in common."""
    shown, coded = _shown(results)
    report.draw(folder, _named(shown), {}, {}, {})
    named = _named(coded)
    analyses = {result["name"]: _analysis(result) for result in named}
    if named:
        save_png(figures.figure_1b(named, analyses), folder / "figure_1b.png")
        save_png(figures.figure_2(named, analyses), folder / "figure_2.png")


def _shown(results: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """The results that the figures of bits/dim show, and those that the figures of codebooks show."""
    kinds = _kinds(results)
    coded = ([one for one in kind if "codebooks" in one] for kind in kinds.values())
    return kinds["full"] or kinds["partial"], next(filter(None, coded), [])


def _named(results: Sequence[Result]) -> list[Result]:
    """The results as figures name them: ``gs-soft-c512-k16-s0``, and the fields that decide numbers and differ among
    them. An autoregressive prior, fitted afterwards, is none of these: what is kept with and without it is one
    training, which would pass for two seeds."""
    prior = "autoregressive_steps"
    without = ({**one, "trial": {k: x for k, x in one["trial"].items() if k != prior}} for one in results)
    results = list({name(trial(one["trial"])): one for one in without}.values())
    trials = [trial(one["trial"]) for one in results]
    changes = [one.changed() for one in trials]
    common = {"data", *_shared(changes)}
    return [
        {**result, "name": short_name(one, {field: x for field, x in changed.items() if field not in common})}
        for result, one, changed in zip(results, trials, changes, strict=True)
    ]


def _shared(changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that have the same value in all of ``changes``."""
    first = changes[0] if changes else {}
    return {field: value for field, value in first.items() if all(one.get(field) == value for one in changes)}


def _analysis(result: Result) -> Analysis:
    arrays = {part: np.asarray(numbers) for part, numbers in result["codebooks"].items()}
    return Analysis(**arrays, usage=np.asarray(result["evaluation"]["usage"]))


def _kinds(results: Sequence[Result]) -> dict[str, list[Result]]:
    kinds: dict[str, list[Result]] = {"full": [], "partial": [], "tune": []}
    for result in results:
        fields = result["trial"]
        kind = "tune" if fields["split"] == "tune" else "partial" if partly_trained(fields) else "full"
        kinds[kind].append(result)
    return kinds


def section(results: Sequence[Result], place: Path) -> str:
    """What the project's README shows: the paper's numbers, ours beside them, of partial training only where there
    are no others, and the figures, with links to the folder ``place``."""
    kinds = _kinds(results)
    shown, text = kinds["full"], "Ours, all 10,000 test images:"
    if not shown:
        shown, text = kinds["partial"], "None of our models has been trained in full yet."
    if shown and not kinds["full"]:
        text += f" In partial training, all 10,000 test images ({PARTIAL}):"
    if shown:
        text += f"\n\n{table(shown, f'{place}/', DETAILS)}"
    pictures = "\n".join(f"![{title}]({place}/figures/{name}.png)" for name, title in _titles(results))
    return f"{PUBLISHED}\n\n{text}\n\n{pictures}".strip()


def page(results: Sequence[Result], place: Path) -> str:
    """The README of the folder ``place`` that keeps the results."""
    kinds = _kinds(results)
    parts = [
        "# Results on all of CIFAR-10",
        "Written by `make results SWEEP=…` from the JSON files of this folder. To compute a row again: "
        f"`make submit-sweep SWEEP={place}/<its file> DATA=…`. Bits/dim is the single-sample ELBO of hard "
        "samples over every image of the split, ± its standard error over images. Beside it stand L_S; `fitted`, the "
        "same with the prior fitted to the training images, and so batch normalization's statistics unless training "
        "fixed them; `AR prior`, with an autoregressive prior of the codes; and for VQ-VAE and FSQ the bits/dim "
        "under a `uniform prior`. Minutes are of training, some beside other work on the machine; `code` is the "
        "commit that trained. How the settings came about and what the numbers show: [notes](notes.md).",
        f"## The paper's numbers\n\n{PUBLISHED}",
    ]
    if kinds["full"]:
        parts.append(f"## Trained in full: all 10,000 test images\n\n{table(kinds['full'], '')}")
    if kinds["partial"]:
        text = f"## Partial training: all 10,000 test images\n\n{PARTIAL.capitalize()}."
        parts.append(f"{text}\n\n{table(kinds['partial'], '')}")
    if kinds["tune"]:
        text = "Training without 5,000 training images, evaluated on those: what the choices were made by."
        parts.append(f"## Held-out training images\n\n{text}\n\n{table(kinds['tune'], '')}")
    parts += [f"![{title}](figures/{name}.png)" for name, title in _titles(results)]
    return "\n\n".join(parts) + "\n"


def _titles(results: Sequence[Result]) -> list[tuple[str, str]]:
    shown, coded = _shown(results)
    drawn = {"figure_1a": discrete(shown), "figure_1b": coded, "figure_1c": shown, "figure_2": coded}
    return [(name, title) for name, (title, _) in FIGURES.items() if drawn.get(name)]


def table(results: Sequence[Result], place: str, without: Collection[str] = ()) -> str:
    """What all trials share in a sentence, then a row a trial, as Markdown, with links to the files in ``place``;
    the columns ``without`` and those that would be empty are left out."""
    changes = [_changed(result) for result in results]
    shared = _shared(changes) if len(results) > 1 else {}
    rows = [
        _row(result, place, {field: changed[field] for field in changed if field not in shared})
        for result, changed in zip(results, changes, strict=True)
    ]
    kept = [column for column in rows[0] if column not in without]
    columns = [column for column in kept if any(row[column] not in ("–", "") for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    above = f"All with {_told(shared)}.\n\n" if shared else ""
    return above + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _changed(result: Result) -> dict[str, Any]:
    """What differs from the defaults, the paper's settings, and has no column of its own."""
    return {field: value for field, value in trial(result["trial"]).changed().items() if field not in TAKEN}


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} {value}" for field, value in settings.items())


def _row(result: Result, place: str, others: Mapping[str, Any]) -> dict[str, str]:
    """A trial's cells by their columns."""
    fields, evaluation, provenance = result["trial"], result["evaluation"], result["provenance"]
    one = trial(fields)
    # of a deterministic code, whose rate is −log p(z)
    deterministic = isinstance(one, Discrete) and not isinstance(one, Stochastic)
    uniform = evaluation["distortion"] + evaluation["rate_uniform"] if deterministic else None
    return {
        "estimator": style(fields["estimator"])[0],
        "C": str(fields.get("num_codes", "–")),
        "K": str(fields["num_latents"]),
        "steps": f"{fields['steps']:,}",
        "other settings": _told(others),
        "bits/dim": f"{evaluation['bits_per_dim']:.3f} ± {evaluation['bits_per_dim_se']:.3f}",
        "fitted": _number(evaluation.get("fitted_bits_per_dim"), ".3f"),
        "AR prior": _number(evaluation.get("autoregressive_bits_per_dim"), ".3f"),
        "rate": f"{evaluation['rate']:.3f}",
        "distortion": f"{evaluation['distortion']:.3f}",
        "L_S": _number(
            None if deterministic else evaluation.get("bound"), ".3f", f" (S = {fields['bound_samples']})"
        ),
        "uniform prior": _number(uniform, ".3f"),
        "perplexity": _number(evaluation.get("perplexity"), ".1f"),
        "dead": _number(
            evaluation.get("dead_codes"), "d", f"/{fields.get('num_codes', 0) * fields['num_latents']}"
        ),
        "minutes": f"{result['training']['seconds'] / 60:.1f}",
        "device": provenance["device"],
        "code": provenance["commit"],
        "evaluated by": evaluation.get("provenance", {}).get("commit", "not recorded"),
        "file": f"[json]({place}{result['name']}.json)",
    }


def _number(value: float | None, form: str, behind: str = "") -> str:
    return "–" if value is None else format(value, form) + behind
