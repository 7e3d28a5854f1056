"""Operations by which each process of a distributed model reads its part of an official checkpoint."""

import torch
from transformers.core_model_loading import ConversionOps

from .configuration_gpt_scratch import SHARDED_LOADING

if SHARDED_LOADING:
    from torch.distributed.tensor import DTensor, distribute_tensor


class Gather(ConversionOps):
    """Gathers GPT-2's whole tensor, of which the loader of a distributed model reads a part on each process.

    The loader shards the source tensor like its target, before any operation; but their rows do not correspond. So the
    parts are gathered here, and `Scatter` shards the results. Both leave tensors unchanged if nothing is sharded, and
    in the conversion back to GPT-2's layout.

    Args:
        transposed, parts: whether the weight map's row is transposed, and the number of our tensors in it.
    """

    def __init__(self, transposed: bool, parts: int):
        self.transposed, self.parts = transposed, parts

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        target = sharded_target(**kwargs)
        if target is None:
            return input_dict
        [(name, tensor)] = input_dict.items()
        shape = (target.shape[0] * self.parts, *target.shape[1:])
        shape = torch.Size(reversed(shape) if self.transposed else shape)
        strides = torch.empty(shape, device="meta").stride()
        part = (tensor[0] if isinstance(tensor, list) else tensor).contiguous()
        mesh, placements = target.device_mesh, target.placements
        whole = DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=strides)
        return {name: whole.full_tensor()}

    @property
    def reverse_op(self):
        return Unchanged()


class Scatter(ConversionOps):
    """Keeps this process's part of each of our tensors; see `Gather`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        target = sharded_target(**kwargs)
        if target is None:
            return input_dict
        mesh, placements = target.device_mesh, target.placements
        return {
            name: distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
            for name, tensor in input_dict.items()
        }

    @property
    def reverse_op(self):
        return Unchanged()


class Unchanged(ConversionOps):
    """Returns tensors unchanged."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        return input_dict

    @property
    def reverse_op(self):
        return Unchanged()


def sharded_target(full_layer_name=None, model=None, **_):
    """The target parameter of a conversion if it is sharded, else None."""
    if not SHARDED_LOADING or model is None:
        return None
    target = model.get_parameter(full_layer_name)
    return target if isinstance(target, DTensor) else None
