"""Tensors that are read when they are needed, and their way through the weight map.

Memory holds the tensors that are being read, and not the model.
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
    """What a tensor is, and how to get it.

    Args:
        read: gives its values, which are not to be written to.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


def held(tensors: Mapping[str, torch.Tensor]) -> dict[str, LazyTensor]:
    """Tensors that are in memory already."""
    return {name: LazyTensor(t.shape, t.dtype, functools.partial(_itself, t)) for name, t in tensors.items()}


def to_scratch(tensors: Mapping[str, LazyTensor], table: Iterable[Row]) -> dict[str, LazyTensor]:
    """GPT-2's tensors as ours, made one at a time; those that no row knows are left out."""

    @functools.lru_cache(maxsize=2)  # weight and bias of one layer, of which three tensors in a row are made
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
    """Our tensors as GPT-2's, made one at a time; the inverse of `to_scratch`.

    Raises:
        ConversionError: tensors that become one have several dtypes.
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
                f"{', '.join(f'{name!r} is {dtype}' for name, dtype in dtypes.items())}, but they become one tensor; "
                "convert them to one dtype first"
            )
        meta = row.to_theirs(_meta(tensors[name]) for name in row.ours)
        theirs[row.theirs] = LazyTensor(meta.shape, meta.dtype, functools.partial(whole, row))
    return theirs


def with_qkv_biases(tensors: Mapping[str, LazyTensor], n_layers: int) -> dict[str, LazyTensor]:
    """With zeros for the biases that a model without `qkv_bias` does not have, and GPT-2 does."""
    zeros = {}
    for name in (name for row in rows(n_layers) if row.zeros_for for name in row.ours):
        weight = tensors.get(name.removesuffix("bias") + "weight")
        if weight is not None:
            zeros[name] = zero(weight.shape[:1], weight.dtype)
    return {**zeros, **tensors}


def zero(shape: torch.Size, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(shape, dtype, functools.partial(torch.zeros, shape, dtype=dtype))


def all_zero(tensor: torch.Tensor) -> bool:
    """Whether every bit is; −0 is not 0."""
    return same_bits(tensor, torch.zeros_like(tensor))


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _meta(tensor: LazyTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
