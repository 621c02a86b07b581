"""Loading: rows from a checkpoint to shards, what is refused on the way, and the checks that loading makes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import Dense, Nf4
from llm_lowrank.engines.base import Optimization
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.models import loading
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.loading import add_change, bind, blocks, load
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks
from tests.test_prequantized import save_quantized
from tests.tiny import CODECS, Checkpoint, Trainee, batch, config, engine, llama
from tests.tiny import skeleton as without_values

LORA = LoRA(rank=4)
PISSA = PiSSA(rank=4, svd_cache="")


def caught(call: Callable[[], object]) -> str:
    return ranks.caught(call, ValueError, RuntimeError, OSError)


# --- from disk --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The same model in one file, in many, and one with an output layer of its own and biases."""
    place = tmp_path_factory.mktemp("checkpoints")
    llama().save_pretrained(place / "one")
    llama().save_pretrained(place / "many", max_shard_size="20KB")
    untied = LlamaForCausalLM(config(tie_word_embeddings=False, attention_bias=True, mlp_bias=True))
    nn.init.normal_(untied.model.layers[0].mlp.up_proj.bias)
    untied.generation_config = GenerationConfig(eos_token_id=7, max_new_tokens=3)
    untied.save_pretrained(place / "untied")
    assert len(list((place / "many").glob("*.safetensors"))) > 3
    return {name: str(place / name) for name in ("one", "many", "untied")}


def loaded_from(folder: str, engine_name: str, method: Method, codec: str) -> tuple[Tensor, list[str], int | None]:
    source = Source.open(folder)
    model = skeleton(source.path, torch.float32, "sdpa")
    adapters = attach(model, method, CODECS[codec])
    unused = bind(model, adapters, source)
    wrapped, _ = load(
        engine(engine_name), model, adapters=adapters, method=method, tensors=source, settings=Optimization(1e-2)
    )
    with torch.no_grad():
        return wrapped(input_ids=batch(99)).logits, unused, model.generation_config.eos_token_id


@pytest.mark.parametrize("folder", ["one", "many", "untied"])
@pytest.mark.parametrize("engine_name, world", [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2), ("fsdp", 3)])
def test_every_engine_answers_as_plain_transformers(folders, folder, engine_name, world):
    model = AutoModelForCausalLM.from_pretrained(folders[folder])
    with torch.no_grad():
        wanted = model(input_ids=batch(99)).logits
    for logits, unused, eos in ranks.run(world, loaded_from, folders[folder], engine_name, LORA, "fp32"):
        assert torch.equal(logits, wanted) and unused == []
        assert eos == (7 if folder == "untied" else model.generation_config.eos_token_id)


def test_biases_stay_when_weights_are_coded(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["untied"])
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                layer.weight.copy_(Nf4().decode(Nf4().encode(layer.weight), layer.in_features))
        wanted = model(input_ids=batch(99)).logits
    for logits, _, _ in ranks.run(2, loaded_from, folders["untied"], "fsdp", LORA, "nf4"):
        assert torch.allclose(logits, wanted, atol=1e-5)


# --- what is missing or does not fit ----------------------------------------------------------------------------------


def bound(state: dict[str, Tensor]) -> list[str]:
    model = without_values()
    return bind(model, attach(model, LORA, Dense()), Checkpoint(state))


def test_a_checkpoint_that_lacks_a_tensor_is_refused_and_one_with_more_is_told():
    state = llama().state_dict()
    assert bound(state) == ["lm_head.weight"]  # tied: the embedding's is read
    assert bound(state | {"model.extra": torch.zeros(1)}) == ["lm_head.weight", "model.extra"]
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    with pytest.raises(ValueError, match=r"holds no tensor model.layers.1.mlp.up_proj.weight \(2 of 20 are missing\)"):
        bound(state)


def started_from(
    state: dict[str, Tensor], method: Method, codec: str, engine_name: str, checkpoint: type[Checkpoint] = Checkpoint
) -> str:
    def start() -> None:
        model, tensors = without_values(), checkpoint(state)
        adapters = attach(model, method, CODECS[codec])
        bind(model, adapters, tensors)
        load(engine(engine_name), model, adapters=adapters, method=method, tensors=tensors, settings=Optimization(1e-2))

    return caught(start)


def test_a_weight_of_another_shape_is_refused_on_every_rank():
    state = llama().state_dict()
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(44, 42)
    for message in ranks.run(2, started_from, state, LORA, "fp32", "fsdp"):
        assert "model.layers.1.mlp.up_proj.weight: the checkpoint holds (44, 42), the model (43, 42)" in message


