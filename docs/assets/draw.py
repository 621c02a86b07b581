"""Draw the three figures of docs/concepts.md: python docs/assets/draw.py writes the SVG files beside this one."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
INK, SOFT, FROZEN, TRAINED, BANK, PAPER = "#1f2933", "#5f6c7b", "#dfe4ea", "#f6a04d", "#7fb2e5", "#ffffff"
RANKS = ("#cfe3f7", "#fbd9b5", "#d5ecd2")
FONT = "font-family='Helvetica, Arial, sans-serif'"


class Drawing:
    """An SVG on a white page, so that it reads the same in a light and in a dark theme."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size = width, height
        self.parts = [
            f"<title>{escape(title)}</title>",
            "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' "
            f"orient='auto-start-reverse'><path d='M0 0 L10 5 L0 10 z' fill='{INK}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' rx='8' fill='{PAPER}'/>",
        ]

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        fill: str = FROZEN,
        text: str = "",
        *,
        size: int = 14,
        line: str = INK,
    ) -> None:
        self.parts.append(f"<rect x='{x}' y='{y}' width='{w}' height='{h}' fill='{fill}' stroke='{line}'/>")
        if text:
            self.text(x + w / 2, y + h / 2 + size * 0.35, text, size=size, anchor="middle")

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        anchor: str = "start",
        fill: str = INK,
        bold: bool = False,
    ) -> None:
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x}' y='{y}' font-size='{size}' text-anchor='{anchor}' fill='{fill}'{weight} {FONT}>"
            f"{escape(text)}</text>"
        )

    def lines(self, x: float, y: float, *texts: str, size: int = 13, anchor: str = "start", fill: str = SOFT) -> None:
        for number, text in enumerate(texts):
            self.text(x, y + number * size * 1.4, text, size=size, anchor=anchor, fill=fill)

    def path(self, d: str, *, arrow: bool = False, width: float = 1.5, line: str = INK) -> None:
        tip = " marker-end='url(#tip)'" if arrow else ""
        self.parts.append(f"<path d='{d}' fill='none' stroke='{line}' stroke-width='{width}'{tip}/>")

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.path(f"M{x1} {y1} L{x2} {y2}", arrow=True)

    def save(self, name: str) -> None:
        width, height = self.size
        namespace = "http://www.w3.org/2000/svg"
        head = f"<svg xmlns='{namespace}' viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img'>"
        (HERE / name).write_text("\n".join([head, *self.parts, "</svg>"]) + "\n", encoding="utf-8")


def layer() -> None:
    """W, the pairs and the bank of one layer."""
    d = Drawing(
        760, 430, "One adapted layer: W, the trained pairs and the bank work on x side by side; their outputs are added"
    )
    rows = {"w": 85, "pairs": 215, "bank": 345}
    d.text(38, rows["pairs"] + 5, "x", size=20, anchor="middle", bold=True)
    for y in rows.values():  # from x to each of the three
        d.path(f"M52 {rows['pairs']} L80 {rows['pairs']} L80 {y} L110 {y}", arrow=True)
    d.box(115, 30, 110, 110, FROZEN, "W")
    d.lines(345, 70, "m × n, frozen, sharded over the ranks,", "stored by a codec: dense, int8 or nf4")
    d.text(345, 117, "W x", size=16)
    for name, fill, a, b, count in (("pairs", TRAINED, "A", "B", 4), ("bank", BANK, "A'", "B'", 6)):
        y, thick = rows[name], 9 * count
        d.box(115, y - thick / 2, 110, thick, fill)
        d.arrow(227, y, 255, y)
        d.box(260, y - 55, thick, 110, fill)
        for k in range(1, count):
            d.path(f"M115 {y - thick / 2 + 9 * k} h110", width=0.6)
            d.path(f"M{260 + 9 * k} {y - 55} v110", width=0.6)
        d.text(170, y - thick / 2 - 8, a, anchor="middle")
        d.text(260 + thick + 8, y - 40, b)
    y = rows["pairs"]  # one pair stands out
    d.box(115, y - 9, 110, 9, "#c2410c")
    d.box(269, y - 55, 9, 110, "#c2410c")
    d.lines(345, y - 24, "r pairs, trained, float32", "one pair: a row of A and", "a column of B (dark)")
    d.text(345, y + 42, "s B A x", size=16)
    y = rows["bank"]
    d.lines(345, y - 20, "the bank: k frozen pairs,", "float32, never rounded")
    d.text(345, y + 27, "s B' A' x", size=16)
    for name, x in (("w", 580), ("pairs", 520), ("bank", 520)):
        d.path(f"M{x} {rows[name]} L600 {rows[name]} L600 {rows['pairs']} L648 {rows['pairs']}", arrow=True)
    d.parts.append(f"<circle cx='662' cy='{rows['pairs']}' r='13' fill='{PAPER}' stroke='{INK}' stroke-width='1.5'/>")
    d.text(662, rows["pairs"] + 6, "+", size=18, anchor="middle")
    d.arrow(676, rows["pairs"], 706, rows["pairs"])
    d.text(724, rows["pairs"] + 5, "y", size=20, anchor="middle", bold=True)
    d.save("layer.svg")


