"""What the documentation site derives from the methods: the cards in its navigation, and the page of their settings.

mkdocs.yml names this file among its hooks. A method's card is the page of docs/methods/ that is called as its file is.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import llm_lowrank

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "docs" / "methods"
# Hooks that a method overrides, and parts of its mathematics: what a user sets is listed, and other members are not.
HIDDEN = (
    "attached awake batch budget build calibrate calibration changes_function directions directs discard "
    "exchange expansions freeze layer link metrics needs_start observe one_scale own_step peft phases rates recompose "
    "restart schedule start starting starting_pairs statistics step_along targets tells_samples_apart threshold turn "
    "wrong_decays"
)


def title_of(name: str) -> str:
    """Return what a method is called: its card's heading begins with it."""
    heading = (CARDS / f"{name}.md").read_text(encoding="utf-8").splitlines()[0]
    return re.split(r":|,| and ", heading.removeprefix("# "))[0]


def method_files() -> list[str]:
    """Return the methods by the names of their files: LoRA, and then by title."""
    homes = {home.removeprefix("methods.") for home in llm_lowrank.homes().values() if home.startswith("methods.")}
    return sorted(homes, key=lambda name: (name != "lora", title_of(name).lower()))


def settings_of_methods() -> str:
    """Return the blocks from which mkdocstrings writes the settings of every method."""
    classes = {home: name for name, home in llm_lowrank.homes().items()}
    options = f'    options:\n      filters: ["!^_", "!^({"|".join(HIDDEN.split())})$"]'
    homes = [f"methods.{name}" for name in method_files()]
    return "\n\n".join(f"::: llm_lowrank.{home}.{classes[home]}\n{options}" for home in homes)


def on_config(config: Any) -> Any:
    """Put the cards where the navigation has a star, in mkdocs' name for the hook."""

    def filled(entries: list[Any]) -> list[Any]:
        found: list[Any] = []
        for entry in entries:
            if entry == "methods/*":
                found += [{title_of(name): f"methods/{name}.md"} for name in method_files()]
            elif isinstance(entry, dict):
                found.append({k: filled(v) if isinstance(v, list) else v for k, v in entry.items()})
            else:
                found.append(entry)
        return found

    config["nav"] = filled(config["nav"])
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the page of the methods' settings, in mkdocs' name for the hook."""
    return (
        markdown.replace("<!-- methods -->", settings_of_methods())
        if page.file.src_uri == "api/methods.md"
        else markdown
    )
