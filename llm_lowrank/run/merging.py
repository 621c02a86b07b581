"""The adapter and the merged model of a run, and how far a merge is from the model that was trained."""

from __future__ import annotations

from torch import nn

from llm_lowrank.data import Batches
from llm_lowrank.models.architectures import tied_modules
from llm_lowrank.models.backbone import BACKBONE, Backbone
from llm_lowrank.models.export import SavedAdapter, save_adapter
from llm_lowrank.models.foreign import DATE, TEMPLATE, Lora
from llm_lowrank.models.merging import Merged, Merging, copy_tokenizer, gaps, merge
from llm_lowrank.models.source import Source
from llm_lowrank.models.stopping import GENERATION, with_ends
from llm_lowrank.numerics.files import write_json, write_text
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run
from llm_lowrank.run.recipe import Recipe


def export_adapter(run: Run) -> SavedAdapter | None:
    """Write output_dir/adapter on rank 0 and return a report there; return None elsewhere. Collective.

    Beside the adapter are the tokenizer with the run's chat template, the date that this template wrote, and the
    generation config with the tokens that end the trained answers.
    """
    recipe, folder = run.recipe, run.recipe.output / "adapter"
    with run.engine.together():
        if run.engine.main:
            if recipe.new_tokens:
                run.tokenizer.save_pretrained(folder)
            else:
                copy_tokenizer(run.source, run.tokenizer, folder)
            if recipe.data.chat_template:
                write_text(folder / TEMPLATE, str(run.tokenizer.chat_template))
            if run.corpus.date:
                write_text(folder / DATE, f"{run.corpus.date}\n")
            eos = run.tokenizer.eos_token_id
            ends = [*run.corpus.ends, *([] if eos is None else [eos])]
            write_json(folder / GENERATION, with_ends(run.source.path, ends))
    return save_adapter(
        run.engine,
        run.adapters,
        method=recipe.method,
        path=folder,
        base_model_name_or_path=run.source.name,
        revision=run.source.revision,
        outer_name=run.source.outer_name,
        model=run.model,
    )


def merged_gaps(run: Run, model: nn.Module, metrics: Metrics) -> str:
    """Measure the gap of both merges on some examples; write backbone.safetensors, which the second merge needs.

    Collective.

    model: the wrapped one. Returns a line for each merge.
    """
    if shared := tied_modules(run.model, [adapter.name for adapter in run.adapters]):
        with run.engine.together():
            if run.engine.main:
                Backbone.save(run.recipe.output / BACKBONE, run.model)
        return f"no merged model to compare with: {', '.join(shared)} shares its weight with the embedding"
    examples = run.corpus.some(run.recipe.per_device_eval_batch_size)
    (micro,) = Batches(examples, len(examples), pad_id=run.batches.pad_id).step(0)
    inputs = micro.inputs(run.engine.device)
    merges: dict[str, Merging | None] = dict.fromkeys(("original", "dequantized"))
    with run.engine.together():
        if run.engine.main:
            output = run.recipe.output
            Backbone.save(output / BACKBONE, run.model)
            lora = Lora.open(output / "adapter")
            backbone = Backbone.open(output / BACKBONE)
            merges = {
                "original": Merging(run.source, lora, device=run.engine.device),
                "dequantized": Merging(run.source, lora, backbone=backbone, device=run.engine.device),
            }
    model.eval()
    lines = []
    for base, gap in zip(merges, gaps(run.model, model, inputs, list(merges.values())), strict=True):
        if gap is not None:
            metrics.write("gap", run.made, base=base, logits=gap.logits, agreement=gap.agreement)
            chosen = " (merge_base)" if base == run.recipe.merge_base else ""
            lines.append(f"merged into the {base} weights: {gap}{chosen}")
    return "\n".join(lines)


def merge_adapter(recipe: Recipe, source: Source) -> Merged:
    """Write output_dir/merged: the exported adapter added to the weights that merge_base names. Call on rank 0."""
    output = recipe.output
    backbone = Backbone.open(output / BACKBONE) if recipe.merge_base == "dequantized" else None
    return merge(source, output / "adapter", output / "merged", backbone=backbone)
