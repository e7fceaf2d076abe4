"""Trials from text: validated before anything starts, with errors of one sentence.

Free of torch, kfp and mlflow, which take seconds to import.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from dvq import DvqError
from dvq.advice import SEVERAL, meant, nearest, sentence
from dvq.estimators import ESTIMATORS
from dvq.trial import Trial

Point = dict[str, Any]


def estimators() -> dict[str, type[Trial]]:
    """Every estimator's configuration by its name; DvqError for a class that has none of its own."""
    classes: dict[str, type[Trial]] = {}
    for cls in ESTIMATORS:
        _check(cls)
        name = next(iter(get_args(cls.model_fields["estimator"].annotation)), None)
        again = name in classes and _place(classes[name]) == _place(cls)  # a notebook's cell, run once more
        if name is None or (name in classes and not again):
            taken = f", and '{name}' is {classes[name].__name__}'s" if name else ""
            raise DvqError(
                f"{cls.__module__}: {cls.__name__} has no name of its own{taken}; give it one, "
                'estimator: Literal["name"] = "name"'
            )
        classes[name] = cls
    return classes


def _place(cls: type[Trial]) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _check(cls: type[Trial]) -> None:
    """DvqError for a class in the list that is no estimator yet."""
    if not (isinstance(cls, type) and issubclass(cls, Trial)):
        raise DvqError(f"{cls.__module__}: {cls.__name__} is no Trial; derive it from a class of dvq.trial")
    if cls.__abstractmethods__:
        lacking = " and ".join(sorted(cls.__abstractmethods__))
        raise DvqError(
            f"{cls.__module__}: {cls.__name__} has no {lacking}; the methods' docstrings are in dvq.trial"
        )
    for base in cls.__mro__[1 : cls.__mro__.index(Trial) + 1]:
        for name in cls.model_fields.keys() & vars(base).keys():
            raise DvqError(
                f"{cls.__module__}: {cls.__name__} has a field '{name}', and {base.__name__} something else of this "
                "name; give the field another"
            )


def _elsewhere(key: str, cls: type[Trial]) -> str:
    """A hint for an unknown ``key``: the estimators that have such a field, or else the field of ``cls`` that was
    meant."""
    field = meant(key)
    owners = [name for name, owner in estimators().items() if field in owner.model_fields]
    if not owners or field in cls.model_fields:
        return nearest(key, list(cls.model_fields))
    which = "which" if field == key else f"{field}, which"
    where = f"name it with its estimator in 'include', {{estimator: {owners[0]}, {field}: …}}"
    return f", {which} is a field of {', '.join(owners)}; leave it out, or {where}"


def _not_in_the_list(name: str) -> str:
    """A hint if the estimator's file is there but its class is not in the list; empty if there is no such file."""
    file = Path(__file__).parent / "estimators" / f"{name.replace('-', '_')}.py"
    return (
        f"; {file.name} is there: name its class in the list in dvq/estimators/__init__.py"
        if file.exists()
        else ""
    )


def trial(values: Mapping[str, Any], where: str = "trial") -> Trial:
    """The validated trial for ``values``; ``where`` begins the message of a DvqError."""
    classes = estimators()
    name = values.get("estimator")
    if name is None:
        raise DvqError(f"{where}: no estimator is named; known: {', '.join(sorted(classes))}")
    if isinstance(name, list):
        raise DvqError(f"{where}: estimator = {name}: {SEVERAL}")
    if not isinstance(name, str) or name not in classes:
        hint = _not_in_the_list(str(name)) or nearest(str(name), list(classes))
        raise DvqError(f"{where}: unknown estimator '{name}'{hint}")
    cls = classes[name]
    for key, value in values.items():
        if key not in cls.model_fields:
            raise DvqError(f"{where}: {name} has no '{key}'{_elsewhere(str(key), cls)}")
        kind = cls.model_fields[key].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):  # pydantic takes it for 0 or 1
            raise DvqError(f"{where}: {key} = {value}: it takes a number or a word, not yes or no")
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise sentence(error, where, SEVERAL) from None


def overrides(point: Mapping[str, Any]) -> str:
    """A point as one text for the pipeline: ``estimator=gs-soft num_codes=512 seed=0``. Values are JSON, words
    without JSON's quotes; what a shell would split is in a shell's quotes."""
    return shlex.join(f"{key}={_word(value)}" for key, value in point.items())


def _word(value: Any) -> str:
    bare = isinstance(value, str) and _value(value) == value
    return value if bare else json.dumps(value, default=str)


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word


def point(text: str) -> Point:
    """The inverse of :func:`overrides`; DvqError if a quote is not closed, or a word sets no field."""
    try:
        items = shlex.split(text)
    except ValueError as error:
        raise DvqError(f"trial '{text}': {error}") from None
    for item in items:
        if not re.match(r"\w+=", item):
            raise DvqError(
                f"trial '{text}': '{item}' sets no field; write estimator=gs-soft num_codes=512 seed=0"
            )
    return {key: _value(word) for key, _, word in (item.partition("=") for item in items)}
