"""From `--config_path recipe.yaml --method.rank 32` to a frozen dataclass, and its --help.

draccus turns the values into the fields' types. Here stands what a newcomer meets: a setting that does not exist is
named together with the one that was probably meant, a switch needs no value, and a section that names what it is starts
from that thing's own defaults.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import draccus
import yaml
from draccus.utils import ParsingError, is_choice_type

from llm_lowrank.run import SHIPPED

T = TypeVar("T")
Tree = dict[str, Any]
Complaint = tuple[str, str]  # the dotted name that it is about, and what to print
TYPE = "type"  # the key that names the kind of a choice
CONFIG = "config_path"
IGNORED = ("local_rank", "local-rank")  # the deepspeed launcher adds it; the environment says the same


class RecipeError(ValueError):
    """What the user asked for cannot be done; the message says what to change."""


def read(
    cls: type[T], argv: list[str], defaults: T, identity: dict[str, str], refusals: dict[str, str], output: str = ""
) -> T:
    """Return the settings of the files in --config_path, overridden by the rest of the command line.

    Files are separated by commas, and a later one overrides an earlier one setting by setting. They are looked up in
    the working directory, then in SHIPPED. Where a file, or the command line, changes the type of a section, those
    settings of the old type that the new one lacks are dropped. What nobody names comes from `defaults`. RecipeError
    names the file of a mistake where there are several files.

    `identity`: section -> the setting that says what it is. A section that names it (another method, another dataset)
    starts from that thing's own defaults, any other continues the section in `defaults`.
    `refusals`: a name that is no setting here, such as another library's -> the end of the message that refuses it.
    `output`: the setting that names the folder of results; a run of a.yaml,b.yaml that gives none writes to output/a-b.
    """
    keys = settings(cls)
    base = draccus.encode(defaults)
    given = _arguments(argv, keys)
    paths = _paths(given.pop(CONFIG)) if CONFIG in given else []
    tree, origin = _files(cls, paths, base)
    if paths and output:
        tree = {output: f"output/{'-'.join(Path(path).stem for path in paths)}", **tree}
    for key, value in given.items():
        if key.endswith(f".{TYPE}"):
            _change_type(cls, tree, base, key.removesuffix(f".{TYPE}"), value)
        _put(tree, key, value)
        origin.pop(key, None)
    for section, key in identity.items():
        if isinstance(tree.get(section), dict) and key not in tree[section]:
            tree[section] = _merge(base[section], tree[section])
    errors = _check(cls, tree, "", keys, refusals)
    if errors:
        where = origin if len(paths) > 1 else {}
        raise RecipeError("\n".join(f"{where[key]}: {text}" if key in where else text for key, text in errors))
    try:
        return draccus.decode(cls, {**base, **tree})
    except ParsingError as error:
        reason = error.__cause__ if type(error) is ParsingError else None  # why a dataclass refused its values
        raise RecipeError(str(reason or error).replace("`", "")) from None


def settings(cls: type) -> dict[str, Any]:
    """Every setting by its dotted name with its type, those of all kinds of a choice included."""
    found: dict[str, Any] = {}
    for name, kind in _hints(cls).items():
        if is_choice_type(kind):
            found[f"{name}.{TYPE}"] = Literal[tuple(kind.get_known_choices())]
        for part in kind.get_known_choices().values() if is_choice_type(kind) else [kind] if _is_section(kind) else []:
            found |= {f"{name}.{key}": leaf for key, leaf in settings(part).items()}
        if not _is_section(kind):
            found[name] = kind
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def _arguments(argv: list[str], keys: dict[str, Any]) -> Tree:
    """--name value, --name=value, or --name alone for a switch: dotted names with their values."""
    given: Tree = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise RecipeError(f"unexpected argument '{word}': settings are written --name value, lists as a,b,c")
        name, equals, text = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not equals and keys.get(name, bool) is bool and name != CONFIG:
            text = "true"
        elif not equals:
            raise RecipeError(f"--{name} needs a value")
        if name not in IGNORED:
            given[name] = text if name == CONFIG else _value(name, text, keys.get(name))
    return given


def _value(name: str, text: str, kind: Any) -> Any:
    """What was typed: a string where one is wanted, otherwise YAML (1e-3, true, [a, b], {min_terms: 2})."""
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--{name}: cannot read '{text}'") from None


def _paths(text: str) -> list[str]:
    """The files that --config_path names."""
    paths = [path.strip() for path in text.split(",")]
    if not all(paths):
        raise RecipeError(f"--{CONFIG} {text} has an empty name; write a.yaml,b.yaml")
    return paths


def _files(cls: type, paths: Sequence[str], base: Tree) -> tuple[Tree, dict[str, str]]:
    """What the files say together, later ones over earlier ones, and the file that each dotted name comes from."""
    tree: Tree = {}
    origin: dict[str, str] = {}
    for path in paths:
        over = _file(path)
        for section, new in list(_types(over)):
            _change_type(cls, tree, base, section, new)
        tree = _merge(tree, over)
        origin |= dict.fromkeys(_names(over), path)
    return tree, origin


def _types(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names of the sections that name their type, with the type, the outer section first."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if TYPE in value:
                yield f"{prefix}{key}", value[TYPE]
            yield from _types(value, f"{prefix}{key}.")


def _names(tree: Tree, prefix: str = "") -> Iterator[str]:
    """The dotted names of sections and settings."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")


