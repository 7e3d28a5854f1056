"""The language model as vLLM serves it; imported by vLLM alone, see `vllm_plugin.py`."""

from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import WeightsMapper


class GPTScratchForVLLM(TransformersForCausalLM):
    """vLLM's backend for language models, which calls the head `lm_head`; in our checkpoints it is `out_head`."""

    def _create_hf_to_vllm_mapper(self):
        super()._create_hf_to_vllm_mapper()
        self.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_prefix={"out_head.": "lm_head."})
