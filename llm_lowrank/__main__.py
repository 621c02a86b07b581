"""The command llm-lowrank: `llm-lowrank COMMAND [arguments]`. `llm-lowrank COMMAND --help` lists the arguments.

    train      fine-tune a model
    evaluate   ask a trained model questions, or measure it on benchmarks
    merge      write a trained adapter and its base model as one model
    inspect    look at the data before training
    ranks      plan how many pairs each module gets
    push       upload the results of a run to the Hugging Face hub
    report     write the report of a run, again
    compare    put several runs on one page
    support    print which methods, engines and codecs do not go together
    recipes    print the folder of the recipes that come with the library

On several devices a launcher starts the command once for each of them:

    torchrun --nproc_per_node 4 -m llm_lowrank train ...
    deepspeed --num_gpus 4 --module llm_lowrank train ...
"""

import os
import sys
from importlib import import_module

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a launcher starts a process per device, evaluate its threads
HOMES = {  # command -> the module whose `main` takes the arguments; it is imported when it is needed
    "train": "llm_lowrank.run.start",
    "evaluate": "llm_lowrank.evaluation.command",
    "merge": "llm_lowrank.run.merge",
    "inspect": "llm_lowrank.run.inspect_data",
    "ranks": "llm_lowrank.run.ranks",
    "push": "llm_lowrank.models.push",
    "report": "llm_lowrank.run.report",
    "compare": "llm_lowrank.run.report",
    "support": "llm_lowrank.run.support",
}


def main(argv: list[str] | None = None) -> int:
    """Do what a command line says, by default the one of this process; return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0].startswith("--local_rank="):  # of deepspeed's launcher; the environment says the same
        words = words[1:]
    command, *rest = words or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if command == "recipes":
        from llm_lowrank.run import SHIPPED

        print(SHIPPED / "recipes")
        return 0
    if command not in HOMES:
        print(f"error: '{command}' is not a command; there are {', '.join([*HOMES, 'recipes'])}", file=sys.stderr)
        return 2
    return run(command, rest)


def run(command: str, argv: list[str]) -> int:
    """Run one of the commands; return its exit code."""
    words = [command, *argv] if command in ("report", "compare") else argv  # two of one module
    return import_module(HOMES[command]).main(words)


if __name__ == "__main__":
    sys.exit(main())
