"""GPT-2's forward pass as small operations with parameters, the slots, independent of the model in `model/`.

An edit is a slot with another value than GPT-2's, in one place or several. A value is computed when it is asked for,
and what was recorded in the candidate can be given instead of computed, so that each stage can be tried by itself.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H, I n_inner, V vocabulary, C context_length.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .trace import LOGITS

QKV = ("W_query", "W_key", "W_value")

Weights = Mapping[str, torch.Tensor]  # in the book's names and layout
# What a module reads: values with their factors. A value is a name, or a module's name with what it reads here.
Operand = Any
Sum = tuple[tuple[Operand, float], ...]
Edits = Mapping[int, Mapping[str, Any]]  # slot -> value by place: -1 before the blocks, n block n, n_layers behind them


def plus(*operands: Operand) -> Sum:
    return tuple((operand, 1.0) for operand in operands)


# What each module reads, and what a block returns.
WIRING: dict[str, Sum] = {
    "norm1.input": plus("input"),
    "att.input": plus("norm1"),
    "norm2.input": plus("input", "att"),
    "ff.input": plus("norm2"),
    "output": plus("input", "att", "ff"),
}
NORMS = ("norm1", "norm2", "final_norm")
LINEARS = (*QKV, "out_proj", "ff.layers.0", "ff.layers.2")
# Every slot, with GPT-2's value.
GPT2: dict[str, Any] = {
    "tokens": "",  # which tokens are looked up, of TOKENS
    # First position and step, perhaps "up to" a last one or "modulo" a number of them; or the name of one of POSITIONS.
    "positions": (0, 1),
    "embedded": plus("tok_emb", "pos_emb"),
    "input": plus("previous"),  # what a place reads: the result of the place before
    **WIRING,
    "owner": None,  # another block, whose weights this one has
    **{f"{norm}.dims": (-1,) for norm in NORMS},  # over which mean and variance are taken
    **{f"{norm}.formula": "" for norm in NORMS},  # one of FORMULAS
    **{f"{norm}.affine": "" for norm in NORMS},  # one of AFFINE
    **{f"{norm}.eps": None for norm in NORMS},  # another than the config's
    **{f"{norm}.eps_on_std": False for norm in NORMS},
    **{f"{norm}.unbiased": False for norm in NORMS},
    **{f"{norm}.weights": "" for norm in NORMS},  # those of another norm
    **{f"{layer}.transposed": False for layer in LINEARS},
    **{f"{layer}.bias": 1.0 for layer in LINEARS},  # how often it is added
    **{f"{layer}.input": () for layer in QKV},  # what it reads, if not what attention reads
    "out_proj": True,  # whether it is applied
    "qkv": (0, 1, 2),  # which projection serves as query, key, value
    "qkv.layout": "3hd",  # the order of query/key/value, heads and D in the three projections side by side
    "n_heads": None,  # another number than the config's
    "split": "thd",  # the order in which a projection is viewed before the heads move to the front
    "over": "tokens",  # what attends to each other: tokens, heads or the batch
    "rotary": "",  # rotary positions on queries and keys, of "halves" or "pairs"
    "parts": ("", ""),  # which of queries, keys and values, "qkv", are changed, and how: one of CHANGES
    "scores": "",  # how the scores are changed before the mask, and the attention weights behind it: see `changed`
    "weights": "",
    "scale": "",  # of the scores: one of SCALES, or a number
    "distance": 0.0,  # factor of a penalty for distance, as ALiBi's
    "mask": (None, 0),  # how many tokens behind and ahead are seen; None is all
    "fill": ("set", -math.inf),  # what masked scores are set to, or what is added to them
    "mask_after": False,  # the softmax
    "softmax": "keys",  # over what, or what is in its place
    "weights_transposed": False,  # the attention weights, before they are applied to the values
    "merge": "thd",  # the order of the context vectors' dimensions when the heads are joined
    "activation": None,  # another than the config's: see `activate`
    "head.input": plus("final_norm"),
    "head": LOGITS,  # whose matrix
    "logits": "",  # what is done to them: see `returned`
}
# Module -> the stages of its input and output, without the block.
MODULES = {
    "norm1": ("norm1.input", "norm1"),
    "norm2": ("norm2.input", "norm2"),
    "att": ("att.W_query.input", "att.out_proj"),
    "ff": ("ff.layers.0.input", "ff.layers.2"),
}
# Stage -> the slot of what is read there.
READS = {
    "norm1.input": "norm1.input",
    "att.W_query.input": "att.input",
    "norm2.input": "norm2.input",
    "ff.layers.0.input": "ff.input",
    "": "output",
}


class Circular(ValueError):
    """A value was asked for while it was being computed: these edits make no forward pass."""


class Forward:
    """A forward pass with edits; `forward[stage]` is a stage's value, of those in `trace.stages` and their inputs.

    Args:
        input_ids: (B, T).
        wrong: the edits.
        given: stages that are not computed, but for `target`, the one that is asked for.

    `read` are the slots that were consulted, by place; `taken` the given stages that were used.
    """

    def __init__(
        self,
        weights: Weights,
        config: GPTScratchConfig,
        input_ids: torch.Tensor,
        wrong: Edits,
        given: Weights | None = None,
        target: str = "",
    ):
        self.weights, self.config, self.input_ids, self.wrong = weights, config, input_ids, wrong
        self.given, self.target = given or {}, target
        self.computed: dict[str, Any] = {}
        self.running: set[str] = set()
        self.read: set[tuple[int, str]] = set()
        self.taken: set[str] = set()

    def slot(self, place: int, name: str) -> Any:
        self.read.add((place, name))
        return self.wrong.get(place, {}).get(name, GPT2[name])

    def __getitem__(self, stage: str) -> torch.Tensor:
        if stage in self.given and stage != self.target:
            self.taken.add(stage)
            return self.given[stage]
        return self.remember(stage, lambda: self.compute(stage))

    def remember(self, key: str, compute: Any) -> Any:
        if key not in self.computed:
            if key in self.running:
                raise Circular(key)
            self.running.add(key)
            try:
                self.computed[key] = compute()
            finally:
                self.running.discard(key)
        return self.computed[key]

    def compute(self, stage: str) -> torch.Tensor:
        """A stage's value, from the given ones before it."""
        last = self.config.n_layers
        if block := re.fullmatch(r"trf_blocks\.(\d+)\.?(.*)", stage):
            return self.in_block(int(block[1]), block[2])
        if stage == "tok_emb":
            return self.weights["tok_emb.weight"][looked_up(self.input_ids, self.slot(-1, "tokens"), self.config)]
        if stage == "pos_emb":
            return positions(self.weights["pos_emb.weight"], self.input_ids, self.slot(-1, "positions"))
        if stage == "embedded":
            return self.sum(self.slot(-1, "embedded"), -1)
        if stage == "final_norm.input":
            return self.sum(self.slot(last, "input"), last)
        if stage == "final_norm":
            return self.norm(last, "final_norm", self["final_norm.input"])
        if stage == f"{LOGITS}.input":
            return self.sum(self.slot(last, "head.input"), last)
        if stage == LOGITS:
            x = F.linear(self[f"{LOGITS}.input"], self.weights[f"{self.slot(last, 'head')}.weight"])
            return returned(x, self.slot(last, "logits"))
        raise KeyError(stage)

    def in_block(self, n: int, stage: str) -> torch.Tensor:
        block = f"trf_blocks.{n}"
        if stage == "input":
            return self.sum(self.slot(n, "input"), n)
        if stage in READS:
            own = self.slot(n, "W_query.input") if stage == "att.W_query.input" else ()
            return self.sum(own or self.slot(n, READS[stage]), n)
        if stage in NORMS:
            return self.norm(n, stage, self[f"{block}.{stage}.input"])
        if stage.removeprefix("att.") in QKV:
            return self.linear(n, stage, self.projected(n, stage.removeprefix("att.")))
        if stage == "att.weights":
            return self.attention_weights(n)
        if stage == "att.out_proj.input":
            return self.context(n)
        if stage == "att.out_proj":
            x = self[f"{block}.att.out_proj.input"]
            return self.linear(n, stage, x) if self.slot(n, "out_proj") else x
        if stage == "ff.layers.0":
            return self.linear(n, stage, self[f"{block}.ff.layers.0.input"])
        if stage == "ff.layers.2.input":
            return self.activated(n, self[f"{block}.ff.layers.0"])
        if stage == "ff.layers.2":
            return self.linear(n, stage, self[f"{block}.ff.layers.2.input"])
        raise KeyError(stage)

    # What is read

    def projected(self, n: int, name: str) -> torch.Tensor:
        """What W_query, W_key or W_value reads (B, T, E); what the first reads is recorded as what attention reads."""
        if name != "W_query" and (own := self.slot(n, f"{name}.input")):
            return self.sum(own, n)
        if name != "W_query" and self.slot(n, "W_query.input"):
            return self.sum(self.slot(n, "att.input"), n)
        return self[f"trf_blocks.{n}.att.W_query.input"]

    def sum(self, operands: Sum, n: int) -> torch.Tensor:
        """What a place's module reads (B, T, E)."""
        x = self.weights["tok_emb.weight"].new_zeros(*self.input_ids.shape, self.config.emb_dim)
        for operand, factor in operands:
            x = x + factor * self.operand(operand, n)
        return x

    def operand(self, operand: Operand, n: int) -> torch.Tensor:
        last = self.config.n_layers
        if isinstance(operand, tuple):
            return self.applied(operand[0], self.sum(operand[1], n), n)
        if operand in ("previous", "two before"):
            before = n - (1 if operand == "previous" else 2)
            return self["embedded" if before < 0 else f"trf_blocks.{before}"]
        if operand in ("embedded", "tok_emb", "pos_emb", "final_norm"):
            return self[operand]
        if operand == "input":
            return self["final_norm.input" if n == last else f"trf_blocks.{n}.input"]
        if number := re.fullmatch(r"block (\d+)", operand):
            return self[f"trf_blocks.{number[1]}"]
        return self[f"trf_blocks.{n}.{MODULES[operand][1]}"]

    def applied(self, module: str, x: torch.Tensor, n: int) -> torch.Tensor:
        """The result of a module for another input than its own."""
        if other := re.fullmatch(r"block (\d+)'s (\w+)", module):
            n, module = int(other[1]), other[2]
        if module == "block before":
            module = f"block {n - 1}"
        if module == "act":
            return activate(x, self.config.activation_function)
        if module == "F.layer_norm":
            return F.layer_norm(x, x.shape[-1:], eps=self.config.layer_norm_epsilon)
        if module == "F.normalize":
            return F.normalize(x, dim=-1)
        if module == "final_norm":
            return self.norm(self.config.n_layers, module, x)
        start, end = ("input", "") if module.startswith("block") else MODULES[module]
        block = f"trf_blocks.{module.removeprefix('block ') if module.startswith('block') else n}"
        alone = Forward(self.weights, self.config, self.input_ids, self.wrong, {f"{block}.{start}": x})
        result = alone[f"{block}.{end}".rstrip(".")]
        self.read |= alone.read
        return result

    # Modules

    def norm(self, n: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """LayerNorm of x (B, T, E)."""
        parts = ("dims", "formula", "affine", "eps", "eps_on_std", "unbiased", "weights")
        dims, formula, affine, eps, on_std, unbiased, other = (self.slot(n, f"{name}.{part}") for part in parts)
        if formula == "identity":
            return x
        eps = self.config.layer_norm_epsilon if eps is None else eps
        owner = other or name
        owner = owner if owner == "final_norm" else f"{self.owner(min(n, self.config.n_layers - 1))}.{owner}"
        normed = normalised(x, dims, formula, eps, on_std, unbiased)
        return AFFINE[affine](normed, self.weights[f"{owner}.scale"], self.weights[f"{owner}.shift"])

    def owner(self, n: int) -> str:
        """The block whose weights block n has."""
        other = self.slot(n, "owner")
        return f"trf_blocks.{n if other is None else other}"

    def linear(self, n: int, name: str, x: torch.Tensor) -> torch.Tensor:
        """A linear layer of block n applied to x (…, in); (…, out)."""
        short = name.removeprefix("att.")
        layer = f"{self.owner(n)}.{name}"
        matrix, bias = self.weights[f"{layer}.weight"], self.weights.get(f"{layer}.bias")
        x = F.linear(x, matrix.T if self.slot(n, f"{short}.transposed") else matrix)
        times = self.slot(n, f"{short}.bias")
        return x if bias is None else x + times * bias

    def heads(self, n: int) -> list[torch.Tensor]:
        """Queries, keys and values, each (B, H, T, D), or with what attends to each other in place of T."""
        batch, tokens = self.input_ids.shape
        width, heads = self.config.emb_dim, self.n_heads(n)
        layout, split, turn = self.slot(n, "qkv.layout"), self.slot(n, "split"), self.slot(n, "over")
        parts = [self[f"trf_blocks.{n}.att.{QKV[i]}"] for i in self.slot(n, "qkv")]  # 3 of (B, T, E)
        if layout != "3hd":
            sizes = {"3": 3, "h": heads, "d": width // heads}
            together = torch.cat(parts, -1).view(batch, tokens, *(sizes[axis] for axis in layout))
            together = together.permute(0, 1, *(2 + layout.index(axis) for axis in "3hd"))
            parts = [part.reshape(batch, tokens, width) for part in together.unbind(2)]
        sizes = {"t": tokens, "h": heads, "d": width // heads}
        order = [1 + split.index(axis) for axis in "htd"]
        moved = [part.reshape(batch, *(sizes[axis] for axis in split)).permute(0, *order) for part in parts]
        if kind := self.slot(n, "rotary"):
            moved = [*(rotated(part, kind) for part in moved[:2]), moved[2]]
        which, change = self.slot(n, "parts")
        moved = [CHANGES[change](part) if name in which else part for name, part in zip("qkv", moved, strict=True)]
        return [turned(part, turn) for part in moved]

    def n_heads(self, n: int) -> int:
        return self.slot(n, "n_heads") or self.config.n_heads

    def scores(self, n: int) -> torch.Tensor:
        """The scores before the mask (B, H, T, T)."""
        q, k, _ = self.remember(f"heads {n}", lambda: self.heads(n))
        scale = self.slot(n, "scale")
        heads, width = self.n_heads(n), self.config.emb_dim
        if isinstance(scale, str):
            sizes = width // heads, width, heads, n, q.shape[2]
            scale = scale_of(scale, *sizes) if scale or self.config.scale_attn_weights else 1.0
        if self.config.scale_attn_by_inverse_layer_idx:
            scale = scale / (n + 1)
        scores = q @ k.transpose(2, 3) * scale
        if factor := self.slot(n, "distance"):
            rows, columns = (torch.arange(size, dtype=scores.dtype) for size in scores.shape[-2:])
            slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=scores.dtype) / heads)
            scores = scores - factor * slopes[:, None, None] * (rows[:, None] - columns)
        return changed(scores, self.slot(n, "scores"))

    def attention_weights(self, n: int) -> torch.Tensor:
        """The softmax of the masked scores (B, H, T, T)."""
        scores, (how, value), kind = self.scores(n), self.slot(n, "fill"), self.slot(n, "softmax")
        hidden = outside(scores, self.slot(n, "mask"))
        if not self.slot(n, "mask_after"):
            if how == "set":
                scores = scores.masked_fill(hidden, value)
            elif how == "multiply":
                scores = scores * ~hidden
            else:
                scores = scores + value * hidden
        return SOFTMAX[kind](scores)

    def context(self, n: int) -> torch.Tensor:
        """The context vectors (B, T, E)."""
        batch, tokens = self.input_ids.shape
        used = self[f"trf_blocks.{n}.att.weights"]
        if self.slot(n, "mask_after"):
            used = used.masked_fill(outside(used, self.slot(n, "mask")), 0.0)
        if self.slot(n, "weights_transposed"):
            used = used.mT
        used = changed(used, self.slot(n, "weights"))
        values = self.remember(f"heads {n}", lambda: self.heads(n))[2]
        context = turned(used @ values, self.slot(n, "over"))  # (B, H, T, D)
        order = [1 + "htd".index(axis) for axis in self.slot(n, "merge")]
        return context.permute(0, *order).reshape(batch, tokens, -1)

    def activated(self, n: int, x: torch.Tensor) -> torch.Tensor:
        return activate(x, self.slot(n, "activation") or self.config.activation_function)


# The operations


TOKENS = {
    "shifted right": lambda ids: ids.roll(1, 1),
    "shifted left": lambda ids: ids.roll(-1, 1),
    "shifted right, first twice": lambda ids: torch.cat([ids[:, :1], ids[:, :-1]], 1),
    "shifted right, 0 first": lambda ids: torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1),
    "shifted left, last twice": lambda ids: torch.cat([ids[:, 1:], ids[:, -1:]], 1),
    "shifted left, 0 last": lambda ids: torch.cat([ids[:, 1:], torch.zeros_like(ids[:, :1])], 1),
    "reversed": lambda ids: ids.flip(1),
    "the other sequence's": lambda ids: ids.roll(1, 0),
}


