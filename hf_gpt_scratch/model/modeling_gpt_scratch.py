# SPDX-License-Identifier: Apache-2.0  # trf-ignore: TRF028 as this line says it
"""The book's layers as a Transformers model: transformers provides masks, caches, losses and loading.

Shapes: B batch, T query tokens, S key tokens (cached ones and T), E emb_dim, V vocabulary.
"""

import os
import re
from functools import wraps
from importlib import import_module
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn import functional as F

from .compat import (
    CACHE,
    LibraryCheck,
    NoTranslation,
    Plain,
    advice,
    check_growth,
    check_mask,
    explained,
    few,
    is_untested,
    one_cache,
    refuse_tensor_parallel_loading,
    refuse_unread,
)

with explained():
    from transformers import (
        Cache,
        DynamicCache,
        EncoderDecoderCache,
        GenerationMixin,
        GPT2LMHeadModel,
        GPT2Model,
    )
    from transformers import initialization as init
    from transformers.activations import ACT2FN
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import (
        BaseModelOutputWithPastAndCrossAttentions,
        CausalLMOutputWithCrossAttentions,
    )
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto import modeling_auto
    from transformers.utils import can_return_tuple, logging
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs

    from .configuration_gpt_scratch import (
        HEAD_PP_PLAN,
        HEAD_TP_PLAN,
        IN_PACKAGE,
        PACKAGE,
        GPTScratchConfig,
        check_length,
    )
    from .layers import GELU, FeedForward, LayerNorm, MultiHeadAttention, TransformerBlock

logger = logging.get_logger(__name__)


FROM_TOKENIZER = "use the tokenizer that it was trained with, or model.resize_token_embeddings"

# Translation, and what makes a model cheap, do not ship: a model that comes along with its code does without.
Translation: Any = import_module(f"{PACKAGE}.interop").Interop if IN_PACKAGE else NoTranslation
decoding: Any = import_module(f"{PACKAGE}.decoding") if IN_PACKAGE else Plain
chunked: Any = import_module(f"{PACKAGE}.loss") if IN_PACKAGE else Plain
if IN_PACKAGE:
    import_module(f"{PACKAGE}.int8")  # whose quantizer transformers' loader then finds; it ships with quantized models
check_library = LibraryCheck(lambda: GPTScratchForCausalLM)


class FusedLayerNorm(LayerNorm, nn.LayerNorm):
    """The book's `LayerNorm` in one operation, which is as exact as the official one in half precision, too.

    By its class Trainer knows that its parameters have no weight decay.
    """

    def __init__(self, emb_dim, eps=1e-5):
        nn.Module.__init__(self)  # not nn.LayerNorm's, which makes parameters of other names
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class FusedGELU(GELU):
    """The book's `GELU` in one operation."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class AnyFeedForward(FeedForward):
    """The book's `FeedForward` with the width and the activation that the config names."""

    def __init__(self, config: GPTScratchConfig):
        nn.Module.__init__(self)
        book_gelu = config.activation_function == "gelu_new"
        n_inner = 4 * config.emb_dim if config.n_inner is None else config.n_inner
        self.layers = nn.Sequential(  # trf-ignore: TRF036 the names of the book's weights
            nn.Linear(config.emb_dim, n_inner),
            FusedGELU() if book_gelu else ACT2FN[config.activation_function],
            nn.Linear(n_inner, config.emb_dim),
        )

    def forward(self, x):  # (B, T, E)
        if self.layers._forward_hooks or self.layers._forward_pre_hooks:
            return self.layers(x)
        widen, activation, narrow = self.layers
        return decoding.product(narrow, activation(decoding.product(widen, x)))


def eager_attention(module, queries, keys, values, attention_mask=None, *, scaling, dropout=0.0, **kwargs):
    """softmax(Q Kᵀ · scaling + mask) V, written out; the signature is that of transformers' attention functions.

    Args:
        queries: (B, H, T, D); keys and values: (B, H, S, D).
        attention_mask: broadcasts to (B, H, T, S); bool (True: may attend) or added to the scores.

    Returns:
        context vectors (B, T, H, D) and attention weights (B, H, T, S).
    """
    attn_scores = queries @ keys.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        # The smallest number, not -inf: a row that is all padding must not become NaN.
        attn_scores = attn_scores.masked_fill(~attention_mask, torch.finfo(attn_scores.dtype).min)
    elif attention_mask is not None:
        attn_scores = attn_scores + attention_mask
    attn_weights = torch.softmax(attn_scores, dim=-1).to(values.dtype)
    attn_weights = F.dropout(attn_weights, dropout, training=module.training)
    return (attn_weights @ values).transpose(1, 2), attn_weights


