"""Chat templates as they are found: what they leave out is noticed, what they write is trained to the character."""

from __future__ import annotations

import json
from datetime import date as Date

import datasets
import pytest
from tokenizers import processors

from llm_lowrank.data import Data, encode_prompt, load_corpus
from llm_lowrank.data import templates as module
from llm_lowrank.data.encoding import encode_text, with_template
from llm_lowrank.run.inspect_data import paint
from tests.test_data import CHATML, MARKED, byte_tokenizer, cache, texts, write_jsonl  # noqa: F401 - cache: of every test here
from tests.test_formats import answers, chat


def loaded(tmp_path, rows, template: str | None = CHATML, tokenizer=None, date: str = "", **settings):
    tokenizer = tokenizer or byte_tokenizer(template)
    name = rows if isinstance(rows, str) else write_jsonl(tmp_path / "a.jsonl", rows)
    return tokenizer, load_corpus(Data(name, held_out=0, **settings), tokenizer, 0, date)


def painted(tmp_path, row, template: str | None = CHATML, **settings) -> str:
    """A row as launch/inspect_data.py prints it: what is trained in brackets."""
    tokenizer, corpus = loaded(tmp_path, [row], template, **settings)
    return paint(tokenizer, corpus.train[0].input_ids, corpus.train[0].labels, colored=False)


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


# Calls of tools. The templates below differ as published ones do: arguments as an object or as JSON, the content of a
# call empty, absent or None, the results of tools in a turn of their own or of the user.

HEAD = "{% if tools %}<|start|>tools\n{{ tools | tojson }}<|end|>\n{% endif %}"
TAIL = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
LOOP = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|start|>user\n<result>{{ m.content }}</result><|end|>\n"
    "{% elif CALLS %}<|start|>assistant\n{% generation %}{{ m.content or '' }}"
    "{% for c in m.tool_calls %}<call>ONE</call>{% endfor %}<|end|>"
    "{% endgeneration %}{{ '\n' }}{% elif m.role == 'assistant' %}<|start|>assistant\n"
    "{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{{ '\n' }}"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
OBJECT = '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
TEXT = "{{ '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + c.function.arguments + '}' }}"
EITHER = (
    '{"name": "{{ c.function.name }}", "arguments": {% if c.function.arguments is string %}{{ c.function.arguments }}'
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}}"
)
PARTS = "{{ c.function.name }}{% for name, value in c.function.arguments.items() %} {{ name }}={{ value }}{% endfor %}"
ANY, NULL, ABSENT = "m.tool_calls", "m.tool_calls and m.content is none", "m.tool_calls and 'content' not in m"


def tool_template(one: str = OBJECT, calls: str = ANY, marked: bool = False) -> str:
    template = HEAD + LOOP.replace("ONE", one).replace("CALLS", calls) + TAIL
    return template if marked else template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
ARGUMENTS = {"city": "Köln", "days": 2}


def call(arguments: object = ARGUMENTS, name: str = "weather", **more: object) -> dict:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def asking(first: dict) -> dict:
    """A conversation in which the first answer is this one."""
    result = {"role": "tool", "tool_call_id": "call_1", "content": "sun"}
    return {"messages": [user("q"), first, result, assistant("Sunny.")], "tools": TOOLS}


def expected(called: str) -> str:
    return (
        f"<|start|>tools\n{json.dumps(TOOLS)}<|end|>\n<|start|>user\nq<|end|>\n<|start|>assistant\n[{called}<|end|>]\n"
        "<|start|>user\n<result>sun</result><|end|>\n<|start|>assistant\n[Sunny.<|end|>]\n"
    )


JSON_CALL = '<call>{"name": "weather", "arguments": {"city": "Köln", "days": 2}}</call>'
CONTENTS = {"null": {"content": None}, "empty": {"content": ""}, "missing": {}}


@pytest.mark.parametrize("marked", [False, True], ids=["plain", "marked"])
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("given", ["object", "text"])
@pytest.mark.parametrize("one", [OBJECT, TEXT, EITHER], ids=["tojson", "joined", "either"])
@pytest.mark.parametrize("calls", [ANY, NULL, ABSENT], ids=["any", "null", "absent"])
def test_a_call_is_trained_as_the_template_writes_it(tmp_path, marked, content, given, one, calls):
    arguments = ARGUMENTS if given == "object" else json.dumps(ARGUMENTS, ensure_ascii=False)
    row = asking({"role": "assistant", "tool_calls": [call(arguments)], **CONTENTS[content]})
    assert painted(tmp_path, row, tool_template(one, calls, marked)) == expected(JSON_CALL)


def test_json_arguments_stay_as_they_stand_where_the_template_allows_it(tmp_path):
    text = '{"n":1e3,  "s": "\\u00e9\\"é"}'
    row = asking(assistant(None, tool_calls=[call(text)]))
    assert painted(tmp_path, row, tool_template(EITHER)) == expected(
        f'<call>{{"name": "weather", "arguments": {text}}}</call>'
    )


