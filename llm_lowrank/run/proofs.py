"""What a run finds out about its loaded model before it trains it: shortcuts are taken only where nothing changes."""

from __future__ import annotations

from torch import nn

from llm_lowrank.models.attention import leave_masks_out
from llm_lowrank.models.compiling import eagerly
from llm_lowrank.models.loss import loss_layer
from llm_lowrank.models.packing import check_apart
from llm_lowrank.run.prepare import Run


def look_at(run: Run, model: nn.Module) -> None:
    """Choose how attention and the loss are computed; refuse a model that mixes packed examples. Collective.

    model: the wrapped one.
    """
    data, engine = run.recipe.data, run.engine
    engine.at("looking at the model")
    with eagerly():
        if reason := leave_masks_out(engine, run.model, model, longest=data.max_length, packed=data.packing):
            run.say(f"attention has masks: {reason}")
        if data.packing:
            check_apart(engine, run.model, model)
        run.loss_layer, reason = loss_layer(engine, run.model, model)
    if reason:
        run.say(f"the loss is made from whole logits: {reason}")
