"""Generation: batched greedy answers are the ones found one by one, and accuracy does not depend on the number of
ranks.
"""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Nf4, nf4
from llm_lowrank.data import Question
from llm_lowrank.engines.frozen import FrozenLinear, codes_multiplied
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.generate import _continuation, accuracy, answer
from llm_lowrank.models.loading import bind, load
from llm_lowrank.models.stopping import stop_at
from llm_lowrank.numerics.optimizers import Optimization
from tests import ranks, tiny

WORDS = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["</s>"]
NEW = 6


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.6,
        attention_dropout=0.5,  # answers would be random in training mode
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def one_by_one(model, prompt_ids: list[int], end: int) -> str:
    """The oracle: the whole forward again for each token, no batch, no padding, no cache."""
    model.eval()
    ids: list[int] = []
    while len(ids) < NEW:
        token = int(model(torch.tensor([prompt_ids + ids]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return "".join(WORDS[token] for token in ids)


def questions(model, count: int) -> list[Question]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 26, (1 + k % 5,), generator=generator).tolist() for k in range(count)]
    right = [one_by_one(model, prompt, WORDS.index("</s>")) for prompt in prompts]
    expected = [text if k % 3 else "wrong" for k, text in enumerate(right)]
    return [
        Question(prompt, f"question {k}", lambda given, text=text: 1.0 if given == text else 0.25, text)
        for k, (prompt, text) in enumerate(zip(prompts, expected, strict=True))
    ]


def test_batched_answers_are_those_found_one_by_one(model, tokenizer):
    asked = questions(model, 9)
    found = [one_by_one(model, question.prompt_ids, tokenizer.eos_token_id) for question in asked]
    # the ends differ, so the batch must hold some back
    assert len({len(text) for text in found}) > 1 and len(set(found)) > 3
    assert answer(model, tokenizer, questions=asked, max_new_tokens=NEW, batch_size=4, synced=False) == found


def test_mode_and_checkpointing_come_back(model, tokenizer):
    asked = questions(model, 4)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    model.lm_head.eval()
    found = answer(model, tokenizer, questions=asked, max_new_tokens=NEW, batch_size=4, synced=False)
    assert model.training and model.model.layers[1].training and not model.lm_head.training
    assert model.model.gradient_checkpointing and model.model.layers[0].gradient_checkpointing
    assert found == [one_by_one(model, question.prompt_ids, tokenizer.eos_token_id) for question in asked]


def test_generation_uses_the_cache(model, tokenizer, monkeypatch):
    lengths = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: lengths.append(k["input_ids"].shape[1]) or forward(*a, **k)
    )
    model.activation_checkpointing_enable({"use_reentrant": False})
    answer(model.train(), tokenizer, questions=questions(model, 3), max_new_tokens=NEW, batch_size=3, synced=False)
    assert lengths and set(lengths[-NEW + 1 :]) == {1}


def test_the_output_layer_gets_rows_that_lie_one_behind_another(model, tokenizer):
    """Of a slice torch copies the matrix once for each row, in bfloat16 on CPUs."""
    given = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    answer(model, tokenizer, questions=questions(model, 4), max_new_tokens=NEW, batch_size=4, synced=False)
    together = [rows for rows in given if rows.shape[0] == 4]
    assert together and all(rows.shape[1] == 1 and rows.is_contiguous() for rows in together)
    model(torch.tensor([[1, 2], [3, 4]]), logits_to_keep=1)
    assert not given[-1].is_contiguous()  # behind the answers everything is as it was


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_accuracy_does_not_depend_on_the_ranks(model, tokenizer, monkeypatch, world):
    asked = questions(model, 7)
    calls, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda **k: calls.append(k["synced_gpus"]) or generate(**{**k, "synced_gpus": False})
    )
    parts: list[torch.Tensor] = []

    def run(rank, total):
        return accuracy(
            model,
            tokenizer,
            questions=asked,
            rank=rank,
            world=world,
            sum_over_ranks=lambda local: parts.append(local) or total(local),
            max_new_tokens=NEW,
            batch_size=2,
            synced=True,
        )

    samples, counts = [], []
    for rank in range(world):
        calls.clear()
        samples += run(rank, lambda local: local).samples if rank < 7 else []
        counts.append(len(calls))
        assert all(calls)  # synced reaches generate
    assert len(set(counts)) == 1  # every rank generates equally often
    total = torch.stack(parts).sum(0)
    report = run(0, lambda local: total)
    assert report.count == 7
    assert report.exact_match == pytest.approx(4 / 7) and report.mean_score == pytest.approx((4 + 3 * 0.25) / 7)
    # once each: fillers are not counted
    assert sorted(text for text, *_ in samples) == [f"question {k}" for k in range(7)]
    assert all((given == expected) == (score == 1.0) for _, given, expected, score in samples)