def looked_up(input_ids: torch.Tensor, kind: str, config: GPTScratchConfig) -> torch.Tensor:
    """The tokens whose embeddings are read (B, T)."""
    if kind in ("plus 1", "minus 1"):
        return (input_ids + (1 if kind == "plus 1" else -1)) % config.vocab_size
    return TOKENS[kind](input_ids) if kind else input_ids


def positions(table: torch.Tensor, input_ids: torch.Tensor, kind: Any) -> torch.Tensor:
    """The position embedding (T, E), or (B, T, E) of token ids as positions."""
    tokens, (rows, width) = input_ids.shape[1], table.shape
    steps = torch.arange(tokens)
    if kind == "tokens":
        return table[input_ids % rows]
    if kind == "sequences":
        return table[torch.arange(len(input_ids)) % rows][:, None]
    if kind in ("sinusoidal", "sinusoidal, halves"):
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=table.dtype) / width)
        angles = steps.to(table.dtype)[:, None] * frequencies
        waves = [angles.sin(), angles.cos()]
        return torch.cat(waves, -1) if "halves" in kind else torch.stack(waves, -1).flatten(-2)
    if kind == "reversed":
        steps = steps.flip(0)
    elif kind == "from the end":
        steps = rows - 1 - steps
    elif kind == "last":
        steps = rows - tokens + steps
    else:
        start, step, *end = kind
        steps = start + step * steps
        if end:
            steps = steps.clamp(max=end[1]) if end[0] == "up to" else steps % end[1]
    return table[steps.clamp(0, rows - 1)]