def test_arguments_as_names_with_values(tmp_path):
    row = asking(assistant(None, tool_calls=[call(json.dumps(ARGUMENTS))]))
    assert painted(tmp_path, row, tool_template(PARTS)) == expected("<call>weather city=Köln days=2</call>")


def test_text_beside_a_call_and_several_calls_each_with_its_own_arguments(tmp_path):
    calls = [call({"city": "Köln"}), call({"zone": None, "a": [1]}, "clock"), call({}, "today")]
    called = (
        'Let me see.<call>{"name": "weather", "arguments": {"city": "Köln"}}</call>'
        '<call>{"name": "clock", "arguments": {"zone": null, "a": [1]}}</call>'
        '<call>{"name": "today", "arguments": {}}</call>'
    )
    assert painted(tmp_path, asking(assistant("Let me see.", tool_calls=calls)), tool_template()) == expected(called)


def test_calls_of_a_parquet_file_keep_to_their_own_arguments(tmp_path):
    """A table gives every call the keys of all calls."""
    calls = [call({"city": "Köln"}), call({"zone": "utc"}, "clock")]
    row = {**asking(assistant(None, tool_calls=calls)), "tools": json.dumps(TOOLS)}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    tokenizer, corpus = loaded(tmp_path, str(tmp_path / "a.parquet"), tool_template())
    assert answers(tokenizer, corpus.train) == [
        '<call>{"name": "weather", "arguments": {"city": "Köln"}}</call>'
        '<call>{"name": "clock", "arguments": {"zone": "utc"}}</call><|end|>Sunny.<|end|>'
    ]


@pytest.mark.parametrize("tools", [json.dumps(TOOLS), [json.dumps(TOOLS[0])], [TOOLS[0]["function"]], TOOLS[0]])
def test_tools_in_the_forms_that_are_found(tmp_path, tools):
    row = {**asking(assistant(None, tool_calls=[call()])), "tools": tools}
    assert painted(tmp_path, row, tool_template()) == expected(JSON_CALL)
    row["functions"] = row.pop("tools")
    assert painted(tmp_path, row, tool_template()) == expected(JSON_CALL)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_a_row_without_tools(tmp_path, tools):
    row = {"messages": [user("q"), assistant("a")], "tools": tools}
    assert painted(tmp_path, row) == "<|start|>user\nq<|end|>\n<|start|>assistant\n[a<|end|>]\n"


def test_older_and_shorter_forms_of_a_call(tmp_path):
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    old = asking({"role": "assistant", "content": None, "function_call": function})
    old["messages"][2] = {"role": "function", "name": "weather", "content": "sun"}
    flat = asking(assistant(None, tool_calls=[function]))
    as_json = asking(assistant(None, tool_calls=json.dumps([call()])))
    for row in (old, flat, as_json):
        assert painted(tmp_path, row, tool_template()) == expected(JSON_CALL)


@pytest.mark.parametrize("value", [json.dumps({"name": "weather", "arguments": ARGUMENTS}), None])
@pytest.mark.parametrize("roles", [("function_call", "observation"), ("tool_call", "tool_response")])
def test_sharegpt_with_calls(tmp_path, roles, value):
    """As LLaMA-Factory reads it: the call is JSON, alone or in a list, and so are the tools."""
    value = value or json.dumps([{"name": "weather", "arguments": json.dumps(ARGUMENTS)}])
    turns = [("human", "q"), (roles[0], value), (roles[1], "sun"), ("gpt", "Sunny.")]
    row = {
        "conversations": [{"from": who, "value": text} for who, text in turns],
        "tools": json.dumps([TOOLS[0]["function"]]),
    }
    assert painted(tmp_path, row, tool_template()) == expected(JSON_CALL)


def test_calls_one_after_another_are_one_turn(tmp_path):
    one, two = ({"from": "function_call", "value": json.dumps({"name": x, "arguments": {}})} for x in ("a", "b"))
    turns = [{"from": "human", "value": "q"}, one, two, {"from": "observation", "value": "1"}]
    row = {"conversations": [*turns, {"from": "observation", "value": "2"}, {"from": "gpt", "value": "ok"}]}
    assert answers(*[x if k == 0 else x.train for k, x in enumerate(loaded(tmp_path, [row], tool_template()))]) == [
        '<call>{"name": "a", "arguments": {}}</call><call>{"name": "b", "arguments": {}}</call><|end|>ok<|end|>'
    ]


