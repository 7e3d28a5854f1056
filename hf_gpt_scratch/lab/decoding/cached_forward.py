"""A generation with the cache of a candidate's forward pass, for a candidate whose own generation does not use it."""

import inspect
import re
from typing import Any

import torch
from torch import nn

from .decoders import MEANINGS, Decoder
from .recording import Run

CACHES = (
    "past_key_values",
    "past_key_value",
    "past",
    "past_kv",
    "past_kvs",
    "kv_cache",
    "kv_caches",
    "cache",
    "caches",
    "layer_past",
    "kv",
    "cached_kv",
    "present",
)
STARTS = ("start_pos", "start", "offset", "pos_offset", "past_len", "past_length", "position", "start_position")
POSITIONS = ("input_pos", "cache_position", "position_ids", "positions", "pos")
RESETS = (
    "reset_kv_cache",
    "reset_cache",
    "clear_kv_cache",
    "clear_cache",
    "clear_caches",
    "reset_caches",
    "empty_cache",
    "init_cache",
    "reset",
)
# Of other names, those that say that something is emptied, and not the weights.
EMPTIES = re.compile(r"^(?!.*(param|weight|grad|init)).*(reset|clear|empty|flush|forget)")


def reset_method(module: nn.Module) -> str | None:
    """The method that empties the module's cache, if its name tells."""
    known = next((name for name in RESETS if callable(getattr(module, name, None))), None)
    own = [name for name in dir(type(module)) if not hasattr(nn.Module, name) and EMPTIES.search(name)]
    return known or next((name for name in own if takes_nothing(getattr(module, name))), None)


def takes_nothing(value: Any) -> bool:
    if not callable(value):
        return False
    return all(p.default is not p.empty for p in inspect.signature(value).parameters.values())


def forward_decoder(module: nn.Module) -> Decoder | None:
    """The decoder, or None if the forward pass has no cache that its parameters tell.

    Where all that they tell is where to start, whether there is a cache is to be seen: see `remembers`.
    """
    accepted = inspect.signature(type(module).forward).parameters
    flag, cache, start = cache_parameters(module)
    if flag is None and cache is None and start is None:
        return None
    positions = next((n for n, p in accepted.items() if n in POSITIONS and p.default is p.empty), None)
    reset = reset_method(module)

    def loop(model: nn.Module, ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        if reset is not None:
            getattr(model, reset)()
        kept, fed, seen = None, ids, 0
        for _ in range(max_new_tokens):
            arguments: dict[str, Any] = {} if flag is None else {flag: True}
            if cache is not None:
                arguments[cache] = kept
            if start is not None:
                arguments[start] = seen
            if positions is not None:
                arguments[positions] = torch.arange(seen, seen + fed.shape[1])
            output = model(fed, **arguments)
            logits, returned = split(output)
            if cache is not None:
                if returned is None:
                    raise ValueError(f"forward takes {cache}, but returns none with its logits")
                kept = returned
            seen += fed.shape[1]
            fed = logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, fed], dim=1)
        return ids

    name = f"{type(module).__name__}.forward with {cache or flag or start}"
    parameters = {"model": "model", "ids": "ids", "max_new_tokens": "max_new_tokens"}
    # A cache that is handed over is new for each prompt, and places written over from the start on need not be emptied.
    return Decoder(name, loop, parameters, empties=cache is not None or reset is not None or start is not None)


def cache_parameters(module: nn.Module) -> tuple[str | None, str | None, str | None]:
    """The parameters of the forward pass that say to use a cache, that are one, and where to start in it."""
    accepted = inspect.signature(type(module).forward).parameters
    flag = next(
        (n for n, p in accepted.items() if MEANINGS.get(n) == "use_cache" and isinstance(p.default, bool)), None
    )
    cache = next((n for n, p in accepted.items() if n in CACHES and not isinstance(p.default, bool)), None)
    return flag, cache, next((n for n in accepted if n in STARTS), None)


def remembers(module: nn.Module, run: Run) -> bool:
    """Whether there is a cache: if no parameter tells, later passes have more keys than they are given tokens."""
    told = any(cache_parameters(module)[:2])
    return told or any(call.keys > call.ids.shape[1] for call in run.calls[1:])


def split(output: Any) -> tuple[torch.Tensor, Any]:
    """Logits, and the cache, of what a forward pass returns."""
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, tuple | list):
        return output[0], next((item for item in output[1:] if item is not None and not is_loss(item)), None)
    kept = next((getattr(output, name) for name in CACHES if getattr(output, name, None) is not None), None)
    return output.logits, kept


def is_loss(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 0
