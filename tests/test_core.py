"""CORE against the form in which the bases themselves turn, its bases against the dense gradient, and its memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_lowrank.adapters.direction import Update
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.engines.frozen import persistent_size
from llm_lowrank.methods import core
from llm_lowrank.methods.core import Core, CoreLayer
from llm_lowrank.models import checkpoint
from llm_lowrank.numerics.spectrum import Triplets
from llm_lowrank.run.memory import sizes_of
from tests import ranks, tiny
from tests.tiny import CALIBRATION, Trainee, batch, llama, skeleton

M, N, P = 30, 20, 6
MODULES = ["k_proj", "up_proj", "down_proj"]
SIBLINGS = ["k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]  # down_proj shares with no other


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(size, P, seed=seed))[0]


def gradient_at(change: Tensor, target: Tensor, step: int) -> Tensor:
    """dL/dW of a quadratic loss with noise, at the change of W."""
    return change - target + 0.3 * random(M, N, seed=100 + step)


def ours(method: Core, U: Tensor, V: Tensor, target: Tensor, steps: int, rate: float) -> list[Tensor]:
    S, changes = torch.zeros(P, P, dtype=torch.float64), []
    memory = core.start(S[None])
    for step in range(steps):
        g = U.T @ gradient_at(U @ S @ V.T, target, step) @ V
        S = S - rate * method.step_along(g[None], memory, step)[0]
        changes.append(U @ S @ V.T)
    return changes


def turning_bases(method: Core, U: Tensor, V: Tensor, target: Tensor, steps: int, rate: float) -> list[Tensor]:
    """The same run with U, V and S turned for real, and Adam in the coordinates of S."""
    S, m, v = (torch.zeros(P, P, dtype=torch.float64) for _ in range(3))
    left, right, seen, changes = torch.zeros_like(S), torch.zeros_like(S), 0, []
    for step in range(steps):
        g = U.T @ gradient_at(U @ S @ V.T, target, step) @ V
        left, right, seen = left + g @ g.T, right + g.T @ g, seen + 1
        m = method.beta1 * m + (1 - method.beta1) * g
        v = method.beta2 * v + (1 - method.beta2) * g * g
        mean, second = m / (1 - method.beta1**seen), v / (1 - method.beta2**seen)
        S = S - rate * mean / (second.sqrt() + method.eps)
        changes.append(U @ S @ V.T)
        if (step + 1) % method.interval == 0:
            a, R_L = torch.linalg.eigh(left)
            b, R_R = torch.linalg.eigh(right)
            U, V, S = U @ R_L, V @ R_R, R_L.T @ S @ R_R
            K = method.interval
            second = a[:, None] * b[None] / (K * a.sum())
            second = second + 1e-3 * second.mean()
            m = R_L.T @ mean @ R_R * (1 - method.beta1**K)
            v, seen = second * (1 - method.beta2**K), K
            left, right = torch.zeros_like(S), torch.zeros_like(S)
    return changes


@pytest.mark.quick
@pytest.mark.parametrize("interval", [1, 4, 7])
def test_turning_the_optimizers_basis_is_turning_the_bases(interval):
    method, U, V, target = Core(interval=interval), orthonormal(M, 1), orthonormal(N, 2), random(M, N, seed=3)
    for found, wanted in zip(
        ours(method, U, V, target, 30, 1e-2), turning_bases(method, U, V, target, 30, 1e-2), strict=True
    ):
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-8


@pytest.mark.quick
def test_a_turn_after_steps_that_were_left_out_counts_those_that_were_made():
    gradients = [random(P, P, seed=step).double() for step in range(6)]
    memory = core.start(gradients[0][None])
    for step in (0, 1, 3, 5):  # the gradients of steps 2 and 4 were not finite
        Core(interval=6).step_along(gradients[step][None], memory, step)
    made = torch.stack([gradients[step] for step in (0, 1, 3, 5)])
    second = (made.transpose(1, 2) @ made).sum(0)
    assert float(memory["core_seen"]) == 4 and float(memory["core_taken"]) == 0
    turned = memory["core_Q_R"][0].T @ second @ memory["core_Q_R"][0]
    assert float((turned - turned.diag().diag()).norm() / turned.norm()) < 1e-12


@pytest.mark.quick
def test_without_a_turn_it_is_adam():
    method, U, V, target = Core(interval=1000), orthonormal(M, 1), orthonormal(N, 2), random(M, N, seed=3)
    S = torch.nn.Parameter(torch.zeros(P, P, dtype=torch.float64))
    adam = torch.optim.Adam([S], lr=1e-2)
    for step, found in enumerate(ours(method, U, V, target, 20, 1e-2)):
        S.grad = U.T @ gradient_at((U @ S @ V.T).detach(), target, step) @ V
        adam.step()
        torch.testing.assert_close(found, (U @ S @ V.T).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.quick
def test_a_layer_that_gets_no_gradient_stands_still():
    gradients = torch.stack([torch.zeros(P, P), random(P, P, seed=1)]).double()  # its neighbour gets one
    memory = core.start(gradients)
    for step in range(5):
        along = Core(interval=2).step_along(gradients, memory, step)
        assert not along[0].any() and along[1].any()
    assert all(value.isfinite().all() for value in memory.values())
    still, moved = memory["core_Q_L"] - torch.eye(P, dtype=torch.float64)
    assert not still.any() and moved.any()


@pytest.mark.quick
def test_what_is_remembered_is_what_the_dry_run_counts():
    memory = core.start(torch.zeros(1, P, P, dtype=torch.float64))
    assert sum(value.nbytes for value in memory.values()) == core.remembered(P)
    assert all(name.startswith("core_") for name in memory)


@pytest.mark.quick
@pytest.mark.parametrize(
    "settings, said",
    [
        ({"p": 0}, "method.p must be at least 1"),
        ({"interval": 0}, "method.interval must be at least 1"),
        ({"samples": -1}, "method.samples must be at least 0"),
        ({"beta2": 1.0}, "method.beta2 must be in"),
        ({"eps": 0.0}, "method.eps must be above 0"),
        ({"exchanges": [0, 4]}, "method.exchanges must be steps from 1 on in ascending order"),
        ({"exchanges": [4, 4]}, "method.exchanges must be steps from 1 on in ascending order"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Core(**settings)


def test_more_directions_than_the_weight_has_are_refused():
    with pytest.raises(ValueError, match=r"method\.p asks for p = 43, more than min\(m, n\) = 42"):
        Trainee(Core(p=43, target_modules=["q_proj"]), "plain")


def calibrated(engine: str, dtype: str = "fp32") -> dict[str, tuple[Tensor, Tensor]]:
    method = Core(p=5, samples=6, svd_niter=4, target_modules=MODULES)
    t = Trainee(method, engine, dtype)
    layers = [a for a in t.adapters if isinstance(a, CoreLayer)]
    return {a.name: (t.engine.whole(a.U).cpu(), t.engine.whole(a.Vt).cpu()) for a in layers}


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
def test_the_bases_are_the_leading_directions_of_the_dense_gradient(engine, world):
    model, tokens = llama("fp32"), batch(CALIBRATION)
    logits = model(input_ids=tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for found in ranks.run(world, calibrated, engine):
        assert len(found) == 2 * len(MODULES)
        for name, (U, Vt) in found.items():
            u, _, vt = torch.linalg.svd(model.get_submodule(name).weight.grad.double(), full_matrices=False)
            for ours_, dense in ((U.double(), u[:, :5]), (Vt.double().T, vt[:5].T)):
                torch.testing.assert_close(ours_.T @ ours_, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
                cosines = torch.linalg.svdvals(ours_.T @ dense)
                assert float(cosines.min()) >= 0.99, (name, cosines)


def shared(engine: str) -> dict[str, tuple[Tensor, Tensor]]:
    t = Trainee(Core(p=5, samples=6, svd_niter=4, share_v=True, target_modules=SIBLINGS), engine)
    return {a.name: (t.engine.whole(a.U).cpu(), t.engine.whole(a.right.Vt).cpu()) for a in t.adapters}


@pytest.mark.parametrize(
    "engine, world",
    [
        ("plain", 1),
        *(pytest.param(engine, world, marks=pytest.mark.wide) for engine, world in (("fsdp", 2), ("zero3", 3))),
    ],
)
def test_a_shared_v_has_the_leading_directions_of_all_that_read_it(engine, world):
    model, tokens = llama("fp32"), batch(CALIBRATION)
    logits = model(input_ids=tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {n: w.grad.double() for n, w in model.named_parameters() if w.grad is not None}
    for found in ranks.run(world, shared, engine):
        for name, (U, Vt) in found.items():
            parent, _, word = name.rpartition(".")
            words = next((words for words in core.READ_TOGETHER if word in words), (word,))
            found_of = [gradients[f"{parent}.{w}.weight"] for w in words if w in SIBLINGS]
            G = torch.cat([g / g.norm() for g in found_of])
            for ours_, grams in ((Vt.double().T, G.T @ G), (U.double(), (own := gradients[f"{name}.weight"]) @ own.T)):
                torch.testing.assert_close(ours_.T @ ours_, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-5)
                energy, most = (ours_.T @ grams @ ours_).trace(), torch.linalg.eigvalsh(grams)[-5:].sum()
                assert 0.998 <= energy / most <= 1 + 1e-6, (name, energy, most)  # the fifth and sixth may be as large


@pytest.mark.quick
def test_the_leading_directions_of_several_matrices_are_those_of_the_sum_of_their_covariances():
    matrices = [random(M, N, seed=1), 3 * random(M - 4, N, seed=2), random(2, N, seed=3)]
    triplets = [Triplets(u, s, vt.T) for u, s, vt in (torch.linalg.svd(G, full_matrices=False) for G in matrices)]
    wanted = torch.linalg.eigh(sum(G.T @ G / G.square().sum() for G in matrices))[1][:, -P:]
    found = core.leading(triplets, P)
    torch.testing.assert_close(found.T @ found, torch.eye(P, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T)


def attached(method: Core, **changes: object) -> tuple[torch.nn.Module, list[CoreLayer]]:
    model = skeleton("fp32", **changes)
    return model, [a for a in attach(model, method, Dense(torch.float32)) if isinstance(a, CoreLayer)]


def test_what_shares_a_v_reads_the_same_x():
    t, read = Trainee(Core(p=5, samples=0, share_v=True), "plain"), {}
    for layer in t.adapters:
        layer.register_forward_pre_hook(lambda module, args: read.setdefault(module.right, []).append(args[0]))
    t.logits()
    readers = [len(inputs) for basis, inputs in read.items() if isinstance(basis, core.Basis)]
    assert readers == [3, 2] * 2 and len(read) == 2 * 4
    assert all(x is inputs[0] for inputs in read.values() for x in inputs)


def test_one_v_is_held_where_three_were():
    (plain, _), (model, layers) = attached(Core(p=5)), attached(Core(p=5, share_v=True))
    held = sum(size for size, _ in sizes_of(plain, Core(p=5)).bank) - sum(
        size for size, _ in sizes_of(model, Core(p=5, share_v=True)).bank
    )
    assert held == 2 * (2 + 1) * 5 * 42  # two of q, k, v and one of gate and up, in each of two layers
    assert len({id(layer.right) for layer in layers}) == 2 * 4
    # no basis stays gathered between its uses
    assert persistent_size(model) == persistent_size(plain) == 5 * 5


def test_modules_of_another_p_keep_their_own_v():
    _, layers = attached(Core(like_rank=2, share_v=True))
    sharing = {layer.name.rpartition(".")[2] for layer in layers if layer.right is not layer}
    assert sharing == {"k_proj", "v_proj", "gate_proj", "up_proj"}  # the p of q is another one
    with pytest.raises(ValueError, match=r"method\.share_v: no two of the adapted modules share a V"):
        attached(Core(p=5, share_v=True, target_modules=["q_proj", "up_proj"]))


EXCHANGE, LAST = 3, 6
SAVED = (2, EXCHANGE, 4)  # before, at and after the exchange


def exchanging(into: str, exchanges: tuple[int, ...] = (EXCHANGE,)) -> Core:
    """into: weight or bank, and `-shared` with a V that several modules share."""
    where, _, shares = into.partition("-")
    settings = dict(exchanges=list(exchanges), into=where, share_v=bool(shares))
    return Core(p=5, samples=6, interval=2, target_modules=SIBLINGS if shares else MODULES, **settings)


def train(t: Trainee, start: int, folder: Path | None = None) -> dict[str, Tensor]:
    """Make the steps from `start` on, with the exchange, and return all values. In a folder SAVED are saved."""
    for step in range(start, LAST):
        t.step(step)
        if step + 1 in t.method.schedule(LAST):
            t.exchange(step + 1)
        if folder is not None and step + 1 in SAVED:
            t.save(folder / str(step + 1), step + 1)
    return t.values()


def resumed(engine: str, into: str, folder: str) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    whole = train(Trainee(exchanging(into), engine), 0, Path(folder))
    return continued(engine, into, folder), whole


def continued(engine: str, into: str, folder: str) -> list[dict[str, Tensor]]:
    saved = [checkpoint.newest(Path(folder) / str(step))[0] for step in SAVED]
    return [train(Trainee(exchanging(into), engine, resume_from=s), s.step) for s in saved]


@pytest.mark.parametrize(
    "engine, world, into",
    [
        ("plain", 1, "weight"),
        ("zero2", 2, "bank"),
        ("zero3", 2, "bank"),
        ("fsdp", 2, "weight"),
        ("plain", 1, "bank-shared"),
        pytest.param("fsdp", 2, "bank-shared", marks=pytest.mark.wide),
        pytest.param("zero3", 3, "bank-shared", marks=pytest.mark.wide),
    ],
)
def test_a_run_resumed_before_at_and_after_an_exchange_is_the_uninterrupted_one_bitwise(engine, world, into, tmp_path):
    for found, whole in ranks.run(world, resumed, engine, into, str(tmp_path)):
        for values in found:
            assert all(torch.equal(values[name], value) for name, value in whole.items())
        assert any(value.any() for name, value in whole.items() if name.endswith(".S"))


@pytest.mark.parametrize("engine, world", [pytest.param("zero3", 3, marks=pytest.mark.wide), ("fsdp", 2)])
def test_another_engine_resumes_before_at_and_after_an_exchange(engine, world, tmp_path):
    _, whole = resumed("plain", "bank", str(tmp_path))
    changes = changes_in(whole)
    for values in ranks.run(world, continued, engine, "bank", str(tmp_path))[0]:
        for name, change in changes_in(values).items():
            assert relative(change, changes[name]) <= 1e-4, name


def changes_in(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of W by module, of the core and of the bank."""
    names = {name.rpartition(".")[0] for name in values}
    at = {name: [values[f"{name}.{p}"].double() for p in ("U", "S", "Vt", "bank_B", "bank_A")] for name in names}
    return {name: U @ S @ Vt + B @ A for name, (U, S, Vt, B, A) in at.items()}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().double().norm() / wanted.detach().double().norm())


