"""A comparison as an HTML page, and the figures that the page and the terminal share.

Shapes: H heads, T tokens.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup

from ..errors import few
from .page import (
    Line,
    Section,
    Verdict,
    bar,
    chart,
    code,
    facts,
    finding,
    fragment,
    heat,
    hidden,
    lines,
    matrices,
    page,
    table,
)
from .pairing import Match
from .trace import BLOCK_STAGES

if TYPE_CHECKING:
    from .compare import Comparison, StageError
    from .decoding.report import DecodingReport

HEADS_SHOWN, TOKENS_SHOWN = 6, 24


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else "∞"


def decoder(tokenizer: Any) -> Callable[[int], str]:
    """Token id -> its text, or its number without a tokenizer."""
    return (lambda token: repr(tokenizer.decode([token]))[1:-1]) if tokenizer else str


def once(matches: list[Match]) -> list[Match]:
    """The matches under other names than the book's; of the blocks, only the first."""
    guessed = [match for match in matches if match.row.ours != (match.row.theirs,)]
    return [match for match in guessed if not re.match(r"trf_blocks\.[1-9]", match.row.ours[0])]


def figures(comparison: "Comparison") -> list[tuple[str, str]]:
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
        name, worst = comparison.worst_gradient
        named.append(("gradients", f"worst {number(worst)}, of {name} ({len(comparison.gradients)} compared)"))
    elif comparison.is_language_model:
        named.append(("gradients", "not compared"))
    return named


def after(comparison: "Comparison") -> str:
    row, place = comparison.worst_token
    return f"token {place} of sequence {row}, where the models differ most"


def repaired(fault: Any, first: bool) -> str:
    """What the proof of a fault says; nothing where there is none."""
    if math.isnan(fault.error):
        return ""
    return f"{'Repaired, ' if first else 'Repaired with the above, '}the relative logit error is {number(fault.error)}."


def reproduced(comparison: "Comparison") -> str:
    """That the reference with the faults is the candidate, if it is."""
    diagnosis = comparison.diagnosis
    if diagnosis is None or not diagnosis.explained or not any(fault.kind != "gradients" for fault in diagnosis.faults):
        return ""
    these = "this mistake" if len(diagnosis.faults) == 1 else "these mistakes"
    what = diagnosis.proof or "the candidate's logits"
    return (
        f"The reference with {these} reproduces {what}, to "
        f"{number(diagnosis.unexplained)} ({diagnosis.tried:,} experiments)."
    )


# The page


def html_report(comparison: "Comparison", decoding: "DecodingReport | None" = None) -> str:
    """One self-contained page, with a section on how the candidate generates if that was checked, too."""
    verdict, sections = verdict_of(comparison), sections_of(comparison)
    if decoding is not None:
        sections = [decoding_section(decoding), *sections]
        if not decoding.right:
            headline = decoding.verdict if comparison.same else f"{verdict.headline}. {decoding.verdict}"
            verdict = replace(verdict, state="bad", headline=headline)
    return page(title_of(comparison), verdict, sections)


def decoding_section(decoding: "DecodingReport") -> Section:
    """What `compare --decode` found."""
    findings = [
        finding(f"{one.name}: {one.says}", [("where", one.where), ("fix", one.remedy)], one.proof)
        for one in decoding.findings
    ]
    several = len(decoding.decoders) > 1
    rows = [
        (f"{check.where}: {check.what}" if several else check.what, check.outcome, check.why)
        for check in decoding.checks
    ]
    checks = table(("question", "outcome", "why"), rows)
    return Section("Decoding", lines([*findings, checks]), note=" ".join([f"{decoding.verdict}.", *decoding.notes]))


def html_fragment(comparison: "Comparison") -> str:
    """The same for a notebook."""
    return str(fragment(title_of(comparison), verdict_of(comparison), sections_of(comparison)))


def title_of(comparison: "Comparison") -> str:
    return f"{comparison.candidate} against {comparison.reference}"


