# SPDX-License-Identifier: Apache-2.0  # trf-ignore: TRF028 as this line says it
"""The config under the book's names."""

import re
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from huggingface_hub.dataclasses import strict, validated_field
from transformers import GenerationConfig, GPT2Config, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

PACKAGE = __name__.rpartition(".")[0]  # this folder as a package: the installed one's, or one that came with a model
IN_PACKAGE = PACKAGE.partition(".")[0] == "hf_gpt_scratch"


def in_package(name: str) -> Any:
    """A module of this folder that does not ship with a model."""
    if not IN_PACKAGE:
        raise ImportError(
            f"the code that came along with this model has no {name}.py, which reads configs of other kinds; pip "
            "install hf-gpt-scratch, and use the classes there"
        )
    return import_module(f"{PACKAGE}.{name}")


def book_cfg(cfg):
    """The book's dict, or a config, as a complete dict for the book's layers; `book_cfg.py` checks it, where it is."""
    if IN_PACKAGE:
        return in_package("book_cfg").book_cfg(cfg)
    cfg = cfg if isinstance(cfg, dict) else vars(cfg)
    rates = {name: cfg.get("drop_rate", 0.1) for name in ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut")}
    given = {name: value for name, value in cfg.items() if not (name in rates and value is None)}
    return {"qkv_bias": False, "tie_word_embeddings": False, **rates, **given}


def check_length(num_tokens, context_length):
    """Raises ValueError if a sequence needs more positions than the model has."""
    if num_tokens > context_length:
        raise ValueError(
            f"the sequence has {num_tokens} tokens, but the model has only context_length={context_length} positions; "
            f"keep the last ones, idx[:, -{context_length}:], generate fewer, or train with a longer context_length"
        )


# GPT2Config's name -> ours, where they differ. Everything else in a GPT2Config keeps its name.
FROM_GPT2 = {
    "n_positions": "context_length",
    "n_embd": "emb_dim",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "embd_pdrop": "drop_rate_emb",
    "attn_pdrop": "drop_rate_attn",
    "resid_pdrop": "drop_rate_shortcut",
}

# transformers' names that other programs look up in a config's `to_dict()`.
LOOKED_UP = ("hidden_size", "num_attention_heads")

# Keys beside its fields that a transformers config may have: they do not change the model, or are read by name.
COMMON = {
    *vars(GenerationConfig()),
    *("num_labels", "torch_dtype", "attn_implementation", "experts_implementation", "output_attentions"),
    *("name_or_path", "model_type", "auto_map", "quantization_config", "task_specific_params", "tokenizer_class"),
    *(
        "per_layer_config",
        "classifier_dropout",
        "hidden_dropout",
        "loss_type",
        "transformers_weights",
        "base_model_tp_plan",
    ),
    # of older versions
    *("use_return_dict", "output_past", "predict_special_tokens", "n_special", "finetuning_task", "torchscript"),
    *("gradient_checkpointing", "pruned_heads", "prefix", "is_decoder", "cross_attention_hidden_size"),
    *("tie_encoder_decoder", "tf_legacy_loss", "use_bfloat16", "tie_last_hidden_states"),
}
# A number or a switch under such a name changes what a model computes.
OF_ARCHITECTURE = re.compile(
    r"(.*_)?(heads?|groups?|layers?|blocks?|depth|width|hidden|emb\w*|dims?|inner|ffn?|mlp|ctx|context|positions?|seq"
    r"|drop|dropout|pdrop|bias|qkv|attn|attention|norm|eps|epsilon|vocab|rope|rotary|window|experts?|moe|tied?)(_.*)?"
)
logger = logging.get_logger(__name__)

# Distribution over processes, which transformers and engines such as vLLM execute. In transformers itself tensor
# parallelism needs 5.22; before, only engines use that plan, matching its names as regular expressions.
SHARDED_LOADING = find_spec("transformers.distributed.parallel_utils") is not None
FEED_FORWARD_STYLE = "gpt_scratch_feed_forward"  # in `compat`
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
if SHARDED_LOADING:  # there, plans cannot distinguish numbers in names
    TP_PLAN["trf_blocks.*.ff.layers.*"] = FEED_FORWARD_STYLE
else:
    TP_PLAN |= {"trf_blocks.*.ff.layers.0": "colwise", "trf_blocks.*.ff.layers.2": "rowwise"}

# The four official sizes, by millions of parameters (tied): (emb_dim, n_layers, n_heads).
PRESETS = {"124M": (768, 12, 12), "355M": (1024, 24, 16), "774M": (1280, 36, 20), "1558M": (1600, 48, 25)}


def size(value):
    if value is not None and value < 1:
        raise ValueError(f"got {value}, but a size is at least 1; pass a positive integer")


def rate(value):
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"got {value}, but a dropout rate is a probability in [0, 1]; 0 switches dropout off")


