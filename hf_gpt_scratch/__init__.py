"""GPT-2 with the layers of *Build a Large Language Model (From Scratch)*, as a first-class Transformers model.

This is the whole public interface: the classes, and `convert`, `export`, `verify`, `compare`, `explain`, `inspect`,
`gpt2_tokenizer` and `model_card`, which are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer

from .errors import ConversionError, GPTScratchError, LabError, ParityError, UnknownArchitecture, UnknownName
from .model.configuration_gpt_scratch import GPTScratchConfig
from .model.int8 import Int8Config
from .model.layers import (
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
from .model.modeling_gpt_scratch import (
    AUTO_CLASSES,
    CachedAttention,
    GPTScratchBlock,
    GPTScratchDoubleHeadsModel,
    GPTScratchForCausalLM,
    GPTScratchForQuestionAnswering,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
    GPTScratchModel,
    GPTScratchPreTrainedModel,
)
from .moved import keep_old_names
from .version import __version__

if TYPE_CHECKING:
    from .lab.explain import explain
    from .lab.inspect import inspect
    from .lab.session import compare
    from .tokenizer import gpt2_tokenizer
    from .weights.convert import convert, export
    from .weights.model_card import model_card
    from .weights.verify import verify

__all__ = [
    "GELU",
    "GPT_CONFIG_124M",
    "CachedAttention",
    "ConversionError",
    "FeedForward",
    "GPTModel",
    "GPTScratchBlock",
    "GPTScratchConfig",
    "GPTScratchDoubleHeadsModel",
    "GPTScratchError",
    "GPTScratchForCausalLM",
    "GPTScratchForQuestionAnswering",
    "GPTScratchForSequenceClassification",
    "GPTScratchForTokenClassification",
    "GPTScratchModel",
    "GPTScratchPreTrainedModel",
    "Int8Config",
    "LabError",
    "LayerNorm",
    "MultiHeadAttention",
    "ParityError",
    "TransformerBlock",
    "UnknownArchitecture",
    "UnknownName",
    "__version__",
    "compare",
    "convert",
    "explain",
    "export",
    "generate_text_simple",
    "gpt2_tokenizer",
    "inspect",
    "model_card",
    "text_to_token_ids",
    "token_ids_to_text",
    "verify",
]

# Imported on first use: their modules import more than a model needs.
_ON_DEMAND = {
    "compare": (".lab.session", "compare"),
    "convert": (".weights.convert", "convert"),
    "explain": (".lab.explain", "explain"),
    "export": (".weights.convert", "export"),
    "gpt2_tokenizer": (".tokenizer", "gpt2_tokenizer"),
    "inspect": (".lab.inspect", "inspect"),
    "model_card": (".weights.model_card", "model_card"),
    "verify": (".weights.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _ON_DEMAND[name]
    value = globals()[name] = getattr(import_module(module, __name__), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


keep_old_names()
AutoConfig.register(GPTScratchConfig.model_type, GPTScratchConfig, exist_ok=True)
AutoTokenizer.register(GPTScratchConfig, fast_tokenizer_class=GPT2Tokenizer, exist_ok=True)
GPTScratchConfig.register_for_auto_class()
for _name, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _name).register(GPTScratchConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_name)  # so save_pretrained copies the code
