"""The model card of a result, README.md: where it comes from, what was measured, how it is loaded.

A card begins with YAML that the Hugging Face hub reads. What is not known is left out, and a folder of this machine is
named without the folders around it: a card may be published.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from llm_lowrank.adapters.direction import Direction
from llm_lowrank.adapters.method import Method
from llm_lowrank.data import PRESETS, Data
from llm_lowrank.data.reading import kind_of
from llm_lowrank.models.export import in_vllm
from llm_lowrank.models.hub import repositories
from llm_lowrank.numerics.files import write_text

README = "README.md"
HERE = "PATH-OR-NAME"  # in the place of the repository's name, as long as nobody has given one
FIGURES = {"loss": "loss per trained token", "exact_match": "exact match", "mean_score": "mean score"}
# settings that say something about the machine of the training, not about the model
OURS = ("output_dir", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo", "method.svd_cache")
HUB_NAME = re.compile(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*")


@dataclass(frozen=True)
class Card:
    """What the cards of a run say."""

    name: str  # of the repository, or HERE
    method: str
    base: str  # hub name or folder
    adapter: Mapping[str, Any]  # adapter_config.json
    datasets: Sequence[str]  # of the recipe
    hub_datasets: Sequence[str]  # those of them that are on the hub, by their names there
    training: Sequence[str]  # sentences
    settings: Mapping[str, Any]  # that differ from the defaults, by their dotted names
    figures: Mapping[str, tuple[Any, Any]]  # of the held-out examples: before and after training
    versions: Mapping[str, str]
    papers: Mapping[str, str] = field(default_factory=dict)  # name of a method or direction -> its link
    license: Mapping[str, Any] = field(default_factory=dict)  # of the base, as its own card says

    @classmethod
    def of(
        cls,
        settings: Mapping[str, Any],
        *,
        changed: Mapping[str, Any],
        facts: Mapping[str, Any],
        evaluations: Sequence[Mapping[str, Any]],
        adapter: Mapping[str, Any],
    ) -> Card:
        """Return the card of a run.

        settings, changed: all of them, and those that differ from the defaults, by their dotted names. facts: what the
        run recorded when it started. evaluations: its records of held-out figures, and those about the state that it
        kept, if it chose one. adapter: adapter_config.json.
        """
        kind, direction = str(settings["method.type"]), settings.get("method.direction.type") or "none"
        kinds: list[type] = [Method.get_choice_class(kind)]
        kinds += [] if direction == "none" else [Direction.get_choice_class(direction)]
        named = {"method.type": kind, "data.dataset": settings["data.dataset"]}  # a recipe needs them in any case
        figures: dict[str, tuple[Any, Any]] = {}
        for key, name in FIGURES.items():
            if found := [record for record in evaluations if record.get(key) is not None]:
                figures[name] = (found[0][key] if found[0]["step"] == 0 else None, found[-1][key])
        kept = [str(record["why"]) for record in evaluations if record.get("why")][-1:]
        names = Data(dataset=settings["data.dataset"]).names
        return cls(
            name=settings.get("hub_model_id") or HERE,
            method=kinds[0].__name__,
            base=str(facts["model"]),
            adapter=adapter,
            datasets=names,
            hub_datasets=[found for found in map(hub_dataset, names) if found],
            training=[
                f"{facts['steps']} steps of {facts['batch']}, {facts['held_out']} held out",
                *kept,
                str(facts["engine"]),
            ],
            settings=named | dict(changed),
            figures=figures,
            versions=facts["versions"],
            papers={kind.__name__: link for kind in kinds if (link := paper_of(kind))},
            license=license_of(str(facts["model"])),
        )

    def write(self, folder: Path) -> None:
        """Write the cards into the output folder of a run: beside the adapter, and beside the merged model if there
        is one.
        """
        write_text(folder / "adapter" / README, self.text())
        if (folder / "merged" / "config.json").is_file():
            write_text(folder / "merged" / README, self.text(merged=True))

    def text(self, merged: bool = False) -> str:
        """The card of the adapter, or that of the merged model."""
        name = self._name(merged)
        title = f"{self.method}, {'merged model' if merged else 'LoRA adapter'}" if name == HERE else name
        parts = [
            f"---\n{self.data(merged).to_yaml()}\n---",
            f"# {title.rpartition('/')[2]}",
            f"{'A model' if merged else 'An adapter'} that was trained by {self._link(self.method)} on "
            f"{self._base()}, with llm-lowrank. {' '.join(self._also())}".strip(),
            "## Held-out figures",
            self._figures(),
            "## Use",
            self._use_of_merged() if merged else self._use_of_adapter(),
            "## Training",
            "\n".join(f"- {line}" for line in [f"Data: {', '.join(map(code, self.datasets))}", *self.training]),
            "Settings that differ from the defaults:",
            fenced(yaml.safe_dump(self._recipe(), sort_keys=False, allow_unicode=True).strip(), "yaml"),
            "## Versions",
            ", ".join(f"{name} {version}" for name, version in self.versions.items()) or "The run recorded none.",
        ]
        return "\n\n".join(parts) + "\n"

    def data(self, merged: bool) -> ModelCardData:
        """The part that the hub reads."""
        return ModelCardData(
            base_model=self.base if is_hub_name(self.base) else None,
            base_model_relation=("finetune" if merged else "adapter") if is_hub_name(self.base) else None,
            library_name="transformers" if merged else "peft",
            pipeline_tag="text-generation",
            datasets=list(self.hub_datasets) or None,
            tags=[*([] if merged else ["lora"]), "llm-lowrank", str(self.settings["method.type"])],
            **self.license,
        )

    def _name(self, merged: bool) -> str:
        return self.name if self.name == HERE else repositories(self.name, True)[int(merged)]

    def _link(self, name: str) -> str:
        return f"[{name}]({self.papers[name]})" if name in self.papers else name

    def _base(self) -> str:
        if is_hub_name(self.base):
            return f"[{self.base}](https://huggingface.co/{self.base})"
        return f"{code(Path(self.base).name)}, a folder of the machine of the training"

    def _also(self) -> list[str]:
        rest = [self._link(name) for name in self.papers if name != self.method]
        return [f"The gradients were replaced by {' and '.join(rest)}."] if rest else []

    def _figures(self) -> str:
        if not self.figures:
            return "The run measured none."
        rows = [f"| {name} | {said(before)} | {said(after)} |" for name, (before, after) in self.figures.items()]
        return "\n".join(["| | before training | after training |", "|---|---|---|", *rows])

    def _base_argument(self) -> str:
        return repr(self.base if is_hub_name(self.base) else f"PATH-TO/{Path(self.base).name}")

    def _use_of_adapter(self) -> str:
        rows = bool(self.adapter.get("trainable_token_indices"))
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig",
            "",
            f"adapter = {self.name!r}",
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
            f"model = AutoModelForCausalLM.from_pretrained({self._base_argument()})",
        ]
        if rows:  # a base whose embedding has rows to spare stays as it is
            lines += [
                "if len(tokenizer) > model.get_input_embeddings().num_embeddings:",
                "    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)",
            ]
        lines += [
            "model = PeftModel.from_pretrained(model, adapter)",
            "model.generation_config = GenerationConfig.from_pretrained(adapter)",
        ]
        served = in_vllm({"r": 0, **self.adapter})
        if not served.startswith("for vLLM"):
            return f"{fenced(chr(10).join(lines), 'python')}\n\n{served}."
        option = served.partition(": ")[2]
        command = f"vllm serve {self._base_argument()} --enable-lora {option} --lora-modules tuned={self.name}"
        return f"{fenced(chr(10).join(lines), 'python')}\n\n{fenced(command, 'bash')}"

    def _use_of_merged(self) -> str:
        name = self._name(merged=True)
        lines = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
            f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        ]
        return f"{fenced(chr(10).join(lines), 'python')}\n\n{fenced(f'vllm serve {name}', 'bash')}"

    def _recipe(self) -> dict[str, Any]:
        """The settings as a recipe has them, in their sections."""
        tree: dict[str, Any] = {}
        for name, value in self.settings.items():
            if name not in OURS:
                *sections, last = name.split(".")
                inner = tree
                for section in sections:
                    inner = inner.setdefault(section, {})
                inner[last] = shown(value)
        return tree


def is_hub_name(name: str) -> bool:
    """Whether a model has a name of the hub and is no folder or file here."""
    return "/" in name and bool(HUB_NAME.fullmatch(name)) and not Path(name).expanduser().exists()


def hub_dataset(name: str) -> str:
    """The name on the hub of a dataset of a recipe; "" for one that is not read from there."""
    if name in PRESETS:
        return PRESETS[name].hub
    if name.startswith("hf://datasets/"):
        name = "/".join(name.split("/")[3:5]).partition("@")[0]
    elif Path(name).expanduser().exists() or kind_of(name):
        return ""
    return name if HUB_NAME.fullmatch(name) else ""


def shown(value: Any) -> Any:
    """A setting without the folders of this machine around a file or folder, and without what a URL keeps secret."""
    if not isinstance(value, str):
        return value
    return ",".join(_shown_path(part) for part in value.split(","))


def _shown_path(text: str) -> str:
    if "://" in text:
        return re.sub(r"(?<=://)[^/@]*@|\?.*", "", text)
    path = text.startswith(("/", "~", "./", "../")) or ("/" in text and Path(text).expanduser().exists())
    return Path(text).name if path else text


def license_of(base: str) -> dict[str, Any]:
    """The license that the card of a model names, with the name and the link of one that the hub does not know.

    The card is in the folder of the model, or in the local cache of the hub.
    """
    card = Path(base) / README
    if is_hub_name(base) and isinstance(cached := try_to_load_from_cache(base, README), str):
        card = Path(cached)
    try:
        known = ModelCard.load(card).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # there is no card, or none that can be read
        return {}
    return {key: known[key] for key in ("license", "license_name", "license_link") if known.get(key)}


def paper_of(kind: type) -> str:
    """The link of the paper of a method or a direction, which its file names in its first two lines; "" without one."""
    first = (sys.modules[kind.__module__].__doc__ or "").splitlines()[:2]
    found = re.search(r"https://arxiv\.org/abs/[\d.]*\d", "\n".join(first))
    return found.group() if found else ""


def rename(folder: Path, old: str, new: str) -> None:
    """Put the name of a repository into a card, in the place of another one or of HERE."""
    if (card := folder / README).is_file():
        write_text(card, card.read_text(encoding="utf-8").replace(old, new))


def said(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def code(text: str) -> str:
    """Text as Markdown shows it word for word, in a line."""
    return f"`{shown(text)}`".replace("\n", " ")


def fenced(text: str, language: str) -> str:
    """A block of code; the fence is longer than any in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"