def test_a_call_may_be_marked_as_not_trained(tmp_path):
    row = asking(assistant(None, tool_calls=[call()], weight=0))
    assert painted(tmp_path, row, tool_template()) == expected(JSON_CALL).replace("[<call>", "<call>").replace(
        "<|end|>]\n<|start|>user\n<result>", "<|end|>\n<|start|>user\n<result>"
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tool_calls": [call("not json")]}, "message 1: the arguments for weather is not JSON"),
        ({"tool_calls": [call("[1]")]}, "message 1: the arguments for weather are not names with their values"),
        ({"tool_calls": [{"type": "function"}]}, "message 1: a call of a tool is not {name, arguments}"),
        ({"tool_calls": "weather()"}, "message 1: the call of a tool is not JSON"),
        ({"tool_calls": []}, "message 1: the answer is empty"),
    ],
)
def test_calls_that_are_none_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"row 0 .*{message}"):
        loaded(tmp_path, [asking({"role": "assistant", "content": "", **change})], tool_template())


def test_what_only_answers_can_do(tmp_path):
    row = {"messages": [{**user("q"), "tool_calls": [call()]}, assistant("a")]}
    with pytest.raises(ValueError, match="message 0: a turn of user calls a tool"):
        loaded(tmp_path, [row], tool_template())


@pytest.mark.parametrize("change", [{"tools": TOOLS}, {"tools": "x"}, {"tools": TOOLS, "functions": TOOLS}])
def test_tools_that_a_template_does_not_write_are_refused(tmp_path, change):
    row = {"messages": [user("q"), assistant("a")], **change}
    message = {"x": "tools is not JSON"}.get(
        str(change["tools"]), "the chat template does not write the tools of the row"
    )
    if len(change) > 1:
        message = "tools and functions both define tools"
    with pytest.raises(ValueError, match=f"row 0 .*{message}"):
        loaded(tmp_path, [row])
    assert painted(tmp_path, row, ignore=["tools", "functions"]).endswith("[a<|end|>]\n")


def test_calls_that_a_template_does_not_write_are_refused(tmp_path):
    row = {"messages": [user("q"), assistant("one moment", tool_calls=[call()])]}
    with pytest.raises(
        ValueError, match=r"row 0 .*message 1: the chat template does not write calls of tools; give one"
    ):
        loaded(tmp_path, [row])
    alone = {"messages": [user("q"), assistant(None, tool_calls=[call()])]}
    with pytest.raises(ValueError, match=r"row 0 .*message 1: .*data.chat_template FILE.jinja"):
        loaded(tmp_path, [alone])
    python = tool_template("{{ c.function }}")  # as Python writes a dictionary, which is no JSON
    with pytest.raises(ValueError, match="does not write calls of tools"):
        loaded(tmp_path, [alone], python)


def test_a_call_is_not_found_in_the_words_of_the_conversation(tmp_path):
    row = {"messages": [user("f {}"), assistant(None, tool_calls=[call({}, "f")]), user("r"), assistant("ok")]}
    with pytest.raises(ValueError, match=r"message 1: the chat template does not write calls of tools"):
        loaded(tmp_path, [row])
    null = tool_template(calls=NULL)  # written only where the content is null
    assert answers(*[x if k == 0 else x.train for k, x in enumerate(loaded(tmp_path, [row], null))]) == [
        '<call>{"name": "f", "arguments": {}}</call><|end|>ok<|end|>'
    ]


def test_text_that_a_template_leaves_out_beside_a_call_is_refused(tmp_path):
    template = tool_template().replace("{{ m.content or '' }}", "", 1)
    with pytest.raises(ValueError, match="message 1: the chat template does not write part of the answer"):
        loaded(tmp_path, [asking(assistant("Let me see.", tool_calls=[call()]))], template)
    with pytest.raises(ValueError, match="content of a turn of assistant beside a call of a tool"):
        loaded(tmp_path, [asking(assistant("Let me see.", tool_calls=[call()], weight=0))], template)


def test_results_that_a_template_leaves_out_are_refused(tmp_path):
    template = tool_template().replace("{{ m.content }}</result>", "</result>")
    with pytest.raises(ValueError, match="message 2: the chat template does not write the content of a turn of tool"):
        loaded(tmp_path, [asking(assistant(None, tool_calls=[call()]))], template)


def test_calls_need_a_template(tmp_path):
    row = {"messages": [user("q"), assistant(None, tool_calls=[call()])]}
    with pytest.raises(
        ValueError, match=r"tool_calls: a chat template writes this, and data.prompt_style: plain does not"
    ):
        loaded(tmp_path, [row], None)
    with pytest.raises(ValueError, match="tools: a chat template writes this"):
        loaded(tmp_path, [{"prompt": "q", "completion": "a", "tools": TOOLS}], None)
    with pytest.raises(ValueError, match="tool: a chat template writes this"):
        loaded(tmp_path, [{"messages": [user("q"), {"role": "tool", "content": "x"}, assistant("a")]}], None)


