"""A run resumes after its model, data, template or output were moved or copied, and not after one of them changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.soak import live
from launch import train
from llm_lowrank.models import source as sources
from llm_lowrank.models.source import Source
from llm_lowrank.run.resuming import _setting, check_ranks_alike
from tests import ranks, tiny
from tests.test_data import CHATML, byte_tokenizer
from tests.test_launch import recipe, records

OWN = "{% if false %}never{% endif %}" + CHATML
STEPS, STOP = 4, 2
COMMON = {
    "max_steps": STEPS,
    "save_steps": STOP,
    "engine": "plain",
    "report_to": "none",
    "save_merged": False,
    "data.held_out": 4,
    "per_device_train_batch_size": 4,
}
# data.dataset and what goes with it, relative to the place
KINDS = {
    "file": {"data.dataset": "data.jsonl", "data.held_out_by": "group", "data.chat_template": "own.jinja"},
    "folder": {"data.dataset": "many", "data.packing": True},
    "mixture": {"data.dataset": "data.jsonl,many", "data.weights": "[0.5, 2]"},
    "stream": {"data.dataset": "data.jsonl", "data.streaming": True},
}
PATHS = ("model_name_or_path", "data.chat_template", "method.svd_cache", "output_dir")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(start: int, stop: int) -> list[dict]:
    return [{"prompt": f"{i} + 1 =", "completion": str(i + 1), "group": f"g{i // 2}"} for i in range(start, stop)]


def arguments(at: Path, kind: str = "file", /, **changes: object) -> list[str]:
    """The command line of a run of a kind whose files all lie below `at`."""
    chosen = {**COMMON, **KINDS[kind], "model_name_or_path": "model", "method.svd_cache": "svd", "output_dir": kind}
    for key in (*PATHS, "data.dataset"):
        if key in chosen:
            chosen[key] = ",".join(str(at / name) for name in str(chosen[key]).split(","))
    return recipe(at, **chosen, **changes) if not changes else recipe(at, **{**chosen, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, data and one finished run of each kind, with a checkpoint in its middle."""
    at = tmp_path_factory.mktemp("moved") / "home"
    tokenizer = byte_tokenizer(CHATML)
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True)
    model.save_pretrained(at / "model")
    tokenizer.save_pretrained(at / "model")
    write_rows(at / "data.jsonl", rows(0, 40))
    write_rows(at / "many/a.jsonl", rows(50, 60))
    write_rows(at / "many/b.jsonl", rows(60, 70))
    (at / "own.jinja").write_text(OWN)
    for kind in KINDS:
        assert train.main(arguments(at, kind)) == 0, kind
    return at


@pytest.fixture
def away(home, tmp_path):
    """A copy of everything; what it was copied from is not there."""
    there = tmp_path / "elsewhere" / "of job 7"
    shutil.copytree(home, there)
    gone = home.with_name("gone")
    home.rename(gone)
    yield there
    gone.rename(home)


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter/adapter_model.safetensors")


def assert_same(found: Path, wanted: Path) -> None:
    ours, theirs = adapter(found), adapter(wanted)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[(r["step"], r["loss"]) for r in records(output, "train")] for output in (found, wanted)]
    assert losses[0] == losses[1]


def unfinished(output: Path) -> Path:
    """Take away what a run wrote after its step STOP, and return its checkpoint."""
    shutil.rmtree(output / f"checkpoints/step-{STEPS:06d}")
    shutil.rmtree(output / "adapter")
    return output / f"checkpoints/step-{STOP:06d}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bitwise_where_everything_has_another_path(kind, home, away, capsys):
    wanted = away.with_name("wanted")
    shutil.copytree(away / kind, wanted)
    unfinished(away / kind)
    assert train.main(arguments(away, kind, resume_from_checkpoint="auto")) == 0
    said = capsys.readouterr().out
    assert_same(away / kind, wanted)
    assert f"resuming from {away / kind}/checkpoints/step-{STOP:06d}: {STOP} of {STEPS} steps are done" in said

    def line(key: str, same: str) -> str:
        was, now = (dict(word[2:].split("=", 1) for word in arguments(at, kind))[key] for at in (home, away))
        return f"{key}: {was!r} in the checkpoint, {now!r} now: {same}\n"

    assert line("model_name_or_path", "the same weights, config and tokenizer") in said
    assert line("data.dataset", "the same examples") in said
    if kind == "file":
        assert line("data.chat_template", "the same text") in said
    assert "svd_cache" not in said.replace(str(away), "")


