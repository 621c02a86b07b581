"""The wheel works without the checkout, and the command llm-lowrank reaches every program."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from llm_lowrank import __main__ as command
from llm_lowrank.run import support
from tests.test_launch import ENVIRONMENT, place, recipe, records  # noqa: F401 - place is a fixture

ROOT = Path(__file__).parents[1]
SOURCES = ("llm_lowrank", "recipes", "ds_configs", "pyproject.toml", "README.md", "LICENSE")
WITHOUT = {"PYTHONPATH": "", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # no checkout, no network


def do(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [*map(str, words)], cwd=cwd, env=os.environ | ENVIRONMENT | WITHOUT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the sources, so that nothing of an earlier build is in it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
    do(*pip, "--wheel-dir", folder, copy, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel) -> Path:
    """An environment that holds the wheel. It finds the dependencies where this process finds them, and only those: the
    files by which the checkout is installed here count in their own environment alone.
    """
    folder = wheel.parent / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python")
    do(*pip, "install", "--quiet", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_package_and_what_the_checkout_keeps_beside_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")]
    files = [path for folder in SOURCES[:3] for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts]
    assert held == {name if name.startswith("llm_lowrank/") else f"llm_lowrank/run/{name}" for name in names}
    assert "llm-lowrank = llm_lowrank.__main__:main" in entry


def test_two_ranks_train_from_the_wheel(environment, place):  # noqa: F811
    output, python = place / "out-wheel", environment / "bin/python"
    where = do(python, "-c", "import llm_lowrank; print(llm_lowrank.__file__)", cwd=place)
    shipped = Path(do(environment / "bin/llm-lowrank", "recipes", cwd=place).strip())
    assert Path(where).is_relative_to(environment) and shipped.is_relative_to(environment)
    assert (shipped / "data/alpaca-sample.json").is_file()
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "llm_lowrank")
    # settings from a recipe of the wheel, and DeepSpeed's from the file that the default names
    changes = {"output_dir": output, "max_steps": 2, "method.target_rank": 6, "save_merged": False}
    files = "recipes/smollm2-135m.yaml,recipes/srlora.yaml"
    said = do(*torchrun, "train", "--config_path", files, *recipe(place, **changes), cwd=place)
    assert "Zero engine, 2 rank(s)" in said
    assert len(records(output, "train")) == 2
    assert json.loads((output / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_command_lists_its_programs(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert command.main(words) == 0
        said = capsys.readouterr().out
        assert all(f"\n    {name} " in said for name in [*command.HOMES, "recipes"])
    assert command.main(["trian", "--method.rank", "4"]) == 2
    assert "'trian' is not a command; there are train, evaluate" in capsys.readouterr().err
    assert command.main(["--local_rank=0", "recipes"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'recipes'}\n"


@pytest.mark.parametrize("name", command.HOMES)
def test_every_program_has_its_help(name, capsys):
    try:
        code = command.main([name, "--help"])
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr().out
    assert code == 0 and f"llm-lowrank {name}" in said, said


def test_what_goes_together_is_printed_or_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(support, "page", lambda: "# What works with what\n")
    assert command.main(["support"]) == 0
    assert capsys.readouterr().out == support.page()
    assert command.main(["support", str(tmp_path / "page.md")]) == 0
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == support.page()