def _file(path: str) -> Tree:
    given = Path(path).expanduser()
    found = given if given.exists() else SHIPPED / given
    try:
        content = yaml.safe_load(found.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise RecipeError(
            f"--{CONFIG} {path}: {error.strerror}; the library's own recipes are in {SHIPPED / 'recipes'}"
        ) from None
    except OSError as error:
        raise RecipeError(f"--{CONFIG} {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"--{CONFIG} {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"--{CONFIG} {path} must hold settings, one `name: value` a line")
    tree: Tree = {}
    for key, value in content.items():
        _put(tree, str(key), value)
    return tree


def _put(tree: Tree, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, 1):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"{'.'.join(sections[:depth])} was given a value, '{tree}', and is a section ({key})")
    tree[name] = value


def _change_type(cls: type, tree: Tree, base: Tree, field: str, new: Any) -> None:
    """Drop the settings of a section that its old type has and the new one lacks."""
    outer, _, inner = field.partition(".")
    if inner:  # a section in a section: of the kind that the outer one has here
        kind, section = _hints(cls).get(outer), tree.get(outer)
        if kind is not None and is_choice_type(kind) and isinstance(section, dict):
            name = section.get(TYPE, base[outer][TYPE])
            if name in kind.get_known_choices():
                _change_type(kind.get_known_choices()[name], section, base[outer], inner, new)
        return
    choice, section = _hints(cls).get(field), tree.get(field)
    if choice is not None and is_choice_type(choice) and isinstance(section, dict):
        kinds = choice.get_known_choices()
        old = section.get(TYPE, base[field][TYPE])
        old_keys, new_keys = (_hints(kinds[name]) if name in kinds else {} for name in (old, new))
        tree[field] = {key: value for key, value in section.items() if key in new_keys or key not in old_keys}


def _merge(under: Tree, over: Tree) -> Tree:
    both = {
        key: _merge(under[key], over[key])
        for key in over
        if isinstance(over[key], dict) and isinstance(under.get(key), dict)
    }
    return {**under, **over, **both}


# --- checking ---------------------------------------------------------------------------------------------------------


def _check(cls: type, tree: Tree, prefix: str, keys: dict[str, Any], refusals: dict[str, str]) -> list[Complaint]:
    """Complaints about unknown names and about values that would be taken for something else.

    Splits `a,b,c` where a list is wanted.
    """
    errors: list[Complaint] = []
    hints = _hints(cls)
    for name, value in tree.items():
        key, kind = f"{prefix}{name}", hints.get(name)
        optional, kind = type(None) in typing.get_args(kind), _bare(kind)
        text = ""
        if kind is None:
            text = _unknown_message(key, cls, keys, refusals)
        elif _is_section(kind):
            errors += _check_section(key, kind, value, keys, refusals)
        elif typing.get_origin(kind) is Literal:
            if value not in typing.get_args(kind):
                text = f"{key}: '{value}' is not one of {', '.join(map(str, typing.get_args(kind)))}"
        elif value is None:
            text = "" if optional else f"{key} needs a value ({_type_name(kind)})"
        elif kind in (bool, int, float, str):
            text = "" if _fits(value, kind) else f"{key}: '{value}' is not a value of type {_type_name(kind)}"
        elif typing.get_origin(kind) in (tuple, list):
            if isinstance(value, str):
                tree[name] = [part.strip() for part in value.split(",") if part.strip()]
            text = "" if isinstance(tree[name], list) else f"{key}: '{value}' is not a list; write a,b,c"
        elif typing.get_origin(kind) is dict and not isinstance(value, dict):
            text = f"{key}: '{value}' is not a section; write {key}.name value, or {_type_name(kind)}"
        if text:
            errors.append((key, text))
    return errors


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool | dict | list) or kind is bool:
        return kind is bool and isinstance(value, bool)
    try:
        kind(str(value))  # YAML reads 1e-3 as text
    except ValueError:
        return False
    return True


