"""Two models compared from the command line: python -m hf_gpt_scratch.compare_command REFERENCE CANDIDATE"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase

from .compare import compare_models
from .conversion import ConversionError, find_source, tokenizer_beside
from .diagnose import diagnose
from .parity import probe_ids
from .report import check_drawing, html_report, print_report
from .subjects import LabError, Subject, load, names_a_class
from .terminal import DIFFERENT, FAILED
from .tokenizer import gpt2_tokenizer

# Enough to show any mistake in the mask or the positions, and quick.
PROBE = 32


def tokenizer_of(sources: list[str], vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the first model that has one; GPT-2's own for its vocabulary; else none."""
    for source in sources:
        if not names_a_class(source) and (tokenizer := tokenizer_beside(find_source(source))) is not None:
            return tokenizer
    try:
        return gpt2_tokenizer() if vocab_size == 50257 else None
    except OSError:
        return None


def input_tokens(tokens: str | None, text_ids: torch.Tensor | None, vocab_size: int, context: int) -> torch.Tensor:
    """What both models read (B, T): the tokens given, the text's beginning, or random ones.

    Raises:
        LabError: no token ids, or some that the models do not have.
    """
    if tokens is None:
        # Half of the context at most, so that positions that start late still exist.
        length = min(PROBE, max(context // 2, 1))
        return probe_ids(vocab_size, length, length=length) if text_ids is None else text_ids[:, : min(256, context)]
    try:
        ids = [int(token) for token in tokens.replace(",", " ").split()]
    except ValueError as error:
        raise LabError(f"got tokens {tokens!r}, but token ids are numbers such as 6109,3626,6100,345") from error
    if not ids or not all(0 <= token < vocab_size for token in ids):
        raise LabError(f"got tokens {tokens!r}, but the model has ids from 0 to {vocab_size - 1}")
    if len(ids) > context:
        raise LabError(f"got {len(ids)} tokens, but the model has only {context} positions; give fewer")
    return torch.tensor([ids])


def text_tokens(file: Path | None, tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor | None:
    if file is None:
        return None
    if not file.exists():
        raise LabError(f"there is no text {file}; check the path")
    if tokenizer is None:
        raise LabError(f"{file} cannot be read as tokens: no tokenizer lies beside the models; give --tokens")
    try:
        ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False).input_ids
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"cannot read {file}: {error}") from error
    if len(ids) < 2:
        raise LabError(f"{file} has {len(ids)} tokens; a text has at least 2")
    return torch.tensor([ids])


def load_both(reference, candidate, weights, cfg, mapping) -> tuple[Subject, Subject]:
    """Both models; the options are the candidate's if it is a class, else the reference's."""
    given = dict(weights=weights, cfg=cfg, mapping=read_map(mapping))
    if names_a_class(reference) and not names_a_class(candidate):
        second = load(candidate)
        return load(reference, **given, like=second), second
    first = load(reference, cfg=cfg if names_a_class(reference) else None)
    return first, load(candidate, **given, like=first)


def read_map(file: Path | None) -> dict[str, str | None]:
    if file is None:
        return {}
    try:
        mapping = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"cannot read the map {file}: {error}") from error
    if not isinstance(mapping, dict) or not all(v is None or isinstance(v, str) for v in mapping.values()):
        raise LabError(f'{file} is no map; write JSON such as {{"my.wq.weight": "trf_blocks.0.att.W_query.weight"}}')
    return mapping


def compare(
    reference: Annotated[
        str, typer.Argument(help="Directory, hub id, or my_gpt.py:MyGPTModel: the model that is right.")
    ],
    candidate: Annotated[str, typer.Argument(help="The same for the model in question. A .py file is run.")],
    tokens: Annotated[str | None, typer.Option(help="Token ids to compare on, such as 6109,3626,6100,345.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text to compare on; gives perplexities too.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the class: model.pth or .safetensors.")] = None,
    cfg: Annotated[
        str | None, typer.Option(help="Config of the class: JSON, a JSON file, or a dict in its file.")
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option("--map", help="JSON: parameter names of the class to the book's or GPT-2's.")
    ] = None,
    gradients: Annotated[bool, typer.Option(help="Compare gradients too.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures; - is the standard output.")] = None,
) -> None:
    """Compares two models layer by layer, and names the mistake if they differ.

    Exit status: 0 the same model, 3 different, 1 not compared, 2 wrong command line.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, errors = Console(stderr=str(json_) == "-"), Console(stderr=True)
    try:
        check_outputs(html, json_)
        with console.status("Loading"):
            right, other = load_both(reference, candidate, weights, cfg, mapping)
        config = right.config or other.config
        if config is None:
            raise LabError("the sizes of the models are not known; give --cfg")
        tokenizer = tokenizer_of([reference, candidate], config.vocab_size)
        text_ids = text_tokens(text, tokenizer)
        input_ids = input_tokens(tokens, text_ids, config.vocab_size, config.context_length)
        if not right.is_language_model:
            input_ids = input_ids[:1]  # a classifier takes several sequences only if its config names a padding token
        with console.status("Comparing"):
            comparison = compare_models(right, other, input_ids, text_ids=text_ids, gradients=gradients)
        if comparison.is_language_model and not comparison.equivalent:
            with console.status("Looking for the mistake"):
                comparison.diagnosis = diagnose(comparison, right, other)
    except (LabError, ConversionError, OSError) as error:
        errors.print(f"[bold red]Not compared:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    print_report(comparison, console, tokenizer)
    for file, make in ((html, lambda: html_report(comparison, tokenizer)), (json_, lambda: as_json(comparison))):
        if file is None:
            continue
        if str(file) == "-":
            print(make())
            continue
        try:
            file.write_text(make(), encoding="utf-8")
            console.print(f"Written: {escape(str(file))}", soft_wrap=True)
        except OSError as error:
            errors.print(f"[bold red]Not written:[/] {escape(str(error))}", soft_wrap=True)
    sys.exit(0 if comparison.same else DIFFERENT)


def check_outputs(html: Path | None, json_: Path | None) -> None:
    """Looks, before the work, whether the files that are asked for can be written.

    Raises:
        LabError: one of them cannot.
    """
    if html is not None:
        check_drawing()
    for option, file in (("--html", html), ("--json", json_)):
        if file is None or (option == "--json" and str(file) == "-"):
            continue
        place = file if file.exists() else file.parent
        if str(file) == "-" or file.is_dir() or not (file.parent.is_dir() and os.access(place, os.W_OK)):
            raise LabError(f"{option} {file} cannot be written; give a file in a directory that exists and is yours")


def as_json(comparison) -> str:
    return json.dumps(comparison.to_dict(), indent=2, allow_nan=False)


if __name__ == "__main__":
    typer.run(compare)
