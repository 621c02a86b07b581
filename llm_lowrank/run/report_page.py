"""The page of a report and the page that compares runs, from what results.py has read."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import yaml

from llm_lowrank.models.export import VLLM_RANKS
from llm_lowrank.run.drawing import (
    Content,
    Html,
    card,
    chart,
    layer_map,
    number,
    page,
    place_of,
    series,
    short_kinds,
    table,
    tag,
)
from llm_lowrank.run.results import Results

EVENTS = 40  # rows of the table of exchanges
RATES = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens/s",
}
# what a method may report of every module at an exchange (Exchanged.by_module) -> heading, meaning
FIGURES = {
    "importance": ("Importance", "mean over a module's pairs of the score by which the exchange chose"),
    "replaced_share": ("Churn", "share of a module's first pairs that were replaced so far"),
    "live_pairs": ("Pairs that stay", "pairs of a module that the pruning kept"),
}
EFFECTIVE = (
    "exp of the entropy of the singular values of a module's change s B A (Roy and Vetterli 2007): 1 if one direction "
    "has everything, r if r directions are equally strong"
)


# --- the page about one run -------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """Return the page about a run."""
    name = results.folder.absolute().name
    method = results.settings.get("method.type", "unknown method")
    title = f"{method} on {results.settings.get('model_name_or_path') or results.facts.get('model', 'a model')}"
    return page(
        f"{name}: report",
        tag("h1", title),
        tag("p", f"{name}: ", state(results), class_="soft"),
        [tag("p", note, class_="warn") for note in results.notes],
        tag("div", tiles(results), class_="tiles"),
        _section("Loss and rates", loss_and_rates(results)),
        _section("Pairs", pairs(results)),
        _section("What was learned", learned(results)),
        _section("Held-out examples", held_out(results)),
        _section("Sample answers", samples(results)),
        _section("Memory and speed", memory_and_speed(results)),
        _section("Settings", settings(results)),
        _section("Load and serve", serving(results)),
        _section("Versions", versions_table([results])),
    )


def _section(title: str, *content: Content) -> Html:
    return tag("section", tag("h2", title), content)


def state(results: Results) -> str:
    """How far the run came."""
    done = max((record["step"] for record in results.of("train")), default=0)
    total = results.facts.get("steps")
    if not isinstance(total, int):
        return f"{done:,} steps"
    if results.kept.get("early") and results.of("memory"):
        return str(results.kept["why"])
    if done < total or not results.of("memory"):
        return f"{done:,} of {total:,} steps were made when this page was written; the run has not finished"
    return f"finished, {total:,} steps"


def tiles(results: Results) -> Iterable[Html]:
    """The figures that a reader looks for first."""
    for key, label, show in (("loss", "held-out loss", number), ("exact_match", "exact match, held out", _percent)):
        found = results.evaluations(key)
        if found:
            values = [show(found[0][key]), *([show(found[-1][key])] if len(found) > 1 else [])]
            yield _tile(" \u2192 ".join(values), label)
    if "trainable" in results.facts:
        yield _tile(number(results.facts["trainable"]), "trained parameters")
    if exchanges := results.of("exchange"):
        yield _tile(str(len(exchanges)), "exchanges")
    if results.learned:
        median = statistics.median(module.effective_rank for module in results.learned.values())
        yield _tile(number(median, 3), "median effective rank")
    if speed := _speed(results):
        yield _tile(number(speed, 3), "tokens/s, median")
    if memory := results.of("memory", "measured_gb"):
        yield _tile(f"{memory[-1]['measured_gb']:.2f} GB", "peak memory")


def _tile(value: str, label: str) -> Html:
    return tag("div", tag("b", value), tag("span", label), class_="tile")


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _speed(results: Results) -> float | None:
    found = [record["tokens_per_second"] for record in results.of("train", "tokens_per_second")]
    return statistics.median(found) if found else None


def loss_and_rates(results: Results) -> Content:
    """Charts over the steps; dashed verticals are exchanges."""
    marks = [record["step"] for record in results.of("exchange")]
    train = results.of("train")
    lines = [
        series("training", train, "loss"),
        series("held out", results.of("eval", "loss"), "loss", 1),
    ]
    charts = [chart("Loss per trained token", lines, marks)]
    charts += [chart(label[0].upper() + label[1:], [series(label, train, key)], marks) for key, label in RATES.items()]
    said = "Dashed lines stand at exchanges. " if marks else ""
    skipped = train[-1].get("skipped") if train else None
    if skipped:
        said += f"{skipped} steps made no update, as their gradients were not finite. "
    said += "A point of the training loss is the mean since the point before it."
    shown = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gb")
    rows = [[record["step"], *(record.get(key) for key in shown)] for record in train]
    heads = ["step", "loss", "learning rate", "gradient norm", "tokens/s", "memory, GB"]
    numbers = tag("details", tag("summary", "the numbers"), table(heads, rows)) if rows else None
    return [tag("p", said, class_="soft"), _grid(charts), numbers]


def _grid(figures: Iterable[Html | None]) -> Html:
    return tag("div", [figure for figure in figures if figure is not None], class_="grid")


def pairs(results: Results) -> Content:
    """Exchanges, and what the method reports of its pairs."""
    events = results.of("exchange")
    reported = results.of("method")
    if not events and not reported:
        return tag("p", "The method exchanged no pairs and reports nothing of them.")
    marks = [record["step"] for record in events]
    names = sorted({key for record in reported for key in record} - {"kind", "step"})
    charts = [chart(name.replace("_", " ").capitalize(), [series(name, reported, name)], marks) for name in names]
    rows = [
        [record["step"], record.get("pairs"), record.get("modules"), record.get("into")]
        + [record.get(key) for key in ("drift", "lost", "milliseconds")]
        for record in events[:EVENTS]
    ]
    heads = ["step", "pairs", "modules", "frozen into", "largest drift", "lost", "ms"]
    more = f"{len(events) - EVENTS} more exchanges are in metrics.jsonl." if len(events) > EVENTS else None
    return [
        table(heads, rows) if rows else None,
        tag("p", more) if more else None,
        _grid(chain(module_maps(results, events), charts)),
    ]


def module_maps(results: Results, events: Sequence[dict[str, Any]]) -> Iterable[Html | None]:
    """Heat maps of what the method decided by, at the first exchange, the middle one and the last."""
    modules = results.facts.get("modules") or []
    for name in dict.fromkeys(key for record in events for key in record.get("by_module", {})):
        having = [record for record in events if len(record.get("by_module", {}).get(name, [])) == len(modules)]
        for at in sorted({0, len(having) // 2, len(having) - 1} if having else ()):
            values = dict(zip(modules, having[at]["by_module"][name], strict=True))
            label, meaning = FIGURES.get(name, (name.replace("_", " ").capitalize(), ""))
            step = having[at]["step"]
            yield layer_map(f"{label} at step {step}", values, meaning)


def learned(results: Results) -> Content:
    """The effective ranks of the exported adapter."""
    if not results.learned:
        return tag("p", "There is no adapter to look at.")
    ranks = {module: found.effective_rank for module, found in results.learned.items()}
    norms = {module: found.norm for module, found in results.learned.items()}
    dora = " The lengths of rows that DoRA trains beside it are not in these figures." * bool(
        results.adapter.get("use_dora")
    )
    rows: list[list[Content]] = []
    for kind, modules in by_kind(results).items():
        of = [results.learned[module] for module in modules]
        effective = [found.effective_rank for found in of]
        row: list[Content] = [kind, len(of), statistics.median(effective), min(effective), max(effective)]
        rows.append([*row, statistics.median(f.stable_rank for f in of), statistics.median(f.norm for f in of)])
    heads = ["module", "layers", "effective rank, median", "least", "most", "stable rank, median", "|s B A|, median"]
    held = max(found.pairs for found in results.learned.values())
    return [
        tag("p", f"Effective rank: {EFFECTIVE}. The adapter holds {held} pairs a module.{dora}", class_="soft"),
        _grid([layer_map("Effective rank", ranks), layer_map("Size of the change", norms, "Frobenius norm of s B A")]),
        table(heads, rows),
    ]


def by_kind(results: Results) -> dict[str, list[str]]:
    """The modules of the adapter by their kinds."""
    found: dict[str, list[str]] = {}
    for module in results.learned:
        found.setdefault(place_of(module)[1], []).append(module)
    return {short: found[kind] for kind, short in short_kinds(found).items()}


def held_out(results: Results) -> Content:
    """Every evaluation on the held-out examples."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in results.of("eval"):
        by_step.setdefault(record["step"], {}).update(record)
    if not by_step:
        return tag("p", "The run held no examples out.")
    rows = [
        [step, record.get("loss"), *([_percent(record.get("exact_match")), record.get("mean_score")] * asked)]
        for asked in [any("exact_match" in record for record in by_step.values())]
        for step, record in sorted(by_step.items())
    ]
    heads = ["after step", "loss", "exact match", "mean score"][: len(rows[0])]
    count = results.facts.get("held_out")
    said = tag("p", f"{count} examples that the run did not train on.", class_="soft") if count else None
    why = tag("p", f"{results.kept['why']}.") if results.kept else None
    return [said, why, table(heads, rows)]


