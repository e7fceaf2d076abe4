"""Sweeps: from a YAML file, or as JSON between components, to trials.

Free of torch, kfp and mlflow, which take seconds to import.
"""

import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dvq import DvqError
from dvq.advice import meant, nearest, plain_name, sentence
from dvq.config import Point, estimators, overrides, trial
from dvq.trial import NEEDS, Trial

LONGEST = 100
"""the most characters of a sweep's name: Kubeflow's experiments allow 128"""
NAME = re.compile(rf"^[a-z0-9][a-z0-9-]{{0,{LONGEST - 1}}}$")
"""a sweep's name, which is also that of its experiment in MLflow and of its report's folder"""
LARGEST = 4 << 20
"""the most bytes of a sweep's file, with YAML's aliases expanded"""


class Loader(yaml.SafeLoader):
    """YAML, except that a key given twice, of which YAML takes the last, is an error, and that 0100 and 1:30, which
    YAML reads as 64 and 90, are words."""

    def number(self, node: yaml.ScalarNode) -> Any:
        word = str(self.construct_scalar(node))
        if ":" in word or re.match("[-+]?0[0-9_]", word):
            return word
        make = self.construct_yaml_int if node.tag.endswith("int") else self.construct_yaml_float
        return make(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:  # before '<<' is resolved, whose keys may be set anew
            word = str(key.value)
            if word in seen and word != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"'{word}' stands there twice", problem_mark=key.start_mark
                )
            seen.add(word)
        return super().construct_mapping(node, deep)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.number)
Loader.add_constructor("tag:yaml.org,2002:float", Loader.number)


class Sweep(BaseModel):
    """A set of trials: ``base`` with every combination of ``grid``'s values, and each point of ``include``, or with
    neither ``base`` as it is, once for each of ``seeds``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME.pattern)]
    description: str = ""
    base: Point = {}
    grid: dict[str, list[Any]] = {}
    include: list[Point] = []
    seeds: Annotated[list[Annotated[int, Field(strict=True)]], Field(min_length=1)] = [0]
    champion: Annotated[str, Field(pattern=r"^(\.*[A-Za-z0-9_-][A-Za-z0-9_.-]*)?$")] = ""
    """the registered model in MLflow whose alias ``champion`` the sweep's best trial gets, of several seeds the
    lowest of the setting of lowest mean; empty for none. MLflow allows none of dots alone"""

    def points(self) -> list[Point]:
        """What each trial sets over ``base``, in the file's order."""
        alone = self.include and not self.grid  # with neither of them the base is a trial
        grid = () if alone else itertools.product(*self.grid.values())
        points = [*(dict(zip(self.grid, values, strict=True)) for values in grid), *self.include]
        return [{**point, "seed": seed} for point in points for seed in self.seeds]

    def trial(self, point: Point) -> Trial:
        """The trial at ``point``."""
        return trial({**self.base, **point}, where=f"sweep '{self.name}', trial '{overrides(point)}'")

    def trials(self) -> dict[str, Trial]:
        """Every trial by its short name; DvqError if there is none, two are the same, or a seed stands apart."""
        parts = (self.base, self.grid, *self.include)
        _beside(f"sweep '{self.name}'", itertools.chain(*parts))
        if any("seed" in part for part in parts):
            raise DvqError(
                f"sweep '{self.name}': name the seeds in 'seeds', a list beside 'grid', and nowhere else"
            )
        named: dict[str, Trial] = {}
        keys: dict[str, Point] = {}
        for at in self.points():
            one = self.trial(at)
            name = short_name(one, at)
            if one.key() in keys:
                unkeyed = ", ".join(field for field in at if field in one.unkeyed())
                but = f" ({unkeyed} changes no number)" if unkeyed else ""
                other = overrides(keys[one.key()])
                also = f", once as '{other}'" if other != overrides(at) else ""
                raise DvqError(
                    f"sweep '{self.name}': the trial '{overrides(at)}' stands in it twice{also}{but}; remove one"
                )
            keys[one.key()] = at
            named[name] = one
            if self.champion and one.split != "tune":
                raise DvqError(
                    f"sweep '{self.name}': a champion is not chosen on test images, which trial '{name}' uses; "
                    "set split: tune in 'base'"
                )
        return named

    def idle(self) -> list[tuple[str, str]]:
        """The fields that are set and change nothing in any trial, each with the field that it needs."""
        ineffective: dict[tuple[str, str], list[bool]] = {}
        for one in self.trials().values():
            for name in one.changed():
                extra = type(one).model_fields[name].json_schema_extra
                if isinstance(extra, dict) and (need := extra.get(NEEDS)):
                    ineffective.setdefault((name, str(need)), []).append(getattr(one, str(need)) is None)
        return [pair for pair, idle in ineffective.items() if all(idle)]


