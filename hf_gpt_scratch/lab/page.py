"""One self-contained HTML page for each lab: the verdict first, then the proof, then figures.

No scripts, fonts, links or image files; light and dark; readable on a phone. The style holds within its own element, so
that a report can also stand in a notebook.

    page("my_gpt.py against gpt2", Verdict("bad", "Mistake found: no-mask", "…"), [Section("Logits", facts([…]))])
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

# The ends of a logarithmic scale: infinite values and NaN, and zero.
WORST, LEAST = 10.0, 1e-17

STYLE = Markup(Path(__file__).with_name("page.css").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Verdict:
    """The first thing on the page. `state` is "good", "bad" or, where it is neither, "odd"; `more` stands below."""

    state: str
    headline: str
    text: str
    more: Markup = field(default_factory=Markup)


@dataclass(frozen=True)
class Section:
    title: str
    body: Markup
    note: str = ""


def page(title: str, verdict: Verdict, sections: Sequence[Section]) -> str:
    """A whole HTML document; `title` says what was examined."""
    head = Markup(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>{}</title>\n<style>body {{ margin: 0 }} '
        "@media (prefers-color-scheme: dark) {{ body {{ background: #13161b }} }}</style>\n</head>\n<body>\n{}\n"
        "</body>\n</html>\n"
    )
    return str(head.format(title, fragment(title, verdict, sections)))


def fragment(title: str, verdict: Verdict, sections: Sequence[Section]) -> Markup:
    """The same as one element, for a notebook."""
    first = Markup('<section class="verdict {}">\n<strong>{}</strong>\n<p>{}</p>\n{}\n</section>').format(
        verdict.state, verdict.headline, verdict.text, verdict.more
    )
    others = [
        Markup("<section>\n<h2>{}</h2>\n{}\n{}</section>").format(
            section.title,
            section.body,
            Markup('<p class="faint">{}</p>\n').format(section.note) if section.note else "",
        )
        for section in sections
    ]
    return Markup('<div class="lab"><style>{}</style>\n<div class="wide">\n<h1>{}</h1>\n{}\n</div></div>').format(
        STYLE, title, lines([first, *others])
    )


def lines(parts: Sequence[Any]) -> Markup:
    return Markup("\n").join(parts)


# What sections are made of


def finding(says: str, facts: Sequence[tuple[str, str]], proof: str = "") -> Markup:
    """One finding: what it says, facts such as ("where", "…") and ("fix", "…"), and its proof."""
    told = [Markup('<p><span class="faint">{}</span> {}</p>').format(name, value) for name, value in facts if value]
    if proof:
        told.append(Markup('<p class="proof">{}</p>').format(proof))
    return Markup('<div class="finding">\n<h3>{}</h3>\n{}\n</div>').format(says, lines(told))


def facts(named: Sequence[tuple[str, str]]) -> Markup:
    """Figures by name."""
    return Markup("<dl>{}</dl>").format(
        Markup("").join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in named)
    )


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = (), marked: Sequence[str] = ()
) -> Markup:
    """A table that scrolls by itself where it is too wide.

    Args:
        numbers: the columns of figures.
        marked: for each row its class: "differs", "unsure" or "".
    """
    side = [Markup(' class="number"') if i in numbers else "" for i in range(len(headings))]
    head = Markup("").join(
        Markup("<th{}>{}</th>").format(c, heading) for c, heading in zip(side, headings, strict=True)
    )
    body = [
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="{}"').format(kind) if kind else "",
            Markup("").join(Markup("<td{}>{}</td>").format(c, cell) for c, cell in zip(side, row, strict=True)),
        )
        for row, kind in zip(rows, marked or [""] * len(rows), strict=True)
    ]
    whole = '<div class="scroll"><table>\n<tr>{}</tr>\n{}\n</table></div>'
    return Markup(whole).format(head, lines(body))


def code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def bar(share: float) -> Markup:
    """A bar for a number between 0 and 1."""
    width = 80 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return Markup('<span class="bar" style="width:{}px"></span>').format(f"{width:.1f}")


def hidden(summary: str, body: Markup) -> Markup:
    """What is shown on a click."""
    return Markup("<details><summary>{}</summary>\n{}\n</details>").format(summary, body)


def logarithmic(value: float) -> float:
    """The value within the scale's ends; NaN is at the worse one."""
    return min(max(value, LEAST), WORST) if not math.isnan(value) else WORST


@dataclass(frozen=True)
class Line:
    """One line of a chart; `kind` is "first", "other" or "good"."""

    name: str
    values: Sequence[float]
    kind: str = "first"


