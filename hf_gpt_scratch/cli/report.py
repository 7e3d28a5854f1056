"""A comparison as tables on the terminal, and as one self-contained HTML page.

Shapes: B batch, T tokens, H heads.
"""

import base64
import io
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from ..errors import LabError, few
from ..lab.compare import Comparison, StageError
from ..lab.pairing import Match
from ..lab.trace import BLOCK_STAGES

# Stages that the terminal shows even when all is well, and the figures of each.
ALWAYS = (BLOCK_STAGES[""], "logits")
STAGE_FIGURES = ("max |a−b|", "RMS", "relative", "float32")
HEADS_SHOWN, TOKENS_SHOWN = 6, 24
# The ends of the logarithmic scale: infinite errors and NaN, and zero.
WORST, LEAST = 10.0, 1e-17
SAME, DIFFERENT, FAINT = "#2f7d4f", "#c23b22", "#8a8f98"


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "∞"


def decoder(tokenizer: Any) -> Callable[[int], str]:
    """Token id -> its text, or its number without a tokenizer."""
    return (lambda token: repr(tokenizer.decode([token]))[1:-1]) if tokenizer else str


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


def once(matches: list[Match]) -> list[Match]:
    """The matches under other names than the book's; of the blocks, only the first."""
    guessed = [match for match in matches if match.row.ours != (match.row.theirs,)]
    return [match for match in guessed if not re.match(r"trf_blocks\.[1-9]", match.row.ours[0])]


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
        if diagnosis.explained:
            repaired = "Repaired, " if i == 1 else "Repaired with the above, "
            lines.append(f"   {repaired}the relative logit error is {number(fault.error)}.")
    if diagnosis.explained and diagnosis.faults:
        these = "this mistake" if len(diagnosis.faults) == 1 else "these mistakes"
        lines.append(
            f"\nThe reference with {these} reproduces {diagnosis.proof}, to {number(diagnosis.unexplained)} "
            f"({diagnosis.tried:,} experiments)."
        )
    lines += [f"Equally good explanation: {escape(says)}" for says in diagnosis.alternatives]
    return Panel("\n".join(lines), title=f"Different: {escape(diagnosis.headline)}", border_style="red")


def figures(comparison: Comparison) -> list[tuple[str, str]]:
    """The figures of the logits, by name."""
    logits = comparison.logits
    named = [
        ("max |logit error|", f"{number(logits.max_abs_error)} of {logits.max_abs_logit:.4g}"),
        ("relative", f"{number(logits.relative_error)} in {comparison.dtype}"),
        ("relative, float32", number(comparison.logits_float32.relative_error)),
        ("KL divergence", f"mean {number(logits.mean_kl)}, max {number(logits.max_kl)} nats"),
        ("top-1 agreement", f"{logits.top1_agreement:.1%} of {logits.tokens} tokens"),
    ]
    if comparison.different_tensors is not None:
        names = comparison.different_tensors
        listed = f": {few(names, 3)}" if names else ""
        named.append(("not equal bit for bit", f"{len(names)} of {comparison.tensors} tensors{listed}"))
    if comparison.perplexity:
        named.append(("perplexity", "{reference:.4f} and {candidate:.4f}".format(**comparison.perplexity)))
    if comparison.gradients:
        name, worst = max(comparison.gradients.items(), key=lambda item: item[1])
        named.append(("gradients", f"worst {number(worst)}, of {name} ({len(comparison.gradients)} compared)"))
    return named


def after(comparison: Comparison) -> str:
    row, place = comparison.worst_token
    return f"token {place} of sequence {row}, where the models differ most"


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


# On a page


def html_report(comparison: Comparison) -> str:
    """One self-contained page: no scripts, and no external fonts or images.

    Raises:
        LabError: matplotlib is not installed.
    """
    check_drawing()
    from matplotlib import rc_context

    loader = PackageLoader(__package__, "templates")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.globals |= {"number": number, "show": decoder(comparison.tokenizer)}
    environment.filters["shade"] = shade
    with rc_context(STYLE):  # leaves the caller's own plots alone
        depth, attention = depth_figure(comparison), attention_figure(comparison)
    return environment.get_template("report.html").render(
        comparison=comparison,
        figures=figures(comparison),
        depth=Markup(depth),
        heat=heat_map(comparison),
        attention=attention,
        tokens=comparison.top_tokens(8) if comparison.is_language_model else [],
        after=after(comparison),
        matches={side: once(matches) for side, matches in comparison.matches.items()},
    )


STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_gpt_scratch",
    "font.family": ["sans-serif"],
}


def check_drawing() -> None:
    """Raises LabError unless matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise LabError('the HTML report needs matplotlib; pip install "hf-gpt-scratch[examples]"') from error


def logarithmic(value: float) -> float:
    return min(max(value, LEAST), WORST) if not math.isnan(value) else WORST


def depth_figure(comparison: Comparison) -> str:
    """Relative error after each stage, in execution order, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    lines = [(comparison.dtype, SAME if comparison.same else DIFFERENT, [s.relative for s in comparison.stages])]
    if comparison.dtype != "float32":
        lines.insert(0, ("float32", FAINT, [s.float32 for s in comparison.stages]))
    for name, colour, values in lines:
        axes.plot([logarithmic(value) for value in values], color=colour, label=name, marker=".", markersize=4, lw=1.4)
    axes.axhline(comparison.bound, color="#333", lw=0.8, ls=":", label=f"bound {comparison.bound:.0e}")
    mark_first_divergence(axes, comparison)
    mark_blocks(axes, comparison)
    axes.set(yscale="log", ylabel="relative error", xlim=(-1, len(comparison.stages)), ylim=(LEAST / 2, WORST * 2))
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return text.getvalue()[text.getvalue().index("<svg") :]


