"""torch.compile: no break in the graph of a layer, whatever stores its weights, and the same training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from llm_lowrank.codecs import Int8, empty_parts, int8, opaque
from llm_lowrank.engines.fsdp import decoder_layers
from llm_lowrank.models import compiling
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks, tiny
from tests.test_launch import place, records  # noqa: F401 - place is a fixture
from tests.test_runs import settings
from tests.test_simulated import CODECS, METHODS

LAYERS = 4
# one graph for the first layer, whose input needs no gradient, and one for all the others
GRAPHS = 2


def losses(
    name: str, engine: str, codec: str, compiled: bool, backend: str, modules: tuple[str, ...] = ()
) -> tuple[list[float], int, int]:
    """Three steps; the losses, the graphs and what broke them."""
    torch._dynamo.reset()
    counters.clear()
    load, compile_layers = tiny.load, compiling.compile_layers
    if compiled:

        def compiled_load(engine, model, **arguments):
            compile_ = torch.nn.Module.compile
            torch.nn.Module.compile = partial_method(compile_, backend=backend)
            try:
                compile_layers(model)
            finally:
                torch.nn.Module.compile = compile_
            return load(engine, model, **arguments)

        tiny.load = compiled_load
    try:
        dtype = "fp32" if codec == "fp32" else "bf16"
        more = {"codec": CODECS[codec], "total": 12, "modules": modules, "num_hidden_layers": LAYERS}
        trainee = tiny.Trainee(METHODS[name], engine, dtype, **more)
    finally:
        tiny.load = load
    found = [trainee.step(step) for step in range(3)]
    return found, counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values())


def partial_method(method, **arguments):
    return lambda self: method(self, **arguments)


def compare(name: str, engine: str, codec: str, backend: str, breaks: bool, modules: tuple[str, ...] = ()) -> None:
    eager, *_ = losses(name, engine, codec, False, backend, modules)
    compiled, graphs, broken = losses(name, engine, codec, True, backend, modules)
    assert compiled == pytest.approx(eager, rel=1e-5 if codec == "fp32" else 2e-3)
    if breaks:
        # Around each of the 7 linear layers of both kinds of decoder layers, and no more with more decoder layers.
        assert graphs <= 7 * GRAPHS and broken <= 16
    else:
        assert (graphs, broken) == (GRAPHS, 0)


@pytest.mark.parametrize("codec", ["fp32", "nf4", pytest.param("int8", marks=pytest.mark.wide)])
def test_a_layer_is_one_graph_over_every_codec(codec):
    compare("lora", "plain", codec, "aot_eager", breaks=False)


@pytest.mark.parametrize(
    "name",
    ["srlora-bank", "dora", "core"]
    + [
        pytest.param(name, marks=pytest.mark.wide)
        for name in ("relora-bank", "lora_ga", "lora_xs", "mora", "edora", "osora", "sora", "beamlora")
    ],
)
def test_a_layer_is_one_graph_with_these_methods(name):
    compare(name, "plain", "fp32", "aot_eager", breaks=False)


@pytest.mark.parametrize(
    "name",
    [
        "rasa",
        "losia",
        "droplora-token",
        *(pytest.param(name, marks=pytest.mark.wide) for name in ("droplora-step", "flat_lora", "vera", "reslora")),
    ],
)
def test_a_layer_that_no_graph_can_hold_runs_between_graphs(name):
    compare(name, "plain", "fp32", "aot_eager", breaks=True)


def test_norms_that_are_trained_are_in_the_graph_of_their_layer():
    compare("lora", "plain", "nf4", "aot_eager", breaks=False, modules=("norm",))


def test_every_weight_is_decoded_again_in_backward(monkeypatch):
    # torch sees both decodings in one graph; if it made one of them, it would keep every decoded W for backward
    decoded = count_decodings(monkeypatch)
    # the first layer's q, k and v need no gradient of their input; a recomputation leaves out the layer's last weight
    for checkpointing, expected in ((False, 2 * 7 * LAYERS - 3), (True, (3 * 7 - 1) * LAYERS)):
        torch._dynamo.reset()
        trainee = tiny.Trainee(METHODS["lora"], "plain", "bf16", codec=Int8(torch.bfloat16), num_hidden_layers=LAYERS)
        if checkpointing:
            trainee.model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in decoder_layers(trainee.model):
            layer.compile(backend="aot_eager")
        trainee.forward_backward(0)
        decoded.clear()
        trainee.forward_backward(1)
        assert len(decoded) == expected


def count_decodings(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are decoded from now on inside of compiled code."""
    decoded, decode = [], Int8.decode_fused

    def counted(self, parts, n):
        decoded.append((parts["codes"].shape[0], n))
        return decode(self, parts, n)

    monkeypatch.setattr(Int8, "decode_fused", counted)
    return decoded


SIZES = [(64, 64), (43, 42), (7, 1), (1, 130), (129, 257), (0, 64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_compiled_decode_has_the_bits_of_the_eager_one(dtype, monkeypatch):
    kernels = {}
    monkeypatch.setattr(int8, "_KERNELS", kernels)
    codec = Int8(dtype)
    for m, n in SIZES:
        w = torch.randn(m, n, generator=torch.Generator().manual_seed(n)) * torch.logspace(-30, 30, m)[:, None]
        parts = codec.encode(w) if m else empty_parts(codec, m, n, "cpu")
        for _ in range(3):  # as three layers of this shape
            found = opaque.decode(list(parts.values()), opaque.name_of(codec), n)
            assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, codec.decode(parts, n))
    assert len(kernels) == len(SIZES)
    parts = codec.encode(torch.randn(43, 42))
    for start in (5, 6):  # the rows of a rank begin anywhere, and one kernel serves all spans of a length
        cut = {name: part[start : start + 7] for name, part in parts.items()}
        assert torch.equal(codec.decode_fused(cut, 42), codec.decode(parts, 42)[start : start + 7])
    assert len(kernels) == len(SIZES) + 1


def test_a_compiled_step_makes_one_kernel_for_each_shape(monkeypatch):
    kernels = {}
    monkeypatch.setattr(int8, "_KERNELS", kernels)
    compare("lora", "plain", "int8", "inductor", breaks=False)
    assert len(kernels) == 4  # q and o, k and v, gate and up, down


@pytest.mark.parametrize("engine", ["zero2", "fsdp"])
def test_a_layer_is_one_graph_on_these_engines(engine):
    ranks.run(1, partial(compare, "lora", engine, "nf4", "aot_eager", breaks=False), timeout=200)


def test_a_compiled_run_exchanges_answers_and_ends_as_the_eager_one(place, tmp_path, monkeypatch):  # noqa: F811
    for compiled in (False, True):
        output = tmp_path / str(compiled)
        train(parse(settings(place, "srlora", output, engine="plain", report_to="none", torch_compile=compiled)))
    one, two = (records(tmp_path / str(compiled), "train") for compiled in (False, True))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    one, two = (records(tmp_path / str(compiled), "eval") for compiled in (False, True))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)


def test_stage_3_is_refused(place, tmp_path):  # noqa: F811
    arguments = settings(
        place, "lora", tmp_path / "out", engine="deepspeed", deepspeed="ds_configs/zero3.json", torch_compile=True
    )
    with pytest.raises(RecipeError, match="torch_compile: true and ZeRO stage 3 do not go together"):
        validate(parse(arguments))
