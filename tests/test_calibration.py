"""Before the first step: products with dL/dW from probes, and a calibration that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, generator
from llm_lowrank.adapters.probes import probe_bytes, probe_columns, probe_rows, read, top_directions
from llm_lowrank.codecs import Dense
from llm_lowrank.data import IGNORE, Batches, Example
from llm_lowrank.engines import Engine
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.run.calibration import first_samples
from tests import ranks
from tests.test_engines import CASES, SAMPLES, every_engine, trainee
from tests.tiny import CALIBRATION, Trainee, batch, llama

METHOD = LoRA(rank=3, alpha=6, dropout=0.5)  # s = 2
COLUMNS = 5


def factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Of the products with G: X (n, k), Y (m, k)."""
    random, (m, n) = generator(3, adapter.name), adapter.shape
    return torch.randn(n, COLUMNS, generator=random), torch.randn(m, COLUMNS, generator=random)


def dense_gradients(weights: dict[str, Tensor], step: int, samples: int = SAMPLES, **changes: object) -> dict:
    """dL/dW of every module by autograd, of a plain model with these weights."""
    model = llama(**changes)
    for name, w in weights.items():
        model.get_submodule(name).weight = nn.Parameter(w.clone())
    tokens = batch(step, samples)
    logits = model(input_ids=tokens, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: model.get_submodule(name).weight.grad for name in weights}


# --- products with the gradient ---------------------------------------------------------------------------------------


def products(name: str, dtype: str, checkpointing: str = "") -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    t = trainee(name, method=METHOD, dtype=dtype, accumulation=2)
    if checkpointing:
        t.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": checkpointing == "reentrant"}
        )
        t.model.enable_input_require_grads()
    named = [(n, id(p), p.requires_grad) for n, p in t.model.named_parameters()]
    found = {}
    for once_more in (False, True):  # a second time: the first has left nothing behind
        x, y = zip(*map(factors, t.adapters), strict=True)
        columns = [probe_columns(a, f) for a, f in zip(t.adapters, x, strict=True)]
        rows = [probe_rows(a, f) for a, f in zip(t.adapters, y, strict=True)]
        t.forward_backward(0)
        right, left = read(t.engine, columns), read(t.engine, rows)
        t.engine.forget()
        assert not any(a.probes for a in t.adapters)
        for a, *both in zip(t.adapters, right, left, strict=True):
            assert not once_more or all(map(torch.equal, found[a.name], both))
            found[a.name] = both
    assert named == [(n, id(p), p.requires_grad) for n, p in t.model.named_parameters()]
    return found, t.weights()


def check_products(found: dict[str, list[Tensor]], weights: dict[str, Tensor]) -> None:
    for name, gradient in dense_gradients(weights, 0, num_hidden_layers=1).items():
        x, y = factors(_Named(name, gradient.shape))
        for product, wanted in zip(found[name], (gradient @ x, gradient.T @ y), strict=True):
            assert (product - wanted).norm() <= 1e-5 * wanted.norm(), name


@dataclass
class _Named:
    name: str
    shape: tuple[int, int]


@pytest.mark.parametrize(
    "name, world, dtype",
    [*((*case, "fp32") for case in CASES), ("plain", 2, "nf4"), ("zero3", 3, "nf4"), ("fsdp", 2, "nf4")],
)
def test_probes_are_products_with_the_gradient_of_the_whole_batch(name, world, dtype):
    """Over ranks and two micro-batches, without dropout, and the same on every rank."""
    answers = ranks.run(world, products, name, dtype)
    for found, weights in answers:
        check_products(found, weights)
        assert all(torch.equal(a, b) for n in found for a, b in zip(found[n], answers[0][0][n], strict=True))


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("case", [("plain", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2)], ids=lambda case: case[0])
def test_probes_under_gradient_checkpointing(case, checkpointing):
    name, world = case
    if name == "fsdp" and checkpointing == "reentrant":
        pytest.skip("FSDP2 is for checkpointing that is not reentrant")
    check_products(*ranks.run(world, products, name, "fp32", checkpointing)[0])


def test_a_probe_changes_no_answer_and_no_gradient():
    adapter, x = one_layer(), torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def answer() -> list[Tensor]:
        y = adapter(x)
        return [y, *torch.autograd.grad(y.square().sum(), (x, adapter.A, adapter.B))]

    plain = answer()
    probes = [probe_columns(adapter, torch.randn(12, 3)), probe_rows(adapter, torch.randn(9, 3))]
    assert all(map(torch.equal, answer(), plain)) and len(adapter.probes) == len(probes)