def mark_first_divergence(axes: Any, comparison: Comparison) -> None:
    first = comparison.first_divergence
    if first is None:
        return
    at = comparison.stages.index(first)
    right = at > 0.6 * len(comparison.stages)
    axes.axvline(at, color=DIFFERENT, lw=0.8, ls="--")
    axes.annotate(
        f"first differs:\n{first.stage}",
        (at, 0.04),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if right else 6, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        color=DIFFERENT,
    )


def mark_blocks(axes: Any, comparison: Comparison) -> None:
    """Every other block shaded, and at most 24 of them named."""
    blocks: dict[int, list[int]] = {}
    for i, stage in enumerate(comparison.stages):
        if layer := re.match(r"trf_blocks\.(\d+)", stage.stage):
            blocks.setdefault(int(layer[1]), []).append(i)
    for n, places in blocks.items():
        if n % 2 == 0:
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color="#f0f2f5", lw=0, zorder=0)
    every = math.ceil(len(blocks) / 24)
    middles = {n: sum(places) / len(places) for n, places in blocks.items() if n % every == 0}
    axes.set_xticks(list(middles.values()), [f"block {n}" if len(blocks) < 13 else str(n) for n in middles])
    axes.tick_params(axis="x", length=0)


def heat_map(comparison: Comparison) -> dict[str, Any]:
    """Layers × stages: rows of (layer, cells); a cell is a `StageError`, or None if it was not recorded."""
    found = {stage.stage: stage for stage in comparison.stages}
    layers = sorted({int(m[1]) for name in found if (m := re.match(r"trf_blocks\.(\d+)", name))})
    columns = [(key, what) for key, what in BLOCK_STAGES.items() if key != "input"]
    rows = [(n, [found.get(f"trf_blocks.{n}.{key}".rstrip(".")) for key, _ in columns]) for n in layers]
    others = [stage for name, stage in found.items() if not name.startswith("trf_blocks")]
    return {"columns": columns, "rows": rows, "others": others}


def shade(stage: StageError | None) -> str:
    """A colour for an error: from green at 1e-7 and below, through yellow, to red at 1; grey for no value."""
    if stage is None:
        return "background:#eceef1"
    depth = (math.log10(logarithmic(stage.relative)) + 7) / 7
    depth = min(max(depth, 0.0), 1.0)
    hue = 140 * (1 - depth) ** 1.5
    return f"background:hsl({hue:.0f} {45 + 30 * depth:.0f}% {88 - 33 * depth:.0f}%)"


def attention_figure(comparison: Comparison) -> dict[str, Any] | None:
    """The attention maps of both models and their difference, in the first layer where they differ, as PNG.

    None where they were not recorded. Maps of different shapes have no difference.
    """
    stages = [stage for stage in comparison.stages if stage.stage.endswith("att.weights")]
    if not stages:
        return None
    differing = [stage for stage in stages if not stage.relative <= comparison.bound]
    stage = (differing or stages)[0]
    reference, candidate = (
        activations[stage.stage][0, :, :TOKENS_SHOWN, :TOKENS_SHOWN] for activations in comparison.traces
    )  # (H, T, T)
    heads = min(len(reference), len(candidate), HEADS_SHOWN)
    picture = io.BytesIO()
    drawn_maps(reference, candidate, heads).savefig(picture, format="png", dpi=130, metadata={"Software": None})
    return {
        "stage": stage,
        "png": base64.b64encode(picture.getvalue()).decode(),
        "heads": (heads, len(reference), len(candidate)),
        "tokens": reference.shape[-1],
        "differs": bool(differing),
    }


def drawn_maps(reference: torch.Tensor, candidate: torch.Tensor, heads: int) -> Any:
    """A matplotlib figure of attention maps (H, T, T): a row for each model and one for the difference."""
    from matplotlib.figure import Figure

    rows: list[tuple[str, torch.Tensor, str, float, float]]  # name, maps, colours, least and largest value
    rows = [("reference", reference, "Blues", 0.0, 1.0), ("candidate", candidate, "Blues", 0.0, 1.0)]
    if reference.shape == candidate.shape:
        difference = candidate - reference
        largest = max(torch.nan_to_num(difference).abs().max().item(), 1e-12)
        rows.append(("candidate − reference", difference, "RdBu_r", -largest, largest))
    figure = Figure(figsize=(1.75 * heads + 1, 1.75 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), heads, squeeze=False)
    for line, (name, maps, colours, least, largest) in zip(axes, rows, strict=True):
        for head, axis in enumerate(line):
            image = axis.imshow(maps[head].numpy(), cmap=colours, vmin=least, vmax=largest, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True, color="#c8ccd2", linewidth=0.6)
            if name == "reference":
                axis.set_title(f"head {head}", fontsize=9)
        line[0].set_ylabel(name)
        figure.colorbar(image, ax=list(line), shrink=0.8, aspect=14)
    return figure
