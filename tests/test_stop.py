"""What ends an answer in training ends it in generation: in the run, in evaluate.py, and in its results in plain
transformers. An answer without an end is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from llm_lowrank.data import Data, load_corpus
from llm_lowrank.data.stops import answer_ends, describe_ends
from llm_lowrank.evaluation.subject import Subject
from llm_lowrank.models.foreign import TEMPLATE
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.models.stopping import GENERATION, read_ends, stops_of
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import tiny
from tests.test_data import write_jsonl

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# an answer ends where the next role begins
GLM = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT_ALONE = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")


@dataclass(frozen=True)
class Family:
    """A tokenizer, its chat template, and what ends an answer."""

    template: str
    eos: str  # the tokenizer's
    end: str  # the template's
    special: list[str] = field(default_factory=list)
    bos: str | None = None
    style: str = "auto"


FAMILIES = {
    "ChatML over a base tokenizer": Family(CHATML, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "ChatML with marks": Family(MARKED, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "Llama 3": Family(
        LLAMA3, "<|end_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], "<|begin_of_text|>"
    ),
    "Llama 2": Family(LLAMA2, "</s>", "</s>", [], "<s>"),
    "Gemma": Family(GEMMA, "<eos>", "<end_of_turn>", ["<start_of_turn>"], "<bos>"),
    "alpaca": Family("", "</s>", "</s>", [], "<s>", "alpaca"),
}


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """One token a byte, and the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*family.special, *([family.bos] if family.bos else []), family.eos, family.end])
    tokenizer.add_special_tokens(list(special))
    if family.bos:
        number = tokenizer.token_to_id(family.bos)
        tokenizer.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=[(family.bos, number)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos, chat_template=family.template or None
    )


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, generation: bool = True) -> Path:
    model = tiny.llama(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    model.save_pretrained(folder)
    if not generation:
        (folder / GENERATION).unlink()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("LLM_LOWRANK_CACHE", str(tmp_path / "tokens"))


ROWS = [{"prompt": f"q{number}", "completion": "yes"} for number in range(32)]


def settings(model: Path, folder: Path, **changes: object) -> list[str]:
    rows = changes.pop("rows", ROWS)
    chosen = {
        "model_name_or_path": model,
        "output_dir": folder / "out",
        "engine": "plain",
        "report_to": "none",
        "data.dataset": write_jsonl(folder / "rows.jsonl", rows),
        "data.held_out": 0,
        "data.max_length": 512,
        "method.type": "lora",
        "method.rank": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "max_steps": 80,
        **changes,
    }
    return [f"--{name}={value}" for name, value in chosen.items()]


def asked(tokenizer: PreTrainedTokenizerFast, family: Family, question: str) -> torch.Tensor:
    """The prompt as plain transformers writes it."""
    if family.template:
        chat = [{"role": "user", "content": question}]
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return found["input_ids"]
    text = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{question}\n\n### Response:\n"
    )
    return tokenizer(text, return_tensors="pt")["input_ids"]


SEVERAL = ("Llama 3", "ChatML over a base tokenizer", "alpaca")  # with marks, with marks that are new, and without


@pytest.mark.parametrize("name", [n if n in SEVERAL else pytest.param(n, marks=pytest.mark.wide) for n in FAMILIES])
def test_generation_from_the_results_of_a_run_stops_where_its_answers_end(tmp_path, name, capsys):
    family = FAMILIES[name]
    trained_with = tokenizer_of(family)
    # the template is given with the data for one family, as a user with a base model does
    foreign = name == "ChatML over a base tokenizer"
    changes: dict[str, object] = {"data.prompt_style": family.style}
    if foreign:
        (tmp_path / "mine.jinja").write_text(family.template)
        changes["data.chat_template"] = tmp_path / "mine.jinja"
        trained_with.chat_template = None
    model = save_model(tmp_path / "model", trained_with, generation=name != "Gemma")
    train(parse(settings(model, tmp_path, **changes)))
    end, eos = trained_with.convert_tokens_to_ids([family.end, family.eos])
    others = "" if end == eos else f", as at {family.eos} ({eos})"
    assert f"answers end with {family.end} ({end}), where generation stops{others}\n" in capsys.readouterr().out

    merged = tmp_path / "out" / "merged"
    for folder in (merged, tmp_path / "out" / "adapter"):
        assert json.loads((folder / GENERATION).read_text())["eos_token_id"] == list(dict.fromkeys([end, eos]))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == family.eos and tokenizer.chat_template == (family.template or None)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged)
    for question in ("q3", "q17"):
        prompt = asked(tokenizer, family, question)
        answer = model.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
        assert answer[-1] == end and len(answer) < 8, tokenizer.decode(answer)
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "yes"

    # evaluate.py asks each of them in the same way
    for use in ("merged", "adapter", "base"):
        subject = Subject.find(str(tmp_path / "out"), use, None)
        loaded = subject.load("auto", torch.device("cpu"))
        assert set(stops_of(loaded, subject.tokenizer())) == {end, eos}, use