def _check_section(key: str, kind: Any, value: Any, keys: dict[str, Any], refusals: dict[str, str]) -> list[Complaint]:
    if not isinstance(value, dict) and key in refusals:  # elsewhere it is a setting
        return [(key, f"{key} is a section of settings, not a value; {refusals[key]}")]
    if not isinstance(value, dict):
        first = next(name for name in keys if name.startswith(f"{key}."))
        return [(key, f"{key} is a section of settings, not a value; did you mean {first} {value}?")]
    if is_choice_type(kind):
        kinds = kind.get_known_choices()
        chosen = value.get(TYPE)
        if chosen not in kinds:
            wrong = "is missing beside the other settings; write" if chosen is None else f"'{chosen}' is not"
            return [(f"{key}.{TYPE}", f"{key}.{TYPE}: {wrong} one of {', '.join(kinds)}")]
        section = {name: part for name, part in value.items() if name != TYPE}
        errors = _check(kinds[chosen], section, f"{key}.", keys, refusals)
        value.update(section)
        return errors
    return _check(kind, value, f"{key}.", keys, refusals)


def _unknown_message(key: str, cls: Any, keys: dict[str, Any], refusals: dict[str, str]) -> str:
    """Name the setting that was probably meant: by another library's name, by its last part, by its spelling."""
    if key in keys:  # then another type of this section has it
        section = key.rpartition(".")[0]
        return f"unknown setting '{key}': {section}.{TYPE} {cls.get_choice_name(cls)} does not have it"
    section, _, last = key.replace("-", "_").rpartition(".")
    full = {
        known.rpartition(".")[2]: known for known in sorted(keys, key=lambda known: known.startswith(f"{section}."))
    }
    if last in refusals:
        return f"unknown setting '{key}'; {refusals[last]}"
    guess = full.get(last)
    if guess is None:
        near = difflib.get_close_matches(last, full, n=5, cutoff=0.75)
        guess = next((full[name] for name in near if _is_misspelt(last, name)), None)
    return f"unknown setting '{key}'; " + (f"did you mean {guess}?" if guess else "--help lists what there is")


def _is_misspelt(word: str, name: str) -> bool:
    """Return whether a word is likely a name with a slip in it, and not the name of something else.

    log_interval and interval, lr_schedule and paper_schedule are near by their letters alone: of a slip all parts are.
    """

    def near(a: str, b: str, share: float) -> bool:
        return difflib.SequenceMatcher(None, a, b).ratio() >= share

    parts, known = word.split("_"), name.split("_")
    if len(parts) == len(known):
        return all(near(a, b, 0.7) for a, b in zip(parts, known, strict=True))
    return name.startswith(f"{word}_") or near("".join(parts), "".join(known), 0.9)


# --- help -------------------------------------------------------------------------------------------------------------


