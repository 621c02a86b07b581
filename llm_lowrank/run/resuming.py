"""Whether a run may resume from a checkpoint: it must learn what the run that wrote the checkpoint would have learned.

Settings are compared one by one. What a path or a name stands for is compared by its content, so that model and data
may have been moved or copied in between:

    model_name_or_path                      bytes of the weights, config.json, the tokenizer
    data.dataset and how its rows are read  the tokens of all examples and their split; of a stream the files
    data.chat_template                      the text of the template
    method.adapter                          bytes of the adapter's weights
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import draccus
import yaml
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase

from llm_lowrank.data import Corpus
from llm_lowrank.data.identity import identity_of, tokenizer_digest
from llm_lowrank.engines import Engine
from llm_lowrank.models.checkpoint import Checkpoint
from llm_lowrank.models.inherited import adapter_digest
from llm_lowrank.models.source import Source
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import Recipe

# Settings that may differ when a run resumes: where and how it computes, not what it learns. on_nan is among them, as a
# run that stopped at a gradient that is not finite resumes with the other policy.
FREE = {
    "output_dir",
    "overwrite_output_dir",
    "save_merged",
    "merge_base",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "dry_run",
    "gpu",
    "nodes",
    "deterministic",
    "profile_steps",
    "engine",
    "deepspeed",
    "fsdp",
    "gradient_checkpointing",
    "attn_implementation",
    "torch_compile",
    "use_liger_kernel",
    "allow_partial",
    "model_revision",  # the weights are compared
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "load_best_model_at_end",
    "metric_for_best_model",
    "early_stopping_patience",
    "report_to",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "on_nan",
    "ddp_timeout",
    "method.svd_cache",
    "data.workers",
}
SECTIONS = ("fsdp", "method", "data")
# Settings that say where something is or how it is read -> what is compared in their place.
BY_CONTENT = {
    "model_name_or_path": "the same weights, config and tokenizer",
    **dict.fromkeys(
        ("data.dataset", "data.split", "data.subset", "data.revision", "data.preset", "data.format", "data.columns"),
        "the same examples",
    ),
    "data.chat_template": "the same text",
    "method.adapter": "the same weights",
}
# Keys of a config.json that say nothing about what the model computes in a run.
ASIDE = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
ABSENT = "absent"


def facts_of(source: Source, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, adapter: str = "") -> dict[str, Any]:
    """Return what stands in a checkpoint about the model and the data beside the weights.

    adapter: the one that the run starts from, if there is one.
    """
    facts: dict[str, Any] = {
        "config": json.loads((source.path / "config.json").read_text(encoding="utf-8")),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": tokenizer.chat_template,
        **identity_of(corpus),
    }
    facts |= {"adapter": adapter_digest(adapter)} if adapter else {}
    return facts | ({"date": corpus.date} if corpus.date else {})


def check_ranks_alike(engine: Engine, source: Source, facts: Mapping[str, Any]) -> None:
    """Raise ValueError unless all ranks read the same; nodes may have copies of their own. Collective."""
    with engine.together():
        mine = {
            "model_name_or_path": [source.fingerprint, facts["config"], facts["tokenizer"]],
            "data.dataset": [facts["examples"], facts["split"]],
            "data.chat_template": facts["template"],
            "method.adapter": facts.get("adapter"),
        }
    by_rank: Sequence[Any] = engine.gather(mine)
    with engine.together():
        for key in mine:
            if others := [str(rank) for rank, theirs in enumerate(by_rank) if theirs[key] != by_rank[0][key]]:
                raise ValueError(
                    f"{key}: rank 0 and rank {', '.join(others)} do not read the same; give every node the same copy"
                )


def check_same_run(recipe: Recipe, source: Source, facts: Mapping[str, Any], checkpoint: Checkpoint) -> list[str]:
    """Return a line for each setting that differs and yet stands for the same, such as the path of moved data.

    RecipeError names everything that differs, the values then and now, and what to do.
    """
    state = checkpoint.state
    then, now = _flat(state["recipe"]), _flat(draccus.encode(recipe))
    differing = [key for key in [*now, *(then.keys() - now.keys())] if then.get(key, ABSENT) != now.get(key, ABSENT)]
    differing = [key for key in differing if key not in FREE and key.partition(".")[0] not in FREE]
    if "method.type" in differing:  # settings that only one of the two methods has follow from it
        differing = [key for key in differing if key in then and key in now]
    moved = {key: f"{key}: {_values(then[key], now[key])}" for key in differing if key in BY_CONTENT and key in then}
    errors = [
        line
        for key in differing
        if key not in moved
        for line in _setting(key, then.get(key, ABSENT), now.get(key, ABSENT))
    ]
    errors += _model_errors(recipe, source, facts, state, moved)
    # Examples follow from the settings, from tokenizer and template: with the same ones they can be compared.
    if not any(line.startswith(("data.", "seed", "model_name_or_path")) for line in errors):
        errors += _data_errors(recipe, facts, state["data"], moved)
    if not errors:
        errors += _length_errors(facts, state["data"])
    if errors:
        lines = "\n  ".join(errors)
        raise RecipeError(
            f"resume_from_checkpoint: {checkpoint.path} was written by another run:\n  {lines}\n"
            "or start a new run in another output_dir"
        )
    return [f"{line}: {BY_CONTENT[key]}" for key, line in moved.items()]


# --- settings ---------------------------------------------------------------------------------------------------------


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= {f"{key}.{name}": part for name, part in value.items()} if key in SECTIONS else {key: value}
    # a section of a section, method.direction, has a type
    for key in [key for key, value in flat.items() if isinstance(value, Mapping) and "type" in value]:
        flat |= {f"{key}.{name}": part for name, part in flat.pop(key).items()}
    return flat


def _setting(key: str, then: Any, now: Any) -> Iterator[str]:
    """Yield a line for a setting, or for each differing name of a setting that is a dictionary."""
    back = f"leave out --{key}" if then == ABSENT else f"give --{key} {shlex.quote(_typed(then))}"
    if now == ABSENT:
        back = "this version has no such setting; resume with the version that wrote the checkpoint"
    for name, values in _apart(then, now, key):
        yield f"{name}: {_values(*values)}; {back}"


def _apart(then: Any, now: Any, name: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield the dotted names at which two values differ, with what stands there."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*now, *then]):
            yield from _apart(then.get(key, ABSENT), now.get(key, ABSENT), f"{name}.{key}" if name else str(key))
    elif then != now:
        yield name, (then, now)


def _values(then: Any, now: Any) -> str:
    """Say what a value was and is."""
    shown = (value if value == ABSENT else repr(value) for value in (then, now))
    return "{} in the checkpoint, {} now".format(*shown)


def _typed(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, str):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()


# --- content ----------------------------------------------------------------------------------------------------------


def _model_errors(
    recipe: Recipe, source: Source, facts: Mapping[str, Any], state: Mapping[str, Any], moved: Mapping[str, str]
) -> list[str]:
    key, then = "model_name_or_path", state["data"]
    place = moved.get(key, f"{key}: {recipe.model_name_or_path}")
    if state["base"] != source.fingerprint:
        return [f"{place}: the weights are not those of the checkpoint; give the model with which the run began"]
    errors = [
        f"{place}: {name} of its config.json is {_values(*values)}; put it back"
        for name, values in _apart(_settled(then.get("config", {})), _settled(facts["config"]), "")
        if name.rpartition(".")[2] not in ASIDE
    ]
    if then.get("tokenizer") != facts["tokenizer"]:
        errors.append(f"{place}: the tokenizer is not that of the checkpoint; put its files back")
    if then.get("template") != facts["template"]:
        given = "data.chat_template"
        place = moved.get(given) or (f"{given}: {recipe.data.chat_template}" if recipe.data.chat_template else place)
        errors.append(
            f"{place}: the chat template is not that of the checkpoint; give the one with which the run began"
        )
    if recipe.method.inherits and then.get("adapter") != facts.get("adapter"):
        place = moved.get("method.adapter", f"method.adapter: {recipe.method.inherits}")
        errors.append(
            f"{place}: the weights are not those of the checkpoint; give the adapter with which the run began"
        )
    return errors


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with all defaults: another version of transformers may write fewer or other keys."""
    if config.get("model_type") not in CONFIG_MAPPING:
        return dict(config)
    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).to_dict()