def test_the_runs_own_answers_and_the_merge_afterwards_stop_too(tmp_path, capsys):
    """Held-out questions of reasoning-gym: without a stop the exact match is 0 however well the model learned."""
    family = FAMILIES["ChatML over a base tokenizer"]
    model = save_model(tmp_path / "model", tokenizer_of(family))
    task = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    train(
        parse(
            settings(
                model,
                tmp_path,
                save_merged=False,
                max_steps=1,
                **{
                    "data.dataset": "reasoning-gym:chain_sum",
                    "data.size": 40,
                    "data.held_out": 4,
                    "data.task": json.dumps(task),
                },
            )
        )
    )
    assert "answers end with <|im_end|>" in capsys.readouterr().out
    merge(Source.open(model), tmp_path / "out" / "adapter", tmp_path / "merged")
    end = tokenizer_of(family).convert_tokens_to_ids("<|im_end|>")
    assert (
        read_ends(tmp_path / "merged")[0] == end
        and end in GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id
    )


def test_a_model_that_stops_at_several_tokens_keeps_them_all(tmp_path):
    family = FAMILIES["ChatML with marks"]
    model = save_model(tmp_path / "model", tokenizer_of(family))
    (model / GENERATION).write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.6, "a_new_key": 1}))
    train(parse(settings(model, tmp_path, max_steps=1)))
    end, eos = tokenizer_of(family).convert_tokens_to_ids([family.end, family.eos])
    written = json.loads((tmp_path / "out" / "merged" / GENERATION).read_text())
    assert written == {"eos_token_id": [end, eos, 5, 7], "temperature": 0.6, "a_new_key": 1}


def test_texts_have_no_answers_and_are_trained(tmp_path, capsys):
    family = FAMILIES["ChatML with marks"]
    model = save_model(tmp_path / "model", tokenizer_of(family))
    train(parse(settings(model, tmp_path, rows=[{"text": f"some text {k}"} for k in range(8)], max_steps=1)))
    said = capsys.readouterr().out
    assert "no answer with an end of its own is trained; generation stops at <|endoftext|>" in said
    eos = tokenizer_of(family).eos_token_id
    assert read_ends(tmp_path / "out" / "merged") == [eos]


# --- refused ----------------------------------------------------------------------------------------------------------

CHATS = [{"messages": [{"role": role, "content": f"{role} {k}"} for role in ("user", "assistant")]} for k in range(8)]
LONG = [{"messages": [m for turn in range(2) for m in CHATS[k + turn]["messages"]]} for k in range(6)]


def corpus(tmp_path: Path, family: Family, rows: list[dict], **changes: object):
    tokenizer = tokenizer_of(family)
    data = Data(dataset=write_jsonl(tmp_path / "rows.jsonl", rows), **{"held_out": 0, "max_length": 512, **changes})
    return tokenizer, load_corpus(data, tokenizer, seed=0)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("rows", [CHATS, LONG], ids=["one turn", "two turns"])
@pytest.mark.parametrize(
    "template, special, shown",
    [
        (GLM, ["<|user|>", "<|assistant|>"], "assistant 0"),
        (TEXT_ALONE, ["<|im_start|>"], "assistant 0"),
        (CHATML, [], "ant 0<|im_end|>"),  # its tokenizer splits the end into letters
    ],
    ids=["next role", "text alone", "an end of several tokens"],
)
def test_an_answer_without_an_end_is_refused_with_its_row_and_the_remedy(
    tmp_path, template, special, shown, rows, streaming
):
    family = Family(template, "<|endoftext|>", "<|im_end|>" if special else "<|endoftext|>", special)
    message = (
        rf"rows\.jsonl.*: an answer is trained without an end: behind '.*{re.escape(shown)}' stands no special token "
        r"that is trained.*Let the chat template write <\|endoftext\|> behind every answer"
    )

    def read() -> None:
        _, found = corpus(tmp_path, family, rows, streaming=streaming)
        next(iter(found.train.examples()))

    with pytest.raises(ValueError, match=message):
        read()


def test_a_last_answer_without_an_end_is_refused_though_the_others_have_one(tmp_path):
    template = MARKED.replace("<|im_end|>{% endgen", "{% if not loop.last %}<|im_end|>{% endif %}{% endgen")
    with pytest.raises(ValueError, match=r"an answer is trained without an end: behind '.*assistant 1'"):
        corpus(tmp_path, Family(template, "<|endoftext|>", "<|im_end|>", ["<|im_start|>"]), LONG)


