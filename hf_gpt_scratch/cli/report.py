"""A comparison as tables on the terminal."""

from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..lab.compare import Comparison, StageError
from ..lab.compare_page import after, decoder, figures, number, once, repaired, reproduced
from ..lab.pairing import Match
from ..lab.trace import BLOCK_STAGES

# Stages that the terminal shows even when all is well, and the figures of each.
ALWAYS = (BLOCK_STAGES[""], "logits")
STAGE_FIGURES = ("max |a−b|", "RMS", "relative", "float32")
# On the terminal


def stage_table(comparison: Comparison, width: int = 120) -> Table:
    """The stages from the first that differs to the end of its block, and all block outputs.

    Names and figures are never cut off: a narrow terminal gets fewer columns.
    """
    table = Table(box=box.SIMPLE_HEAD, title="Error by stage, in execution order", title_justify="left")
    shown = [0, 4] if width < 80 else [0, 2, 4, 5] if width < 100 else [0, 1, 2, 3, 4, 5]
    for index in shown:
        if index == 0:
            table.add_column("stage", overflow="fold", min_width=32)  # the longest name, of a block with two digits
        elif index == 1:
            table.add_column("what", overflow="fold")
        else:
            table.add_column(STAGE_FIGURES[index - 2], justify="right", no_wrap=True)
    first = comparison.first_divergence
    for stage in stages_shown(comparison):
        style = "bold red" if stage is first else "green" if stage.relative <= comparison.bound else "red"
        mark = " ← the first that differs" if stage is first else ""
        figures = [number(value) for value in (stage.max_abs, stage.rms, stage.relative, stage.float32)]
        what = stage.meaning + mark + (f" ({stage.note})" if stage.note else "")
        cells = [stage.stage if 1 in shown else stage.stage + mark[:2], escape(what), *figures]
        table.add_row(*(cells[index] for index in shown), style=style)
    return table


def stages_shown(comparison: Comparison) -> list[StageError]:
    """The last stage that agrees, the first that differs, the rest of its block; all block outputs, and the logits."""
    first = comparison.first_divergence
    at = comparison.stages.index(first) if first else -1
    block = ".".join(first.stage.split(".")[:2]) + "." if first else ""
    return [
        stage
        for place, stage in enumerate(comparison.stages)
        if stage.meaning in ALWAYS
        or (first and (at - 1 <= place <= at or (place > at and stage.stage.startswith(block))))
    ]


def mapping_table(matches: list[Match]) -> RenderableType:
    """The guessed pairing, as in `once`."""
    guessed = once(matches)
    if not guessed:
        return f"Parameters: all {len(matches)} have the book's names and shapes."
    table = Table(box=box.SIMPLE_HEAD, title="Parameters, as guessed: please check", title_justify="left")
    for heading in ("yours", "the book's", "layout", "confidence", "reason"):
        table.add_column(heading, overflow="fold")
    for match in guessed:
        style = "yellow" if match.confidence < 0.9 else ""
        names = ", ".join(match.row.ours)
        row = (match.row.theirs, names, match.row.layout, f"{match.confidence:.0%}", match.reason)
        table.add_row(*map(escape, row), style=style)
    return table


def diagnosis_panel(comparison: Comparison) -> Panel:
    diagnosis = comparison.diagnosis
    if comparison.same:
        return Panel(escape(comparison.verdict), title="The same model", border_style="green")
    if diagnosis is None:
        return Panel(escape(comparison.verdict), title="Different", border_style="red")
    lines = [escape(comparison.verdict)]
    if diagnosis.note:
        lines.append(f"\n[yellow]{escape(diagnosis.note)}[/]")
    lines += [f"Observed: {escape(says)}." for says in diagnosis.observations]
    for i, fault in enumerate(diagnosis.faults, 1):
        lines += [
            f"\n[bold red]{i}. {fault.name}[/]: [bold]{escape(fault.says)}[/]",
            f"   where: {escape(fault.where)}",
            f"   fix: {escape(fault.remedy)}",
        ]
        if proof := repaired(fault, i == 1):
            lines.append(f"   {proof}")
    if told := reproduced(comparison):
        lines.append(f"\n{told}")
    lines += [f"Equally good explanation: {escape(says)}" for says in diagnosis.alternatives]
    return Panel("\n".join(lines), title=f"Different: {escape(diagnosis.headline)}", border_style="red")


def token_table(comparison: Comparison, k: int = 5) -> Table:
    show = decoder(comparison.tokenizer)
    table = Table(box=box.SIMPLE_HEAD, title=f"Most probable tokens after {after(comparison)}", title_justify="left")
    for heading in ("", "reference", "", "candidate", ""):
        table.add_column(heading, justify="right" if not heading else "left")
    for row in comparison.top_tokens(k):
        cells = [(show(row[side]["token"]), f"{row[side]['probability']:.2%}") for side in ("reference", "candidate")]
        same = row["reference"]["token"] == row["candidate"]["token"]
        table.add_row(str(row["rank"]), *map(escape, cells[0] + cells[1]), style="" if same else "red")
    return table


def terminal_report(comparison: Comparison, width: int = 120) -> RenderableType:
    """The report for a terminal with `width` columns."""
    head = Table(box=None, show_header=False)
    for name, value in (
        ("reference", comparison.reference),
        ("candidate", comparison.candidate),
        *figures(comparison),
        *(("note", note) for note in comparison.notes),
    ):
        head.add_row(f"[dim]{name}[/]", escape(value))
    guessed = [mapping_table(matches) for matches in comparison.matches.values()]
    parts: list[Any] = [
        *guessed,
        head,
        stage_table(comparison, width),
        *([token_table(comparison)] if comparison.is_language_model else []),
        diagnosis_panel(comparison),
    ]
    return Group(*parts)


def print_report(comparison: Comparison, console: Console) -> None:
    console.print(terminal_report(comparison, console.width))
