"""Which model a checkpoint's config describes, built without values, and what its tensors are called on disk.

The names on disk need not be those in the model. transformers renames tensors while it loads them (GPT-NeoX: embed_out
-> lm_head), and since version 5 it fuses the matrices of a mixture's experts into one tensor (E, m, n). `find` follows
the same rules, so that any rows of the model's tensors can be read from what lies on disk:

    renamed           W[i] = stored[i]
    fused experts     W[e] = [stored of expert e, one matrix below the other]
    tied              the output layer's W = the embedding's, where the output layer is adapted

The text part of a model for images and text is a causal language model of its own. It is trained alone, and `outer` is
where it lies in the whole model, which is what plain transformers loads and where PEFT looks for its modules.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from llm_lowrank.adapters.adapter import Shared
from llm_lowrank.data import Limits
from llm_lowrank.engines.frozen import FrozenLinear

# --- the model --------------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> PretrainedConfig:
    """Read a checkpoint's config. ValueError if transformers cannot."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the checks of a config raise what they like
        reason = " ".join(str(error).split())
        raise ValueError(f"model_name_or_path: cannot read the config of {folder}: {reason}") from error
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # the codec stores the weights, not transformers
    return config


def language_model(config: PretrainedConfig, folder: str | Path) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """The class and the config of a checkpoint's causal language model: the whole model, or its text part."""
    text = config.get_text_config(decoder=True)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if kind is None:
        part = f", nor for its text part, {text.model_type}" if text is not config else ""
        raise ValueError(
            f"model_name_or_path: {folder} is a model of type {config.model_type}, for which transformers has no "
            f"causal language model{part}; give a language model"
        )
    return kind, text


