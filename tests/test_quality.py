"""benchmarks/quality.py on a tiny grid: made once, not twice; the families are what they are said to be."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import quality, real
from benchmarks.families import FAMILIES, LENGTH, SYMBOLS, examples
from benchmarks.remedies import Remedy, energies
from llm_lowrank.adapters.adapter import generator
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import Batches
from llm_lowrank.engines.base import Optimization
from llm_lowrank.engines.plain import Plain
from llm_lowrank.models import loading
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.pairs import Pairs

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


@pytest.mark.wide
def test_every_exchange_of_a_score_leaves_its_churn(tmp_path):
    words = ["--steps", "10", "--pretrain-steps", "24", "--rates", "1e-2", "--tuning-seeds", "9", "--seeds", "0"]
    quality.main(["scores", "--output", str(tmp_path), "--methods", "paper", "chance", *words])
    for method in ("paper", "chance"):
        result = json.loads((tmp_path / "scores" / f"{method}-rate0.01-seed0.json").read_text())["result"]
        assert [step for step, _ in result["exchanges"]] == [2, 4, 6, 8]
        shares = [numbers["replaced_fresh_share"] for _, numbers in result["exchanges"]]
        # 112 pairs of 28 modules: 56 by chance, with a standard deviation of 4
        assert shares[0] == 0 and all(abs(share - 0.5) < 0.15 for share in shares[1:]) == (method == "chance")


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


@pytest.mark.parametrize("kind, follows", [("small", {"pairs"}), ("both", {"pairs", "outside"}), ("adam", set())])
def test_soap_follows_a_rotation_of_the_sides_that_it_turns(kind, follows):
    """The steps for a rotated gradient are the rotated steps, on the sides whose bases turn and on no other."""
    from benchmarks.soap import SmallSide, Soap

    seeded = torch.Generator().manual_seed(0)
    B, A = (torch.randn(20, *shape, generator=seeded, dtype=torch.float64) for shape in ((6, 3), (3, 5)))
    r, m, n = (torch.linalg.qr(torch.randn(k, k, generator=seeded, dtype=torch.float64))[0] for k in (3, 6, 5))

    def steps(B, A):
        soap, memory = SmallSide() if kind == "small" else Soap(), {}
        for b, a in zip(B, A, strict=True):
            if kind == "adam":
                last = Pairs(soap.step("B", b, memory, ""), soap.step("A", a, memory, ""))
            else:
                last = soap.direct(None, Pairs(b, a), memory, None)
        return last

    plain = steps(B, A)
    for where, left, right in (("pairs", torch.eye(6, dtype=r.dtype), torch.eye(5, dtype=r.dtype)), ("outside", m, n)):
        inner = r if where == "pairs" else torch.eye(3, dtype=r.dtype)
        turned = steps(left @ B @ inner, inner.T @ A @ right)
        same = all(
            torch.allclose(found, expected, atol=1e-6)
            for found, expected in ((turned.B, left @ plain.B @ inner), (turned.A, inner.T @ plain.A @ right))
        )
        assert same == (where in follows)


@pytest.mark.parametrize(
    "method",
    [Remedy(rank=4, interval=4), Remedy(rank=4, exchanges=[4]), Remedy(rank=4, exchanges=[4], moments="zeroed")],
    ids=["turn", "seeded", "zeroed"],
)
def test_a_remedy_keeps_the_function_and_moves_the_moments(tmp_path, method):
    base = quality.Base(hidden=32, intermediate=48, layers=1)
    quality.fresh(base).save_pretrained(tmp_path)
    tokens = examples(FAMILIES["digits"].shifted, 16, generator(0, "asked"))
    batches = Batches(quality.labelled(tokens), 4, pad_id=0, seed=0)
    engine, bare, source = Plain(), skeleton(tmp_path, torch.float32, "sdpa"), Source.open(tmp_path)
    adapters = attach(bare, method, Dense(torch.float32), 0)
    loading.bind(bare, adapters, source)
    settings = Optimization(1e-2, max_grad_norm=1.0, micro_batch=4)
    model, _ = loading.load(engine, bare, adapters=adapters, method=method, tensors=source, settings=settings)
    gradients = []
    for step in range(4):
        (micro,) = batches.step(step)
        engine.backward(quality.batch_loss(model, micro, engine.device) / micro.tokens)
        norm = float(engine.gradient_norm())
        gradients.append([min(1.0, 1 / norm) * adapter.A.grad.double() for adapter in adapters])
        method.observe(adapters, engine)
        engine.step(1e-2)
    if method.exchanges:
        quality.look(engine, model, method, adapters, batches.step(4))
    scores = [energies(adapter) for adapter in adapters]
    before = [[engine.slot(p) for p in (adapter.A, adapter.B)] for adapter in adapters]
    answers = quality.answered(model, tokens)[0].detach()
    method.exchange(adapters, engine, 4, 8)
    assert torch.allclose(quality.answered(model, tokens)[0], answers, atol=1e-5)
    for number, (adapter, (a, b), energy) in enumerate(zip(adapters, before, scores, strict=True)):
        now_a, now_b = engine.slot(adapter.A), engine.slot(adapter.B)
        if method.interval:
            Q = torch.linalg.lstsq(a.value.double().T, now_a.value.double().T)[0].T  # A' = Q A
            assert torch.allclose(Q @ Q.T, torch.eye(4, dtype=Q.dtype), atol=1e-5) and not torch.allclose(
                Q.abs(), Q.abs().round(), atol=1e-2
            )
            assert torch.allclose(now_b.value.double(), b.value.double() @ Q.T, atol=1e-6)
            turned = torch.stack([Q @ g[number] for g in gradients]).square()  # (steps, r, n)
            rows, columns = turned.sum((0, 2)), turned.sum((0, 1))
            wanted = torch.outer(rows, columns) / (4 * rows.sum())
            found = now_a.moments["exp_avg_sq"].double() / (1 - 0.999**4)
            assert torch.allclose(found, wanted + 1e-3 * wanted.mean(), rtol=1e-3)
            assert torch.allclose(now_a.moments["exp_avg"].double(), Q @ a.moments["exp_avg"].double(), atol=1e-6)
            assert float(engine.optimizer.state[adapter.A]["step"]) == 4
        else:
            order = energy.argsort()
            went, stays = order[:2].sort().values, order[2:].sort().values
            for name, old in a.moments.items():
                assert torch.equal(now_a.moments[name][stays], old[stays])
                assert torch.equal(now_b.moments[name][:, stays], b.moments[name][:, stays])
            assert not now_a.moments["exp_avg"][went].any() and not now_b.value[:, went].any()
            seed = float(a.moments["exp_avg_sq"][stays].mean()) if method.moments == "seeded" else 0.0
            assert torch.allclose(now_a.moments["exp_avg_sq"][went], torch.tensor(seed))
            fresh, kept = now_a.value[went], a.value[stays]
            assert torch.allclose(fresh.norm(dim=1), torch.tensor(3**-0.5)) and (fresh @ kept.T).abs().max() < 1e-6
            assert len(adapter.ledger) == 1  # W took the old pairs


def test_the_long_runs_exchange_after_equal_parts():
    found = quality.exchanging(None, 8, 600, "")
    assert set(found) == set(quality.LONG)
    assert found["three_into_bank"].exchanges == [150, 300, 450] and found["one_into_weight"].exchanges == [300]
    assert not found["once"].exchanges
    assert all(method.into == name.rpartition("_")[2] for name, method in found.items() if "_into_" in name)


def committed(comparison: quality.Comparison) -> int:
    """Return how many runs of the comparison lie in the repository; raise if one cannot be gone on from."""
    specs = [quality.Spec(**read["settings"]["run"]) for read in quality.read_runs(comparison.folder)]
    return sum(comparison.done(spec) for spec in specs if spec.method in comparison.settings)


@pytest.mark.parametrize("name", quality.SMALL)
def test_the_committed_results_are_those_of_todays_settings(name, tmp_path, monkeypatch):
    """A setting that a method has got since must be among LATER, or a table can never be widened."""
    runs = quality.SMALL[name]
    base = quality.Base(steps=runs.pretrain_steps, family=runs.family)
    quality.fresh(base).config.save_pretrained(tmp_path)
    monkeypatch.setattr(quality, "pretrained", lambda folder, base: tmp_path)
    small = quality.Small(base, steps=runs.steps)
    comparison = quality.small_comparison(quality.ROOT / "benchmarks" / "results" / "quality" / name, small, runs.among)
    assert committed(comparison) > 10


def test_the_committed_results_of_the_real_model_are_those_of_todays_settings():
    results = quality.ROOT / "benchmarks" / "results" / "quality"
    assert committed(quality.real_comparison(results / "real", quality.Real())) > 10
    assert committed(quality.real_comparison(results / "real_scores", quality.Real(), quality.scores)) > 2
    for name, task in (real.tasks_of(results / "tasks") | real.TEXTS).items():
        compared = real.comparison(results / "tasks" / name, real.Setting(task))
        if compared.folder.is_dir():
            assert committed(compared) >= 4
    fractions = real.CANDIDATES["fractions"]
    for folder, steps in {"tasks_216_steps": 216, "tasks_192_steps": 192, "tasks_on_cpu": real.Setting.steps}.items():
        assert committed(real.comparison(results / folder / "fractions", real.Setting(fractions, steps=steps))) >= 3
