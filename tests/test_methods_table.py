"""docs/methods/comparison.md is what the code says, and every method is in it."""

from __future__ import annotations

from benchmarks import methods_table
from benchmarks.quality import ROOT
from llm_lowrank.adapters.method import Method

PAGE = ROOT / "docs" / "methods" / "comparison.md"


def test_the_page_has_the_table_of_the_code():
    assert methods_table.table() in PAGE.read_text(encoding="utf-8"), "run python benchmarks/methods_table.py"


def test_every_method_is_in_the_table():
    known = Method.get_known_choices()
    assert set(methods_table.ORDER) == {k for k in known if known[k].__module__.startswith("llm_lowrank.")}


def test_what_is_frozen_beside_w_is_counted_without_w():
    _, flops = methods_table.row("lora", None)
    line, _ = methods_table.row("lora_fa", flops)
    # A, float32: 16 x (4096 for q, k, v, o, gate, up and 14336 for down) in 32 layers
    assert f"{4 * 16 * (6 * 4096 + 14336) * 32 / 1e9:.2f} GB" in line and "| 22.02 M |" in line
