"""COLA (https://arxiv.org/abs/2401.04151): a chain of LoRAs, each with the recipe's whole schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Dense, Nf4
from llm_lowrank.methods.cola import COLA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, batch, llama

SETTINGS = dict(rank=4, alpha=6, target_modules=["k_proj", "up_proj"])  # 14 x 42 and 43 x 42, twice each
METHOD, STEPS = COLA(links=3, **SETTINGS), 6
ENGINES = [("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


def lived(
    method: Method, engine: str, into: str, folder: str = "", first: int = 0, last: int = STEPS, save: bool = False
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], float]:
    resumed = checkpoint.newest(Path(folder))[0] if first else None
    method = replace(method, into=into) if into else method
    t, losses, drift = Trainee(method, engine, total=STEPS, resume_from=resumed), [], 0.0
    for step in range(first, last):
        losses.append(t.step(step))
        if step + 1 in method.schedule(STEPS):
            before = t.logits()
            event = method.exchange(t.adapters, t.engine, step + 1, t.total)
            assert event is not None and event.lost <= 1e-5
            drift = max(drift, float((t.logits() - before).norm() / before.norm()))
            assert not any(t.engine.whole(a.B).any() for a in t.adapters)
    if save:
        t.save(Path(folder), last)
    return losses, t.values(), t.weights(), drift


@pytest.mark.parametrize("into", ["weight", "bank"])
def test_links_are_relora_with_their_interval(into):
    """At a constant rate: what is COLA's own is the rate."""
    relora = ReLoRA(interval=2, restart_warmup=0, moments="seeded", bank_pairs=8, **SETTINGS)
    found, wanted = lived(METHOD, "plain", into), lived(relora, "plain", into)
    assert found[0] == wanted[0] and 0 < found[3] <= 1e-6
    for mine, other in zip(found[1:3], wanted[1:3], strict=True):
        assert mine.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in mine.items())


def test_one_link_is_lora_bitwise():
    found = lived(COLA(links=1, **SETTINGS), "plain", "auto")
    wanted = lived(LoRA(**SETTINGS), "plain", "")
    assert found[0] == wanted[0]
    assert found[1].keys() == wanted[1].keys() and all(torch.equal(v, wanted[1][k]) for k, v in found[1].items())


@pytest.mark.quick
def test_each_link_has_the_whole_schedule_of_the_rate():
    def rates(method: COLA, total: int) -> list[float]:
        return [method.rates((), step, total, float)[0] for step in range(total)]

    assert rates(COLA(links=1), 7) == list(range(7))
    assert rates(COLA(links=3), 12) == [0, 3, 6, 9] * 3
    assert COLA(links=3).schedule(7) == (2, 5) and rates(COLA(links=3), 7) == [0, 3, 0, 2, 4, 0, 3]
    assert COLA(b_rate=4.0).rates((), 1, 4, float) == [2, 8]


@pytest.mark.quick
def test_the_bank_has_room_for_all_links_but_the_last():
    layer = torch.nn.Linear(42, 43)
    for links, dtype, room in (
        (3, Nf4(torch.float32), 8),
        (1, Nf4(torch.float32), None),
        (3, Dense(torch.float32), None),
    ):
        built = COLA(links=links, rank=4).build("layer", layer, dtype, 0)
        assert (None if built.bank_A is None else len(built.bank_A)) == room
    assert COLA(links=4, rank=4, bank_pairs=6).bank_of(8) == 12


