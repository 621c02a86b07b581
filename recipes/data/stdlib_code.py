"""Write a corpus of code that needs no hub: functions of the standard library of the Python that runs this.

    python recipes/data/stdlib_code.py output/stdlib-code.jsonl

    prompt      the decorators, the signature and the docstring, with the line end after it
    completion  the body, indented as it stands below the prompt, comments included
    module      collections.abc
    name        OrderedDict.popitem

prompt + completion is the function as one would type it at the left margin. It is parsed again and compared with what
stands in the file, so nothing is changed on the way; what cannot be moved to the margin unchanged is left out. What the
corpus holds depends on the version of Python. `--longest 300` leaves out functions of more characters. The script
prints how many functions it took, and how many it left out for which reason. recipes/stdlib-code.yaml trains on the
file.
"""

import argparse
import ast
import json
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PROMPT = 2000  # characters, at most: some docstrings are a manual
COMPLETION = range(20, 2001)
LONGEST = PROMPT + COMPLETION[-1]  # both together, unless --longest says less
WORDS = 3  # of a docstring that says something

# Test suites, programs with their own ways, other people's packages, tables and what the interpreter is built with.
NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "encodings", "pydoc_data"}
NOT_LIBRARY |= {"site-packages", "dist-packages"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Pair:
    """A function's head and its body."""

    module: str
    name: str
    prompt: str
    completion: str


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--longest", type=int, default=LONGEST, help="characters of a function")
    args = parser.parse_args(arguments)
    path = args.file
    try:
        pairs, left_out = collect(Path(sysconfig.get_path("stdlib")), args.longest)
        write(path, pairs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{path}: {len(pairs)} functions of {len({pair.module for pair in pairs})} modules")
    for reason, count in left_out.most_common():
        print(f"{count:>8} left out: {reason}")


def write(path: Path, pairs: list[Pair]) -> None:
    """Write the pairs as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs), encoding="utf-8")


def collect(folder: Path, longest: int = LONGEST) -> tuple[list[Pair], Counter[str]]:
    """Return the pairs of the modules under `folder`, in the order of modules and lines, and how many functions (or
    files) were left out for which reason. ValueError if there is no pair: some Pythons come without source.

    longest: characters of a prompt and its completion, at most.
    """
    files = sorted((_module(path.relative_to(folder)), path) for path in folder.rglob("*.py") if path.is_file())
    files = [(module, path) for module, path in files if not NOT_LIBRARY & set(path.relative_to(folder).parts[:-1])]
    taken: list[Pair] = []
    left_out: Counter[str] = Counter()
    prompts: set[str] = set()
    bodies: set[str] = set()
    for module, path in files:
        try:
            with tokenize.open(path) as handle, warnings.catch_warnings():  # it knows the file's encoding
                warnings.simplefilter("ignore", SyntaxWarning)  # of other people's escapes
                source = handle.read()
                tree = ast.parse(source)
        # no encoding that Python knows, bytes that are not of it, Python of another version
        except (SyntaxError, ValueError):
            left_out["file cannot be read as Python"] += 1
            continue
        lines = source.split("\n")  # as ast counts them: a form feed ends no line
        for name, function in _functions(tree):
            try:
                prompt, completion = _halves(function, lines, longest)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            words = " ".join(prompt.split())
            body = "\n".join(map(ast.dump, function.body[1:]))
            if words in prompts or body in bodies:
                left_out["same prompt or same body as an earlier one"] += 1
                continue
            prompts.add(words)
            bodies.add(body)
            taken.append(Pair(module, name, prompt, completion))
    if not taken and left_out[_longer(longest)]:
        raise ValueError(f"--longest: no function under {folder} has at most {longest} characters; raise it")
    if not taken:
        raise ValueError(
            f"no function with a docstring under {folder}; this Python came without the source of its library"
        )
    return taken, left_out


class LeftOut(Exception):
    """Why a function makes no pair."""


def _longer(longest: int) -> str:
    return f"longer than {longest} characters"


def _halves(function: Function, lines: list[str], longest: int) -> tuple[str, str]:
    """Prompt and completion."""
    if ast.get_docstring(function) is None:
        raise LeftOut("no docstring")
    if len(_docstring(function).split()) < WORDS:
        raise LeftOut(f"docstring of fewer than {WORDS} words")
    if not function.body[1:] or all(_empty(statement) for statement in function.body[1:]):
        raise LeftOut("no body")
    first = min(node.lineno for node in (function, *function.decorator_list))
    border, last = function.body[0].end_lineno, function.end_lineno
    assert border is not None and last is not None
    margin = function.col_offset
    typed = [line[margin:] if not line[:margin].strip() else line for line in lines[first - 1 : last]]
    head, body = typed[: border - first + 1], typed[border - first + 1 :]
    while body and not body[0].strip():
        del body[0]
    prompt, completion = ("".join(f"{line}\n" for line in half) for half in (head, body))
    if len(prompt) > PROMPT:
        raise LeftOut(f"prompt longer than {PROMPT} characters")
    if len(completion) not in COMPLETION:
        raise LeftOut(f"body shorter than {COMPLETION[0]} or longer than {COMPLETION[-1]} characters")
    if not _same(prompt + completion, function):
        raise LeftOut("cannot be moved to the margin unchanged")
    if len(prompt) + len(completion) > longest:
        raise LeftOut(_longer(longest))
    return prompt, completion


def _same(typed: str, function: Function) -> bool:
    """Whether what was typed is the function, but for the margin of its docstring."""
    try:
        again = ast.parse(typed).body
    except SyntaxError:
        return False
    if len(again) != 1 or not isinstance(again[0], Function):
        return False
    return _bare(again[0]) == _bare(function) and _docstring(again[0]) == _docstring(function)


def _docstring(function: Function) -> str:
    """Without its margin; a last line of blanks is margin, too."""
    return (ast.get_docstring(function) or "").rstrip()


def _bare(function: Function) -> str:
    """Everything but the docstring, and where it stands."""
    parts = dict(ast.iter_fields(function)) | {"body": function.body[1:]}
    return ast.dump(type(function)(**parts))


def _functions(tree: ast.AST, outside: str = "") -> Iterator[tuple[str, Function]]:
    """(dotted name, function) of functions and methods; those inside of a function need what is around them."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield outside + node.name, node
        else:  # what stands under if and try belongs to the module, or to the class, around it
            yield from _functions(node, f"{outside}{node.name}." if isinstance(node, ast.ClassDef) else outside)


def _empty(statement: ast.stmt) -> bool:
    """pass, ..., another string, raise NotImplementedError."""
    if isinstance(statement, ast.Raise):
        raised = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _module(path: Path) -> str:
    """collections/__init__.py -> collections, collections/abc.py -> collections.abc"""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


if __name__ == "__main__":
    main()
