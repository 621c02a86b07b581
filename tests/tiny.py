"""What tests over ranks share: a tiny LLaMA with uneven sizes, its data, and the engines by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import llm_lowrank.methods  # noqa: F401 - registers directions
from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.direction import Direction
from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.adapters.tokens import TrainedTokens
from llm_lowrank.codecs import Codec, Dense, Int8, Nf4
from llm_lowrank.engines import Engine, make
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.models.inherited import inherit, open_adapter
from llm_lowrank.models.loading import bind, load
from llm_lowrank.models.vocabulary import train_rows
from llm_lowrank.models.whole import train_whole
from llm_lowrank.numerics.optimizers import Optimization
from llm_lowrank.run.calibration import calibrate_on
from tests import ranks

VOCABULARY = 67
CALIBRATION = 50  # the step whose batch a method is calibrated on
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "nf4": torch.float32, "int8": torch.float32}  # computed in
CODECS: dict[str, Codec] = {"fp32": Dense(torch.float32), "bf16": Dense(torch.bfloat16), "nf4": Nf4(), "int8": Int8()}


def config(**changes: object) -> LlamaConfig:
    # 43 rows over 2 ranks and 14 over 3 are cut within a row; 43 x 14 elements leave padding
    settings = dict(
        vocab_size=VOCABULARY,
        hidden_size=42,
        intermediate_size=43,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaConfig(**{**settings, **changes})  # type: ignore[arg-type]


_KEPT: dict[tuple, tuple[LlamaForCausalLM, Tensor]] = {}  # building takes longer than a step of training


def kept(build: Callable[..., LlamaForCausalLM], dtype: str, changes: dict[str, object]) -> LlamaForCausalLM:
    """Build a model once in a process, and leave the random numbers where building leaves them. Not to be edited."""
    key = (build, dtype, repr(sorted(changes.items())), torch.get_default_device(), torch.get_default_dtype())
    if key not in _KEPT:
        if len(_KEPT) == 8:
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[key] = build(dtype, **changes), torch.get_rng_state()
    model, state = _KEPT[key]
    if build is _llama:  # a skeleton draws nothing
        torch.set_rng_state(state)
    return model


def llama(dtype: str = "fp32", **changes: object) -> LlamaForCausalLM:
    return copy.deepcopy(kept(_llama, dtype, changes))


def skeleton(dtype: str = "fp32", **changes: object) -> LlamaForCausalLM:
    """The same model without values."""
    return copy.deepcopy(kept(_skeleton, dtype, changes))


def _llama(dtype: str, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(**changes))
    for p in model.parameters():  # wider than the usual 0.02, so that layers matter and singular values differ
        if p.ndim == 2:
            nn.init.normal_(p, std=0.15)
        p.data = p.data.to(DTYPES[dtype])  # buffers stay float32, as from_pretrained leaves them
    return model


def _skeleton(dtype: str, **changes: object) -> LlamaForCausalLM:
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config(**changes), dtype=DTYPES[dtype])
    model.tie_weights()
    return model


class Checkpoint:
    """Tensors in memory, asked for as those of a checkpoint on disk are."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.elements = 0  # read by rows

    def names(self) -> list[str]:
        return list(self.state)

    def tensor(self, name: str) -> Tensor:
        return self.state[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found = self.state[name][start:stop].clone()
        self.elements += found.numel()
        return found

    def layout(self, name: str) -> tuple[torch.dtype, list[int]]:
        return self.state[name].dtype, list(self.state[name].shape)

    def is_nf4(self, name: str) -> bool:
        return False

    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        raise AssertionError(name)


def _zero(stage: int, **section: object) -> dict[str, object]:
    threshold = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **threshold, **section}}


# An engine's name in tests -> its name in recipes, and what makes its settings of a few named ones.
ENGINES: dict[str, tuple[str, Callable[..., object]]] = {
    "plain": ("plain", lambda: None),
    "zero1": ("deepspeed", partial(_zero, 1)),
    "zero2": ("deepspeed", partial(_zero, 2)),
    "zero3": ("deepspeed", partial(_zero, 3)),
    "fsdp": ("fsdp", Sharding),
}


# Every direction, with settings that fit a run of a few steps.
DIRECTIONS: dict[str, Direction] = {
    name: kind(**({"warmup": 1} if "warmup" in kind.__dataclass_fields__ else {}))
    for name, kind in Direction.get_known_choices().items()
    if name != "none"
}


def engine(name: str, **settings: object) -> Engine:
    kind, made = ENGINES[name]
    return make(kind, made(**settings))


def batch(step: int, samples: int = 6, length: int = 8, vocabulary: int = VOCABULARY) -> Tensor:
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1000 + step))


