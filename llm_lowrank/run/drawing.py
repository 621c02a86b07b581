"""HTML and SVG from Python values: elements, tables, charts over steps, maps of layers. No script, no network.

Every text that is put into an element is escaped, unless it is `Html`, which only `tag` and `join` make.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

COLORS = 8  # of series; the ninth has the first one's colour, dashed
POINTS = 400  # of a line; of a longer series each stretch keeps its smallest and its largest value
DOTS = 40  # a series of at most so many points shows them
NUMERIC = re.compile(r"-?[\d.,]+ ?%?|-")
SPREAD = 100  # a map whose largest value is so many times the smallest has a logarithmic scale
WIDTH, HEIGHT = 400, 220  # of a chart, in its own units: pixels on a telephone
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 34

# colours of series were chosen to be told apart with the common kinds of colour blindness, on both grounds
STYLE = """
:root { color-scheme: light dark; --ground: #fcfcfb; --card: #ffffff; --ink: #1c1c1a; --soft: #62615c; --rule: #dddcd6;
  --grid: #ecebe6; --heat: #1f5fae; --mark: #8b8a84; --warn: #8a5a00; --s0: #2a78d6; --s1: #d9541e; --s2: #12875f;
  --s3: #8a3fb0; --s4: #b07d00; --s5: #c8386f; --s6: #4a5a70; --s7: #0d8a99; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #171716; --card: #1f1f1e; --ink: #ecebe6; --soft: #a5a49d; --rule: #3a3a37; --grid: #2c2c2a;
    --heat: #7db4f5; --mark: #85847d; --warn: #e5b04a; --s0: #5b9df0; --s1: #f08050; --s2: #3bbf8c; --s3: #c58ae6;
    --s4: #dcae3c; --s5: #f07ca6; --s6: #a3b3c9; --s7: #45c1d0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 20px 16px 60px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; }
p { margin: 6px 0 12px; max-width: 78ch; overflow-wrap: anywhere; }
.soft, figcaption { color: var(--soft); } .warn { color: var(--warn); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; } .tile { flex: 1 1 auto; max-width: 200px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 350px), 1fr)); gap: 16px;
  margin: 12px 0; }
