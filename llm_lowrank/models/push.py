"""The results of a run on the Hugging Face hub: adapter and merged model, each in a repository of its own.

`llm-lowrank push RUN` uploads a run that is finished. Exit codes: 0 done; 2 it cannot be done, and nothing is lost.
"""

import argparse
import sys
from pathlib import Path

import yaml

from llm_lowrank.models.card import HERE, rename
from llm_lowrank.models.foreign import CONFIG
from llm_lowrank.models.hub import name_errors, open_repositories, repositories, upload

RECIPE = "recipe.yaml"


def push(folder: Path, name: str, private: bool | None) -> list[str]:
    """Upload the adapter and, if there is one, the merged model of a run. Return a line about each."""
    parts = [folder / "adapter", *([folder / "merged"] if (folder / "merged" / "config.json").is_file() else [])]
    if not (parts[0] / CONFIG).is_file():
        raise ValueError(f"{folder} has no adapter/{CONFIG}: it is not the output folder of a finished run")
    opened = open_repositories(repositories(name, len(parts) > 1), private)
    return [f"pushed:  {upload(part, into)}" for part, into in zip(parts, opened, strict=True)]


def main(argv: list[str]) -> int:
    """Do what the command line says and return the exit code."""
    parser = argparse.ArgumentParser("llm-lowrank push", description="Upload the results of a run to the hub.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the output folder of a finished run")
    parser.add_argument(
        "--hub_model_id", help="the repository, OWNER/NAME; by default the one in the recipe of the run"
    )
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="create it as a private one")
    options = parser.parse_args(argv)
    folder = options.run.expanduser()
    try:
        before = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8")).get("hub_model_id")
        name = options.hub_model_id or before
        if not name or (errors := name_errors(name, merged=True)):
            raise ValueError(errors[0] if name else "the recipe of the run names no repository; give --hub_model_id")
        old = repositories(before, merged=True) if before else [HERE, HERE]
        for part, was, now in zip(("adapter", "merged"), old, repositories(name, merged=True), strict=True):
            rename(folder / part, was, now)
        print("\n".join(push(folder, name, options.hub_private_repo)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
