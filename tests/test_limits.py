"""Tokens that the embedding has no row for, and examples longer than the model's positions: found while the data are
read, by row, before anything is loaded.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llm_lowrank.data import pad_id
from llm_lowrank.models.architectures import limits_of
from llm_lowrank.models.generate import answer
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks, tiny
from tests.test_architectures import GPT, plain_model
from tests.test_data import CHATML, byte_tokenizer, write_jsonl
from tests.test_launch import recipe

ROWS = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(20)]


def model_folder(folder: Path, kind: str = "llama", **changes: object) -> Path:
    """A model whose tokenizer has a pad token that the embedding has no row for."""
    tokenizer = byte_tokenizer(CHATML)
    plain_model(kind, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


def argv(folder: Path, model: Path, rows: list[dict], **changes: object) -> list[str]:
    settings = {
        "model_name_or_path": model,
        "output_dir": folder / "out",
        "data.dataset": write_jsonl(folder / "data.jsonl", rows),
        "data.held_out": 2,
        "max_steps": 2,
        "engine": "plain",
        "report_to": "none",
        "save_merged": False,
        "method.type": "lora",
        **changes,
    }
    gone = ("--method.target_rank", "--method.svd_cache")
    return [part for part in recipe(folder, **settings) if not part.startswith(gone)]


def test_a_pad_token_beyond_the_embedding_is_never_fed(tmp_path, capsys):
    """BUGS 14: the run trains, pads with eos, and says so."""
    model = model_folder(tmp_path / "model")
    train(parse(argv(tmp_path, model, ROWS, per_device_train_batch_size=8)))
    said = capsys.readouterr().out
    assert "padding: <|end|> (the embedding has no row for [PAD]), masked and never trained" in said


def test_the_pad_token_is_the_first_that_the_embedding_has():
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id
    assert pad_id(tokenizer, eos + 1) == eos and pad_id(tokenizer, eos) == 0
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert pad_id(tokenizer, 10**6) == tokenizer.pad_token_id == eos + 1
    assert pad_id(tokenizer, eos + 1) == eos


@pytest.mark.parametrize("streaming", [False, True])
def test_a_token_beyond_the_embedding_is_found_by_row(tmp_path, streaming):
    model = model_folder(tmp_path / "model")
    rows = [*ROWS, {"prompt": "pad", "completion": "[PAD]"}]
    size = len(AutoTokenizer.from_pretrained(model)) - 1
    says = rf"row 20.*the token {size} \(\[PAD\]\) has no row in the model's embedding, which has {size}"
    changes = {"data.streaming": streaming, "max_steps": 20 if streaming else 2}
    with pytest.raises(ValueError, match=says):
        train(parse(argv(tmp_path, model, rows, **changes)))
    assert not (tmp_path / "out" / "adapter").exists()


def refused(arguments: list[str]) -> str:
    return ranks.caught(lambda: train(parse(arguments)), ValueError, RuntimeError)


def test_all_ranks_find_it(tmp_path):
    model = model_folder(tmp_path / "model")
    rows = [*ROWS, {"prompt": "pad", "completion": "[PAD]"}]
    for message in ranks.run(2, refused, argv(tmp_path, model, rows, engine="fsdp")):
        assert "row 20" in message and "has no row in the model's embedding" in message


def test_rows_that_do_not_fit_can_be_dropped(tmp_path, capsys):
    model = model_folder(tmp_path / "model")
    rows = [*ROWS, {"prompt": "pad", "completion": "[PAD]"}]
    train(parse(argv(tmp_path, model, rows, **{"data.bad_rows": "drop"})))
    assert "has no row in the model's embedding" in capsys.readouterr().out


LONG = {"prompt": "a", "completion": "b" * 60}


@pytest.mark.parametrize(
    "kind, changes",
    [("opt", {}), ("gpt_neo", {}), ("gptj", {"n_positions": 32}), ("gpt2", GPT | {"n_positions": 32})],
)
def test_an_example_beyond_learned_positions_is_found_by_row(tmp_path, kind, changes):
    model = model_folder(tmp_path / "model", kind, **{"max_position_embeddings": 32, **changes})
    says = r"row 20.*more tokens than the 32 positions that the model has learned; set data.max_length 32"
    with pytest.raises(ValueError, match=says):
        train(parse(argv(tmp_path, model, [{"text": "a"} for _ in ROWS] + [{"text": "b" * 60}])))


def test_an_example_beyond_computed_positions_is_told(tmp_path, capsys):
    """BUGS 17: rotary positions extrapolate; the run says how far."""
    model = model_folder(tmp_path / "model", max_position_embeddings=32)
    train(parse(argv(tmp_path, model, [*ROWS, LONG, LONG, LONG], **{"data.held_out": 0})))
    assert "tokens, the model's max_position_embeddings is 32: its positions extrapolate" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out")
    train(parse(argv(tmp_path, model, [{"text": "a"}] * 20, **{"data.held_out": 0})))
    assert "extrapolate" not in capsys.readouterr().out


@pytest.mark.parametrize("kind, learned", [("opt", True), ("gpt_bigcode", True), ("bloom", False), ("llama", False)])
def test_positions_are_limited_where_they_are_looked_up(kind, learned):
    limits = limits_of(plain_model(kind))
    assert limits.vocabulary == tiny.VOCABULARY and limits.positions == (64 if learned else None)


def test_answers_stay_within_learned_positions(tmp_path):
    from llm_lowrank.data import Question

    tokenizer = byte_tokenizer()
    model = plain_model("opt", vocab_size=len(tokenizer), max_position_embeddings=32, eos_token_id=None)
    model.generation_config.eos_token_id = None
    question = Question(list(range(20)), "", lambda text: 0.0, "")
    options = {"max_new_tokens": 100, "batch_size": 1, "synced": False}
    (text,) = answer(model, tokenizer, questions=[question], **options)
    assert isinstance(text, str)
    with pytest.raises(ValueError, match="a prompt has 32 tokens, and the model has learned 32 positions"):
        answer(model, tokenizer, questions=[Question(list(range(32)), "", lambda text: 0.0, "")], **options)
