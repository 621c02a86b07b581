"""The corpus of code: whole functions, each once, as they stand in the files; what is left out is counted."""

import ast
import importlib
import inspect
import json
import sysconfig
from pathlib import Path

import pytest

from recipes.data import stdlib_code
from recipes.data.stdlib_code import Pair, collect

DOC = '"""Says a little something."""'


@pytest.fixture(scope="module")
def corpus() -> list[Pair]:
    return collect(Path(sysconfig.get_path("stdlib")))[0]


def write(folder: Path, **modules: str) -> Path:
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    return folder


def test_every_pair_of_the_library_is_one_function_with_its_docstring(corpus: list[Pair]) -> None:
    assert len(corpus) > 2000
    for pair in corpus:
        (function,) = ast.parse(pair.prompt + pair.completion).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name == pair.name.rpartition(".")[2]
        assert ast.get_docstring(function) is not None
        head = ast.parse(pair.prompt).body[0]  # the prompt ends with the docstring: nothing of the body is in it
        assert isinstance(head, type(function)) and len(head.body) == 1 and ast.get_docstring(head) is not None
        assert pair.prompt.endswith("\n") and pair.completion.endswith("\n") and pair.completion.split("\n")[0].strip()


@pytest.mark.parametrize(
    "module, name", [("textwrap", "dedent"), ("fnmatch", "filter"), ("collections", "Counter.most_common")]
)
def test_a_pair_is_what_inspect_finds(corpus: list[Pair], module: str, name: str) -> None:
    """`inspect` reads the same function by another way: from the imported object."""
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    pair = next(pair for pair in corpus if (pair.module, pair.name) == (module, name))
    expected = inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(value)))
    strip = [line.rstrip() for line in expected.splitlines() if line.strip()]
    assert [line.rstrip() for line in (pair.prompt + pair.completion).splitlines() if line.strip()] == strip


def test_no_pair_comes_twice_and_the_order_is_that_of_modules_and_lines(corpus: list[Pair]) -> None:
    prompts = [" ".join(pair.prompt.split()) for pair in corpus]
    assert len(set(prompts)) == len(prompts)
    assert len({pair.completion for pair in corpus}) == len(corpus)
    modules = [pair.module for pair in corpus]
    assert modules == sorted(modules)
    heapq = [pair.name for pair in corpus if pair.module == "heapq"]
    source = (Path(sysconfig.get_path("stdlib")) / "heapq.py").read_text(encoding="utf-8")
    assert heapq == sorted(heapq, key=lambda name: source.index(f"def {name}("))


def test_sizes_are_bounded_and_test_suites_stay_out(corpus: list[Pair]) -> None:
    assert all(20 <= len(pair.completion) <= 2000 and len(pair.prompt) <= 2000 for pair in corpus)
    parts = {part for pair in corpus for part in pair.module.split(".")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "encodings"}
    assert {"collections", "asyncio", "json", "unittest"} <= parts


def test_decorators_comments_and_nesting(tmp_path: Path) -> None:
    source = f'''
class Outer:
    class Inner:
        @property
        @other(1,
               2)
        async def value(self,
                        default=None):
            r"""Says a little
            more \\d than that."""

            # a comment before the first statement
            if default:
                return await default
            return self.value  # and one behind

    if True:
        def hidden(self):
            {DOC}
            def inner(x):
                {DOC}
                return x + 1 + self.something
            return inner
'''
    (tmp_path / "package").mkdir()
    write(tmp_path / "package", __init__=source)
    (value, hidden), left_out = collect(tmp_path)
    assert (value.module, value.name, hidden.name) == ("package", "Outer.Inner.value", "Outer.hidden")
    assert value.prompt == (
        "@property\n@other(1,\n       2)\nasync def value(self,\n                default=None):\n"
        '    r"""Says a little\n    more \\d than that."""\n'
    )
    assert value.completion == (
        "    # a comment before the first statement\n    if default:\n        return await default\n"
        "    return self.value  # and one behind\n"
    )
    assert (
        hidden.completion
        == f"    def inner(x):\n        {DOC}\n        return x + 1 + self.something\n    return inner\n"
    )
    assert not left_out


@pytest.mark.parametrize(
    "body, reason",
    [
        ("return something + 1 + 2", "no docstring"),
        ('"""Says little."""\n    return something + 1 + 2', "docstring of fewer than 3 words"),
        (f"{DOC}", "no body"),
        (f"{DOC}\n    pass", "no body"),
        (f"{DOC}\n    ...", "no body"),
        (f"{DOC}\n    raise NotImplementedError", "no body"),
        (f"{DOC}\n    raise NotImplementedError('of a subclass, that is')", "no body"),
        (f"{DOC}\n    return 1", "body shorter than 20 or longer than 2000 characters"),
        (f"{DOC}\n    return [{'1, ' * 700}]", "body shorter than 20 or longer than 2000 characters"),
        (f'"""{"word " * 500}"""\n    return something + 1 + 2', "prompt longer than 2000 characters"),
    ],
)
def test_what_is_left_out_is_counted(tmp_path: Path, body: str, reason: str) -> None:
    good = f"def good(x):\n    {DOC}\n    return x + 1 + 2 + 3 + 4\n"
    found, left_out = collect(write(tmp_path, a=f"def f(something):\n    {body}\n", b=good))
    assert [pair.name for pair in found] == ["good"]
    assert left_out == {reason: 1}