def test_what_is_cut_to_max_length_is_no_answer_without_an_end(tmp_path):
    family = FAMILIES["ChatML with marks"]
    rows = [{"prompt": "q", "completion": "a long answer " * 9}, {"prompt": "r", "completion": "no"}]
    tokenizer, found = corpus(tmp_path, family, rows, max_length=60)
    assert found.truncated == 1 and list(found.ends) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_the_ends_of_several_files_and_of_a_stream_are_all_known(tmp_path):
    two = CHATML.replace("<|im_end|>", "{{ '<|eom|>' if 'tool' in m.content else '<|im_end|>' }}")
    family = Family(two, "<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<|eom|>"])
    rows = [{"prompt": f"q{k}", "completion": "a tool" if k == 5 else "yes"} for k in range(8)]
    tokenizer, found = corpus(tmp_path, family, rows)
    end, call = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eom|>"])
    assert found.ends == {end: 7, call: 1} and list(found.ends) == [end, call]
    assert describe_ends(tokenizer, found.ends, [end, 7]) == (
        f"answers end with <|im_end|> ({end}), <|eom|> ({call}), where generation stops, as at "
        f"{tokenizer.convert_ids_to_tokens(7)} (7)"
    )
    _, streamed = corpus(tmp_path, family, rows, streaming=True)
    examples = streamed.train.examples()
    for _ in rows:
        next(examples)
    assert set(streamed.ends) == {end, call}


def test_rows_of_tokens_are_not_refused_and_their_ends_are_found(tmp_path):
    family = FAMILIES["ChatML with marks"]
    end = tokenizer_of(family).convert_tokens_to_ids("<|im_end|>")
    rows = [
        {"input_ids": [65, 66, 67, end], "labels": [-100, -100, 67, end]},
        {"input_ids": [65, 66, 67], "labels": [-100, 66, 67]},  # cut by whoever prepared it
    ]
    _, found = corpus(tmp_path, family, rows)
    assert found.ends == {end: 1}


def test_an_answer_that_a_template_marks_in_pieces_needs_an_end_once():
    tokenizer = tokenizer_of(Family(CHATML, "<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<|think|>"]))
    end, think = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|think|>"])
    ids, trained = [65, think, 66, 67, end], [True, True, False, True, True]
    assert answer_ends(tokenizer, ids, trained, 1) == [end]
    assert answer_ends(tokenizer, ids, trained, 2) == [think, end]
    with pytest.raises(ValueError, match="without an end"):
        answer_ends(tokenizer, ids[:4], trained[:4], 1)


def test_a_part_of_an_answer_that_is_an_added_token_is_no_end():
    tokenizer = tokenizer_of(FAMILIES["ChatML with marks"])
    tokenizer.add_tokens(["</tool_call>", "<|added_end|>"])
    call, added = tokenizer.convert_tokens_to_ids(["</tool_call>", "<|added_end|>"])
    assert answer_ends(tokenizer, [65, added], [False, True], 1) == [added]
    with pytest.raises(ValueError, match=r"behind '.*</tool_call>' stands no special token"):
        answer_ends(tokenizer, [65, call], [False, True], 1)


@pytest.mark.parametrize("named", [True, False], ids=["class named", "class not named"])
def test_the_adapter_has_the_tokenizer_as_the_base_has_it(tmp_path, named):
    family = FAMILIES["ChatML with marks"]
    model = save_model(tmp_path / "model", tokenizer_of(family))
    file = model / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps({key: value for key, value in config.items() if named or key != "tokenizer_class"}))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text(CHATML)
    train(parse(settings(model, tmp_path, max_steps=1)))
    adapter = tmp_path / "out" / "adapter"
    for folder in (adapter, tmp_path / "out" / "merged"):
        found = AutoTokenizer.from_pretrained(folder)
        assert found.chat_template == {"default": MARKED, "tool_use": CHATML}
        assert (
            found("<|im_start|>q<|im_end|>")["input_ids"]
            == tokenizer_of(family)("<|im_start|>q<|im_end|>")["input_ids"]
        )
    if named:
        for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE):
            assert (adapter / name).read_bytes() == (model / name).read_bytes()


# --- merging the folder of an adapter ---------------------------------------------------------------------------------


def test_a_merge_keeps_several_templates_and_adds_one_that_the_base_has_not(tmp_path):
    family = FAMILIES["ChatML with marks"]
    model = save_model(tmp_path / "model", tokenizer_of(family))
    named = [{"name": "default", "template": MARKED}, {"name": "tool_use", "template": CHATML}]
    (model / TEMPLATE).unlink(missing_ok=True)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": named}))
    train(parse(settings(model, tmp_path, max_steps=1)))
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").chat_template == {
        "default": MARKED,
        "tool_use": CHATML,
    }
    (tmp_path / "mine.jinja").write_text(CHATML.replace("\n", "\n\n"))
    train(
        parse(
            settings(
                model,
                tmp_path,
                max_steps=1,
                overwrite_output_dir=True,
                **{"data.chat_template": tmp_path / "mine.jinja"},
            )
        )
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").chat_template == CHATML.replace("\n", "\n\n")
