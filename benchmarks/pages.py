"""Every part of the documents that follows from the methods, written again by one command.

    python benchmarks/pages.py

It writes docs/support.md, two tables of docs/methods/comparison.md, the exported ranks of docs/serve.md, and the names
that a checker of types sees in llm_lowrank/__init__.py. The navigation of the site and its page of settings follow the
methods by themselves (benchmarks/site.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import llm_lowrank
from benchmarks import methods_table
from benchmarks.quality import between_marks
from benchmarks.site import CARDS, ROOT, method_files, title_of
from llm_lowrank.numerics.files import write_text
from llm_lowrank.run import support

HEAD = "| what is trained | exported as | rank of the export |\n|---|---|---|\n"


def facts_of(name: str) -> list[str]:
    """Return what a card's table says: what is trained, as what it is exported, and the rank of that."""
    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    row = re.search(re.escape(HEAD) + r"\| (.+) \| (.+) \| (.+) \|\n", card)
    if row is None:
        raise ValueError(f"docs/methods/{name}.md has no table that begins {HEAD.splitlines()[0]}")
    return list(row.groups())


def exports() -> str:
    lines = ["| method | what is trained | exported as |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {title_of(name)} | {' | '.join(facts_of(name)[:2])} |" for name in method_files())])


def exported_ranks() -> str:
    by_rank: dict[str, list[str]] = {}
    for name in method_files():
        by_rank.setdefault(facts_of(name)[2], []).append(title_of(name))
    rows = [f"| {', '.join(titles)} | {rank} |" for rank, titles in by_rank.items()]
    return "\n".join(["| method | exported rank `r` |", "|---|---|", *rows])


def names_for_checkers(text: str) -> str:
    """Return llm_lowrank/__init__.py with the imports that a checker of types reads."""
    head, condition, rest = text.partition("if TYPE_CHECKING:")
    comment, _, rest = rest.partition("\n")
    homes = sorted((home, name) for name, home in llm_lowrank.homes().items())
    imports = [f"    from llm_lowrank.{home} import {name} as {name}" for home, name in homes]
    return "\n".join([head + condition + comment, *imports, "", rest.partition("\n\n")[2]])


def pages() -> dict[Path, str]:
    """Return every file that follows from the methods, as it should be."""
    support_page, package = ROOT / "docs" / "support.md", ROOT / "llm_lowrank" / "__init__.py"
    comparison, serve = CARDS / "comparison.md", ROOT / "docs" / "serve.md"
    compared = between_marks(comparison.read_text(encoding="utf-8"), "methods", methods_table.table())
    return {
        support_page: support.page(),
        comparison: between_marks(compared, "exports", exports()),
        serve: between_marks(serve.read_text(encoding="utf-8"), "ranks", exported_ranks()),
        package: names_for_checkers(package.read_text(encoding="utf-8")),
    }


def main() -> None:
    for path, text in pages().items():
        write_text(path, text)


if __name__ == "__main__":
    main()
