"""Recording the stages of parameters that are in no module of their own, as in x @ self.w + self.b.

Shapes: B batch, T tokens, E emb_dim, V vocabulary.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .pairing import Match

# What a recorded product may differ from the product of what was recorded: rounding, in float32 and float64.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}
LOOKUPS = (torch.Tensor.__getitem__, F.embedding, torch.embedding, torch.index_select, torch.Tensor.index_select)


@dataclass
class Bare:
    """A weight matrix with its bias, by the stages that it makes side by side, `names`.

    `matrix` is in the book's layout, [out, in]; `product` is what was multiplied last, before the bias was added.
    """

    names: tuple[str, ...]
    matrix: torch.Tensor
    bias: torch.Tensor | None = None
    product: torch.Tensor | None = None

    @property
    def input(self) -> str:
        """The stage of what it reads."""
        return next((name for name in self.names if name.endswith("W_query")), self.names[0]) + ".input"


class BareRecorder(TorchFunctionMode):
    """Records inputs and results of the operations on parameters whose stages no hook can record.

    A parameter is known by its storage, so that it may be transposed or reshaped. A product is recorded only if it is
    the one of its input and the whole matrix, as GPT-2 has it: what the heads or another order make of it first is no
    stage. A norm is recorded if it is one operation.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], matches: list[Match], input_ids: torch.Tensor):
        super().__init__()
        self.input_ids = input_ids
        self.paused = 0
        self.found: dict[str, torch.Tensor] = {}
        self.linears: dict[int, Bare] = {}  # by the storage of the weight
        self.biases: dict[int, Bare] = {}
        self.norms: dict[int, str] = {}
        self.tables: dict[int, str] = {}
        self.whole: dict[int, int] = {}  # the size of each storage's parameter
        by_stage: dict[tuple[str, ...], Bare] = {}
        stored = [place_of(parameters[match.row.theirs]) for match in matches]
        biases = []
        for match, place in zip(matches, stored, strict=True):
            tensor, kind = parameters[match.row.theirs].detach(), re.sub(r"\[.*", "", match.row.ours[0]).rpartition(".")
            names = tuple(re.sub(r"\.\w+(?=\[|$)", "", name) for name in match.row.ours)
            self.whole[place] = tensor.numel()
            if kind[0].endswith("_emb"):
                self.tables[place] = names[0]
            if "norm" in kind[0]:
                self.norms |= {place: names[0]} if kind[2] == "scale" and stored.count(place) == 1 else {}
            elif kind[2] == "bias":
                biases.append((names, place, torch.cat(match.row.to_ours(tensor))))
            elif kind[0] != "pos_emb" and (stored.count(place) == 1 or kind[0] in ("tok_emb", "out_head")):
                names = ("out_head",) if kind[0] == "tok_emb" else names
                by_stage[names] = self.linears[place] = Bare(names, torch.cat(match.row.to_ours(tensor)))
        for names, place, bias in biases:
            if names in by_stage and stored.count(place) == 1:
                self.biases[place] = by_stage[names]
                by_stage[names].bias = bias

    def pause(self, *_: Any) -> None:
        """Looks away while a module runs that hooks record."""
        self.paused += 1

    def go_on(self, *_: Any) -> None:
        self.paused -= 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.paused and isinstance(result, torch.Tensor) and result.is_floating_point():
            inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            self.look(func, inputs, result)
        return result

    def look(self, func: Any, inputs: list[torch.Tensor], result: torch.Tensor) -> None:
        """Records what an operation on a parameter shows."""
        others = [value for value in inputs if place_of(value) not in self.whole and value.is_floating_point()]
        for value in inputs:
            place = place_of(value)
            if place not in self.whole:
                continue
            if place in self.tables and self.is_lookup(func, place, others, result):
                self.keep(self.tables[place], result)
            elif value.numel() != self.whole[place] or not others:
                continue
            elif place in self.norms and func is F.layer_norm:
                self.keep(f"{self.norms[place]}.input", others[0])
                self.keep(self.norms[place], result)
            elif place in self.linears:
                self.multiplied(self.linears[place], others[0], result)
            elif place in self.biases:
                self.added(self.biases[place], others[0], result)

    def is_lookup(self, func: Any, place: int, others: list[torch.Tensor], result: torch.Tensor) -> bool:
        """Whether an operation looks up the tokens' rows of a table; those of positions may be a slice of it."""
        looks_up = func in LOOKUPS and place_of(result) != place
        slices = self.tables[place] == "pos_emb" and not others
        return (looks_up or slices) and result.shape[-2:-1] == self.input_ids.shape[1:]

    def multiplied(self, bare: Bare, x: torch.Tensor, result: torch.Tensor) -> None:
        """Records the input of a product, and its result if the bias was added, too."""
        rows, got = flat(x, bare.matrix.shape[1]), flat(result, bare.matrix.shape[0])
        if rows is None or got is None or len(rows) != len(got) or rows.dtype not in ROUNDING:
            return
        product = rows @ bare.matrix.T
        if bare.bias is not None and alike(product + bare.bias, got):
            self.keep_linear(bare, x, result)
        elif alike(product, got):
            self.keep(bare.input, x)
            bare.product = got.clone()
            if bare.bias is None and bare.names[0] != "out_head":
                self.keep_linear(bare, x, result)

    def added(self, bare: Bare, x: torch.Tensor, result: torch.Tensor) -> None:
        """Records the result of a layer whose bias was added to its product."""
        got = flat(result, bare.matrix.shape[0])
        if bare.bias is None or bare.product is None or got is None or len(got) != len(bare.product):
            return
        if alike(bare.product + bare.bias, got):
            self.keep_linear(bare, None, result)

    def keep_linear(self, bare: Bare, x: torch.Tensor | None, result: torch.Tensor) -> None:
        if x is not None:
            self.keep(bare.input, x)
        whole = flat(result, bare.matrix.shape[0])
        shape = self.token_shape(result, bare.matrix.shape[0])
        if whole is None or shape is None:
            return
        for name, part in zip(bare.names, whole.view(*shape, -1).chunk(len(bare.names), dim=-1), strict=True):
            self.keep(name, part)

    def token_shape(self, value: torch.Tensor, width: int) -> tuple[int, ...] | None:
        """(B, T), or (T, B) where tokens come first; None if a value has not one row for each token."""
        for shape in (self.input_ids.shape, self.input_ids.shape[::-1]):
            if value.shape[:2] == shape and value.shape[2:].numel() == width:
                return tuple(shape)
        rows = self.input_ids.numel()
        return tuple(self.input_ids.shape) if value.shape[0] == rows and value.shape[1:].numel() == width else None

    def keep(self, stage: str, value: torch.Tensor) -> None:
        """Of several calls the first counts; a copy, because later operations may be in place."""
        if stage.startswith("pos_emb") or stage == "tok_emb":
            self.found.setdefault(stage, value.detach().clone())
            return
        if re.search(r"att\.out_proj\[[^.]*$", stage):  # a head's part of it is no stage
            return
        shape = self.token_shape(value, value.numel() // max(self.input_ids.numel(), 1))
        if shape is None:
            return
        value = value.detach().reshape(*shape, -1)
        turned = shape != tuple(self.input_ids.shape)
        self.found.setdefault(stage, (value.transpose(0, 1) if turned else value).clone())


def place_of(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def flat(value: torch.Tensor, width: int) -> torch.Tensor | None:
    """The rows of this width; None if the value has no such rows."""
    return value.detach().reshape(-1, width) if value.numel() and value.numel() % width == 0 else None


def alike(wanted: torch.Tensor, got: torch.Tensor) -> bool:
    """Whether two results of one computation are equal within rounding, where they are finite."""
    sound = wanted.isfinite() & got.isfinite()
    if not sound.any() or not torch.equal(wanted.isfinite(), got.isfinite()):
        return False
    size = wanted[sound].abs().max().item()
    return (wanted - got)[sound].abs().max().item() <= ROUNDING.get(wanted.dtype, 0.0) * max(size, 1e-30)
