"""A sweep's report: its table, its figures, and one page that holds everything."""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

import yaml

from dvq import choices, disk, figures, patches, style
from dvq.captions import CHOICE, CHOSEN, CODEBOOKS, FIGURES, PAPER, SEVERAL
from dvq.fingerprints import shape
from dvq.patches import Patches
from dvq.pictures import Pictures, of_sweep
from dvq.style import Analyses, notice, save_png
from dvq.sweep import Sweep
from dvq.tables import (
    Result,
    Row,
    alike,
    certificate,
    discrete,
    filled,
    finite,
    fitted_first,
    formatted,
    rows,
    settings,
    told_apart,
)

SIZES = ("num_codes", "num_latents", "seeds", "seed", "steps")


def page(
    sweep: Sweep, results: Sequence[Result], failures: Mapping[str, str], pngs: Mapping[str, bytes]
) -> str:
    """The report as one HTML page that loads nothing; ``pngs`` are figures by the names of ``FIGURES``."""
    warning = notice(results)
    reasons = "".join(
        f"<li><code>{escape(name)}</code>: {escape(reason)}</li>" for name, reason in failures.items()
    )
    count = f"{len(failures)} of {len(results) + len(failures)} trials not finished"
    finished, several = rows(results, {}), settings(results)
    return Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        name=escape(sweep.name),
        description=escape(sweep.description),
        summary=_summary(finished, several, failures),
        choice=_choice(results),
        notice=f'<p class="notice">{escape(warning)}</p>' if warning else "",
        failures=f'<section class="failures"><h2>{count}</h2><ul>{reasons}</ul></section>'
        if failures
        else "",
        settings=f'<h2>Settings, over seeds</h2>{_table(several)}<p class="soft">{SEVERAL}</p>'
        if several
        else "",
        trials=f"<h2>Trials, by bits/dim</h2>{_table(finished)}" if finished else "",
        subpixels=str(
            math.prod(shape(results[0]["data"]["name"] if results else str(sweep.base.get("data"))))
        ),
        figures="".join(_figure(name, pngs[name], finite(results)) for name in FIGURES if name in pngs)
        or "<p>No trial finished: there is nothing to draw.</p>",
        sweep=escape(definition(sweep)),
        provenance="".join(
            f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _provenance(results).items()
        ),
    )


def definition(sweep: Sweep) -> str:
    """The sweep as the YAML of a file that asks for the same trials."""
    fields = sweep.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _summary(finished: Sequence[Row], several: Sequence[Row], failures: Mapping[str, str]) -> str:
    """With several seeds, means are compared: the lowest of all trainings would be low by luck too."""
    parts = [f"{len(finished)} of {len(finished) + len(failures)} trials finished"]
    best = next(iter(several or finished), None)
    if best and best["bits_per_dim"] is not None:
        lowest = "lowest mean over seeds" if several else "lowest"
        parts.append(f"{lowest}: {escape(best['name'])}, {formatted(best, 'bits_per_dim')} bits/dim")
        compared = [row for row in several[1:] if row["above"] is not None]
        if compared:
            near = len(compared) - sum(map(told_apart, compared))
            parts.append(
                f"{near} of {len(compared)} other settings cannot be told from it (95%, each by itself)"
            )
        if lone := len(several[1:]) - len(compared):
            parts.append(f"{lone} cannot be compared: no two seeds in common with it")
        if other := fitted_first(several or finished):
            parts.append(
                f"{lowest} by fitted bits/dim: {escape(other['name'])}, {formatted(other, 'fitted_bits_per_dim')}"
            )
        tune = finished[0]["split"] == "tune"
        parts.append("held-out training images (split: tune)" if tune else f"split {finished[0]['split']}")
    return " · ".join(parts)


def _choice(results: Sequence[Result]) -> str:
    """The setting that the results choose, as a line for another sweep; or a warning that they must not choose."""
    text = escape(choices.warning(result["trial"] for result in results))
    if line := choices.chosen_line(results):
        text = f"then, on test images: <code>{escape(line)}</code>"
    return f'<p class="soft">{text[0].upper()}{text[1:]}</p>' if text else ""


def _table(table: Sequence[Row]) -> str:
    """The columns that have values; sizes that all rows share are in a sentence above instead."""
    columns = filled(table)
    shared = [
        key for key in SIZES if key in columns and len(table) > 1 and len({row[key] for row in table}) == 1
    ]
    shared_sizes = ", ".join(f"{columns.pop(key)[0]} {formatted(table[0], key)}" for key in shared)
    head = "".join(_heading(key, *column) for key, column in columns.items())
    body = "\n".join("<tr>" + "".join(_cell(row, key) for key in columns) + "</tr>" for row in table)
    return (
        f'<p class="soft">All with {escape(shared_sizes)}.</p>' if shared_sizes else ""
    ) + f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _heading(key: str, heading: str, form: str) -> str:
    sort = ' aria-sort="ascending"' if key == "bits_per_dim" else ""
    kind = "" if form else ' class="text"'
    return f"<th{kind}{sort}><button>{escape(heading)}</button></th>"