def maps(t: Trainee) -> dict[str, Tensor]:
    return t.probe()[1]


def begun_anew(engine: str, into: str) -> tuple[dict[str, Tensor], ...]:
    """By module: the map at the exchange, its change by the steps behind it, and the change that the same steps make in
    a new run over a weight that is this map.
    """
    t = Trainee(exchanging(into), engine)
    for step in range(EXCHANGE):
        t.step(step)
    t.exchange(EXCHANGE)
    start = maps(t)
    for step in range(EXCHANGE, LAST):
        t.step(step)
    went = {name: w - start[name] for name, w in maps(t).items()}
    state = llama().state_dict() | {f"{name}.weight": w.float() for name, w in start.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "llama", lambda *_, **__: loaded(state))
        patch.setattr(tiny, "CALIBRATION", CALIBRATION + EXCHANGE)  # the samples that come after the exchange
        new = Trainee(exchanging(into, ()), engine)
    before = maps(new)
    for step in range(EXCHANGE, LAST):
        new.forward_backward(step)
        new.update(step - EXCHANGE)  # which is its step number
    return start, went, {name: w - before[name] for name, w in maps(new).items()}


def loaded(state: dict[str, Tensor]) -> torch.nn.Module:
    model = llama()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(
    "engine, world, into",
    [
        ("plain", 1, "weight"),
        ("plain", 1, "bank"),
        ("zero3", 3, "bank"),
        ("fsdp", 2, "weight"),
        ("plain", 1, "weight-shared"),
        pytest.param("zero3", 3, "bank-shared", marks=pytest.mark.wide),
    ],
)
def test_behind_an_exchange_the_run_is_a_new_run_over_the_changed_weights(engine, world, into):
    for start, went, wanted in ranks.run(world, begun_anew, engine, into):
        for name, change in wanted.items():
            moved = relative(start[name], llama().get_submodule(name).weight.double())
            assert moved > 1e-3 and float(change.norm()) > 0, name
            assert relative(went[name], change) <= 1e-3, name


