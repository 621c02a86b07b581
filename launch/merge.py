"""Merge a trained adapter into its base model, one tensor in memory at a time.

`python launch/merge.py --checkpoint OUTPUT_DIR --output MERGED_DIR`
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from llm_lowrank.models.export import BACKBONE, CONFIG, Backbone, merge
from llm_lowrank.models.source import Source


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, type=expanded, help="output_dir of a run, or a PEFT LoRA folder")
    parser.add_argument(
        "--output", required=True, type=expanded, help="new folder for the merged Hugging Face checkpoint"
    )
    parser.add_argument("--model_name_or_path", help="base model; by default the one named in adapter_config.json")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the merged weights; by default that of the base"
    )
    parser.add_argument(
        "--merge_base",
        choices=["original", "dequantized"],
        default="original",
        help="after a run with codec nf4 or int8: merge into the checkpoint's weights, or into what was trained on, "
        "decoded",
    )
    args = parser.parse_args(arguments)
    try:
        adapter = find_adapter(args.checkpoint)
        base = args.model_name_or_path or json.loads((adapter / CONFIG).read_text()).get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{adapter / CONFIG} names no base model; give --model_name_or_path")
        backbone = Backbone.open(args.checkpoint / BACKBONE) if args.merge_base == "dequantized" else None
        print(
            merge(Source.open(base), adapter, args.output, getattr(torch, args.dtype) if args.dtype else None, backbone)
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def expanded(name: str) -> Path:
    """A folder, where a shell has left a ~ in its name as well."""
    return Path(name).expanduser()


def find_adapter(checkpoint: Path) -> Path:
    for folder in (checkpoint / "adapter", checkpoint):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(
        f"neither {checkpoint} nor its folder adapter holds {CONFIG}; give the output_dir of a finished run or a PEFT "
        "folder"
    )


if __name__ == "__main__":
    sys.exit(main())
