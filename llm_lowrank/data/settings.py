"""The settings under `data:` in a recipe."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Data:
    dataset: str = "reasoning-gym:chain_sum"
    """.jsonl, .json or .parquet file, folder of them, hub name, preset, reasoning-gym:<task>, stdlib-code; several: a,
    b."""
    weights: list[float] = field(default_factory=list)
    """Of several datasets: how often an epoch takes the examples of each; 2: twice, 0.5: half of them. Empty: 1 each.
    """
    preset: Literal["none", "alpaca", "commonsense-170k", "magicoder-evol-instruct", "metamathqa", "ultrachat"] = "none"
    """Columns, format and prompt style of a published dataset, for a local copy of it. Its name as dataset reads it
    from the hub."""
    split: str = "train"
    """Split of a hub name, a folder or a file."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto"
    """What a row is; auto: what its columns say."""
    columns: dict[str, str] = field(default_factory=dict)
    """Name of a column in the format -> its name in the data: {prompt: question, completion: answer}."""
    prompt_style: Literal["auto", "chat", "plain", "alpaca", "metamath", "magicoder"] = "auto"
    """chat: the chat template; plain: prompt + answer; others: as in their papers. auto: chat; without a template the
    preset's or plain."""
    chat_template: str = ""
    """A Jinja file to use in place of the tokenizer's chat template; it is saved with the results. Empty: the
    tokenizer's own."""
    system: str = ""
    """System prompt of conversations that have none."""
    train_on: Literal["all", "last"] = "all"
    """Of a conversation: train every answer, or the last one."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows that cannot be used (no answer, a missing field, an unknown role): refuse the data and name them, or drop
    and count them."""
    streaming: bool = False
    """Read while training, in a shuffle buffer of 10,000 rows, and store nothing; needs max_steps."""
    max_length: int = 1024
    """Longer examples are cut to this many tokens; the length of a pack."""
    packing: bool = False
    """Fill rows of max_length with several examples each (best fit); none sees another. A batch then counts rows, not
    examples."""
    group_by_length: bool = False
    """Put examples of about the same length into a batch, so that less is padding; batches are still drawn at random.
    """
    held_out: int = 64
    """Examples kept out of training for evaluation, chosen by the seed; of stdlib-code, whole modules."""
    size: int = 1000
    """Number of examples that reasoning-gym generates, held-out ones included."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of the reasoning-gym task."""

    def __post_init__(self) -> None:
        for name, least in {"max_length": 2, "held_out": 0, "size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")
        if self.weights and len(self.weights) != len(self.names):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers and data.dataset {len(self.names)} names; give one for "
                "each"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ValueError(
                f"data.weights={self.weights}: must be above 0; leave a dataset out of data.dataset instead"
            )
        if self.packing and self.group_by_length:
            raise ValueError("data.group_by_length: packed rows are all of one length; remove it or data.packing")
        if self.chat_template and self.prompt_style not in ("auto", "chat"):
            raise ValueError(
                f"data.prompt_style: {self.prompt_style} would ignore data.chat_template; remove one of them"
            )
        if not all(self.names):
            raise ValueError(f"data.dataset: {self.dataset!r} has an empty name")
        if self.streaming:
            taken = [name for name in ("packing", "group_by_length", "weights") if getattr(self, name)]
            if taken or len(self.names) > 1:
                what = ", ".join(taken) or "several datasets"
                raise ValueError(f"data.streaming cannot be used with {what}: the data is not known whole")

    @property
    def names(self) -> list[str]:
        return [name.strip() for name in self.dataset.split(",")]
