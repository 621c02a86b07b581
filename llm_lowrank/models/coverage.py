"""Which share of a model's layer weights a run adapts, and which share it quantizes.

A layer weight is a tensor of two axes or more that belongs neither to an embedding nor to the output layer. Adapters
and codecs work on linear modules. Some models keep weights elsewhere: the experts of a mixture in one tensor (E, m, n),
GPT-2's in Conv1D, others in convolutions. A run would train and quantize less of such a model than its settings say.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, Shared
from llm_lowrank.engines.frozen import FrozenLinear

HALF = 0.5
NAMED = 4  # kinds of weights that a message names


@dataclass(frozen=True)
class Coverage:
    """Elements of the frozen parameters of a model, adapters attached."""

    layers: int  # in layer weights
    adapted: int  # of these, under an adapter
    quantized: int  # of these, stored by nf4 or int8
    total: int  # in all frozen parameters
    hidden: Counter[str]  # kind of layer weight outside of linear modules -> elements

    @property
    def hidden_share(self) -> float:
        """Share of the layer weights that no linear module holds."""
        return self.hidden.total() / max(1, self.layers)

    def describe(self, codec: str) -> str:
        """The line that a run prints."""
        line = f"adapted: {self.adapted / max(1, self.layers):.1%} of the layer weights"
        if codec != "dense":
            line += (
                f"; quantized: {self.quantized / max(1, self.layers):.1%} of the layer weights, "
                f"{self.quantized / self.total:.1%} of all frozen weights"
            )
        return line + (f"; outside of linear modules: {self.kinds()}" if self.hidden else "")

    def kinds(self) -> str:
        """The kinds of weights that are hidden, the largest first, with their shares."""
        first = self.hidden.most_common(NAMED)
        more = ", ..." if len(self.hidden) > NAMED else ""
        return ", ".join(f"{kind} ({count / self.layers:.1%})" for kind, count in first) + more


def coverage(model: PreTrainedModel) -> Coverage:
    """Count the weights of a model whose adapters are attached; it needs no values."""
    layers = adapted = quantized = total = 0
    hidden: Counter[str] = Counter()
    output, seen = model.get_output_embeddings(), set()
    for name, module in model.named_modules():
        if isinstance(module, Shared):
            continue
        if isinstance(module, FrozenLinear):
            m, n = module.shape
            total += m * n
            if module is not output:
                layers += m * n
                adapted += m * n * isinstance(module, Adapter)
                quantized += m * n * (not module.codec.writable)
            continue
        for k, p in module.named_parameters(recurse=False):
            if p in seen:
                continue
            seen.add(p)
            total += p.numel()
            if p.ndim >= 2 and not isinstance(module, nn.Embedding) and module is not output:
                layers += p.numel()
                if not isinstance(module, nn.Linear):
                    hidden[_kind(f"{name}.{k}")] += p.numel()
    return Coverage(layers, adapted, quantized, total, hidden)


def check_coverage(model: PreTrainedModel, covered: Coverage, *, all_linear: bool, codec: str) -> None:
    """Raise ValueError if the model hides more than half of its layer weights from adapters or from the codec.

    all_linear: whether the run adapts all linear modules; modules that are named are the user's choice. codec: dense
    quantizes nothing and hides nothing.
    """
    if covered.hidden_share <= HALF or not (all_linear or codec != "dense"):
        return
    mixture = " the experts of a mixture are fused into single tensors," if "experts" in covered.kinds() else ""
    lost = ["all-linear does not adapt them"] if all_linear else []
    lost += [f"codec: {codec} leaves them unquantized"] if codec != "dense" else []
    linear = sorted(
        {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, FrozenLinear | nn.Linear)}
    )
    raise ValueError(
        f"{type(model).__name__} keeps {covered.hidden_share:.1%} of its layer weights outside of linear modules,"
        f"{mixture} in {covered.kinds()}: {' and '.join(lost)}. To train the rest alone ({', '.join(linear)}), set "
        "allow_partial: true" + (", or name the modules in method.target_modules" if codec == "dense" else "")
    )


def _kind(name: str) -> str:
    """What follows the last number in a name: model.layers.0.mlp.experts.down_proj -> mlp.experts.down_proj."""
    names = name.split(".")
    last = max((at for at, part in enumerate(names) if part.isdigit()), default=len(names) - 3)
    return ".".join(names[max(0, last + 1) :])
