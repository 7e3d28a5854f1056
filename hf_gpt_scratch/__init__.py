"""GPT-2 in the layers of *Build a Large Language Model (From Scratch)*, as a first-class Transformers model."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Tokenizer,
)

from .configuration_gpt_scratch import GPTScratchConfig
from .int8 import Int8Config
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
from .modeling_gpt_scratch import (
    GPTScratchDoubleHeadsModel,
    GPTScratchForCausalLM,
    GPTScratchForQuestionAnswering,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchModel,
    GPTScratchPreTrainedModel,
)
from .version import __version__ as __version__

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "FeedForward",
    "GPTModel",
    "GPTScratchConfig",
    "GPTScratchDoubleHeadsModel",
    "GPTScratchForCausalLM",
    "GPTScratchForQuestionAnswering",
    "GPTScratchForSequenceClassification",
    "GPTScratchForTokenClassification",
    "GPTScratchModel",
    "GPTScratchPreTrainedModel",
    "Int8Config",
    "LayerNorm",
    "MultiHeadAttention",
    "TransformerBlock",
    "generate_text_simple",
    "text_to_token_ids",
    "token_ids_to_text",
]

AutoConfig.register(GPTScratchConfig.model_type, GPTScratchConfig, exist_ok=True)
AutoTokenizer.register(GPTScratchConfig, fast_tokenizer_class=GPT2Tokenizer, exist_ok=True)
GPTScratchConfig.register_for_auto_class()
for auto_class, model_class in (
    (AutoModel, GPTScratchModel),
    (AutoModelForCausalLM, GPTScratchForCausalLM),
    (AutoModelForPreTraining, GPTScratchDoubleHeadsModel),
    (AutoModelForQuestionAnswering, GPTScratchForQuestionAnswering),
    (AutoModelForSequenceClassification, GPTScratchForSequenceClassification),
    (AutoModelForTokenClassification, GPTScratchForTokenClassification),
):
    auto_class.register(GPTScratchConfig, model_class, exist_ok=True)
    model_class.register_for_auto_class(auto_class.__name__)  # save_pretrained then ships the code
