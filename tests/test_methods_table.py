"""Pages that follow from the methods are what the code and the cards say, and every method is in them."""

from __future__ import annotations

import llm_lowrank
from benchmarks import methods_table, pages, site
from llm_lowrank.adapters.method import Method


def test_the_pages_are_those_of_the_code():
    for path, text in pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path} is old: run python benchmarks/pages.py"


def test_a_method_is_found_by_its_registration():
    """In a file that is called as the method is, without an import of the file."""
    kinds = Method.get_known_choices()
    ours = {name: kind for name, kind in kinds.items() if kind.__module__.startswith("llm_lowrank.")}
    assert {f"llm_lowrank.methods.{name}" for name in ours} == {kind.__module__ for kind in ours.values()}
    assert set(site.method_files()) == ours.keys()
    assert all(getattr(llm_lowrank, kind.__name__) is kind for kind in ours.values())


def test_what_is_frozen_beside_w_is_counted_without_w():
    _, flops = methods_table.row("lora", None)
    line, _ = methods_table.row("lora_fa", flops)
    # A, float32: 16 x (4096 for q, k, v, o, gate, up and 14336 for down) in 32 layers
    assert f"{4 * 16 * (6 * 4096 + 14336) * 32 / 1e9:.2f} GB" in line and "| 22.02 M |" in line
