"""The functions and methods that generate, and what their parameters mean, by name.

A decoder is called with rows of ids and settings under our names (`SETTINGS`), and returns the new ids of each row.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ...errors import LabError

# What a parameter may mean, and the names that say so.
SETTINGS = {
    "model": "model net gpt lm network transformer",
    "ids": "idx ids input_ids in_idx tokens token_ids prompt prompts prompt_ids prompt_tokens input_tokens inputs "
    "context start_ids start encoded x batch seqs sequences rows",
    "max_new_tokens": "max_new_tokens max_new new_tokens num_new_tokens n_new num_tokens n_tokens max_tokens "
    "num_tokens_to_generate max_gen_len steps num_steps n_steps n num",
    "max_length": "max_length max_len total_len total_length length",
    "context_size": "context_size context_length block_size ctx_len ctx ctx_size max_context window n_ctx max_seq_len "
    "context_len seq_len",
    "temperature": "temperature temp tau",
    "top_k": "top_k topk k",
    "top_p": "top_p topp p nucleus nucleus_p",
    "eos_id": "eos_id eos_token_id eos eos_token stop stop_id stop_token stop_token_id end_id end_token end_token_id "
    "eot eot_id eot_token",
    "pad_id": "pad_id pad_token_id pad pad_token padding_id",
    "attention_mask": "attention_mask attn_mask mask padding_mask pad_mask",
    "lengths": "lengths prompt_lengths prompt_lens lens",
    "use_cache": "use_cache use_kv_cache kv_cache cache cached caching with_cache",
    "do_sample": "do_sample sample sampling",
    "greedy": "greedy",
    "num_beams": "num_beams beam_width beam_size n_beams beams width beam",
    "seed": "seed",
    "generator": "generator rng",
    "device": "device",
    "cfg": "cfg config model_config gpt_config",
}
MEANINGS = {name: setting for setting, names in SETTINGS.items() for name in names.split()}
GENERATES = re.compile(r"generat|sampl|decod|beam|greedy|complet")
# The book's function of this name takes the most probable token.
GREEDY_NAME = re.compile(r"greedy|^generate_text_simple")


class Undecided(LabError):
    """A parameter whose meaning its name does not tell."""


@dataclass(frozen=True)
class Decoder:
    """A function or method that generates.

    `parameters` maps our settings to its parameters, `defaults` to their defaults; `given` are other arguments, and
    `others` the defaults of settings that are unknown here. `form` is how it takes ids: a tensor (B, T) or (T,), a
    list, a list of lists. `keeps_prompt`: its result begins with the prompt. `length_is_total`: so does `max_length`.
    `empties`: it begins with an empty cache; what to call for that may be unknown.
    """

    name: str
    call: Callable[..., Any]
    parameters: Mapping[str, str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    form: str = "tensor"
    keeps_prompt: bool = True
    length_is_total: bool = True
    empties: bool = True

    def has(self, setting: str) -> bool:
        return setting in self.parameters

    @property
    def says_greedy(self) -> bool:
        return bool(GREEDY_NAME.search(self.name.rpartition(".")[2]))

    def __call__(self, model: nn.Module, rows: list[list[int]], new: int, **settings: Any) -> list[list[int]]:
        """The new ids of each row. Settings that it does not have are ignored."""
        length = new
        if not self.has("max_new_tokens") and self.length_is_total:
            length += max(map(len, rows))
        values = {"model": model, "max_new_tokens": new, "max_length": length, "device": "cpu", **settings}
        arguments = {p: values[s] for s, p in self.parameters.items() if s in values and s != "ids"}
        result = self.call(**{self.parameters["ids"]: as_form(rows, self.form), **arguments, **self.given})
        found = id_rows(result, len(rows))
        if (self.has("num_beams") or "beam" in self.name.lower()) and len(rows) == 1:
            found = found[:1]  # the best beam
        return self.new_ids(found, rows)

    def new_ids(self, result: list[list[int]], rows: list[list[int]]) -> list[list[int]]:
        if len(result) != len(rows):
            raise ValueError(f"it returns {len(result)} rows for {len(rows)} prompts")
        if not self.keeps_prompt:
            return result
        return [after(full, row) for full, row in zip(result, rows, strict=True)]


def after(full: list[int], row: list[int]) -> list[int]:
    """What follows a prompt in a result that may begin with padding."""
    for start in range(len(full) - len(row) + 1):
        if full[start : start + len(row)] == row:
            return full[start + len(row) :]
    return full


def as_form(rows: list[list[int]], form: str) -> Any:
    if form == "tensor":
        return torch.tensor(rows)
    if form == "vector":
        return torch.tensor(rows[0])
    if form == "tensors":
        return [torch.tensor(row) for row in rows]
    return [list(row) for row in rows] if form == "rows" else list(rows[0])


def is_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def id_rows(result: Any, batch: int) -> list[list[int]]:
    """The rows of ids in whatever a decoder returns or yields."""
    if inspect.isgenerator(result):
        steps = [torch.as_tensor(step).reshape(batch, -1) for step in result]
        return torch.cat(steps, dim=1).tolist() if steps else [[] for _ in range(batch)]
    while isinstance(result, tuple | list) and result and isinstance(result[0], tuple):
        result = result[0]  # beams with their scores, the best first
    if isinstance(result, tuple) and result:
        result = next((item for item in result if isinstance(item, list) or is_ids(item)), result[0])
    result = getattr(result, "sequences", result)
    if isinstance(result, torch.Tensor):
        if result.is_floating_point() or result.ndim not in (1, 2):
            raise ValueError(f"it returns a {result.dtype} tensor of shape {tuple(result.shape)}, not ids")
        return (result if result.ndim == 2 else result[None]).tolist()
    if isinstance(result, list) and all(isinstance(item, int) for item in result):
        return [result]
    if isinstance(result, list):
        rows = [item.flatten().tolist() if isinstance(item, torch.Tensor) else item for item in result]
        if batch == 1 and all(isinstance(row, list) and len(row) == 1 for row in rows):
            return [[row[0] for row in rows]]
        if all(isinstance(row, list) and all(isinstance(item, int) for item in row) for row in rows):
            return rows
    raise ValueError(f"it returns a {type(result).__name__}, not ids")


def understood(
    name: str, function: Callable[..., Any], method: bool, meanings: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Setting -> parameter, setting -> default, parameter -> fixed value, unknown parameter -> default if not empty.

    Raises:
        Undecided: a required parameter means nothing that is known.
    """
    accepted = list(inspect.signature(function).parameters.values())
    if method:
        accepted = accepted[1:]
    found: dict[str, str] = {}
    defaults: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    others: dict[str, Any] = {}
    unknown = []
    for parameter in accepted:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.name in meanings:
            meaning = meanings[parameter.name]
            if isinstance(meaning, dict):
                fixed[parameter.name] = meaning["value"]
                continue
        else:
            meaning = MEANINGS.get(parameter.name.lower().strip("_"))
        if meaning == "use_cache" and not isinstance(parameter.default, bool) and "use" not in parameter.name:
            meaning = None  # the cache itself
        if meaning == "top_k" and parameter.name == "k" and "beam" in name.lower():
            meaning = "num_beams"
        if meaning is None and inspect.isclass(parameter.annotation) and issubclass(parameter.annotation, nn.Module):
            meaning = "model"
        if meaning is None or meaning in found:
            if parameter.default is parameter.empty:
                unknown.append(parameter.name)
            elif parameter.default not in (None, False, (), ""):
                others[parameter.name] = parameter.default
            continue
        found[meaning] = parameter.name
        if parameter.default is not parameter.empty:
            defaults[meaning] = parameter.default
    for needed in ("ids",) if method else ("model", "ids"):
        if needed not in found and unknown:
            found[needed] = unknown.pop(0)
    if unknown:
        raise Undecided(
            f"{name}: the meaning of its parameter {unknown[0]!r} is unknown; say it with --decode-arguments "
            f'\'{{"{unknown[0]}": MEANING}}\', where MEANING is one of {", ".join(SETTINGS)}, or {{"value": …}}'
        )
    return found, defaults, fixed, others