def one_layer(method: LoRA = LoRA(rank=2)) -> PairAdapter:  # noqa: B008 - frozen
    torch.manual_seed(0)
    adapter = method.build("layer", nn.Linear(12, 9), Dense(torch.float32), 0)
    for p in (adapter.A, adapter.B):
        p.data = torch.randn(p.shape)
    return adapter


def test_beside_trained_row_lengths_there_is_no_probe():
    adapter = one_layer(DoRA(rank=2))
    with pytest.raises(AssertionError, match="beside trained row lengths"):
        probe_columns(adapter, torch.randn(12, 3))


# --- its largest directions -------------------------------------------------------------------------------------------


def directions(name: str, niter: int) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], int]:
    t = trainee(name, method=METHOD, accumulation=2)
    passes = 0

    def backward() -> None:
        nonlocal passes
        passes += 1
        t.forward_backward(0)
        t.engine.forget()

    found = top_directions(
        t.adapters, t.engine, backward, [4] * len(t.adapters), columns=[8] * len(t.adapters), niter=niter
    )
    return {a.name: tuple(triplets) for a, triplets in zip(t.adapters, found, strict=True)}, passes


def test_the_largest_directions_are_those_of_the_dense_gradient_on_any_engine():
    first, passes = ranks.run(1, directions, "plain", 8)[0]
    assert passes == 2 * 8 + 2
    weights = {name: w.float() for name, w in trainee("plain", method=METHOD).weights().items()}
    for name, gradient in dense_gradients(weights, 0, num_hidden_layers=1).items():
        u, s, vt = torch.linalg.svd(gradient.double())
        found_u, found_s, found_v = (t.double() for t in first[name])
        torch.testing.assert_close(found_s, s[:4], rtol=1e-4, atol=0)
        approximated = found_u * found_s @ found_v.T
        best = u[:, :4] * s[:4] @ vt[:4]
        assert (approximated - best).norm() <= 1e-3 * best.norm(), name
    for name, world in (("plain", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 3)):
        answers = [found for found, _ in ranks.run(world, directions, name, 8)]
        for module in first:
            for one, other in zip(answers[0][module], answers[-1][module], strict=True):
                assert torch.equal(one, other), "every rank has rank 0's"
            for one, other in zip(answers[0][module], first[module], strict=True):
                assert (one - other).norm() <= 1e-3 * other.norm(), (name, module)


def test_a_gradient_that_is_not_finite_is_refused_by_the_name_of_its_module():
    t = trainee("plain", method=METHOD)

    def backward() -> None:
        t.forward_backward(0)
        t.engine.forget()
        t.adapters[2].probes[0][1].grad.fill_(torch.nan)

    with pytest.raises(ValueError, match=rf"{t.adapters[2].name}: the gradient of the calibration samples is not fin"):
        top_directions(t.adapters, t.engine, backward, [2] * 7, columns=[4] * 7, niter=1)


def test_the_memory_of_probes_is_what_they_hold():
    adapter = one_layer()
    for width, place, size in ((5, probe_columns, 12), (5, probe_rows, 9)):
        probe = place(adapter, torch.randn(size, width))
        held = probe.product.A.nbytes + probe.product.B.nbytes + probe.leaf.nbytes  # its gradient is as large
        assert held <= probe_bytes([adapter], [width]) and (place is probe_rows) == (
            held == probe_bytes([adapter], [width])
        )


# --- nothing is left behind -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Looking(LoRA):
    """LoRA that looks at gradients first and does nothing with them."""

    passes: int = 0
    seen: list[Tensor] = field(default_factory=list)

    @property
    def calibration(self) -> int:
        return SAMPLES if self.passes else 0

    def calibrate(self, adapters: list[Adapter], engine: Engine, backward: Callable[[], None]) -> None:
        for _ in range(self.passes):
            probes = [probe_columns(adapter, factors(adapter)[0].to(engine.device)) for adapter in adapters]
            backward()
            self.seen.append(torch.cat([product.flatten() for product in read(engine, probes)]))
        assert all(torch.equal(seen, self.seen[0]) for seen in self.seen), "a pass repeats the one before"
        assert self.seen[0].any()


def story(name: str, optim: str, passes: int) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], list[float]]:
    torch.manual_seed(5)  # dropout and attention draw
    t = trainee(
        name,
        method=Looking(rank=3, alpha=6, dropout=0.1, passes=passes),
        accumulation=2,
        max_grad_norm=0.1,
        optimization=dict(optim=optim, betas=(0.9, 0.99)),
        attention_dropout=0.2,
    )
    return [t.step(step) for step in range(3)], t.values(), t.moments(), torch.rand(3).tolist()