def cells(d: Drawing, x: float, y: float, labels: str, fills: dict[str, str], edge: str) -> None:
    """A row of numbered pairs."""
    for place, label in enumerate(labels.split()):
        d.box(x + 34 * place, y, 34, 34, fills.get(label, PAPER), label, line=edge)


def exchange() -> None:
    """Both destinations of an exchange, before and after."""
    d = Drawing(760, 560, "An exchange of two pairs, into the weight and into the bank, before and after")
    fills = {"2": "#f6a04d", "4": "#f6a04d", "5": "#7fb2e5", "6": "#7fb2e5"}
    for top, name, note in (
        (
            0,
            "into the weight",
            "The pairs 2 and 4 are added to W. The fresh pairs 5 and 6, which wait on rank 0, are subtracted.",
        ),
        (285, "into the bank", "The pairs 2 and 4 change places with the pairs 5 and 6 of the bank. W is not touched."),
    ):
        d.text(24, top + 34, name, size=17, bold=True)
        d.lines(24, top + 56, note)
        for left, when in ((24, "before"), (420, "after")):
            d.text(left, top + 92, when, fill=SOFT)
        d.arrow(352, top + 165, 402, top + 165)
        for left in (24, 420):
            d.box(left, top + 104, 116, 116, FROZEN)
            d.text(left + 134, top + 118, "trained", size=13, fill=SOFT)
    for left, trained in ((24, "1 2 3 4"), (420, "1 5 3 6")):
        for top in (0, 285):
            cells(d, left + 134, top + 126, trained, fills, INK)
    d.text(82, 166, "W", size=18, anchor="middle")
    d.lines(478, 146, "W", "+ 2 + 4", "− 5 − 6", size=17, anchor="middle", fill=INK)
    d.text(158, 184, "waiting on rank 0", size=13, fill=SOFT)
    cells(d, 158, 192, "5 6", fills, SOFT)
    d.text(554, 184, "the ledger records", size=13, fill=SOFT)
    d.text(554, 212, "+ 2 + 4 − 5 − 6", size=15)
    for left, bank in ((24, "5 6 7 8"), (420, "2 4 7 8")):
        d.text(left + 58, 451, "W", size=18, anchor="middle")
        d.text(left + 134, 469, "bank", size=13, fill=SOFT)
        cells(d, left + 134, 477, bank, fills, INK)
    for bottom, function in ((252, "W x + s B A x"), (537, "W x + s B A x + s B' A' x")):
        d.text(380, bottom, f"{function} is the same before and after", size=15, anchor="middle")
    d.path("M24 268 H736", width=0.8, line=SOFT)
    d.save("exchange.svg")


def grid(d: Drawing, x: float, y: float, owner: list[int], columns: int, cell: int) -> None:
    """The elements of W in the colours of the ranks that hold them."""
    for number, rank in enumerate(owner):
        d.box(x + number % columns * cell, y + number // columns * cell, cell, cell, RANKS[rank], line="#9aa5b1")


def rows() -> None:
    """Which elements of W a rank holds, and what it needs to update them."""
    d = Drawing(
        760, 470, "What three ranks hold of an 8 x 10 weight, and what rank 1 needs to add an update to its share"
    )
    m, n, cell = 8, 10, 22
    d.text(24, 34, "What a rank holds of W (8 rows, 10 columns, 3 ranks)", size=17, bold=True)
    d.text(24, 62, "FSDP2: whole rows", fill=SOFT)
    grid(d, 24, 74, [row // 3 for row in range(m) for _ in range(n)], n, cell)
    d.text(300, 62, "ZeRO-3: spans of the flattened W", fill=SOFT)
    grid(d, 300, 74, [number // 27 for number in range(m * n)], n, cell)
    for rank, colour in enumerate(RANKS):
        d.box(560, 84 + 34 * rank, 22, 22, colour, line="#9aa5b1")
        d.text(592, 100 + 34 * rank, f"rank {rank}")
    d.lines(560, 205, "A span may begin and end", "inside of a row.")

    d.text(24, 300, "How rank 1 adds an update to its share, under FSDP2", size=17, bold=True)
    top, x = 322, 24
    grid(d, x, top, [row // 3 for row in range(m) for _ in range(4)], 4, 13)
    d.box(x, top + 39, 52, 39, "none", line="#c2410c")
    d.text(x + 26, top + 124, "L  (m × 2k)", size=13, anchor="middle", fill=SOFT)
    d.text(x + 72, top + 62, "·", size=20, anchor="middle")
    d.box(x + 90, top + 36, 130, 46, FROZEN, "")
    d.text(x + 155, top + 64, "R", anchor="middle")
    d.text(x + 155, top + 124, "R  (2k × n), whole", size=13, anchor="middle", fill=SOFT)
    d.text(x + 243, top + 64, "=", size=18, anchor="middle")
    d.box(x + 266, top + 39, 130, 39, RANKS[1], "rows 3 to 5", size=13)
    d.text(x + 331, top + 124, "what rank 1 adds to its rows", size=13, anchor="middle", fill=SOFT)
    d.lines(
        454,
        top + 20,
        "An update of W is a product of two thin",
        "matrices, L R. The rows that a rank holds",
        "need the same rows of L and all of R.",
        "So L and R travel: 2k (m + n) numbers for",
        "k pairs. W, m n numbers, stays where it is.",
    )
    d.save("rows.svg")


if __name__ == "__main__":
    layer()
    exchange()
    rows()
