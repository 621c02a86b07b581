"""A whole run of every method, from the recipe to the adapter in PEFT and the merged checkpoint, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.soak import live
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests.test_launch import place, recipe, records, succeed  # noqa: F401 - place is a fixture
from tests.test_laws import LAST, METHODS, RATES

PAIRS = {"method.rank": 4}
RUNS: dict[str, tuple[dict[str, object], int]] = {  # settings, exchanges in 6 steps; of others the laws' settings
    "lora": ({**PAIRS, "method.rank_pattern": "{k_proj: 2}", "method.use_rslora": True}, 0),
    "pissa": ({**PAIRS, "method.svd_cache": ""}, 0),
    "srlora": ({**PAIRS, "method.target_rank": 6, "method.svd_cache": ""}, 1),
    "relora": ({**PAIRS, "method.interval": 2, "method.restart_warmup": 1}, 2),
    "squeeze": ({**PAIRS, "method.target_rank": 2}, 2),
    "beamlora": ({**PAIRS, "method.interval": 2, "method.kept": 0.7}, 1),
    "sora": ({**PAIRS, "method.penalty": 2.0, "learning_rate": 2e-2}, 0),
    "adalora": ({**PAIRS, "method.target_rank": 2, "method.interval": 2, "learning_rate": 5e-2}, 2),
    "cola": ({**PAIRS, "method.links": 3}, 2),
    "plora": ({**PAIRS, "method.interval": 2}, 2),
    "lora_xs": ({"method.rank": 8, "method.svd_cache": "", "learning_rate": 5e-2}, 0),
    "sbora": ({**PAIRS, "method.variant": "fb"}, 0),
    "vera": ({"method.rank": 16, "method.d_initial": 1.0, "learning_rate": 5e-2, "gradient_checkpointing": True}, 0),
    "lora_ga": ({**PAIRS, "method.samples": 12, "method.svd_niter": 1}, 0),
    "lora_one": ({**PAIRS, "gradient_checkpointing": True}, 0),
    "core": (
        {
            "method.p": 8,
            "method.samples": 12,
            "method.interval": 2,
            "method.exchanges": "[2, 4]",
            "optim": "sgd",
            "learning_rate": 2e-2,
        },
        2,
    ),
    "rasa": ({**PAIRS, "optim": "lion", "learning_rate": 5e-3, "gradient_checkpointing": True}, 0),
    "reslora": ({**PAIRS, "gradient_checkpointing": True}, 0),
    "droplora": ({**PAIRS, "method.mask": "sample", "method.use_dora": True, "gradient_accumulation_steps": 2}, 0),
    "losia": ({"method.factor": 0.5, "method.output_factor": 0, "method.period": 2}, 2),
}


def of_the_laws(label: str) -> tuple[dict[str, object], int]:
    """Settings that fit a tiny model, with four times the rate, and the exchanges of such a run."""
    method = METHODS[label]
    given = {name: value for name, value in vars(method).items() if value != getattr(type(method)(), name)}
    named = {f"method.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    own = {"optim": "sgd"} if method.own_step else {}
    return {**named, **own, "learning_rate": 4 * RATES.get(label, 1e-2)}, len(method.schedule(6))


RUNS |= {name: of_the_laws(label) for name, label in LAST.items() if name not in RUNS}


def settings(folder: Path, method: str, output: Path, **changes: object) -> list[str]:
    chosen = {"method.type": method, "output_dir": output, **RUNS[method][0], **changes}
    common = [a for a in recipe(folder) if not a.startswith("--method.") and a.split("=")[0][2:] not in chosen]
    return [*common, *(f"--{name}={value}" for name, value in chosen.items())]


@pytest.mark.parametrize("codec", ["dense", "nf4"])
@pytest.mark.parametrize("method", RUNS)
def test_a_run_learns_and_hands_back_what_it_trained(place, tmp_path, method, codec):  # noqa: F811
    output = tmp_path / "out"
    train(parse(settings(place, method, output, engine="plain", codec=codec, report_to="none")))
    before, after = (r["loss"] for r in records(output, "eval"))
    assert after < before - 0.1
    events = records(output, "exchange")
    assert len(events) == RUNS[method][1] and all(e["drift"] < 1e-5 for e in events if not e["meant"])
    assert {e["into"] for e in events if not e["meant"]} <= {"weight" if codec == "dense" else "bank"}
    tokens = torch.arange(24).view(2, 12)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        untouched = base(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(output / "merged")(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, output / "adapter")(tokens).logits
    assert (merged - adapted).abs().max() < 1e-4 and (merged - untouched).abs().max() > 1e-2


def test_losia_over_nf4_on_zero3(place, tmp_path):  # noqa: F811
    changes = {"codec": "nf4", "per_device_train_batch_size": 4, "report_to": "none", "method.max_live_blocks": 1}
    refused = live(settings(place, "losia", tmp_path / "out", **{**changes, "method.period": 1}))
    assert (
        refused.codes == [2, 2]
        and "every layer moves 3 times in 6 steps, and the bank has room for 1 blocks" in refused.said
    )
    said = succeed(2, settings(place, "losia", tmp_path / "out", **changes))
    before, after = (r["loss"] for r in records(tmp_path / "out", "eval"))
    assert after < before and [(e["step"], e["into"]) for e in records(tmp_path / "out", "exchange")] == [
        (2, "bank"),
        (4, "bank"),
    ]
    assert "entries of 7 modules, frozen ones into the bank" in said
