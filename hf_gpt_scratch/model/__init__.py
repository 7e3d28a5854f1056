"""What a saved model ships: the book's layers, the config, the models, and what of transformers they need to know.

This file does not ship: its import makes the models known to transformers' Auto classes.
"""

import transformers
from transformers import AutoConfig, AutoTokenizer, GPT2Tokenizer

from . import modeling_gpt_scratch
from .configuration_gpt_scratch import GPTScratchConfig
from .heads_gpt_scratch import AUTO_CLASSES

AutoConfig.register(GPTScratchConfig.model_type, GPTScratchConfig, exist_ok=True)
AutoTokenizer.register(GPTScratchConfig, fast_tokenizer_class=GPT2Tokenizer, exist_ok=True)
GPTScratchConfig.register_for_auto_class()
for _name, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _name).register(GPTScratchConfig, _model_class, exist_ok=True)
    _model_class.register_for_auto_class(_name)  # save_pretrained then ships the code
    setattr(modeling_gpt_scratch, _model_class.__name__, _model_class)  # as in 0.1.0, for pickles
