"""The documents keep up with the code: quoted error messages, commands, recipes. mkdocs build --strict checks links."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from llm_lowrank.run.command_line import settings
from llm_lowrank.run.recipe import Recipe, parse

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIXED = 8  # characters of a string that are the same in every run; with fewer it fits anything
QUOTED = 40  # characters of a message in a row that may be a run's own: names, numbers, paths


def blocks(path: Path, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language in languages]


def templates() -> list[re.Pattern[str]]:
    """Every string of the source as a pattern whose groups are the values of an f-string."""
    found = set()
    for path in [*(ROOT / "llm_lowrank").rglob("*.py"), *(ROOT / "launch").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [str(p.value) if isinstance(p, ast.Constant) and isinstance(p.value, str) else None for p in parts]
            if sum(len(text) for text in fixed if text) >= FIXED:
                found.add("".join("(.+?)" if text is None else re.escape(text) for text in fixed))
    return [re.compile(pattern, re.DOTALL) for pattern in found]


def own(message: str, known: list[re.Pattern[str]]) -> str:
    """The longest stretch of a message that is in no string of the source."""
    said = [False] * len(message)
    for pattern in known:
        if match := pattern.search(message):
            values = {i for group in range(1, pattern.groups + 1) for i in range(*match.span(group))}
            for i in set(range(*match.span())) - values:
                said[i] = True
    stretches = "".join("\0" if covered else letter for letter, covered in zip(message, said, strict=True)).split("\0")
    return max(stretches, key=len)


MESSAGES = [message.strip() for message in blocks(ROOT / "docs" / "errors.md", "text")]


@pytest.fixture(scope="module")
def known() -> list[re.Pattern[str]]:
    return templates()


@pytest.mark.parametrize("message", MESSAGES, ids=[message[:40] for message in MESSAGES])
def test_a_quoted_error_message_is_one_that_the_source_can_print(message, known):
    strange = own(message, known)
    assert len(strange) <= QUOTED, f"docs/errors.md quotes {strange!r}, which the source does not say"


def test_a_message_that_changed_is_noticed(known):
    message = "step 120: the gradient norm is nan; train with smaller steps, and see whether your data is at fault"
    assert len(own(message, known)) > QUOTED


def commands() -> list[tuple[str, str]]:
    """(page, arguments) of every training that a page shows."""
    found = []
    for page in PAGES:
        for line in "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ").splitlines():
            _, *rest = re.split(r"launch/train\.py|llm[-_]lowrank train\b", line)
            if rest:
                found.append((page.name, re.split(r"&&|\||;|>", rest[0])[0]))
    return found


@pytest.mark.parametrize("page, arguments", commands())
def test_a_command_of_the_documents_has_settings_that_exist(page, arguments):
    words = [word for word in shlex.split(arguments, comments=True) if word != "..."]
    names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    assert names <= settings(Recipe).keys() | {"config_path", "help"}, page
    if not names & {"config_path", "help"} and not any("$" in word for word in words):
        parse(words)


def leaves(tree: dict, prefix: str = "") -> set[str]:
    """The dotted names of a recipe's settings; what is free in its keys, such as method.rank_pattern, counts as one."""
    found = set()
    for key, value in tree.items():
        nested = isinstance(value, dict) and prefix + key in ("method", "data", "fsdp")
        found |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_recipe_of_the_documents_has_settings_that_exist(page):
    for text in blocks(page, "yaml"):
        tree = yaml.safe_load(text)
        if isinstance(tree, dict) and any(
            isinstance(tree.get(section), dict) for section in ("method", "data", "fsdp")
        ):
            assert leaves(tree) <= settings(Recipe).keys(), text
