"""The model or adapter that is evaluated, found by its name and checked before it is loaded."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.data import Limits, tokenizer_of
from llm_lowrank.models.architectures import limits_of, skeleton
from llm_lowrank.models.foreign import ALL, CONFIG, DATE, TEMPLATE, WEIGHTS
from llm_lowrank.models.source import Source
from llm_lowrank.models.stopping import read_ends, stop_at
from llm_lowrank.numerics.files import file_sha256, read_object

Use = Literal["merged", "adapter", "base"]


@dataclass(frozen=True)
class Subject:
    """The weights to evaluate and where they come from."""

    given: str  # the name that the user gave
    source: Source  # the weights, or those under the adapter
    adapter: Path | None = None  # a PEFT folder; None: there is no adapter, or it is merged
    output: Path | None = None  # output_dir of the run that trained them, with recipe.yaml
    use: Use | None = None  # which weights of a run; None: they are not of a run

    @classmethod
    def find(cls, checkpoint: str, use: Use | None, base: str | None) -> Subject:
        """Find the weights that a user names. ValueError if they are not there or the options do not fit them.

        checkpoint: output_dir of a run, a PEFT folder, or whatever Source.open takes. base: replaces the base model
        that an adapter names.
        """
        folder = Path(checkpoint).expanduser()
        available: list[Use] = [name for name, file in _OF_A_RUN.items() if (folder / file).is_file()]
        if available or (folder / "recipe.yaml").is_file():
            return cls._of_run(checkpoint, folder.resolve(), available=available, use=use, base=base)
        if use is not None:
            raise ValueError(f"--use {use} is for the output_dir of a run; {checkpoint} is none, leave it out")
        if (folder / CONFIG).is_file():
            source = Source.open(base) if base else _base_of(folder)
            return cls(checkpoint, source, _check_files(folder.resolve()))
        if base:
            raise ValueError(f"--model_name_or_path is the model under an adapter; {checkpoint} is none, leave it out")
        return cls(checkpoint, Source.open(checkpoint))

    @classmethod
    def _of_run(cls, given: str, folder: Path, *, available: list[Use], use: Use | None, base: str | None) -> Subject:
        if use is None and not available:
            raise ValueError(
                f"{folder} holds neither merged/ nor adapter/: the run is not finished; --use base takes the model "
                "before it"
            )
        use = use or available[0]
        if use != "base" and use not in available:
            raise ValueError(
                f"{folder} has no {use}/; it has {' and '.join(f'{name}/' for name in available) or 'no result yet'}"
            )
        output = folder if (folder / "recipe.yaml").is_file() else None
        if use == "merged":
            return cls(given, Source.open(folder / "merged"), None, output, use)
        if base is not None:
            source = Source.open(base)
        elif "adapter" in available:
            source = _base_of(folder / "adapter")
        else:
            settings = _settings(folder)
            source = Source.open(settings["model_name_or_path"], settings.get("model_revision", ""))
        adapter = _check_files(folder / "adapter") if use == "adapter" else None
        return cls(given, source, adapter, output, use)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer with the chat template of the run, for the base model too.

        A merged model has the template, an adapter's folder may have it, and the recipe names it.
        """
        if self.use == "merged":
            return tokenizer_of(self.source.path)
        folder = self.beside()
        if self.adapter is not None and self._rows() and (self.adapter / "tokenizer_config.json").is_file():
            return tokenizer_of(self.adapter)  # with the tokens that the training added
        if folder is not None and (folder / TEMPLATE).is_file():
            return tokenizer_of(self.source.path, str(folder / TEMPLATE))
        return tokenizer_of(self.source.path, self.settings().get("data", {}).get("chat_template", ""))

    def _rows(self) -> int:
        """The rows of the embedding that the tokens of an adapter need; 0 if it trained none."""
        if self.adapter is None:
            return 0
        named = read_object(self.adapter / CONFIG).get("trainable_token_indices") or []
        lists = named.values() if isinstance(named, dict) else [named]
        return max((int(token) + 1 for tokens in lists for token in tokens), default=0)

    @property
    def limits(self) -> Limits:
        """The tokens and the positions that the model takes, with the rows that an adapter brings."""
        limits = limits_of(skeleton(self.source.path, torch.float32, "eager"))
        return replace(limits, vocabulary=max(limits.vocabulary, self._rows()))

    @cached_property
    def date(self) -> str:
        """The day that a chat template which writes the date takes for today: that of the training, for the base model
        of a run too; without a training that says one, the day it is. ValueError if the file says no day.
        """
        beside = self.source.path if self.use == "merged" else self.beside() or self.source.path
        for folder in (beside, self.output):
            if folder is not None and (folder / DATE).is_file():
                said = (folder / DATE).read_text(encoding="utf-8").strip()
                try:
                    return Date.fromisoformat(said).isoformat()
                except ValueError as error:
                    raise ValueError(
                        f"{folder / DATE}: {said!r} is no date; write the day of the training as YYYY-MM-DD, or remove "
                        "the file for today's"
                    ) from error
        return Date.today().isoformat()

    def beside(self) -> Path | None:
        """Return the folder of the adapter that is evaluated, or that the run has beside the evaluated weights."""
        return self.adapter or (self.output / "adapter" if self.output else None)

    def load(self, dtype: str, device: torch.device) -> PreTrainedModel:
        """Load the model in evaluation mode. dtype: auto (as stored), float32, bfloat16 or float16."""
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model = AutoModelForCausalLM.from_pretrained(
            self.source.path, dtype=kind, device_map={"": device}, trust_remote_code=False, use_safetensors=True
        )
        if self.adapter is not None:
            from peft import PeftModel

            if self._rows() > model.get_input_embeddings().num_embeddings:
                model.resize_token_embeddings(self._rows(), mean_resizing=False)  # the adapter has the values
            # the base model with PEFT's layers in it looks like an ordinary model to the tasks
            model = PeftModel.from_pretrained(model, str(self.adapter)).get_base_model()
        # the base of a run is asked as the trained model is
        if (folder := self.beside()) is not None:
            stop_at(model, read_ends(folder))
        return model.eval()

    def describe(self) -> dict[str, Any]:
        """Return the section `checkpoint` of the record. Digests tell other weights of the same name apart."""
        section: dict[str, Any] = {
            "given": self.given,
            "model": self.source.name,
            "fingerprint": self.source.fingerprint,
        }
        if self.use is not None:
            section["use"] = self.use
        if self.adapter is not None:
            section |= {"adapter": str(self.adapter), "adapter_sha256": file_sha256(self.adapter / WEIGHTS)}
        return section

    def settings(self) -> dict[str, Any]:
        """Return the recipe of the run that trained the weights; empty if there is none."""
        return _settings(self.output) if self.output else {}


