"""A check that a model keeps the examples of a packed row apart.

The check runs the model itself before a run, because nobody would notice a leak between examples.

An example begins where the positions start again at 0. From the positions transformers makes block-diagonal masks for
sdpa and eager; kernels for rows of several lengths get the lengths. A model with its own attention code may ignore
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_lowrank.data import Example, collate
from llm_lowrank.engines.base import Engine
from llm_lowrank.models.attention import joins_rows

LENGTH = 6  # tokens of an example in the check


@torch.no_grad()
def check_apart(engine: Engine, model: PreTrainedModel, wrapped: nn.Module) -> None:
    """Raise ValueError if an example's logits depend on the other examples in its row. Collective.

    Beside two different pairs of neighbours the logits must be bitwise equal, and they must equal those of the example
    alone, up to rounding.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    tested, other, third = (_example(start, vocabulary) for start in (1, 2, 3))
    training = model.training
    wrapped.eval()

    def logits(rows: list[list[Example]], packed: bool) -> Tensor:
        """The logits of `tested`, the last example of the last row: (LENGTH, vocabulary). All rows have one length."""
        batch = collate(
            [[example.arrays for example in row] for row in rows],
            len(rows),
            pad_id=0,
            tokens=0,
            samples=(),
            packed=packed,
        )
        inputs = batch.inputs(engine.device, joins_rows(model))
        return wrapped(**inputs, use_cache=False).logits.flatten(0, 1)[-LENGTH:].float()

    alone = logits([[tested]], False)
    beside = logits([[third, third], [other, tested]], True)
    again = logits([[other, other], [third, tested]], True)
    wrapped.train(training)
    away = (beside - alone).norm() / alone.norm()
    good = torch.equal(beside, again) and bool(away <= 4 * torch.finfo(model.dtype).eps ** 0.5)
    if engine.sum(torch.tensor(float(good), device=engine.device)) < engine.world:
        raise ValueError(
            f"data.packing: {type(model).__name__} with {model.config._attn_implementation} attention lets packed "
            f"examples see each other (logits {float(away):.0e} away from those of the example alone); use "
            "data.packing: false, or another attn_implementation"
        )


def _example(start: int, vocabulary: int) -> Example:
    ids = [(start + 7 * position) % vocabulary for position in range(LENGTH)]
    return Example(ids, ids)
