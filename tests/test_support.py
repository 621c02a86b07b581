"""docs/support.md says what the code refuses today."""

from __future__ import annotations

from pathlib import Path

from llm_lowrank.run import support

PAGE = Path(__file__).parents[1] / "docs/support.md"


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == support.table(), "run: python -m llm_lowrank.run.support docs/support.md"


def test_it_says_no_where_a_weight_cannot_be_written_and_yes_elsewhere():
    rows = [
        line.split(" | ")
        for line in support.table().splitlines()
        if line.startswith(("| lora |", "| pissa |", "| srlora"))
    ]
    assert len(rows) == 5
    for method, engine, *cells in rows:
        assert engine == "every one"
        refused = [cell.strip(" |").startswith("no") for cell in cells]
        assert refused == ([False, False, True, True, True] if "into: weight" in method else [False] * 5), method


def test_every_refused_zero_option_is_listed():
    from llm_lowrank.engines.zero import REFUSALS

    listed = {key for key, _ in support.ZERO_OPTIONS}
    for path, _, _ in REFUSALS:
        section, key, *_ = path.split(".")
        assert section != "zero_optimization" or key in listed, path
