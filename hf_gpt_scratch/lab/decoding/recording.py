"""What a decoder does while it generates, and the candidate's own forward pass with other positions and masks.

Shapes: B batch, T tokens, C context_length, E emb_dim, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..trace import DROPOUT, KERNEL, SOFTMAX

DRAWS = (torch.multinomial, torch.Tensor.multinomial)
LOOKUPS = (F.embedding, torch.embedding)
# Operations that pick rows of a table of positions.
PICKS = (torch.Tensor.__getitem__, torch.index_select, torch.Tensor.index_select, torch.narrow, torch.Tensor.narrow)
DIVISIONS = (
    torch.Tensor.__truediv__,
    torch.Tensor.__itruediv__,
    torch.Tensor.div,
    torch.Tensor.div_,
    torch.Tensor.true_divide,
    torch.div,
)
# What makes random numbers, for a race that draws without torch.multinomial.
NOISE = ("rand", "rand_like", "exponential_", "uniform_")
# Scores below this are masked, whatever the mask's fill value is.
MASKED = -1e4


@dataclass(frozen=True)
class Tables:
    """The parameters that tell what a model is given and what it answers: embeddings and head."""

    tokens: torch.Tensor
    positions: torch.Tensor | None
    head: torch.Tensor

    @classmethod
    def of(cls, module: nn.Module, vocab_size: int, context_length: int) -> "Tables | None":
        """Found by their shapes: the first and the last of V rows, and that of C rows."""
        shaped = [p for p in module.parameters() if p.ndim == 2]
        tokens = [p for p in shaped if p.shape[0] == vocab_size] or [p for p in shaped if p.shape[1] == vocab_size]
        positions = [p for p in shaped if p.shape[0] == context_length]
        if not tokens:
            return None
        return cls(tokens[0], positions[0] if len(positions) == 1 else None, tokens[-1])


@dataclass
class Call:
    """One forward pass: ids (B, T), positions if they were looked up, and logits (B, T or 1, V).

    `keys` is the largest number of keys that its attention has scores for, 0 if it was not seen.
    """

    ids: torch.Tensor
    keys: int = 0
    positions: list[int] | None = None
    logits: torch.Tensor | None = None

    @property
    def last(self) -> torch.Tensor:
        assert self.logits is not None
        return self.logits[:, -1]  # (B, V)


@dataclass
class Draw:
    """One sampling: probabilities (B, columns) as given to torch.multinomial, and the forward pass before it.

    `raced`: they are those of a race of random numbers, if these are of the right kind.
    """

    probabilities: torch.Tensor
    call: int
    raced: bool = False

    @property
    def certain(self) -> bool:
        shares = self.probabilities.double()
        return bool((shares.amax(-1) > (1 - 1e-6) * shares.sum(-1)).all())


@dataclass
class Run:
    """One call of a decoder: prompts, new ids, forward passes, samplings.

    `most`: the tokens that the context holds.
    """

    prompts: list[list[int]]
    most: int = 1_000_000
    new: list[list[int]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    divided: list[tuple[float, bool]] = field(default_factory=list)  # by what, and whether probabilities
    trained: bool = False
    error: Exception | None = None

    @property
    def failure(self) -> str:
        return f"{type(self.error).__name__}: {self.error}" if self.error else ""


def same_memory(value: Any, table: torch.Tensor | None) -> bool:
    return table is not None and isinstance(value, torch.Tensor) and value.data_ptr() == table.data_ptr()


class TooLong(RuntimeError):
    """A decoder that does not come to an end."""


class Recorder(TorchFunctionMode):
    """Records forward passes and samplings in `run`.

    Args:
        most: forward passes after which it stops with `TooLong`.
        choose: the column to draw, from probabilities (B, columns); None draws at random.
    """

    def __init__(
        self, run: Run, tables: Tables, vocab_size: int, most: int, choose: Callable | None = None, dropout=True
    ):
        super().__init__()
        self.dropout = dropout
        self.run, self.tables, self.vocab_size, self.most, self.choose = run, tables, vocab_size, most, choose
        self.early: list[int] | None = None
        self.coarsest = torch.float64
        self.noise: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DRAWS:
            return self.draw(func, args, kwargs)
        if not self.dropout and func in DROPOUT:
            return args[0] if args else kwargs["input"]
        if not self.dropout and func is KERNEL:
            args, kwargs = args[:4], {**kwargs, "dropout_p": 0.0} | dict(zip(("is_causal",), args[5:6], strict=False))
        if not self.dropout and func is F.multi_head_attention_forward:
            kwargs = {**kwargs, "training": False}
        args, kwargs = self.changed(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.see(func, args, kwargs, result)
            return self.race(func, args, result)
        return result

    def race(self, func, args, result: torch.Tensor) -> torch.Tensor:
        """Records a draw that is the argmax of probabilities / exponential noise, or of logits + Gumbel noise."""
        name = getattr(func, "__name__", "")
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        noisy = [any(arg is one for one in self.noise) for arg in tensors]
        if name in NOISE or (noisy and all(noisy)):
            self.noise.append(result)
        elif noisy.count(True) == 1 == noisy.count(False) and result.shape[-1:] == (self.vocab_size,):
            other = tensors[noisy.index(False)]
            if name.strip("_") in ("add", "iadd", "radd", "sub", "isub"):
                other = other.softmax(-1)
            elif noisy[0] or name.strip("_") not in ("div", "truediv", "itruediv", "true_divide"):
                return result
            self.run.draws.append(Draw(other.detach().clone(), len(self.run.calls) - 1, raced=True))
            if self.choose is not None:
                best = torch.zeros_like(result)
                return best.scatter(-1, self.choose(other).reshape(*result.shape[:-1], 1), 1.0)
        return result

    def changed(self, func, args, kwargs):
        return args, kwargs

    def see(self, func, args, kwargs, result: torch.Tensor) -> None:
        if result.is_floating_point() and result.ndim > 1 and result.dtype.itemsize < self.coarsest.itemsize:
            self.coarsest = result.dtype
        if func in LOOKUPS:
            ids, weight = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"]
            if func is torch.embedding:
                ids, weight = weight, ids
            if same_memory(weight, self.tables.positions):
                self.saw_positions(ids)
            elif same_memory(weight, self.tables.tokens):
                self.saw_ids(ids)
        elif func in PICKS and same_memory(args[0], self.tables.positions) and args[0].shape[0] > 1:
            with contextlib.suppress(IndexError, RuntimeError):
                self.saw_positions(func(torch.arange(args[0].shape[0])[:, None], *args[1:], **kwargs)[..., 0])
        elif func is torch.Tensor.__getitem__ and same_memory(args[0], self.tables.tokens):
            if isinstance(args[1], torch.Tensor) and not args[1].is_floating_point():
                self.saw_ids(args[1])
        elif self.is_logits(args, result):
            self.saw_logits(result)
        elif func in SOFTMAX or func is KERNEL:
            self.saw_scores(args[1].shape[-2] if func is KERNEL and len(args) > 1 else result.shape[-1])
        if self.run.calls and func in DIVISIONS and len(args) > 1 and isinstance(args[1], float | int):
            before = result * args[1]
            sums = before.sum(-1) if before.is_floating_point() and before.ndim else before
            is_distribution = bool(
                torch.isfinite(sums).all() and (before >= 0).all() and ((sums - 1).abs() < 1e-4).all()
            )
            self.run.divided.append((float(args[1]), is_distribution))

    def is_logits(self, args, result: torch.Tensor) -> bool:
        """Whether it is a product with the head's matrix, and not a view of that."""
        wide = result.ndim > 1 and result.shape[-1] == self.vocab_size
        return (
            wide
            and any(same_memory(arg, self.tables.head) for arg in args)
            and not same_memory(result, self.tables.head)
        )

    def saw_positions(self, positions: torch.Tensor) -> None:
        found = (positions if positions.ndim < 2 else positions[0]).reshape(-1).tolist()
        calls = self.run.calls
        if calls and calls[-1].positions is None and calls[-1].logits is None:
            calls[-1].positions = found
        else:
            self.early = found

    def saw_ids(self, ids: torch.Tensor) -> None:
        if len(self.run.calls) >= self.most:
            raise TooLong(f"it does not stop: {self.most} forward passes")
        self.run.calls.append(Call(ids.detach().clone().reshape(-1, ids.shape[-1]) if ids.ndim else ids.reshape(1, 1)))
        self.run.calls[-1].positions, self.early = self.early, None

    def saw_scores(self, keys: int) -> None:
        if self.run.calls and self.run.calls[-1].logits is None:
            self.run.calls[-1].keys = max(self.run.calls[-1].keys, keys)

    def saw_logits(self, logits: torch.Tensor) -> None:
        if self.run.calls:
            kept = logits.detach().clone()
            self.run.calls[-1].logits = kept if kept.ndim == 3 else kept[:, None]

    def draw(self, func, args, kwargs):
        probabilities = args[0] if args else kwargs["input"]
        self.run.draws.append(Draw(probabilities.detach().clone(), len(self.run.calls) - 1))
        if self.choose is None:
            return func(*args, **kwargs)
        chosen = self.choose(probabilities)
        return chosen.reshape(*probabilities.shape[:-1], 1)


