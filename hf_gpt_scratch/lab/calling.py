"""How a model of your own is called, and where in what it returns the logits are.

Shapes: B batch, T tokens, V vocabulary.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import LabError

# What a required argument of `forward` besides the tokens is given, by words in its name. What a mask means differs
# from model to model, so it is asked for.
NOTHING = ("target", "label", "cache", "past", "kv", "state", "loss", "memory")
FROM_ZERO = ("start", "offset", "position_offset", "step", "index", "pos")
FUNCTION = (
    "a function that does, def run(model, input_ids): …, and give it with --forward run (in Python: my_forward=run)"
)
SWITCHES = ("train", "return", "use", "output", "debug", "verbose")


def arguments_of(forward: Callable[..., Any], name: str) -> dict[str, Any]:
    """The values for what `forward` requires besides the tokens.

    Raises:
        LabError: one has no obvious value; the message says how to give it.
    """
    given: dict[str, Any] = {}
    try:
        accepted = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return given
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    required = [p.name for p in accepted[1:] if p.default is p.empty and p.kind in kinds]
    for argument in required:
        words = argument.lower()
        if argument in ("y", "ys") or any(word in words for word in NOTHING):
            given[argument] = None
        elif any(words.startswith(word) for word in SWITCHES):
            given[argument] = False
        elif any(word in words for word in FROM_ZERO) and "mask" not in words and "ids" not in words:
            given[argument] = 0
        else:
            tokens = accepted[0].name if accepted else "input_ids"
            raise LabError(
                f"forward of {name} requires {argument!r} besides {tokens}, and the lab does not know what to give it; "
                f"write a function that does, def run(model, input_ids): return model(input_ids, {argument}=…), in the "
                "same file, and name it with --forward run (in Python: my_forward=run)"
            )
    return given


def wants_targets(forward: Callable[..., Any]) -> str | None:
    """The optional argument for the next tokens, without which some models return the last position's logits alone."""
    try:
        accepted = inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in accepted if name.lower() in ("targets", "target", "labels", "y")), None)


def tensors_in(output: Any, depth: int = 3) -> Iterator[tuple[str, torch.Tensor]]:
    """The floating tensors in a model's output with their names: in mappings, sequences and objects' attributes."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield "", output
        return
    if depth == 0 or output is None or isinstance(output, str | int | float | nn.Module):
        return
    if isinstance(output, Mapping):
        inside = [(str(name), value) for name, value in output.items()]
    elif isinstance(output, tuple | list):
        fields = getattr(output, "_fields", [str(i) for i in range(len(output))])
        inside = list(zip(fields, output, strict=True))
    elif dataclasses.is_dataclass(output):
        inside = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    else:
        inside = list(getattr(output, "__dict__", {}).items())
    for name, value in inside:
        for within, tensor in tensors_in(value, depth - 1):
            yield f"{name}.{within}".rstrip("."), tensor


def logits_in(output: Any, tokens: torch.Size, vocab_size: int | None, name: str) -> torch.Tensor:
    """The logits (B, T, V) in what a model returns for `tokens` (B, T).

    They are what is called logits, or the one tensor with a vocabulary's size in its last dimension. A missing batch
    dimension, or one that was joined with the tokens', is put back.

    Raises:
        LabError: there is none, or there are several.
    """
    found = list(tensors_in(output))
    named = [tensor for label, tensor in found if label.rpartition(".")[2].lower() == "logits"]
    sized = [(label, t) for label, t in found if t.ndim in (2, 3) and (vocab_size is None or t.shape[-1] >= vocab_size)]
    exact = [(label, tensor) for label, tensor in sized if tensor.shape[-1] == vocab_size]
    if named:
        chosen = named[0]
    elif isinstance(output, torch.Tensor):
        chosen = output
    elif len(exact or sized) == 1:
        chosen = (exact or sized)[0][1]
    elif not sized:
        shapes = ", ".join(f"{label or 'a tensor'} {tuple(tensor.shape)}" for label, tensor in found) or "no tensor"
        raise LabError(
            f"{name} returns {type(output).__name__} instead of logits (B, T, V): it has {shapes}; return them, alone "
            f"or under the name logits, or write {FUNCTION}"
        )
    else:
        several = ", ".join(label for label, _ in exact or sized)
        raise LabError(
            f"{name} returns several tensors that may be the logits: {several}; call one of them logits, or write "
            f"{FUNCTION}"
        )
    batch, length = tokens
    if chosen.ndim == 2 and chosen.shape[0] == batch * length:
        chosen = chosen.reshape(batch, length, -1)
    elif chosen.ndim == 2 and chosen.shape[0] == batch:
        chosen = chosen.unsqueeze(1)
    if chosen.ndim != 3 or (vocab_size is not None and chosen.shape[-1] < vocab_size):
        raise LabError(
            f"{name} returns {tuple(chosen.shape)} instead of logits (B, T, V) = ({batch}, {length}, "
            f"{vocab_size or 'V'}); return them, or write {FUNCTION}"
        )
    return chosen


def own_caller(
    module: nn.Module, name: str, notes: list[str], my_forward: Callable[..., Any] | None = None
) -> Callable[[torch.Tensor], Any]:
    """Calls a model of your own on token ids (B, T); what it is given besides is noted.

    Args:
        my_forward: a function of the model and the ids, instead of the model itself.

    Raises:
        LabError: `forward` requires something unknown.
    """
    if my_forward is not None:
        return lambda input_ids: my_forward(module, input_ids)
    given = arguments_of(module.forward, name)
    if given:
        notes.append(f"{name} is called with " + ", ".join(f"{key}={value}" for key, value in given.items()))
    targets = wants_targets(module.forward)

    def call(input_ids: torch.Tensor) -> Any:
        output = module(input_ids, **given)
        last_only = [tensor for _, tensor in tensors_in(output) if tensor.ndim == 3]
        if targets and last_only and all(tensor.shape[1] == 1 < input_ids.shape[1] for tensor in last_only):
            return module(input_ids, **{**given, targets: input_ids})
        return output

    return call