def _data_errors(
    recipe: Recipe, facts: Mapping[str, Any], then: Mapping[str, Any], moved: Mapping[str, str]
) -> list[str]:
    if then.get("date") != facts.get("date"):
        return [f"the date in the prompts: {_values(then.get('date', ABSENT), facts.get('date', ABSENT))}"]
    places = [line for key, line in moved.items() if BY_CONTENT[key] == BY_CONTENT["data.dataset"]]
    place = ", and ".join(places) or f"data.dataset: {recipe.data.dataset}"
    if then.get("examples") != facts["examples"]:
        changed = _changed(recipe.data.names, then.get("examples") or [], facts["examples"])
        what = "files" if recipe.data.streaming else "examples"
        return [
            f"{place}: the {what} of {changed} are not those of the checkpoint; give the data with which the run began"
        ]
    if then.get("split") != facts["split"]:
        why = f"the column {recipe.data.held_out_by} differs" if recipe.data.held_out_by else "the questions differ"
        return [f"{place}: other examples would be held out, for {why}; give the data with which the run began"]
    return []


def _changed(names: Sequence[str], then: Sequence[str], now: Sequence[str]) -> str:
    """Name the datasets whose digests differ; all of them if there were more or fewer."""
    if len(then) != len(now):
        return ", ".join(names)
    return ", ".join(name for name, was, digest in zip(names, then, now, strict=True) if was != digest)


def _length_errors(facts: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Compare what follows from all settings and, of the global batch, from the number of ranks."""
    batch, steps = then.get("global_batch"), then.get("total_steps")
    if batch != facts["global_batch"]:
        return [
            f"global batch: {_values(batch, facts['global_batch'])}; set per_device_train_batch_size and "
            f"gradient_accumulation_steps so that their product with the number of ranks is {batch}"
        ]
    if steps != facts["total_steps"]:
        return [f"steps of the run: {_values(steps, facts['total_steps'])}; resume with the version that wrote it"]
    return []