def test_a_checkpoint_alone_may_be_copied_and_a_start_without_moves_says_nothing(home, tmp_path, capsys):
    shutil.copytree(home / f"file/checkpoints/step-{STOP:06d}", tmp_path / "kept")
    changes = {"resume_from_checkpoint": tmp_path / "kept", "output_dir": tmp_path / "new"}
    assert train.main(arguments(home, **changes)) == 0
    assert "in the checkpoint" not in capsys.readouterr().out
    wanted, found = adapter(home / "file"), adapter(tmp_path / "new")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_same_rows_and_the_same_weights_have_many_names(home, tmp_path, monkeypatch, capsys):
    """A hub name for a folder, one file for two, a part of a file for a file."""
    real = sources._download
    monkeypatch.setattr(
        sources, "_download", lambda name, *rest: home / "model" if name == "org/tiny" else real(name, *rest)
    )
    write_rows(tmp_path / "one.jsonl", rows(50, 90))
    changes = {
        "output_dir": tmp_path / "out",
        "resume_from_checkpoint": home / f"folder/checkpoints/step-{STOP:06d}",
        "model_name_or_path": "org/tiny",
        "data.dataset": tmp_path / "one.jsonl",
        "data.split": "train[:20]",
        "data.format": "prompt_completion",
    }
    assert train.main(arguments(home, "folder", **changes)) == 0
    said = capsys.readouterr().out
    assert f"model_name_or_path: '{home}/model' in the checkpoint, 'org/tiny' now: the same weights" in said
    assert "data.split: 'train' in the checkpoint, 'train[:20]' now: the same examples" in said
    wanted, found = adapter(home / "folder"), adapter(tmp_path / "out")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- what differs -----------------------------------------------------------------------------------------------------


def refusal(capsys, at: Path, kind: str = "file", /, **changes: object) -> list[str]:
    """The lines with which a resume in `at` is refused, without the first and the last one."""
    changes = {
        "resume_from_checkpoint": at / kind / f"checkpoints/step-{STOP:06d}",
        "output_dir": at / "new",
        **changes,
    }
    assert train.main(arguments(at, kind, **changes)) == 2
    assert not (at / "new").exists()
    return complaints(capsys.readouterr().err)


def complaints(said: str) -> list[str]:
    """The lines of a refusal between its first and its last one."""
    begin, end = "was written by another run:\n", "\nor start a new run in another output_dir\n"
    assert begin in said and said.endswith(end)
    return [line.strip() for line in said.partition(begin)[2].removesuffix(end).splitlines()]


def test_settings_that_differ_are_named_one_by_one_with_what_to_do(home, tmp_path, capsys):
    shutil.copytree(home, tmp_path / "copy")
    at = tmp_path / "copy"
    lines = refusal(
        capsys,
        at,
        **{
            "learning_rate": 5e-3,
            "warmup_steps": "null",
            "method.rank": 3,
            "method.target_modules": "[q_proj]",
            "data.max_length": 60,
            "data.system": "Be brief.",
        },
    )
    assert lines == [
        "learning_rate: 0.01 in the checkpoint, 0.005 now; give --learning_rate 0.01",
        "warmup_steps: 1 in the checkpoint, None now; give --warmup_steps 1",
        "method.target_modules: ['all-linear'] in the checkpoint, ['q_proj'] now; give --method.target_modules "
        "'[all-linear]'",
        "method.rank: 4 in the checkpoint, 3 now; give --method.rank 4",
        "data.system: '' in the checkpoint, 'Be brief.' now; give --data.system ''",
        "data.max_length: 64 in the checkpoint, 60 now; give --data.max_length 64",
    ]
    # what stands behind "give" brings the run back
    back = {"warmup_steps": "1", "method.target_modules": "[all-linear]", "data.system": ""}
    resume = {"resume_from_checkpoint": at / "file/checkpoints/step-000002", "output_dir": at / "new"}
    assert train.main(arguments(at, **back, **resume)) == 0


def test_a_dictionary_is_compared_name_by_name_and_given_back_whole():
    then, now = {"a": 1, "b": {"c": 2, "d.e": "x y"}}, {"a": 1, "b": {"c": 3}, "f": None}
    back = "give --data.task '{a: 1, b: {c: 2, d.e: x y}}'"
    assert list(_setting("data.task", then, now)) == [
        f"data.task.b.c: 2 in the checkpoint, 3 now; {back}",
        f"data.task.b.d.e: 'x y' in the checkpoint, absent now; {back}",
        f"data.task.f: absent in the checkpoint, None now; {back}",
    ]
    assert list(_setting("new", "absent", 1)) == ["new: absent in the checkpoint, 1 now; leave out --new"]
    (line,) = _setting("old", 1, "absent")
    assert line.endswith("this version has no such setting; resume with the version that wrote the checkpoint")