def headline(comparison: "Comparison") -> str:
    diagnosis = comparison.diagnosis
    if comparison.same:
        return "The same model"
    if diagnosis is None or not diagnosis.faults:
        return "Different"
    if not diagnosis.explained:
        return f"Different, {diagnosis.headline}"
    several = len(diagnosis.faults)
    found = "Mistake found" if several == 1 else f"{several} mistakes found"
    return f"{found}: {', '.join(fault.title for fault in diagnosis.faults)}"


def verdict_of(comparison: "Comparison") -> Verdict:
    diagnosis = comparison.diagnosis
    more: list[Markup] = []
    if diagnosis is not None:
        if diagnosis.note:
            more.append(Markup("<p>{}</p>").format(diagnosis.note))
        more += [Markup('<p class="faint">Observed: {}.</p>').format(says) for says in diagnosis.observations]
        for i, fault in enumerate(diagnosis.faults):
            where = [("where", code(fault.where)), ("fix", fault.remedy)]
            more.append(finding(fault.says, where, repaired(fault, i == 0)))
        if told := reproduced(comparison):
            without = (
                f" Without {'it' if len(diagnosis.faults) == 1 else 'them'}, the error is {number(diagnosis.error)}."
            )
            more.append(Markup('<p class="faint">{}</p>').format(told + without))
        more += [
            Markup('<p class="faint">Equally good explanation: {}</p>').format(says) for says in diagnosis.alternatives
        ]
    return Verdict("good" if comparison.same else "bad", headline(comparison), comparison.verdict, lines(more))


def sections_of(comparison: "Comparison") -> list[Section]:
    tokens, stages = comparison.tokens, comparison.stages
    counted = f"{len(tokens)} × {len(tokens[0])} tokens, {len(stages)} stages recorded in {comparison.dtype}"
    found = [Section("Logits", facts(figures(comparison)), counted), depth_section(comparison)]
    found += [section for section in (heat_section(comparison), attention_section(comparison)) if section]
    if comparison.is_language_model:
        found.append(token_section(comparison))
    if comparison.gradients:
        worst = sorted(comparison.gradients.items(), key=lambda item: -item[1])[:8]
        rows = [(code(name), number(error)) for name, error in worst]
        found.append(Section("Largest gradient errors", table(("parameter", "relative error"), rows, numbers=[1])))
    notes = lines([Markup("<p>{}</p>").format(note) for note in comparison.notes])
    found.append(Section("Notes", notes or Markup('<p class="faint">none</p>')))
    for side, matches in comparison.matches.items():
        if guessed := once(matches):
            found.append(mapping_section(side, guessed))
    return found


def depth_section(comparison: "Comparison") -> Section:
    """Relative error after each stage, in execution order."""
    stages, first = comparison.stages, comparison.first_divergence
    series = [Line(comparison.dtype, [s.relative for s in stages], "good" if comparison.same else "first")]
    if comparison.dtype != "float32":
        series.append(Line("float32", [s.float32 for s in stages], "other"))
    blocks: dict[int, list[int]] = {}
    for i, stage in enumerate(stages):
        if layer := re.match(r"trf_blocks\.(\d+)", stage.stage):
            blocks.setdefault(int(layer[1]), []).append(i)
    drawn = chart(
        series,
        bound=comparison.bound,
        bound_name=f"bound {comparison.bound:.0e}",
        at=stages.index(first) if first else None,
        at_name=f"first differs: {first.stage}" if first else "",
        bands=[(places[0], places[-1], f"block {n}" if len(blocks) < 9 else str(n)) for n, places in blocks.items()],
    )
    return Section("Error through depth", drawn)


def heat_map(comparison: "Comparison") -> dict[str, Any]:
    """Layers × stages: rows of (layer, cells); a cell is a `StageError`, or None if it was not recorded."""
    found = {stage.stage: stage for stage in comparison.stages}
    layers = sorted({int(m[1]) for name in found if (m := re.match(r"trf_blocks\.(\d+)", name))})
    columns = [(key, what) for key, what in BLOCK_STAGES.items() if key != "input"]
    rows = [(n, [found.get(f"trf_blocks.{n}.{key}".rstrip(".")) for key, _ in columns]) for n in layers]
    others = [stage for name, stage in found.items() if not name.startswith("trf_blocks")]
    return {"columns": columns, "rows": rows, "others": others}


