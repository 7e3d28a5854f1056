"""Distribution over processes: plans for tensor, data and pipeline parallelism.

transformers and engines such as vLLM execute the plans. Tensor parallelism in transformers itself needs 5.22; before,
only engines use that plan, matching its names as regular expressions, and `from_pretrained` refuses it.
"""

from importlib.util import find_spec

from torch import nn

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
