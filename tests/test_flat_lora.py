"""Flat-LoRA (https://arxiv.org/abs/2409.14396): how the noise is distributed, and that a step has one noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Codec, Dense, Nf4
from llm_lowrank.methods import flat_lora
from llm_lowrank.methods.flat_lora import FlatAdapter, FlatLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.run.memory import sizes_of
from tests import ranks
from tests.tiny import Trainee, skeleton

M, N, R, SCALE, SIGMA, TOTAL = 9, 12, 4, 0.7, 0.3, 10
TARGETS = ["k_proj", "up_proj", "down_proj"]


def layer(
    sigma: float = SIGMA, m: int = M, n: int = N, dtype: torch.dtype = torch.float64, codec: Codec | None = None
) -> FlatAdapter:
    torch.manual_seed(0)
    linear = nn.Linear(n, m, dtype=dtype)
    linear.weight.data *= torch.linspace(1, 3, m, dtype=dtype)[:, None]  # rows of different lengths
    adapter = FlatAdapter("layer", linear, codec or Dense(dtype), PairSettings(R, SCALE, seed=1), sigma=sigma)
    adapter.A, adapter.B = (nn.Parameter(torch.randn(size, dtype=dtype)) for size in ((R, n), (m, R)))
    adapter.total, adapter.step = TOTAL, 7
    return adapter


def lora(adapter: FlatAdapter) -> PairAdapter:
    """The same layer without noise."""
    (m, n), dtype = adapter.shape, adapter.A.dtype
    plain = PairAdapter(adapter.name, nn.Linear(n, m, dtype=dtype), adapter.codec, PairSettings(R, SCALE))
    plain.load_state_dict(adapter.state_dict())
    plain.A.data, plain.B.data = adapter.A.data, adapter.B.data  # not in float32
    return plain


def at(adapter: FlatAdapter, step: int) -> FlatAdapter:
    adapter.step = step
    return adapter


def noise(adapter: FlatAdapter) -> Tensor:
    """E of the adapter's step."""
    found = adapter.train().decode(*adapter.parts()).detach()
    return found - adapter.eval().decode(*adapter.parts()).detach()


def lengths(adapter: FlatAdapter) -> Tensor:
    return (adapter.eval().decode(*adapter.parts()) + SCALE * adapter.B @ adapter.A).detach().norm(dim=1)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def gradients(adapter: PairAdapter, x: Tensor) -> list[Tensor]:
    y = adapter(x)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, (x, adapter.A, adapter.B), g)]


@pytest.mark.parametrize("codec", [None, Nf4()], ids=["dense", "nf4"])
def test_the_noise_of_a_row_is_normal_and_as_wide_as_the_row_is_long(codec):
    n = 100_000
    adapter = layer(m=3, n=n, dtype=torch.float32, codec=codec)
    found = noise(adapter).double()
    sigma = SIGMA * (1 - math.cos(math.pi * 7 / TOTAL)) / 2
    wanted = sigma * lengths(adapter).double() / n**0.5  # (m,)
    standard = found / wanted[:, None]
    assert standard.mean(1).abs().max() < 5 / n**0.5
    assert (standard.std(1) - 1).abs().max() < 5 / (2 * n) ** 0.5
    assert (standard.pow(4).mean(1) - 3).abs().max() < 5 * (96 / n) ** 0.5  # the fourth moment of a normal is 3
    assert (standard @ standard.T / n).fill_diagonal_(0).abs().max() < 5 / n**0.5, "rows are independent"
    assert abs(float((standard[:, 1:] * standard[:, :-1]).mean())) < 5 / (3 * n) ** 0.5, "neighbours too"


