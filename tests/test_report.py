"""The report of a run: one page that loads nothing and runs nothing, made of the files in output_dir alone."""

from __future__ import annotations

import html.parser
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.files import write_json, write_safetensors
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.numerics.spectrum import effective_rank
from llm_lowrank.run import drawing, dry_run, memory, report
from llm_lowrank.run.flops import work_of
from llm_lowrank.run.hardware import GPUS
from llm_lowrank.run.messages import log_exchange
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.recipe import Recipe, parse, save
from llm_lowrank.run.results import read_results
from llm_lowrank.run.train import train
from tests.test_launch import place, recipe  # noqa: F401 - place is a fixture

EVIL = "<script>alert(1)</script><img src=x onerror=\"alert('2')\">&lt;</td>\x00\ud800\u202e"
MODULES = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")]
VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """The elements of a page, which must be closed in their order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def harmless(text: str) -> Page:
    """The page, after a look for anything that a browser would load, run or send."""
    seen = Page(text)
    assert not set(seen.seen) & {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base", "image"}
    for name, value in seen.attributes:
        assert not name.startswith("on") and name not in ("src", "href", "xlink:href", "srcset"), (name, value)
        assert "url(" not in (value or "") and "javascript:" not in (value or "")
    style = drawing.STYLE
    assert "url(" not in style and "@import" not in style and "default-src 'none'" in text
    return seen


@pytest.fixture
def folder(tmp_path) -> Path:
    """The output folder of a run of 6 steps with one exchange, written by hand."""
    output = tmp_path / "mine"
    method = LoRA(rank=2)
    save(Recipe(output_dir=str(output), method=method, learning_rate=1e-3, max_steps=6), output / "recipe.yaml")
    with Metrics(output, "none", main=True) as metrics:
        metrics.write("load", 0, seconds=1.5, bytes=10)
        facts = {"model": "some/model", "steps": 6, "held_out": 8, "trainable": 1234, "modules": MODULES}
        metrics.write("run", 0, facts={**facts, "versions": {"torch": "2.0"}})
        metrics.write("eval", 0, exact_match=0.0, mean_score=0.1)
        metrics.write("samples", 0, answers=[["1 + 1?", "three", "2", 0.0]])
        metrics.write("eval", 0, loss=2.5)
        for step in range(1, 7):
            loss = None if step == 2 else 2.0 / step
            metrics.write(
                "train", step, loss=loss, learning_rate=1e-3, grad_norm=math.nan, tokens_per_second=100.0 + step
            )
            metrics.write("method", step, figure=step / 2)
        figures = {"importance": [1e-6, 1e-3, 2e-3, 5e-3]}
        log_exchange(metrics, 3, Exchanged(8, "bank", 1e-7, 0.0, 0.1, 10, by_module=figures))
        metrics.write("eval", 6, exact_match=0.75, mean_score=0.8)
        metrics.write("samples", 6, answers=[["1 + 1?", "2", "2", 1.0]])
        metrics.write("eval", 6, loss=1.25)
        metrics.write("memory", 6, predicted_gb=1.0, measured_gb=2.0)
    adapter(output / "adapter")
    return output


def adapter(path: Path) -> None:
    """A PEFT LoRA of rank 2: q_proj learned two directions of equal strength, v_proj one."""
    tensors = {}
    for module in MODULES:
        b = torch.eye(6, 2) if "q_proj" in module else torch.tensor([[3.0, 0.0]]).repeat(6, 1)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.eye(2, 5)
    path.mkdir(parents=True)
    write_safetensors(path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "some/model"}
    write_json(path / "adapter_config.json", config)


def test_singular_values_and_effective_ranks_are_those_of_the_product():
    g = torch.Generator().manual_seed(0)
    pairs = Pairs(torch.randn(9, 4, generator=g), torch.randn(4, 7, generator=g))
    exact = torch.linalg.svdvals(pairs.product().double())[:4]
    assert torch.allclose(pairs.singular_values(), exact, rtol=1e-6)
    share = exact / exact.sum()
    assert effective_rank(exact) == pytest.approx(math.exp(-float((share * share.log()).sum())))
    assert effective_rank(torch.ones(5)) == pytest.approx(5) and effective_rank(torch.tensor([2.0, 0, 0])) == 1
    assert effective_rank(torch.zeros(3)) == 0


def test_the_page_has_every_figure_and_loads_nothing(folder):
    assert report.main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = harmless(text)
    for said in (
        *("finished, 6 steps", "2.5 \u2192 1.25", "0.0% \u2192 75.0%", "1,234", "exchange after step 3"),
        *("1 + 1?", "three", "answer before training", "answer after step 6"),
        *("learning_rate", "0.001", "method.type", "lora", "max_steps"),  # differ from the defaults
        *("--max-lora-rank 8", "PeftModel", "some/model", "llm-lowrank merge", "torch", "2.0"),
        "logarithmic colours",
    ):
        assert said in page.text, said
    results = read_results(folder)
    assert results.changed.keys() == {"output_dir", "learning_rate", "max_steps", "method.rank"} - (
        {"method.rank"} if LoRA().rank == 2 else set()
    )
    learned = results.learned[MODULES[0]]
    assert learned.effective_rank == pytest.approx(2) and learned.norm == pytest.approx(2 * math.sqrt(2))
    assert results.learned[MODULES[1]].effective_rank == pytest.approx(1)


def test_what_comes_from_data_is_shown_and_never_run(folder):
    write_bad = [["Q" + EVIL, "A" + EVIL, "E" + EVIL, 0.0], [1], "no row"]
    rows = [
        {"kind": "samples", "step": 0, "answers": write_bad},
        {"kind": "samples", "step": 6, "answers": write_bad},
        {"kind": "method", "step": 6, EVIL: 1.0},
        {"kind": "exchange", "step": 5, "into": EVIL, "by_module": {EVIL: [1.0, math.nan, math.inf, 2.0]}},
        {"kind": "run", "step": 0, "facts": {"device": EVIL, "modules": [f"m.{n}.{EVIL}" for n in range(4)]}},
    ]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(json.dumps({"model_name_or_path": EVIL, EVIL: EVIL, "method": {"type": EVIL}}))
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    write_json(folder / "adapter/adapter_config.json", {**config, "base_model_name_or_path": EVIL})
    for argv in (["report", str(folder)], ["compare", str(folder), str(folder), "--output", str(folder / "two.html")]):
        assert report.main(argv) == 0
    for name in ("report.html", "two.html"):
        text = (folder / name).read_text(encoding="utf-8")
        page = harmless(text)
        assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
        assert "A<script>alert(1)</script>" in page.text and "\x00" not in text


def test_a_stopped_run_has_a_report_that_says_what_is_missing(folder, capsys):
    for name in ("adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter").rmdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 3]
    (folder / "metrics.jsonl").write_text("\n".join([*kept, '{"kind": "train", "st']))
    assert report.main(["report", str(folder)]) == 0
    page = harmless((folder / "report.html").read_text(encoding="utf-8"))
    assert "3 of 6 steps were made" in page.text and "there is no adapter" in page.text
    assert "1 line(s) of metrics.jsonl cannot be read" in page.text
    (folder / "recipe.yaml").unlink()
    (folder / "metrics.jsonl").write_text("")
    assert report.main(["report", str(folder)]) == 0
    harmless((folder / "report.html").read_text(encoding="utf-8"))
    (folder / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert report.main(["report", str(folder)]) == 2
    assert "is not the output folder of a run" in capsys.readouterr().err


def test_a_damaged_adapter_is_a_note(folder):
    path = folder / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert report.main(["report", str(folder)]) == 0
    page = harmless((folder / "report.html").read_text(encoding="utf-8"))
    assert "the adapter is not shown" in page.text and "2.5 \u2192 1.25" in page.text


def test_several_runs_on_one_page(folder, tmp_path, capsys):
    other = tmp_path / "other"
    save(Recipe(output_dir=str(other), method=LoRA(rank=2), learning_rate=2e-3, max_steps=6), other / "recipe.yaml")
    (other / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    adapter(other / "adapter")
    output = tmp_path / "compare.html"
    assert report.main(["compare", str(folder), str(other), "--output", str(output)]) == 0
    page = harmless(output.read_text(encoding="utf-8"))
    assert "learning_rate" in page.text and "0.002" in page.text and "lr_scheduler_type" not in page.text
    assert page.text.count("other") >= 4
    assert report.main(["compare", str(folder), "--output", str(output)]) == 2
    assert "two runs or more" in capsys.readouterr().err


def test_a_long_series_keeps_its_peaks():
    points = [(step, float(step == 5000)) for step in range(10**4)]
    kept = drawing.thin(points)
    assert len(kept) <= drawing.POINTS + 2 and (5000, 1.0) in kept
    assert kept[0] == points[0] and kept[-1] == points[-1]


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-3e-9, 7e-9), (5.0, 5.0), (0.0, 0.0), (1e9, 1.5e9), (0.999, 1.001)])
def test_ticks_enclose_the_values(low, high):
    ticks = drawing.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 and ticks[-1] >= high - 1e-12 and 2 <= len(ticks) <= 8
    labels = drawing.tick_labels(ticks)
    assert len(set(labels)) == len(ticks) and max(map(len, labels)) <= 8


def test_a_run_writes_its_report_and_a_fault_in_it_is_a_warning(place, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings = recipe(place, output_dir=tmp_path / "out", engine="plain", report_to="none", save_merged=False)
    train(parse(settings))
    page = harmless((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert "report:" in (said := capsys.readouterr().out) and str(tmp_path / "out/report.html") in said
    assert "finished, 6 steps" in page.text
    for title in ("Importance at step", "Churn at step", "Effective rank", "Loss per trained token"):
        assert title in page.text
    results = read_results(tmp_path / "out")
    assert set(results.learned) == set(results.facts["modules"]) and results.facts["trainable"] > 0
    shares = [r["by_module"]["replaced_share"] for r in results.of("exchange")]
    assert len(shares) == 2 and all(0 < a <= b <= 1 for a, b in zip(*shares, strict=True))

    def broken(folder: Path) -> Path:
        raise KeyError("a fault")

    monkeypatch.setattr(report, "write_report", broken)
    assert "its report was not written: KeyError: 'a fault'" in report.try_report(tmp_path / "out")


def test_the_predicted_step_is_that_of_a_dry_run_and_stands_beside_the_measured_one(place, folder):  # noqa: F811
    arguments = [a for a in recipe(place, engine="plain", dtype="bfloat16") if "svd_cache" not in a]
    settings = replace(parse(arguments), method=LoRA(rank=4))
    text = dry_run.describe(replace(settings, gpu="h100", dry_run=True), world=2)
    (line,) = [line for line in text.splitlines() if line.startswith("step, links hidden, s")]
    titles = next(line for line in text.splitlines() if line.startswith("predicted step on h100, 2"))[36:].split()
    dry = float(line[36:].split()[titles.index("*plain")])

    model, _ = dry_run.build_model(settings, place / "model")
    sizes = memory.sizes_of(model, settings.method)
    (held,) = [way.held for way in memory.columns(settings, sizes, 2) if way.chosen]
    run = SimpleNamespace(recipe=settings, engine=SimpleNamespace(world=2), work=work_of(model, False))
    found = report.predicted_step(run, memory.Predicted(1.0, held, sizes, 0), GPUS["h100"])
    least, most = found["seconds_per_step"]
    assert least == pytest.approx(dry, rel=0.01) and least < most
    assert found["tokens_per_second"][1] == pytest.approx(2 * 2 * 64 / least)  # 2 ranks, 2 rows of 64 tokens

    with (folder / "metrics.jsonl").open("a") as file:
        facts = {**read_results(folder).facts, "predicted": found}
        file.write(json.dumps({"kind": "run", "step": 0, "facts": facts}) + "\n")
    assert report.main(["report", str(folder)]) == 0
    page = harmless((folder / "report.html").read_text(encoding="utf-8"))
    assert (
        f"{drawing.number(found['tokens_per_second'][0], 3)} to " in page.text and "data sheet of NVIDIA" in page.text
    )