def test_a_text_that_the_margin_belongs_to_is_not_changed(tmp_path: Path) -> None:
    """A method whose body holds lines of text cannot be moved to the left: the text would be another one."""
    method = f'class C:\n    def f(self):\n        {DOC}\n        return """one\n            two"""\n'
    at_the_margin = f'class C:\n    def g(self):\n        {DOC}\n        return """first\nsecond"""\n'
    found, left_out = collect(write(tmp_path, a=method, b=at_the_margin))
    assert [pair.completion for pair in found] == ['    return """first\nsecond"""\n']
    assert left_out == {"cannot be moved to the margin unchanged": 1}


def test_the_same_body_or_prompt_is_taken_once(tmp_path: Path) -> None:
    first = f"def f(x):\n    {DOC}\n    return x + 1 + 2 + 3 + 4\n"
    same_body = '# here\ndef g(x):\n    """Says something quite different."""\n    return (x  +1+2 + 3 + 4)  # spaced\n'
    same_prompt = (
        first.replace("4", "5")
        .replace("def f(x):\n   ", "def f(x):\n         ")
        .replace("   return", "         return")
    )
    found, left_out = collect(write(tmp_path, a=first, b=same_body, c=same_prompt))
    assert [(pair.module, pair.name) for pair in found] == [("a", "f")]
    assert left_out == {"same prompt or same body as an earlier one": 2}


def test_files_that_are_not_python_are_counted(tmp_path: Path) -> None:
    write(
        tmp_path,
        good=f"def f(x):\n    {DOC}\n    return x + 1 + 2 + 3 + 4\n",
        print_statement="print 'of another Python'\n",
    )
    (tmp_path / "bytes.py").write_bytes(b"x = '\xff\xfe'\n")
    (tmp_path / "coding.py").write_bytes(b"# -*- coding: no-such-code -*-\n")
    (tmp_path / "zero.py").write_bytes(b"x = 1\0\n")
    latin = f"# -*- coding: latin-1 -*-\r\ndef g(x):\r\n    {DOC}\r\n    \x0c\r\n"
    latin += "    return 'gr\u00fc\u00dfe' + x + 'something'\r\n"
    (tmp_path / "latin.py").write_bytes(latin.encode("latin-1"))
    (tmp_path / "broken.py").symlink_to(tmp_path / "not-there.py")
    found, left_out = collect(tmp_path)
    assert [(pair.module, pair.name) for pair in found] == [("good", "f"), ("latin", "g")]
    assert found[1].completion == "    return 'gr\u00fc\u00dfe' + x + 'something'\n"
    assert left_out == {"file cannot be read as Python": 4}


def test_the_script_writes_the_pairs_and_says_what_it_left_out(tmp_path: Path, monkeypatch, capsys) -> None:
    library = tmp_path / "lib"
    library.mkdir()
    write(library, a=f"def f(x):\n    {DOC}\n    return x + 1 + 2 + 3 + 4\ndef g(x): pass\n", b="1 +")
    monkeypatch.setattr(stdlib_code.sysconfig, "get_path", lambda name: str(library))
    stdlib_code.main([str(tmp_path / "new" / "out.jsonl")])
    (row,) = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    prompt = f"def f(x):\n    {DOC}\n"
    assert row == {"module": "a", "name": "f", "prompt": prompt, "completion": "    return x + 1 + 2 + 3 + 4\n"}
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'new' / 'out.jsonl'}: 1 functions of 1 modules",
        "       1 left out: no docstring",
        "       1 left out: file cannot be read as Python",
    ]


def test_functions_longer_than_asked_for_are_left_out_and_counted(tmp_path: Path, monkeypatch, capsys) -> None:
    short, long = (
        f"def {name}(x):\n    {DOC}\n    return x + {name!r} * {size}\n" for name, size in (("f", 1), ("g", 1 << 40))
    )
    write(tmp_path, a=short + long)
    found, left_out = collect(tmp_path, longest=len(short))
    assert [pair.name for pair in found] == ["f"] and left_out == {f"longer than {len(short)} characters": 1}
    monkeypatch.setattr(stdlib_code.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit):
        stdlib_code.main([str(tmp_path / "out.jsonl"), "--longest", "9"])
    assert "--longest: no function" in capsys.readouterr().err


def test_a_python_without_source_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "os.pyc").write_bytes(b"")
    monkeypatch.setattr(stdlib_code.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit):
        stdlib_code.main([str(tmp_path / "out.jsonl")])
    assert "without the source" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()
