"""Nothing that a run reads may run code or lead out of its folder; nothing that it writes could, or tells a secret."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from llm_lowrank.models.checkpoint import Checkpoint
from llm_lowrank.models.source import Source
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train

SECRETS = {
    "HF_TOKEN": "hf_not-to-be-told",
    "WANDB_API_KEY": "wandb-not-to-be-told",
    "AWS_SECRET_ACCESS_KEY": "aws-not-to-be-told",
}


@pytest.fixture(scope="module")
def written(place, tmp_path_factory) -> tuple[Path, str]:
    """All that a run writes, with every kind of output switched on, and what it says."""
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        output = tmp_path_factory.mktemp("run") / "out"
        settings = {
            "report_to": "tensorboard",
            "save_merged": True,
            "codec": "nf4",
            "merge_base": "dequantized",
            "max_steps": 6,
        }
        life = soak.live(soak.arguments_of(place, output, "deepspeed", **settings))
    assert life.codes == [0, 0], life.said[-3000:]
    return output, life.said


def unpickles(content: bytes) -> bool:
    """Whether it is the beginning of a pickle."""
    return content[:1] == b"\x80" and content[1] <= pickle.HIGHEST_PROTOCOL


def test_the_test_knows_a_pickle(tmp_path):
    torch.save({}, tmp_path / "zip.pt")
    torch.save({}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert zipfile.is_zipfile(tmp_path / "zip.pt") and unpickles((tmp_path / "old.pt").read_bytes())


def test_nothing_that_a_run_writes_is_pickled(written):
    output, _ = written
    files = [path for path in output.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files if "tfevents" not in path.name}
    assert kinds == {".safetensors", ".json", ".jsonl", ".yaml", ".html", ".md", ""}, kinds  # "": LATEST
    assert {"adapter", "merged", "checkpoints", "tensorboard"} <= {path.relative_to(output).parts[0] for path in files}
    for path in files:
        assert not zipfile.is_zipfile(path) and not unpickles(path.read_bytes()), path


def test_no_secret_of_the_environment_is_written_or_said(written):
    output, said = written
    for secret in SECRETS.values():
        assert secret not in said
        assert not [path for path in output.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_code_that_comes_with_a_model_is_not_run(place, tmp_path):
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(place / "model", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    arguments = soak.arguments_of(place, tmp_path / "out", "plain", model_name_or_path=model)
    with pytest.raises(ValueError, match="custom code"):
        train(parse(arguments))
    assert not ran.exists()


@pytest.mark.parametrize("elsewhere", ["../model.safetensors", "/etc/hostname", "deeper/model.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused(place, tmp_path, elsewhere):
    model = tmp_path / "inside" / "model"
    shutil.copytree(place / "model", model)
    names = Source.open(model).names()
    for target in (model.parent, model / "deeper"):
        target.mkdir(exist_ok=True)
        shutil.copy(model / "model.safetensors", target)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, elsewhere)}))
    with pytest.raises(ValueError, match=f"names {elsewhere}, which is not a file of this folder"):
        Source.open(model)


def test_a_checkpoint_that_leads_out_of_its_folder_is_refused(written, tmp_path):
    output, _ = written
    folder = tmp_path / "step-000003"
    shutil.copytree(output / "checkpoints/step-000003", folder)
    state = json.loads((folder / "state.json").read_text())
    name = "frozen.safetensors"
    (folder / name).rename(tmp_path / name)
    state["files"][f"../{name}"] = state["files"].pop(name)
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=f"names ../{name}, which is not a file of this folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "dataset, message",
    [
        ("{place}/data.zip", "is not a .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow file"),
        ("../up/data", "no such file"),
        ("owner/../../data", "no such file"),
    ],
)
def test_archives_and_names_that_lead_elsewhere_are_no_datasets(place, tmp_path, dataset, message):
    with zipfile.ZipFile(place / "data.zip", "w") as archive:
        archive.writestr("../../outside.jsonl", '{"prompt": "a", "completion": "b"}\n')
    arguments = soak.arguments_of(place, tmp_path / "out", "plain", **{"data.dataset": dataset.format(place=place)})
    with pytest.raises(ValueError, match=message):
        train(parse(arguments))
    assert not list(place.parents[1].rglob("outside.jsonl"))