def upcast_attention(module, queries, keys, values, attention_mask=None, **kwargs):
    """`eager_attention` with scores and softmax in float32, for `reorder_and_upcast_attn`."""
    with torch.autocast(queries.device.type, enabled=False):
        return eager_attention(module, queries.float(), keys.float(), values, attention_mask, **kwargs)


class CachedAttention(MultiHeadAttention):
    """The book's `MultiHeadAttention` with a cache, given masks, and transformers' attention functions."""

    is_causal = True  # read by attention functions

    def __init__(self, config: GPTScratchConfig, layer_idx: int):
        rate = config.drop_rate if config.drop_rate_attn is None else config.drop_rate_attn
        width = config.emb_dim
        super().__init__(width, width, config.context_length, rate, config.n_heads, config.qkv_bias)
        self.config = config  # attention functions may read it
        self.layer_idx = layer_idx
        # CODEPATH: official checkpoints scale by 1/√D alone; Stanford's Mistral models use the other options
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        # CODEPATH: as above
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1

    def heads(self, x):  # (B, S, E)
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)  # (B, H, S, D)

    def at_positions(self, heads, position_ids=None, **kwargs):
        """Queries or keys (B, H, T, D) of tokens at `position_ids` (B or 1, T); a subclass may rotate them."""
        return heads

    def keys_and_values(self, x, past_key_values, kwargs):
        """Keys and values of x (B, T, E), after those in the cache: (B, H, S, D) each."""
        keys, values = (
            self.at_positions(self.heads(decoding.product(self.W_key, x)), **kwargs),
            self.heads(decoding.product(self.W_value, x)),
        )
        if past_key_values is None:
            return keys, values
        return past_key_values.update(keys, values, self.layer_idx, kwargs=kwargs)

    def forward(  # type: ignore[override]  # a sibling with more arguments
        self, x, attention_mask=None, past_key_values=None, states=None, **kwargs
    ):
        """Context vectors (B, T, E), and attention weights (B, H, T, S) or None if the attention function returns none.

        vLLM parses the source of this method for the look-up of the attention function and its only call.

        Args:
            x: (B, T, E).
            attention_mask: in the form that the config's attention function needs.
            past_key_values: anything with `update(keys, values, layer_idx, kwargs=kwargs)` that returns all keys and
                values so far; a paged cache also adds arguments of the attention function to `kwargs`.
            states: (B, S, E), which keys and values are computed from; default: x.
            kwargs: passed to the attention function.
        """
        queries = self.at_positions(self.heads(decoding.product(self.W_query, x)), **kwargs)  # (B, H, T, D)
        keys, values = self.keys_and_values(x if states is None else states, past_key_values, kwargs)
        # CODEPATH: no official checkpoint uses it, but Stanford's Mistral models do
        eager = upcast_attention if self.config.reorder_and_upcast_attn else eager_attention
        attention_function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        context_vec, attn_weights = attention_function(
            self,
            queries,
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
            **kwargs,
        )  # (B, T, H, D); vLLM: (B·T, H·D)
        return decoding.product(self.out_proj, context_vec.reshape(*x.shape[:2], -1)), attn_weights