@pytest.mark.parametrize("engine_name", ["plain", "zero3", "fsdp"])
@pytest.mark.parametrize("rows", [60, 70])
def test_an_embedding_of_another_size_is_refused_on_every_rank(engine_name, rows):
    state = llama().state_dict()
    state["model.embed_tokens.weight"] = torch.zeros(rows, 42)
    for message in ranks.run(2, started_from, state, LORA, "fp32", engine_name):
        assert f"model.embed_tokens.weight: the checkpoint holds ({rows}, 42), the model (67, 42)" in message


class Unreadable(Checkpoint):
    """A file that one rank cannot read."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if torch.distributed.get_rank() == 1 and "layers.1.mlp.down_proj" in name:
            raise OSError("stale file handle")
        return super().rows(name, start, stop)


@pytest.mark.parametrize("engine_name", ["plain", "zero3", "fsdp"])
def test_what_one_rank_cannot_read_ends_all_with_its_message(engine_name):
    told = ranks.run(2, started_from, llama().state_dict(), LORA, "fp32", engine_name, Unreadable)
    assert "OSError: stale file handle" in told[1] and "RankError: rank 1: stale file handle" in told[0]


def test_a_weight_that_is_not_finite_is_refused_by_name():
    state = llama().state_dict()
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    for codec in ("fp32", "nf4", "int8"):
        (message,) = ranks.run(1, started_from, state, LORA, codec, "plain")
        assert "model.layers.0.mlp.up_proj" in message, (codec, message)


def doubly(engine_name: str) -> bool:
    t = Trainee(LORA, engine_name, codec=Nf4(double_quant=True))
    for a in t.adapters:
        wanted = Nf4(double_quant=True).encode(t.original[f"{a.name}.weight"])
        assert len(wanted) == 3 and all(
            torch.equal(t.engine.whole(p)[: a.shape[0]], wanted[k]) for k, p in a.named_parts().items()
        ), a.name
    return t.step(1) > t.step(1)


@pytest.mark.parametrize("engine_name, world", [("plain", 2), ("zero3", 3), ("fsdp", 3)])
def test_doubly_quantized_scales_are_sharded_too(engine_name, world):
    assert all(ranks.run(world, doubly, engine_name))


class Slow(Checkpoint):
    """A disk that gives the bar time to be drawn."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        time.sleep(0.03)
        return super().rows(name, start, stop)


def test_the_progress_bar_shows_speed_and_the_time_that_is_left(capsys):
    started_from(llama().state_dict(), LORA, "fp32", "plain", Slow)
    shown = capsys.readouterr().err
    assert "load:" in shown and "GB/s" in shown and "<" in shown


# --- the checks that loading makes of itself --------------------------------------------------------------------------


class Forgetful(Dense):
    """Stores something else than W."""

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        return {"weight": 0.999 * w}


def damaged() -> str:
    return caught(lambda: Trainee(LORA, "plain", codec=Forgetful()))


def test_a_layer_that_is_not_what_was_read_is_refused():
    (message,) = ranks.run(1, damaged)
    assert "RuntimeError" in message and "loading changed the layer's function by 1.0e-03" in message


def cast_on_the_way(engine_name: str) -> str:
    """An engine that hands one part of a coded weight out changed, as a cast of the scales would."""
    real = loading._Reader.check_sharded_bytes

    def spoiled(self: loading._Reader) -> None:
        layer, _rows, _handed = self.witness
        whole = self.engine.whole
        self.engine.whole = lambda p: whole(p) + (p is layer.scales) * torch.ones((), dtype=torch.uint8)  # type: ignore[method-assign]
        try:
            real(self)
        finally:
            self.engine.whole = whole  # type: ignore[method-assign]

    loading._Reader.check_sharded_bytes = spoiled  # type: ignore[method-assign]
    try:
        return caught(lambda: Trainee(LORA, engine_name, "nf4"))
    finally:
        loading._Reader.check_sharded_bytes = real  # type: ignore[method-assign]


@pytest.mark.parametrize("engine_name", ["plain", "zero3", "fsdp"])
def test_bytes_that_change_while_they_are_sharded_end_the_run(engine_name):
    for message in ranks.run(2, cast_on_the_way, engine_name):
        assert "the bytes of scales changed while they were sharded" in message


def reported(method: Method, codec: str, engine_name: str) -> tuple[dict[str, float], int, str]:
    t = Trainee(method, engine_name, codec)
    return t.loaded.errors, t.loaded.pairs, str(t.loaded)