def short_name(one: Trial, at: Point) -> str:
    """``gs-soft-c512-k16-s0``, followed by every other field of its key that this point of the sweep sets."""
    described = {"estimator", "num_codes", "num_latents", "seed", *one.unkeyed()}
    others = "".join(f"-{key.replace('_', '-')}-{_plain(x)}" for key, x in at.items() if key not in described)
    return re.sub(r"[^A-Za-z0-9.+-]", "-", one.describe() + others)


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def read_sweep(text: str) -> Sweep:
    """The sweep in the JSON that components take; DvqError for what is wrong with it."""
    try:
        return Sweep.model_validate_json(text)
    except ValidationError as error:
        raise sentence(error, "sweep") from None


def load_sweep(path: Path | str) -> Sweep:
    """The sweep in a YAML file, its name the file's; DvqError for what is wrong with it."""
    path = Path(path)
    content = _content(path)
    if not NAME.match(path.stem):
        better = plain_name(path.stem, "my-sweep")[:LONGEST] + path.suffix.lower()
        raise DvqError(
            f"sweep file {path}: a sweep has its file's name; call it {better}: small letters, digits and "
            f"hyphens, {LONGEST} at most"
        )
    if not isinstance(content, dict):
        raise DvqError(f"sweep file {path}: expected 'base:' and 'grid:', each with lines of 'field: value'")
    # a key with nothing under it, 'grid:', is as good as none
    content = {key: value for key, value in content.items() if value is not None}
    for key in content:
        if key == "name":
            raise DvqError(f"sweep file {path}: a sweep has its file's name; leave 'name' out")
        if key not in Sweep.model_fields:
            raise DvqError(f"sweep file {path}: unknown key '{key}'{_unknown(str(key), content[key])}")
    grid = content.get("grid")
    for key, values in grid.items() if isinstance(grid, dict) else ():
        _beside(f"sweep file {path}", [key])
        if not isinstance(values, list) or not values:
            instead = f", [{values}]" if isinstance(values, str | int | float) else ""
            raise DvqError(f"sweep file {path}: grid: '{key}' needs a list of at least one value{instead}")
    try:
        return Sweep.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        raise sentence(error, f"sweep file {path}") from None


def _content(path: Path) -> Any:
    """What a YAML file holds, if it can travel as JSON."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
        written = json.JSONEncoder(default=str, ensure_ascii=False).iterencode(content)
        if any(size > LARGEST for size in itertools.accumulate(len(part.encode()) for part in written)):
            raise ValueError(f"it holds more than {LARGEST >> 20} MB")  # as nested aliases may
    except OSError as error:
        raise DvqError(f"sweep file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DvqError(f"sweep file {path}: this is no text in UTF-8; give a YAML file") from None
    except RecursionError:
        raise DvqError(f"sweep file {path}: it is nested too deep; give 'base:' and 'grid:'") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # as of a date in month 13
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DvqError(
            f"sweep file {path}{line}: not valid YAML: {str(getattr(error, 'problem', error)).splitlines()[0]}"
        ) from None
    return content


def _unknown(key: str, value: Any) -> str:
    """What to do about a key that stands beside 'base' and 'grid' and is none of a sweep's."""
    field = meant(key)
    if field != "seed" and any(field in cls.model_fields for cls in estimators().values()):
        return f"; put '{field}' under '{'grid' if isinstance(value, list) else 'base'}'"
    return nearest(key, [name for name in Sweep.model_fields if name != "name"])


def _beside(where: str, fields: Iterable[object]) -> None:
    """DvqError for a sweep's own key among the fields of trials."""
    for key in fields:
        if key in Sweep.model_fields and key != "name":
            raise DvqError(f"{where}: '{key}' stands beside 'base' and 'grid', not in them")
