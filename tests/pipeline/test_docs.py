"""The Markdown pages: where their links lead, and that what they tell a reader to type is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in ROOT.glob("**/*.md") if not {"outputs", ".venv"} & set(path.parts))
LINK = re.compile(r"\]\(([^)\s#]*)#?([^)\s]*)\)")
COMMAND = re.compile(r"`(make [^`]+)`|^(?:\w+=\S+ )*(make .*)$", re.MULTILINE)
VARIABLES = ("DVQ_", "MLFLOW_", "AWS_", "KFP_", "PIP_")
"""of the environment, which stand before make"""


def anchors(page: Path) -> set[str]:
    """The names that headings have in links, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    for place, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in place:
            continue
        found = (page.parent / place).resolve() if place else page
        assert found.exists(), f"{place} is not there"
        assert not anchor or anchor in anchors(found), f"{place} has no heading {anchor}"


@pytest.fixture(scope="module")
def makefile() -> tuple[set[str], set[str]]:
    """Its targets, and its options."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"^OPTIONS := (.*)$", text, re.MULTILINE)
    assert options
    return set(re.findall(r"^([a-z-]+):", text, re.MULTILINE)), set(options[1].split())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_of_make_is_one(page, makefile):
    targets, options = makefile
    for command in map("".join, COMMAND.findall(page.read_text(encoding="utf-8"))):
        command = command.partition("#")[0]
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets, command
        given = set(re.findall(r"\b([A-Z][A-Z_0-9]+)=", command))
        assert {word for word in given if not word.startswith(VARIABLES)} <= options, command


def test_every_variable_of_the_environment_is_read_somewhere():
    files = [path for layer in ("dvq", "components", "pipeline") for path in (ROOT / layer).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for page in PAGES:
        for variable in set(re.findall(r"\b(?:DVQ|KFP)_[A-Z_]+", page.read_text(encoding="utf-8"))):
            assert variable in code, f"{named(page)}: {variable}"


@pytest.mark.parametrize("layer", ["dvq", "components", "pipeline"])
def test_every_module_stands_in_its_layers_readme(layer):
    text = (ROOT / layer / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / layer).glob("[!_]*.py"):
        assert f"`{path.name}`" in text, f"{layer}/README.md does not say what {path.name} is"
