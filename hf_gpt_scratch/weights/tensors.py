"""Tensors that are read when they are needed, and their conversion by the weight map.

Only the tensors in use are in memory, never the whole model.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..errors import ConversionError
from ..model.weight_map import Row, rows
from .parity import same_bits


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor's shape and dtype, and a function that reads it.

    Args:
        read: returns its values, which must not be modified.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def held(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """Lazy tensors for tensors that are already in memory."""
    return {name: LazyTensor(t.shape, t.dtype, functools.partial(_itself, t)) for name, t in tensors.items()}


def to_scratch(tensors: Mapping[str, LazyTensor], table: Iterable[Row]) -> dict[str, LazyTensor]:
    """GPT-2's tensors under our names, converted one at a time; those without a row are left out."""

    @functools.lru_cache(maxsize=2)  # one layer's fused weight and bias, from each of which three tensors are made
    def parts(row: Row) -> tuple[torch.Tensor, ...]:
        return row.to_ours(tensors[row.theirs].read())

    def part(row: Row, i: int) -> torch.Tensor:
        return (parts(row) if len(row.ours) > 1 else row.to_ours(tensors[row.theirs].read()))[i]

    ours = {}
    for row in table:
        if row.theirs in tensors:
            dtype = tensors[row.theirs].dtype
            for i, (name, meta) in enumerate(zip(row.ours, row.to_ours(_meta(tensors[row.theirs])), strict=True)):
                ours[name] = LazyTensor(meta.shape, dtype, functools.partial(part, row, i))
    return ours


def from_scratch(tensors: Mapping[str, LazyTensor], table: Iterable[Row]) -> dict[str, LazyTensor]:
    """Our tensors under GPT-2's names, converted one at a time; the inverse of `to_scratch`.

    Raises:
        ConversionError: tensors that are fused into one have different dtypes.
    """

    def whole(row: Row) -> torch.Tensor:
        return row.to_theirs(tensors[name].read() for name in row.ours)

    theirs = {}
    for row in table:
        if row.ours[0] not in tensors:
            continue
        if len(row.ours) == 1 and not row.transposed:
            theirs[row.theirs] = tensors[row.ours[0]]
            continue
        dtypes = {name: tensors[name].dtype for name in row.ours}
        if len(set(dtypes.values())) > 1:
            raise ConversionError(
                f"{', '.join(f'{name!r} is {dtype}' for name, dtype in dtypes.items())}, but they are fused into one "
                "tensor; cast them to one dtype first"
            )
        meta = row.to_theirs(_meta(tensors[name]) for name in row.ours)
        theirs[row.theirs] = LazyTensor(meta.shape, meta.dtype, functools.partial(whole, row))
    return theirs


def with_qkv_biases(tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
    """The tensors, with zeros for the biases that GPT-2 has and a model without `qkv_bias` does not."""
    zeros = {}
    for name in (name for row in rows(n_layers) if row.zeros_for for name in row.ours):
        weight = tensors.get(name.removesuffix("bias") + "weight")
        if weight is not None:
            zeros[name] = zero(weight.shape[:1], weight.dtype)
    return {**zeros, **tensors}


def zero(shape: torch.Size, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, functools.partial(torch.zeros, shape, dtype=dtype))


def all_zero(tensor: torch.Tensor) -> bool:
    """Whether every bit is zero; −0 does not count as zero."""
    return same_bits(tensor, torch.zeros_like(tensor))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _meta(tensor: LazyTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