def test_a_tokenizer_with_a_template_of_its_own_for_tools(tmp_path):
    tokenizer = byte_tokenizer(None)
    tokenizer.chat_template = {"default": CHATML, "tool_use": tool_template()}
    rows = [asking(assistant(None, tool_calls=[call()])), {"messages": [user("q"), assistant("a")]}]
    corpus = loaded(tmp_path, rows, tokenizer=tokenizer)[1]
    assert answers(tokenizer, corpus.train) == [f"{JSON_CALL}<|end|>Sunny.<|end|>", "a<|end|>"]


def test_a_template_that_fails_is_a_bad_row(tmp_path):
    """Templates add texts to what is not there: a TypeError, which is no error of Jinja."""
    template = CHATML.replace("{{ message['content'] }}", "{{ 'x' + message['name'] }}")
    row = {"messages": [{**user("q"), "name": 3}, {**assistant("a"), "name": 4}]}
    with pytest.raises(ValueError, match=r"row 0 .*the chat template fails on this conversation"):
        loaded(tmp_path, [row], template)


# Variables of the template.


def test_variables_of_the_template(tmp_path):
    template = "{% if style is defined %}<|start|>style {{ style }}<|end|>\n{% endif %}" + CHATML
    row = {"prompt": "q", "completion": "a", "chat_template_kwargs": {"style": "short"}}
    assert painted(tmp_path, row, template) == f"<|start|>style short<|end|>\n{chat('q', '[a')[:-1]}]\n"
    with pytest.raises(
        ValueError, match=r"row 0 .*chat_template_kwargs: the chat template has no variable style; .*ignore"
    ):
        loaded(tmp_path, [row])


# Reasoning.

THINKING = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message['content'] }}",
)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_where_the_template_writes_it_and_refused_elsewhere(tmp_path, key):
    row = {"messages": [user("q"), {**assistant("a"), key: "hmm"}]}
    assert painted(tmp_path, row, THINKING) == f"{chat('q', '[<think>hmm</think>a')[:-1]}]\n"
    with pytest.raises(
        ValueError, match=rf"row 0 .*message 1: the chat template does not write {key}; .*ignore: \[{key}\]"
    ):
        loaded(tmp_path, [row])
    assert painted(tmp_path, row, ignore=[key]) == f"{chat('q', '[a')[:-1]}]\n"
    with pytest.raises(ValueError, match=f"{key}: a chat template writes this"):
        loaded(tmp_path, [row], None)


CUT = CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")


def test_an_answer_that_a_template_cuts_is_refused(tmp_path):
    """As templates of reasoning models do, with every answer."""
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "<think>hmm</think>a"}]
    with pytest.raises(ValueError, match=r"row 1 .*the answer: the chat template does not write part of the answer"):
        loaded(tmp_path, rows, CUT)
    marked = MARKED.replace(
        "{% generation %}{{ message['content'] }}", "{% generation %}{{ message['content'].split('</think>')[-1] }}"
    )
    with pytest.raises(ValueError, match=r"row 1 .*the answer: the chat template does not write part of the answer"):
        loaded(tmp_path, rows, marked)


def test_an_answer_may_begin_in_the_generation_prompt(tmp_path):
    begun = CHATML.replace("<|start|>assistant\n{% endif %}", "<|start|>assistant\n<think>\n{% endif %}")
    row = {"prompt": "q", "completion": "<think>\nhmm</think>a"}
    assert painted(tmp_path, row, begun) == chat("q", "<think>\n[hmm</think>a")[:-1] + "]\n"


QWEN3 = (  # an empty thought before the last answer only, as Qwen3 has it
    "{% for message in messages %}<|start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def test_several_turns_under_a_template_that_changes_earlier_ones(tmp_path):
    one, several = [user("q"), assistant("a")], [user("q"), assistant("a"), user("r"), assistant("b")]
    assert painted(tmp_path, {"messages": one}, QWEN3) == (
        "<|start|>user\nq<|end|>\n<|start|>assistant\n[<think>\n\n</think>\n\na<|end|>]\n"
    )
    with pytest.raises(
        ValueError, match=r"row 0 .*message 1: the chat template does not render .*set data.train_on: last"
    ):
        loaded(tmp_path, [{"messages": several}], QWEN3)
    wanted = (
        "<|start|>user\nq<|end|>\n<|start|>assistant\na<|end|>\n<|start|>user\nr<|end|>\n<|start|>assistant\n"
        "[<think>\n\n</think>\n\nb<|end|>]\n"
    )
    assert painted(tmp_path, {"messages": several}, QWEN3, train_on="last") == wanted
    flagged = [*several[:1], {**several[1], "weight": 0}, *several[2:]]
    assert painted(tmp_path, {"messages": flagged}, QWEN3) == wanted


# Marks.


def test_marks_in_several_pieces_and_marks_of_some_answers(tmp_path):
    pieces = MARKED.replace(
        "{% generation %}{{ message['content'] }}{% endgeneration %}",
        "{% generation %}<t>{% endgeneration %}|{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}",
    ).replace("<|end|>\n{% endfor %}", "\n{% endfor %}")
    row = {"messages": [user("q"), assistant("a", weight=0), user("r"), assistant("b")]}
    assert "[<t>]|[b<|end|>]" in painted(tmp_path, row, pieces) and "[a" not in painted(tmp_path, row, pieces)
    last = MARKED.replace("message['role'] == 'assistant' %}", "message['role'] == 'assistant' and loop.last %}")
    both = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}
    with pytest.raises(
        ValueError, match=r"message 1: the chat template does not mark this answer.*set data.train_on: last"
    ):
        loaded(tmp_path, [both], last)
    assert painted(tmp_path, both, last, train_on="last").endswith("[b<|end|>]\n")


