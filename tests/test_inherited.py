"""A run that starts from an adapter computes, at its first step, what PEFT computes with that adapter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from benchmarks import soak
from llm_lowrank.adapters.exchange import measure_exchange
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.cola import COLA
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.plora import PLoRA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models import checkpoint, source
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.foreign import ALL, CONFIG, WEIGHTS
from llm_lowrank.models.inherited import check_base, inherit, open_adapter
from llm_lowrank.models.loading import load
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.optimizers import Optimization
from tests import ranks
from tests.tiny import CODECS, Trainee, batch, llama, skeleton

FLOAT32 = 1e-6  # relative, of a norm
THEIRS = ["k_proj", "up_proj"]  # the stranger's
OURS = [*THEIRS, "o_proj"]
STEPS = 4
# a stranger's adapter with all that moves a scale: scales 6 / sqrt 3 and, for up_proj, 5 / sqrt 2
STRANGE = dict(r=3, lora_alpha=6, use_rslora=True, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 5})
FITTING = dict(rank=3, alpha=6.0, use_rslora=True, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 5.0})
WITHIN = dict(target_modules=OURS, alpha=6.0)
METHODS: dict[str, Method] = {
    "lora": LoRA(**FITTING, target_modules=OURS, adapter="adapter"),
    "lora-frozen": LoRA(**WITHIN, rank=4, adapter="adapter", adapter_role="frozen"),
    "lora-plus": LoRA(**FITTING, target_modules=THEIRS, b_rate=4.0, adapter="adapter"),
    "relora": ReLoRA(**FITTING, target_modules=OURS, interval=1, restart_warmup=0, adapter="adapter"),
    "relora-frozen": ReLoRA(
        **WITHIN, rank=3, interval=1, restart_warmup=0, bank_pairs=4, adapter="adapter", adapter_role="frozen"
    ),
    "plora": PLoRA(**FITTING, target_modules=OURS, interval=2, adapter="adapter"),
    "plora-frozen": PLoRA(**WITHIN, rank=2, interval=2, adapter="adapter", adapter_role="frozen"),
    "cola-frozen": COLA(**WITHIN, rank=2, links=2, adapter="adapter", adapter_role="frozen"),
    "pissa-frozen": PiSSA(**WITHIN, rank=3, svd_cache="", adapter="adapter", adapter_role="frozen"),
    "srlora-frozen": SRLoRA(**WITHIN, rank=2, target_rank=5, svd_cache="", adapter="adapter", adapter_role="frozen"),
}
CELLS = [  # what CI sees; the others are wide
    ("lora", "plain", 1, "fp32"),
    ("lora-frozen", "plain", 1, "nf4"),
    ("relora-frozen", "plain", 1, "nf4"),
    ("srlora-frozen", "zero3", 2, "nf4"),
    ("lora", "zero3", 2, "nf4"),
    ("srlora-frozen", "fsdp", 2, "fp32"),
    ("relora", "fsdp", 2, "fp32"),
]
WIDE = [
    cell
    for method in METHODS
    for engine, world in (("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("zero3", 3))
    for dtype in ("fp32", "nf4", "int8")
    if (cell := (method, engine, world, dtype)) not in CELLS
]


def stranger(folder: Path, base: Path, **changes: object) -> Path:
    """An adapter that PEFT made over a base, its pairs all random."""
    torch.manual_seed(3)
    settings = {"target_modules": THEIRS, "init_lora_weights": False, **STRANGE, **changes}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # PEFT's random pairs are so long that little of the model is left
            p.data *= 0.1
    model.save_pretrained(folder)
    return folder


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(99)).logits.float()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inherited") / "base"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return stranger(base.parent / "adapter", base)


def on_disk(method: Method, adapter: Path) -> Method:
    """The method with the adapter's folder."""
    return type(method)(**{**vars(method), "adapter": str(adapter)})


# --- the function, a life, and what comes out of it -----------------------------------------------------------------


@dataclass
class Life:
    started: Tensor  # logits
    weights: dict[str, Tensor]  # every frozen W in the forward at the start, decoded, without what entered or left it
    final: Tensor
    held: bool  # whether the bank's last pairs stayed bitwise


