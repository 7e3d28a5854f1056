"""A complete comparison: two models by name, the tokens they run on, the measurements and the diagnosis."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import LabError
from ..tokenizer import gpt2_tokenizer
from ..weights.architecture import kind_of
from ..weights.hub import find_source
from ..weights.parity import FP32_LOGITS, probe_ids
from ..weights.tokenizer_files import tokenizer_beside
from .compare import Comparison, compare_models
from .diagnose import Diagnosis, diagnose
from .extras import acting, diagnosed_without_extras, gradient_fault, name_shared_blocks
from .gradients import is_small
from .subject import Subject, load, names_a_class
from .trace import logits_of

# Tokens: enough to show any mistake in the mask or the positions, and quick.
PROBE = 32


def tokenizer_of(sources: tuple[Any, ...], vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first model that has one, or GPT-2's for a vocabulary of its size, or none."""
    for source in sources:
        if not names_a_class(source) and (tokenizer := tokenizer_beside(find_source(source))) is not None:
            return tokenizer
    try:
        return gpt2_tokenizer() if vocab_size == 50257 else None
    except OSError:
        return None


def input_tokens(tokens: str | None, text_ids: torch.Tensor | None, vocab_size: int, context: int) -> torch.Tensor:
    """The token ids that both models run on (B, T): those given, the text's first ones, or random ones.

    Raises:
        LabError: these are no token ids, too many, or outside the vocabulary.
    """
    if tokens is None:
        # At most half of the context, so that positions with an offset still exist.
        length = min(PROBE, max(context // 2, 1))
        if text_ids is not None:
            return text_ids[:, : min(256, context)]
        random_ids = probe_ids(vocab_size, length, length=length)
        # Ids that code treats in another way: the first, as padding, and the last, as the end; one of them twice.
        random_ids[0, 1:4] = torch.tensor([0, vocab_size - 1, 0])[: max(length - 1, 0)]
        return random_ids
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
        raise LabError(f"there is no text file {file}; check the path")
    if tokenizer is None:
        raise LabError(f"{file} cannot be tokenized: neither model has a tokenizer; give --tokens")
    try:
        ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False).input_ids
    except (OSError, UnicodeDecodeError) as error:
        raise LabError(f"cannot read {file}: {error}") from error
    if len(ids) < 2:
        raise LabError(f"{file} has {len(ids)} tokens, but a text needs at least 2; give a longer one")
    return torch.tensor([ids])


def load_both(reference: Any, candidate: Any, **given: Any) -> tuple[Subject, Subject]:
    """Both models; the options apply to the candidate if it is code of your own, else to the reference."""
    given["mapping"] = read_map(given["mapping"])
    if names_a_class(reference) and not names_a_class(candidate):
        second = load(candidate)
        first = load(reference, **given, like=second)
    else:
        first = load(reference, cfg=given["cfg"] if names_a_class(reference) and not known(reference) else None)
        second = load(candidate, **given, like=first)
    rows = [len(found) for s in (first, second) if (found := s.weights().get("pos_emb.weight")) is not None]
    if len(set(rows)) > 1:
        first.positions = second.positions = min(rows)
    return first, second


def found_by(
    search: Callable[[Comparison, Subject, Subject], Diagnosis | None], comparison: Comparison, *both: Subject
) -> Diagnosis | None:
    """The diagnosis; a search that fails is told, and takes the measurements not along."""
    try:
        return search(comparison, *both)
    except Exception as error:  # of the user's class, or a fault of the search
        note = f"the search for the mistake failed, so nothing is named: {type(error).__name__}: {error}"
        return Diagnosis.failed(comparison.logits.relative_error, note)


@torch.no_grad()
def other_length(reference: Subject, candidate: Subject, context: int) -> tuple[torch.Tensor | None, str]:
    """Token ids of another length, one or all positions, on which the logits differ, in float32; or why there are none.

    A mask or positions can be right up to some length only.
    """
    for length in (1, context):
        input_ids = (
            probe_ids(reference.config.vocab_size, context, batch=1, length=length) if reference.config else None
        )
        if input_ids is None:
            continue
        right = logits_of(reference, reference.run(input_ids), input_ids)
        try:
            logits = logits_of(candidate, candidate.run(input_ids), input_ids)[:, -right.shape[1] :]
        except Exception as error:  # whatever the user's class raises
            return None, f"it does not run on {length} of {context} tokens: {type(error).__name__}: {error}"
        right = right[:, -logits.shape[1] :]
        if not (right - logits).abs().max() <= FP32_LOGITS * right.abs().max():
            return input_ids, ""
    return None, ""


def known(source: Any) -> bool:
    """Whether a source is a model in memory that knows its sizes."""
    return isinstance(source, nn.Module) and kind_of(source) is not None


def read_map(file: Path | Mapping[str, str | None] | None) -> dict[str, str | None]:
    if file is None or isinstance(file, Mapping):
        return dict(file or {})
    try:
        mapping: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"cannot read the map {file}: {error}") from error
    if not isinstance(mapping, dict) or not all(v is None or isinstance(v, str) for v in mapping.values()):
        raise LabError(f'{file} is not a map; write JSON such as {{"my.wq.weight": "trf_blocks.0.att.W_query.weight"}}')
    return mapping


