"""What an unexplained stage depends on, by perturbation: of the tokens, and of the candidate's own weights.

Shapes: B batch, T tokens.
"""

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


def by_token(stage: str, recorded: torch.Tensor) -> torch.Tensor:
    """The values that a stage has for each token, (B, T, …)."""
    if stage.endswith("att.weights"):  # (B, H, T, T)
        return recorded.transpose(1, 2)
    return recorded.expand(1, *recorded.shape) if recorded.ndim == 2 else recorded


def of_tokens(
    run: Callable[[torch.Tensor], Activations], stage: str, recorded: torch.Tensor, input_ids: torch.Tensor, vocab: int
) -> list[str]:
    """Whether a token changes the stage at earlier positions, at its own, and in another sequence."""
    batch, tokens = input_ids.shape
    before = by_token(stage, recorded)
    if before.ndim < 3 or before.shape[:2] != (batch, tokens):
        return [f"{stage} has the shape {tuple(recorded.shape)}"]
    changed = input_ids.clone()
    middle = tokens // 2
    changed[0, middle] = (changed[0, middle] + 1) % vocab
    again = run(changed).get(stage)
    after = before if again is None else by_token(stage, again)
    if after.shape != before.shape:
        return [f"{stage} has a shape that depends on the tokens"]
    differs = ~torch.isclose(before, after, rtol=1e-9, atol=1e-12, equal_nan=True).flatten(2).all(-1)  # (B, T)
    says = []
    if differs[0, :middle].any():
        says.append(f"{stage} at a position depends on later tokens")
    if not differs[0, middle]:
        says.append(f"{stage} at a position does not depend on the token there")
    if middle + 1 < tokens and not differs[0, middle + 1 :].any() and mixes(stage):
        says.append(f"{stage} at a position does not depend on earlier tokens")
    if differs[1:].any():
        says.append(f"{stage} of one sequence depends on another sequence of the batch")
    return says or [f"{stage} depends on its own token and on earlier ones of its own sequence, as it should"]


def mixes(stage: str) -> bool:
    """Whether a stage should depend on earlier tokens: all from the first attention weights on."""
    own = ("tok_emb", "pos_emb", *(f"trf_blocks.0.{name}" for name in ("input", "norm1", "att.W_")))
    return not stage.startswith(own)