def normalised(x, dims: tuple[int, ...], formula: str, eps: float, on_std: bool, unbiased: bool) -> torch.Tensor:
    """x with mean 0 and variance 1 over `dims`, or what another formula makes of it."""
    mean = x.sum(dims, keepdim=True) if formula.startswith("sum as mean") else x.mean(dims, keepdim=True)
    centred = x if formula in ("rms", "not centred") else x - mean
    if formula == "centred only":
        return centred
    if formula in ("mean of magnitudes", "largest magnitude"):
        sizes = centred.abs()
        return centred / ((sizes.mean(dims, keepdim=True) if "mean" in formula else sizes.amax(dims, True)) + eps)
    if formula in ("rms", "centred over rms"):
        variance = x.square().mean(dims, keepdim=True)
    elif formula.endswith("sum of squares"):
        variance = centred.square().sum(dims, keepdim=True)
    elif formula == "sum as mean, throughout":
        variance = centred.square().mean(dims, keepdim=True)
    else:
        variance = x.var(dims, keepdim=True, unbiased=unbiased)
    if formula == "no root":
        return centred / (variance + eps)
    if formula == "multiplied":
        return centred * (variance + eps).sqrt()
    if formula == "L2 norm":
        return x / (x.norm(dim=dims, keepdim=True) + eps)
    deviation = variance.sqrt() + eps if on_std else (variance + eps).sqrt()
    return x - mean / deviation if formula == "precedence" else centred / deviation


