"""GPT-2 in the layers of *Build a Large Language Model (From Scratch)*, as a first-class Transformers model."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from .configuration_gpt_scratch import GPTScratchConfig
from .layers import (
    GELU,
    GPT_CONFIG_124M,
    FeedForward,
    GPTModel,
    LayerNorm,
    MultiHeadAttention,
    TransformerBlock,
    generate_text_simple,
    text_to_token_ids,
    token_ids_to_text,
)
from .modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel, GPTScratchPreTrainedModel

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "FeedForward",
    "GPTModel",
    "GPTScratchConfig",
    "GPTScratchForCausalLM",
    "GPTScratchModel",
    "GPTScratchPreTrainedModel",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "generate_text_simple",
    "text_to_token_ids",
    "token_ids_to_text",
]

AutoConfig.register(GPTScratchConfig.model_type, GPTScratchConfig, exist_ok=True)
AutoModel.register(GPTScratchConfig, GPTScratchModel, exist_ok=True)
AutoModelForCausalLM.register(GPTScratchConfig, GPTScratchForCausalLM, exist_ok=True)
AutoTokenizer.register(GPTScratchConfig, fast_tokenizer_class=GPT2Tokenizer, exist_ok=True)

# save_pretrained then ships the code, for machines without this package.
GPTScratchConfig.register_for_auto_class()
GPTScratchModel.register_for_auto_class("AutoModel")
GPTScratchForCausalLM.register_for_auto_class("AutoModelForCausalLM")
