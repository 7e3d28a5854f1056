"""Whether two models learn alike: the gradients of one loss on the same tokens.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import LabError
from ..weights.parity import FLOAT64_STAGE, FP32_GRADIENTS, relative_errors
from .pairing import parameters
from .subject import Subject
from .trace import LOGITS, in_dtype, logits_of
from .usage import every_operation

# Gradients are as large as the weights: beyond this size they are compared on request only.
LARGEST = 400_000_000


def gradient_bound(dtype: str) -> float:
    return FLOAT64_STAGE if dtype == "float64" else FP32_GRADIENTS


def is_small(subject: Subject) -> bool:
    return sum(p.numel() for p in subject.module.parameters()) <= LARGEST


def tied(subject: Subject) -> bool:
    """Whether the head is the token embedding's matrix."""
    own = {ours: parameters(subject.module)[m.row.theirs] for m in subject.matches for ours in m.row.ours}
    return own.get(f"{LOGITS}.weight", own.get("tok_emb.weight")) is own.get("tok_emb.weight")


def gradient_errors(
    reference: Subject, candidate: Subject, input_ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """The relative gradient error of each parameter that both have, by the book's names.

    The loss is that of each next token; of models that return the last logits alone, that of one more token. Where no
    gradient arrives, it counts as zero.

    Raises:
        LabError: a model does not run.
    """
    kept = min(logits_of(subject, run(subject, input_ids), input_ids).shape[1] for subject in (reference, candidate))
    first, second = (gradients_of(subject, input_ids, kept, dtype) for subject in (reference, candidate))
    if tied(reference) or tied(candidate):
        # A tied matrix has the sum of both gradients, so two untied ones are compared by their sum.
        for subject, gradients in ((reference, first), (candidate, second)):
            head = gradients.pop(f"{LOGITS}.weight", None)
            if head is not None and not tied(subject):
                gradients["tok_emb.weight"] = gradients["tok_emb.weight"] + head
    shared = [name for name in first if name in second and first[name].shape == second[name].shape]
    if not shared:
        return {}
    return relative_errors({name: first[name] for name in shared}, {name: second[name] for name in shared})


def unreached(errors: dict[str, float]) -> list[str]:
    """The parameters whose gradient is zero where the reference's is not, which is an error of exactly 1."""
    return [name for name, error in errors.items() if error == 1.0]


def run(subject: Subject, input_ids: torch.Tensor) -> object:
    try:
        with torch.no_grad(), every_operation():
            return subject.run(input_ids)
    except Exception as error:  # whatever the user's class raises
        raise LabError(f"{subject.name} does not run: {type(error).__name__}: {error}") from error


@torch.enable_grad()
def gradients_of(
    subject: Subject, input_ids: torch.Tensor, kept: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The gradients of the mean loss of the last `kept` logits, by the book's names. The model's own stay as they are.

    Raises:
        LabError: the backward pass fails.
    """
    with differentiable(subject.module), in_dtype(subject.module, dtype), every_operation():
        own = parameters(subject.module)
        try:
            logits = logits_of(subject, subject.run(input_ids), input_ids)[:, -kept:]  # (B, T, V)
            targets = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)[:, -kept:]
            if kept > 1:  # of the last token nobody knows the next
                logits, targets = logits[:, :-1], targets[:, :-1]
            if logits.requires_grad:
                F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        except Exception as error:  # whatever the user's class raises
            raise LabError(
                f"the gradients of {subject.name} cannot be computed, so it cannot be trained: {type(error).__name__}: "
                f"{str(error)[:300]}; --no-gradients compares the logits alone"
            ) from error
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in own.items()}
        return subject.in_book_names(gradients)


@contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """All parameters with gradients, even frozen ones, and without those that they have; afterwards as before."""
    before = [(p, p.grad, p.requires_grad) for p in module.parameters() if p.is_floating_point()]
    for parameter, _, _ in before:
        parameter.grad = None
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, gradient, wanted in before:
            parameter.grad = None
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
