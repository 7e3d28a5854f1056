"""What an unexplained stage depends on, by perturbation: of the tokens, and of the candidate's own weights.

Shapes: B batch, T tokens.
"""

import re
from collections.abc import Callable
from contextlib import suppress

import torch

from ..errors import LabError
from .search import Outcome
from .trace import LOGITS, Activations


def observations(run: Callable[[torch.Tensor], Activations], outcome: Outcome, input_ids: torch.Tensor) -> list[str]:
    """What the first unexplained stage depends on, against what it should depend on; sentences.

    Args:
        run: the candidate's trace on tokens (B, T).
        input_ids: the tokens of the search.
    """
    experiment = outcome.experiment
    stage = outcome.unexplained[0] if outcome.unexplained else LOGITS
    recorded = experiment.activations.get(stage)
    if recorded is None:
        return []
    says = broken(stage, recorded)
    with suppress(LabError):
        says += of_tokens(run, stage, recorded, input_ids, experiment.config.vocab_size)
    return says


def broken(stage: str, recorded: torch.Tensor) -> list[str]:
    bad = (~recorded.isfinite()).sum().item()
    return [f"{bad} of {recorded.numel()} values of {stage} are NaN or infinite"] if bad else []


def of_tokens(
    run: Callable[[torch.Tensor], Activations], stage: str, before: torch.Tensor, input_ids: torch.Tensor, vocab: int
) -> list[str]:
    """Whether a token changes the stage at earlier positions, at its own, and in another sequence."""
    if before.ndim < 3 or before.shape[0] != len(input_ids) or re.search(r"att\.weights$", stage):
        stage, before = LOGITS, run(input_ids)[LOGITS]
    batch, tokens = input_ids.shape
    if before.shape[:2] != (batch, tokens):
        return []
    changed = input_ids.clone()
    middle = tokens // 2
    changed[0, middle] = (changed[0, middle] + 1) % vocab
    after = run(changed).get(stage)
    if after is None or after.shape != before.shape:
        return []
    differs = ~torch.isclose(before, after, rtol=1e-9, atol=1e-12, equal_nan=True).flatten(2).all(-1)  # (B, T)
    says = []
    if differs[0, :middle].any():
        says.append(f"{stage} at a position depends on later tokens")
    if not differs[0, middle]:
        says.append(f"{stage} at a position does not depend on the token there")
    if middle + 1 < tokens and not differs[0, middle + 1 :].any() and not stage.startswith(("tok", "pos")):
        says.append(f"{stage} at a position does not depend on earlier tokens")
    if differs[1:].any():
        says.append(f"{stage} of one sequence depends on another sequence of the batch")
    return says or [
        f"{stage} depends on the tokens that it should: on its own and the earlier ones, in its own sequence"
    ]