def live(method: LoRA, engine: str, dtype: str, folder: str) -> Life:
    t = Trainee(method, engine, dtype, total=STEPS)
    t.method.schedule(STEPS, t.adapters)
    started, weights = t.logits(), t.weights()
    for a in t.adapters:
        for entry in a.ledger:  # on rank 0
            weights[a.name] = (weights[a.name].double() - entry.pairs().to(dtype=torch.float64).product()).float()
    before = banked(t)
    for step in range(STEPS):
        t.step(step)
        if step + 1 in method.schedule(STEPS, t.adapters):
            measure_exchange(t.engine, partial(method.exchange, t.adapters, t.engine, step + 1, t.total))
    after = banked(t)
    final = t.logits()
    save_adapter(t.engine, t.adapters, method=method, path=folder, base_model_name_or_path="base")
    return Life(started, weights, final, all(torch.equal(before[k], after[k]) for k in before))


def banked(t: Trainee) -> dict[str, Tensor]:
    """The inherited pairs of every bank."""
    found = {}
    for a in t.adapters:
        if a.inherited is not None and a.inherited.place == "bank":
            found[f"{a.name}.A"] = t.engine.whole(a.bank_A)[a.bank_room :]
            assert len(found[f"{a.name}.A"]) == a.inherited.rank
            found[f"{a.name}.B"] = t.engine.whole(a.bank_B)[:, a.bank_room :]
    return found


def over_peft(weights: dict[str, Tensor], adapter: Path, dtype: str) -> LlamaForCausalLM:
    """PEFT's model over the frozen weights that the run has."""
    model = llama()
    codec: Codec = CODECS[dtype]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            w = module.weight.data
            stored = codec.decode(codec.encode(w), w.shape[1]) if not codec.writable else w
            module.weight.data = weights.get(name, stored)
    return peft.PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize(
    "cell",
    [*CELLS, *(pytest.param(cell, marks=pytest.mark.wide) for cell in WIDE)],
    ids=lambda cell: "-".join(map(str, cell)),
)
def test_a_run_starts_as_peft_loads_the_adapter_and_its_export_loads_in_peft(tmp_path, adapter, cell):
    name, engine, world, dtype = cell
    method = on_disk(METHODS[name], adapter)
    life = ranks.run(world, live, method, engine, dtype, str(tmp_path / "out"))[0]
    theirs = over_peft(life.weights, adapter, dtype)
    assert relative(life.started, answers(theirs)) <= FLOAT32
    assert relative(life.started, answers(theirs.unload())) > 0.02, "the adapter should matter"
    assert relative(life.final, life.started) > 1e-3 and life.held
    assert relative(answers(over_peft(life.weights, tmp_path / "out", dtype)), life.final) <= 3 * FLOAT32


def test_pairs_that_are_trained_on_are_bitwise_those_of_the_adapter(adapter):
    t = Trainee(on_disk(METHODS["lora"], adapter), "plain")
    stored = load_file(adapter / WEIGHTS)
    values = {
        f"base_model.model.{k.replace('.A', '.lora_A.weight').replace('.B', '.lora_B.weight')}": v
        for k, v in t.values().items()
    }
    assert all(torch.equal(values[name], tensor) for name, tensor in stored.items())
    others = [v for k, v in t.values().items() if "o_proj" in k and k.endswith("B")]
    assert others and not any(v.any() for v in others)  # as a run without an adapter starts


def test_principal_directions_are_those_of_the_model_with_the_adapter(adapter):
    for dtype in ("fp32", "nf4"):
        t = Trainee(on_disk(METHODS["pissa-frozen"], adapter), "plain", dtype)
        layer = next(a for a in t.adapters if a.name.endswith("up_proj"))
        merged = peft.PeftModel.from_pretrained(llama(), adapter).merge_and_unload()
        w = merged.get_submodule(layer.name).weight.data.double()
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        wanted = (u[:, :3] * s[:3]) @ v[:3]
        found = layer.pairs(t.engine.whole).to(dtype=torch.float64).product() * layer.scale
        assert relative(found, wanted) < 0.05  # by a randomized SVD


# --- resuming -------------------------------------------------------------------------------------------------------


def life_in_two(method: LoRA, engine: str, dtype: str, folder: str, resume: bool) -> dict[str, Tensor]:
    """Two steps and a checkpoint, then two more; or the last two alone, from the checkpoint."""
    t = Trainee(method, engine, dtype, resume_from=checkpoint.newest(Path(folder))[0] if resume else None)
    if not resume:
        for step in range(2):
            t.step(step)
        t.save(Path(folder), 2)
    for step in range(2, 4):
        t.step(step)
    return {**t.values(), **t.moments(), **t.weights()}


