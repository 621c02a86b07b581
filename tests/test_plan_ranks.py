"""llm-lowrank ranks: every rule against its equation on a small model, and a file that a run takes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_lowrank.data import IGNORE
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.budget import intrinsic_dimension
from llm_lowrank.run import ranks
from llm_lowrank.run.build import read_data
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests.test_runs import place, settings  # noqa: F401 - place is a fixture

SAMPLES = 24
OPTIONS = ("--rule", "--budget", "--samples", "--output=")


def command(place: Path, output: Path, rule: str, *more: str, method: str = "lora") -> list[str]:  # noqa: F811
    given = [word for word in settings(place, method, output.parent / "run") if "rank_pattern" not in word]
    return [*given, f"--rule={rule}", "--budget=4", f"--samples={SAMPLES}", f"--output={output}", *more]


@pytest.fixture(scope="module")
def subject(place, tmp_path_factory) -> tuple[ranks.Subject, torch.nn.Module, list[dict[str, Tensor]]]:  # noqa: F811
    """What rules look at, beside transformers' own model and the samples, one by one."""
    recipe = parse(settings(place, "lora", tmp_path_factory.mktemp("x"), engine="plain"))
    source = ranks.Source.open(place / "model")
    looking = ranks._looking(recipe)
    model, adapters = ranks.build_model(looking, source.path)
    ranks.loading.bind(model, adapters, source.in_model(model))
    subject = ranks.Subject(looking, source, model, adapters, ranks.Wanted("", 4, 1, 8, SAMPLES))
    batches, samples = read_data(looking, source.path, 0, 1)[2], []
    for step in range(-(-SAMPLES // batches.global_batch)):
        for micro in batches.step(step):
            for row, mask, labels in zip(micro.input_ids, micro.attention_mask, micro.labels, strict=True):
                real = mask.bool()
                samples.append({"input_ids": row[real][None], "labels": labels[real][None]})
    return subject, AutoModelForCausalLM.from_pretrained(place / "model"), samples[:SAMPLES]


def fresh(subject: ranks.Subject) -> ranks.Subject:
    """The same with a model on the meta device, as a rule loads its own."""
    model, adapters = ranks.build_model(subject.recipe, subject.source.path)
    ranks.loading.bind(model, adapters, subject.source.in_model(model))
    return ranks.Subject(subject.recipe, subject.source, model, adapters, subject.wanted)


def test_stable_ranks_are_those_of_the_weights(subject):
    looked, model, _ = subject
    found = ranks.by_stable_rank(looked)
    for adapter, score in zip(looked.adapters, found, strict=True):
        sigma = torch.linalg.svdvals(model.get_submodule(adapter.name).weight.detach().double())
        assert score == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-4), adapter.name


def test_gora_is_the_norm_of_w_times_its_gradient(subject):
    looked, model, samples = subject
    found = ranks.by_gradient(fresh(looked))
    model.zero_grad()
    tokens = sum(int((s["labels"][:, 1:] != IGNORE).sum()) for s in samples)
    for s in samples:
        logits = model(s["input_ids"]).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, s["labels"][0, 1:], reduction="sum") / tokens).backward()
    for adapter, score in zip(looked.adapters, found, strict=True):
        w = model.get_submodule(adapter.name).weight
        assert score == pytest.approx(float((w * w.grad).norm()) / sum(w.shape), rel=1e-4), adapter.name