class Trainee:
    """A tiny model under a method and an engine, stepped on the same global batch whatever the world size."""

    def __init__(
        self,
        method: Method,
        engine_name: str,
        dtype: str = "fp32",
        accumulation: int = 1,
        samples: int = 6,
        max_grad_norm: float = 0.0,
        zero: dict | None = None,
        optimization: dict | None = None,
        codec: Codec | None = None,
        total: int = 100,
        resume_from: checkpoint.Checkpoint | None = None,
        length: int = 8,
        tokens: TrainedTokens | None = None,
        modules: Sequence[str] = (),
        **changes: object,
    ) -> None:
        self.total = total  # steps of the run, as far as a method wants to know
        self.length = length  # tokens of a sample
        self.vocabulary = VOCABULARY if tokens is None else tokens.size
        self.engine, self.method, self.samples, self.accumulation = (
            engine(engine_name, **(zero or {})),
            method,
            samples,
            accumulation,
        )
        self.original = {k: v.clone() for k, v in llama(dtype, **changes).state_dict().items()}
        self.model = skeleton(dtype, **changes)
        self.adapters: list[Adapter] = attach(self.model, method, codec or CODECS[dtype], seed=0)
        if isinstance(method, LoRA) and method.adapter:
            inherit(open_adapter(method.adapter), self.model, self.adapters, role=method.adapter_role)
        if tokens is not None:
            train_rows(self.model, self.adapters, tokens)
        train_whole(self.model, modules)
        self.checkpoint = Checkpoint(self.original)
        bind(self.model, self.adapters, self.checkpoint)
        self.max_grad_norm = max_grad_norm
        settings = Optimization(
            1e-2,
            accumulation=accumulation,
            max_grad_norm=0.0 if method.directs else max_grad_norm,
            **(optimization or ({"optim": "sgd"} if method.own_step else {})),
        )
        self.wrapped, self.loaded = load(
            self.engine,
            self.model,
            adapters=self.adapters,
            method=method,
            tensors=self.checkpoint,
            settings=settings,
            resume_from=resume_from,
        )
        if resume_from is not None:
            checkpoint.restore(self.engine, self.model, self.adapters, resume_from)
        elif method.calibration:
            assert method.calibration == samples, "the samples are those of one step"
            calibrate_on(self.engine, self.wrapped, method, self.adapters, lambda: self.losses(CALIBRATION))

    def save(self, folder: Path, step: int) -> checkpoint.Checkpoint:
        """A checkpoint after so many steps, opened. It names no recipe, no model and no data."""
        writing = checkpoint.save(
            self.engine,
            self.model,
            adapters=self.adapters,
            output=folder,
            step=step,
            skipped=0,
            recipe={},
            base="",
            data={},
            keep=1,
        )
        return checkpoint.Checkpoint.open(writing.finish())

    def logits(self, step: int = 99) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            ids = batch(step, length=self.length, vocabulary=self.vocabulary).to(self.engine.device)
            return self.wrapped(input_ids=ids, use_cache=False).logits.float()

    def probe(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Answers, and the linear map that every adapted layer is, in float64, as its own forward computes it: (m, n)
        each.
        """
        found: dict[str, Tensor] = {}

        def look(layer: Adapter, args: tuple[Tensor]) -> None:
            eye = torch.eye(layer.shape[1], dtype=torch.float64)
            found[layer.name] = (layer.forward(eye) - (0 if layer.bias is None else layer.bias.double())).T.clone()

        # inside of a forward of the whole model, where every engine has gathered what the layer needs
        handles = [a.register_forward_pre_hook(look) for a in self.adapters]
        try:
            return self.logits(), found
        finally:
            for handle in handles:
                handle.remove()

    def forward_backward(self, step: int) -> float:
        """One global batch, split over ranks and micro-batches; returns the loss of this rank's share."""
        total = torch.zeros(())
        self.method.rates(self.adapters, step, self.total, lambda _: 0.0)  # a run asks before the forwards
        self.model.train()
        for loss in self.losses(step):
            self.engine.backward(loss)
            total = total.to(loss.device) + loss.detach()
        return float(total)

    def losses(self, step: int) -> Iterator[Tensor]:
        """This rank's shares of the loss of a global batch, one for each micro-batch."""
        tokens, engine = batch(step, self.samples, self.length, self.vocabulary), self.engine
        parts = tokens.view(self.accumulation, engine.world, -1, tokens.shape[1])[:, engine.rank]
        numbers = torch.arange(self.samples).view(self.accumulation, engine.world, -1)[:, engine.rank].tolist()
        for part, samples in zip(parts, numbers, strict=True):
            self.method.batch(self.adapters, step, samples)
            part = part.to(engine.device)
            logits = self.wrapped(input_ids=part, use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
            )
            yield loss / (tokens.shape[0] * (tokens.shape[1] - 1))

    def step(self, step: int, learning_rate: float = 1e-2) -> float:
        loss = self.forward_backward(step)
        self.update(step, learning_rate)
        return float(self.engine.sum(torch.tensor(loss)))

    def update(self, step: int, learning_rate: float = 1e-2) -> float:
        """What follows the last backward; returns the gradient's norm."""
        self.method.observe(self.adapters, self.engine)
        rates = self.method.rates(self.adapters, step, self.total, lambda step: learning_rate)
        return make_step(self.engine, self.method, self.adapters, step, rates, self.max_grad_norm)

    def exchange(self, step: int) -> Exchanged | None:
        """What a run does at an exchange step, when so many steps are done."""

        def hook() -> Exchanged | None:
            event = self.method.exchange(self.adapters, self.engine, step, self.total)
            if self.method.recalibrates:
                samples = partial(self.losses, CALIBRATION + step)
                calibrate_on(self.engine, self.wrapped, self.method, self.adapters, samples)
            return event

        return measure_exchange(self.engine, hook, self.method.changes_function)

    def values(self) -> dict[str, Tensor]:
        """Every parameter that does not come from the checkpoint, whole."""
        return {name: self.engine.whole(p).cpu() for name, p in checkpoint.adapter_parameters(self.model)}

    def moments(self) -> dict[str, Tensor]:
        found = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                for k, v in self.engine.slot(p).moments.items():
                    found[f"{name}.{k}"] = v.cpu()
        return found

    def weights(self) -> dict[str, Tensor]:
        """Every frozen W as it is stored now, decoded."""
        return {a.name: self.engine.weight(a).matmul(torch.eye(a.shape[1])).cpu() for a in self.adapters}


def resumed_in_nf4(
    method: Method, engine: str, folder: str, resume: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Make two steps over nf4 from the start and save, or the next two from what is saved; values before and after."""
    t = Trainee(method, engine, "nf4", resume_from=checkpoint.newest(Path(folder))[0] if resume else None)
    before = t.values()
    for step in range(2):
        t.step(step + 2 * resume)
    if not resume:
        t.save(Path(folder), 2)
    return before, t.values()


def check_resume_elsewhere(method: Method, folder: Path, trained: tuple[str, ...]) -> None:
    """Resume a run of ZeRO-3 on 3 ranks on one process, and compare it with one that never stopped, all over nf4.

    trained: how the names of the trained parameters end; all others stay bitwise what they were.
    """
    first = ranks.run(3, resumed_in_nf4, method, "zero3", str(folder), False)[0]
    second = resumed_in_nf4(method, "plain", str(folder), True)
    whole = Trainee(method, "plain", "nf4")
    for step in range(4):
        whole.step(step)
    for name, value in whole.values().items():
        saved, found = (first[1][name], second[0][name]), second[1][name]
        assert torch.equal(*saved), name
        if name.endswith(trained):
            assert not torch.equal(saved[0], found)
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4)
        else:
            assert all(torch.equal(value, other) for other in (first[0][name], *saved, found)), name


def three_steps(method: Method, engine: str, dtype: str, **settings: object) -> tuple[list[float], dict[str, Tensor]]:
    t = Trainee(method, engine, dtype, **settings)
    return [t.step(step) for step in range(3)], t.values()


def check_trains_alike(
    method: Method, engine: str, world: int, dtype: str, zero: dict | None = None, **settings: object
) -> dict[str, Tensor]:
    """Compare losses and values on some ranks of an engine with those of one process, and return these values."""
    wanted, values = ranks.run(1, three_steps, method, "plain", dtype, **settings)[0]
    assert wanted[-1] < wanted[0]
    for found, others in ranks.run(world, three_steps, method, engine, dtype, zero=zero, **settings):
        assert found == pytest.approx(wanted, rel=2e-6)
        assert others.keys() == values.keys()
        for name in values:
            torch.testing.assert_close(others[name], values[name], rtol=1e-3, atol=2e-5)
    return values


def four_steps(method: Method, engine: str, dtype: str, folder: str, resume: bool, **settings: object) -> dict:
    point = checkpoint.newest(Path(folder))[0] if resume else None
    t = Trainee(method, engine, dtype, resume_from=point, **settings)
    for step in range(2 * resume, 4):
        t.step(step)
        if step == 1:
            t.save(Path(folder), 2)
    return t.values() | t.moments()


def check_resumes_bitwise(
    method: Method, engine: str, world: int, dtype: str, folder: Path, **settings: object
) -> dict[str, Tensor]:
    """Compare a run that was resumed after two of four steps with one that was not, and return its values."""
    wanted = ranks.run(world, four_steps, method, engine, dtype, str(folder), False, **settings)[0]
    found = ranks.run(world, four_steps, method, engine, dtype, str(folder), True, **settings)[0]
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    return wanted


def trains_as_peft(t: Trainee, theirs: nn.Module, steps: int, rate: float) -> None:
    """Make the same steps with PEFT's model and AdamW, and compare the losses."""
    adam = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for step in range(steps):
        tokens = batch(step)
        logits = theirs(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        assert t.step(step, rate) == pytest.approx(loss.item(), rel=1e-5)