def samples(results: Results) -> Content:
    """Answers before and after training."""
    found = results.of("samples", "answers")
    if not found:
        return tag("p", "There are no sample answers: only data with questions that are scored have some.")
    before, after = answers(found[0]), answers(found[-1])
    cards = []
    for question, (text, expected, score) in after.items():
        rows: list[tuple[str, Content]] = [("question", question), ("expected", expected)]
        if len(found) > 1 and question in before:
            rows.append((_when(found[0]), before[question][0]))
        said = "" if score is None else f", score {number(score)}"
        cards.append(card([*rows, (_when(found[-1]) + said, text)]))
    said = "An answer is cut a few tokens behind the length of the longest answer in the data."
    return [tag("p", said, class_="soft"), _grid(cards)]


def _when(record: dict[str, Any]) -> str:
    return f"answer after step {record['step']}" if record["step"] else "answer before training"


def answers(record: dict[str, Any]) -> dict[str, tuple[str, str, float | None]]:
    """Question -> (answer, expected, score) of a record."""
    rows = [row for row in record["answers"] if isinstance(row, list) and len(row) == 4]
    return {str(q): (str(a), str(e), s if isinstance(s, int | float) else None) for q, a, e, s in rows}


def memory_and_speed(results: Results) -> Content:
    """What was predicted and what was measured."""
    rows: list[list[Content]] = []
    if memory := results.of("memory", "predicted_gb", "measured_gb"):
        last = memory[-1]
        rows.append(["memory of a rank, GB", last["predicted_gb"], last["measured_gb"]])
    train = results.of("train")
    facts = results.facts
    for key, label in (
        ("seconds_per_step", "seconds a step, median"),
        ("tokens_per_second", "tokens/s, all ranks, median"),
        ("tflops_per_device", "model TFLOP/s of a device, median"),
        ("mfu", "MFU, median"),
    ):
        found = [record[key] for record in train if isinstance(record.get(key), int | float)]
        if found:
            least_and_most = (facts.get("predicted") or {}).get(key)
            expected = " to ".join(number(value, 3) for value in least_and_most) if least_and_most else None
            rows.append([label, expected, statistics.median(found)])
    load = results.of("load", "seconds")
    if load:
        rows.append(["seconds to load the model", None, load[-1]["seconds"]])
    if not rows:
        return tag("p", "Nothing was measured yet.")
    where = " on ".join(str(facts[key]) for key in ("engine", "device") if key in facts)
    said = f"{where}. " if where else ""
    said += "The predicted memory leaves out activations and logits; a measured one counts all that the process held."
    predicted = facts.get("predicted") or {}
    if predicted:
        said += f" The predicted speed is from the data sheet of {predicted.get('gpu')}, for full rows."
    return [tag("p", said, class_="soft"), table(["", "predicted", "measured"], rows)]