def _cell(row: Row, key: str) -> str:
    """A cell, with the value that it is sorted by: for dead codes their share. A trial's name shows its key in the
    store."""
    value, kind = row[key], ' class="text"' if isinstance(row[key], str) else ""
    if key == "dead_codes" and value is not None and row["num_codes"] is not None:
        value /= row["num_codes"] * row["num_latents"]
    title = f' title="key {escape(row["key"])}"' if key == "name" and row.get("key") else ""
    order = escape("" if value is None else str(value))
    return f'<td{kind}{title} data-value="{order}">{escape(formatted(row, key))}</td>'


def _figure(name: str, png: bytes, results: Sequence[Result]) -> str:
    title, caption = FIGURES[name]
    drawable = discrete(results) if name in CODEBOOKS else results
    if name in CHOSEN and len(style.shown(drawable)) < len(alike(drawable, "seed")):
        caption += CHOICE
    if name == "figure_1a" and figures.papers(results):
        caption += PAPER
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{source}">'
        f"<figcaption><b>{escape(title)}.</b> {escape(caption)}</figcaption></figure>"
    )


def _provenance(results: Sequence[Result]) -> dict[str, str]:
    """What the results were made from and on: each thing with the values that occur."""
    values_by_key: dict[str, dict[str, None]] = {}
    for result in results:
        data = result["data"]
        about = {"data": f"{data['label']}, fingerprint {data['fingerprint'][:12]}", **result["provenance"]}
        for key, value in about.items():
            values_by_key.setdefault(key, {})[str(value)] = None
    listed = {
        key: "; ".join(list(values)[:4]) + ("; …" if len(values) > 4 else "")
        for key, values in values_by_key.items()
    }
    return {
        **listed,
        "certificate": f"{certificate(results)} (equal when every number is equal, bit for bit)",
    }


def write(
    folder: Path,
    sweep: Sweep,
    results: Sequence[Result],
    analyses: Analyses,
    failures: Mapping[str, str],
    pictures: Mapping[str, Pictures],
    codes: Mapping[str, Patches],
) -> Path:
    """Write ``figures/*.png``, ``table.json`` and ``report.html`` to ``folder``; the path of the page.

    Args:
        folder: made if it is not there.
        sweep: what it asked for stands in the report, as YAML.
        results: the contents of ``results.json`` files, in the sweep's order.
        analyses: by the trials' names; a trial with continuous latent variables has none.
        failures: the reason by the trial's name.
        pictures: by the trials' names; those of the trials that :func:`dvq.style.shown` names are drawn.
        codes: the patches of the most used codes, in the same way.
    """
    drawn = draw(folder / "figures", results, analyses, pictures, codes)
    table = {
        "format": 1,
        "sweep": sweep.name,
        "definition": definition(sweep),
        "certificate": certificate(results),
        "rows": rows(results, failures),
        "settings": settings(results),
    }
    disk.replace(folder / "table.json", json.dumps(table, indent=1) + "\n")
    disk.replace(folder / "report.html", page(sweep, results, failures, drawn))
    return folder / "report.html"


def draw(
    folder: Path,
    results: Sequence[Result],
    analyses: Analyses,
    pictures: Mapping[str, Pictures],
    codes: Mapping[str, Patches],
) -> dict[str, bytes]:
    """The finite results' figures, as far as there is something to draw, as PNG files and their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    results, drawn = finite(results), {}
    if results:
        drawn["figure_1c"] = figures.figure_1c(results)
    if discrete(results):
        drawn["figure_1a"] = figures.figure_1a(results)
    if any(result["name"] in analyses for result in results):
        drawn["figure_1b"] = figures.figure_1b(results, analyses)
        drawn["figure_2"] = figures.figure_2(results, analyses)
    singles = {group.results[0]["name"] for group in style.shown(results)}
    if singles & codes.keys():
        drawn["codes"] = patches.of_sweep(results, codes)
    if singles & pictures.keys():
        drawn["pictures"] = of_sweep(results, pictures)
    for name, figure in drawn.items():
        save_png(figure, folder / f"{name}.png")
    return {name: (folder / f"{name}.png").read_bytes() for name in drawn}
