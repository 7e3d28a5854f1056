"""Whether two checkpoints, official or ours, are the same model."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import ConversionError, shortened
from ..model.config_translation import model_type_of
from .formats.directory import PREFIXES, Weights, config_of
from .hub import find_source, quiet_transformers
from .parity import Verification, differing, differing_settings, measure


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`; `figures` is None if the two models have tensors of different shapes."""

    figures: Verification | None
    different_tensors: list[str] = field(default_factory=list)
    different_settings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether they are the same model: the same logits and greedy ids, equal weights, the same settings."""
        return self.figures is not None and self.figures.passed and not self.different_settings

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return (self.figures.to_dict() if self.figures else {}) | {
            "passed": self.passed,
            "different_tensors": self.different_tensors,
            "different_settings": self.different_settings,
        }

    def __str__(self) -> str:
        text = f"in float32; {self.figures}" if self.figures else "of other sizes"
        more = f" and {len(self.different_tensors) - 5} more" if len(self.different_tensors) > 5 else ""
        if self.different_tensors:
            text += f". Different tensors: {', '.join(self.different_tensors[:5])}{more}"
        if self.different_settings:
            text += f". Different settings: {'; '.join(self.different_settings)}"
        return text


def verify(reference: str | os.PathLike, candidate: str | os.PathLike) -> Verdict:
    """Compares two checkpoints, official or ours: weights bit for bit, outputs and greedy ids in float32.

    Args:
        reference: directory or hub id of the one that errors are relative to, such as the official one.
        candidate: directory or hub id of the other.

    Raises:
        ConversionError: one of them cannot be read, or they are models of different kinds.
    """
    try:
        right, other = _weights(reference), _weights(candidate)
        if right.ours is not other.ours:
            kinds = f"{reference} is a {right.model_class.__name__}, but {candidate} is a {other.model_class.__name__}"
            raise ConversionError(f"{kinds}; give two checkpoints of the same kind")
        theirs, own = right.in_our_names(), other.in_our_names()
        different = differing(theirs, own)
        if any(theirs[name].shape != own[name].shape for name in theirs.keys() & own.keys()):
            return Verdict(None, different)
        with quiet_transformers():
            first, second = (
                one.model_class.from_pretrained(one.directory, dtype=torch.float32) for one in (right, other)
            )
        for model in (first, second):
            model.config.return_dict = True
        figures = measure(first, second, same_weights=not different)
        return Verdict(figures, different, differing_settings(first, second))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConversionError(str(error)) from error


def _weights(name: str | os.PathLike) -> Weights:
    directory = find_source(name)
    values = config_of(directory)
    model_type = model_type_of(values) if isinstance(values, dict) else None
    if model_type not in (None, *PREFIXES):
        known = " and ".join(map(repr, PREFIXES))
        raise ConversionError(
            f"{name} holds a model of type {shortened(repr(model_type))}, but verify compares {known}"
        )
    return Weights(directory, model_type or "gpt2")