def help_text(cls: type, defaults: Any, usage: str, headings: dict[str, str], width: int = 110) -> str:
    """Usage, then every setting with its type, its default and the string under its field.

    `headings`: first field -> title.
    """
    file = (
        "YAML files with any of the settings below, looked up in the working directory, then where the library lies. "
        "Of a.yaml,b.yaml the later one overrides the earlier one, and the command line overrides both."
    )
    out = [usage, "", f"  --{CONFIG} PATH,PATH,...\n{_wrap(file, '', width)}"]
    title = ""
    for name, kind in _hints(cls).items():
        value = getattr(defaults, name)
        if is_choice_type(kind):
            out += _choice_help(name, kind, value, _docs(cls)[name], width)
        elif _is_section(kind):
            out.append(f"\n{name}: {_docs(cls)[name]}")
            out += [_entry(f"{name}.{key}", kind, key, getattr(value, key), width) for key in _hints(kind)]
        else:
            if name in headings and headings[name] != title:
                title = headings[name]
                out.append(f"\n{title}:")
            out.append(_entry(name, cls, name, value, width))
    return "\n".join(out)


def _choice_help(name: str, base: Any, value: Any, doc: str, width: int) -> list[str]:
    """The settings that all types share once, then what each type adds."""
    kinds = base.get_known_choices()
    chosen = base.get_choice_name(type(value))
    shown = f"  (default: {chosen})"
    types = textwrap.fill(
        f"--{name}.{TYPE} {{{', '.join(kinds)}}}",
        width - len(shown),
        initial_indent="  ",
        subsequent_indent=" " * 8,
        break_on_hyphens=False,
    )
    out = [f"\n{name}: {doc}", types + shown]
    out += [_entry(f"{name}.{key}", base, key, getattr(value, key), width) for key in _hints(base)]
    for kind_name, kind in kinds.items():
        above = next(c for c in kind.__mro__[1:] if c in kinds.values() or c is base)  # a type may add to another one
        too = f" Has the settings of {base.get_choice_name(above)}, too." if above in kinds.values() else ""
        out.append(
            "\n"
            + textwrap.fill(f"{name}.{TYPE} {kind_name}: {(inspect.getdoc(kind) or '').splitlines()[0]}{too}", width)
        )
        defaults = value if kind_name == chosen else kind()
        known = {} if above is base else {key: getattr(above(), key) for key in _hints(above)}
        added = {  # with the shared ones whose default is another one here
            key: hint
            for key, hint in _hints(kind).items()
            if key not in _hints(above) or (key in known and getattr(kind(), key) != known[key])
        }
        out += [
            _entry(f"{name}.{key}", kind, key, getattr(defaults, key), width)
            for key, hint in added.items()
            if not is_choice_type(hint)
        ]
        for key, hint in added.items():
            if is_choice_type(hint):
                out += _choice_help(f"{name}.{key}", hint, getattr(defaults, key), _docs(kind)[key], width)
    return out


def _entry(flag: str, owner: type, field: str, default: Any, width: int) -> str:
    shown = "" if default is None else f"(default: {_show(default)})"
    return f"  --{flag} {_type_name(_bare(_hints(owner)[field]))}\n{_wrap(_docs(owner).get(field, ''), shown, width)}"


def _wrap(doc: str, default: str, width: int) -> str:
    return textwrap.fill(
        f"{doc} {default}".strip(), width, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
    )


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, sort_keys=False).partition("\n")[0]
    )


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return f"{{{','.join(map(str, typing.get_args(kind)))}}}"
    names = {bool: "true|false", tuple: "a,b,c", list: "a,b,c", dict: "{name: value}"}
    return names.get(typing.get_origin(kind) or kind, getattr(kind, "__name__", str(kind)))


def _docs(cls: type) -> dict[str, str]:
    """The string under each field, base classes included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
            for field, below in itertools.pairwise(body):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                ):
                    found[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value)).replace("\n", " ")
    return found


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _bare(kind: Any) -> Any:
    """float | None -> float"""
    kinds = [part for part in typing.get_args(kind) if part is not type(None)]
    return kinds[0] if len(kinds) == 1 and type(None) in typing.get_args(kind) else kind


def _is_section(kind: Any) -> bool:
    return is_choice_type(kind) or dataclasses.is_dataclass(kind)
