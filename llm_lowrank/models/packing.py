"""Whether a model keeps the examples of a packed row apart.

Asked of the model itself before a run, for a leak would be silent.

Positions that start again at 0 say where an example begins. transformers makes block-diagonal masks of them for sdpa
and eager, and sequence lengths for flash-attn's variable-length path; a model with an attention of its own may not look
at them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_lowrank.data import Example, collate
from llm_lowrank.engines.base import Engine

LENGTH = 6  # tokens of an example that is looked at


def flat(model: PreTrainedModel) -> bool:
    """Whether packed rows have to be one row: flash-attn's variable-length path reads positions of a single row only."""
    return "flash" in str(model.config._attn_implementation)


@torch.no_grad()
def check_apart(engine: Engine, model: PreTrainedModel, wrapped: nn.Module) -> None:
    """ValueError unless an example's logits are the same whatever else is in its row, and those that it has alone.

    Collective.
    """
    words = model.get_input_embeddings().num_embeddings
    mine, other, third = (_example(start, words) for start in (1, 2, 3))
    training = model.training
    wrapped.eval()

    def logits(rows: list[list[Example]], packed: bool) -> Tensor:
        """Of `mine`, which is the last example of the last row: rows are of one length."""
        batch = collate(rows, len(rows), pad_id=0, tokens=0, samples=(), packed=packed)
        inputs = batch.inputs(engine.device, flat(model))
        return wrapped(**inputs, use_cache=False).logits.flatten(0, 1)[-LENGTH:].float()

    alone = logits([[mine]], False)
    beside = logits([[third, third], [other, mine]], True)
    again = logits([[other, other], [third, mine]], True)
    wrapped.train(training)
    away = (beside - alone).norm() / alone.norm()
    good = torch.equal(beside, again) and bool(away <= 4 * torch.finfo(model.dtype).eps ** 0.5)
    if engine.sum(torch.tensor(float(good), device=engine.device)) < engine.world:
        raise ValueError(
            f"data.packing: {type(model).__name__} with {model.config._attn_implementation} attention lets packed "
            "examples see each other "
            f"(logits {float(away):.0e} away from those of the example alone); use data.packing: false, or another "
            "attn_implementation"
        )


def _example(start: int, words: int) -> Example:
    ids = [(start + 7 * position) % words for position in range(LENGTH)]
    return Example(ids, ids)