def test_marks_end_behind_the_last_byte_of_a_letter(tmp_path):
    """One token a byte: transformers' own mask ends at the first byte of the last letter."""
    assert painted(tmp_path, {"prompt": "q", "completion": "ok 😀"}, MARKED) == f"{chat('q', '[ok 😀')[:-1]}]\n"


def test_a_mark_around_the_text_of_a_turn_that_only_calls_is_refused(tmp_path):
    """The marks decide what is trained, so the call would not be."""
    template = tool_template(marked=True).replace(
        "{% for c in m.tool_calls %}", "{% endgeneration %}{% for c in m.tool_calls %}"
    )
    template = template.replace("{% endfor %}<|end|>{% endgeneration %}", "{% endfor %}<|end|>")
    with pytest.raises(ValueError, match="message 1: the chat template does not mark this answer"):
        loaded(tmp_path, [asking(assistant(None, tool_calls=[call()]))], template)
    with pytest.raises(ValueError, match="message 1: the call of weather is not in the text that is trained"):
        loaded(tmp_path, [asking(assistant("Let me see.", tool_calls=[call()]))], template)


# Turns that a template leaves out.

NO_SYSTEM = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'system' %}")


def test_a_system_prompt_that_the_template_does_not_write_is_refused(tmp_path):
    rows = [{"prompt": "q", "completion": "a"}]
    for settings in ({}, {"bad_rows": "drop"}, {"streaming": True}):
        with pytest.raises(
            ValueError, match=r"data.system: the chat template does not write a system prompt; remove it"
        ):
            loaded(tmp_path, rows, NO_SYSTEM, system="be brief", **settings)
    with pytest.raises(ValueError, match=r"data.system"):
        encode_prompt(byte_tokenizer(NO_SYSTEM), "q", system="be brief")
    with pytest.raises(
        ValueError, match=r"row 1 .*the system prompt: the chat template does not write the content of a turn"
    ):
        loaded(tmp_path, [*rows, {**rows[0], "system": "be brief"}], NO_SYSTEM)
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(ValueError, match=r"data.system: the chat template refuses a system prompt: no system role"):
        loaded(tmp_path, rows, strict, system="be brief")


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("left_out", ["system", "user"])
def test_any_turn_that_the_template_leaves_out_is_refused(tmp_path, template, left_out):
    template = template.replace(
        "{% for message in messages %}", f"{{% for message in messages if message.role != '{left_out}' %}}"
    )
    # its words stand elsewhere, too
    row = {"messages": [{"role": "system", "content": "a"}, user("a"), assistant("a a")]}
    with pytest.raises(ValueError, match=f"row 0 .*does not write the content of a turn of {left_out}"):
        loaded(tmp_path, [row], template)


def test_a_system_prompt_inside_the_first_question_is_written(tmp_path):
    merged = (
        "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}\n"
        "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }}<|end|>\n{% endfor %}" + TAIL
    )
    row = {"prompt": "q", "completion": "a"}
    assert painted(tmp_path, row, merged, system="be brief") == f"{chat('be brief' + chr(10) * 2 + 'q', '[a')[:-1]}]\n"


# Special tokens that stand in the data already.


