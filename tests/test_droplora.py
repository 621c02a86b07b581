"""DropLoRA (https://arxiv.org/abs/2508.17337): every sentence of its list of tests, over its four ways of drawing a
mask.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.droplora import Coming, DropAdapter, DropDirectionAdapter, DropLoRA, mix_bits
from llm_lowrank.methods.lora import LoRA
from tests import ranks
from tests.tiny import Trainee

M, N, R, SCALE = 9, 12, 8, 0.7
MASKS = ("token", "sample", "step", "model")
TARGETS = ["k_proj", "up_proj", "down_proj"]


def layer(
    mask: str, p: float = 0.5, name: str = "layer", dtype: torch.dtype = torch.float64, kind: type = DropAdapter
) -> DropAdapter:
    torch.manual_seed(0)
    adapter = kind(name, nn.Linear(N, M, dtype=dtype), Dense(dtype), PairSettings(R, SCALE, seed=1), p=p, mask=mask)
    adapter.A, adapter.B = (nn.Parameter(torch.randn(size, dtype=dtype)) for size in ((R, N), (M, R)))
    if kind is DropDirectionAdapter:
        lengths = adapter.weight.norm(dim=1)
        adapter.magnitude, adapter.norms = (
            nn.Parameter(lengths * 1.5),
            nn.Parameter(lengths.clone(), requires_grad=False),
        )
    at(adapter, 0, [0, 1])
    return adapter


def lora(adapter: DropAdapter) -> PairAdapter:
    """The same layer without a mask."""
    plain = PairAdapter(adapter.name, nn.Linear(N, M, dtype=adapter.A.dtype), adapter.codec, PairSettings(R, SCALE))
    plain.load_state_dict({k: v for k, v in adapter.state_dict().items() if k not in ("magnitude", "norms")})
    plain.A.data, plain.B.data = adapter.A.data, adapter.B.data
    return plain


def at(adapter: DropAdapter, step: int, samples: list[int]) -> None:
    adapter.coming = Coming(step, samples, [adapter])


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(*shape, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def gradients(adapter: PairAdapter, x: Tensor) -> list[Tensor]:
    y = adapter(x)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, (x, adapter.A, adapter.B), g)]


def gate(adapter: DropAdapter, x: Tensor) -> Tensor:
    """The entries kept, times 1 / (1 - p): (t, r), or (r,) of the pairs that are in the product."""
    (product,) = adapter.train().products(x)
    if product.gate is not None:
        return product.gate
    found = torch.zeros(R, dtype=adapter.A.dtype)
    for a, b in zip(product.A, product.B.T, strict=True):
        k = int((adapter.A == a).all(1).nonzero())
        found[k] = (b / adapter.B[:, k]).mean().detach()
    return found


@pytest.mark.parametrize("mask", MASKS)
def test_eval_output_is_bitwise_that_of_lora_with_the_same_pairs(mask):
    adapter = layer(mask).eval()
    x = inputs(2, 5)
    assert torch.equal(adapter(x), lora(adapter)(x))
    at(adapter, -1, [])  # nobody has to say anything for an answer
    assert torch.equal(adapter(x), lora(adapter)(x))


@pytest.mark.parametrize("mask", MASKS)
def test_without_dropping_training_is_bitwise_lora(mask):
    adapter = layer(mask, p=0.0).train()
    for found, wanted in zip(gradients(adapter, inputs(2, 5)), gradients(lora(adapter), inputs(2, 5)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("mask", MASKS)
def test_the_mean_of_many_training_forwards_is_the_answer(mask):
    adapter, x = layer(mask, p=0.3), inputs(2, 3).detach()
    wanted, total, squares, count = adapter.eval()(x), 0, 0, 4000
    adapter.train()
    for step in range(count):
        at(adapter, step, [0, 1])
        y = adapter(x).detach()
        total, squares = total + y, squares + y.square()
    mean = total / count
    error = ((squares / count - mean.square()) / count).sqrt()
    # an all-zero mask is drawn again in `step` and `model`: E[M | not all zero] = (1 - p) / (1 - p^r), 1 + 7e-5 of it
    # here
    assert ((mean - wanted).abs() <= 4.5 * error + 1e-3 * wanted.abs()).all()


def test_in_token_mode_tokens_have_masks_of_their_own_with_the_right_rate_and_scale():
    for p in (0.1, 0.5, 0.8):
        adapter, x = layer("token", p), inputs(2, 500)
        kept = gate(adapter, x)
        assert kept.shape == (1000, R) and sorted(kept.unique().tolist()) == pytest.approx([0, 1 / (1 - p)])
        dropped = (kept == 0).double()
        assert abs(float(dropped.mean()) - p) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
        for axis in (0, 1):  # no pair and no token is preferred
            rates, n = dropped.mean(axis), dropped.shape[axis]
            assert (rates - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
        apart = (dropped[1:] * dropped[:-1]).mean()  # neighbouring tokens are independent
        assert abs(float(apart) - p * p) < 5 * (p * p * (1 - p * p) / kept.numel()) ** 0.5
        assert len({tuple(row) for row in kept[:16].tolist()}) > 4 or p != 0.5


def test_in_sample_mode_the_tokens_of_a_sample_share_a_mask():
    adapter = layer("sample")
    at(adapter, 0, list(range(40)))
    kept = gate(adapter, inputs(40, 5)).view(40, 5, R)
    assert torch.equal(kept, kept[:, :1].expand(kept.shape)) and len({tuple(row) for row in kept[:, 0].tolist()}) > 20


@pytest.mark.parametrize("mask", ["step", "model"])
def test_in_step_mode_dropped_pairs_get_exactly_no_gradient_and_kept_ones_that_of_lora_over_1_minus_p(mask):
    adapter, x = layer(mask), inputs(2, 5)
    kept = gate(adapter, x) > 0
    assert 0 < kept.sum() < R
    _, _, dA, dB = gradients(adapter.train(), x)
    _, _, full_A, full_B = gradients(lora(adapter), x)
    assert not dA[~kept].any() and not dB[:, ~kept].any()
    torch.testing.assert_close(dA[kept], full_A[kept] * 2)
    torch.testing.assert_close(dB[:, kept], full_B[:, kept] * 2)


@pytest.mark.parametrize("mask", ["step", "model"])
def test_in_step_mode_dropped_pairs_are_left_out_of_the_products(mask):
    (product,) = layer(mask).train().products(inputs(5))
    assert 0 < len(product.A) < R and product.gate is None and product.B.shape[1] == len(product.A)


def test_a_mask_changes_between_steps_and_in_step_mode_between_modules_but_not_in_model_mode():
    x = inputs(2, 5)
    for mask in MASKS:
        adapter, seen = layer(mask), set()
        for step in range(20):
            at(adapter, step, [0, 1])
            seen.add(tuple(gate(adapter, x).flatten().tolist()))
        assert len(seen) > 15, mask
    for mask, alike in (("token", 0), ("sample", 0), ("step", 0), ("model", 20)):
        one, two = layer(mask), layer(mask, name="other")
        same = 0
        for step in range(20):
            at(one, step, [0, 1]), at(two, step, [0, 1])
            same += torch.equal(gate(one, x), gate(two, x))
        assert same == alike or (mask in ("sample", "step") and same <= 1), mask


def test_two_forwards_in_one_step_draw_different_masks_for_different_samples():
    """`step` and `model` keep theirs: a step is the same thing however it is cut into micro-batches."""
    x = inputs(2, 5)
    for mask, differs in (("token", True), ("sample", True), ("step", False), ("model", False)):
        adapter = layer(mask)
        first = gate(adapter, x)
        at(adapter, 0, [2, 3])
        assert torch.equal(first, gate(adapter, x)) != differs, mask


@pytest.mark.parametrize("mask", MASKS)
def test_a_step_in_which_all_pairs_would_be_dropped_is_drawn_again(mask):
    adapter = layer(mask, p=0.99)
    for step in range(50):
        at(adapter, step, [0, 1])
        if mask in ("step", "model"):
            assert len(adapter.kept_pairs(step)) >= 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_checkpointing_gives_the_same_gradients(mask, reentrant):
    adapter, x = layer(mask).train(), inputs(2, 5)
    plain = gradients(adapter, x)
    y = checkpoint(adapter, x, use_reentrant=reentrant)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape))
    for found, wanted in zip((x.grad, adapter.A.grad, adapter.B.grad), plain[1:], strict=True):
        assert torch.equal(found, wanted)


def test_no_parameter_and_no_key_beyond_those_of_lora():
    adapter = layer("token")
    assert adapter.state_dict().keys() == lora(adapter).state_dict().keys()
    adapter.load_state_dict(lora(adapter).state_dict())


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_share_outside_of_0_to_1_is_refused(p):
    with pytest.raises(ValueError, match=r"method.p must be in \[0, 1\)"):
        DropLoRA(p=p)


@pytest.mark.parametrize("mask", MASKS)
def test_the_mask_keeps_the_dtype(mask):
    adapter = layer(mask, dtype=torch.float32).train()
    adapter.codec, adapter.weight.data, adapter.bias.data = (
        Dense(torch.bfloat16),
        adapter.weight.bfloat16(),
        adapter.bias.bfloat16(),
    )
    y = adapter(inputs(2, 5, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and adapter.A.grad.dtype == torch.float32
    full = layer(mask, dtype=torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        z = full(inputs(2, 5, dtype=torch.float32))
    assert z.dtype == torch.bfloat16 and (z - y).norm() < 0.03 * y.norm()


@pytest.mark.parametrize("mask", MASKS)
def test_beside_dora_the_mask_works_and_lengths_are_those_of_all_pairs(mask):
    adapter, x = layer(mask, kind=DropDirectionAdapter).train(), inputs(2, 5)
    m = gate(adapter, x)
    v = adapter.weight + SCALE * adapter.B @ adapter.A
    length = adapter.magnitude / v.norm(dim=1).detach()
    h = (x.reshape(-1, N) @ adapter.A.T) * m
    wanted = (length * (x.reshape(-1, N) @ adapter.weight.T + SCALE * h @ adapter.B.T) + adapter.bias).view(2, 5, M)
    assert (m == 0).any()
    torch.testing.assert_close(adapter(x), wanted)
    leaves = (x, adapter.A, adapter.B, adapter.magnitude)
    g = torch.randn(2, 5, M, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(adapter(x), leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_of_two_dimensions_and_batches_that_ran_out_have_masks():
    adapter = layer("token")
    assert gate(adapter, inputs(7)).shape == (7, R)
    at(adapter, 0, [5])  # of three samples two are filling
    kept = gate(adapter, inputs(3, 4)).view(3, 4, R)
    at(adapter, 0, [9, 5])
    assert torch.equal(gate(adapter, inputs(3, 4)).view(3, 4, R)[1], kept[0]), "a sample has its mask wherever it is"


def test_a_hash_of_neighbours_has_no_pattern():
    bits = torch.stack([mix_bits(torch.arange(4096)) >> k & 1 for k in range(64)]).double()
    assert (bits.mean(1) - 0.5).abs().max() < 5 * 0.5 / 4096**0.5
    flips = torch.stack(
        [(mix_bits(torch.arange(4096)) ^ mix_bits(torch.arange(4096) ^ 1)) >> k & 1 for k in range(64)]
    ).double()
    assert (flips.mean(1) - 0.5).abs().max() < 5 * 0.5 / 4096**0.5, "one flipped bit flips half of them"


# --- over ranks -------------------------------------------------------------------------------------------------------


def told(method: Method, engine: str, dtype: str, accumulation: int) -> tuple[list[float], dict[str, Tensor]]:
    t = Trainee(method, engine, dtype, accumulation)
    return [t.step(step) for step in range(3)], t.values()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_do_not_depend_on_ranks_or_micro_batches(mask, use_dora):
    method = DropLoRA(rank=4, alpha=6, target_modules=TARGETS, mask=mask, use_dora=use_dora)
    losses, values = ranks.run(1, told, method, "plain", "fp32", 1)[0]
    plain, _ = ranks.run(1, told, LoRA(rank=4, alpha=6, target_modules=TARGETS), "plain", "fp32", 1)[0]
    assert losses[1:] != pytest.approx(plain[1:], rel=1e-4), "nothing was dropped"
    for engine, world, accumulation in (("fsdp", 3, 1), ("plain", 1, 3)):
        found, others = ranks.run(world, told, method, engine, "fp32", accumulation)[0]
        assert found == pytest.approx(losses, rel=1e-5)
        for name, value in values.items():
            assert (others[name] - value).norm() <= 1e-3 * value.norm(), name
