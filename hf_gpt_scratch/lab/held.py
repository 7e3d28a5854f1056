"""Weights where `torch.nn` does not look: tensors in a tree or an object of yours, and all layers in one tensor."""

import copy
import re
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from ..errors import LabError

# So many parameters outside of lists whose first dimension is the number of layers hold all blocks.
MANY_STACKED = 8
NO_TREES = (nn.Module, type, FunctionType, MethodType, ModuleType)


class Held(nn.Module):
    """What computes with tensors, but is no module: they become its parameters, in their places in `made`.

    `places` are these, as mappings or lists with a key.
    """

    def __init__(self, made: Any):
        super().__init__()
        self.known: dict[int, tuple[Any, Any]] = {}  # with what is replaced, so that no id is given out twice
        self.places: list[tuple[Any, Any]] = []
        self.made = self.adopted(made, self, "held")
        if call := made if callable(made) else getattr(made, "forward", None):
            self.forward = call
        if not any(True for _ in self.parameters()):
            raise LabError(f"a {type(made).__name__} has no weights; name a model, or what makes one")

    def adopted(self, value: Any, owner: nn.Module, name: str) -> Any:
        """The value with parameters for its tensors, which `owner` gets. What has two values only is a mask."""
        name = name.replace(".", "_")
        if isinstance(value, torch.Tensor):
            if not value.is_floating_point() or (value.ndim > 1 and len(value.unique()) == 2):
                return value
            own = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach())
            owner._parameters[name] = self.known.setdefault(id(value), (value, own))[1]
            return owner._parameters[name]
        if isinstance(value, nn.Module):
            owner._modules[name] = value
        inside: Any = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        inside = dict(enumerate(value)) if isinstance(value, list | tuple) else inside
        if not inside or isinstance(value, NO_TREES) or id(value) in self.known:
            return value
        self.known[id(value)], within = (value, value), nn.Module()
        found = {key: self.adopted(part, within, str(key)) for key, part in inside.items()}
        if within._parameters or within._modules:
            owner._modules[name] = within
        if isinstance(value, tuple):
            return type(value)(*found.values()) if hasattr(value, "_fields") else tuple(found.values())
        place = value if isinstance(value, list) else inside
        for key, part in found.items():
            place[key] = part
            self.places.append((place, key))
        return value


class Layers(torch.Tensor):
    """The parameters of all layers as one tensor (L, …): `x[n]` is the parameter itself, so that its use is seen."""

    parts: nn.ParameterList

    @classmethod
    def of(cls, whole: torch.Tensor) -> "Layers":
        made = torch.empty(0).as_subclass(cls)
        made.parts = nn.ParameterList(part.detach().clone() for part in whole)
        return made

    def __getitem__(self, index: Any) -> torch.Tensor:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, int):
            return torch.stack(tuple(self.parts))[index]
        return self.parts[first][tuple(rest)] if rest else self.parts[first]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.parts)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def whole(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(whole, value))
            return torch.stack(tuple(value.parts)) if isinstance(value, Layers) else value

        return func(*whole(args), **{name: whole(value) for name, value in (kwargs or {}).items()})


def unstacked(module: nn.Module, n_layers: int) -> tuple[nn.Module, list[str]]:
    """The module, or, where many of its parameters hold all layers, a copy with one for each layer; and their names."""
    named = module.named_parameters()
    found = {n: p for n, p in named if p.ndim > 1 and len(p) == n_layers > 1 and not re.search(r"(^|\.)\d+(\.|$)", n)}
    if len(found) < MANY_STACKED:
        return module, []
    copied = module if isinstance(module, Held) else copy.deepcopy(module)
    layers = {id(copied.get_parameter(name)): Layers.of(parameter) for name, parameter in found.items()}
    places = [(owner.__dict__, name, p) for owner in copied.modules() for name, p in owner._parameters.items()]
    if isinstance(copied, Held):
        places = [(place, key, place[key]) for place, key in copied.places]
        if not layers.keys() <= {id(value) for _, _, value in places}:
            raise LabError("all layers are in the same tensors, in a tuple; put them into a dict or a list")
    for place, key, value in [item for item in places if id(item[2]) in layers]:
        place[key] = layers[id(value)]
    for owner in list(copied.modules()):
        for name in [name for name, value in owner._parameters.items() if id(value) in layers]:
            owner._modules[name] = layers[id(owner._parameters.pop(name))].parts
    return copied, list(found)