def with_bos(adds_bos: bool, adds_eos: bool = False, template: str | None = None):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    ids = {"<|begin|>": tokenizer.bos_token_id, "<|end|>": tokenizer.eos_token_id}
    single = ["<|begin|>"] * adds_bos + ["$A"] + ["<|end|>"] * adds_eos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[*ids.items()]
    )
    return tokenizer


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("begin", ["", "<|begin|>", " <|begin|>"])
@pytest.mark.parametrize("end", ["", "<|end|>", "<|end|>\n"])
def test_bos_and_eos_stand_once_in_a_text(tmp_path, adds_bos, adds_eos, begin, end):
    tokenizer = with_bos(adds_bos, adds_eos)
    _, corpus = loaded(tmp_path, [{"text": f"{begin}hello{end}"}], tokenizer=tokenizer)
    (text,), (trained,) = texts(tokenizer, corpus.train), answers(tokenizer, corpus.train)
    assert text == (begin or "<|begin|>" * adds_bos) + "hello" + (end or "<|end|>")
    assert trained == text.rstrip()  # what stands behind eos is not trained


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("style", ["plain", "alpaca"])
@pytest.mark.parametrize("end", ["", "<|end|>", "<|end|>\n"])
def test_bos_and_eos_stand_once_in_a_prompt_with_its_answer(tmp_path, adds_bos, style, end):
    tokenizer = with_bos(adds_bos)
    prompt = "<|begin|>q: " if style == "plain" else "q: "
    _, corpus = loaded(tmp_path, [{"prompt": prompt, "completion": f"a{end}"}], tokenizer=tokenizer, prompt_style=style)
    (text,) = texts(tokenizer, corpus.train)
    assert text.count("<|begin|>") == (1 if style == "plain" else adds_bos) and text.startswith(
        "<|begin|>"
    ) == text.count("<|begin|>")
    assert answers(tokenizer, corpus.train) == ["a<|end|>"]
    prompt_ids = encode_prompt(tokenizer, prompt, style)
    assert corpus.train[0].input_ids[: len(prompt_ids)] == prompt_ids


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_bos_and_eos_stand_once_in_a_conversation(tmp_path, adds_bos, template):
    tokenizer = with_bos(adds_bos, adds_eos=adds_bos, template="{{ bos_token }}" + template)
    rows = [{"messages": [user("q"), assistant("a<|end|>"), user("r"), assistant("b<|end|>\n")]}]
    _, corpus = loaded(tmp_path, rows, tokenizer=tokenizer)
    assert texts(tokenizer, corpus.train) == ["<|begin|>" + chat("q", "a", "r", "b")]
    assert answers(tokenizer, corpus.train) == ["a<|end|>b<|end|>"]
    with pytest.raises(
        ValueError, match=r"row 0 .*message 0: the content begins with <\|begin\|>, which the chat template"
    ):
        loaded(tmp_path, [{"messages": [user("<|begin|>q"), assistant("a")]}], tokenizer=tokenizer)