class CrossAttention(CachedAttention):
    """Attention from the tokens to an encoder's states: queries from the tokens, keys and values from the states."""

    is_causal = False

    def keys_and_values(self, x, past_key_values, kwargs):
        """Those of the encoder's states x (B, S, E); an `EncoderDecoderCache` stores those of the first call."""
        if past_key_values is None:
            return super().keys_and_values(x, None, kwargs)
        if past_key_values.is_updated.get(self.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        past_key_values.is_updated[self.layer_idx] = True
        return super().keys_and_values(x, past_key_values.cross_attention_cache, kwargs)


class GPTScratchBlock(GradientCheckpointingLayer, TransformerBlock):
    """The book's `TransformerBlock` with these siblings, and with cross-attention if the config says so."""

    norm1: nn.Module  # type: ignore[assignment]  # a subclass may have another
    norm2: nn.Module  # type: ignore[assignment]

    def __init__(self, config: GPTScratchConfig, layer_idx: int):
        nn.Module.__init__(self)
        self.att = CachedAttention(config, layer_idx)
        self.ff = AnyFeedForward(config)
        self.norm1 = FusedLayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.norm2 = FusedLayerNorm(config.emb_dim, config.layer_norm_epsilon)
        rate = config.drop_rate if config.drop_rate_shortcut is None else config.drop_rate_shortcut
        self.drop_shortcut = nn.Dropout(rate)
        adding = [self.att.out_proj, self.ff.layers[2]]
        if config.add_cross_attention:
            self.cross_att = CrossAttention(config, layer_idx)
            self.norm_cross = FusedLayerNorm(config.emb_dim, config.layer_norm_epsilon)
            adding.append(self.cross_att.out_proj)
        for projection in adding:
            projection.adds_to_shortcut = True  # type: ignore[assignment]  # a flag, not a module

    def forward(
        self,
        x,
        attention_mask=None,
        past_key_values=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        **kwargs,
    ):
        """As in the book; with an encoder's states, norm, cross-attention, dropout and shortcut between its halves."""
        both = isinstance(past_key_values, EncoderDecoderCache)
        cache = past_key_values.self_attention_cache if both else past_key_values
        shortcut = x
        x, _ = self.att(self.norm1(x), attention_mask, cache, **kwargs)
        x = self.drop_shortcut(x) + shortcut

        if encoder_hidden_states is not None:
            shortcut = x
            x, _ = self.cross_att(self.norm_cross(x), encoder_attention_mask, past_key_values, encoder_hidden_states)
            x = self.drop_shortcut(x) + shortcut

        shortcut = x
        x = self.drop_shortcut(self.ff(self.norm2(x)))
        return x + shortcut


# The parameters that every base model has; any other kind of them is a quantized weight's, or another norm's.
BASE_WEIGHT = re.compile(
    r"(model\.)?(tok_emb|pos_emb|final_norm|trf_blocks\.\d+\.(att\.(W_query|W_key|W_value|out_proj)|ff\.layers\.[02]|norm[12]))"
    r"\.(?P<kind>\w+)"
)
QUANTIZED_HEAD = re.compile(r"out_head\.(?!weight$|bias$)\w+")  # unlike a float one, it is never newly initialised


def is_base_weight(name: str, exactly: bool = False) -> bool:
    """Whether a parameter, with or without the prefix, quantized or not, belongs to a module of every base model.

    Args:
        exactly: count only GPT-2's own parameters, not others of these modules: a quantized weight, or an RMSNorm's.
    """
    found = BASE_WEIGHT.fullmatch(name)
    if exactly:
        kinds = ("scale", "shift") if "norm" in name else ("weight", "bias")
        return found is not None and found["kind"] in kinds and not name.endswith("emb.bias")
    return found is not None or QUANTIZED_HEAD.fullmatch(name) is not None


class GPTScratchPreTrainedModel(Translation):
    """The base of all models here: initialisation and loading; in the package, `Interop` with the book and GPT-2."""

    config_class: type[GPTScratchConfig] = GPTScratchConfig
    config: GPTScratchConfig
    block_class: type[GPTScratchBlock] = GPTScratchBlock  # which a subclass may replace
    base_model_prefix = "model"
    _input_embed_layer = "tok_emb"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTScratchBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": GPTScratchBlock,
        "attentions": OutputRecorder(CachedAttention, layer_name=".att", index=1),
        "cross_attentions": OutputRecorder(CrossAttention, layer_name=".cross_att", index=1),
    }

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # accelerate keeps modules of these classes on one device.
        cls._no_split_modules = [cls.block_class.__name__]

    @torch.no_grad()
    def _init_weights(self, module):
        """GPT-2's scheme: normal(0, initializer_range); ÷ √(2 · n_layers) where a block adds to the shortcut."""
        super()._init_weights(module)
        if isinstance(module, LayerNorm):
            init.ones_(module.scale)
            init.zeros_(module.shift)
        elif getattr(module, "adds_to_shortcut", False):
            init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.n_layers) ** 0.5)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs) -> Self:
        """As in transformers, but raises an error if base weights are missing from the checkpoint.

        Heads and cross-attention may be missing; they are initialised, and transformers warns about it.

        Raises:
            ValueError: weights are missing; the message names them. Or the options ask for tensor parallelism, and
                transformers is older than 5.22.
        """
        refuse_tensor_parallel_loading(kwargs)
        if is_untested():
            check_library()
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        own_block = cls.block_class is not GPTScratchBlock  # whose weights may be new
        missing = sorted(name for name in info["missing_keys"] if is_base_weight(name, exactly=own_block))
        if missing and not output_loading_info:
            raise ValueError(
                f"the checkpoint has no weights for {few(missing)}, which would be random; use a "
                f"complete GPT-2 or GPTScratch checkpoint. If it is one, {advice()}"
            )
        if cls in cls.kinds():
            known = {name for kind in cls.kinds() for name in (kind.__name__, kind.gpt2_class.__name__)}
            others = [name for name in model.config.architectures or [] if name not in known]
            if others:
                logger.warning(
                    f"the checkpoint is of the class {str(others[0])[:100]!r}, but is loaded as {cls.__name__}, which "
                    f"may compute something else; load it with its own class"
                )
        return (model, info) if output_loading_info else model  # type: ignore[return-value]  # as transformers does

    def save_pretrained(  # type: ignore[override]  # keyword-only, with another default
        self, save_directory: str | os.PathLike, *, save_original_format: bool = False, **kwargs
    ):
        """As in transformers, but by our names unless `save_original_format=True`; for GPT-2's see `save_as_gpt2`."""
        if auto_map := self.auto_map():
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **auto_map}
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)

    @classmethod
    def kinds(cls) -> "tuple[type[GPTScratchPreTrainedModel], ...]":
        """The classes of this package, one for each official one."""
        from .heads_gpt_scratch import MODELS  # here, since that file imports this one

        return MODELS

    def auto_map(self) -> dict[str, str]:
        """The class that each Auto class loads from a saved model; empty for a class outside this package."""
        if type(self) not in self.kinds() or self._auto_class is None:
            return {}
        return {name: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for name, kind in AUTO_CLASSES.items()}


