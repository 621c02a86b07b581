"""benchmarks/quality.py on a tiny grid: made once, not twice; the families are what they are said to be."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quality
from benchmarks.families import FAMILIES, LENGTH, SYMBOLS, examples
from llm_lowrank.adapters.adapter import generator

TINY = [
    "--steps",
    "8",
    "--pretrain-steps",
    "24",
    "--methods",
    "lora",
    "losia",
    "--rates",
    "1e-2",
    "--tuning-seeds",
    "9",
    "--seeds",
    "0",
]


@pytest.fixture
def page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- small -->\nold\n<!-- /small -->\nafter\n", encoding="utf-8")
    return page


def test_a_grid_is_made_once_and_tabulated(tmp_path, page, capsys):
    command = ["small", "--output", str(tmp_path / "runs"), *TINY]
    quality.main(command)
    files = sorted((tmp_path / "runs" / "small").glob("*.json"))
    assert [f.stem for f in files] == [f"{m}-rate0.01-seed{s}" for m in ("lora", "losia") for s in ("0", "9-tuning")]
    written = {f: (f.stat().st_mtime_ns, json.loads(f.read_text())) for f in files}
    counts = [run["result"]["trainable"] for _, run in written.values()]
    assert max(counts) < 1.02 * min(counts)
    assert all(run["result"]["loss"] < run["result"]["held_out_curve"][0][1] for _, run in written.values()), (
        "nothing was learned"
    )
    quality.main(command)
    assert {f: f.stat().st_mtime_ns for f in files} == {f: time for f, (time, _) in written.items()}
    with pytest.raises(ValueError, match="other settings"):
        quality.main(["small", "--output", str(tmp_path / "runs"), *TINY, "--steps", "9"])
    quality.main(["table", "--output", str(tmp_path / "runs"), "--page", str(page)])
    text = page.read_text(encoding="utf-8")
    assert (
        text.startswith("before\n<!-- small -->\n| method ")
        and text.endswith("<!-- /small -->\nafter\n")
        and "old" not in text
    )
    assert "| LoRA | " in text and "| LoSiA | " in text and (tmp_path / "page-small.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_are_deterministic_and_differ(name):
    own, shifted = FAMILIES[name]
    made = [examples(rules, 200, generator(3, "test")) for rules in (own, own, shifted)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], examples(own, 200, generator(4, "test")))
    assert set(own) | set(shifted) < set(SYMBOLS) and not set(own) & set(shifted)
    x, y = torch.randint(10, (2, 1000, LENGTH), generator=generator(5, "test"))
    for rule in shifted.values():  # no rule of one family answers many questions of the other
        assert all((rule(x, y) == other(x, y)).all(1).float().mean() < 0.2 for other in own.values())
        assert rule(x, y).shape == (1000, LENGTH) and 0 <= int(rule(x, y).min()) and int(rule(x, y).max()) < 10
    assert made[2].shape == made[0].shape == (200, 2 + 3 * LENGTH)


class Halves(torch.nn.Module):
    """Knows the next token where the first digit of x is below 5, and is sure of a wrong one elsewhere."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        symbols = len(SYMBOLS)
        following = torch.where(input_ids[:, 1:2] < 5, input_ids, input_ids + 1).roll(-1, 1) % symbols
        return SimpleNamespace(logits=2 * torch.nn.functional.one_hot(following, symbols).float())


@pytest.mark.parametrize("at_once", [7, 50])  # the last part is smaller, or the only one
def test_judging_in_parts_is_judging_at_once(monkeypatch, at_once):
    monkeypatch.setattr(quality, "AT_ONCE", at_once)
    tokens = examples(FAMILIES["digits"].own, 50, generator(0, "judged"))
    right = float((tokens[:, 1] < 5).float().mean())
    others = len(SYMBOLS) - 1
    sure = math.log(math.exp(2) + others)  # -log p of a token that is no favourite
    assert 0.3 < right < 0.7
    assert quality.judged(Halves(), tokens) == pytest.approx((sure - 2 * right, right), rel=1e-5)


def test_the_best_rate_is_chosen_with_tuning_runs_only():
    def run(rate, exact, loss, tuning):
        settings = {"run": {"method": "lora", "rate": rate, "seed": 0, "tuning": tuning}}
        return {"settings": settings, "result": {"exact_match": exact, "loss": loss}}

    runs = [run(1.0, 0.5, 2.0, True), run(2.0, 0.5, 1.0, True), run(3.0, 0.0, None, True), run(1.0, 0.9, 0.1, False)]
    assert quality.best(runs, "lora") == 2.0


@pytest.mark.parametrize("name", ["full_muon", "full_soap"])
def test_other_optimizers_train_the_weights_of_the_linears_alone(tmp_path, name, monkeypatch):
    small = quality.Small(quality.Base(steps=2), steps=3, warmup=1)
    checkpoint = quality.pretrained(tmp_path / "pretrained", small.base)
    kept = {}
    judged = quality.judged
    monkeypatch.setattr(
        quality, "judged", lambda model, held_out: kept.update(model.state_dict()) or judged(model, held_out)
    )
    result = quality.run_small(checkpoint, small, quality.Spec(name, 1e-2, 0), quality.controls)
    before = load_file(checkpoint / "model.safetensors")
    changed = {key for key, value in kept.items() if not torch.equal(value, before[key])}
    linears = {key for key in before if key.endswith("proj.weight")}
    assert changed == linears and result.trainable == sum(before[key].numel() for key in linears)
