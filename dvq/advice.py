"""What to do about a wrong word or value in a sweep, in one sentence."""

import difflib
import re
import unicodedata
from collections.abc import Sequence

from pydantic import ValidationError

from dvq import DvqError

SHORT = {
    "K": "num_latents",
    "C": "num_codes",
    "D": "code_dim",
    "F": "features",
    "lr": "learning_rate",
    "tau": "temperature",
    "beta": "commitment",
    "vq-vae": "vq-ema",
    "vqvae": "vq-ema",
    "gumbel-softmax": "gs-soft",
}
"""how papers write a field or an estimator"""
KINDS = {
    "int_parsing": "give a whole number",
    "int_from_float": "give a whole number",
    "int_type": "give a whole number",
    "float_parsing": "give a number",
    "float_type": "give a number",
    "dict_type": "give lines of 'field: value', with a space after the colon",
    "list_type": "give a list, as in [0, 1, 2]",
    "tuple_type": "give a list of numbers; in a grid a list of such lists",
    "string_type": "give a text",
    "too_short": "give at least one",
    "string_pattern_mismatch": "give letters or digits, and '_', '.' and '-' between them",
}
"""what to do about each type of pydantic's errors"""
SINGLE = ("int_type", "float_type", "string_type", "bool_type", "literal_error")
"""those of them that are about a field with a single value"""
SEVERAL = "give one value; a list of values goes under 'grid'"
TRIALS = "give a list of trials, - {estimator: gs-soft, temperature: 0.1}"


def meant(word: str) -> str:
    """The field or estimator that papers write as ``word``, or itself."""
    return SHORT.get(word) or SHORT.get(word.lower(), word)


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an unknown word: the known one that was probably meant, or else all known ones."""
    if meant(word) in known:
        return f"; did you mean '{meant(word)}'?"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def plain_name(stem: str, otherwise: str) -> str:
    """A file's name in lower-case letters, digits and hyphens, as close to ``stem`` as possible."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c))
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", letters).casefold()  # ß becomes ss
    return re.sub("[^a-z0-9]+", "-", words).strip("-") or otherwise


def sentence(error: ValidationError, where: str, several: str = "") -> DvqError:
    """The first of pydantic's errors as a sentence that begins with ``where``; ``several`` is what to do about a list
    that was given for a single value."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    advice = KINDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    if first["loc"] == ("include",):
        advice = TRIALS
    if several and isinstance(first["input"], list) and first["type"] in SINGLE:
        advice = several
    message = advice[0].lower() + advice[1:]
    if first["type"].startswith("int_") and _exponent(first["input"]):
        message += f", {float(first['input']):.0f}; YAML takes 1e3 for a word"
    if not field:  # it is about several fields, which the message names
        return DvqError(f"{where}: {message}")
    return DvqError(f"{where}: {field} = {first['input']!r}: {message}")


def _exponent(value: object) -> bool:
    """Whether it is a text that denotes a whole number, like 1e3."""
    form = re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d\d?", value) if isinstance(value, str) else None
    return form is not None and float(form[0]).is_integer()