def decoder(name: str, function: Callable[..., Any], meanings: Mapping[str, Any], method: str = "") -> Decoder:
    """A decoder of a function, or of a class's method of this name."""
    found, defaults, fixed, others = understood(name, function, bool(method), meanings)
    lacking = [s for s in ("ids", *(() if method else ("model",))) if s not in found]
    if "max_new_tokens" not in found and "max_length" not in found:
        lacking.append("max_new_tokens")
    if lacking:
        raise Undecided(
            f"{name} has no parameter for {', '.join(lacking)}; name it with --decode-arguments, as "
            f'\'{{"PARAMETER": "{lacking[0]}"}}\''
        )
    if not method:
        return Decoder(name, function, found, defaults, fixed, others)
    found["model"] = "model"
    return Decoder(name, lambda model, **arguments: getattr(model, method)(**arguments), found, defaults, fixed, others)


def find_decoders(
    module: ModuleType, model_class: type, generate: str | None, meanings: Mapping[str, Any]
) -> tuple[list[Decoder], list[str]]:
    """All functions of a file, and methods of a class, that generate; and why others are left out.

    Args:
        generate: the name of the only one to take: `function` or `method`.
        meanings: parameter -> setting, or {"value": …}, where the names do not tell.

    Raises:
        LabError: the one that is asked for does not exist or is not understood.
    """
    known = {name for setting in meanings.values() if not isinstance(setting, dict) for name in [setting]}
    if wrong := known - SETTINGS.keys():
        raise LabError(f"--decode-arguments: {sorted(wrong)[0]!r} is not one of {', '.join(SETTINGS)}")
    functions = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(inspect.unwrap(value) if callable(value) else value)
        and not (value.__module__ or "").startswith(("torch", "transformers."))
    }
    methods = {
        name: value
        for name, value in inspect.getmembers(model_class, callable)
        if not name.startswith("_")
        and not (getattr(value, "__module__", "") or "").startswith(("torch", "transformers."))
    }
    if generate is not None:
        if generate in methods and generate not in functions:
            return [decoder(f"{model_class.__name__}.{generate}", methods[generate], meanings, generate)], []
        if generate not in functions:
            raise LabError(
                f"there is no function or method {generate!r}; the functions are {', '.join(functions) or 'none'}"
            )
        return [decoder(generate, functions[generate], meanings)], []
    found, notes = [], []
    candidates = [(name, value, "") for name, value in functions.items()]
    candidates += [(f"{model_class.__name__}.{name}", value, name) for name, value in methods.items()]
    for name, value, method in candidates:
        if not GENERATES.search((method or name).lower()) or name.startswith("_"):
            continue
        try:
            found.append(decoder(name, value, meanings, method))
        except Undecided as error:
            if {"max_new_tokens", "max_length"} & {MEANINGS.get(p) for p in inspect.signature(value).parameters}:
                notes.append(str(error))
    return found, notes
