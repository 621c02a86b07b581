"""PiSSA (https://arxiv.org/abs/2404.02948): train the principal pairs of W, freeze the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.engines.base import Optimization
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.loading import bind, load
from llm_lowrank.numerics import spectrum
from tests import ranks
from tests.tiny import CODECS, Checkpoint, Trainee, llama, skeleton
from tests.tiny import engine as make_engine

MODULES = ["k_proj", "o_proj", "down_proj"]  # 14 x 42, 42 x 42, 42 x 43, twice each
EXACT = dict(rank=4, target_modules=MODULES, svd_cache="", svd_exact=True)
SCALES = {
    "s = 1": {},
    "s = 2.5": dict(alpha=10),
    "s = 3, rslora": dict(alpha=6, use_rslora=True),
    "s = 0.25": dict(alpha=1),
}
ENGINES = [
    ("plain", 1),
    ("plain", 2),
    ("zero1", 2),
    ("zero2", 3),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp", 1),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp-hybrid", 2),
]
ZERO = {"fsdp-hybrid": {"shard_size": 1}}
every_engine = pytest.mark.parametrize("engine, world", ENGINES)


def start(method: PiSSA, engine: str, dtype: str = "fp32") -> dict:
    t = Trainee(method, engine.partition("-")[0], dtype, zero=ZERO.get(engine))
    return {
        "loaded": t.loaded,
        "original": {a.name: t.original[f"{a.name}.weight"] for a in t.adapters},
        "values": t.values(),
        "weights": {a.name: t.engine.whole(a.weight) for a in t.adapters},
        "logits": t.logits(),
        "ledger": {a.name: [update.product() for update in a.ledger] for a in t.adapters},
    }


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


def trained(told: dict, name: str, scale: float) -> Tensor:
    return scale * told["values"][f"{name}.B"].double() @ told["values"][f"{name}.A"].double()


@pytest.mark.parametrize("scale", SCALES)
@every_engine
def test_s_b_a_is_the_best_rank_r_approximation_of_w0_and_w_is_the_rest(engine, world, scale):
    method = PiSSA(**EXACT, **SCALES[scale])
    assert method.scale == pytest.approx(float(scale.split()[2].strip(",")))
    told = ranks.run(world, start, method, engine)[0]
    assert len(told["original"]) == 6
    for name, w in told["original"].items():
        u, sigma, vt = torch.linalg.svd(w.double(), full_matrices=False)
        best = (u[:, :4] * sigma[:4]) @ vt[:4]  # Eckart-Young
        assert relative(trained(told, name, method.scale), best) <= 1e-5, name  # a float32 SVD
        assert relative(told["weights"][name], w.double() - best) <= 1e-5, name
        b, a = told["values"][f"{name}.B"].double(), told["values"][f"{name}.A"].double()
        size = (sigma[:4] / method.scale).sqrt()  # eqs. 2-3, with s: both factors carry the root
        assert torch.allclose(b.norm(dim=0), size, rtol=1e-5) and torch.allclose(a.norm(dim=1), size, rtol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@every_engine
def test_w_plus_s_b_a_is_w0(engine, world, scale):
    method = PiSSA(**EXACT, **SCALES[scale])
    told = ranks.run(world, start, method, engine)[0]
    for name, w in told["original"].items():
        whole = told["weights"][name].double() + trained(told, name, method.scale)
        # W - s B A is rounded to float32 (2^-24 of an entry)
        assert (whole - w.double()).abs().max() <= 4 * 2**-24 * w.abs().max(), name
        assert relative(told["weights"][name], w) > 0.1, "nothing was taken out of W"
        assert 0 < told["loaded"].errors[name] <= 1e-7 and relative(whole, w) <= 1e-7, name
    assert (told["loaded"].pairs, told["loaded"].modules) == (4 * 6, 6) and set(told["loaded"].errors) == set(
        told["original"]
    )


def test_a_bf16_w_is_rounded_once():
    method = PiSSA(**EXACT)
    told = ranks.run(1, start, method, "plain", "bf16")[0]
    for name, w in told["original"].items():
        assert told["weights"][name].dtype == w.dtype == torch.bfloat16
        rest = w.double() - trained(told, name, 1.0)
        assert torch.equal(told["weights"][name], rest.float().to(torch.bfloat16)), name
        assert relative(told["weights"][name].float(), rest) <= 2**-9, name
        error = relative(told["weights"][name].double() + trained(told, name, 1.0), w)
        # measured and reported
        assert told["loaded"].errors[name] == pytest.approx(error, rel=1e-3) and 1e-4 < error < 2**-9


def test_the_randomized_svd_is_within_a_percent_of_the_best():
    method = PiSSA(rank=4, target_modules=MODULES, svd_cache="", svd_niter=4)
    told = ranks.run(1, start, method, "plain")[0]
    for name, w in told["original"].items():
        best = torch.linalg.svdvals(w.double())[4:].norm()  # what the best approximation leaves
        # noise: the hardest of spectra
        assert best * (1 - 1e-6) <= told["weights"][name].double().norm() <= 1.01 * best, name
        whole = told["weights"][name].double() + trained(told, name, 1.0)
        assert (whole - w.double()).abs().max() <= 4 * 2**-24 * w.abs().max(), name  # exact all the same


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@every_engine
def test_ranks_and_engines_agree(engine, world, dtype):
    method = PiSSA(**EXACT, alpha=10)
    wanted = ranks.run(1, start, method, "plain", dtype)[0]
    for told in ranks.run(world, start, method, engine, dtype):
        for part in ("values", "weights"):  # W - s B A is formed in float64 and rounded once, whoever holds which rows
            assert told[part].keys() == wanted[part].keys()
            assert all(torch.equal(told[part][k], v) for k, v in wanted[part].items()), part
        # ZeRO-3 cuts dense rows: the two ranks that read such a row both count it
        assert told["loaded"].errors == pytest.approx(wanted["loaded"].errors, rel=5e-2 if engine == "zero3" else 1e-9)
        # logits of bf16 layers: one rounding more or less on the way
        assert relative(told["logits"], wanted["logits"]) <= (1e-6 if dtype == "fp32" else 2**-6)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_only_rank_0_keeps_the_ledger(engine):
    first, *others = ranks.run(3, start, PiSSA(**EXACT, alpha=10), engine)
    for name, w in first["original"].items():
        (update,) = first["ledger"][name]
        assert relative(w + update, first["weights"][name]) <= 1e-6, name
    assert all(not entries for other in others for entries in other["ledger"].values())


def start_with_cache(folder: str, placement: str, broken: bool) -> dict:
    method = PiSSA(rank=4, target_modules=MODULES, svd_cache=folder, svd_placement=placement)
    real = spectrum.top_triplets

    def fail(*args: object) -> None:
        raise AssertionError("the SVD ran again")

    spectrum.top_triplets = fail if broken else real
    try:
        return start(method, "plain")
    finally:
        spectrum.top_triplets = real


@pytest.mark.parametrize("placement", ["rank0", "spread"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_second_start_reads_the_cache(tmp_path, world, placement):
    folder = tmp_path / "svd"
    first = ranks.run(world, start_with_cache, str(folder), placement, False)
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 6 and all(name.endswith(".safetensors") for name in files)
    written = {name: (folder / name).stat().st_mtime_ns for name in files}
    second = ranks.run(world, start_with_cache, str(folder), placement, True)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(v, two["values"][k]) for k, v in one["values"].items())
        assert all(torch.equal(v, two["weights"][k]) for k, v in one["weights"].items())


def test_another_rank_does_not_hit_the_cache_of_this_one(tmp_path):
    ranks.run(1, start_with_cache, str(tmp_path), "rank0", False)
    with pytest.raises(ranks.RanksFailed, match="the SVD ran again"):
        ranks.run(1, start_other_rank, str(tmp_path))


def start_other_rank(folder: str) -> None:
    real = spectrum.top_triplets
    spectrum.top_triplets = lambda *_, **__: (_ for _ in ()).throw(AssertionError("the SVD ran again"))
    try:
        start(PiSSA(rank=5, target_modules=MODULES, svd_cache=folder), "plain")
    finally:
        spectrum.top_triplets = real


def wrong_checkpoint(method: Method, engine: str) -> str:
    model, e = skeleton(), make_engine(engine)
    adapters = attach(model, method, CODECS["fp32"])
    state = llama().state_dict()
    state[f"{adapters[2].name}.weight"] = torch.zeros(3, 5)
    bind(model, adapters, Checkpoint(state))  # names only
    try:
        load(e, model, adapters=adapters, method=method, tensors=Checkpoint(state), settings=Optimization())
    except (RuntimeError, ValueError) as error:
        assert e.sum(torch.ones(1)) == e.world  # and the ranks are still together
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("placement", ["rank0", "spread"])
@pytest.mark.parametrize("engine", ["plain", "zero3", "fsdp"])
def test_a_checkpoint_of_another_shape_is_refused_on_all_ranks(engine, placement):
    for message in ranks.run(2, wrong_checkpoint, replace(PiSSA(**EXACT), svd_placement=placement), engine):
        assert "layers.0.mlp.down_proj: the checkpoint holds (3, 5), the model (42, 43)" in message
    for message in ranks.run(2, wrong_checkpoint, LoRA(rank=4, target_modules=MODULES), engine):
        assert (
            "layers.0.mlp.down_proj.weight: the checkpoint holds (3, 5), the model (42, 43); is config.json that of "
            "this" in message
        )


def test_the_default_cache_folder_is_not_used_when_none_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_LOWRANK_CACHE", str(tmp_path))
    start(PiSSA(**EXACT), "plain")
    assert not any(Path(tmp_path).rglob("*.safetensors"))
    start(PiSSA(**{**EXACT, "svd_cache": "auto"}), "plain")
    assert len(list(Path(tmp_path / "svd").glob("*.safetensors"))) == 6


def subspaces(engine: str, dtype: str) -> dict[str, dict[str, Tensor]]:
    t = Trainee(PiSSA(**EXACT, subspace=True), engine, dtype)
    return {"values": t.values(), "original": {a.name: t.original[f"{a.name}.weight"] for a in t.adapters}}


@pytest.mark.parametrize("engine, world, dtype", [("plain", 1, "fp32"), ("zero3", 3, "nf4"), ("fsdp", 2, "bf16")])
def test_the_subspace_alone_is_w_whole_with_its_directions_in_a_and_b_zero(engine, world, dtype):
    for found in ranks.run(world, subspaces, engine, dtype):
        for name, w in found["original"].items():
            A, B = found["values"][f"{name}.A"].double(), found["values"][f"{name}.B"]
            assert not B.any()
            torch.testing.assert_close(A.norm(dim=1), torch.full((4,), 3**-0.5, dtype=torch.float64))
            V = torch.linalg.svd(w.double(), full_matrices=False)[2][:4]
            cosines = (A @ V.T).abs() * 3**0.5
            torch.testing.assert_close(cosines, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4)


def test_a_weight_without_enough_directions_is_named(monkeypatch):
    weights = llama("fp32")
    torch.nn.init.zeros_(weights.model.layers[1].self_attn.k_proj.weight)
    monkeypatch.setattr("tests.tiny.llama", lambda *_args, **_changes: weights)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj: W has fewer than 4 directions"):
        Trainee(PiSSA(**EXACT, subspace=True), "plain")


def test_srlora_has_nothing_to_exchange_without_pairs():
    with pytest.raises(ValueError, match=r"method\.subspace leaves nothing for srlora to exchange"):
        SRLoRA(subspace=True)
