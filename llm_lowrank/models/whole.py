"""Whole modules to train: from their names to the modules that train them, see adapters/whole.py."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, Shared
from llm_lowrank.adapters.tokens import TokenEmbedding, TokenHead, is_lookup
from llm_lowrank.adapters.whole import Whole, WholeEmbedding, WholeHead, WholeNorm, master
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.models.architectures import tied_modules


def train_whole(model: PreTrainedModel, ends: Sequence[str]) -> dict[str, Whole]:
    """Train some modules of a model as wholes, and return them by their full names. Call after `attach`.

    ends: of full names, as PEFT takes them: `norm` is `model.norm` and every `input_layernorm`. Where the output layer
    shares the matrix of the embedding, it is trained in both places, whichever of them is named. ValueError if an end
    matches nothing, or a module that cannot be trained as a whole.
    """
    chosen = _chosen(model, ends)
    for name, module in chosen.items():
        if reason := _refused(model, module):
            raise ValueError(f"modules_to_save: {name} {reason}")
    made: dict[str, Whole] = {}
    matrices: dict[nn.Parameter, nn.Parameter] = {}  # of the model -> trained in its place
    for name, module in chosen.items():
        if isinstance(module, nn.Embedding | nn.Linear):
            w = module.get_parameter("weight")
            if w not in matrices:
                matrices[w] = master(w)
            kind = WholeHead if isinstance(module, nn.Linear) else WholeEmbedding
            made[name] = kind(module, matrices[w])  # type: ignore[arg-type]
        else:
            made[name] = WholeNorm(module)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made[name])
    return made


def whole_modules(model: nn.Module) -> dict[str, Whole]:
    """The modules of a model that are trained as wholes, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Whole)}


def describe_whole(modules: Mapping[str, Whole]) -> str:
    """What a run says of them."""
    counts = Counter(name.rpartition(".")[2] for name in modules)
    kinds = ", ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())
    params = {p for module in modules.values() for p in module.parameters(recurse=False)}  # a shared matrix once
    return f"trained as wholes: {kinds}, {sum(p.numel() for p in params):,} elements"


def _chosen(model: PreTrainedModel, ends: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that are meant, in the model's order. ValueError if an end matches none."""
    at = {name: module for name, module in model.named_modules() if name}
    chosen: set[nn.Module] = set()
    for end in ends:
        hits = [module for name, module in at.items() if name.endswith(end)]
        if not hits:
            able = sorted({name.rpartition(".")[2] for name, module in at.items() if not _refused(model, module)})
            near = difflib.get_close_matches(end, able, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"modules_to_save: {end!r} matches no module{hint} (it can name {', '.join(able)})")
        chosen |= {*hits}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and getattr(head, "weight", None) is embedding.weight and chosen & {embedding, head}:
        chosen |= {embedding, head}
    return {name: module for name, module in at.items() if module in chosen}


def _refused(model: PreTrainedModel, module: nn.Module) -> str:
    """Why a module cannot be trained as a whole; empty if it can."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    kind = f"is a {type(module).__name__}"
    losia = ", and with method.type: losia set method.output_factor: 0"
    if isinstance(module, Adapter):
        more = losia if module is head else ""
        return f"is adapted by the method; leave it out here, or out of method.target_modules{more}"
    if isinstance(module, FrozenLinear) or (isinstance(module, nn.Linear) and module is not head):
        return "is a linear layer inside of the model, which can be adapted: name it in method.target_modules"
    if module is embedding and isinstance(head, Adapter) and tied_modules(model, [head.name]):
        return f"shares its matrix with {head.name}, which the method adapts; leave one of them out{losia}"
    if isinstance(module, TokenEmbedding | TokenHead):
        return "has rows that new_tokens or trained_tokens train; leave it out here, or the tokens"
    if isinstance(module, nn.Linear):
        shared = module.weight is embedding.weight
        return _refused(model, embedding) if shared else ""
    if isinstance(module, nn.Embedding):
        return "" if is_lookup(module) else f"{kind}, which does more than look rows up"
    own = list(module.parameters())
    if not own:
        return f"{kind}, which has no weights to train; give the full names of those that have"
    if isinstance(module, Shared) or any(p.ndim != 1 for p in own):
        return f"{kind}; norms, the embedding and the output layer can be trained as wholes"
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return f"{kind}, which holds more than vectors; name the norms inside of it"
    return ""
