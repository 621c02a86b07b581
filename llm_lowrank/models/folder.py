"""The small files of a model's folder, looked at before other libraries read them: their errors name no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_lowrank.numerics.files import read_object

OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
TEXTS = ("tokenizer.json", "chat_template.jinja")


def check_small_files(folder: Path) -> None:
    """Check that the configs of a model and the files of its tokenizer are what their names say, where there are such.

    ValueError names the file.
    """
    for name in OBJECTS:
        if (folder / name).is_file():
            content = read_object(folder / name)
            if name == "generation_config.json":
                _check_ends(folder / name, content)
    for name in TEXTS:
        if (file := folder / name).is_file():
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8; download or write it again") from error
            if name == "tokenizer.json" and not (text.lstrip().startswith("{") and text.rstrip().endswith("}")):
                raise ValueError(
                    f"{file} is no JSON object; download or write it again (a pointer of Git LFS: git lfs pull)"
                )


def _check_ends(file: Path, content: dict[str, Any]) -> None:
    ends = content.get("eos_token_id")
    if not all(type(end) is int for end in (ends if isinstance(ends, list) else [] if ends is None else [ends])):
        raise ValueError(f"{file}: eos_token_id is {ends!r}, and it is the number of a token or a list of numbers")