@pytest.mark.parametrize(
    "name, engine, world, dtype",
    [
        ("lora-frozen", "zero3", 2, "nf4"),
        ("srlora-frozen", "fsdp", 2, "fp32"),
        *(
            pytest.param(name, engine, 2, dtype, marks=pytest.mark.wide)
            for name in ("lora", "lora-frozen", "srlora-frozen", "relora-frozen")
            for engine in ("plain", "zero3", "fsdp")
            for dtype in ("fp32", "nf4")
        ),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, adapter, name, engine, world, dtype):
    method = on_disk(METHODS[name], adapter)
    whole = ranks.run(world, life_in_two, method, engine, dtype, str(tmp_path), False)[0]
    again = ranks.run(world, life_in_two, method, engine, dtype, str(tmp_path), True)[0]
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


# --- what does not fit ----------------------------------------------------------------------------------------------


def started(adapter: Path, method: LoRA) -> None:
    model = skeleton()
    inherit(open_adapter(str(adapter)), model, attach(model, method, CODECS["fp32"]), role=method.adapter_role)


@pytest.mark.parametrize(
    "theirs, ours, says",
    [
        ({}, {"rank": 4}, r"k_proj and 1 more it has rank 3, and here 4; set --method.rank 3 --method.alpha 6"),
        ({}, {"alpha": 4.0}, r"has the scale 3.4641, and here 2.3094; set .*--method.use_rslora true"),
        ({}, {"use_rslora": False}, "has the scale 3.4641, and here 2;"),
        ({}, {"rank_pattern": {}}, r"up_proj.* has rank 2, and here 3; set .*--method.rank_pattern '{\"up_proj\": 2}'"),
        ({}, {"alpha_pattern": {}}, "has the scale 3.53553, and here 4.24264; .*alpha_pattern"),
        ({}, {"target_modules": ["up_proj"], "alpha": 6.0}, "k_proj.*does not adapt.*target_modules k_proj,up_proj"),
        ({"use_dora": True}, {}, "DoRA adapter.*launch/merge.py"),
        ({"bias": "lora_only"}, {}, "bias"),
        ({"modules_to_save": ["norm"]}, {}, "brings weights of its own, .*norm.weight.*start from the merged model"),
        ({"target_modules": ["k_proj", "up_proj", "lm_head"]}, {}, "brings weights|lm_head"),
        ({"target_modules": ["k_proj", "up_proj", "embed_tokens"]}, {}, "embed_tokens"),
        ({"trainable_token_indices": [3, 5]}, {}, "brings rows of tokens, of .*embed_tokens"),
        ({"init_lora_weights": "pissa"}, {}, "base weights were changed"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path, base, theirs, ours, says):
    method = LoRA(**{**FITTING, "target_modules": OURS, "adapter": "x", **ours})
    with pytest.raises(ValueError, match=says):
        started(stranger(tmp_path / "adapter", base, **theirs), method)


def edited(tmp_path: Path, base: Path, edit: object) -> Path:
    """The stranger's adapter with other tensors."""
    folder = stranger(tmp_path / "adapter", base)
    tensors = edit(load_file(folder / WEIGHTS))  # type: ignore[operator]
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda found: {k: v.double() for k, v in found.items()}, "stored in float64, and float32, bfloat16"),
        (lambda found: {k: v.to(torch.float8_e4m3fn) for k, v in found.items()}, "stored in float8_e4m3fn"),
        (lambda found: {k: v * torch.nan for k, v in found.items()}, "holds NaN"),
        (lambda found: {k: v[..., :-1] if "lora_A" in k else v for k, v in found.items()}, r"weight, and the model's"),
        (lambda found: {k.replace("layers.1", "layers.7"): v for k, v in found.items()}, "layers.7.*has not; is it"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, base, edit, says):
    with pytest.raises(ValueError, match=says):
        started(edited(tmp_path, base, edit), METHODS["lora"])


def test_bfloat16_is_read_exactly_and_a_cut_adapter_is_refused(tmp_path, base):
    folder = edited(tmp_path, base, lambda found: {k: v.bfloat16() for k, v in found.items()})
    t = Trainee(on_disk(METHODS["lora"], folder), "plain")
    assert relative(t.logits(), answers(peft.PeftModel.from_pretrained(llama(), folder).float())) <= FLOAT32
    (folder / ALL).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match=f"{ALL}.*remove|belongs to another"):
        started(folder, METHODS["lora"])


def test_methods_that_do_not_start_from_an_adapter_say_so():
    takers = "is for method.type lora, plora, relora, not"
    for kind, role, says in (
        (DoRA, "trained", f"{takers} dora; .*launch/merge.py"),
        (SRLoRA, "trained", f"{takers} srlora"),
        (DoRA, "frozen", "is for method.type cola, lora, pissa, plora, relora, srlora, not dora"),
    ):
        with pytest.raises(ValueError, match=says):
            kind(adapter="x", adapter_role=role)
    with pytest.raises(ValueError, match=r"adapter_role is for method\.adapter"):
        LoRA(adapter_role="frozen")
    with pytest.raises(ValueError, match="needs a random one"):
        ReLoRA(adapter="x", trains="B")


def test_a_layer_without_the_pairs_is_not_trained(adapter):
    t = LoRA(**FITTING, target_modules=OURS, adapter=str(adapter))
    model = skeleton()
    adapters = attach(model, t, CODECS["fp32"])
    with pytest.raises(RuntimeError, match="no layer has its pairs"):
        load(Plain(), model, adapters=adapters, method=t, tensors=None, settings=Optimization(1e-2))  # type: ignore[arg-type]


def test_the_base_model_is_compared(tmp_path, base):
    found, opened = stranger(tmp_path / "adapter", base), Source.open(base)
    check_base(open_adapter(str(found)), opened)

    def named(name: str | None, revision: str | None = None) -> None:
        config = json.loads((found / CONFIG).read_text())
        (found / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name, "revision": revision}))
        check_base(open_adapter(str(found)), opened)

    named("someone/base")  # the same last name
    named(None)
    with pytest.raises(ValueError, match=r"was trained on someone/other, and this run trains .*write .* into"):
        named("someone/other")
    hub = Source("org/base", opened.path, opened.files, opened.tensors)
    config = json.loads((found / CONFIG).read_text())
    (found / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "org/base", "revision": "v2"}))
    with pytest.raises(ValueError, match=r"trained on revision v2 .*trains main; set --model_revision v2"):
        check_base(open_adapter(str(found)), hub)
    other = tmp_path / "base"  # the same name and other weights
    llama(num_hidden_layers=1).save_pretrained(other)
    with pytest.raises(ValueError, match="was trained on"):
        named(str(other))