def settings(results: Results) -> Content:
    """The settings that differ from the defaults."""
    if not results.settings:
        return tag("p", "There is no recipe.yaml.")
    rows = [[name, _said(value), _said(results.defaults.get(name))] for name, value in results.changed.items()]
    everything = tag(
        "details",
        tag("summary", f"all {len(results.settings)} settings"),
        table(["setting", "value"], [[name, _said(value)] for name, value in results.settings.items()]),
    )
    said = "Settings that differ from the defaults of the recipe, of this method and of this kind of data. "
    same = None if rows else tag("p", "No setting differs from its default.")
    return [
        tag("p", said, class_="soft"),
        table(["setting", "value", "default"], rows) if rows else same,
        everything,
    ]


def _said(value: Any) -> Html:
    """A setting as a recipe would say it."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return tag("code", text.removesuffix("\n..."))


def serving(results: Results) -> Content:
    """How the result is loaded and served."""
    if not results.adapter:
        return tag("p", "There is nothing to load yet.")
    folder, base = results.folder, str(results.adapter.get("base_model_name_or_path"))
    rank = results.adapter.get("r")
    option = next((most for most in VLLM_RANKS if isinstance(rank, int) and most >= rank), None)
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({str(folder / 'adapter')!r})",
        f"base = AutoModelForCausalLM.from_pretrained({base!r})",
        f"model = PeftModel.from_pretrained(base, {str(folder / 'adapter')!r})",
    ]
    content: list[Content] = [tag("p", f"The adapter, a PEFT LoRA of rank {rank}:"), tag("pre", "\n".join(lines))]
    if results.adapter.get("use_dora"):
        content.append(tag("p", "vLLM does not serve DoRA adapters: serve the merged model."))
    elif option is None:
        content.append(tag("p", f"vLLM serves no rank above {VLLM_RANKS[-1]}: serve the merged model."))
    else:
        at = shlex.quote(f"{folder.absolute().name}={folder / 'adapter'}")
        command = f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {option} --lora-modules {at}"
        content.append(tag("pre", f"{command} --generation-config {shlex.quote(str(folder / 'adapter'))}"))
    merged = shlex.quote(str(folder / "merged"))
    if results.has_merged:
        content += [tag("p", "The merged model, a whole checkpoint:"), tag("pre", f"vllm serve {merged}")]
    else:
        command = f"llm-lowrank merge --checkpoint {shlex.quote(str(folder))} --output {merged}"
        content += [tag("p", "There is no merged model yet. This command writes it:"), tag("pre", command)]
    return content


def versions_table(runs: Sequence[Results]) -> Content:
    """The packages that the runs were trained with, as they recorded them."""
    found = [run.facts.get("versions") or {} for run in runs]
    names = dict.fromkeys(name for versions in found for name in versions)
    if not names:
        return tag("p", "The run recorded no versions.")
    heads = _names(runs) if len(runs) > 1 else ["version"]
    return table(["package", *heads], [[name, *(versions.get(name) for versions in found)] for name in names])


# --- the page about several runs --------------------------------------------------------------------------------------


def comparison(runs: Sequence[Results]) -> str:
    """Return the page about several runs."""
    names = _names(runs)
    return page(
        f"{len(runs)} runs",
        tag("h1", f"{len(runs)} runs side by side"),
        [
            tag("p", f"{name}: {note}", class_="warn")
            for name, run in zip(names, runs, strict=True)
            for note in run.notes
        ],
        _section("Figures", figures(runs)),
        _section("Loss and rates", curves(runs)),
        _section("What was learned", ranks_of_kinds(runs)),
        _section("Sample answers", common_samples(runs)),
        _section("Settings", differing(runs)),
        _section("Versions", versions_table(runs)),
    )


def _names(runs: Sequence[Results]) -> list[str]:
    """The names of the folders, with as much of their paths as tells them apart."""
    parts = [run.folder.absolute().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part[-2:])} ({n})" for n, part in enumerate(parts, 1)]


def figures(runs: Sequence[Results]) -> Content:
    """A row for each run."""
    heads = ["run", "method", "steps", "trained parameters", "held-out loss before", "after", "exact match before"]
    heads += ["after", "effective rank, median", "tokens/s, median", "peak memory, GB"]
    rows: list[list[Content]] = []
    for name, run in zip(_names(runs), runs, strict=True):
        loss, exact = (run.evaluations(key) for key in ("loss", "exact_match"))
        memory = run.of("memory", "measured_gb")
        ranks = [module.effective_rank for module in run.learned.values()]
        rows.append(
            [
                name,
                str(run.settings.get("method.type", "-")),
                max((record["step"] for record in run.of("train")), default=0),
                run.facts.get("trainable"),
                *([loss[0]["loss"], loss[-1]["loss"]] if loss else [None, None]),
                *([_percent(exact[at]["exact_match"]) for at in (0, -1)] if exact else [None, None]),
                statistics.median(ranks) if ranks else None,
                _speed(run),
                memory[-1]["measured_gb"] if memory else None,
            ]
        )
    return table(heads, rows)


def curves(runs: Sequence[Results]) -> Content:
    """The charts of all runs over one another."""
    names = _names(runs)

    def together(title: str, kind: str, key: str) -> Html | None:
        pairs = enumerate(zip(names, runs, strict=True))
        return chart(title, [series(name, run.of(kind), key, color) for color, (name, run) in pairs])

    charts = [together("Training loss per trained token", "train", "loss"), together("Held-out loss", "eval", "loss")]
    charts += [together("Exact match, held out", "eval", "exact_match")]
    charts += [together(label[0].upper() + label[1:], "train", key) for key, label in RATES.items()]
    steps = [
        f"{name} after step {', '.join(str(record['step']) for record in run.of('exchange')[:EVENTS])}"
        for name, run in zip(names, runs, strict=True)
        if run.of("exchange")
    ]
    return [tag("p", f"Exchanges: {'; '.join(steps)}.", class_="soft") if steps else None, _grid(charts)]


def ranks_of_kinds(runs: Sequence[Results]) -> Content:
    """The median effective rank of every kind of module, a column for each run."""
    kinds = [by_kind(run) for run in runs]
    names = dict.fromkeys(kind for found in kinds for kind in found)
    if not names:
        return tag("p", "There is no adapter to look at.")

    def median(run: Results, modules: Sequence[str]) -> float | None:
        return statistics.median(run.learned[m].effective_rank for m in modules) if modules else None

    rows = [[kind, *(median(run, of.get(kind, [])) for run, of in zip(runs, kinds, strict=True))] for kind in names]
    said = f"Median over the layers of the effective rank: {EFFECTIVE}."
    effective = [{module: found.effective_rank for module, found in run.learned.items()} for run in runs]
    found = [rank for ranks in effective for rank in ranks.values()]
    limits = (min(found), max(found))  # the same colours in all maps
    maps = [layer_map(name, ranks, limits=limits) for name, ranks in zip(_names(runs), effective, strict=True)]
    return [tag("p", said, class_="soft"), table(["module", *_names(runs)], rows), _grid(maps)]


def common_samples(runs: Sequence[Results]) -> Content:
    """The last answers of all runs to the questions that all were asked."""
    found = [answers(run.of("samples", "answers")[-1]) if run.of("samples", "answers") else {} for run in runs]
    common = [question for question in found[0] if all(question in answered for answered in found)]
    if not common:
        return tag("p", "No question was put to all of these runs.")
    names = _names(runs)
    cards = []
    for question in common:
        said = [(name, answered[question][0]) for name, answered in zip(names, found, strict=True)]
        cards.append(card([("question", question), ("expected", found[0][question][1]), *said]))
    return _grid(cards)


def differing(runs: Sequence[Results]) -> Content:
    """The settings in which the runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [
        [name, *(_said(run.settings[name]) if name in run.settings else "-" for run in runs)]
        for name in names
        if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)
    ]
    if not rows:
        return tag("p", "The runs have the same settings.")
    return table(["setting", *_names(runs)], rows)