def _path(name: str | os.PathLike | None) -> Path | None:
    return None if name is None else Path(name)


def compare(
    reference: str | os.PathLike | nn.Module,
    candidate: str | os.PathLike | nn.Module | Callable[..., nn.Module],
    *,
    tokens: str | None = None,
    text: str | os.PathLike | None = None,
    weights: str | os.PathLike | None = None,
    cfg: str | Mapping[str, Any] | None = None,
    mapping: str | os.PathLike | Mapping[str, str | None] | None = None,
    my_forward: str | Callable[..., Any] | None = None,
    gradients: bool | None = None,
    quick: bool = False,
    step: Callable[[str], None] = lambda step: None,
) -> Comparison:
    """Compares two models stage by stage and, if they differ, looks for the mistake.

    Args:
        reference: the correct model: a directory, hub id, model, or `my_gpt.py:MyGPTModel`. A .py file is executed.
        candidate: the model to check, in the same form, or its class. A class gets the reference's weights; a model,
            and what a function returns, is judged with its own.
        tokens: ids to compare on, such as "6109,3626,6100,345"; default: random ones.
        text: a text file to compare on; also gives perplexities.
        weights: for code of your own: model.pth, .safetensors or a directory; "reference" for the reference's.
        cfg: for a class: JSON, a JSON file, the name of a config in its file, or a mapping.
        mapping: from your parameter names to the book's or GPT-2's, or a JSON file of that.
        my_forward: a function of the candidate and token ids (B, T) that returns logits (B, T, V), if the candidate
            cannot simply be called; or its name in the file.
        gradients: compare gradients; default: of models of up to 400 million parameters whose logits are equal.
        quick: fewer experiments; without gradients.
        step: called with the name of each step.

    Raises:
        LabError, ConversionError: a model cannot be loaded, or the two cannot be compared.
    """
    step("Loading")
    sources = tuple(os.fspath(s) if isinstance(s, str | os.PathLike) else s for s in (reference, candidate))
    right, other = load_both(*sources, weights=_path(weights), cfg=cfg, mapping=mapping, forward=my_forward)
    config = right.config or other.config
    if config is None:
        raise LabError("the models' sizes are unknown; give --cfg")
    tokenizer = tokenizer_of(sources, config.vocab_size)
    text_ids = text_tokens(_path(text), tokenizer)
    context = other.positions or config.context_length
    input_ids = input_tokens(tokens, text_ids, config.vocab_size, context)
    if not right.is_language_model:
        input_ids = input_ids[:1]  # a classifier accepts several sequences only if its config names a padding token
    step("Comparing")
    if gradients is None and (quick or not (is_small(right) and is_small(other))):
        gradients = False
    comparison = compare_models(right, other, input_ids, text_ids=text_ids, gradients=gradients)
    if comparison.is_language_model and comparison.equivalent and tokens is None and text is None and not quick:
        step("Comparing other lengths")
        other_ids, failure = other_length(right, other, context)
        if other_ids is not None:
            comparison = compare_models(right, other, other_ids, gradients=gradients)
        comparison.failure = failure or comparison.failure
    comparison.tokenizer, comparison.quick = tokenizer, quick
    if not comparison.is_language_model:
        return comparison
    if other.extras:
        step("Trying the parameters that GPT-2 does not have")
        comparison.extras = acting(other, input_ids)
    if comparison.extras:
        step("Looking for the mistake")
        comparison.diagnosis = found_by(diagnosed_without_extras, comparison, right, other)
    elif not comparison.equivalent:
        step("Looking for the mistake")
        comparison.diagnosis = found_by(diagnose, comparison, right, other)
    elif comparison.gradients_agree is False:
        comparison.diagnosis = gradient_fault(comparison)
    if comparison.diagnosis is not None and other.shared:
        name_shared_blocks(comparison.diagnosis, other.shared)
    return comparison
