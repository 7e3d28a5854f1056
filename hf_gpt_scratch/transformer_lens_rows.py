"""Tells TransformerLens how the language model is built; imported by TransformerLens' import, see `registration.py`."""

from typing import Any

import torch
from torch import nn
from transformer_lens.conversion_utils.conversion_steps import RearrangeTensorConversion
from transformer_lens.conversion_utils.param_processing_conversion import ParamProcessingConversion
from transformer_lens.factories import architecture_adapter_factory as factory
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BlockBridge,
    EmbeddingBridge,
    LinearBridge,
    MLPBridge,
    NormalizationBridge,
    PosEmbedBridge,
    UnembeddingBridge,
)

from .model.layers import LayerNorm


class HookedAttention(AttentionBridge):
    """The eager attention of `CachedAttention`, with TransformerLens' hooks between its steps.

    Its own bridge calls the attention as it is: a hook on the pattern would change nothing, and the scores' would see
    the pattern.
    """

    supports_attn_result = True

    def forward(self, x, attention_mask=None, past_key_values=None, **kwargs):  # (B, T, E)
        """As `CachedAttention.forward`, for attention to the tokens themselves."""
        attention: Any = self.original_component
        x = self.hook_in(x)
        queries, keys, values = (attention.heads(layer(x)) for layer in (self.q, self.k, self.v))  # (B, H, T, D)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        scores = queries @ keys.transpose(2, 3) * attention.scaling  # (B, H, T, S)
        scores = self._apply_reconstruct_attention_mask(scores, attention_mask, scores.shape[3], scores.shape[2])
        pattern = self.hook_pattern(torch.softmax(self.hook_attn_scores(scores), dim=-1))
        context = (pattern @ values).transpose(1, 2)  # (B, T, H, D)
        if self.config.use_attn_result:
            context = self.o.hook_in(context.flatten(2)).view(context.shape)
            x = self._compute_per_head_result(context, *context.shape[2:])
        else:
            x = self.o(context.flatten(2))
        return self.hook_out(self.hook_hidden_states(x)), pattern


class GPTScratchAdapter(ArchitectureAdapter):
    """TransformerLens' names of the book's layers."""

    def __init__(self, cfg: Any):
        super().__init__(cfg)
        heads = dict(n=self.cfg.n_heads)
        self.cfg.normalization_type = "LN"
        self.cfg.positional_embedding_type = "standard"
        self.cfg.gated_mlp = False
        self.cfg.final_rms = False
        self.cfg.attn_only = False
        self.weight_processing_conversions = {
            f"blocks.{{i}}.attn.{name}.weight": ParamProcessingConversion(
                tensor_conversion=RearrangeTensorConversion(pattern, **heads)
            )
            for name, pattern in (
                *((name, "(n h) m -> n m h") for name in "qkv"),
                ("o", "m (n h) -> n h m"),
            )
        }
        self.weight_processing_conversions |= {
            f"blocks.{{i}}.attn.{name}.bias": ParamProcessingConversion(
                tensor_conversion=RearrangeTensorConversion("(n h) -> n h", **heads)
            )
            for name in "qkv"
        }
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.tok_emb"),
            "pos_embed": PosEmbedBridge(name="model.pos_emb"),
            "blocks": BlockBridge(
                name="model.trf_blocks",
                submodules={
                    "ln1": NormalizationBridge(name="norm1", config=self.cfg),
                    "attn": HookedAttention(
                        name="att",
                        config=self.cfg,
                        submodules={
                            "q": LinearBridge(name="W_query"),
                            "k": LinearBridge(name="W_key"),
                            "v": LinearBridge(name="W_value"),
                            "o": LinearBridge(name="out_proj"),
                        },
                    ),
                    "ln2": NormalizationBridge(name="norm2", config=self.cfg),
                    "mlp": MLPBridge(
                        name="ff",
                        config=self.cfg,
                        submodules={"in": LinearBridge(name="layers.0"), "out": LinearBridge(name="layers.2")},
                    ),
                },
            ),
            "ln_final": NormalizationBridge(name="model.final_norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="out_head"),
        }

    def prepare_model(self, hf_model: Any) -> None:
        """Replaces the norms by torch's, whose parameters have the names that TransformerLens reads."""
        super().prepare_model(hf_model)
        for parent in list(hf_model.modules()):
            for name, norm in list(parent.named_children()):
                if isinstance(norm, LayerNorm):
                    replacement = nn.LayerNorm(norm.scale.shape, norm.eps, device="meta")
                    replacement.weight, replacement.bias = norm.scale, norm.shift
                    setattr(parent, name, replacement)


# `boot_transformers` looks into the first table alone, the rest of TransformerLens into the second.
ARCHITECTURE = "GPTScratchForCausalLM"
factory.SUPPORTED_ARCHITECTURES.setdefault(ARCHITECTURE, GPTScratchAdapter)
factory.ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, GPTScratchAdapter)
