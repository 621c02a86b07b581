"""The merged Hugging Face checkpoint of a base model and a LoRA, written with one tensor in memory at a time.

    merged W = base + the adapter's update, added in float32 and rounded once

The base is the stored W0 or, with a backbone, the quantized weight on which a run trained. `gaps` measures what either
merge would change, without writing it.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.models.backbone import Backbone
from llm_lowrank.models.foreign import DATE, TEMPLATE, Lora, Update
from llm_lowrank.models.prequantized import without_announcement
from llm_lowrank.models.source import INDEX, SINGLE, Source
from llm_lowrank.models.stopping import GENERATION, read_ends, with_ends
from llm_lowrank.numerics.files import read_object, stream_safetensors, sync, write_json

# The share of the whole update that rounding may take. With more of it gone the merged model is not the trained one.
LOST = 0.5
# Files of a tokenizer beside those that its class names; the folder is that of templates besides the default one.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt"),
)
NAMED = 3  # replaced tensors that a report names
NAMED_TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Merged:
    """The report of a merged checkpoint."""

    path: Path
    lost: dict[str, float]  # module -> |realized - wanted| / |wanted|: the share of its update that rounding took
    replaced: list[str] = field(default_factory=list)  # tensors that the adapter brought and the base has otherwise
    tokens: list[str] = field(default_factory=list)  # that the adapter's tokenizer has and the base's has not
    moved: bool = False  # whether the base was quantized on another device than here

    @property
    def worst(self) -> str:
        """The module whose update lost most."""
        return max(self.lost, key=self.lost.__getitem__)

    def __str__(self) -> str:
        most = self.lost[self.worst]
        advice = "; merge into float32, or use the adapter unmerged, to keep all of it" if most > 0.05 else ""
        error = f"rounding error at most {most:.2%} of an update ({self.worst})"
        more = f" and {len(self.replaced) - NAMED} more" if len(self.replaced) > NAMED else ""
        names = ", ".join(self.replaced[:NAMED]) + more
        replaced = f"; {names} as the adapter brings it, which the base has otherwise" if names else ""
        plural = "s" * (len(self.tokens) != 1)
        grown = f"; the tokenizer is the adapter's, with {len(self.tokens)} token{plural} more than the base's"
        again = "; the base was quantized on a GPU and now again on the CPU, where a value between two codes may get "
        again += "the other one"
        notes = f"{grown if self.tokens else ''}{again if self.moved else ''}"
        return f"{self.path}: {len(self.lost)} modules merged, {error}{advice}{replaced}{notes}"


@dataclass
class Merging:
    """The tensors of a merged checkpoint, one at a time: base + adapter in float32, rounded once.

    The base is the checkpoint's W0 or, with a backbone, the quantized weight on which the run trained.
    """

    source: Source
    lora: Lora
    dtype: torch.dtype | None = None  # of every floating-point tensor; None: each keeps its dtype
    backbone: Backbone | None = None
    # Where the sums are made. A checkpoint is merged on the CPU, so that it does not depend on who merges it.
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.updated = _find_weights(self.source, self.lora)
        modules = self.backbone.modules if self.backbone else []
        self.quantized = {self.source.stored_name(f"{name}.weight"): name for name in modules}
        self.brought = _find_bases(self.source, self.lora)
        self.rows = _find_rows(self.source, self.lora)
        self.layout = {name: self.source.layout(name) for name in self.source.names()}
        for name, module in self.rows.items():
            stored, (count, n) = self.layout[name]
            self.layout[name] = stored, [max(count, *(token + 1 for token in self.lora.tokens[module])), n]
        if self.dtype is not None:
            self.layout = {
                name: (self.dtype if stored.is_floating_point else stored, shape)
                for name, (stored, shape) in self.layout.items()
            }
        self.lost: dict[str, float] = {}  # module -> |realized - wanted| / |wanted|
        self.sizes: dict[str, float] = {}  # module -> |wanted|
        self.replaced: list[str] = []  # tensors of lora.bases that differ from the base's

    def tensor(self, name: str) -> Tensor:
        """Compute one tensor of the merged checkpoint; for an adapted module also note what rounding took.

        name: on disk or in the model.
        """
        name = self.source.stored_name(name)
        weight, target = self.source.tensor(name), self.layout[name][0]
        if self.backbone is not None and name in self.quantized and not self.source.is_nf4(name):
            weight = self.backbone.base(self.quantized[name], weight)
        if name in self.brought:
            base, weight = weight, self.lora.base(self.brought[name])
            if not torch.equal(base, weight.to(base.dtype)):
                self.replaced.append(name)
        if name in self.rows:
            rows = self.lora.token_rows(self.rows[name]).float()
            whole = weight.new_zeros(self.layout[name][1], dtype=torch.float32)
            whole[: len(weight)] = weight.float()
            whole[self.lora.tokens[self.rows[name]]] = rows
            return whole.to(target)
        if name not in self.updated:
            return weight.to(target)
        module, weight = self.updated[name], weight.to(self.device)
        merged, self.lost[module], self.sizes[module] = add_rounded(weight, self.lora.update(module), target)
        return merged

    @property
    def vocabulary(self) -> int | None:
        """The rows of the merged embedding, if the adapter has rows for it; otherwise None."""
        return max((self.layout[name][1][0] for name in self.rows), default=None)

    @property
    def lost_of_all(self) -> float:
        """|realized - wanted| / |wanted| over all modules that were merged so far."""
        wanted = math.hypot(*self.sizes.values())
        return math.hypot(*(self.lost[name] * size for name, size in self.sizes.items())) / wanted if wanted else 0.0


def merge(
    source: Source,
    adapter_dir: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    backbone: Backbone | None = None,
) -> Merged:
    """Write base + adapter as a Hugging Face checkpoint, one tensor in memory at a time, and return a report.

    `dtype` converts every floating-point tensor; by default each keeps its dtype. With a `backbone` the adapter is
    merged into the quantized weights on which the run trained, instead of the checkpoint's weights. The folder is
    written under another name and renamed when it is complete. Call on one rank. Raise ValueError if the output exists,
    if the adapter does not fit the base, or if rounding takes more than LOST of the whole update.
    """
    output = Path(output)
    _check_output(output)
    merging = Merging(source, Lora.open(adapter_dir), dtype, backbone)
    more = _more_tokens(Path(adapter_dir), source, merging.vocabulary)
    progress = tqdm(total=len(merging.layout), desc="merging", unit="tensor", disable=None)

    def produce(name: str) -> Tensor:
        progress.update()
        return merging.tensor(name)

    aside = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        for file, names in source.shards():
            stream_safetensors(aside / file, {name: merging.layout[name] for name in names}, produce, {"format": "pt"})
        if set(source.files.values()) != {SINGLE}:
            size = sum(stored.itemsize * math.prod(shape) for stored, shape in merging.layout.values())
            write_json(aside / INDEX, {"metadata": {"total_size": size}, "weight_map": source.files})
        _check_lost(merging, output)
        _copy_the_rest(source, aside, dtype, merging.vocabulary)
        _copy_answering(Path(adapter_dir), source, aside)
        for kept in TOKENIZER_FILES if more else ():
            if (own := Path(adapter_dir) / kept).is_file():
                shutil.copyfile(own, aside / kept)
        sync(aside)
        os.replace(aside, output)  # over an empty folder too
        sync(output.parent)
    finally:
        progress.close()
        shutil.rmtree(aside, ignore_errors=True)
    moved = backbone is not None and backbone.device != "cpu" and not torch.cuda.is_available()
    return Merged(output, merging.lost, merging.replaced, more, moved)


@dataclass(frozen=True)
class Gap:
    """The difference between the answers of a merged model and those of the trained model."""

    logits: float  # |merged - trained| / |trained|
    agreement: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return f"logits {self.logits:.1%} apart, the same most likely token at {self.agreement:.1%} of the positions"


@torch.no_grad()
def gaps(
    model: torch.nn.Module, wrapped: torch.nn.Module, inputs: dict[str, Tensor], mergings: Sequence[Merging | None]
) -> list[Gap | None]:
    """Compare the answers of the trained model with those of each merged model, without writing it. Collective.

    For each merging the model answers again with every frozen linear replaced by the weight that would be written; one
    such weight is in memory at a time. Only rank 0 has mergings. The other ranks pass None in their places and get
    None: they take part in the forward, and their answers are ignored.
    """
    attended = inputs["attention_mask"].bool()

    def answers() -> Tensor:
        return wrapped(**inputs, use_cache=False).logits[attended].float()

    frozen = [(name, m) for name, m in model.named_modules() if isinstance(m, FrozenLinear)]
    trained, by_merging = answers(), list[Gap | None]()
    for merging in mergings:
        # each layer's forward is replaced on the object, so that engines still gather at the module's call
        try:
            for name, layer in frozen:
                if merging is not None:
                    layer.forward = partial(_merged_forward, merging, name, layer)  # type: ignore[method-assign]
            merged = answers()
        finally:
            for _, layer in frozen:
                vars(layer).pop("forward", None)
        distance = float((merged - trained).norm() / trained.norm())
        agreement = float((merged.argmax(-1) == trained.argmax(-1)).float().mean())
        by_merging.append(None if merging is None else Gap(distance, agreement))
    return by_merging


def _merged_forward(merging: Merging, name: str, layer: FrozenLinear, x: Tensor) -> Tensor:
    w = merging.tensor(f"{name}.weight").to(x.device, x.dtype)
    return torch.nn.functional.linear(x, w, None if layer.bias is None else layer.bias.to(x.dtype))


def add_rounded(weight: Tensor, update: Update, dtype: torch.dtype) -> tuple[Tensor, float, float]:
    """Return the updated W, computed in float32 and rounded once, with `lost` and |wanted|.

    lost = |realized - wanted| / |wanted|,  wanted = the update,  realized = round(W + wanted) - round(W)
    """
    wanted = update.change(weight.float())  # (m, n)
    merged = (weight.float() + wanted).to(dtype)
    realized = merged.float() - weight.to(dtype).float()
    size = float(wanted.norm())
    if not math.isfinite(size):
        raise ValueError("the adapter or the base holds NaN or infinity; use another checkpoint of the run")
    return merged, float((realized - wanted).norm()) / size if size else 0.0, size


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give another output or remove it")


def _check_lost(merging: Merging, output: Path) -> None:
    """Raise ValueError if rounding took more than LOST of the whole update, or if it is not finite."""
    if merging.lost_of_all <= LOST:
        return
    worst = max(merging.lost, key=merging.lost.__getitem__)
    dtype = str(merging.layout[merging.source.stored_name(f"{worst}.weight")][0]).removeprefix("torch.")
    raise ValueError(
        f"{output} was not written: rounding to {dtype} would take {merging.lost_of_all:.1%} of the update, and "
        f"{merging.lost[worst]:.1%} of that of {worst}; use the adapter in {merging.lora.path} unmerged, or merge into "
        f"float32: llm-lowrank merge --dtype float32"
    )


def _find_weights(source: Source, lora: Lora) -> dict[str, str]:
    """Tensor name -> module, for every module of the adapter.

    Raise ValueError if a module's weight is missing from the checkpoint, tied to another one or of another shape.
    """
    tied = json.loads((source.path / "config.json").read_text()).get("tie_word_embeddings", False)
    stored = set(source.names())
    for module in lora.modules:
        name = source.stored_name(f"{module}.weight")
        if (tied or name not in stored) and module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
            raise ValueError(
                f"{lora.path} adapts {module}, which shares its weight with the other end of the model in "
                f"{source.path} (tie_word_embeddings); merged, it would change both. Leave it out of target_modules or "
                "use the adapter unmerged"
            )
        if name not in stored:
            near = difflib.get_close_matches(name, stored, 2)
            hint = f" (it has {', '.join(near)})" if near else ""
            raise ValueError(
                f"{lora.path} adapts {module}, but {source.path} has no tensor {name}{hint}; is it the right base "
                "model?"
            )
        shape, wanted = tuple(source.layout(name)[1]), lora.update(module).pairs.shape
        if shape != wanted:
            raise ValueError(
                f"{lora.path}: {module} updates a {wanted} weight, in {source.path} it is {shape}; is that the right "
                "base?"
            )
    return {source.stored_name(f"{module}.weight"): module for module in lora.modules}


def _find_bases(source: Source, lora: Lora) -> dict[str, str]:
    """Tensor name -> its name in the adapter, for every tensor that the adapter brings in the place of the base's.

    Raise ValueError if one is missing, has another shape, or is only one of two that share a matrix.
    """
    stored, found = set(source.names()), {source.stored_name(name): name for name in lora.bases}
    for name, other in source.tied.items() if lora.bases else ():
        there = [tensor for tensor in (name, other) if tensor in lora.bases]
        if len(there) == 1:
            raise ValueError(
                f"{lora.path} brings its own {there[0]}, which shares its matrix with "
                f"{other if there == [name] else name} in {source.path} (tie_word_embeddings); merged, it would change "
                "both. Use the adapter unmerged"
            )
        if there and not torch.equal(lora.base(name), lora.base(other)):
            raise ValueError(
                f"{lora.path} brings {name} and {other}, which differ and share one matrix in {source.path} "
                "(tie_word_embeddings), where only one has a place; use the adapter unmerged"
            )
        if there and source.stored_name(name) not in stored:
            del found[source.stored_name(name)]
    for name, tensor in found.items():
        brought = tuple(lora.base(tensor).shape)
        has = tuple(source.layout(name)[1]) if name in stored else None
        if brought != has:
            raise ValueError(
                f"{lora.path} brings its own {name} of shape {brought}, {source.path} has {has or 'none'}: was the "
                "vocabulary resized? Merge it with PEFT's merge_and_unload instead"
            )
    return found


def _find_rows(source: Source, lora: Lora) -> dict[str, str]:
    """Tensor name -> module, for every embedding or output layer of which the adapter has rows.

    Raise ValueError if such a tensor is missing, has another width, or would be left with rows that nobody knows.
    """
    stored, found = set(source.names()), dict[str, str]()
    for module, tokens in lora.tokens.items():
        name, width = source.stored_name(f"{module}.weight"), lora.token_rows(module).shape[1]
        has = tuple(source.layout(name)[1]) if name in stored else None
        if has is None or has[1] != width:
            raise ValueError(
                f"{lora.path} has rows of {width} numbers for {name}, {source.path} has {has or 'no such tensor'}; is "
                "that the right base?"
            )
        if missing := sorted(set(range(has[0], max(tokens) + 1)) - set(tokens)):
            raise ValueError(
                f"{lora.path} has a row for token {max(tokens)} and none for {missing[0]}, nor has {source.path}; give "
                "the base with the embedding that it was trained on"
            )
        found[name] = module
    tied = read_object(source.path / "config.json").get("tie_word_embeddings", False)
    other = next((name for name in stored if name.rpartition(".")[0].endswith("lm_head") and name not in found), None)
    if found and other is not None and other.endswith(".weight"):
        (name, module), *_ = found.items()
        grows = max(lora.tokens[module]) >= source.layout(name)[1][0]
        if tied:
            found[other] = module  # a copy of the embedding, which is stored beside it
        elif grows:
            raise ValueError(
                f"{lora.path} has rows of new tokens for {name} and none for {other}; use PEFT's merge_and_unload"
            )
    return found


def _copy_answering(adapter: Path, source: Source, output: Path) -> None:
    """Copy what the folder of an adapter says of prompts and answers: the chat template of the training, the date that
    it wrote, and the tokens that end an answer, which are added to those of the base.
    """
    if (adapter / DATE).is_file():
        shutil.copyfile(adapter / DATE, output / DATE)
    template = adapter / TEMPLATE
    if template.is_file() and template.read_text(encoding="utf-8") not in _templates(source.path):
        shutil.copyfile(template, output / TEMPLATE)
    if ends := read_ends(adapter):
        write_json(output / GENERATION, with_ends(source.path, ends))


def _more_tokens(adapter: Path, source: Source, vocabulary: int | None) -> list[str]:
    """Return the tokens that the tokenizer in the folder of an adapter has and that of the base has not.

    Those for which the merged model has no row do not count. ValueError if they differ in more than that.
    """
    own, base = adapter / "tokenizer.json", source.path / "tokenizer.json"
    if not own.is_file() or not base.is_file() or own.read_bytes() == base.read_bytes():
        return []
    mine, theirs = _tokens(own), _tokens(base)
    more = sorted(mine.keys() - theirs.keys(), key=mine.__getitem__)
    other = next((token for token, number in theirs.items() if mine.get(token) != number), None)
    if other is not None:
        raise ValueError(
            f"{adapter} was trained with another tokenizer than that of {source.path}: {other!r} is {mine.get(other)} "
            f"there and {theirs[other]} here; is that the right base?"
        )
    rows = vocabulary or read_object(source.path / "config.json").get("vocab_size")
    # a token without a row, which is mostly one for padding, was in no example
    return [token for token in more if not isinstance(rows, int) or mine[token] < rows]


def _tokens(file: Path) -> dict[str, int]:
    """Return token -> number of a tokenizer.json."""
    content = read_object(file)
    vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of a Unigram model: [token, score]
        vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content.get("added_tokens", [])}}


def _templates(folder: Path) -> list[str]:
    """The chat templates of a checkpoint; a tokenizer may have several."""
    found = [file.read_text(encoding="utf-8") for file in (folder / TEMPLATE,) if file.is_file()]
    if (file := folder / "tokenizer_config.json").is_file() and not found:
        given = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
        found = [entry["template"] for entry in given] if isinstance(given, list) else [given]
    return found


def copy_tokenizer(source: Source, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copy the files of a checkpoint's tokenizer to a folder without a config.json, so that it loads from there.

    Copies suit every version of transformers that the checkpoint suits. If the files leave the tokenizer's class to
    config.json, the tokenizer is saved instead.
    """
    file = source.path / "tokenizer_config.json"
    if not file.is_file() or "tokenizer_class" not in json.loads(file.read_text(encoding="utf-8")):
        tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.path.iterdir()):
        if path.name in {*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()} or path.suffix == ".model":
            shutil.copyfile(path, folder / path.name)
    _copy_named_templates(source, folder)


def _copy_named_templates(source: Source, folder: Path) -> None:
    if (named := source.path / NAMED_TEMPLATES).is_dir():
        shutil.copytree(named, folder / NAMED_TEMPLATES, dirs_exist_ok=True)


def _copy_the_rest(source: Source, output: Path, dtype: torch.dtype | None, vocabulary: int | None) -> None:
    """Copy config.json, tokenizer, chat templates, generation config: every small file except the index."""
    _copy_named_templates(source, output)
    for file in sorted(source.path.iterdir()):
        if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, output / file.name)
    if dtype is not None or source.prequantized or vocabulary is not None:
        config = json.loads((source.path / "config.json").read_text())
        config = without_announcement(config)  # decoded weights are stored plainly
        if vocabulary is not None:
            part = config if "vocab_size" in config else config.get("text_config", config)
            part["vocab_size"] = vocabulary
        if dtype is not None:
            config.pop("torch_dtype", None)  # the name before transformers 5
            config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(output / "config.json", config)