def test_a_rank_without_a_question_still_takes_part(model, tokenizer):
    report = accuracy(
        model,
        tokenizer,
        questions=questions(model, 1),
        rank=1,
        world=2,
        sum_over_ranks=lambda local: local + 1,
        max_new_tokens=NEW,
        batch_size=2,
        synced=False,
    )
    assert report.samples == [] and report.count == 1


def _is_even(text: str) -> float:
    return float(len(text) % 2 == 0)


@pytest.mark.parametrize("stops", [("k", "q"), ("never written",)])
def test_an_answer_ends_before_the_first_stop(model, tokenizer, stops, monkeypatch):
    asked = questions(model, 9)
    whole = answer(model, tokenizer, questions=asked, max_new_tokens=12, batch_size=4, synced=False)
    cut = [min((text.partition(stop)[0] for stop in stops), key=len) for text in whole]
    assert (cut != whole) == (stops[0] == "k")
    assert answer(model, tokenizer, questions=asked, max_new_tokens=12, batch_size=4, synced=False, stops=stops) == cut
    steps, forward = [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    first = next(
        question
        for question, text, rest in zip(asked, whole, cut, strict=True)
        if len(text) > len(rest) + 1 or stops[0] != "k"
    )
    answer(model, tokenizer, questions=[first], max_new_tokens=12, batch_size=1, synced=False, stops=stops)
    assert (len(steps) < 12) == (stops[0] == "k")  # it does not write on for nothing


@pytest.mark.parametrize("known", [None, 5, [5, 7]])
def test_an_answer_ends_at_the_tokens_that_training_ended_it_with_too(model, tokenizer, known):
    asked = questions(model, 9)
    model.generation_config.eos_token_id = known
    before = answer(model, tokenizer, questions=asked, max_new_tokens=12, batch_size=4, synced=False)
    stop_at(model, [WORDS.index("k"), WORDS.index("q")])
    cut = [min((text.partition(word)[0] for word in "kq"), key=len) for text in before]
    found = answer(model, tokenizer, questions=asked, max_new_tokens=12, batch_size=4, synced=False)
    # the token itself is no special one here, so that it is part of the text
    assert [text.rstrip("kq") for text in found] == cut != before


def test_a_stop_in_the_prompt_ends_nothing(model, tokenizer):
    asked = questions(model, 1)
    start = WORDS[asked[0].prompt_ids[-1]]
    (whole,) = answer(model, tokenizer, questions=asked, max_new_tokens=NEW, batch_size=1, synced=False)
    assert whole and answer(
        model, tokenizer, questions=asked, max_new_tokens=NEW, batch_size=1, synced=False, stops=(start + whole[0],)
    ) == [whole]


def test_answers_are_drawn_as_the_model_says(model, tokenizer):
    """Frequencies of the first token over many draws: no token is left out, whatever the checkpoint's settings are."""
    model.generation_config.top_k, model.generation_config.top_p, model.generation_config.temperature = 2, 0.5, 0.1
    asked = [Question([3, 5], "", len, "")] * 3000
    torch.manual_seed(0)
    drawn = answer(model, tokenizer, questions=asked, max_new_tokens=1, batch_size=1000, synced=False, temperature=2.0)
    again = answer(
        model, tokenizer, questions=asked[:1000], max_new_tokens=1, batch_size=1000, synced=False, temperature=2.0
    )
    torch.manual_seed(0)
    assert (
        answer(
            model, tokenizer, questions=asked[:1000], max_new_tokens=1, batch_size=1000, synced=False, temperature=2.0
        )
        == drawn[:1000]
        != again
    )
    with torch.no_grad():
        expected = (model.eval()(torch.tensor([[3, 5]])).logits[0, -1] / 2.0).softmax(-1)
    found = torch.tensor([sum(text == word for text in drawn) for word in [*WORDS[:26], ""]]) / len(drawn)
    assert (found - expected).abs().max() < 4 * (0.25 / 3000) ** 0.5 and int((found > 0).sum()) > 10


def test_blanks_at_the_beginning_of_an_answer_stay():
    """sentencepiece: a token carries the blanks before its word, and decoding drops those of the first one."""
    words = ["\u2581def", "\u2581\u2581\u2581", "\u2581return", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert fast.decode([1, 2]) == " return"
    assert _continuation(fast, [0], [1, 2]) == "    return"


def _sharded(engine: str, count: int) -> list[tuple[float, int, list[tuple[str, str]]]]:
    """Words of 26 letters; the score depends on the answer, so that it tells wrong answers apart.

    Asked again after a step of training.
    """
    # A large eps makes Adam's step proportional to the gradient: with a small one an entry whose gradient nearly
    # cancels takes its sign, and so a whole step, from the rounding of this CPU's sums.
    trainee = tiny.Trainee(LoRA(rank=4), engine, vocab_size=len(WORDS), optimization={"eps": 1e3})
    asked = [Question([k % 26, 3 * k % 26][: 1 + k % 2], str(k), _is_even, "x") for k in range(count)]
    rank, world = trainee.engine.rank, trainee.engine.world
    found = []
    for _ in range(2):
        report = accuracy(
            trainee.model,
            word_tokenizer(),
            questions=asked,
            rank=rank,
            world=world,
            sum_over_ranks=trainee.engine.sum,
            max_new_tokens=NEW,
            batch_size=2,
            synced=world > 1,
        )
        found.append((report.mean_score, report.count, [sample[:2] for sample in report.samples]))
        logits = trainee.wrapped(input_ids=torch.ones(1, 4, dtype=torch.long)).logits  # training goes on
        trainee.engine.backward((logits * torch.arange(len(WORDS))).sum() / world)  # this rank's share
        assert trainee.engine.step(30.0) > 0
    return found


@pytest.mark.parametrize("count", [3, 4])  # uneven and even shares
@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_sharded_model_answers_as_one_process(engine, count):
    (alone,) = ranks.run(1, _sharded, "plain", count)
    assert alone[0][2] != alone[1][2]  # the step has moved the model
    for (score, total, answers), *both in zip(alone, *ranks.run(2, _sharded, engine, count), strict=True):
        assert total == count and all((score, total) == found[:2] for found in both)
        assert sorted(both[0][2] + both[1][2]) == sorted(answers)


METHODS = {
    "lora": LoRA(rank=4, alpha=8),
    "srlora": SRLoRA(rank=4, target_rank=8, svd_cache="", into="bank"),
    "rasa": RaSA(rank=4, k=2),
    "losia": LoSiA(factor=0.25, output_factor=0, period=50, into="bank"),
    "dora": DoRA(rank=4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_answers_multiply_with_codes_and_nothing_else_does(tokenizer, monkeypatch, name, dtype):
    """With bitsandbytes' operator of the CPU. down_proj has rows of 48 elements, which are stored with gaps."""
    sizes = dict(vocab_size=len(WORDS), hidden_size=64, intermediate_size=48, head_dim=16, num_attention_heads=4)
    whole = tiny.llama(**sizes, attention_bias=True, tie_word_embeddings=False).to(dtype)
    state, codec = {key: value.clone() for key, value in whole.state_dict().items()}, Nf4(dtype)
    adapters = attach(whole, METHODS[name], codec, 0)
    tiny_source = tiny.Checkpoint(state)
    bind(whole, adapters, tiny_source)
    engine = Plain()
    load(engine, whole, adapters=adapters, method=METHODS[name], tensors=tiny_source, settings=Optimization())
    METHODS[name].batch(adapters, 0, [0])
    with torch.no_grad():
        for p in (p for p in whole.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    multiplied: list[int] = []
    multiply = Nf4.multiply
    monkeypatch.setattr(Nf4, "multiply", lambda *a: multiplied.append(a[3]) or multiply(*a))
    monkeypatch.setattr(nf4, "MULTIPLIES", ("cpu",))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    whole.eval()
    with torch.no_grad():
        decoded = whole(ids).logits
        assert not multiplied  # a held-out loss decodes
        with codes_multiplied(whole):
            found = whole(ids).logits
    per_forward = len(multiplied)
    assert per_forward == (0 if name == "dora" else 2 * 6) and set(multiplied) <= {64}
    assert (found - decoded).norm() <= 8 * torch.finfo(dtype).eps * decoded.norm()
    with codes_multiplied(whole):
        whole(ids).logits.sum().backward()  # with gradients W is decoded
    with torch.no_grad():
        whole(ids)
    assert len(multiplied) == per_forward
    answer(whole, tokenizer, questions=questions(whole, 2), max_new_tokens=NEW, batch_size=2, synced=False)
    assert len(multiplied) > per_forward or name == "dora"
    assert not any(module.multiplies_codes for module in whole.modules() if isinstance(module, FrozenLinear))
    engine.close()