FORMULAS = {
    "rms": "divides by the root mean square without subtracting the mean (RMSNorm)",
    "not centred": "does not subtract the mean",
    "centred over rms": "divides the centred input by the input's root mean square, not by its standard deviation",
    "centred only": "subtracts the mean, but does not divide by the standard deviation",
    "no root": "divides by the variance, not by its root",
    "multiplied": "multiplies by the standard deviation instead of dividing",
    "mean of magnitudes": "divides by the mean magnitude, not by the standard deviation",
    "largest magnitude": "divides by the largest magnitude, not by the standard deviation",
    "L2 norm": "divides by the Euclidean length, not by the standard deviation",
    "sum of squares": "divides by the root of the sum of squares, not by that of their mean",
    "sum as mean": "subtracts the sum, not the mean",
    "sum as mean, throughout": "subtracts the sum, not the mean, also for the variance",
    "sum as mean, sum of squares": "takes sums in place of means, for mean and variance",
    "precedence": "divides only the mean by the standard deviation: x - mean / std lacks brackets",
    "identity": "returns its input",
}
AFFINE = {
    "": lambda x, scale, shift: x * scale + shift,
    "no shift": lambda x, scale, shift: x * scale,
    "no scale": lambda x, scale, shift: x + shift,
    "neither": lambda x, scale, shift: x,
    "shift first": lambda x, scale, shift: (x + shift) * scale,
    "one more scale": lambda x, scale, shift: x * (1 + scale) + shift,
    "divided": lambda x, scale, shift: x / scale + shift,
    "swapped": lambda x, scale, shift: x * shift + scale,
    "minus shift": lambda x, scale, shift: x * scale - shift,
    "scale twice": lambda x, scale, shift: x * scale * scale + shift,
    "shift twice": lambda x, scale, shift: x * scale + 2 * shift,
}
SCALES = {
    "none": lambda head, width, heads, n, t: 1.0,
    "twice": lambda head, width, heads, n, t: 1 / head,
    "emb_dim": lambda head, width, heads, n, t: width**-0.5,
    "n_heads": lambda head, width, heads, n, t: heads**-0.5,
    "times": lambda head, width, heads, n, t: head**0.5,
    "by emb_dim without root": lambda head, width, heads, n, t: 1 / width,
    "by n_heads without root": lambda head, width, heads, n, t: 1 / heads,
    "fourth root": lambda head, width, heads, n, t: head**-0.25,
    "thrice": lambda head, width, heads, n, t: head**-1.5,
    "by half of head_dim": lambda head, width, heads, n, t: (head / 2) ** -0.5,
    "by 2 head_dim": lambda head, width, heads, n, t: (2 * head) ** -0.5,
    "by the number of tokens": lambda head, width, heads, n, t: t**-0.5,
    "negative": lambda head, width, heads, n, t: -(head**-0.5),
    "by layer": lambda head, width, heads, n, t: head**-0.5 / (n + 1),
    "by layer without head_dim": lambda head, width, heads, n, t: 1 / (n + 1),
    "times layer": lambda head, width, heads, n, t: head**-0.5 * (n + 1),
}