def chart(
    series: Sequence[Line],
    *,
    bound: float | None = None,
    bound_name: str = "",
    at: int | None = None,
    at_name: str = "",
    bands: Sequence[tuple[int, int, str]] = (),
    log: bool = True,
) -> Markup:
    """Lines over a count, as SVG; values that are not finite stand at the scale's end.

    Args:
        bound: a horizontal line, and `at` a vertical one, with their names.
        bands: from where to where, and the name below; every other one is shaded.
        log: a logarithmic scale, from `LEAST` to `WORST`.
    """
    left, right, top, bottom, width, height = 58, 12, 26, 24, 900, 300
    count = max((len(line.values) for line in series), default=1)
    finite = [value for line in series for value in line.values if math.isfinite(value)]
    if bound is not None and not log:
        finite.append(bound)
    low, high = (LEAST, WORST) if log else (min(finite, default=0.0), max(finite, default=1.0))
    if log and finite:
        low = 10.0 ** math.floor(math.log10(max(min(v for v in finite), LEAST)))
    if high <= low:
        high = low + (abs(low) or 1.0)

    def x(place: float) -> str:
        return f"{left + (width - left - right) * (place + 0.5) / max(count, 1):.1f}"

    def y(value: float) -> str:
        if log:
            share = (math.log10(logarithmic(max(value, low))) - math.log10(low)) / (math.log10(high) - math.log10(low))
        else:
            share = (min(max(value, low), high) - low) / (high - low) if math.isfinite(value) else 1.0
        return f"{height - bottom - (height - top - bottom) * share:.1f}"

    parts: list[Markup] = []
    every = math.ceil(len(bands) / 16)
    for n, (start, stop, name) in enumerate(bands):
        a, b = float(x(start - 0.5)), float(x(stop + 0.5))
        if n % 2 == 0:
            shade = '<rect class="band" x="{}" y="{}" width="{}" height="{}"/>'
            parts.append(Markup(shade).format(f"{a:.1f}", top, f"{b - a:.1f}", height - top - bottom))
        if n % every == 0:
            label = '<text x="{}" y="{}" text-anchor="middle">{}</text>'
            parts.append(Markup(label).format(f"{(a + b) / 2:.1f}", height - 7, name))
    for value in ticks(low, high, log=log):
        grid = (
            '<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/><text x="{}" y="{}" text-anchor="end" dy="4">{}</text>'
        )
        shown = f"{value:.0e}" if log else f"{value:.4g}"
        parts.append(Markup(grid).format(left, width - right, y(value), y(value), left - 6, y(value), shown))
    if bound is not None:
        line = '<line class="bound" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        line += '<text x="{}" y="{}" text-anchor="end" dy="-4">{}</text>'
        parts.append(Markup(line).format(left, width - right, y(bound), y(bound), width - right, y(bound), bound_name))
    if at is not None:
        after = at < 0.6 * count
        line = '<line class="at" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        line += '<text class="at" x="{}" y="{}" text-anchor="{}">{}</text>'
        place = float(x(at)) + (6 if after else -6)
        anchor = "start" if after else "end"
        parts.append(
            Markup(line).format(
                x(at), x(at), top, height - bottom, f"{place:.1f}", height - bottom - 8, anchor, at_name
            )
        )
    place = left
    for drawn in reversed(series):
        points = " ".join(f"{x(i)},{y(value)}" for i, value in enumerate(drawn.values))
        parts.append(Markup('<polyline class="{}-line" points="{}"/>').format(drawn.kind, points))
    for drawn in series:
        key = '<polyline class="{}-line" points="{},12 {},12"/><text x="{}" y="16">{}</text>'
        parts.append(Markup(key).format(drawn.kind, place, place + 22, place + 28, drawn.name))
        place += 44 + 7 * len(drawn.name)
    whole = '<div class="scroll"><svg viewBox="0 0 {} {}" role="img">\n{}\n</svg></div>'
    return Markup(whole).format(width, height, lines(parts))


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """At most seven values for the grid."""
    if not log:
        return [low + (high - low) * i / 4 for i in range(5)]
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = max(1, math.ceil((last - first) / 6))
    return [10.0**exponent for exponent in range(last, first - 1, -step)]


def heat(
    columns: Sequence[tuple[str, str]], rows: Sequence[tuple[Any, Sequence[tuple[str, float | None, str, bool]]]]
) -> Markup:
    """A table of relative errors in colours: green at 1e-7 and below, through yellow, to red at 1; grey without one.

    Args:
        columns: what each is called, and its tooltip.
        rows: each one's name, and for each column the text, the error, the tooltip and whether it is framed.
    """
    head = Markup("").join(Markup('<th title="{}">{}</th>').format(tip, name) for name, tip in columns)
    body = [
        Markup("<tr><th>{}</th>{}</tr>").format(
            name,
            Markup("").join(
                Markup('<td style="{}"{} title="{}">{}</td>').format(
                    shade(value), Markup(' class="first"') if first else "", tip, text
                )
                for text, value, tip, first in cells
            ),
        )
        for name, cells in rows
    ]
    whole = '<div class="scroll"><table class="heat">\n<tr><th></th>{}</tr>\n{}\n</table></div>'
    return Markup(whole).format(head, lines(body))


def shade(value: float | None) -> str:
    """The colours of a cell, the same in light and dark."""
    if value is None:
        return "background:rgba(128,136,148,.18)"
    depth = min(max((math.log10(logarithmic(value)) + 7) / 7, 0.0), 1.0)
    hue = 140 * (1 - depth) ** 1.5
    return f"color:#1d2430;background:hsl({hue:.0f} {45 + 30 * depth:.0f}% {84 - 29 * depth:.0f}%)"


def matrices(named: Sequence[tuple[str, torch.Tensor]], largest: float = 1.0) -> Markup:
    """Matrices as pictures, a pixel for each value: blue above 0, red below, strongest at `largest`."""
    shown = '<figure><img alt="{}" src="{}"><figcaption>{}</figcaption></figure>'
    parts = [Markup(shown).format(name, picture(matrix, largest), name) for name, matrix in named]
    return Markup('<div class="maps">{}</div>').format(Markup("").join(parts))


def picture(matrix: torch.Tensor, largest: float) -> str:
    """A matrix as the data of a PNG with transparency; what is not finite is black."""
    rows = []
    for row in matrix.double().tolist():
        pixels = bytearray([0])  # the row's filter: none
        for value in row:
            if not math.isfinite(value):
                pixels += bytes((0, 0, 0, 255))
                continue
            strength = round(255 * min(abs(value) / (largest or 1.0), 1.0))
            pixels += bytes((*((36, 98, 200) if value >= 0 else (205, 62, 38)), strength))
        rows.append(bytes(pixels))
    height, width = matrix.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows), 9)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(data).decode()
