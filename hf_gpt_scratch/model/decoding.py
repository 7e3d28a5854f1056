"""What makes each token of `.generate()` cheaper and changes none: a cache with room to grow, products by oneDNN.

Shapes: B batch, H heads, T new tokens, S tokens so far, D head dimension.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache as once
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 128  # tokens for which a layer of the cache allocates memory in advance


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` with room for later tokens, so that adding one does not copy the others.

    Other operations of transformers (crop, reorder, repeat) replace `keys`; the next update then allocates new room.
    With gradients, or compiled, it is the plain layer.
    """

    keys: Any  # (B, H, S, D), like `values`: the filled part of the room
    values: Any
    room: Any = (None, None)
    handed_out: Any = (None, None)  # keys and values after the last update

    def update(self, key_states, value_states, *args, **kwargs):
        """Adds (B, H, T, D) each and returns all keys and values so far, (B, H, S, D)."""
        if torch.compiler.is_compiling() or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        total = seen + key_states.shape[-2]
        keys, values = self.room
        replaced = self.keys is not self.handed_out[0] or self.values is not self.handed_out[1]
        frozen = keys is not None and keys.is_inference() and not torch.is_inference_mode_enabled()
        if keys is None or replaced or frozen or total > keys.shape[-2]:
            self.room = keys, values = [self._with_room(states, total) for states in (key_states, value_states)]
            if seen:
                keys[:, :, :seen], values[:, :, :seen] = self.keys, self.values
        keys[:, :, seen:total], values[:, :, seen:total] = key_states, value_states
        self.handed_out = self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return self.handed_out

    def __reduce__(self):  # copied or pickled, it becomes transformers' layer, without the room
        state = {name: value for name, value in vars(self).items() if name not in ("room", "handed_out")}
        if self.is_initialized:
            state["keys"], state["values"] = self.keys.clone(), self.values.clone()
        return DynamicLayer, (), state

    @staticmethod
    def _with_room(states: torch.Tensor, total: int) -> torch.Tensor:
        batch, heads, _, dim = states.shape
        return states.new_empty(batch, heads, total + ROOM, dim)


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """A `DynamicCache` of growing layers."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() for _ in cache.layers]
    return cache


LARGE = 2**18  # numbers in a weight, from which oneDNN is faster; a call of it costs 20 to 40 µs more
_by_onednn: ContextVar[bool] = ContextVar("by_onednn", default=False)


@once
def prefers_onednn() -> bool:
    """Whether this CPU is AMD's, on which oneDNN's products in float32 are faster than MKL's, which F.linear calls.

    With few rows by a tenth to a half, of the same weights in the same order (`benchmarks/few_rows.py`).
    """
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()
    return "AMD" in capabilities.get("cpu_name", "") and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@contextmanager
def onednn_products() -> Iterator[None]:
    """Within it, `product` uses oneDNN where it is faster; `torch.backends.mkldnn.enabled = False` turns it off."""
    token = _by_onednn.set(not torch.is_autocast_enabled("cpu") and onednn_may_run())  # autocast has another dtype
    try:
        yield
    finally:
        _by_onednn.reset(token)


def product(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`; by oneDNN if that is on and the layer is a plain one, without hooks, adapters or quantization."""
    compiling = torch.compiler.is_compiling()
    if not (_is_compiled_by_onednn() if compiling else _by_onednn.get()) or not _is_plain(layer):
        return layer(x)
    weight: Any = layer.weight
    if torch.is_grad_enabled() or not suits_onednn(x, weight):
        return layer(x)
    linear = torch.ops.hf_gpt_scratch.linear.default if compiling else onednn_linear
    bias: Any = layer.bias
    return linear(x, weight, bias)


def suits_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether they are of the kind and size that oneDNN multiplies faster."""
    suits = type(x) is torch.Tensor and x.dtype is weight.dtype is torch.float32 and x.is_cpu
    return suits and weight.numel() >= LARGE


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of float32 on the CPU, without gradients."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _fake_linear(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# For compiled graphs: inductor takes oneDNN's operator with frozen weights only, and calls one that it does not know.
if not hasattr(torch.ops.hf_gpt_scratch, "linear"):  # as after a reload
    _operators = torch.library.Library("hf_gpt_scratch", "FRAGMENT")
    _operators.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _operators.impl("linear", onednn_linear, "CPU")
    torch.library.register_fake("hf_gpt_scratch::linear", _fake_linear, lib=_operators)


def _is_compiled_by_onednn() -> bool:
    return onednn_is_on() and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_exporting()


@torch.compiler.assume_constant_result  # which a graph keeps: dynamo cannot read the switch
def onednn_is_on() -> bool:
    """Whether torch may use oneDNN, and it is faster here."""
    return torch._C._get_mkldnn_enabled() and prefers_onednn()


def onednn_may_run() -> bool:
    """`onednn_is_on`, and no mode looks on that knows F.linear only, such as FlopCounterMode."""
    return _get_current_dispatch_mode() is None and onednn_is_on()


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is F.linear of its weight and bias, in this memory, and nothing else."""
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    return type(layer.weight) is nn.Parameter and layer.weight.is_cpu and layer.weight.is_contiguous()