# trf-ignore: TRF057 docstrings written by hand give shapes and errors, on every version of transformers
class GPTScratchModel(GPTScratchPreTrainedModel):
    """Embeddings, blocks and final norm."""

    gpt2_class = GPT2Model

    def __init__(self, config: GPTScratchConfig, block_class: type[GPTScratchBlock] | None = None):
        super().__init__(config)
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb: nn.Module = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate if config.drop_rate_emb is None else config.drop_rate_emb)
        make_block = block_class or self.block_class
        self.trf_blocks = nn.ModuleList(make_block(config, i) for i in range(config.n_layers))
        self.final_norm = FusedLayerNorm(config.emb_dim, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    # trf-ignore: TRF057 as above
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """The hidden states after the final norm.

        Args:
            input_ids: (B, T), or give `inputs_embeds` (B, T, E).
            attention_mask: (B, S), 1 for tokens and 0 for padding, including cached tokens; or a complete 4-D mask.
            position_ids: (B, T) or (1, T); default: continue from the end of the cache.
            past_key_values, cache: the cache, under its old name or its name since transformers 5.24.
            token_type_ids: (B, T), embedded by `tok_emb` as in GPT-2.
            encoder_hidden_states: (B, S, E), for a model with `add_cross_attention`.
            encoder_attention_mask: (B, S), 1 for states and 0 for padding.

        Returns:
            `last_hidden_state` (B, T, E).

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`, or of another shape; no tokens, or more than
                `context_length`; a mask for more or fewer tokens than there are; or an encoder's states for a model
                without cross-attention.
            IndexError: an id or a position that the model does not have; on a GPU torch stops the process.
            TypeError: a cache under a name that would be ignored.
            RuntimeError: this transformers passes its cache in an unexpected way.
        """
        cache = one_cache(past_key_values, cache, kwargs, attention_mask)
        if is_untested():
            check_library()
            if "paged" in self.config._attn_implementation:  # trf-ignore: TRF051 chooses only a check
                check_library("generate_batch")
            refuse_unread(kwargs)
        self._check_inputs(input_ids, inputs_embeds, encoder_hidden_states)
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self._embedded(self.tok_emb, "input_ids", input_ids, FROM_TOKENIZER)  # (B, T, E)
        needs_no_mask = attention_mask is None and position_ids is None and cache is None and self._compiled_for_sdpa()
        if use_cache and cache is None:
            cache = decoding.growing_cache(self.config)
        if use_cache and self.config.add_cross_attention and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))

        num_new = inputs_embeds.shape[1]
        num_past = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if position_ids is None:
            past = torch.arange(num_new, device=inputs_embeds.device).unsqueeze(0) + num_past
            position_ids = cast(torch.LongTensor, past)
        self._check_positions(position_ids, num_past + num_new)
        looks = isinstance(num_past, int) and not torch.compiler.is_compiling()
        if looks and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            check_mask(attention_mask, num_past, num_new)
        causal_mask = None
        if not needs_no_mask:
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
        if encoder_hidden_states is not None:
            kwargs["encoder_hidden_states"] = encoder_hidden_states
            kwargs["encoder_attention_mask"] = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )

        x = inputs_embeds
        # In a later stage of a pipeline it is an Identity, and x already has the positions.
        if not isinstance(self.pos_emb, nn.Identity):
            x = x + self._embedded(self.pos_emb, "position_ids", position_ids, "give padding position 0")
        if token_type_ids is not None:
            x = x + self._embedded(self.tok_emb, "token_type_ids", token_type_ids, FROM_TOKENIZER)
        x = self.drop_emb(x)
        # A checkpointed block runs twice, and would add to the cache twice.
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.trf_blocks:
            x = block(
                x,
                causal_mask,
                None if checkpointing else cache,
                position_ids=position_ids,
                use_cache=use_cache,
                **kwargs,
            )
        x = self.final_norm(x)
        if looks and isinstance(cache, Cache) and not checkpointing and self._has_first_block():
            check_growth(cache, num_past + num_new)
        output: dict[str, Any] = {CACHE: cache if use_cache else None}
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=x, **output)

    def _check_inputs(self, input_ids, inputs_embeds, encoder_hidden_states):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        for name, given, shape in (("input_ids", input_ids, "(B, T)"), ("inputs_embeds", inputs_embeds, "(B, T, E)")):
            if given is not None and given.ndim != shape.count(",") + 1:
                raise ValueError(
                    f"got {name} of shape {tuple(given.shape)}, but it must be {shape}; one text is {name}.unsqueeze(0)"
                )
        if encoder_hidden_states is not None and not self.config.add_cross_attention:
            raise ValueError(
                "got encoder_hidden_states, but the model has no cross-attention layers; build it with "
                "add_cross_attention=True"
            )

    def _compiled_for_sdpa(self):
        """transformers always makes a mask for a compiled model, and with a mask sdpa computes all pairs of tokens."""
        sdpa = self.config._attn_implementation == "sdpa"  # trf-ignore: TRF051 concerns the mask alone
        return sdpa and torch.compiler.is_compiling() and not torch.compiler.is_exporting()

    def _has_first_block(self):
        """Whether the first block is in this stage of a pipeline: a cache counts the tokens of its first layer."""
        first = self.trf_blocks[0]
        return isinstance(first, GPTScratchBlock) and first.att.layer_idx == 0

    @staticmethod
    def _embedded(embedding, name, ids, remedy):
        if torch.compiler.is_compiling():
            return embedding(ids)
        try:
            return embedding(ids)
        except IndexError as error:  # a CPU's, which does not say of what; a GPU stops
            found = f"got {name} from {ids.min().item()} to {ids.max().item()}"
            raise IndexError(f"{found}, but this model has 0 to {len(embedding.weight) - 1}; {remedy}") from error

    def _check_positions(self, position_ids, num_tokens):
        # Padding takes no position, so more than context_length tokens may still fit: the positions decide. On a GPU
        # reading them has to wait, so there they are checked only if there are more tokens than positions.
        if torch.compiler.is_compiling() or position_ids.device.type == "meta":
            return
        if not position_ids.numel():
            raise ValueError("got no tokens; give at least one, such as the token that texts begin with")
        too_many = isinstance(num_tokens, int) and num_tokens > self.config.context_length
        if too_many or position_ids.device.type == "cpu":
            check_length(int(position_ids.max()) + 1, self.config.context_length)


