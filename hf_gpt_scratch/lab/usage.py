"""How a forward pass uses each parameter: in which order, as what, and on which side of the attention product.

The model runs once on a few tokens, and every operation below autograd is followed. A parameter is known by what is
done with it, whatever it is called.

Shapes: T tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "dot", "mv", "convolution")
NORMS = ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
LOOKUPS = ("embedding", "index", "index_select", "gather")
SUMS = ("add", "sub", "rsub")


@dataclass
class Use:
    """The first use of a parameter.

    `kind` is "matrix", "norm", "factor", "bias", "lookup", "position" or "other"; `role` "query", "key", "value" or
    "output", if the parameter projects to or from the attention product. `transposed` is whether a matrix is
    multiplied as it lies, x @ W, so that it is stored `[in, out]`. A bias and a norm's shift name their `partner`.
    """

    order: int
    kind: str
    roles: set[str] = field(default_factory=set)
    transposed: bool | None = None
    partner: str | None = None

    @property
    def role(self) -> str | None:
        return next(iter(self.roles)) if len(self.roles) == 1 else None


@dataclass(frozen=True)
class Label:
    """What a value comes from: parameters alone (`pure`), or the tokens, and then the parameters applied last.

    Of scores, `pair` are the parameters of their rows and columns; `flipped` is whether these were transposed since.
    """

    pure: bool
    names: tuple[str, ...] = ()
    kind: str = ""
    pair: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    flipped: bool = False


class Follower(TorchDispatchMode):
    """Labels each value by its storage, so that views have their base's label."""

    def __init__(self, module: nn.Module, input_ids: torch.Tensor):
        super().__init__()
        self.uses: dict[str, Use] = {}
        self.kept: list[torch.Tensor] = []  # so that no storage is given out twice
        self.labels: dict[int, Label] = {}
        self.own = {storage(parameter) for parameter in module.parameters()}
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(storage(parameter), []).append(name)
        for several in names.values():
            several.sort(key=lambda name: not isinstance(submodule(module, name.rpartition(".")[0]), nn.Embedding))
        self.twins = {name for several in names.values() for name in several[1:]}
        self.labels |= {key: Label(True, tuple(found)) for key, found in names.items()}
        self.labels[storage(input_ids)] = Label(False, (), "ids")
        self.tokens = input_ids.shape[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        operation = func._schema.name.split("::")[-1].removesuffix("_")
        label = self.combined(operation, inputs)
        if label is not None and label.kind == "scores" and self.flips(operation, args):
            label = replace(label, flipped=not label.flipped)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.kept.append(value)
                if label is not None:
                    self.labels[storage(value)] = label
        return result

    def combined(self, operation: str, inputs: list[torch.Tensor]) -> Label | None:
        """The label of an operation's result; None for a constant. Uses of parameters are noted."""
        known = [(value, self.labels.get(storage(value))) for value in inputs]
        weights = [(value, label) for value, label in known if label and label.pure]
        computed = [(value, label) for value, label in known if label and not label.pure]
        # A statistic of each token, such as its mean or its norm, leaves the other value what it is.
        wide = [label for value, label in computed if value.ndim and value.shape[-1] > 1]
        values = wide or [label for _, label in computed]
        if not values:
            names = tuple(dict.fromkeys(name for _, label in weights for name in label.names))
            return Label(True, names) if weights else None
        if weights:
            return self.used(operation, weights, values[0])
        if "scaled_dot_product" in operation and len(values) >= 3:
            for label, role in zip(values[:3], ("query", "key", "value"), strict=True):
                self.play(label.names, role)
            return Label(False, (), "context")
        if operation in PRODUCTS and len(values) >= 2:
            return self.product(*values[-2:])
        if len(values) == 1 or all(label.kind == values[0].kind for label in values):
            names = tuple(dict.fromkeys(name for label in values for name in label.names))
            return replace(values[0], names=names if operation not in SUMS or len(values) == 1 else ())
        added = [label for label in values if label.kind == "applied"]
        return Label(False, added[0].names if len(added) == 1 else (), "stream")

    def product(self, left: Label, right: Label) -> Label:
        """Of two values: queries and keys first, then the scores and the values."""
        if "scores" not in (left.kind, right.kind):
            return Label(False, (), "scores", (left.names, right.names))
        scores, values = (left, right) if left.kind == "scores" else (right, left)
        rows, columns = scores.pair
        # The values are summed over the keys: over the scores' last dimension, if they are the first factor.
        queries, keys = (rows, columns) if scores.flipped == (scores is right) else (columns, rows)
        for names, role in ((queries, "query"), (keys, "key"), (values.names, "value")):
            self.play(names, role)
        return Label(False, (), "context")

    def flips(self, operation: str, args: Any) -> bool:
        """Whether an operation exchanges the scores' two dimensions, which are the only ones as long as the tokens."""
        if operation not in ("transpose", "t", "permute"):
            return False
        sizes, order = args[0].shape, list(range(args[0].ndim))
        if operation == "permute":
            order = [dim % len(order) for dim in args[1]]
        else:
            first, second = args[1:3] if operation == "transpose" else (0, 1)
            order[first], order[second] = order[second], order[first]
        places = [order.index(dim) for dim, size in enumerate(sizes) if size == self.tokens]
        return len(places) == 2 and places[0] > places[1]

    def play(self, names: tuple[str, ...], role: str) -> None:
        for name in names:
            if name in self.uses:
                self.uses[name].roles.add(role)

    def used(self, operation: str, weights: list[tuple[torch.Tensor, Label]], value: Label) -> Label:
        names = [name for _, label in weights for name in label.names]
        main = weights[0]
        if operation in PRODUCTS:
            kind, main = "matrix", max(weights, key=lambda item: item[0].ndim)
            kind = "lookup" if value.kind == "ids" else kind  # of one-hot vectors
        elif operation == "addcmul":  # shift + normed · scale
            kind, main = "factor", weights[-1]
        elif operation in NORMS:
            kind = "norm"
        elif operation in LOOKUPS:
            kind = "lookup"
        elif operation in SUMS:
            kind = "position" if value.kind == "lookup" else "bias"
        else:
            kind = "factor" if operation in ("mul", "div") else "other"
        roles = {"output"} if value.kind == "context" and kind == "matrix" else set()
        for tensor, label in weights:
            for name in label.names:
                # Of a tied matrix, the first name is the table, and any other the head.
                use = Use(len(self.uses), "matrix" if kind == "lookup" and name in self.twins else kind, set(roles))
                if tensor is not main[0]:
                    use.kind, use.partner = "bias", main[1].names[0]
                elif kind == "matrix" and tensor.ndim > 1 and storage(tensor) in self.own:
                    use.transposed = lies_straight(tensor)
                elif kind == "bias" and value.names:
                    use.partner = value.names[-1]
                self.uses.setdefault(name, use)
        applied = main[1].names if kind != "bias" else value.names
        after = value.kind if kind == "bias" else "lookup" if kind in ("lookup", "position") else "applied"
        return Label(False, applied or tuple(names), after)


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The module of a path, also where an attribute of that name is something else."""
    for name in path.split(".") if path else []:
        module = module._modules[name] or module
    return module


def storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def lies_straight(factor: torch.Tensor) -> bool | None:
    """Whether the second factor of a product lies in memory row by row, so that no transpose was taken of it."""
    rows, columns = factor.stride()[-2:]
    return None if rows == columns else rows > columns


@contextmanager
def every_operation() -> Iterator[None]:
    """Switches off the operation into which torch fuses a whole `nn.TransformerEncoderLayer` in evaluation mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def uses(module: nn.Module, run: Callable[[torch.Tensor], Any], input_ids: torch.Tensor) -> dict[str, Use]:
    """Each parameter's first use, by name; none if the model does not run, which the comparison then reports."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with every_operation(), Follower(module, input_ids) as follower:
            run(input_ids)
    except Exception:  # whatever the user's class raises
        return {}
    finally:
        for part in training:
            part.training = True
    return follower.uses
