"""LoRA-Squeeze (https://arxiv.org/abs/2602.10993) against an independent SVD."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.squeeze import Squeeze
from llm_lowrank.models import checkpoint
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, twice each
S, STEPS = 1.5, 6
METHOD = Squeeze(rank=6, alpha=9, target_rank=2, target_modules=MODULES)  # 6, 3, 2
SQUEEZED = {2: 3, 4: 2}  # steps done -> pairs left
ENGINES = [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


def step_(t: Trainee, step: int, total: int = STEPS) -> Exchanged | None:
    t.step(step)
    if step + 1 not in t.method.schedule(total):
        return None
    return measure_exchange(t.engine, lambda: t.method.exchange(t.adapters, t.engine, step + 1, t.total), True)


def product(values: dict[str, Tensor], name: str) -> Tensor:
    return values[f"{name}.B"].double() @ values[f"{name}.A"].double()


@dataclass
class Told:
    squeezes: dict[int, tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Exchanged]]
    end: dict[str, Tensor]
    live: list[float]
    exported: dict[str, Tensor]


def tell(engine: str, dtype: str, folder: str, moments: str = "seeded") -> Told:
    t = Trainee(
        replace(METHOD, moments=moments), engine, dtype, total=STEPS, optimization=dict(optim="adamw", weight_decay=0.1)
    )
    squeezes, live = {}, []
    for step in range(STEPS):
        t.step(step)
        if step + 1 in METHOD.schedule(STEPS):
            before = t.values(), t.moments()
            event = t.method.exchange(t.adapters, t.engine, step + 1, t.total)
            squeezes[step + 1] = (before[0], t.values(), before[1], t.moments(), event)
        live.append(t.method.metrics(t.adapters, t.engine)["live_pairs"])
    save_adapter(t.engine, t.adapters, method=t.method, path=folder, base_model_name_or_path="base")
    exported = load_file(Path(folder) / "adapter_model.safetensors") if t.engine.main else {}
    return Told(squeezes, t.values(), live, exported)


@pytest.mark.parametrize("engine, world", ENGINES)
def test_a_squeeze_is_the_best_of_its_rank_and_idle_pairs_stay_idle(engine, world, tmp_path):
    for told in ranks.run(world, tell, engine, "nf4" if engine == "zero3" else "fp32", str(tmp_path)):
        names = sorted({key.rpartition(".")[0] for key in told.end})
        assert len(names) == 4 and set(told.squeezes) == set(SQUEEZED) and told.live == [24, 12, 12, 8, 8, 8]
        for done, (before, after, old, new, event) in told.squeezes.items():
            left, lost = SQUEEZED[done], []
            for name in names:
                u, s, vt = torch.linalg.svd(product(before, name), full_matrices=False)
                best = (u[:, :left] * s[:left]) @ vt[:left]
                assert float((product(after, name) - best).norm() / best.norm()) <= 1e-6
                A, B = after[f"{name}.A"], after[f"{name}.B"]
                torch.testing.assert_close(A[:left].norm(dim=1), B[:, :left].norm(dim=0))  # balanced
                assert not A[left:].any() and not B[:, left:].any()
                lost.append(float(s[left:].norm() / s.norm()))
                live = 6 if done == 2 else 3
                for k, m in ((k, m if ".A." in k else m.T) for k, m in new.items() if k.startswith(f"{name}.")):
                    was = old[k] if ".A." in k else old[k].T
                    mean = was[:live].mean() if k.endswith("exp_avg_sq") else torch.zeros(())
                    torch.testing.assert_close(m[:left], mean.expand(m[:left].shape), rtol=1e-5, atol=0)
                    assert not m[left:].any()
            assert event.lost == pytest.approx(max(lost), rel=1e-4) and max(lost) > 0.01
            assert event.meant and event.modules == 4 and event.pairs == 4 * live and event.drift > 0
        for name in names:
            A, B = told.end[f"{name}.A"], told.end[f"{name}.B"]
            assert not A[2:].any() and not B[:, 2:].any()
            assert not torch.equal(A[:2], told.squeezes[4][1][f"{name}.A"][:2]), "live pairs learn on"
            if told.exported:
                a, b = (told.exported[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
                assert len(a) == b.shape[1] == 2
                torch.testing.assert_close((b @ a).double(), S * product(told.end, name), rtol=1e-5, atol=1e-7)


def test_moments_may_be_zeroed(tmp_path):
    for _, _, old, new, _ in ranks.run(1, tell, "plain", "fp32", str(tmp_path), "zeroed")[0].squeezes.values():
        assert all(m.any() for m in old.values()) and not any(m.any() for m in new.values())


def part(engine: str, folder: str, first: int, last: int, save: bool) -> dict[str, Tensor]:
    t = Trainee(METHOD, engine, "nf4", total=STEPS, resume_from=checkpoint.newest(Path(folder))[0] if first else None)
    for step in range(first, last):
        step_(t, step)
    if save:
        t.save(Path(folder), last)
    return t.values()


@pytest.mark.parametrize("at", [1, 2, 3, 4])  # inside of a stage, and exactly at a squeeze
def test_a_resume_goes_on_bitwise(at, tmp_path):
    whole = part("plain", str(tmp_path), 0, STEPS, False)
    part("plain", str(tmp_path), 0, at, True)
    resumed = part("plain", str(tmp_path), at, STEPS, False)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("engine, world", ENGINES[2:])
def test_a_resume_on_other_engines_squeezes_alike(engine, world, tmp_path):
    whole = part("plain", str(tmp_path), 0, STEPS, False)
    ranks.run(world, part, engine, str(tmp_path), 0, 3, True)
    resumed = part("plain", str(tmp_path), 3, STEPS, False)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5)


def test_without_a_lower_rank_it_is_lora_bitwise():
    settings = dict(rank=4, alpha=6, target_modules=MODULES)
    method = Squeeze(target_rank=4, **settings)
    assert method.schedule(STEPS) == ()
    ours, lora = Trainee(method, "plain"), Trainee(LoRA(**settings), "plain")
    assert [ours.step(step) for step in range(3)] == [lora.step(step) for step in range(3)]
    for (name, value), (_, wanted) in zip(ours.values().items(), lora.values().items(), strict=True):
        assert torch.equal(value, wanted), name


def test_a_module_of_another_rank_is_squeezed_in_proportion():
    t = Trainee(replace(METHOD, rank_pattern={"k_proj": 3, "layers.1.mlp.up_proj": 8}), "plain", total=STEPS)
    assert [a.rank for a in t.adapters] == [3, 6, 3, 8]
    for step in range(STEPS):
        step_(t, step)
    assert [int(t.engine.whole(a.B).any(0).sum()) for a in t.adapters] == [1, 2, 1, 3]  # of 2 / 6, rounded up
    assert t.method.metrics(t.adapters, t.engine) == {"live_pairs": 7}


def test_pairs_that_a_product_does_not_need_can_still_learn():
    t = Trainee(METHOD, "plain", total=STEPS)
    event = t.method.exchange(t.adapters, t.engine, 2, t.total)  # B is zero
    assert (event.lost, event.drift) == (0, 0)
    for a in t.adapters:
        assert a.A[:3].any(1).all() and not a.A[3:].any() and not a.B.any()
    t.step(0)
    assert all(a.B[:, :3].any(0).all() and not a.B[:, 3:].any() for a in t.adapters)


@pytest.mark.quick
def test_settings():
    assert Squeeze().ranks() == (32, 16, 8) and Squeeze(rank=64, squeezes=3).ranks() == (64, 32, 16, 8)
    assert Squeeze().schedule(12) == (4, 8) and Squeeze(squeezes=1).schedule(7) == (4,)
    for wrong, message in (
        (dict(target_rank=33), r"method\.target_rank must be between 1 and method\.rank \(32\), not 33"),
        (dict(squeezes=0), r"method\.squeezes must be at least 1, not 0"),
        (dict(rank=4, target_rank=3), r"a squeeze would cut nothing, the ranks are 4, 3, 3; lower squeezes"),
    ):
        with pytest.raises(ValueError, match=message):
            Squeeze(**wrong)
    with pytest.raises(ValueError, match="2 squeezes do not fit into 2 steps"):
        Squeeze().schedule(2)