# trf-ignore: TRF057 docstrings written by hand give shapes and errors, on every version of transformers
class GPTScratchForCausalLM(GPTScratchPreTrainedModel, GenerationMixin):
    """`GPTScratchModel` and the output head: the book's `GPTModel`, with everything that transformers offers."""

    gpt2_class = GPT2LMHeadModel
    _tied_weights_keys = {"out_head.weight": "model.tok_emb.weight"}
    chunked_loss = True  # set to False on a model to differentiate its loss twice
    _tp_plan: Any = HEAD_TP_PLAN
    _pp_plan: Any = HEAD_PP_PLAN

    def __init__(self, config: GPTScratchConfig):
        super().__init__(config)
        self.model = GPTScratchModel(config, self.block_class)
        self.out_head: nn.Module = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        # transformers ties weights after distributing; FSDP would then hold two matrices, and one would not be trained.
        if mesh_manager is not None and distributed_config.tp_size == 1 and model.config.tie_word_embeddings:
            model.out_head.weight = model.model.tok_emb.weight
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def generate(self, *args, **kwargs):
        """As in transformers, after a check that a tiny model generates the right ids; see `compat.py`.

        Raises:
            RuntimeError: it does not.
        """
        check_library()
        with decoding.onednn_products():
            return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, with the check of `generate`."""
        check_library("generate_batch")
        return super().init_continuous_batching(*args, **kwargs)

    @wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):  # type: ignore[override]  # of the same signature
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        # PEFT's prompts look for the cache here under its old name alone; without it each step would get the prompt.
        if CACHE in inputs:
            inputs["past_key_values"] = inputs.pop(CACHE)
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(  # type: ignore[misc]  # its `self` is declared as a protocol
            generation_config, model_kwargs, *args, **kwargs
        )
        made = model_kwargs.get(CACHE)
        if made is not given and type(made) is DynamicCache and not getattr(made, "offloading", False):
            model_kwargs[CACHE] = decoding.growing_cache(self.config)

    def get_output_embeddings(self) -> nn.Module:
        return self.out_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.out_head = new_embeddings

    # trf-ignore: TRF057 as above
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """The logits of the token after each token, and the loss if there are labels.

        Args:
            labels: (B, T), usually `input_ids`: the shift by one happens inside; -100 is ignored.
            logits_to_keep: the number of last tokens, or the indices, whose logits are computed; 0 means all.

        Returns:
            `logits` (B, T, V), and `loss`, the mean over the labels, if there are any. In training, with labels, the
            loss is computed without the logits, which are computed when they are read; in the package, by `loss.py`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        further = {name: outputs.get(name) for name in (CACHE, "hidden_states", "attentions", "cross_attentions")}
        x = outputs.last_hidden_state  # (B, T, E)
        training = labels is not None and self.training and torch.is_grad_enabled()
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if training and self.chunked_loss and keeps_all and chunked.can_skip_logits(self):
            return chunked.output_without_logits(self.out_head, x, labels, kwargs, further)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = decoding.product(self.out_head, x[:, kept, :])  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithCrossAttentions(loss=loss, logits=logits, **further)


AUTO_CLASSES: dict[str, type[GPTScratchPreTrainedModel]] = {}  # of all heads


def enter(auto_class: str, names: Any, model_class: type[GPTScratchPreTrainedModel]) -> None:
    """Makes ours the class of one of transformers' Auto classes, and enters its name in transformers' table of those.

    Trainer and the pipelines look up names there; Trainer's label smoothing shifts the labels of language models.
    """
    AUTO_CLASSES[auto_class] = model_class
    names[GPTScratchConfig.model_type] = model_class.__name__


# First the one for a config that names no architecture.
enter("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, GPTScratchForCausalLM)
enter("AutoModel", modeling_auto.MODEL_MAPPING_NAMES, GPTScratchModel)