def test_random_bases_are_drawn_anew_at_an_exchange():
    t = Trainee(replace(exchanging("bank"), samples=0), "plain")
    before = t.values()
    train(t, 0)
    for name, value in t.values().items():
        if name.endswith((".U", ".Vt")):
            columns = value if name.endswith(".U") else value.T
            torch.testing.assert_close(columns.T @ columns, torch.eye(5))
            assert not torch.equal(value, before[name]), name


def test_an_exchange_that_leaves_nothing_to_train_or_cannot_be_stored_is_refused():
    with pytest.raises(ValueError, match=r"method\.exchanges names step 8, and the run has 8 steps"):
        Core(exchanges=[4, 8]).schedule(8)
    with pytest.raises(ValueError, match=r"method\.into: weight cannot be used with codec: nf4"):
        Trainee(exchanging("weight"), "plain", "nf4")


def test_as_many_parameters_as_a_lora_of_that_rank():
    t = Trainee(Core(like_rank=4, samples=0), "plain")
    for adapter in t.adapters:
        m, n = adapter.shape
        assert adapter.S.shape == (p := math.isqrt(4 * (m + n)), p)
        assert p * p <= 4 * (m + n) < (p + 1) ** 2


class Counted(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.quick
def test_the_modules_of_a_layer_step_in_one_go():
    def operators(count: int) -> Counter[str]:
        layers = [
            core.CoreLayer(str(i), torch.nn.Linear(16, 16), Dense(torch.float32), 0, P, Core(interval=2))
            for i in range(count)
        ]
        update = Update(0, 1.0, 1e-3, 0.0)
        for step in (0, 1):  # the first one makes the memory, the second one turns
            gradients = [{"S": random(P, P, seed=10 * step + i).float()} for i in range(count)]
            with Counted() as counted:
                core.CoreLayer.direct_together(layers, [{}] * count, gradients, [replace(update, step=step)] * count)
        assert all(layer.memory["core_m"].any() for layer in layers)
        return counted.counts

    two, six = operators(2), operators(6)
    for views in ("select", "unbind", "detach"):  # of no kernel
        two.pop(views, None), six.pop(views, None)
    assert two == six, six - two
