"""Explanations and inspections on the terminal."""

import re

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..lab.explain import Explanation
from ..lab.inspect import BYTES, Inspection, Step

SYMBOLS = {
    "x": "a token's vector, along the shortcuts",
    "y": "x after the norm",
    "z": "the heads' results",
    "h": "the feed-forward network's wide vector",
}


def _shape(sizes) -> str:
    return f"({', '.join(f'{n:,}' if isinstance(n, int) else n for n in sizes)})"


def explanation(found: Explanation) -> Panel:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")

    def line(what: str, *texts: str) -> None:
        if any(texts):
            grid.add_row(what, Text("\n".join(texts)))

    line("ours", *(f"{part.name}  {_shape(part.shape)}" for part in found.parts))
    line("GPT-2's", f"{found.gpt2}  {_shape(found.gpt2_shape)}")
    line("what", found.meaning)
    line("role", found.does)
    line("equation", *found.equation.split("; "))
    line("where", *(f"{name} is {what}" for name, what in SYMBOLS.items() if re.search(rf"\b{name}\b", found.equation)))
    line("parameters", found.arithmetic)
    line("from GPT-2", *(f"{part.code} = {part.value}" for part in found.parts))
    line("to GPT-2", f"{found.gpt2_code} = {found.gpt2_value}" if found.parts else "")
    line("in files", *(part.stored for part in found.parts), found.gpt2_stored)
    line("note", found.note)
    title = found.parts[0].name if len(found.parts) == 1 else found.gpt2
    return Panel(grid, title=Text(title, style="bold"), title_align="left")


def report(found: Inspection, width: int) -> Group:
    """A complete inspection; the column of shapes appears from a width of 100 characters."""
    parts: list[RenderableType] = [
        Text(f"{found.model}: {found.kind}", style="bold"),
        Text(),
        Text(found.summary),
        Text(),
        _steps(found),
        Text(),
        _tree(found, width >= 100),
        Text(),
        _totals(found),
    ]
    return Group(*parts)


def _steps(found: Inspection) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Operations, in execution order", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("GPT-2", no_wrap=True, style="dim")
    table.add_column("what", ratio=1)
    table.add_column("result", style="cyan")

    def add(steps: tuple[Step, ...], indent: str) -> None:
        for step in steps:
            does = step.does or (f"{step.copies} equal blocks, each:" if step.copies > 1 else "this block:")
            table.add_row(indent + step.name, step.gpt2, does, _shape(step.shape))
            add(step.steps, indent + "  ")

    add(found.steps, "")
    return table


def _tree(found: Inspection, shown: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Modules", title_justify="left")
    table.add_column("module", no_wrap=True)
    if shown:
        table.add_column("shapes", style="cyan")
    table.add_column("arithmetic", ratio=1)
    table.add_column("= parameters", justify="right", no_wrap=True)
    for depth, node in found.tree.walk():
        copies = f"{node.copies} × " if node.copies > 1 else ""
        name = Text("  " * depth + node.name + " " * bool(node.name)).append(copies + node.kind, style="dim")
        shapes = [" ".join(map(_shape, node.shapes.values()))] if shown else []
        total = f"{node.parameters:,}"
        if node.tied_to:
            sums, total = f"{node.tied_to} again", "tied"
        elif not node.parameters:
            sums, total = "", ""
        else:
            sums = node.arithmetic.removesuffix(total).removesuffix(" = ")
        table.add_row(name, *shapes, sums, total)
    return table


def _totals(found: Inspection) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title="Parameters and memory", title_justify="left")
    table.add_column("")
    for kind in found.parameters:
        this = " (this model)" if found.tied is (kind == "tied") and kind != "all" else ""
        table.add_column(kind + this, justify="right")
    table.add_row("parameters", *(found.arithmetic[kind].replace(" = ", "\n= ") for kind in found.parameters))
    for dtype, size in BYTES.items():
        figures = (f"× {size} = {n:,} bytes\n= {n / 2**20:,.2f} MiB" for n in found.memory[dtype].values())
        table.add_row(dtype, *figures, style="bold" if dtype == found.dtype else "")
    table.caption = "1 MiB is 1024² bytes; the book writes MB."
    table.caption_justify = "left"
    return table