def test_sigma_grows_from_0_to_its_value_along_a_half_cosine():
    adapter = layer()
    assert adapter.sigma_at(0) == 0 and adapter.sigma_at(TOTAL) == SIGMA
    assert adapter.sigma_at(TOTAL // 2) == pytest.approx(SIGMA / 2)
    for step in range(1, TOTAL):
        assert adapter.sigma_at(step - 1) < adapter.sigma_at(step) < SIGMA


def test_forward_and_backward_use_one_noise_and_gradients_are_those_at_the_noisy_weight():
    adapter, x = layer(), inputs(2, 5)
    e = noise(adapter)
    found = gradients(adapter.train(), x)
    assert e.any()
    wanted = x @ (adapter.weight + e + SCALE * adapter.B @ adapter.A).T + adapter.bias
    g = torch.linspace(-1, 2, wanted.numel(), dtype=wanted.dtype).view(wanted.shape)
    torch.testing.assert_close(found[0], wanted.detach())
    for one, other in zip(found[1:], torch.autograd.grad(wanted, (x, adapter.A, adapter.B), g), strict=True):
        torch.testing.assert_close(one, other)


def test_the_noise_is_another_one_at_every_step_and_in_every_module():
    one, other = layer(), layer()
    other.name = "other"
    found = [noise(at(adapter, step)) / adapter.sigma_at(step) for adapter in (one, other) for step in range(1, TOTAL)]
    flat = torch.stack([e.flatten() for e in found])
    assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 0.55
    assert torch.allclose(noise(at(one, 4)), found[3] * one.sigma_at(4)), "and the same one whenever it is asked for"


def test_rows_are_measured_at_the_beginning_of_a_step():
    """A and B change at its end only, but a forward of the next micro-batch must not measure again."""
    adapter = layer()
    first = noise(adapter)
    adapter.B.data *= 5
    assert torch.equal(noise(adapter), first)
    ratio = noise(at(adapter, 8)).norm(dim=1) / first.norm(dim=1)
    assert (ratio > 2).all(), "the next step measures the rows that are now longer"


def test_answers_the_first_step_and_a_sigma_of_0_are_bitwise_lora():
    adapter, x = layer(), inputs(2, 5)
    for quiet in (layer().eval(), at(layer(), 0).train(), layer(sigma=0.0).train()):
        for found, wanted in zip(gradients(quiet, x), gradients(lora(adapter), x), strict=True):
            assert torch.equal(found, wanted)
    asleep = layer()
    asleep.step, asleep.total = -1, 0  # nobody has to say anything for an answer
    assert torch.equal(asleep.eval()(x), lora(adapter)(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant):
    adapter, x = layer().train(), inputs(2, 5)
    plain = gradients(adapter, x)
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    for found, wanted in zip((x.grad, adapter.A.grad, adapter.B.grad), plain[1:], strict=True):
        assert torch.equal(found, wanted)


def test_no_other_random_numbers_move():
    adapter, before = layer().train(), torch.get_rng_state()
    adapter(inputs(2, 5)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_weight_in_bfloat16_is_rounded_once():
    adapter = layer(dtype=torch.float32, codec=Dense(torch.bfloat16))
    exact = layer(dtype=torch.float32)
    exact.weight.data = adapter.weight.float()
    noise(adapter)
    exact.lengths = adapter.lengths  # those of bfloat16 come of a product in bfloat16
    noisy = [a.train().decode(*a.parts()) for a in (adapter, exact)]
    assert noisy[0].dtype == torch.bfloat16 and torch.equal(noisy[0], noisy[1].bfloat16())


def test_beside_w_no_second_matrix_of_its_size_is_drawn(monkeypatch):
    drawn, randn = [], torch.randn

    def counted(*size: int, **options: object) -> Tensor:
        drawn.append(math.prod(size))
        return randn(*size, **options)

    monkeypatch.setattr(flat_lora, "BLOCK", 3 * N)
    adapter = layer().train()
    monkeypatch.setattr(torch, "randn", counted)
    adapter.decode(*adapter.parts())
    assert drawn == [3 * N] * 3


def test_no_parameter_and_no_key_beyond_those_of_lora():
    adapter = layer()
    assert adapter.state_dict().keys() == lora(adapter).state_dict().keys()


def test_the_dry_run_counts_the_noisy_weight():
    pairs = dict(rank=4, target_modules=TARGETS)
    for method, expected in ((LoRA(**pairs), 0), (FlatLoRA(**pairs), 43 * 42 * 4)):
        model = skeleton()
        attach(model, method, Dense(torch.float32))
        assert sizes_of(model, method).decoded == expected


def test_a_negative_sigma_is_refused():
    with pytest.raises(ValueError, match=r"method.sigma must be at least 0, not -0.1"):
        FlatLoRA(sigma=-0.1)


# --- over ranks -------------------------------------------------------------------------------------------------------


def told(engine: str, dtype: str, accumulation: int, sigma: float) -> tuple[list[float], dict, dict, dict]:
    method = FlatLoRA(rank=4, alpha=6, target_modules=TARGETS, sigma=sigma)
    t = Trainee(method, engine, dtype, accumulation, total=4)

    def stored() -> dict[str, Tensor]:
        return {
            f"{a.name}.{k}": t.engine.whole(part).cpu()[: a.shape[0]]
            for a in t.adapters
            for k, part in a.named_parts().items()
        }

    before = stored()
    return [t.step(step) for step in range(4)], t.values(), before, stored()


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_the_noise_does_not_depend_on_ranks_or_micro_batches_and_w_is_never_written(dtype):
    losses, values, *_ = ranks.run(1, told, "plain", dtype, 1, 0.5)[0]
    quiet = ranks.run(1, told, "plain", dtype, 1, 0.0)[0][0]
    assert losses[0] == quiet[0] and losses[2:] != pytest.approx(quiet[2:], rel=1e-4), "there was no noise"
    for engine, world, accumulation in (("plain", 1, 3), ("plain", 2, 1), ("zero3", 2, 1), ("fsdp", 3, 2)):
        found, others, before, after = ranks.run(world, told, engine, dtype, accumulation, 0.5)[0]
        assert found == pytest.approx(losses, rel=1e-5)
        for name, value in values.items():
            assert (others[name] - value).norm() <= 1e-3 * value.norm(), name
        assert all(torch.equal(after[name].view(torch.uint8), part.view(torch.uint8)) for name, part in before.items())
