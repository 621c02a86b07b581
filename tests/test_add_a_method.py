"""A method is one file, one test, one card and a line of settings: all else follows, as a copy of the project shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE = '''"""rsLoRA, arXiv 2312.03732: W x + s B A x with s = alpha / sqrt(r)."""

from __future__ import annotations

from dataclasses import dataclass

from llm_lowrank.adapters.method import Method
from llm_lowrank.methods.lora import LoRA


@Method.register_subclass("rslora")
@dataclass(frozen=True)
class RsLoRA(LoRA):
    """Train pairs whose scale does not fall with their number as fast as LoRA's."""

    use_rslora: bool = True
    """Scale s = alpha / sqrt(rank)."""
'''
CARD = """# rsLoRA: a scale for many pairs

rsLoRA is arXiv 2312.03732. The method is `method.type: rslora` in `llm_lowrank/methods/rslora.py`, and its tests are
`tests/test_rslora.py`.

| what is trained | exported as | rank of the export |
|---|---|---|
| A and B, at a larger scale | LoRA | `rank` |
"""
SETTINGS = """    "rslora": {"rslora": dict(PAIRS, alpha=6)},
"""
TEST = """
import yaml

import llm_lowrank
from benchmarks import pages, site
from llm_lowrank.run import support
from tests import test_laws, test_runs, test_simulated


def test_everything_follows():
    assert llm_lowrank.RsLoRA().scale == 4.0 and "RsLoRA" in llm_lowrank.__all__  # 16 / sqrt(16)
    (methods,) = [entry["Methods"] for entry in yaml.safe_load(open("mkdocs.yml"))["nav"] if "Methods" in entry]
    assert {"rsLoRA": "methods/rslora.md"} in site.on_config({"nav": methods})["nav"]
    assert "::: llm_lowrank.methods.rslora.RsLoRA\\n" in site.settings_of_methods()
    assert "| rsLoRA | A and B, at a larger scale | LoRA |" in pages.exports()
    assert "OSoRA, rsLoRA, SBoRA" in pages.exported_ranks()
    assert "    from llm_lowrank.methods.rslora import RsLoRA as RsLoRA\\n" in pages.names_for_checkers(
        open("llm_lowrank/__init__.py").read()
    )
    assert "rslora" in dict(support.methods()) and "rslora" in test_simulated.METHODS and "rslora" in test_runs.RUNS
    cells = {cell[1:] for cell in test_laws.CELLS if cell[0] == "rslora"}
    assert cells >= {(*engine, dtype) for engine in test_laws.FEWER for dtype in ("fp32", "nf4")}
"""


def test_a_method_is_one_file_one_test_one_card_and_a_line_of_settings(tmp_path):
    for name in ("benchmarks", "docs", "ds_configs", "launch", "llm_lowrank", "recipes", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results", "assets"))
    for name in ("CONTRIBUTING.md", "README.md", "mkdocs.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "llm_lowrank/methods/rslora.py").write_text(FILE)
    (tmp_path / "docs/methods/rslora.md").write_text(CARD)
    (tmp_path / "tests/test_rslora.py").write_text(TEST)
    laws = tmp_path / "tests/test_laws.py"
    before, opening, after = laws.read_text().partition("SETTINGS: dict[str, dict[str, dict]] = {\n")
    laws.write_text(before + opening + SETTINGS + after)
    tests = [
        "tests/test_rslora.py",
        "tests/test_house.py::test_contributing_names_the_files_of_every_room",
        "tests/test_methods_table.py::test_a_method_is_found_by_its_registration",
        "tests/test_laws.py::test_every_registered_method_is_under_the_laws",
        "tests/test_laws.py::test_export_loads_in_peft_and_transformers[rslora-plain-1-nf4]",
        "tests/test_runs.py::test_a_run_learns_and_hands_back_what_it_trained[rslora-dense]",
        "tests/test_simulated.py::test_a_run_stays_on_its_device[rslora-bf16]",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("." * len(tests)), done.stdout[-4000:] + done.stderr[-2000:]
