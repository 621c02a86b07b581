"""Merge a trained adapter into its base model, one tensor in memory at a time.

`llm-lowrank merge --checkpoint OUTPUT_DIR --output MERGED_DIR`
"""

import argparse
import sys
from pathlib import Path

import torch

from llm_lowrank.models.backbone import BACKBONE, Backbone
from llm_lowrank.models.foreign import CONFIG
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.files import read_object


def main(argv: list[str]) -> int:
    """Merge as a command line says; return the exit code."""
    parser = argparse.ArgumentParser("llm-lowrank merge", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--checkpoint", required=True, type=expand, help="The output_dir of a run, or a PEFT LoRA folder."
    )
    parser.add_argument(
        "--output", required=True, type=expand, help="A new folder for the merged Hugging Face checkpoint."
    )
    parser.add_argument("--model_name_or_path", help="Base model. By default the one named in adapter_config.json.")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="Type of the merged weights. By default the type of the base model.",
    )
    parser.add_argument(
        "--merge_base",
        choices=["original", "dequantized"],
        default="original",
        help="What the adapter of a run with codec nf4 or int8 is merged into. original: the checkpoint's weights. "
        "dequantized: the quantized weights of the run, decoded.",
    )
    args = parser.parse_args(argv)
    try:
        adapter = find_adapter(args.checkpoint)
        config = read_object(adapter / CONFIG)
        if not args.model_name_or_path and not config.get("base_model_name_or_path"):
            raise ValueError(f"{adapter / CONFIG} names no base model; give --model_name_or_path")
        backbone = Backbone.open(args.checkpoint / BACKBONE) if args.merge_base == "dequantized" else None
        print(
            merge(
                Source.open(args.model_name_or_path) if args.model_name_or_path else Source.under(config),
                adapter,
                args.output,
                dtype=getattr(torch, args.dtype) if args.dtype else None,
                backbone=backbone,
            )
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def expand(name: str) -> Path:
    """Return a path with its ~ expanded, which a shell leaves in --name=~/folder."""
    return Path(name).expanduser()


def find_adapter(checkpoint: Path) -> Path:
    """Return the PEFT folder of a run, or the folder itself if it is one. ValueError if there is none."""
    for folder in (checkpoint / "adapter", checkpoint):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(
        f"neither {checkpoint} nor its folder adapter holds {CONFIG}; give the output_dir of a finished run or a PEFT "
        "folder"
    )