def test_a_direction_that_differs_is_named_by_its_settings(home, tmp_path, capsys):
    shutil.copytree(home, tmp_path / "copy")
    lines = refusal(capsys, tmp_path / "copy", **{"method.direction.type": "riemannian"})
    assert lines == [
        "method.direction.type: 'none' in the checkpoint, 'riemannian' now; give --method.direction.type none",
        "method.direction.damping: absent in the checkpoint, 0.01 now; leave out --method.direction.damping",
    ]


def test_a_method_of_another_type_is_one_line(home, tmp_path, capsys):
    shutil.copytree(home, tmp_path / "copy")
    words = [
        word for word in arguments(tmp_path / "copy") if not word.startswith(("--method.target_rank", "--method.svd"))
    ]
    checkpoint = tmp_path / "copy/file/checkpoints/step-000002"
    more = [f"--resume_from_checkpoint={checkpoint}", f"--output_dir={tmp_path / 'new'}", "--method.type=lora"]
    assert train.main([*words, *more]) == 2
    lines = complaints(capsys.readouterr().err)
    assert lines[0] == "method.type: 'srlora' in the checkpoint, 'lora' now; give --method.type srlora"
    assert not [line for line in lines if "absent" in line]


def test_the_global_batch_is_named_with_what_to_set(home, tmp_path, capsys):
    shutil.copytree(home, tmp_path / "copy")
    assert refusal(capsys, tmp_path / "copy", per_device_train_batch_size=2) == [
        "global batch: 4 in the checkpoint, 2 now; set per_device_train_batch_size and gradient_accumulation_steps so "
        "that their product with the number of ranks is 4"
    ]


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_row(path: Path, number: int, **values: str) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **values})
    path.write_text("\n".join(lines) + "\n")


def change_weight(at: Path) -> None:
    """One number of the embedding, which no adapter sits on."""
    tensors = load_file(at / "model/model.safetensors")
    tensors["model.embed_tokens.weight"][123, 17] += 0.5
    save_file(tensors, at / "model/model.safetensors", {"format": "pt"})