def positive(value):
    if not value > 0:
        raise ValueError(f"got {value}, but it must be above 0; GPT-2 uses 1e-5")


def spread(value):
    if not value >= 0:
        raise ValueError(f"got {value}, but a standard deviation is at least 0; GPT-2 uses 0.02")


def activation(value):
    if value not in ACT2FN:
        raise ValueError(f"got {value!r}, but must be one of transformers' activations: {', '.join(sorted(ACT2FN))}")


def listed(values: dict[str, Any]) -> str:
    """Keys and values in one line of bounded length."""
    more = f" and {len(values) - 10} more" if len(values) > 10 else ""
    return ", ".join(f"{name[:80]}={str(value)[:80]}" for name, value in list(values.items())[:10]) + more


def ignored(name: str, value: Any, config_class: type[PreTrainedConfig]) -> str | None:
    """Why a key that is not a field is refused, and the remedy; None if it may be ignored."""
    if name in COMMON or name.startswith("_") or name.endswith(("_token", "_token_id")):
        return None
    remedy: str | None
    if name in FROM_GPT2:
        remedy = f"here it is {FROM_GPT2[name]}, and GPTScratchConfig.from_gpt2 translates a whole GPT2Config"
    else:
        own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
        for subclass in config_class.__mro__[: config_class.__mro__.index(GPTScratchConfig)]:  # without annotations
            own |= vars(subclass).keys()
        if name in own:
            return None
        remedy = in_package("book_cfg").what_to_do(name, own) if IN_PACKAGE else None
    if remedy is None:
        if not isinstance(value, (bool, int, float)) or not OF_ARCHITECTURE.fullmatch(name):
            return None
        remedy = "remove it if it says nothing about the model"
    return f"got {listed({name: value})}, which {config_class.__name__} does not know; {remedy}"


