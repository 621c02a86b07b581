"""The merged model of a run, and how far either merge of a quantized run is from the model that was trained."""

from __future__ import annotations

from torch import nn

from llm_lowrank.data import Batches, pad_id
from llm_lowrank.models import export
from llm_lowrank.models.source import Source
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run
from llm_lowrank.run.recipe import Recipe


def merged_gaps(run: Run, model: nn.Module, metrics: Metrics) -> str:
    """Measure the gap of both merges on some examples; write backbone.safetensors, which the second merge needs.

    Collective.

    model: the wrapped one. Returns a line for each merge.
    """
    examples = run.corpus.some(run.recipe.per_device_eval_batch_size)
    (micro,) = Batches(examples, len(examples), pad_id=pad_id(run.tokenizer)).step(0)
    inputs = micro.inputs(run.engine.device)
    merges: dict[str, export.Merging | None] = dict.fromkeys(("original", "dequantized"))
    with run.engine.together():
        if run.engine.main:
            output = run.recipe.output
            export.Backbone.save(output / export.BACKBONE, run.model)
            lora = export.Lora.open(output / "adapter")
            backbone = export.Backbone.open(output / export.BACKBONE)
            merges = {
                "original": export.Merging(run.source, lora),
                "dequantized": export.Merging(run.source, lora, backbone=backbone),
            }
    model.eval()
    lines = []
    for base, gap in zip(merges, export.gaps(run.model, model, inputs, list(merges.values())), strict=True):
        if gap is not None:
            metrics.write("gap", run.total_steps, base=base, logits=gap.logits, agreement=gap.agreement)
            chosen = " (merge_base)" if base == run.recipe.merge_base else ""
            lines.append(f"merged into the {base} weights: {gap}{chosen}")
    return "\n".join(lines)


def merge_adapter(recipe: Recipe, source: Source) -> export.Merged:
    """Write output_dir/merged: the exported adapter added to the weights that merge_base names. Call on rank 0."""
    output = recipe.output
    backbone = export.Backbone.open(output / export.BACKBONE) if recipe.merge_base == "dequantized" else None
    return export.merge(source, output / "adapter", output / "merged", backbone=backbone)
