"""What an unexplained stage depends on, by perturbation: of the tokens, and of the candidate's own weights.

Shapes: B batch, T tokens, E emb_dim, H heads.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress

import torch

from ..errors import LabError
from .search import FAILURES, Experiment, Outcome
from .trace import LOGITS, Activations

# So few token ids for which alone a stage differs are named.
FEW = 3


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
    says = broken(stage, recorded) or of_places(experiment, stage, recorded)
    with suppress(LabError):
        says += of_tokens(run, stage, recorded, input_ids, experiment.config.vocab_size)
    return says


def broken(stage: str, recorded: torch.Tensor) -> list[str]:
    bad = (~recorded.isfinite()).sum().item()
    return [f"{bad} of {recorded.numel()} values of {stage} are NaN or infinite"] if bad else []


def numbered(word: str, numbers: Iterable[int]) -> str:
    """head 3; heads 3 and 7; heads 2, 3 and 7; heads 2 to 7."""
    found = sorted(numbers)
    if len(found) == 1:
        return f"{word} {found[0]}"
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{word}s {found[0]} to {found[-1]}"
    return f"{word}s {', '.join(map(str, found[:-1]))} and {found[-1]}"


def of_places(experiment: Experiment, stage: str, recorded: torch.Tensor) -> list[str]:
    """Where alone the stage differs from what GPT-2 computes there: in some heads, at some positions, for some ids."""
    try:
        right = experiment.forward(stage).compute(stage).expand(recorded.shape)
    except FAILURES:
        return []
    off = (recorded - right).abs() > experiment.bound * right.abs().max()  # (B, T, E), (B, H, T, T) or (T, E)
    if stage.endswith(("att.out_proj.input", "att.W_query", "att.W_key", "att.W_value")) and off.ndim == 3:
        off = off.unflatten(-1, (experiment.config.n_heads, -1)).transpose(1, 2)
    heads, ids, says = off.ndim == 4, experiment.input_ids, []
    by_token = off.any(-1).any(1) if heads else off.any(-1)
    if by_token.shape == ids.shape:
        wrong_ids = set(ids[by_token].tolist())
        if 0 < len(wrong_ids) <= FEW and not wrong_ids & set(ids[~by_token].tolist()):
            says.append(f"{stage} differs only for {numbered('token id', wrong_ids)}")
    for word, dim in (("head", -3), ("position", -2)) if heads else (("position", -2),):
        wrong = off.transpose(dim, 0).flatten(1).any(1)
        everywhere = word == "head" or torch.equal(by_token, by_token.any(0).expand_as(by_token))
        if 0 < wrong.sum() < len(wrong) and (everywhere or not says):
            says.append(f"{stage} differs only at {numbered(word, wrong.nonzero().flatten().tolist())}")
    return says


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
    if differs[0, middle + 1 :].any() and not mixes(stage):
        says.append(f"{stage} at a position depends on earlier tokens")
    others = "and on earlier ones of its own sequence" if mixes(stage) else "alone"
    return says or [f"{stage} depends on its own token {others}, as it should"]


def mixes(stage: str) -> bool:
    """Whether a stage should depend on earlier tokens: all from the first attention weights on."""
    own = ("tok_emb", "pos_emb", *(f"trf_blocks.0.{name}" for name in ("input", "norm1", "att.W_")))
    return not stage.startswith(own)