def heat_section(comparison: "Comparison") -> Section | None:
    found, first = heat_map(comparison), comparison.first_divergence
    if not found["rows"]:
        return None

    def cell(stage: "StageError | None") -> tuple[str, float | None, str, bool]:
        if stage is None:
            return "", None, "not recorded", False
        return number(stage.relative), stage.relative, f"{stage.stage} {stage.note}".strip(), stage is first

    columns = [(what, key or "the block") for key, what in found["columns"]]
    drawn = heat(columns, [(layer, [cell(stage) for stage in stages]) for layer, stages in found["rows"]])
    outside = ", ".join(f"{stage.meaning} {number(stage.relative)}" for stage in found["others"])
    note = "Relative error, max|a − b| / max|a|; ∞ for different shapes or NaN. Framed: the first stage that differs. "
    return Section("Error by layer and stage", drawn, f"{note}Grey: not recorded. Outside the blocks: {outside}.")


def attention_section(comparison: "Comparison") -> Section | None:
    """The attention maps of both models and their difference, in the first layer where they differ."""
    stages = [stage for stage in comparison.stages if stage.stage.endswith("att.weights")]
    if not stages:
        return None
    differing = [stage for stage in stages if not stage.relative <= comparison.bound]
    stage = (differing or stages)[0]
    reference, candidate = (
        activations[stage.stage][0, :, :TOKENS_SHOWN, :TOKENS_SHOWN] for activations in comparison.traces
    )  # (H, T, T)
    heads = min(len(reference), len(candidate), HEADS_SHOWN)
    parts = []
    for name, maps in (("reference", reference), ("candidate", candidate)):
        parts += [Markup('<p class="faint">{}</p>').format(name), maps_of(maps, heads, 1.0)]
    if reference.shape == candidate.shape:
        difference = candidate - reference
        largest = torch.nan_to_num(difference).abs().max().item() if differing else 1.0
        parts.append(Markup('<p class="faint">candidate − reference, at most {}</p>').format(number(largest)))
        parts.append(maps_of(difference, heads, max(largest, 1e-12)))
    shown = f"{heads} of {len(reference)} heads"
    if len(reference) != len(candidate):
        shown += f" of the reference, and of {len(candidate)} of the candidate"
    note = f"Rows are queries, columns are keys; the first {reference.shape[-1]} tokens, {shown}."
    where = " where it first differs" if differing else ""
    return Section(f"Attention{where}: {stage.stage}", lines(parts), note)


def maps_of(maps: torch.Tensor, heads: int, largest: float) -> Markup:
    return matrices([(f"head {head}", maps[head]) for head in range(heads)], largest)


def token_section(comparison: "Comparison") -> Section:
    show, rows, marked = decoder(comparison.tokenizer), [], []
    for row in comparison.top_tokens(8):
        cells: list[Any] = [row["rank"]]
        for side in (row["reference"], row["candidate"]):
            share = side["probability"]
            cells += [code(show(side["token"])), bar(share) + f"{100 * share:.2f} %"]
        rows.append(cells)
        marked.append("differs" if row["reference"]["token"] != row["candidate"]["token"] else "")
    headings = ("", "reference", "", "candidate", "")
    return Section(
        "Most probable next tokens", table(headings, rows, numbers=[2, 4], marked=marked), f"after {after(comparison)}"
    )


def mapping_section(side: str, matches: list[Match]) -> Section:
    rows = [
        (code(m.row.theirs), code(", ".join(m.row.ours)), m.row.layout, f"{m.confidence:.0%}", m.reason)
        for m in matches
    ]
    marked = ["unsure" if match.confidence < 0.9 else "" for match in matches]
    headings = ("yours", "the book's", "layout", "confidence", "reason")
    body = hidden(f"{len(rows)} pairs", table(headings, rows, numbers=[3], marked=marked))
    note = "The other blocks are paired in the same way; parameters with the book's own names are not listed."
    return Section(f"The {side}'s parameters, as guessed: please check", body, note)
