"""The settings under `data:` in a recipe. The string under a field is its text in --help."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

MOST_TIMES = 1000  # that an epoch takes an example


@dataclass(frozen=True)
class Data:
    """What a run is trained on and how rows become batches. ValueError with all complaints about the values at once."""

    dataset: str = "reasoning-gym:chain_sum"
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow), a folder of them or of save_to_disk, a URL (s3://, hf://),
    a hub name, a preset or reasoning-gym:<task>. Several are written a, b."""
    weights: list[float] = field(default_factory=list)
    """For several datasets: how often an epoch takes the examples of each. 2 takes them twice, 0.5 takes half of them.
    Empty: 1 for each."""
    preset: Literal["none", "alpaca", "commonsense-170k", "magicoder-evol-instruct", "metamathqa", "ultrachat"] = "none"
    """Columns, format and prompt style of a published dataset, for a local copy of it. Its name as data.dataset reads
    the dataset from the hub."""
    split: str = "train"
    """Split of a hub name, a folder or a file."""
    subset: str = ""
    """Subset (configuration) of a hub name. For several datasets: one for each, written a, b; nothing for one without:
    main,,all"""
    revision: str = ""
    """Branch, tag or commit of a hub name. For several datasets: one for each, written as data.subset."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "tokens"] = "auto"
    """Format of a row. auto: the column names decide."""
    columns: dict[str, str] = field(default_factory=dict)
    """Name of a column in the format -> its name in the data: {prompt: question, completion: answer}."""
    ignore: list[str] = field(default_factory=list)
    """Columns, and keys of messages, that are left aside although they could change what is learned: [images, tools].
    A row that has one of them is refused otherwise, where nothing uses it."""
    prompt_style: Literal["auto", "chat", "plain", "alpaca", "metamath", "magicoder"] = "auto"
    """chat: the chat template. plain: prompt + answer. The others: as in their papers. auto: chat, and without a chat
    template the style of the preset or plain."""
    chat_template: str = ""
    """A Jinja file to use in place of the tokenizer's chat template; it is saved with the results. Empty: the
    tokenizer's own."""
    system: str = ""
    """System prompt of conversations that have none."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation are trained: all of them or the last one."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What happens with rows that cannot be used (no answer, a missing field, an unknown role). refuse: the run stops
    and names them. drop: they are left out and counted."""
    streaming: bool = False
    """Read while training, in a shuffle buffer of 10,000 rows, and store nothing. It needs max_steps."""
    max_length: int = 1024
    """Longer examples are cut to this many tokens. With packing: the length of a row."""
    packing: bool = False
    """Fill rows of max_length with several examples each (best fit); none sees another. A batch then counts rows, not
    examples."""
    group_by_length: bool = False
    """Put examples of about the same length into a batch, so that less of it is padding. Batches are still drawn at
    random."""
    held_out: int = 64
    """Number of examples that are kept out of training for evaluation, chosen by the seed."""
    held_out_by: str = ""
    """Column of the data, such as module: no value of a held-out example is trained on. By default the question."""
    size: int = 1000
    """Number of examples that reasoning-gym generates, held-out ones included."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of the reasoning-gym task."""
    workers: int = 1
    """Processes of a node that turn rows into tokens before the run. 1: the run itself. The tokens are the same with
    any number, and a run that resumes may have another one."""

    def __post_init__(self) -> None:
        errors = [
            f"data.{name}={getattr(self, name)}: must be at least {least}"
            for name, least in {"max_length": 2, "held_out": 0, "size": 1, "workers": 1}.items()
            if getattr(self, name) < least
        ]
        if self.weights and len(self.weights) != len(self.names):
            errors.append(
                f"data.weights has {len(self.weights)} numbers and data.dataset {len(self.names)} names; give one for "
                "each"
            )
        errors += [
            f"data.{name} has {len(values)} parts and data.dataset {len(self.names)} names; give one for each, or "
            "nothing between two commas"
            for name, values in {"subset": self.subsets, "revision": self.revisions}.items()
            if len(values) != len(self.names)
        ]
        if any(not 0 < weight <= MOST_TIMES for weight in self.weights):
            errors.append(
                f"data.weights={self.weights}: must be above 0 and at most {MOST_TIMES}; leave a dataset out of "
                "data.dataset instead of a weight of 0"
            )
        if self.packing and self.group_by_length:
            errors.append("data.group_by_length: packed rows are all of one length; remove it or data.packing")
        if self.chat_template and self.prompt_style not in ("auto", "chat"):
            errors.append(f"data.prompt_style: {self.prompt_style} would ignore data.chat_template; remove one of them")
        if not all(self.names):
            errors.append(f"data.dataset: {self.dataset!r} has an empty name")
        if self.streaming:
            rest = ("packing", "group_by_length", "weights", "held_out_by")
            conflicts = [name for name in rest if getattr(self, name)]
            if self.workers > 1:
                errors.append(
                    "data.workers is for rows that become tokens before a run, and those of data.streaming become "
                    "tokens while it trains; remove one of them"
                )
            if conflicts or len(self.names) > 1:
                conflict = ", ".join(conflicts) or "several datasets"
                errors.append(f"data.streaming cannot be used with {conflict}: the data is not known whole")
        if errors:
            raise ValueError("\n".join(errors))

    @property
    def names(self) -> list[str]:
        """The datasets of `dataset`, one name each. Commas of a path that exists do not part names."""
        parts = self.dataset.split(",")
        names: list[str] = []
        while parts:
            end = len(parts)
            while end > 1 and not os.path.exists(os.path.expanduser(",".join(parts[:end]).strip())):
                end -= 1
            names.append(",".join(parts[:end]).strip())
            parts = parts[end:]
        return names

    @property
    def subsets(self) -> list[str]:
        """The subset of each dataset; empty where there is none."""
        return _one_each(self.subset, len(self.names))

    @property
    def revisions(self) -> list[str]:
        """The revision of each dataset; empty where there is none."""
        return _one_each(self.revision, len(self.names))


def _one_each(text: str, count: int) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else [""] * count