@pytest.mark.parametrize("engine_name, world", [("plain", 1), ("plain", 2), ("zero3", 2), ("fsdp", 3)])
def test_the_report_says_what_encoding_took(engine_name, world):
    original = llama().state_dict()
    for errors, pairs, line in ranks.run(world, reported, LORA, "nf4", engine_name):
        assert len(errors) == 14 and pairs == 0 and "14 frozen linear modules" in line
        for name, error in errors.items():
            w = original[f"{name}.weight"]
            wanted = float((Nf4().decode(Nf4().encode(w), w.shape[1]) - w).norm() / w.norm())
            assert error == pytest.approx(wanted, rel=1e-5) and 0.05 < error < 0.12, name


def test_without_its_principal_directions_a_weight_is_coded_better():
    plain, _, _ = ranks.run(1, reported, LORA, "nf4", "plain")[0]
    pissa, pairs, line = ranks.run(1, reported, PISSA, "nf4", "plain")[0]
    assert pairs == 14 * 4 and "56 pairs taken out of W" in line
    assert all(pissa[name] < plain[name] for name in plain)


# --- the subtraction --------------------------------------------------------------------------------------------------


def test_rows_are_changed_alike_however_many_at_a_time():
    noise = torch.Generator().manual_seed(0)
    w, pairs = (
        torch.randn(37, 50, generator=noise),
        Pairs(torch.randn(37, 9, generator=noise), torch.randn(9, 50, generator=noise)),
    )
    whole = add_change(w, pairs, slice(0, 37))
    exact = w.double() + pairs.B.double() @ pairs.A.double()
    assert torch.equal(whole, exact.float()) and whole.dtype == torch.float32
    for step in (1, 2, 5, 36):
        assert torch.equal(
            torch.cat([add_change(w[a : a + step], pairs, slice(a, min(a + step, 37))) for a in range(0, 37, step)]),
            whole,
        )


def test_blocks_cover_the_rows_and_are_small(monkeypatch):
    monkeypatch.setattr(loading, "BLOCK", 100)
    assert list(blocks(slice(3, 10), 30)) == [slice(3, 6), slice(6, 9), slice(9, 10)]
    assert list(blocks(slice(3, 5), 1000)) == [slice(3, 4), slice(4, 5)]
    assert list(blocks(slice(4, 4), 30)) == []


# --- a checkpoint that is quantized already ---------------------------------------------------------------------------


class Quantized(Checkpoint):
    """Every linear weight is stored in nf4."""

    def is_nf4(self, name: str) -> bool:
        return "_proj" in name

    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        return {k: v[start:stop].clone() for k, v in Nf4().encode(self.state[name]).items()}


def as_it_is(engine_name: str) -> dict[str, bool]:
    model, tensors = without_values(), Quantized(llama().state_dict())
    tensors.rows = functools.partial(_no_linear, tensors.rows)  # type: ignore[method-assign]
    adapters = attach(model, LORA, Nf4())
    bind(model, adapters, tensors)
    ranked = engine(engine_name)
    load(ranked, model, adapters=adapters, method=LORA, tensors=tensors, settings=Optimization(1e-2))
    found = {}
    for a in adapters:
        wanted = Nf4().encode(tensors.state[f"{a.name}.weight"])
        found[a.name] = all(torch.equal(ranked.whole(p)[: a.shape[0]], wanted[k]) for k, p in a.named_parts().items())
    return found


def _no_linear(rows: Callable[..., Tensor], name: str, *span: int) -> Tensor:
    assert "_proj" not in name, "decoded and encoded again"
    return rows(name, *span)


@pytest.mark.parametrize("engine_name, world", [("plain", 1), ("zero3", 3), ("fsdp", 2)])
def test_codes_of_a_quantized_checkpoint_are_taken_as_they_are(engine_name, world):
    for found in ranks.run(world, as_it_is, engine_name):
        assert len(found) == 14 and all(found.values())


@pytest.mark.parametrize("engine_name, world", [("plain", 1), ("zero3", 2), ("fsdp", 3)])
def test_a_checkpoint_of_bitsandbytes_answers_as_its_dequantized_weights(engine_name, world, tmp_path):
    folder = save_quantized(tmp_path / "quantized")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder).dequantize()(input_ids=batch(99)).logits
    for logits, unused, _ in ranks.run(world, loaded_from, str(folder), engine_name, LORA, "nf4"):
        assert torch.allclose(logits, wanted, atol=1e-5) and unused == []


def test_what_cannot_start_from_a_quantized_checkpoint_says_so():
    (message,) = ranks.run(1, started_from, llama().state_dict(), PISSA, "nf4", "plain", Quantized)
    assert "starts from singular directions needs the unquantized model" in message
    (message,) = ranks.run(1, started_from, llama().state_dict(), LORA, "int8", "plain", Quantized)
    assert "stored in nf4 already" in message and "set codec: nf4" in message


def test_the_skeleton_of_a_folder_without_a_config_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="model_name_or_path: cannot read the config"):
        skeleton(tmp_path, torch.float32, "sdpa")
