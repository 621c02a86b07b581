"""Plan the ranks of a run: which module gets how many pairs, under a budget of parameters.

`llm-lowrank ranks RECIPE --rule stable-rank|gelora|gora|eva [--budget 16] [--name value ...]` writes a
recipe with `method.rank_pattern`, to be given after the others: `--config_path RECIPE,ranks.yaml`. RECIPE and the
settings are those of `llm-lowrank train`. Exit codes: 0 done; 2 the recipe, the data or the budget cannot be used.

    stable-rank   r ~ |W|_F^2 / sigma_1^2                     SR-LoRA, arXiv 2507.00327. One W at a time, no data
    gelora        r ~ 1 + max(0, d_out - d_in)                GeLoRA, arXiv 2412.09250. d: the dimension of the hidden
                                                              states that enter and leave a decoder layer
    gora          r (m + n) ~ |W * G|_F                       GoRA, arXiv 2502.12171. G = dL/dW, * elementwise
    eva           components of the modules' inputs,          EVA, arXiv 2410.07170. Those that explain the largest
                  from all modules together                   share of their input's variance come first

    sum r (m + n) <= budget sum (m + n)        over the adapted modules, as near as whole ranks allow

The last three need data: they take the first samples of the run, one process and one device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from llm_lowrank import engines
from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.data import IGNORE, MicroBatch
from llm_lowrank.engines import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models import loading
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.budget import check_budget, intrinsic_dimension, share_out, share_out_components, stable_rank
from llm_lowrank.numerics.files import write_text
from llm_lowrank.numerics.spectrum import Matrix, top_triplets
from llm_lowrank.run.build import build_model, optimization, read_data
from llm_lowrank.run.calibration import calibrate_on, first_samples
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.fill import as_settings
from llm_lowrank.run.held_out import batch_loss
from llm_lowrank.run.recipe import Recipe, parse

LARGEST = {"eva": 2}  # the largest rank as a multiple of the budget: EVA's rho
LARGEST_ELSE = 4
SAMPLES = {"gelora": 256}  # a point is a sample
SAMPLES_ELSE = 64
ROOM = (
    2**31
)  # bytes of dense gradients, or of second moments of inputs, at a time; more passes over the samples if more


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    rule: str
    budget: int  # a LoRA of this rank has as many parameters
    least: int
    most: int
    samples: int


@dataclass(frozen=True)
class Plan:
    """A rank for every adapted module."""

    ranks: dict[str, int]
    costs: dict[str, int]  # m + n
    budget: int  # parameters
    recipe: Recipe  # with the pattern

    @property
    def parameters(self) -> int:
        return sum(rank * self.costs[name] for name, rank in self.ranks.items())


def main(argv: list[str]) -> int:
    """Plan the ranks as a command line says; return the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        _parser().print_help()
        return 0
    options, rest = _parser().parse_known_args(argv)
    try:
        recipe = parse(as_settings(rest))
        budget = getattr(recipe.method, "rank", 1) if options.budget is None else options.budget
        most = LARGEST.get(options.rule, LARGEST_ELSE) * budget if options.max is None else options.max
        samples = SAMPLES.get(options.rule, SAMPLES_ELSE) if options.samples is None else options.samples
        wanted = Wanted(options.rule, budget, options.min, most, samples)
        output = Path(options.output).expanduser()
        if output.exists():
            raise RecipeError(f"--output: {output} exists; remove it, or name another file")
        made = plan(recipe, wanted)
        write_text(output, snippet(made, wanted))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(made))
    first = rest[0] if rest and not rest[0].startswith("--") else ""
    print(f"written: {output}; train with --config_path {','.join(filter(None, [first, str(output)]))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("llm-lowrank ranks", allow_abbrev=False, add_help=False)
    parser.add_argument("--rule", choices=list(RULES), required=True, help="what decides, see above")
    parser.add_argument(
        "--budget", type=int, help="the rank of the LoRA whose parameters may be spent; by default method.rank"
    )
    parser.add_argument("--min", type=int, default=1, help="the lowest rank of a module, by default 1")
    parser.add_argument("--max", type=int, help="the highest, by default 4 x the budget, for eva 2 x")
    parser.add_argument("--samples", type=int, help="of the training data, by default 64, for gelora 256")
    parser.add_argument("--output", default="ranks.yaml", help="the file to write, by default ranks.yaml")
    return parser


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, wanted: Wanted) -> Plan:
    """Return ranks that meet the budget, for a recipe's method on a recipe's model.

    ValueError if the method takes no ranks for single modules, or if the budget cannot be met.
    """
    _check(recipe, wanted)
    source = Source.open(recipe.model_name_or_path, recipe.model_revision)
    looking = _looking(recipe)
    model, adapters = build_model(looking, source.path)
    loading.bind(model, adapters, source.in_model(model))
    costs = [sum(adapter.shape) for adapter in adapters]
    most = [min(wanted.most, *adapter.shape) for adapter in adapters]
    budget = wanted.budget * sum(costs)
    # before any work: can the budget be met, and does the method take different ranks?
    check_budget(costs, budget, least=wanted.least, most=most)
    _planned(recipe, {a.name: wanted.least + k % 2 for k, a in enumerate(adapters)}, source)
    found = RULES[wanted.rule](Subject(looking, source, model, adapters, wanted))
    share = share_out_components if isinstance(found[0], Tensor) else share_out
    chosen = share(found, costs, budget, least=wanted.least, most=most)
    names = [adapter.name for adapter in adapters]
    ranks = dict(zip(names, chosen, strict=True))
    return Plan(ranks, dict(zip(names, costs, strict=True)), budget, _planned(recipe, ranks, source))


