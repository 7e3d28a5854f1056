"""The book's GPTModel as a Transformers model, in as little code as possible: python examples/minimal_model.py

The layers are the book's. Added is what Transformers requires of a model: a config, attention that uses its caches and
attention functions, and a forward pass with its names. This gives `.generate()`, `save_pretrained`, the Auto
classes, gradient checkpointing, padded batches and Trainer. `hf_gpt_scratch/model/modeling_gpt_scratch.py` is the same
with official checkpoints, compilation, parallelism and checks.
"""

import sys
import tempfile

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_gpt_scratch import GPTModel, MultiHeadAttention, TransformerBlock, generate_text_simple

# transformers' name for the cache, which changed in 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MinimalConfig(PreTrainedConfig):
    model_type = "minimal_gpt"
    attribute_map = {"hidden_size": "emb_dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    vocab_size: int = 50257
    context_length: int = 1024
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    use_cache: bool = True

    def cfg(self) -> dict:
        """The book's cfg."""
        names = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias")
        return {name: getattr(self, name) for name in names}


def eager_attention(module, queries, keys, values, attention_mask, scaling, dropout=0.0, **kwargs):
    """The book's attention, with the signature of transformers' attention functions."""
    attn_scores = queries @ keys.transpose(2, 3) * scaling + attention_mask  # (B, H, T, S)
    attn_weights = nn.functional.dropout(attn_scores.softmax(dim=-1), dropout)
    return (attn_weights @ values).transpose(1, 2), attn_weights  # (B, T, H, D)


class CachedAttention(MultiHeadAttention):
    is_causal = True  # read by attention functions

    def __init__(self, config: MinimalConfig, layer_idx: int):
        width, length = config.emb_dim, config.context_length
        super().__init__(width, width, length, config.drop_rate, config.n_heads, config.qkv_bias)
        self.config, self.layer_idx = config, layer_idx

    def forward(self, x, mask, cache):  # type: ignore[override]  # (B, T, E)
        b, num_tokens, _ = x.shape
        heads = (b, num_tokens, self.num_heads, self.head_dim)
        queries, keys, values = (W(x).view(heads).transpose(1, 2) for W in (self.W_query, self.W_key, self.W_value))
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)  # (B, H, S, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout.p if self.training else 0.0
        context_vec, _ = attend(self, queries, keys, values, mask, scaling=self.head_dim**-0.5, dropout=dropout)
        return self.out_proj(context_vec.reshape(b, num_tokens, self.d_out))


class CachedBlock(GradientCheckpointingLayer, TransformerBlock):
    def __init__(self, config: MinimalConfig, layer_idx: int):
        super().__init__(config.cfg())
        self.att = CachedAttention(config, layer_idx)

    def forward(self, x, mask, cache):  # type: ignore[override]
        x = x + self.drop_shortcut(self.att(self.norm1(x), mask, cache))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class MinimalGPT(PreTrainedModel, GenerationMixin):
    config_class = MinimalConfig
    base_model_prefix = "gpt"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["CachedBlock"]

    def __init__(self, config: MinimalConfig):
        super().__init__(config)
        self.gpt = GPTModel(config.cfg())
        self.gpt.trf_blocks = nn.ModuleList(CachedBlock(config, n) for n in range(config.n_layers))  # type: ignore
        self.post_init()

    def get_input_embeddings(self):
        return self.gpt.tok_emb

    def get_output_embeddings(self):
        return self.gpt.out_head

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache) and not self.training:
            cache = DynamicCache(config=self.config)
        x = self.gpt.tok_emb(input_ids)  # (B, T, E)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        inputs = dict(config=self.config, inputs_embeds=x, attention_mask=attention_mask, position_ids=position_ids)
        mask = create_causal_mask(**inputs, **{CACHE: cache})
        x = self.gpt.drop_emb(x + self.gpt.pos_emb(position_ids))
        for block in self.gpt.trf_blocks:
            x = block(x, mask, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.gpt.out_head(self.gpt.final_norm(x[:, kept]))  # (B, T, V)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


AutoConfig.register("minimal_gpt", MinimalConfig)
AutoModelForCausalLM.register(MinimalConfig, MinimalGPT)


def main() -> None:
    config = MinimalConfig(vocab_size=97, context_length=64, emb_dim=48, n_heads=4, n_layers=3, drop_rate=0.0)
    torch.manual_seed(123)
    book = GPTModel(config.cfg()).eval()
    model = MinimalGPT(config).eval()
    model.gpt.load_state_dict(book.state_dict())
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.randint(97, (2, 12))
    expected = generate_text_simple(book, ids, max_new_tokens=20, context_size=64)
    got = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0)
    error = (model(ids).logits - book(ids)).abs().max().item()
    print(f"logits differ by {error:.1e} at most; generated ids are the book's: {torch.equal(expected, got)}")
    sys.exit(0 if error < 1e-4 and torch.equal(expected, got) else 1)


if __name__ == "__main__":
    main()