@pytest.mark.parametrize("engine, world", ENGINES)
def test_sharded_equals_one_process_and_resumes_elsewhere(engine, world, tmp_path):
    wanted = lived(METHOD, "plain", "bank")
    found = ranks.run(world, lived, METHOD, engine, "bank", str(tmp_path), 0, 4, True)[0]  # at a knot
    resumed = lived(METHOD, "plain", "bank", str(tmp_path), 4)
    assert [*found[0], *resumed[0]] == pytest.approx(wanted[0], rel=5e-6)
    for name, value in wanted[1].items():
        torch.testing.assert_close(resumed[1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resume_goes_on_bitwise(at, tmp_path):
    whole = lived(METHOD, "plain", "weight")
    lived(METHOD, "plain", "weight", str(tmp_path), 0, at, True)
    resumed = lived(METHOD, "plain", "weight", str(tmp_path), at)
    assert whole[0][at:] == resumed[0]
    for mine, other in zip(whole[1:3], resumed[1:3], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in mine.items())


# --- XGBLoRA: links of a few layers -----------------------------------------------------------------------------------

BOOSTED = COLA(links=6, layers_per_link=1, **{**SETTINGS, "rank": 1})


def boosted(engine: str, folder: str = "", first: int = 0, last: int = STEPS, save: bool = False) -> tuple:
    """One step for each link, over nf4: the values after each step, the modules that each link trains, the bank."""
    resumed = checkpoint.newest(Path(folder))[0] if first else None
    t = Trainee(BOOSTED, engine, "nf4", total=STEPS, resume_from=resumed, optimization={"weight_decay": 0.1})
    seen = []
    for step in range(first, last):
        t.step(step)
        seen.append(t.values())
        if step + 1 in BOOSTED.schedule(STEPS):
            before = t.logits()
            event = BOOSTED.exchange(t.adapters, t.engine, step + 1, t.total)
            assert float((t.logits() - before).norm() / before.norm()) <= 1e-6 and (event.modules, event.pairs) == (
                2,
                2,
            )
    if save:
        t.save(Path(folder), last)
    return seen, [BOOSTED.awake(t.adapters, link) for link in range(6)], [a.name for a in t.adapters]


def test_layers_that_rest_stay_bitwise_still():
    seen, awake, names = boosted("plain")
    assert all(sum(link) == 2 and link[0] == link[1] and link[2] == link[3] for link in awake), "one layer of two"
    assert len(set(map(tuple, awake))) == 2, "both have their turn"
    used = dict.fromkeys(names, 0)
    for step, (values, link) in enumerate(zip(seen, awake, strict=True)):
        for name, now in zip(names, link, strict=True):
            a, b = values[f"{name}.A"], values[f"{name}.B"]
            assert bool(a.any()) == bool(b.any()) == now, (step, name)
            if step and not awake[step - 1][names.index(name)]:
                was = seen[step - 1]
                assert all(torch.equal(values[f"{name}.bank_{x}"], was[f"{name}.bank_{x}"]) for x in "AB")
            assert int(values[f"{name}.bank_B"].any(0).sum()) == used[name], "a slot for each link that trained it"
            used[name] += now


def test_links_of_all_layers_are_cola_bitwise():
    found, wanted = (lived(replace(METHOD, layers_per_link=layers), "plain", "weight") for layers in (2, None))
    assert found[0] == wanted[0] and all(torch.equal(v, wanted[1][k]) for k, v in found[1].items())


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
def test_every_engine_trains_the_same_layers_and_is_resumed(engine, world, tmp_path):
    whole, awake, _ = boosted("plain")
    for seen, chosen, _ in ranks.run(world, boosted, engine, str(tmp_path), 0, 3, True):
        assert chosen == awake
        for values, wanted in zip(seen, whole, strict=False):
            assert all(torch.equal(value != 0, wanted[name] != 0) for name, value in values.items())
    resumed, *_ = boosted("plain", str(tmp_path), 3)
    for name, value in whole[-1].items():
        if world == 1:
            assert torch.equal(resumed[-1][name], value), name
        torch.testing.assert_close(resumed[-1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.quick
def test_settings():
    with pytest.raises(ValueError, match=r"method\.layers_per_link must be at least 1, not 0"):
        COLA(layers_per_link=0)
    with pytest.raises(ValueError, match=r"method\.layers_per_link is 3, and 2 layers have adapted modules; lower it"):
        Trainee(replace(METHOD, layers_per_link=3), "plain")
    with pytest.raises(ValueError, match=r"method\.links must be at least 1, not 0"):
        COLA(links=0)
    with pytest.raises(ValueError, match="3 links do not fit into 2 steps"):
        COLA(links=3).schedule(2)
    assert COLA().schedule(12) == (6,)


def test_links_of_few_layers_are_exported_together(tmp_path):
    t = Trainee(BOOSTED, "plain", total=STEPS)
    for step in range(STEPS):
        t.step(step)
        if step + 1 in BOOSTED.schedule(STEPS):
            BOOSTED.exchange(t.adapters, t.engine, step + 1, t.total)
    save_adapter(t.engine, t.adapters, method=BOOSTED, path=tmp_path, base_model_name_or_path="base")
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(llama("fp32"), tmp_path)(input_ids=batch(99)).logits
    torch.testing.assert_close(adapted, t.logits(), rtol=0, atol=1e-4)