def scale_of(name: str, head: int, width: int, heads: int, n: int, t: int) -> float:
    """The factor of the scores of block n for t tokens."""
    return SCALES[name](head, width, heads, n, t) if name else head**-0.5


def normal_over(scores: torch.Tensor, dim: Any) -> torch.Tensor:
    exponentials = (scores - scores.amax(dim, keepdim=True).clamp(min=-1e300)).exp()
    return exponentials / exponentials.sum(dim, keepdim=True)


SOFTMAX = {
    "keys": lambda scores: scores.softmax(-1),
    "keys, 0 if none": lambda scores: scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0),
    "queries": lambda scores: scores.softmax(-2),
    "heads": lambda scores: scores.softmax(1),
    "batch": lambda scores: scores.softmax(0),
    "keys and queries": lambda scores: normal_over(scores, (-2, -1)),
    "log": lambda scores: scores.log_softmax(-1).masked_fill(scores == -math.inf, 0.0),
    "twice": lambda scores: scores.softmax(-1).softmax(-1),
    "plus one behind the maximum": lambda scores: (
        (e := (scores - scores.amax(-1, keepdim=True)).exp()) / (1 + e.sum(-1, keepdim=True))
    ),
    "plus one": lambda scores: scores.exp() / (1 + scores.exp().sum(-1, keepdim=True)),
    "none": lambda scores: scores.masked_fill(scores == -math.inf, 0.0),
    "exponential": lambda scores: scores.exp(),
    "sigmoid": lambda scores: scores.sigmoid(),
    "relu": lambda scores: scores.relu(),
    "sum": lambda scores: scores / scores.sum(-1, keepdim=True),
}


