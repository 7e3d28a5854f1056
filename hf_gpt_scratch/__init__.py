"""GPT-2 with the layers of *Build a Large Language Model (From Scratch)*, as a first-class Transformers model.

Everything that the README and the documentation use is here. Classes and functions are imported on first use, torch and
transformers with them; transformers' Auto classes know the models as soon as both packages are imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import ConversionError, GPTScratchError, LabError, ParityError, UnknownArchitecture, UnknownName
from .moved import keep_old_names
from .registration import register_once_imported
from .version import __version__

if TYPE_CHECKING:
    from .fast import for_decoding
    from .lab.decoding.session import check_decoding
    from .lab.explain import explain
    from .lab.inspect import inspect
    from .lab.session import compare
    from .lab.watch.session import watch
    from .model.configuration_gpt_scratch import GPTScratchConfig
    from .model.heads_gpt_scratch import (
        GPTScratchDoubleHeadsModel,
        GPTScratchForQuestionAnswering,
        GPTScratchForSequenceClassification,
        GPTScratchForTokenClassification,
    )
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
        GPTScratchForCausalLM,
        GPTScratchModel,
        GPTScratchPreTrainedModel,
    )
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
    "check_decoding",
    "compare",
    "convert",
    "explain",
    "export",
    "for_decoding",
    "generate_text_simple",
    "gpt2_tokenizer",
    "inspect",
    "model_card",
    "text_to_token_ids",
    "token_ids_to_text",
    "verify",
    "watch",
]

# The modules that the others are imported from.
_MODULES = {
    ".lab.decoding.session": "check_decoding",
    ".fast": "for_decoding",
    ".lab.explain": "explain",
    ".lab.inspect": "inspect",
    ".lab.session": "compare",
    ".lab.watch.session": "watch",
    ".model.configuration_gpt_scratch": "GPTScratchConfig",
    ".model.int8": "Int8Config",
    ".model.layers": "GELU GPT_CONFIG_124M FeedForward GPTModel LayerNorm MultiHeadAttention TransformerBlock "
    "generate_text_simple text_to_token_ids token_ids_to_text",
    ".model.heads_gpt_scratch": "GPTScratchDoubleHeadsModel GPTScratchForQuestionAnswering "
    "GPTScratchForSequenceClassification GPTScratchForTokenClassification",
    ".model.modeling_gpt_scratch": "CachedAttention GPTScratchBlock GPTScratchForCausalLM GPTScratchModel "
    "GPTScratchPreTrainedModel",
    ".tokenizer": "gpt2_tokenizer",
    ".weights.convert": "convert export",
    ".weights.model_card": "model_card",
    ".weights.verify": "verify",
}
_ON_DEMAND = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # First transformers, whose import brings our models, so that two threads take the locks of both in one order.
    import_module("transformers")
    value = globals()[name] = getattr(import_module(_ON_DEMAND[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


keep_old_names()
register_once_imported()