# the results of a run, each with a file that shows it is there; without --use the first one is taken
_OF_A_RUN: dict[Use, str] = {"merged": "merged/config.json", "adapter": f"adapter/{CONFIG}"}


def _settings(output: Path) -> dict[str, Any]:
    """Read the recipe of a run. ValueError if the file is not one."""
    file = output / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from error
    if not (
        isinstance(recipe, dict)
        and isinstance(recipe.get("data"), dict)
        and isinstance(recipe.get("model_name_or_path"), str)
    ):
        raise ValueError(f"{file} is not the recipe of a run; give the output_dir of one")
    return recipe


def _base_of(adapter: Path) -> Source:
    """Open the base model that an adapter names. ValueError if it names none."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    if not config.get("base_model_name_or_path"):
        raise ValueError(f"{adapter / CONFIG} names no base model; give --model_name_or_path")
    return Source.under(config)


def _check_files(adapter: Path) -> Path:
    """Return the folder of an adapter if PEFT can load it from safetensors and lose nothing. ValueError otherwise.

    Without this check PEFT would read pickled weights where there are no others.
    """
    if not (adapter / WEIGHTS).is_file():
        raise ValueError(f"{adapter} has no {WEIGHTS}; pickled weights are not read, save it again with PEFT")
    if (adapter / ALL).is_file():
        raise ValueError(
            f"{adapter / WEIGHTS} was cut down and PEFT would leave out the rest; merge it (llm-lowrank merge) and "
            "give that"
        )
    if importlib.util.find_spec("peft") is None:
        raise ValueError('an adapter is loaded by peft, which is not installed: pip install "llm-lowrank[eval]"')
    return adapter