def most_probable(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.argmax(-1)


class Replay(Recorder):
    """The candidate's own forward pass with other positions, and another mask.

    Args:
        positions: of the T tokens, or None.
        visible: (T, T), True where the row's token sees the column's, or None. Works on attention in which the scores
            are the result of a product and softmax follows, and on torch's fused one.
    """

    def __init__(self, run, tables, vocab_size, positions: list[int] | None, visible: torch.Tensor | None):
        super().__init__(run, tables, vocab_size, most=4)
        self.positions, self.visible = positions, visible
        self.products: list[torch.Tensor] = []

    def changed(self, func, args, kwargs):
        if self.positions is not None:
            wanted = torch.tensor(self.positions)
            if func is F.embedding and same_memory(
                args[1] if len(args) > 1 else kwargs["weight"], self.tables.positions
            ):
                ids = args[0] if args else kwargs.pop("input")
                return (wanted.expand(ids.shape), *args[1:]), kwargs
            if func in PICKS and same_memory(args[0], self.tables.positions):
                raise Picked(wanted)
        if self.visible is not None:
            if func is KERNEL:
                return (*args[:3],), {
                    **{k: v for k, v in kwargs.items() if k in ("query", "key", "value", "scale")},
                    "attn_mask": self.visible,
                }
            if func in SOFTMAX:
                scores = args[0] if args else kwargs.pop("input")
                if scores.ndim >= 2 and scores.shape[-2:] == self.visible.shape:
                    return (self.masked_scores(scores), *args[1:]), kwargs
        return args, kwargs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except Picked as picked:
            return args[0][picked.positions]

    def see(self, func, args, kwargs, result):
        super().see(func, args, kwargs, result)
        square = self.visible is not None and result.ndim >= 2 and result.shape[-2:] == self.visible.shape
        if square and result.is_floating_point() and func not in SOFTMAX:
            self.products = [*self.products[-7:], result.detach().clone()]

    def masked_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """The scores with our mask in place of theirs: of the product that equals them but for mask and scale."""
        assert self.visible is not None
        seen = scores > MASKED
        rounding = 1e-9 if scores.dtype == torch.float64 else 1e-5
        for product in self.products:
            if product.shape != scores.shape or not torch.isfinite(product).all() or bool((product < MASKED).any()):
                continue
            raw = product.to(scores.dtype)
            place = int(torch.where(seen, raw.abs(), 0).argmax())
            scale = scores.flatten()[place] / raw.flatten()[place]
            if torch.allclose(scores[seen], (scale * raw)[seen], rtol=rounding, atol=rounding):
                return (scale * raw).masked_fill(~self.visible, -math.inf)
        raise NotReplayable("the scores before the mask were not found")


class Picked(Exception):
    """Rows of the table of positions are picked; these instead."""

    def __init__(self, positions: torch.Tensor):
        super().__init__()
        self.positions = positions


class NotReplayable(Exception):
    """The candidate's forward pass does not run with another mask or other positions."""


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()