def _check(recipe: Recipe, wanted: Wanted) -> None:
    """Raise RecipeError with everything that is wrong with the options and the method."""
    errors = []
    for option, value in (("--budget", wanted.budget), ("--min", wanted.least), ("--samples", wanted.samples)):
        if value < 1:
            errors.append(f"{option} must be at least 1, not {value}")
    if wanted.most < wanted.least:
        errors.append(f"--max ({wanted.most}) is less than --min ({wanted.least})")
    kind = recipe.method.get_choice_name(type(recipe.method))
    if not isinstance(recipe.method, LoRA):
        errors.append(f"method.type {kind} has no rank_pattern; give another one, such as --method.type lora")
    elif recipe.method.rank_pattern:
        errors.append("method.rank_pattern is given, and this command writes it; remove it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        errors.append("ranks are planned by one process; start it without deepspeed or torchrun")
    if errors:
        raise RecipeError("\n".join(errors))


def _looking(recipe: Recipe) -> Recipe:
    """The recipe of the model that a rule looks at: plain LoRA on the same modules, whose function is the model's."""
    method = Look(recipe.method.target_modules, recipe.method.exclude_modules, rank=1)
    return replace(recipe, engine="plain", save_merged=False, method=method, data=replace(recipe.data, packing=False))


def _planned(recipe: Recipe, ranks: dict[str, int], source: Source) -> Recipe:
    """Return the recipe with this pattern; ValueError if the method does not take it.

    Where the recipe has an alpha, the scale of every module stays what it is without the pattern.
    """
    method = recipe.method
    assert isinstance(method, LoRA)
    alphas = method.alpha_pattern
    if (method.alpha is not None or method.alpha_pattern) and not method.use_rslora:
        alphas = {name: method.scale_of(name) * rank for name, rank in ranks.items()}
    planned = replace(recipe, method=replace(method, rank_pattern=ranks, alpha_pattern=alphas))
    build_model(planned, source.path)
    return planned


def snippet(made: Plan, wanted: Wanted) -> str:
    """Return the YAML file: `method` with its type and its patterns, under a comment that says where it comes from."""
    method: Any = made.recipe.method
    section = {"type": method.get_choice_name(type(method)), "rank_pattern": method.rank_pattern}
    if method.alpha_pattern:
        section["alpha_pattern"] = method.alpha_pattern
    data = "" if wanted.rule == "stable-rank" else f", {wanted.samples} samples of {made.recipe.data.dataset}"
    head = (
        f"# llm-lowrank ranks --rule {wanted.rule} --budget {wanted.budget} --min {wanted.least} "
        f"--max {wanted.most}\n# {made.recipe.model_name_or_path}{data}: {made.parameters:,} trained parameters of a "
        f"budget of {made.budget:,}\n"
    )
    return head + yaml.safe_dump({"method": section}, sort_keys=False, allow_unicode=True, width=200)


def describe(made: Plan) -> str:
    """Return a table of the ranks by the kind of module, and the budget."""
    kinds: dict[str, list[int]] = {}
    for name, rank in made.ranks.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    lines = [f"{'module':<16}{'modules':>8}{'lowest':>8}{'median':>8}{'highest':>8}"]
    lines += [
        f"{kind:<16}{len(ranks):>8}{min(ranks):>8}{statistics.median(ranks):>8g}{max(ranks):>8}"
        for kind, ranks in kinds.items()
    ]
    used = made.parameters / made.budget
    return "\n".join([*lines, f"{made.parameters:,} trained parameters, {used:.2%} of the budget of {made.budget:,}"])


# --- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What a rule looks at."""

    recipe: Recipe
    source: Source
    model: PreTrainedModel  # on the meta device, with adapters
    adapters: list[Adapter]
    wanted: Wanted

    def load(self) -> tuple[Engine, nn.Module, list[MicroBatch]]:
        """Load the model, and return the engine, the wrapped model and the samples."""
        engine = engines.make("plain", timeout=self.recipe.ddp_timeout)
        batches = read_data(self.recipe, self.source.path, 0, 1)[2]
        model, loaded = loading.load(
            engine,
            self.model,
            adapters=self.adapters,
            method=self.recipe.method,
            tensors=self.source.in_model(self.model),
            settings=optimization(self.recipe),
        )
        tqdm.write(str(loaded))
        return engine, model, first_samples(batches, self.wanted.samples)


def by_stable_rank(subject: Subject) -> list[float]:
    """The stable rank of every W. One W is in memory at a time."""
    device, found = "cuda" if torch.cuda.is_available() else "cpu", []
    for adapter in tqdm(subject.adapters, desc="stable ranks", unit="module", leave=False):
        assert adapter.source is not None
        found.append(_finite(adapter.name, stable_rank(adapter.source().to(device, torch.float32))))
    return found


def by_growth(subject: Subject) -> list[float]:
    """1 + max(0, d_out - d_in) of the decoder layer of every module, d the intrinsic dimension of hidden states.

    A point is the mean hidden state of a sample's tokens. A module outside of the layers has 1.
    """
    engine, model, micros = subject.load()
    blocks = list(dict.fromkeys(filter(None, (_block(adapter.name) for adapter in subject.adapters))))
    points: dict[tuple[str, str], list[Tensor]] = {(block, end): [] for block in blocks for end in ("in", "out")}
    mask = Mask(engine.device)

    def enters(block: str, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        points[block, "in"].append(mask.means(args[0] if args else given["hidden_states"]))

    def leaves(block: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        points[block, "out"].append(mask.means(output[0] if isinstance(output, tuple) else output))

    with ExitStack() as hooks:
        for block in blocks:
            layer = subject.model.get_submodule(block)
            hooks.callback(layer.register_forward_pre_hook(partial(enters, block), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(partial(leaves, block)).remove)
        for _ in mask.forwards(model, micros, "hidden states"):
            pass
    growth = {}
    for block in tqdm(blocks, desc="dimensions", unit="layer", leave=False):
        d_in, d_out = (intrinsic_dimension(torch.cat(points[block, end])) for end in ("in", "out"))
        growth[block] = 1 + max(0.0, d_out - d_in)
    return [growth.get(_block(adapter.name), 1.0) for adapter in subject.adapters]


def by_gradient(subject: Subject) -> list[float]:
    """|W * G|_F / (m + n) of every module, G the gradient of the samples' mean loss: shares of parameters."""
    engine, model, micros = subject.load()
    tokens = sum(int((micro.labels[:, 1:] != IGNORE).sum()) for micro in micros)
    passes = len(_groups(subject.adapters, lambda a: 4 * a.shape[0] * a.shape[1]))
    method = subject.recipe.method
    with tqdm(total=passes * len(micros), desc="gradients", unit="batch", leave=False) as bar:

        def losses() -> Iterator[Tensor]:
            for micro in micros:
                yield batch_loss(model, micro, engine.device) / tokens
                bar.update()

        calibrate_on(engine, model, method, subject.adapters, losses)
    return [float(adapter.memory["score"]) / sum(adapter.shape) for adapter in subject.adapters]


def by_variance(subject: Subject) -> list[Tensor]:
    """The shares of the variance of every module's input that its largest components explain, descending.

    From the second moment C (n, n) and the mean of the input over all tokens, which modules with the same input share.
    """
    engine, model, micros = subject.load()
    found: dict[str, Tensor] = {}
    groups = _groups(subject.adapters, lambda a: 4 * a.shape[1] * (a.shape[1] + 1))
    mask = Mask(engine.device)
    for number, group in enumerate(groups, 1):
        inputs = Inputs(mask)
        with ExitStack() as hooks:
            for adapter in group:
                hooks.callback(adapter.register_forward_pre_hook(partial(inputs.take, adapter.name)).remove)
            for _ in mask.forwards(model, micros, f"inputs {number}/{len(groups)}"):
                inputs.last = None
        owned: dict[str, Tensor] = {}
        for adapter in tqdm(group, desc="components", unit="module", leave=False):
            owner = inputs.owner[adapter.name]
            if owner not in owned:
                k = min(subject.wanted.most, adapter.shape[1])
                owned[owner] = _explained(adapter.name, inputs.second.pop(owner), inputs.total[owner], inputs.count, k)
            found[adapter.name] = owned[owner]
    return [found[adapter.name] for adapter in subject.adapters]


RULES: dict[str, Callable[[Subject], Sequence[Any]]] = {
    "stable-rank": by_stable_rank,
    "gelora": by_growth,
    "gora": by_gradient,
    "eva": by_variance,
}


@dataclass(frozen=True)
class Look(LoRA):
    """LoRA whose calibration scores every module by |W * G|_F. Not a method for a run."""

    def calibrate(self, adapters: list[Adapter], engine: Engine, backward: Callable[[], None]) -> None:
        for group in _groups(adapters, lambda a: 4 * a.shape[0] * a.shape[1]):
            with _gradients(group, engine.device) as gradients:
                backward()
            for adapter in group:
                assert adapter.source is not None
                g = gradients.pop(adapter.name)
                score = float((adapter.source().to(g) * g).double().norm())
                adapter.memory["score"] = torch.tensor(_finite(adapter.name, score), dtype=torch.float64)


@contextmanager
def _gradients(adapters: Sequence[Adapter], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield name -> dL/dW (m, n), to which every backward in the block adds, in float32."""
    found = {a.name: torch.zeros(a.shape, device=device) for a in adapters}

    def add(total: Tensor, x: Tensor, gradient: Tensor) -> None:
        total.addmm_(gradient.flatten(0, -2).float().T, x.flatten(0, -2).float())

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        output.register_hook(partial(add, found[name], args[0].detach()))

    with ExitStack() as hooks:
        for adapter in adapters:
            hooks.callback(adapter.register_forward_hook(partial(watch, adapter.name)).remove)
        yield found


class Mask:
    """Which tokens of the micro-batch in the forward are no padding."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now: Tensor | None = None  # (samples, longest), bool

    @torch.no_grad()
    def forwards(self, model: nn.Module, micros: Sequence[MicroBatch], what: str) -> Iterator[None]:
        """Go forward through the samples, and yield after each micro-batch."""
        model.eval()
        for micro in tqdm(micros, desc=what, unit="batch", leave=False):
            inputs = micro.inputs(self.device)
            # a row that fills the batch up, or that lies beyond the samples asked for, has no label
            self.now = inputs["attention_mask"].bool() & (micro.labels != IGNORE).any(1, keepdim=True).to(self.device)
            model(**inputs, use_cache=False)
            yield

    def means(self, hidden: Tensor) -> Tensor:
        """Return the mean over the tokens of each sample, float32 on the host."""
        assert self.now is not None
        weight = self.now.float()[..., None]
        rows = self.now.any(1)
        return ((hidden.float() * weight).sum(1) / weight.sum(1).clamp_min(1))[rows].cpu()


class Inputs:
    """Second moments of the inputs of modules. Modules that read the same tensor share them."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.last: tuple[Tensor, str] | None = None  # the input of the module before, and whose it is
        self.owner: dict[str, str] = {}
        self.second: dict[str, Tensor] = {}  # sum x x^T (n, n)
        self.total: dict[str, Tensor] = {}  # sum x (n,)
        self.count: dict[str, int] = {}

    def take(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.last is not None and self.last[0] is args[0]:
            self.owner[name] = self.last[1]
            return
        self.last, self.owner[name] = (args[0], name), name
        assert self.mask.now is not None
        x = args[0][self.mask.now].float()  # (tokens, n)
        if name not in self.second:
            n = x.shape[1]
            self.second[name], self.total[name] = x.new_zeros(n, n), x.new_zeros(n)
        self.second[name].addmm_(x.T, x)
        self.total[name] += x.sum(0)
        self.count[name] = self.count.get(name, 0) + len(x)


def _explained(name: str, second: Tensor, total: Tensor, counts: dict[str, int], k: int) -> Tensor:
    """The k largest variances, divided by the whole variance: (k,). `second` is overwritten."""
    count = counts[name]
    mean = total / count
    second.div_(count).addr_(mean, mean, alpha=-1)  # the covariance
    variance = _finite(name, float(second.diagonal().double().sum()))
    if variance <= 0:
        return torch.zeros(k)
    return top_triplets(Matrix(second), k, device=second.device).S.cpu() / variance


def _finite(name: str, score: float) -> float:
    if not abs(score) < float("inf"):
        raise ValueError(f"{name}: its score is {score}; the weight or a sample holds NaN or infinity")
    return score


def _block(name: str) -> str:
    """The decoder layer of a module, up to its number: model.layers.3; empty outside of the layers."""
    words = name.split(".")
    last = max((at for at, word in enumerate(words) if word.isdigit()), default=-1)
    return ".".join(words[: last + 1])


def _groups(adapters: Sequence[Adapter], size: Callable[[Adapter], int]) -> list[list[Adapter]]:
    """The adapters in order, in groups of at most ROOM bytes, or of one."""
    groups: list[list[Adapter]] = []
    free = 0
    for adapter in adapters:
        if size(adapter) > free:
            groups.append([])
            free = ROOM
        groups[-1].append(adapter)
        free -= size(adapter)
    return groups
