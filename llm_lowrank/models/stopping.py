"""The tokens at which generation stops, in a model and in the generation_config.json of a folder.

transformers and servers read them there. A tokenizer has one eos_token only, which keeps its other uses (padding, the
end of texts), so that it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.numerics.files import read_object

GENERATION = "generation_config.json"


def stop_at(model: PreTrainedModel, ends: Iterable[int]) -> None:
    """Let generation stop at these tokens too, beside those of the model's generation config."""
    known = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = _union(ends, known) or None


def read_ends(folder: Path) -> list[int]:
    """Return the tokens at which the generation_config.json of a folder stops; none without such a file."""
    file = folder / GENERATION
    return _union([], read_object(file).get("eos_token_id")) if file.is_file() else []


def with_ends(folder: Path, ends: Iterable[int]) -> dict[str, Any]:
    """Return the generation_config.json of a checkpoint, or the one that follows from its config.json, in which these
    tokens end an answer too. They come first, for a reader that takes one token only.
    """
    file = folder / GENERATION
    if file.is_file():
        settings = read_object(file)
    else:
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).to_diff_dict()
    return {**settings, "eos_token_id": _union(ends, settings.get("eos_token_id"))}


def _union(first: Iterable[int], known: int | list[int] | None) -> list[int]:
    more = known if isinstance(known, list) else [] if known is None else [known]
    return list(dict.fromkeys([*first, *more]))


def stops_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens at which an answer ends here: those of the generation config, and the tokenizer's eos."""
    return _union(_union([], model.generation_config.eos_token_id), tokenizer.eos_token_id)