def test_a_hub_name_a_run_and_a_folder_are_found(tmp_path, base, adapter, monkeypatch):
    asked = {}

    def snapshot(name: str, **given: object) -> str:
        asked.update(given, name=name)
        return str(adapter)

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    assert open_adapter("org/adapter").path == adapter
    assert asked["name"] == "org/adapter" and not any(f.endswith(".bin") for f in asked["allow_patterns"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(adapter)
    assert open_adapter(str(tmp_path / "run")).path == adapter
    with pytest.raises(ValueError, match="neither a PEFT adapter nor a run's"):
        open_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="is no folder"):
        open_adapter("./nothing")
    (tmp_path / "pickled").mkdir()
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: str(tmp_path / "pickled"))
    with pytest.raises(ValueError, match="pickled weights are not read"):
        open_adapter("org/pickled")


# --- as a user does it ----------------------------------------------------------------------------------------------


def command(place: Path, output: Path, engine: str, **changes: object) -> list[str]:
    settings = {"method.type": "lora", "method.rank": 2, "max_steps": 3, "save_steps": 0, **changes}
    given = soak.arguments_of(place, output, engine, **settings)
    return [word for word in given if not word.startswith(("--method.target_rank", "--method.svd_cache"))]


def evaluations(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "eval"]


@pytest.mark.wide
def test_a_second_stage_over_nf4_by_the_command(place, tmp_path):
    first = soak.live(command(place, tmp_path / "first", "plain"), world=1)
    assert first.codes == [0], first.said[-3000:]
    frozen = {"method.adapter": tmp_path / "first", "method.adapter_role": "frozen", "save_merged": True}
    second = soak.live(command(place, tmp_path / "second", "deepspeed", codec="nf4", **frozen))
    assert second.codes == [0, 0], second.said[-3000:]
    assert "its 28 pairs of 14 modules are frozen into the bank" in second.said


def test_two_stages_by_the_command(place, tmp_path):
    """A run, a second one on its adapter, and a third that does not fit, on two ranks."""
    first = soak.live(command(place, tmp_path / "first", "plain"), world=1)
    assert first.codes == [0], first.said[-3000:]
    second = soak.live(command(place, tmp_path / "second", "fsdp", **{"method.adapter": tmp_path / "first"}))
    assert second.codes == [0, 0], second.said[-3000:]
    assert "its 28 pairs of 14 modules are trained on" in second.said
    before, after = evaluations(tmp_path / "second")[0], evaluations(tmp_path / "first")[-1]
    assert before == pytest.approx(after, rel=1e-5)
    wrong = command(place, tmp_path / "wrong", "deepspeed", **{"method.adapter": tmp_path / "first", "method.rank": 3})
    refused = soak.live(wrong)
    assert refused.codes == [2, 2] and refused.said.count("has rank 2, and here 3; set --method.rank 2") >= 1
