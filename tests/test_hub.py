"""Model cards and uploads to the hub, against a stand-in on this machine (tests/hub.py); no test uses a network.

The uploads go by Git LFS: hf_xet, which huggingface_hub prefers for large files, needs the hub itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from benchmarks.soak import free_ports
from launch import train
from llm_lowrank import __main__ as command
from llm_lowrank.adapters.method import Method
from llm_lowrank.models import card
from llm_lowrank.models.card import Card, hub_dataset, is_hub_name, license_of, paper_of, shown
from llm_lowrank.models.push import push
from tests.hub import TOKEN, Hub, serve
from tests.test_launch import ROOT, place, recipe, records  # noqa: F401 - place is a fixture


@pytest.fixture
def hub(monkeypatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as hub:
        for name, value in {"ENDPOINT": hub.address, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


@pytest.fixture
def run(tmp_path) -> Path:
    """The output folder of a finished run, written by hand."""
    for name, weights in (("adapter", "adapter_model"), ("merged", "model")):
        folder = tmp_path / "run" / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(CARD.text(merged=name == "merged"))
        (folder / f"{weights}.safetensors").write_bytes(os.urandom(1000))
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "run" / "merged" / "config.json").write_text("{}")
    (tmp_path / "run" / "recipe.yaml").write_text("hub_model_id: ''\n")
    return tmp_path / "run"


CARD = Card(
    name=card.HERE,
    method="SRLoRA",
    base="some/base",
    adapter={"r": 4},
    datasets=["alpaca", "/home/jane/secret/rows.jsonl", "https://jane:pw@host/rows.jsonl?key=1"],
    hub_datasets=["tatsu-lab/alpaca"],
    training=["6 steps"],
    settings={"method.type": "srlora", "method.rank": 4, "data.system": "a ``` fence", "output_dir": "/home/jane/out"},
    figures={"loss per trained token": (2.5, 1.25), "exact match": (None, 0.5)},
    versions={"torch": "2.0"},
    papers={"SRLoRA": "https://arxiv.org/abs/2505.12433"},
    license={"license": "apache-2.0"},
)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def uploaded(hub: Hub, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.repositories[name].items() if path != ".gitattributes"}


def pushed(hub: Hub, out: Path, said: str) -> None:
    """Check what a run has uploaded, and that it has done so once."""
    for part, name in (("adapter", "jane/mine"), ("merged", "jane/mine-merged")):
        assert f"pushed:  {hub.address}/{name}" in said
        assert uploaded(hub, name) == files(out / part) and name in hub.private
    assert {"adapter_model.safetensors", "README.md", "adapter_config.json"} <= hub.repositories["jane/mine"].keys()
    assert len(hub.objects) == 3  # both weights, and a tokenizer that both have
    paths = [path for _, path in hub.calls]
    assert paths.count("/api/whoami-v2") == 2  # before the run and before the upload
    assert [path for path in paths if "commit" in path] == [
        "/api/models/jane/mine/commit/main",
        "/api/models/jane/mine-merged/commit/main",
    ]


def private(place: Path, out: Path) -> list[str]:  # noqa: F811
    """A recipe whose results are uploaded into private repositories."""
    settings = {"engine": "plain", "push_to_hub": True, "hub_model_id": "jane/mine", "hub_private_repo": True}
    return recipe(place, output_dir=out, **settings)


def test_a_run_uploads_what_is_on_the_disk_with_cards_that_say_what_it_measured(place, tmp_path, hub, capfd):  # noqa: F811
    out = tmp_path / "out"
    assert train.main(private(place, out)) == 0
    pushed(hub, out, "".join(capfd.readouterr()))
    text = (out / "adapter" / "README.md").read_text()
    losses = [record["loss"] for record in records(out, "eval")]
    assert f"| loss per trained token | {losses[0]:.4g} | {losses[-1]:.4g} |" in text
    assert "# mine" in text and "adapter = 'jane/mine'" in text and str(place) not in text and str(out) not in text
    assert "jane/mine-merged" in (out / "merged" / "README.md").read_text()


@pytest.mark.wide
def test_of_two_ranks_one_talks_to_the_hub(place, tmp_path, hub):  # noqa: F811
    (port,) = free_ports(1)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        **{"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN},
        "HF_HUB_DISABLE_XET": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch/train.py"), *private(place, tmp_path / "out")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    pushed(hub, tmp_path / "out", said[0])


@pytest.mark.parametrize(
    "prepare, changes, message",
    [
        (lambda h, m: m.delenv("HF_TOKEN"), {}, "push_to_hub: there is no token for the hub; set HF_TOKEN"),
        (lambda h, m: m.setenv("HF_TOKEN", "hf_wrong"), {}, "does not take the token"),
        (lambda h, m: m.setattr(constants, "HF_HUB_OFFLINE", True), {}, "push_to_hub: HF_HUB_OFFLINE is set"),
        (lambda h, m: None, {"hub_model_id": "acme/mine"}, "hub_model_id: acme/mine cannot be created"),
        (lambda h, m: h.faults.update({"auth-check": 403}), {}, "hub_model_id: jane/mine cannot be created"),
        (lambda h, m: h.repositories.update({"jane/mine": {}}), {"hub_private_repo": True}, "is there already and is"),
        (lambda h, m: m.setattr(constants, "ENDPOINT", "http://127.0.0.1:9"), {}, "does not take the token: "),
    ],
    ids=["no-token", "wrong-token", "offline", "owner", "read-only", "public", "no-network"],
)
def test_what_would_fail_at_the_end_of_a_run_fails_before_its_first_step(
    place,  # noqa: F811
    tmp_path,
    hub,
    monkeypatch,
    capfd,
    prepare,
    changes,
    message,
):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    prepare(hub, monkeypatch)
    settings = {"engine": "plain", "push_to_hub": True, "hub_model_id": "jane/mine", **changes}
    assert train.main(recipe(place, output_dir=tmp_path / "out", **settings)) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"push_to_hub": True}, "push_to_hub: true needs hub_model_id"),
        ({"hub_model_id": "jane/mine"}, "hub_model_id and hub_private_repo are for push_to_hub: true"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "hub_model_id: a/b/c cannot be the name of a repository"),
        ({"push_to_hub": True, "hub_model_id": f"jane/{'x' * 90}"}, "cannot be the name"),  # with -merged
    ],
)
def test_settings_that_do_not_fit_are_refused_without_a_network(place, tmp_path, capfd, settings, message):  # noqa: F811
    assert train.main(recipe(place, output_dir=tmp_path / "out", dry_run=True, **settings)) == 2
    assert message in capfd.readouterr().err


def test_an_upload_that_fails_leaves_the_run_as_it_is_and_says_how_to_upload_by_hand(place, tmp_path, hub, capfd):  # noqa: F811
    hub.faults["commit"] = 500
    out = tmp_path / "out"
    settings = {"output_dir": out, "engine": "plain", "push_to_hub": True, "hub_model_id": "mine"}
    assert train.main(recipe(place, **settings)) == 2
    said = capfd.readouterr().err
    assert f"the run is done and saved, but not uploaded: {out}/adapter was not uploaded to jane/mine: Server " in said
    assert "refused by the stand-in with 500. llm-lowrank push" in said
    assert f"llm-lowrank push {out} tries again" in said and (out / "report.html").is_file()
    before = {part: files(out / part) for part in ("adapter", "merged")}
    assert not uploaded(hub, "jane/mine")
    hub.faults.clear()
    assert command.main(["push", str(out)]) == 0
    assert uploaded(hub, "jane/mine") == before["adapter"] and uploaded(hub, "jane/mine-merged") == before["merged"]


@pytest.mark.parametrize("path", ["preupload", "/lfs/"])
def test_a_refusal_at_any_place_of_the_upload_is_one_error(run, hub, path):
    hub.faults[path] = 403
    before = files(run / "adapter")
    with pytest.raises(
        ValueError, match=r"was not uploaded to jane/mine: 403 Forbidden.*refused by the stand-in with 403"
    ):
        push(run, "mine", None)
    assert files(run / "adapter") == before and not uploaded(hub, "jane/mine")


def test_a_finished_run_is_pushed_under_a_name_given_later(run, hub, capsys):
    hub.repositories["jane/late"] = {"model.safetensors.index.json": b"{}", "old.safetensors": b"1", "notes.md": b"x"}
    assert command.main(["push", str(run)]) == 2
    assert "give --hub_model_id" in capsys.readouterr().err
    assert command.main(["push", str(run), "--hub_model_id", "late", "--hub_private_repo"]) == 2
    assert "jane/late is there already and is public" in capsys.readouterr().err
    assert command.main(["push", str(run), "--hub_model_id", "late"]) == 0
    # weights of an earlier upload could be read in the place of the new ones; all else of others stays
    assert uploaded(hub, "jane/late") == files(run / "adapter") | {"notes.md": b"x"}
    assert uploaded(hub, "jane/late-merged") == files(run / "merged")
    assert "adapter = 'late'" in (run / "adapter" / "README.md").read_text()
    assert "vllm serve late-merged" in (run / "merged" / "README.md").read_text()
    assert command.main(["push", str(run.parent)]) == 2 and "recipe.yaml" in capsys.readouterr().err


def test_a_card_can_be_read_by_the_hub_and_says_no_path_of_this_machine():
    for merged in (False, True):
        text = CARD.text(merged)
        data = ModelCard(text).data.to_dict()
        assert data["base_model"] == "some/base" and data["license"] == "apache-2.0"
        assert data["library_name"] == ("transformers" if merged else "peft")
        assert data["base_model_relation"] == ("finetune" if merged else "adapter")
        assert data["datasets"] == ["tatsu-lab/alpaca"] and "llm-lowrank" in data["tags"]
        assert "secret" not in text and "/home" not in text and "pw" not in text and "key=1" not in text
        assert "`rows.jsonl`, `https://host/rows.jsonl`" in text
        assert "[SRLoRA](https://arxiv.org/abs/2505.12433)" in text and "| exact match | - | 0.5 |" in text
        # the settings are a recipe, and a fence inside of them does not end the block
        block = text.partition("````yaml\n")[2].partition("\n````")[0]
        assert yaml.safe_load(block) == {"method": {"type": "srlora", "rank": 4}, "data": {"system": "a ``` fence"}}
    assert "vllm serve 'some/base' --enable-lora --max-lora-rank 8 --lora-modules tuned=PATH-OR-NAME" in CARD.text()


def test_the_card_of_an_adapter_that_vllm_does_not_serve_says_so():
    from dataclasses import replace

    assert "vLLM does not serve DoRA adapters" in replace(CARD, adapter={"r": 4, "use_dora": True}).text()
    tokens = replace(CARD, adapter={"r": 4, "trainable_token_indices": {"embed_tokens": [9]}}).text()
    assert "resize_token_embeddings" in tokens and "vLLM serves no adapter with rows of tokens" in tokens
    assert "resize_token_embeddings" not in CARD.text()


def test_only_what_is_known_stands_in_a_card(tmp_path, monkeypatch):
    assert license_of(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\nHello\n")
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "mine"}
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(str(tmp_path)) == {}
    assert [hub_dataset(name) for name in ("alpaca", "a/b", "gsm8k", "hf://datasets/a/b@main/x.parquet")] == [
        "tatsu-lab/alpaca",
        "a/b",
        "gsm8k",
        "a/b",
    ]
    assert not any(map(hub_dataset, (str(tmp_path), "a/b.jsonl", "s3://b/c", "reasoning-gym:chain_sum")))
    monkeypatch.chdir(tmp_path)
    Path("some/model").mkdir(parents=True)
    assert is_hub_name("meta-llama/Llama-3.1-8B") and not is_hub_name("some/model") and not is_hub_name("model")
    assert shown("some/model") == "model" and shown("other/model") == "other/model" and shown(3) == 3


def test_the_paper_of_a_method_is_the_one_in_its_first_lines():
    own = {name for name in Method.get_known_choices() if not paper_of(Method.get_choice_class(name))}
    assert own == {"core"}  # a method of our own
    assert paper_of(Method.get_choice_class("lora")) == "https://arxiv.org/abs/2106.09685"