def change_tokenizer(at: Path) -> None:
    """The bytes a and b have each other's number; the data has neither."""
    content = json.loads((at / "model/tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (at / "model/tokenizer.json").write_text(json.dumps(content))


CONTENT = {  # kind of run, what changes after the copy, what is said of which setting
    "a row": (
        "file",
        lambda at: change_row(at / "data.jsonl", 3, completion="5"),
        "data.dataset",
        "the examples of {at}/data.jsonl are not those of the checkpoint",
    ),
    "a file of a mixture": (
        "mixture",
        lambda at: change_row(at / "many/b.jsonl", 3, completion="65"),
        "data.dataset",
        "the examples of {at}/many are not those of the checkpoint",
    ),
    "a file more": (
        "folder",
        lambda at: write_rows(at / "many/c.jsonl", rows(1, 3)),
        "data.dataset",
        "the examples of {at}/many are not those of the checkpoint",
    ),
    "the groups": (
        "file",
        lambda at: [change_row(at / "data.jsonl", row, group="g0") for row in range(8)],
        "data.dataset",
        "other examples would be held out, for the column group differs",
    ),
    "a row of a stream": (
        "stream",
        lambda at: change_row(at / "data.jsonl", 39, completion="41"),
        "data.dataset",
        "the files of {at}/data.jsonl are not those",
    ),
    "the template": (
        "file",
        lambda at: (at / "own.jinja").write_text(OWN.replace("never", "NEVER")),
        "data.chat_template",
        "the chat template is not that of the checkpoint",
    ),
    "the model's template": (
        "folder",
        lambda at: (at / "model/chat_template.jinja").write_text(OWN),
        "model_name_or_path",
        "the chat template is not that of the checkpoint",
    ),
    "a weight": ("folder", change_weight, "model_name_or_path", "the weights are not those of the checkpoint"),
    "the config": (
        "folder",
        lambda at: change_json(at / "model/config.json", rms_norm_eps=1e-3),
        "model_name_or_path",
        "rms_norm_eps of its config.json is 1e-06 in the checkpoint, 0.001 now; put it back",
    ),
    "the tokenizer": ("stream", change_tokenizer, "model_name_or_path", "the tokenizer is not that of the checkpoint"),
}


@pytest.mark.parametrize("case", CONTENT)
@pytest.mark.parametrize("moved", [True, False], ids=["moved", "in place"])
def test_changed_content_is_refused_by_name_wherever_it_is(case, moved, home, tmp_path, capsys):
    kind, change, key, said = CONTENT[case]
    at = tmp_path / "copy"
    shutil.copytree(home, at)
    if not moved:  # the checkpoint was written here
        file = at / kind / f"checkpoints/step-{STOP:06d}/state.json"
        file.write_text(file.read_text().replace(str(home), str(at)))
    change(at)
    (line,) = refusal(capsys, at, kind)
    assert said.format(at=at) in line
    was, now = (dict(word[2:].split("=", 1) for word in arguments(place, kind)).get(key, "") for place in (home, at))
    assert line.startswith(f"{key}: {was!r} in the checkpoint, {now!r} now" if moved else f"{key}: {now}: ")


def test_what_says_nothing_of_the_model_may_change(home, tmp_path):
    """As another version of transformers, or another tool, writes the same model."""
    at = tmp_path / "copy"
    shutil.copytree(home, at)
    change_json(
        at / "model/config.json", transformers_version="9.9", _name_or_path="x", use_cache=False, dtype="bfloat16"
    )
    config = json.loads((at / "model/config.json").read_text())
    del config["attention_bias"]  # at its default
    (at / "model/config.json").write_text(json.dumps(config))
    tensors = load_file(at / "model/model.safetensors")
    (at / "model/model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, at / "model" / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (at / "model/model.safetensors.index.json").write_text(json.dumps(index))
    resume = {"resume_from_checkpoint": at / "file/checkpoints/step-000002", "output_dir": at / "new"}
    assert train.main(arguments(at, **resume)) == 0
    wanted, found = adapter(home / "file"), adapter(at / "new")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_all_ranks_resume_or_all_are_refused(home, tmp_path):
    at = tmp_path / "copy"
    shutil.copytree(home, at)
    resume = {"resume_from_checkpoint": at / "file/checkpoints/step-000002", "per_device_train_batch_size": 2}
    good = live(arguments(at, **resume, output_dir=at / "new"), 2)
    assert good.codes == [0, 0], good.said[-3000:]
    assert good.said.count("now: the same examples") == 1
    assert [r["step"] for r in records(at / "new", "train")] == [3, 4]
    change_row(at / "data.jsonl", 3, completion="5")
    bad = live(arguments(at, **resume, output_dir=at / "newer"), 2)
    assert bad.codes == [2, 2] and "the examples of " in bad.said and not (at / "newer").exists()


def other_copies(key: str) -> str:
    from llm_lowrank.engines import make

    engine = make("plain", None)
    facts = {"config": {}, "tokenizer": "t", "template": None, "examples": "e", "split": "s"}
    source = SimpleNamespace(fingerprint="f")
    if engine.rank == 1 and key == "fingerprint":
        source.fingerprint = "other"
    elif engine.rank == 1:
        facts[key] = "other"
    return ranks.caught(lambda: check_ranks_alike(engine, source, facts), ValueError, RuntimeError)


@pytest.mark.parametrize(
    "key, setting",
    [("fingerprint", "model_name_or_path"), ("split", "data.dataset"), ("template", "data.chat_template")],
)
def test_nodes_with_copies_that_differ_are_refused_on_all_ranks(key, setting):
    for said in ranks.run(2, other_copies, key):
        assert f"{setting}: rank 0 and rank 1 do not read the same; give every node the same copy" in said


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_large_model_sees_the_first_the_last_and_stretches_between(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE", 1000)
    tiny.llama(hidden_size=84, vocab_size=2000).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    name = "model.embed_tokens.weight"  # 672,000 bytes: 16 stretches of 4096, of which the second begins at 44,526

    def fingerprint() -> str:
        save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
        return Source.open(tmp_path / "model").fingerprint

    prints = [fingerprint()]
    assert fingerprint() == prints[0]
    for element in (0, 44_526 // 4 + 10, 2000 * 84 - 1):
        tensors[name].view(-1)[element] += 1
        prints.append(fingerprint())
    assert len(set(prints)) == 4
    monkeypatch.setattr(sources, "WHOLE", 2**28)
    every = fingerprint()
    tensors[name].view(-1)[5000] += 1
    assert fingerprint() != every
