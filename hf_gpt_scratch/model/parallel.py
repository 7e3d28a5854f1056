"""Distribution over processes: plans for tensor, data and pipeline parallelism, and sharded loading.

transformers and engines such as vLLM execute the plans. Tensor parallelism in transformers itself needs 5.22; before,
only engines use that plan, matching its names as regular expressions, and `from_pretrained` refuses it.
"""

from importlib.util import find_spec

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

SHARDED_LOADING = find_spec("transformers.distributed.parallel_utils") is not None

# For the base model, by module name; "*" stands for any number. The language model's head is below.
TP_PLAN = {
    "tok_emb": "embedding_rowwise",
    "trf_blocks.*.att.W_query": "colwise",
    "trf_blocks.*.att.W_key": "colwise",
    "trf_blocks.*.att.W_value": "colwise",
    "trf_blocks.*.att.out_proj": "rowwise",
}
# Modules without a rule form one group with the whole model, including the head: in a group of its own, a tied head
# would not be trained with tok_emb.
FSDP_PLAN = {"tok_emb": "free_full_weight", "trf_blocks.*": "free_full_weight"}
# Each module's inputs and outputs, in the order of execution.
PP_PLAN = {
    "tok_emb": (["input_ids"], ["inputs_embeds"]),
    "pos_emb": (["position_ids"], ["position_embeds"]),
    "drop_emb": (["inputs_embeds"], ["hidden_states"]),
    "trf_blocks": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "final_norm": (["hidden_states"], ["hidden_states"]),
}
HEAD_TP_PLAN = {"out_head": "colwise_gather_output"}
HEAD_PP_PLAN = {"out_head": (["hidden_states"], ["logits"])}

if SHARDED_LOADING:
    from torch.distributed.tensor import DTensor, distribute_tensor
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class FeedForwardParallel(TensorParallelLayer):
        """The first layer by columns, the last by rows, the activation on each process's part.

        One style for all of `ff.layers`, since transformers' plans cannot distinguish numbers in names.
        """

        def style(self, module: nn.Module) -> TensorParallelLayer:
            if not isinstance(module, nn.Linear):
                return ALL_PARALLEL_STYLES["replicated_with_grad_allreduce"]
            return ALL_PARALLEL_STYLES["rowwise" if hasattr(module, "adds_to_shortcut") else "colwise"]

        def shard_param(self, module, param, mesh):
            self.style(module).shard_param(module, param, mesh)

        def install_forward(self, module, mesh):
            return self.style(module).install_forward(module, mesh)

    ALL_PARALLEL_STYLES.register("gpt_scratch_feed_forward", FeedForwardParallel())  # type: ignore[arg-type]  # as all styles
    TP_PLAN["trf_blocks.*.ff.layers.*"] = "gpt_scratch_feed_forward"
else:
    TP_PLAN |= {"trf_blocks.*.ff.layers.0": "colwise", "trf_blocks.*.ff.layers.2": "rowwise"}


def refuse_tensor_parallel_loading(options: dict) -> None:
    """Before 5.22, transformers would shard official tensors as if their rows were ours, and compute wrong logits.

    Raises:
        ValueError: `options` of `from_pretrained` ask for it.
    """
    asked = [name for name in ("tp_plan", "tp_size", "distributed_config") if options.get(name) is not None]
    if asked and not SHARDED_LOADING:
        raise ValueError(
            f"from_pretrained got {', '.join(asked)}, but tensor parallelism of this model needs transformers 5.22 or "
            "newer; update transformers, or load the model without"
        )


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