# trf-ignore: TRF057 docstrings written by hand give shapes and errors, on every version of transformers
@strict
class GPTScratchConfig(PreTrainedConfig):
    """The model's config, under the book's names; the defaults are the book's `GPT_CONFIG_124M`.

    transformers' names (`hidden_size`, `num_hidden_layers`, …) read and write the same fields.

    Args:
        vocab_size: number of token ids.
        context_length: longest sequence, in tokens.
        emb_dim: width of the model; a multiple of `n_heads`.
        n_heads: attention heads per layer.
        n_layers: transformer blocks.
        drop_rate: dropout probability where none of the next three is set.
        drop_rate_emb: after the embeddings (the book's exercise 4.3). None: `drop_rate`.
        drop_rate_attn: on the attention weights. None: `drop_rate`.
        drop_rate_shortcut: before each shortcut addition. None: `drop_rate`.
        qkv_bias: biases on W_query, W_key and W_value. Official checkpoints have them.
        n_inner: width of the feed-forward network. None: 4 · emb_dim.
        activation_function: a name in transformers' `ACT2FN`; `gelu_new` is the book's GELU.
        layer_norm_epsilon: added to the variance.
        initializer_range: standard deviation of new weights.
        scale_attn_weights: multiply attention scores by 1/√(head size).
        scale_attn_by_inverse_layer_idx: and by 1/(layer index + 1).
        reorder_and_upcast_attn: compute the scores of `eager` attention in float32.
        tie_word_embeddings: one matrix for `tok_emb` and `out_head`. The book has two; official checkpoints one.
        add_cross_attention: layers that look at an encoder's states, as `EncoderDecoderModel` wants of a decoder.
        book_classifier: `GPTScratchForSequenceClassification` is chapter 6's: its head has a bias and reads the last
            token, padding or not. The official one has no bias and reads the last token that is not padding.
        summary_type, summary_use_proj, summary_activation, summary_proj_to_labels, summary_first_dropout: the second
            head of `GPTScratchDoubleHeadsModel`, as in `GPT2Config`.
        use_cache: return the key-value cache.
        bos_token_id, eos_token_id, pad_token_id: special tokens; 50256 is `<|endoftext|>`.

    Raises:
        StrictDataclassError: a value breaks its rule; the message names value, rule and remedy.
    """

    model_type = "gpt_scratch"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "hidden_size": "emb_dim",
        "max_position_embeddings": "context_length",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "hidden_act": "activation_function",
    }
    base_model_tp_plan = TP_PLAN
    base_model_fsdp_plan = FSDP_PLAN
    base_model_pp_plan = PP_PLAN  # type: ignore[assignment]  # lists, as in transformers' own

    vocab_size: int = validated_field(size, default=50257)
    context_length: int = validated_field(size, default=1024)
    emb_dim: int = validated_field(size, default=768)
    # trf-ignore: TRF023 the book's names; transformers' are in `attribute_map`
    n_heads: int = validated_field(size, default=12)
    # trf-ignore: TRF023 likewise
    n_layers: int = validated_field(size, default=12)
    drop_rate: float | int = validated_field(rate, default=0.1)
    qkv_bias: bool = False

    drop_rate_emb: float | int | None = validated_field(rate, default=None)
    drop_rate_attn: float | int | None = validated_field(rate, default=None)
    drop_rate_shortcut: float | int | None = validated_field(rate, default=None)
    n_inner: int | None = validated_field(size, default=None)
    activation_function: str = validated_field(activation, default="gelu_new")
    layer_norm_epsilon: float = validated_field(positive, default=1e-5)
    initializer_range: float = validated_field(spread, default=0.02)
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    tie_word_embeddings: bool = False
    add_cross_attention: bool = False
    book_classifier: bool = False
    summary_type: str = "cls_index"
    summary_use_proj: bool = True
    summary_activation: str | None = None
    summary_proj_to_labels: bool = True
    summary_first_dropout: float | int = validated_field(rate, default=0.1)
    use_cache: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None

    def __new__(cls, *args, **kwargs):
        config = super().__new__(cls)
        if kwargs:
            config.__dict__["_given"] = kwargs.keys()  # until `__post_init__`, which sees defaults beside them
        return config

    def __post_init__(self, **kwargs):
        given = self.__dict__.pop("_given", ())
        for name, value in kwargs.items():
            ours = self.attribute_map.get(name)
            if ours and ours in given and getattr(self, ours) != value:
                raise ValueError(
                    f"got {ours}={getattr(self, ours)!r} and {name}={value!r}, which are the same setting; leave one "
                    "of them out"
                )
            if ours or (name == "n_ctx" and value == self.context_length):  # old configs of GPT-2 have both
                continue
            if reason := ignored(name, value, type(self)):
                raise ValueError(reason)
            if name not in COMMON and not name.startswith("_"):
                logger.warning_once(f"{listed({name: value})} is stored, but {type(self).__name__} does not use it")
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        if name in FROM_GPT2:
            raise ValueError(f"got {listed({name: value})}, which is GPT-2's name; here it is {FROM_GPT2[name]}")
        # The alias is resolved before @strict checks the value; otherwise `hidden_size="768"` would pass unchecked.
        if name in type(self).attribute_map:
            setattr(self, type(self).attribute_map[name], value)
        else:
            super().__setattr__(name, value)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with two sizes under transformers' names, too, by which PEFT looks them up here."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in LOOKED_UP}}

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers: what `config.json` holds, with each size under one name."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in LOOKED_UP}

    def validate_architecture(self):
        if getattr(self, "is_heterogeneous", False):
            raise ValueError("got a per_layer_config, but all GPTScratch layers are built alike; remove it")
        if self.emb_dim % self.n_heads != 0:
            fitting = max(self.emb_dim // self.n_heads, 1) * self.n_heads
            raise ValueError(
                f"got emb_dim={self.emb_dim} and n_heads={self.n_heads}, but emb_dim must be a multiple of n_heads; "
                f"use emb_dim={fitting} or another number of heads"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTScratchConfig":
        """The architecture of an official checkpoint: "124M", "355M", "774M" or "1558M".

        Unlike the book's `GPT_CONFIG_124M`, official checkpoints have `qkv_bias` and `tie_word_embeddings`.

        Raises:
            ValueError: there is no such size.
        """
        if name not in PRESETS:
            raise ValueError(f"got preset {name!r}, but the official sizes are {', '.join(PRESETS)}")
        emb_dim, n_layers, n_heads = PRESETS[name]
        values = dict(emb_dim=emb_dim, n_layers=n_layers, n_heads=n_heads, qkv_bias=True, tie_word_embeddings=True)
        return cls(**{**values, **changes})

    @classmethod
    def from_gpt2(cls, config: GPT2Config) -> "GPTScratchConfig":
        """The config of the same model under the book's names. Options outside the architecture are kept, too.

        Raises:
            ValueError: `config` is not a `GPT2Config`.
            StrictDataclassError: GPTScratch does not support an option.
        """
        return in_package("config_translation").from_gpt2(cls, config)

    def to_gpt2(self) -> GPT2Config:
        """The `GPT2Config` of the same model; the inverse of `from_gpt2`.

        Raises:
            ValueError: it is of the book's classifier, which the official class does not compute.
        """
        return in_package("config_translation").to_gpt2(self)

    @classmethod
    def from_book(cls, cfg: dict[str, Any], **defaults: Any) -> "GPTScratchConfig":
        """The config of the book's dict; `defaults` are for keys that it lacks.

        Raises:
            KeyError: a size is missing.
            ValueError: a key is unknown; the message has the remedy.
        """
        return in_package("config_translation").from_book(cls, cfg, defaults)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but an official GPT-2 config is translated.

        A config class of one's own also reads a config of GPTScratch's, as one of its own type.

        Raises:
            ValueError: the config is of another model type.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict and config_dict.get("model_type") != cls.model_type:
            config_dict = in_package("config_translation").read(cls, config_dict, pretrained_model_name_or_path)
        return config_dict, kwargs
