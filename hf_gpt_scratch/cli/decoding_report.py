"""`compare --decode`: its options, and its report on the terminal."""

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape


def decode_meanings(decode: bool, generate: str | None, arguments: str | None) -> dict[str, Any]:
    """What --decode-arguments says of parameters.

    Raises:
        typer.BadParameter: it is not a JSON object, or there is no --decode.
    """
    if not decode and (generate is not None or arguments is not None):
        raise typer.BadParameter("--generate and --decode-arguments are for --decode; give it, too")
    if arguments is None:
        return {}
    example = """'{"k": "top_k", "verbose": {"value": false}}'"""
    try:
        meanings = json.loads(arguments)
    except ValueError as error:
        raise typer.BadParameter(f"--decode-arguments {arguments!r} is not JSON ({error}); write {example}") from None
    if not isinstance(meanings, dict) or not all(
        isinstance(one, str) or (isinstance(one, dict) and one.keys() == {"value"}) for one in meanings.values()
    ):
        raise typer.BadParameter(f"--decode-arguments {arguments!r} maps no parameters to meanings; write {example}")
    return meanings


def decoding_report(reference, candidate, cfg, generate, meanings, step):
    from ..lab.decoding.session import check_decoding

    return check_decoding(reference, candidate, cfg=cfg, generate=generate, arguments=meanings, step=step)


def print_decoding(report, console: Console) -> None:
    """The verdict, each finding with its proof, and what was not checked."""
    color = "green" if report.right else "red"
    console.print(f"[bold {color}]{escape(report.verdict)}[/]", soft_wrap=True)
    for n, one in enumerate(report.findings, start=1):
        console.print(f"{n}. [bold]{one.name}[/] in {escape(one.where)}: {escape(one.says)}", soft_wrap=True)
        console.print(f"fix: {escape(one.remedy)}", soft_wrap=True)
        if one.proof:
            console.print(f"proof: {escape(one.proof)}", soft_wrap=True)
        else:
            console.print("observed, not explained: no known mistake reproduces it", soft_wrap=True)
        if one.shortest:
            console.print(f"shortest: {escape(json.dumps(one.shortest))}", soft_wrap=True)
    skipped: dict[str, list[str]] = {}
    for check in report.checks:
        if check.outcome == "not made":
            skipped.setdefault(check.where, []).append(f"{check.what} ({check.why})")
    for where, whys in skipped.items():
        console.print(f"Not checked in {escape(where)}: {escape('; '.join(whys))}", soft_wrap=True)
    for note in report.notes:
        console.print(f"Note: {escape(note)}", soft_wrap=True)