def whole_model(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class with which plain transformers loads a config whose text part is trained; None if it is that part."""
    text = config.get_text_config(decoder=True)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if text is config or (kind is not None and kind.config_class is type(text)):
        return None
    return kind or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)


def skeleton(folder: str | Path, dtype: torch.dtype, *attention: str) -> PreTrainedModel:
    """Return the model of a checkpoint's config, with parameters on the meta device and real buffers.

    attention: implementations; the first that the model has is used. ValueError if it has none of them.
    """
    whole = read_config(folder)
    kind, config = language_model(whole, folder)
    if whole_model(whole) is not None:
        config.tie_word_embeddings = whole.tie_word_embeddings  # the outer model's counts, as in transformers
    for choice in attention:
        try:
            model = _empty(kind, config, dtype=dtype, attn_implementation=choice)
            break
        except (ValueError, ImportError) as error:
            reason = error
        except Exception as error:  # of a model that its config does not fit
            raise ValueError(
                f"model_name_or_path: {kind.__name__} cannot be made from config.json of {folder} "
                f"({type(error).__name__}: {error}); is it that of this checkpoint and this version of transformers?"
            ) from error
    else:
        raise ValueError(
            f"attn_implementation: {kind.__name__} cannot be built with {' or '.join(attention)}; use auto or eager "
            f"({str(reason).splitlines()[0]})"
        ) from reason
    model.tie_weights()
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _empty(kind: type[PreTrainedModel], config: PretrainedConfig, **options: object) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return kind._from_config(config, **options)


def limits_of(model: PreTrainedModel) -> Limits:
    """The tokens and the positions that a model can take.

    Positions are limited where they are looked up: in an embedding (GPT-2, OPT) or a table of sines (GPT-J).
    """
    tables = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    tables += [name for name, buffer in model.named_buffers() if buffer.ndim == 2]
    learned = any(re.search(r"(^|[._])(wpe|embed_positions|position_embeddings?)$", name) for name in tables)
    positions = getattr(model.config, "max_position_embeddings", None) if learned else None
    return Limits(model.get_input_embeddings().num_embeddings, positions)


# --- the names --------------------------------------------------------------------------------------------------------


MERGE = ([MergeModulelist], [MergeModulelist, Concatenate])  # what makes one tensor of a mixture's experts


@dataclass(frozen=True)
class Experts:
    """A tensor of the model, (E, m, n), whose E matrices are stored one by one, each in one piece or several."""

    pieces: list[list[str]]  # expert -> the stored tensors that lie below each other in its matrix


@dataclass(frozen=True)
class Names:
    """Where each tensor of a model is on disk."""

    stored: dict[str, str | Experts]  # tensor of the model -> what is on disk
    unused: list[str]  # on disk, and not in the model


def wanted(model: nn.Module) -> list[str]:
    """The tensors of a checkpoint that the model is made of; a tied one is named once.

    Parameters that several adapters share, or that an adapter has beside its W, are in no checkpoint of a model.
    """
    found: dict[str, None] = {}
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for k, p in () if isinstance(module, Shared) else module.named_parameters(recurse=False):
            if isinstance(module, FrozenLinear) and k != "bias":
                found[f"{name}.weight"] = None
            elif p not in seen:
                found[f"{name}.{k}" if name else k] = None
            seen.add(p)
    return list(found)


@dataclass(frozen=True)
class Outer:
    """The model that plain transformers loads: the model itself, or the one whose text part it is."""

    model: PreTrainedModel  # without values
    inside: str  # prefix of the text part's tensors in the text part
    path: str  # the same prefix in the outer model; equal to `inside` if there is no outer model

    @property
    def wraps(self) -> bool:
        """Whether there is a model around the trained one."""
        return self.path != self.inside

    def inner(self, name: str) -> str:
        """The name in the text part of a tensor or module of the outer model."""
        return f"{self.inside}.{name[len(self.path) + 1 :]}" if name.startswith(f"{self.path}.") else name

    def outer(self, name: str) -> str:
        """The name in the outer model of a tensor or module of the text part."""
        return f"{self.path}.{name[len(self.inside) + 1 :]}" if name.startswith(f"{self.inside}.") else name


def outer(model: PreTrainedModel, config: PretrainedConfig) -> Outer:
    """Find the model of a checkpoint's config around its text part. ValueError if the text part is not in it."""
    inside, kind = model.base_model_prefix, whole_model(config)
    if kind is None:
        return Outer(model, inside, inside)
    whole = _empty(kind, config)
    for path, module in whole.named_modules():
        if type(module) is type(model.base_model):
            return Outer(whole, inside, path)
    raise ValueError(
        f"model_name_or_path: {kind.__name__} holds its text in another form than {type(model).__name__} has it; its "
        "text part cannot be trained alone"
    )


def find(model: PreTrainedModel, stored: Iterable[str], around: Outer) -> Names:
    """Find the model's tensors among the stored ones by the rules with which transformers loads `around`.

    ValueError if a tensor of the model would have to be computed from stored ones.
    """
    asked = wanted(model)
    names = sorted(stored, key=dot_natural_key)
    found: dict[str, str | Experts] = {}
    converted: dict[str, str] = {}
    experts: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    for name, to, converter, pattern in _renamed(around, [*asked, *map(around.outer, asked)], names):
        if converter is None:
            found.setdefault(to, name)
        elif [type(operation) for operation in converter.operations] in MERGE:
            experts.setdefault(to, (converter, defaultdict(list)))[1][pattern].append(name)
        else:
            converted[to] = " and ".join(type(operation).__name__ for operation in converter.operations)
    for to, (converter, lists) in experts.items():
        columns = [lists[pattern] for pattern in converter.source_patterns]
        if len({len(column) for column in columns}) == 1:
            found[to] = Experts([list(pieces) for pieces in zip(*columns, strict=True)])
    # a tied output layer that is adapted reads the embedding's weight, whatever else is stored for it
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if name in asked and source in found:
            found[name] = found[source]
    if computed := [name for name in asked if name in converted]:
        raise ValueError(
            f"{computed[0]} is stored in another form than {type(model).__name__} has it ({len(computed)} of "
            f"{len(asked)} tensors are): transformers applies {converted[computed[0]]} while it loads the model, which "
            "is not done here; write the checkpoint in the model's form with plain transformers: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, save_original_format=False)"
        )
    found = {name: found[name] for name in asked if name in found}
    groups = ([[at]] if isinstance(at, str) else at.pieces for at in found.values())
    used = {name for pieces in groups for piece in pieces for name in piece}
    return Names(found, sorted(set(names) - used))


def tied_modules(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """The modules whose weight is another one's on disk: an adapted output layer of a model with tied embeddings."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return [module for module in modules if f"{module}.weight" in tied]


def names_of_experts(model: PreTrainedModel, modules: Iterable[str]) -> list[str]:
    """The last names of modules that PEFT takes for the experts of a mixture, as these have the same names on disk."""
    rules = (rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightConverter))
    patterns = [
        name for rule in rules if [type(op) for op in rule.operations] in MERGE for name in rule.source_patterns
    ]
    experts = {pattern.removesuffix(".weight").rpartition(".")[2] for pattern in patterns}
    return sorted({module.rpartition(".")[2] for module in modules} & experts)


def _renamed(
    around: Outer, known: list[str], stored: list[str]
) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
    """Yield each stored name, its name in the model, and the converter and its pattern if it is not only renamed."""
    rules = get_model_conversion_mapping(around.model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known_names = around.model.base_model_prefix, dict.fromkeys(known, True)
    for name in stored:
        to, pattern = rename_source_key(name, renamings, converters, prefix, known_names)
        yield name, around.inner(to), of_pattern.get(pattern), pattern or ""
