"""Whether an official checkpoint and one of ours are the same model."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import ConversionError
from .formats.directory import Weights
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
    """Compares an official checkpoint with one of ours: weights bit for bit, outputs and greedy ids in float32.

    Args:
        reference: directory or hub id of the official checkpoint.
        candidate: directory or hub id of ours.

    Raises:
        ConversionError: one of them cannot be read, or they are models of different kinds.
    """
    try:
        official, ours = Weights(find_source(reference), "gpt2"), Weights(find_source(candidate), "gpt_scratch")
        if official.ours is not ours.ours:
            kinds = f"{reference} is a {official.ours.gpt2_class.__name__}, but {candidate} is a {ours.ours.__name__}"
            raise ConversionError(f"{kinds}; give two checkpoints of the same kind")
        theirs, own = official.in_our_names(), ours.tensors()
        different = differing(theirs, own)
        if any(theirs[name].shape != own[name].shape for name in theirs.keys() & own.keys()):
            return Verdict(None, different)
        with quiet_transformers():
            gpt2 = official.ours.gpt2_class.from_pretrained(official.directory, dtype=torch.float32)
            scratch = ours.ours.from_pretrained(ours.directory, dtype=torch.float32)
        for model in (gpt2, scratch):
            model.config.return_dict = True
        figures = measure(gpt2, scratch, same_weights=not different)
        return Verdict(figures, different, differing_settings(gpt2, scratch))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConversionError(str(error)) from error