@every_engine
def test_a_calibration_changes_nothing_bitwise(case):
    check_unchanged(*case, "adamw")


@pytest.mark.parametrize("optim", ["lion", "sgd", "sgd_momentum"])
@pytest.mark.parametrize("case", [("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)], ids=lambda case: case[0])
def test_a_calibration_changes_nothing_bitwise_with_any_optimizer(case, optim):
    check_unchanged(*case, optim)


def check_unchanged(name: str, world: int, optim: str) -> None:
    plain, looked = (ranks.run(world, story, name, optim, passes) for passes in (0, 2))
    for (losses, values, moments, drawn), found in zip(plain, looked, strict=True):
        assert found[0] == losses and found[3] == drawn
        for wanted, other in ((values, found[1]), (moments, found[2])):
            assert wanted.keys() == other.keys()
            assert all(torch.equal(other[key], value) for key, value in wanted.items())


def test_a_method_that_saw_no_samples_answers_and_does_not_train(monkeypatch):
    monkeypatch.setattr("tests.tiny.calibrate_on", lambda *_: None)
    t = trainee("plain", method=Looking(rank=3, passes=1))
    assert t.logits().isfinite().all()
    with pytest.raises(RuntimeError, match="Looking has seen no calibration samples yet"):
        t.step(0)


# --- which samples ----------------------------------------------------------------------------------------------------


def examples(count: int) -> list[Example]:
    """Example i has i + 2 tokens, so that its labels name it."""
    return [Example([7] * (i + 2), [IGNORE] + [i] * (i + 1)) for i in range(count)]


def batches(rank: int, world: int, per_device: int, accumulation: int, **settings: Any) -> Batches:
    return Batches(
        examples(23), per_device, pad_id=0, accumulation=accumulation, rank=rank, world=world, seed=4, **settings
    )


@pytest.mark.parametrize("count", [1, 5, 8, 12, 23, 40])
@pytest.mark.parametrize("per_device, accumulation, world", [(1, 1, 1), (3, 2, 1), (2, 1, 3), (1, 2, 2)])
def test_the_samples_are_the_first_of_the_run_however_a_batch_is_cut(count, per_device, accumulation, world):
    order = [int(row) for row in batches(0, 1, 23, 1)._order(0)]
    assert sampled(count, per_device, accumulation, world, done=0) == sorted(order[:count])


def sampled(count: int, per_device: int, accumulation: int, world: int, done: int) -> list[int]:
    found: list[int] = []
    for rank in range(world):
        micros = first_samples(batches(rank, world, per_device, accumulation), count, done)
        assert len(micros) % accumulation == 0, "whole steps"
        found += [int(labels[1]) for micro in micros for labels in micro.labels if (labels != IGNORE).any()]
    return sorted(found)


@pytest.mark.parametrize("per_device, accumulation, world", [(6, 1, 1), (3, 2, 1), (2, 1, 3), (3, 1, 2)])
def test_after_some_steps_the_samples_are_those_that_come_next(per_device, accumulation, world):
    order, then = ([int(row) for row in batches(0, 1, 23, 1)._order(epoch)] for epoch in (0, 1))
    assert sampled(8, per_device, accumulation, world, done=1) == sorted(order[6:14])
    # the last step of an epoch has 5 samples and an empty row, which counts
    assert sampled(8, per_device, accumulation, world, done=3) == sorted(order[18:] + then[:2])


def test_the_batches_of_the_run_keep_their_labels():
    run = batches(0, 1, 4, 1)
    first_samples(run, 1)
    assert all((labels != IGNORE).any() for labels in run.step(0)[0].labels)


def calibrated(name: str, accumulation: int) -> Tensor:
    t = trainee(name, method=(method := Looking(rank=3, passes=1)), accumulation=accumulation)
    assert isinstance(t, Trainee)
    return method.seen[0]


def test_a_calibration_does_not_depend_on_ranks_or_micro_batches():
    first = ranks.run(1, calibrated, "plain", 1)[0]
    weights = trainee("plain", method=METHOD).weights()
    gradients = dense_gradients(weights, CALIBRATION, num_hidden_layers=1)
    wanted = [(g @ factors(_Named(name, g.shape))[0]).flatten() for name, g in gradients.items()]
    assert (first - torch.cat(wanted)).norm() <= 1e-5 * first.norm()
    for name, world, accumulation in (("plain", 1, 3), ("plain", 3, 2), ("zero3", 2, 2), ("fsdp", 3, 1)):
        found = ranks.run(world, calibrated, name, accumulation)[0]
        assert (found - first).norm() <= 1e-5 * first.norm()