# Changes of queries, keys, values (B, H, T, D), or of scores and attention weights (B, H, T, T).
CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "averaged over the heads": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "summed over the heads": lambda x: x.sum(1, keepdim=True).expand_as(x),
    "those of the first head in all heads": lambda x: x[:, :1].expand_as(x),
    "those of the last head in all heads": lambda x: x[:, -1:].expand_as(x),
    "in the reverse order of heads": lambda x: x.flip(1),
    "taken without their sign": torch.abs,
    "put through a ReLU": torch.relu,
    "put through a tanh": torch.tanh,
    "squared": torch.square,
    "scaled to length 1": lambda x: F.normalize(x, dim=-1),
    "normalized to mean 0 and variance 1": lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-5),
    "put through a softmax": lambda x: x.softmax(-1),
    "those of the token before, the last one's first": lambda x: x.roll(1, 2),
    "those of the token before, 0 first": lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :-1],
    "those of the next token, the first one's last": lambda x: x.roll(-1, 2),
    "in the reverse order of tokens": lambda x: x.flip(2),
    "summed over the tokens so far": lambda x: x.cumsum(2),
    "averaged over all tokens": lambda x: x.mean(2, keepdim=True).expand_as(x),
    "those of the other sequence": lambda x: x.roll(1, 0),
    "split by .view(B, H, T, D) without transpose": lambda x: x.transpose(1, 2).reshape(x.shape),
    "split by .view(B, T, D, H)": lambda x: x.transpose(1, 2).reshape(len(x), x.shape[2], -1, x.shape[1]).movedim(3, 1),
}