def test_a_template_that_writes_contents_alone_leaves_the_special_tokens_to_the_data(tmp_path):
    tokenizer = with_bos(True, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    rows = [{"prompt": "<|begin|>[q]", "completion": "a<|end|>"}]
    _, corpus = loaded(tmp_path, rows, tokenizer=tokenizer)
    assert texts(tokenizer, corpus.train) == ["<|begin|>[q]a<|end|>"] and answers(tokenizer, corpus.train) == [
        "a<|end|>"
    ]


def test_special_tokens_twice_in_the_data_are_refused(tmp_path):
    tokenizer = with_bos(True)
    for text, message in (
        ("<|begin|><|begin|>hello", r"row 0 .*begins with <\|begin\|> twice"),
        ("hello<|end|><|end|>", r"row 0 .*ends with <\|end\|> twice"),
        ("<|begin|><|end|>", "row 0 .*the text is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(tmp_path, [{"text": text}], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="the answer is empty"):
        loaded(tmp_path, [{"prompt": "q", "completion": "<|end|>"}], tokenizer=tokenizer)


def test_a_token_that_is_bos_and_eos(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|end|>"
    assert tokenizer.decode(encode_text(tokenizer, "hello")[0]) == "hello<|end|>"
    assert tokenizer.decode(encode_text(tokenizer, "<|end|>hello<|end|>")[0]) == "<|end|>hello<|end|>"


def test_an_eos_in_the_middle_of_an_answer_is_a_part_of_it(tmp_path):
    """With an eos that is not the end of a turn, the answer ended at such an eos."""
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_special_tokens({"eos_token": "<|stop|>"})
    _, corpus = loaded(tmp_path, [{"prompt": "q", "completion": "write <|stop|> here"}], tokenizer=tokenizer)
    assert answers(tokenizer, corpus.train) == ["write <|stop|> here<|end|>\n"]


# The date.

DATED = "{% if strftime_now is defined %}<|start|>today\n{{ strftime_now('%d %b %Y') }}<|end|>\n{% endif %}" + CHATML


def dated(day: str, *turns: str) -> str:
    return f"<|start|>today\n{day}<|end|>\n{chat(*turns)}"


class Tomorrow(module.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 2, 3)


def test_a_template_writes_the_day_of_the_run(tmp_path, monkeypatch):
    rows = [{"prompt": "q", "completion": "a"}]
    tokenizer, corpus = loaded(tmp_path, rows, DATED, date="2026-11-05")
    assert (texts(tokenizer, corpus.train), corpus.date) == ([dated("05 Nov 2026", "q", "a")], "2026-11-05")
    made = []
    from llm_lowrank.data import corpus as cached

    real = cached._map_rows
    monkeypatch.setattr(cached, "_map_rows", lambda *rest, **more: made.append(rest) or real(*rest, **more))
    again = loaded(tmp_path, rows, DATED, date="2026-11-05")[1]
    assert not made and again.fingerprint == corpus.fingerprint
    later = loaded(tmp_path, rows, DATED, date="2026-11-06")[1]
    assert len(made) == 1 and later.fingerprint != corpus.fingerprint
    today = loaded(tmp_path, rows, DATED)[1]
    assert today.date == Date.today().isoformat()
    # what does not depend on the day is made once, whatever the day is
    first, second = (loaded(tmp_path, rows, CHATML, date=day)[1] for day in ("2026-11-05", "2026-11-06"))
    assert first.fingerprint == second.fingerprint and len(made) == 3 and not first.date


def test_questions_and_streams_say_the_same_day(tmp_path):
    pytest.importorskip("reasoning_gym")
    tokenizer = byte_tokenizer(DATED)
    corpus = load_corpus(Data("reasoning-gym:chain_sum", size=8, held_out=2), tokenizer, 0, "2026-11-05")
    assert tokenizer.decode(corpus.questions[0].prompt_ids).startswith("<|start|>today\n05 Nov 2026<|end|>\n")
    _, stream = loaded(tmp_path, [{"prompt": "q", "completion": "a"}], DATED, date="2026-11-05", streaming=True)
    assert stream.date == "2026-11-05"
    assert tokenizer.decode(next(stream.train.examples()).input_ids) == dated("05 Nov 2026", "q", "a")


def test_a_frozen_day_is_written_as_transformers_writes_the_day(monkeypatch):
    """Every code of strftime, and line ends, blanks and macros as without the frozen day."""
    from transformers.utils import chat_template_utils

    formats = [f"%{code}" for code in module.CODES] + ["%-d.%-m.%y", "%A, %d %B %Y", "", "today"]
    template = "\n  {% if true %}\n  x\n{% endif %}{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}" + "".join(
        f"{{{{ day('{text}') }}}}|" for text in formats
    )
    tokenizer = byte_tokenizer(template)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()
    messages = [user("q")]
    assert module.Template(tokenizer, date="2031-02-03").text(messages) == module.Template(tokenizer).text(messages)
    assert "Monday, 03 February 2031" in module.Template(tokenizer, date="2031-02-03").text(messages)


def test_a_run_that_resumes_keeps_the_day_on_which_it_began(tmp_path):
    from types import SimpleNamespace

    from llm_lowrank.models.checkpoint import FOLDER, STATE
    from llm_lowrank.run.prepare import _date

    def day(resume: str) -> str:
        return _date(SimpleNamespace(resume_from_checkpoint=resume, output=tmp_path))

    today = Date.today().isoformat()
    assert day("none") == day("auto") == today
    for step, facts in ((3, {"date": "2026-11-05"}), (6, {"date": "2026-11-05"})):
        folder = tmp_path / FOLDER / f"step-{step:06}"
        folder.mkdir(parents=True)
        (folder / STATE).write_text(json.dumps({"data": facts}))
    assert day("auto") == day(str(folder)) == "2026-11-05" and day("none") == today
    (folder / STATE).write_text("half")
    assert day("auto") == "2026-11-05" and day(str(folder)) == today


def test_a_run_that_resumes_on_another_day_with_another_cache_trains_the_same_tokens(tmp_path, monkeypatch, capsys):
    from launch import train
    from llm_lowrank.run import prepare
    from tests import tiny
    from tests.test_launch import recipe

    class Someday(Date):
        days = iter((Date(2026, 11, 5), Date(2026, 11, 6)))

        @classmethod
        def today(cls):
            return next(cls.days)

    tokenizer = byte_tokenizer(DATED)
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(
        tmp_path / "data.jsonl", [{"prompt": f"{i} + 1 =", "completion": str(i + 1), "id": i} for i in range(40)]
    )
    monkeypatch.setattr(prepare, "Date", Someday)
    settings = {"engine": "plain", "save_steps": 2, "max_steps": 4, "data.max_length": 128, "method.type": "lora"}
    arguments = [
        word
        for word in recipe(tmp_path, **settings)
        if not word.startswith(("--method.target_rank", "--method.svd_cache"))
    ]
    assert train.main(arguments) == 0
    said = capsys.readouterr().out
    assert "the chat template writes the date: 2026-11-05" in said and "columns not used: id (40 rows)" in said
    first = tmp_path / "out" / "checkpoints" / "step-000002"
    assert json.loads((first / "state.json").read_text())["data"]["date"] == "2026-11-05"
    monkeypatch.setattr("llm_lowrank.data.corpus.cache_dir", lambda: tmp_path / "another cache")
    again = [f"--resume_from_checkpoint={first}", f"--output_dir={tmp_path / 'again'}"]
    assert train.main([*arguments, *again]) == 0
    assert "the chat template writes the date: 2026-11-05" in capsys.readouterr().out
    assert next(Someday.days) == Date(2026, 11, 6)  # today was not asked for


# What a model is asked with after the training is what stands before the answers in training.


def marked(header: str) -> str:
    """CHATML with marks around answers, and with another header before them than its generation prompt."""
    return MARKED.replace("{% generation %}", f"{header}{{% generation %}}")


@pytest.mark.parametrize(
    "template, message",
    [
        (CHATML.replace(TAIL, ""), r"message 1: the chat template has no generation prompt .* write '<\|start\|>assis"),
        (MARKED.replace(TAIL, ""), r"message 1: the chat template has no generation prompt .* write '<\|start\|>assis"),
        (
            CHATML.replace(TAIL, TAIL.replace("assistant", "bot")),
            r"generation prompt, '<\|start\|>bot\\n', is not what",
        ),
        (
            MARKED.replace(TAIL, TAIL.replace("assistant", "bot")),
            r"generation prompt, '<\|start\|>bot\\n', is not what",
        ),
        (marked("Answer: "), r"generation prompt, '<\|start\|>assistant\\n', is not what it writes before an answer"),
    ],
    ids=["none", "none with marks", "another", "another with marks", "text before the mark"],
)
def test_a_generation_prompt_that_is_not_before_the_answers_is_refused(tmp_path, template, message):
    assert template not in (CHATML, MARKED)
    for row in ({"messages": [user("q"), assistant("a")]}, {"prompt": "q", "completion": "a"}):
        with pytest.raises(ValueError, match=message.removeprefix("message 1: ")):
            loaded(tmp_path, [row], template)


def test_a_template_without_headers_needs_no_generation_prompt(tmp_path):
    plain = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}
    assert painted(tmp_path, row, plain) == "[INST] q [/INST][ a<|end|>][INST] r [/INST][ b<|end|>]"


def test_a_question_that_the_template_changes_is_refused(tmp_path):
    row = {"messages": [user("What is in Rome?"), assistant("much")]}
    for change in ("| lower", "| replace('Rome', '')", "| truncate(9)"):
        template = CHATML.replace("message['content'] }}", f"message['content'] {change} }}}}")
        assert template != CHATML
        with pytest.raises(
            ValueError, match=r"message 0: the chat template (changes|does not write) the content of a turn"
        ):
            loaded(tmp_path, [row], template)
    loaded(tmp_path, [row], CHATML.replace("message['content'] }}", "message['content'] | trim }}"))


ENDED = (  # marks around the text and the end of an answer
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}" + TAIL
)


@pytest.mark.parametrize("template", [CHATML, ENDED])
def test_an_end_of_turn_that_is_not_eos_stands_once(tmp_path, template):
    """A base tokenizer: its eos is another token than the end of a turn, which the data and the template both write."""
    base = byte_tokenizer(template)
    base.add_special_tokens({"eos_token": "<|other|>"})
    for ending in ("", "<|end|>", "<|end|>\n"):
        row = {"messages": [user("q"), assistant(f"a{ending}"), user("r"), assistant(f"b{ending}")]}
        tokenizer, corpus = loaded(tmp_path, [row], tokenizer=base)
        assert texts(tokenizer, corpus.train)[0].count("<|end|>") == 4
        assert answers(tokenizer, corpus.train)[0].replace("\n", "") == "a<|end|>b<|end|>"
    for content, message in (("a<|end|><|end|>", "ends with <|end|> twice"), ("<|end|>", "the answer is empty")):
        with pytest.raises(ValueError, match=f"message 1: .*{message}".replace("|", r"\|")):
            loaded(tmp_path, [{"messages": [user("q"), assistant(content)]}], tokenizer=base)


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}", r"the chat template is no Jinja \(line 1: .*\); correct it"),
        ("\n{{ messages | nofilter }}", r"the chat template is no Jinja \(line \d: No filter named 'nofilter'"),
        ("{{ raise_exception('only pairs') }}", "the chat template refuses this conversation: only pairs"),
        ("{{ raise_exception('') }}", "the chat template refuses this conversation: it does not say why"),
        ("{{ messages[0].nothing.more }}", "the chat template fails on this conversation: .* no attribute 'nothing'"),
        ({"rag": CHATML, "tool_use": CHATML}, "chat templates rag, tool_use, and none is called default; give the one"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, [{"prompt": "q", "completion": "a"}], template)


def test_an_empty_template_file_is_refused(tmp_path):
    (tmp_path / "t.jinja").write_text(" \n")
    with pytest.raises(ValueError, match=r"data.chat_template: .*t.jinja is empty"):
        with_template(byte_tokenizer(CHATML), str(tmp_path / "t.jinja"))
