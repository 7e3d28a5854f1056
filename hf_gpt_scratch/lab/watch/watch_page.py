"""A watched run as an HTML page."""

from typing import Any

from markupsafe import Markup

from ..page import Line, Section, Verdict, chart, facts, finding, lines, page, table
from .findings import Finding, WatchReport


def shown(one: Finding) -> Markup:
    named = [("where", one.where), ("fix" if one.level == "fault" else "", one.remedy)]
    return finding(f"{one.name}: {one.says}", named, one.proof)


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def watch_page(report: WatchReport, script: str) -> str:
    """A whole HTML document; `script` says what was watched."""
    state = "bad" if report.faults or report.error else "good" if report.steps else "odd"
    text = f"{script}, watched until {report.ended}" if report.ended.startswith("the") else f"{script}: {report.ended}"
    sections = []
    if report.faults:
        sections.append(Section("Mistakes", lines([shown(one) for one in report.faults])))
    if report.notes:
        sections.append(Section("Notes", lines([shown(one) for one in report.notes]), "These may be choices."))
    if report.steps:
        sections.append(Section("Steps", steps(report)))
    about = [
        ("model", report.model),
        ("parameters", f"{report.parameters:,}"),
        ("vocabulary", f"{report.vocabulary:,}"),
    ]
    sections.append(Section("What was seen", facts(about), "; ".join(report.seen)))
    return page(f"The training of {script}", Verdict(state, report.verdict, text), sections)


def steps(report: WatchReport) -> Markup:
    headings = ["step", "loss", "tokens", "micro-batches", "|gradient|", "|update|", "learning rates"]
    rows: list[list[Any]] = [
        [
            step.number,
            figure(step.loss),
            f"{step.tokens:,}",
            step.micro_batches,
            figure(step.gradient_norm),
            figure(step.update_norm),
            ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(step.learning_rates)),
        ]
        for step in report.steps
    ]
    parts = [table(headings, rows, numbers=range(6))]
    losses = [step.loss for step in report.steps if step.loss is not None]
    if len(losses) > 1:
        parts.append(chart([Line("loss", losses)], log=False))
    return lines(parts)
