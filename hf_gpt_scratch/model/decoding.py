"""A cache with room to grow, which makes each token of `.generate()` cheaper and changes none.

Shapes: B batch, H heads, T new tokens, S tokens so far, D head dimension.
"""

from typing import Any

import torch
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
