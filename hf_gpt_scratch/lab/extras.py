"""What no experiment on the logits shows: parameters beyond GPT-2's, blocks that are one object, gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..errors import few
from ..weights.parity import FP32_LOGITS
from .compare import Comparison, compare_models, errors
from .diagnose import Diagnosis, Fault, diagnose, named_blocks
from .gradients import gradient_bound, unreached
from .pairing import parameters
from .subject import Subject
from .trace import LOGITS, trace
from .weight_faults import listed


@contextmanager
def with_values(candidate: Subject, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """The candidate with other values in some parameters; afterwards as before."""
    own = parameters(candidate.module)
    before = {name: own[name].detach().clone() for name in values}
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)


@torch.no_grad()
def acting(candidate: Subject, input_ids: torch.Tensor) -> list[str]:
    """The candidate's parameters beyond GPT-2's that change its logits, each tried with random values."""
    own, generator = parameters(candidate.module), torch.Generator().manual_seed(1)
    before, found = trace(candidate, input_ids)[LOGITS], []
    for name in candidate.extras:
        if own[name].is_floating_point() and own[name].requires_grad:
            other = own[name] + torch.randn(own[name].shape, generator=generator)
            with with_values(candidate, {name: other}):
                if not errors(before, trace(candidate, input_ids)[LOGITS])[2] <= FP32_LOGITS:
                    found.append(name)
    return found


@torch.no_grad()
def diagnosed_without_extras(comparison: Comparison, reference: Subject, candidate: Subject) -> Diagnosis:
    """What is wrong besides the candidate's own parameters, which are set to zeros or ones, whichever is closer."""
    own, input_ids = parameters(candidate.module), torch.tensor(comparison.tokens)
    target = comparison.traces[0][LOGITS]
    neutral: dict[str, torch.Tensor] = {name: torch.zeros_like(own[name]) for name in comparison.extras}
    tried = 0
    for name in comparison.extras:
        off = {}
        for value in (torch.zeros_like(own[name]), torch.ones_like(own[name])):
            tried += 1
            with with_values(candidate, {**neutral, name: value}):
                off[errors(target, trace(candidate, input_ids)[LOGITS])[2]] = value
        neutral[name] = off[min(off)]
    zeros = [{name: torch.zeros_like(own[name]) for name in neutral}] if any(v.any() for v in neutral.values()) else []
    for values in (neutral, *zeros):  # what is closer may be so by chance
        with with_values(candidate, values):
            without = compare_models(reference, candidate, input_ids)
            rest = diagnose(without, reference, candidate)
        if rest is None or rest.explained:
            neutral = values
            break
    shown = ", ".join(f"{name} {'ones' if neutral[name].any() else 'zeros'}" for name in comparison.extras[:4])
    fault = Fault(
        "extra-parameters",
        f"{few(comparison.extras, 4)}: GPT-2 has no such parameters, and they change the logits",
        few(comparison.extras, 6),
        f"build the layers without them, such as nn.Linear(…, bias=False); as they are, they must be {shown}",
        "weights",
        error=without.logits.relative_error,
    )
    error = comparison.logits.relative_error
    if rest is None:
        return Diagnosis([fault], without.equivalent, error, without.logits.relative_error, tried)
    return replace(rest, faults=[fault, *rest.faults], error=error, tried=rest.tried + tried)


def name_shared_blocks(diagnosis: Diagnosis, shared: list[int]) -> None:
    """Names the cause of blocks that hold another's weights because they are one object."""
    for i, fault in enumerate(diagnosis.faults):
        if fault.name == "block-order":
            diagnosis.faults[i] = replace(
                fault,
                name="shared-blocks",
                says=f"{named_blocks(shared)} are one object, and so have one set of weights",
                remedy="make a new block for each layer: nn.ModuleList(Block(cfg) for _ in range(n_layers))",
                blocks=[],
            )


def gradient_fault(comparison: Comparison) -> Diagnosis:
    """Which parameters learn otherwise than the reference's although the logits are equal: an observation, no proof."""
    gradients = comparison.gradients or {}
    none = unreached(gradients)
    wrong = none or [name for name, error in gradients.items() if not error <= gradient_bound(comparison.dtype)]
    if none:
        says = f"no gradient reaches {listed(none)}"
        remedy = "look for .detach(), .data, .item() and torch.no_grad() where these are used, or behind them"
    else:
        says = f"the gradients of {listed(wrong)} differ"
        remedy = (
            "look for what the backward pass treats otherwise: .detach() on one path, hooks, own autograd functions"
        )
    name = "no-gradient" if none else "other-gradients"
    fault = Fault(name, says, listed(wrong), remedy, "gradients")
    logits = comparison.logits.relative_error
    return Diagnosis([fault], True, comparison.worst_gradient[1], logits, 0)