def changed(x: torch.Tensor, change: Any) -> torch.Tensor:
    """Scores or attention weights (B, H, T, T) as changed: one of CHANGES, ("clamped", least, most), or ("factors", one
    for each head)."""
    if isinstance(change, str):
        return CHANGES[change](x)
    kind, *figures = change
    if kind == "clamped":
        return x.clamp(*figures)
    return x * torch.tensor(figures, dtype=x.dtype)[:, None, None]


def outside(scores: torch.Tensor, band: tuple[int | None, int | None]) -> torch.Tensor:
    """Where a mask hides a score (…, T, T): True for what is further behind or ahead than the band."""
    behind, ahead = band
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = ~ones
    if ahead is not None:
        hidden |= ones.triu(ahead + 1)
    if behind is not None:
        hidden |= ones.tril(-behind - 1)
    return hidden


def turned(x: torch.Tensor, over: str) -> torch.Tensor:
    """(B, H, T, D) with what attends to each other at the place of T, and back."""
    return {"tokens": lambda: x, "heads": lambda: x.transpose(1, 2), "batch": lambda: x.transpose(0, 2)}[over]()


def rotated(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Rotary positions on x (B, H, T, D), with base 10000."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = (x[..., :half], x[..., half:]) if kind == "halves" else (x[..., 0::2], x[..., 1::2])
    both = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(both, -1) if kind == "halves" else torch.stack(both, -1).flatten(-2)


def activate(x: torch.Tensor, kind: Any) -> torch.Tensor:
    """An activation: a name in ACT2FN, or ("tanh gelu", a, b), ("sigmoid", k), ("leaky", slope), ("times", c, kind),
    ("twice", kind)."""
    if isinstance(kind, str):
        return ACT2FN[kind](x)
    name, *figures = kind
    if name == "tanh gelu":
        a, b = figures
        return 0.5 * x * (1 + (b * (x + a * x**3)).tanh())
    if name == "sigmoid":
        return x * (figures[0] * x).sigmoid()
    if name == "leaky":
        return F.leaky_relu(x, figures[0])
    if name == "times":
        return figures[0] * activate(x, figures[1])
    if name == "twice":
        return activate(activate(x, figures[0]), figures[0])
    return PLAIN[name](x)


PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "softsign": F.softsign,
    "sine": torch.sin,
    "absolute value": torch.abs,
    "GELU with x² in place of x³": lambda x: 0.5 * x * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**2)).tanh()),
    "GELU without 1 +": lambda x: 0.5 * x * ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh(),
    "GELU without x before the bracket": lambda x: 0.5 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),
    "Φ(x) without x": lambda x: 0.5 * (1 + (x / 2**0.5).erf()),
}


def returned(x: torch.Tensor, kind: Any) -> torch.Tensor:
    """What is made of the logits (B, T, V): a name, ("times", c), ("cap", c), ("rolled", tokens)."""
    if not kind:
        return x
    name, *figures = kind if isinstance(kind, tuple) else (kind,)
    if name == "times":
        return figures[0] * x
    if name == "cap":
        return figures[0] * (x / figures[0]).tanh()
    if name == "rolled":
        return x.roll(figures[0], 1)
    return OUTPUTS[name](x)


OUTPUTS = {
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax over tokens": lambda x: x.log_softmax(1),
    "softmax over tokens": lambda x: x.softmax(1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "negative": torch.neg,
    "reversed": lambda x: x.flip(1),
}


def everywhere(n_layers: int) -> range:
    """All places: before the blocks, each block, and behind them."""
    return range(-1, n_layers + 1)