def test_gora_in_several_passes_is_gora_in_one(subject, monkeypatch):
    whole = ranks.by_gradient(fresh(subject[0]))
    monkeypatch.setattr(ranks, "ROOM", 4 * sum(a.shape[0] * a.shape[1] for a in subject[0].adapters) // 3)
    assert len(ranks._groups(subject[0].adapters, lambda a: 4 * a.shape[0] * a.shape[1])) > 2
    assert ranks.by_gradient(fresh(subject[0])) == whole


def inputs(model: torch.nn.Module, samples: list[dict[str, Tensor]], name: str) -> Tensor:
    """The inputs of a module, (tokens, n)."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for s in samples:
            model(s["input_ids"])
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("passes", ["one", "several"])
def test_eva_explains_the_variance_of_the_inputs(subject, monkeypatch, passes):
    looked, model, samples = subject
    if passes == "several":
        monkeypatch.setattr(ranks, "ROOM", 1)
    found = ranks.by_variance(fresh(looked))
    for adapter, shares in list(zip(looked.adapters, found, strict=True))[:7]:
        x = inputs(model, samples, adapter.name).double()
        variances = torch.linalg.svdvals(x - x.mean(0)).square()
        k = min(8, adapter.shape[1])
        torch.testing.assert_close(
            shares.double(), variances[:k] / variances.sum(), rtol=1e-3, atol=1e-6, msg=adapter.name
        )


def test_gelora_is_the_growth_of_the_dimension(subject):
    looked, model, samples = subject
    found = ranks.by_growth(fresh(looked))
    states: list[list[Tensor]] = []
    with torch.no_grad():
        for s in samples:
            # the last entry is behind the final norm: the hidden states that leave the last layer are asked for
            seen: list[Tensor] = []
            layers = model.model.layers
            hooks = [layer.register_forward_hook(lambda *a, seen=seen: seen.append(a[2])) for layer in layers]
            embedded = model(s["input_ids"], output_hidden_states=True).hidden_states[0]
            for hook in hooks:
                hook.remove()
            states.append([state[0].mean(0) for state in [embedded, *seen]])
    d = [intrinsic_dimension(torch.stack(points)) for points in zip(*states, strict=True)]
    growth = [1 + max(0.0, after - before) for before, after in pairwise(d)]
    for adapter, score in zip(looked.adapters, found, strict=True):
        assert score == pytest.approx(growth[int(adapter.name.split(".")[2])], rel=1e-3), adapter.name


@pytest.mark.parametrize("rule", ranks.RULES)
def test_the_file_is_a_recipe_that_meets_the_budget(place, tmp_path, capsys, rule):  # noqa: F811
    output = tmp_path / "ranks.yaml"
    words = command(place, output, rule, "--method.alpha=8", "--method.use_rslora=false")
    assert ranks.main(words) == 0
    said = capsys.readouterr().out
    assert "trained parameters, " in said and f"written: {output}" in said
    section = yaml.safe_load(output.read_text())["method"]
    pattern, alphas = section["rank_pattern"], section["alpha_pattern"]
    assert len(pattern) == 14 and set(pattern) == set(alphas)
    # no dimension grows in a model without training: GeLoRA's ranks are all alike
    assert (len(set(pattern.values())) > 1) == (rule != "gelora")
    recipe = parse([*(w for w in words if not w.startswith(OPTIONS)), f"--config_path={output}"])
    # scales stay: 8 / 4
    assert isinstance(recipe.method, LoRA) and {recipe.method.scale_of(name) for name in pattern} == {2.0}
    model, adapters = ranks.build_model(recipe, place / "model")
    assert {a.name: a.rank for a in adapters} == pattern
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    budget = 4 * sum(sum(a.shape) for a in adapters)
    assert budget - min(sum(a.shape) for a in adapters) < trained <= budget
    assert list(tmp_path.iterdir()) == [output]  # nothing else is written


@pytest.mark.parametrize("method", ["pissa", "dora", "relora", "droplora", "adalora", "lora_fa", "squeeze", "cola"])
def test_other_methods_take_the_pattern(place, tmp_path, method):  # noqa: F811
    output = tmp_path / "ranks.yaml"
    assert ranks.main(command(place, output, "stable-rank", method=method)) == 0
    assert yaml.safe_load(output.read_text())["method"]["type"] == method


def test_a_planned_run_trains_these_ranks_and_peft_reads_them(place, tmp_path):  # noqa: F811
    plan = tmp_path / "ranks.yaml"
    assert ranks.main(command(place, plan, "stable-rank")) == 0
    words = settings(place, "lora", tmp_path / "run", engine="plain", report_to="none", save_merged=False)
    train(parse([*(w for w in words if "rank_pattern" not in w), f"--config_path={plan}"]))
    pattern = yaml.safe_load(plan.read_text())["method"]["rank_pattern"]
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    layers = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    # the export fills up with zeros, so that all modules have one rank
    found = {name: int(layer.lora_A["default"].weight.any(1).sum()) for name, layer in layers.items()}
    assert found == pattern


REFUSALS = {
    "srlora": ([], "srlora", "method.rank_pattern cannot be used with srlora"),
    "losia": ([], "losia", "method.type losia has no rank_pattern; give another one, such as --method.type lora"),
    "pattern": (["--method.rank_pattern={k_proj: 2}"], "lora", "method.rank_pattern is given, and this command writes"),
    "budget": (["--budget=0"], "lora", "--budget must be at least 1, not 0"),
    "range": (["--min=9", "--max=8"], "lora", "--max (8) is less than --min (9)"),
    "too few": (["--min=5", "--max=8"], "lora", "raise --budget or lower --min"),
    "too many": (["--max=3"], "lora", "raise --max or lower --budget"),
    "unknown": (["--method.rnak=4"], "lora", "method.rnak"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_planned_is_refused_and_nothing_is_written(place, tmp_path, capsys, case):  # noqa: F811
    more, method, message = REFUSALS[case]
    output = tmp_path / "ranks.yaml"
    assert ranks.main(command(place, output, "stable-rank", *more, method=method)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not list(tmp_path.iterdir())


def test_a_file_is_not_overwritten_and_ranks_are_planned_by_one_process(place, tmp_path, capsys, monkeypatch):  # noqa: F811
    output = tmp_path / "ranks.yaml"
    output.write_text("mine")
    assert ranks.main(command(place, output, "stable-rank")) == 2
    assert "ranks.yaml exists; remove it, or name another file" in capsys.readouterr().err
    assert output.read_text() == "mine"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.main(command(place, tmp_path / "b.yaml", "stable-rank")) == 2
    assert "ranks are planned by one process" in capsys.readouterr().err


def test_a_failure_late_in_the_work_leaves_no_file(place, tmp_path, capsys, monkeypatch):  # noqa: F811
    def broken(subject: ranks.Subject) -> list[float]:
        return [ranks._finite(subject.adapters[0].name, float("nan"))]

    monkeypatch.setitem(ranks.RULES, "stable-rank", broken)
    assert ranks.main(command(place, tmp_path / "ranks.yaml", "stable-rank")) == 2
    error = capsys.readouterr().err
    assert "model.layers.0.self_attn.q_proj: its score is nan" in error and not list(tmp_path.iterdir())