.tile, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px 12px; margin: 0; }
.tile b { display: block; font-size: 18px; line-height: 1.3; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.tile span { color: var(--soft); font-size: 13px; display: block; max-width: 18ch; }
figure { min-width: 0; } figure.wide { grid-column: 1 / -1; }
figcaption { font-size: 13px; margin-top: 6px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .dashed { stroke-dasharray: 5 3; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin: 0 0 4px; }
.legend i { display: inline-block; width: 16px; height: 0; border-top: 3px solid; margin: 0 6px 4px 0; }
.legend i.dashed { border-top-style: dashed; }
.scroll { overflow-x: auto; margin: 8px 0 14px; }
table { border-collapse: collapse; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td { overflow-wrap: break-word; min-width: 64px; } td.n { white-space: nowrap; }
dl { margin: 0; font-size: 13px; } dt { color: var(--soft); margin-top: 6px; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 12px;
  overflow-x: auto; }
summary { cursor: pointer; color: var(--soft); margin: 8px 0; }
@media print { figure, .tile, tr { break-inside: avoid; } }
"""


class Html(str):
    """Markup that is ready: nothing in it is escaped again."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]


def join(*parts: Content) -> Html:
    """Return contents one behind the other. Text is escaped, and what no HTML may hold becomes a question mark."""
    made = []
    for part in parts:
        if isinstance(part, Html):
            made.append(str(part))
        elif part is None:
            continue
        elif isinstance(part, str | int | float):
            made.append(html.escape(_printable(str(part))))
        else:
            made.append(str(join(*part)))
    return Html("".join(made))


def _printable(text: str) -> str:
    """The text without halves of surrogate pairs and without control characters."""
    text = text.encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text)


def tag(name: str, *content: Content, **attributes: str | float | None) -> Html:
    """Return an element. An attribute of None is left out; `_` ends a name that Python keeps, and stands for a dash."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    said = "".join(f' {key}="{join(value)}"' for key, value in pairs)
    return Html(f"<{name}{said}>{join(*content)}</{name}>")


def page(title: str, *content: Content) -> str:
    """Return a whole page. Its policy lets a browser load nothing and run nothing, whatever the content is."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', content), lang='en')}\n"


def table(heads: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Html:
    """Return a table that scrolls on its own. Columns of numbers stand on the right."""
    body = list(rows)
    right = [bool(body) and all(_is_number(row[at]) for row in body) for at in range(len(heads))]
    kinds = ["n" if at_right else None for at_right in right]
    head = tag("tr", [tag("th", name, class_=kind) for name, kind in zip(heads, kinds, strict=True)])
    lines = [
        tag("tr", [tag("td", _cell(value), class_=kind) for value, kind in zip(row, kinds, strict=True)])
        for row in body
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", lines)), class_="scroll")


def card(rows: Iterable[tuple[str, Content]]) -> Html:
    """Return texts with their names above them."""
    return tag("figure", tag("dl", [(tag("dt", name), tag("dd", text)) for name, text in rows]))


def _is_number(value: Content) -> bool:
    return (
        value is None or isinstance(value, int | float) or (isinstance(value, str) and bool(NUMERIC.fullmatch(value)))
    )


def _cell(value: Content) -> Content:
    if value is None:
        return "-"
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def number(value: float | None, digits: int = 4) -> str:
    """Return a number as a reader wants it: 12,345, 0.1235, 5e-05; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


# --- charts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Values over steps."""

    name: str
    points: list[tuple[int, float]]
    color: int = 0

    @property
    def stroke(self) -> str:
        return f"stroke: var(--s{self.color % COLORS})"

    @property
    def dashed(self) -> str:
        return " dashed" if self.color >= COLORS else ""


def series(name: str, records: Iterable[Mapping[str, object]], key: str, color: int = 0) -> Series:
    """Return the finite numbers that records have under a key, over their steps."""
    found = [(r["step"], r.get(key)) for r in records]
    return Series(
        name,
        [(s, float(v)) for s, v in found if isinstance(s, int) and isinstance(v, int | float) and math.isfinite(v)],
        color,
    )


def chart(title: str, lines: Sequence[Series], marks: Sequence[int] = (), caption: str = "") -> Html | None:
    """Return a chart over the steps, with dashed verticals at `marks`, or None if there is no value."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.points] + list(marks)
    values = [value for line in lines for _, value in line.points]
    first, last = min(steps), max(max(steps), min(steps) + 1)
    ticks = nice_ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn: list[Html] = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        drawn.append(_rule(LEFT, y(tick), WIDTH - RIGHT, y(tick), "stroke: var(--grid)"))
        drawn.append(tag("text", label, x=LEFT - 6, y=y(tick) + 4, text_anchor="end"))
    for tick in nice_ticks(first, last, whole=True):
        if first <= tick <= last:
            drawn.append(tag("text", number(tick), x=x(tick), y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    drawn.append(tag("text", "step", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
    for step in marks:
        mark = _rule(x(step), TOP, x(step), HEIGHT - BOTTOM, "stroke: var(--mark); stroke-dasharray: 3 3")
        drawn.append(tag("g", tag("title", f"exchange after step {step}"), mark))
    for line in lines:
        drawn += _draw(line, x, y)
    said = "; ".join(f"{line.name}: {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in lines)
    svg = tag("svg", drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=f"{title}. {said}")
    keys = [
        tag(
            "span", tag("i", style=line.stroke.replace("stroke", "border-color"), class_=line.dashed or None), line.name
        )
        for line in lines
    ]
    legend = tag("div", keys, class_="legend") if len(lines) > 1 else None
    return tag("figure", tag("h3", title), legend, svg, tag("figcaption", caption) if caption else None)


def _draw(line: Series, x, y) -> list[Html]:  # type: ignore[no-untyped-def]
    """Draw a line; a short one shows its points, with their values where the pointer rests."""
    points = thin(line.points)
    path = " ".join(f"{x(step)},{y(value)}" for step, value in points)
    drawn = [tag("polyline", points=path, class_=f"line{line.dashed}", style=line.stroke)]
    if len(points) <= DOTS:
        fill = line.stroke.replace("stroke", "fill")
        for step, value in points:
            label = tag("title", f"{line.name}, step {step}: {number(value, 6)}")
            drawn.append(tag("circle", label, cx=x(step), cy=y(value), r=2.6, style=fill))
    return drawn


def _rule(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, style=style)


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most about POINTS points: the smallest and the largest of each stretch, so that no peak is lost."""
    if len(points) <= POINTS:
        return list(points)
    width = math.ceil(2 * len(points) / POINTS)
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), width):
        stretch = range(start, min(start + width, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def nice_ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Return about `count` round numbers from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    raw = span / (count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as short texts, no two of which are the same."""
    for digits in range(3, 16):
        labels = [f"{tick:,.0f}" if 1000 <= abs(tick) < 10**6 else f"{tick:.{digits}g}" for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return [label.replace("e-0", "e-").replace("e+0", "e+") for label in labels]


# --- maps of layers ---------------------------------------------------------------------------------------------------


def place_of(module: str) -> tuple[int | None, str]:
    """Return the layer of a module, the first number in its name, and the name of its kind, what follows the number."""
    found = re.match(r"(?:.*?\.)??(\d+)\.(.+)$", module)
    return (int(found[1]), found[2]) if found else (None, module)


def short_kinds(kinds: Iterable[str]) -> dict[str, str]:
    """The last part of each kind, or all of it where two kinds end alike."""
    known = list(dict.fromkeys(kinds))
    ends = [kind.rpartition(".")[2] for kind in known]
    return {kind: end if ends.count(end) == 1 else kind for kind, end in zip(known, ends, strict=True)}


def layer_map(
    title: str, values: Mapping[str, float], caption: str = "", limits: tuple[float, float] | None = None
) -> Html | None:
    """Return a heat map with a column for every layer and a row for every kind of module, or None without layers.

    values: by module. A module outside of the layers is named below the map. Positive values that lie far apart are
    coloured by their logarithms, and the caption says so. limits: the values of the palest and of the darkest colour,
    by default the smallest and the largest.
    """
    places = {module: place_of(module) for module in values}
    cells = {module: (layer, kind) for module, (layer, kind) in places.items() if layer is not None}
    if not cells:
        return None
    kinds = short_kinds(kind for _, kind in cells.values())
    layers = max(layer for layer, _ in cells.values()) + 1
    left = 8 + 6.2 * max(map(len, kinds.values()))
    width, height = (WIDTH - left) / layers, 20
    found = [values[module] for module in cells if math.isfinite(values[module])]
    low, high = limits or ((min(found), max(found)) if found else (0.0, 0.0))
    shade = math.log if low > 0 and high / low > SPREAD else float
    drawn = [
        tag("text", short, x=left - 6, y=row * height + 14, text_anchor="end")
        for row, short in enumerate(kinds.values())
    ]
    rows = {kind: row for row, kind in enumerate(kinds)}
    for module, (layer, kind) in cells.items():
        value, share = values[module], 0.5
        if high > low and math.isfinite(value):
            share = (shade(value) - shade(low)) / (shade(high) - shade(low))
        x, y = round(left + layer * width, 2), rows[kind] * height
        box = _box(x, y, max(width - 1, width * 0.85), height - 1, share if math.isfinite(value) else None)
        drawn.append(tag("g", tag("title", f"{module}: {number(value)}"), box))
    bottom = len(kinds) * height
    for tick in nice_ticks(0, layers - 1, whole=True):
        if tick < layers:
            middle = left + (tick + 0.5) * width
            drawn.append(tag("text", number(tick), x=round(middle, 1), y=bottom + 13, text_anchor="middle"))
    drawn.append(tag("text", "layer", x=0, y=bottom + 13))
    drawn += _scale(low, high, bottom + 24)
    said = f"{title}: from {number(low)} to {number(high)} over {len(cells)} modules"
    svg = tag("svg", drawn, viewBox=f"0 0 {WIDTH} {bottom + 44}", role="img", aria_label=said)
    outside = [f"{module}: {number(values[module])}" for module, (layer, _) in places.items() if layer is None]
    scale = "logarithmic colours" if shade is math.log else ""
    caption = "; ".join(filter(None, [caption, scale, *outside]))
    return tag("figure", tag("h3", title), svg, tag("figcaption", caption) if caption else None)


def _scale(low: float, high: float, y: float) -> list[Html]:
    """Draw the colours of a map from the lowest to the highest value."""
    if high <= low:
        return [tag("text", f"all {number(low)}", x=WIDTH, y=y + 12, text_anchor="end")]
    steps, width = 24, 4.0
    start = WIDTH - steps * width - 60
    drawn = [_box(start + i * width, y + 3, width, 10, i / (steps - 1)) for i in range(steps)]
    drawn.append(tag("text", number(low, 3), x=start - 6, y=y + 12, text_anchor="end"))
    drawn.append(tag("text", number(high, 3), x=WIDTH - 54, y=y + 12))
    return drawn


def _box(x: float, y: float, width: float, height: float, share: float | None) -> Html:
    """Draw a rectangle, the darker the larger the share, from 0 to 1; an empty one for None."""
    style = "fill: none" if share is None else f"fill: var(--heat); fill-opacity: {0.06 + 0.94 * share:.3f}"
    return tag("rect", x=x, y=y, width=round(width, 2), height=height, style=style)
