"""The GPT of *Build a Large Language Model (From Scratch)*, chapters 3 to 5, in plain PyTorch.

Read it from top to bottom: normalisation, activation, feed-forward network, attention, block, model, text.
Names of classes and parameters are the book's. `cfg` is the book's dict, or a `GPTScratchConfig` for such a model;
beside the book's keys it may set the dropout rates one by one (exercise 4.3) and tie the head, as GPT-2 does.
Other differences from the book: the checks; GELU's constant, which is exact in float64 too; and the mask, which is
made in the forward pass, so it is right even in a model that is built on the meta device and filled later.
`modeling_gpt_scratch.py` has siblings of these classes that are faster and support caches and padding.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H, V vocabulary.
"""

import math

import torch
from torch import nn

from .configuration_gpt_scratch import book_cfg, check_length

GPT_CONFIG_124M = {
    "vocab_size": 50257,  # size of GPT-2's byte-pair encoding
    "context_length": 1024,  # longest sequence, in tokens
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


class LayerNorm(nn.Module):
    """scale · (x − mean) / √(var + eps) + shift over the last dimension (section 4.2)."""

    def __init__(self, emb_dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):  # (…, E)
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)  # divided by E, as in GPT-2, and not by E − 1
        norm_x = (x - mean) / torch.sqrt(var + self.eps)
        return self.scale * norm_x + self.shift

    def extra_repr(self):
        return f"{self.scale.numel()}, eps={self.eps}"


class GELU(nn.Module):
    """GPT-2's approximation of x · Φ(x), with Φ the distribution function of the normal distribution (section 4.3)."""

    def forward(self, x):
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class FeedForward(nn.Module):
    """Linear from E to 4E, GELU, Linear back to E, for each token by itself (section 4.3)."""

    def __init__(self, cfg):
        super().__init__()
        cfg = book_cfg(cfg)
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            GELU(),
            nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):  # (B, T, E)
        return self.layers(x)  # (B, T, E)


class MultiHeadAttention(nn.Module):
    """Causal self-attention in `num_heads` heads side by side (section 3.6).

    Raises:
        ValueError: `d_out` is not a multiple of `num_heads`.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        if d_out % num_heads != 0:
            raise ValueError(
                f"d_out={d_out} must be a multiple of num_heads={num_heads}, so that all heads have the same size"
            )
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads

        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.context_length = context_length
        self.register_load_state_dict_pre_hook(drop_mask)

    def forward(self, x):  # (B, T, d_in)
        """Context vectors (B, T, d_out): for each token, the weighted values of the tokens it may attend to."""
        b, num_tokens, _ = x.shape
        check_length(num_tokens, self.context_length)
        queries = self.W_query(x)  # (B, T, d_out)
        keys = self.W_key(x)
        values = self.W_value(x)

        heads = (b, num_tokens, self.num_heads, self.head_dim)
        queries = queries.view(heads).transpose(1, 2)  # (B, H, T, D)
        keys = keys.view(heads).transpose(1, 2)
        values = values.view(heads).transpose(1, 2)

        attn_scores = queries @ keys.transpose(2, 3)  # (B, H, T, T)
        # True where a token (row) must not attend to another (column): a later one.
        mask = torch.triu(torch.ones(num_tokens, num_tokens, device=x.device), diagonal=1).bool()
        attn_scores = attn_scores.masked_fill(mask, -torch.inf)
        attn_weights = torch.softmax(attn_scores / self.head_dim**0.5, dim=-1)
        attn_weights = self.dropout(attn_weights)

        context_vec = (attn_weights @ values).transpose(1, 2)  # (B, T, H, D)
        context_vec = context_vec.reshape(b, num_tokens, self.d_out)
        return self.out_proj(context_vec)  # (B, T, d_out)


def drop_mask(module, state_dict, prefix, *_):
    """Drops the mask, which the book's code saves: 4 MiB per layer at 1024 tokens."""
    refuse_other_mask(prefix + "mask", state_dict.pop(prefix + "mask", None))


def refuse_other_mask(name, mask):
    """Raises ValueError for a saved mask (…, T, T), True where a token must not attend, that is not the book's."""
    if mask is None or mask.is_meta:
        return
    later = torch.triu(torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device), diagonal=1)
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2] or not (mask.bool() == later).all():
        raise ValueError(
            f"{name} is not the causal mask, so this is another model: in GPT-2 a token attends to itself and to all "
            "tokens before it. If the model was run with GPT-2's mask, leave this tensor out of its state dict"
        )


class TransformerBlock(nn.Module):
    """Norm, attention, dropout, shortcut; norm, feed-forward, dropout, shortcut (section 4.5)."""

    def __init__(self, cfg):
        super().__init__()
        cfg = book_cfg(cfg)
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate_attn"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate_shortcut"])

    def forward(self, x):  # (B, T, E)
        shortcut = x
        x = self.norm1(x)
        x = self.att(x)
        x = self.drop_shortcut(x)
        x = x + shortcut

        shortcut = x
        x = self.norm2(x)
        x = self.ff(x)
        x = self.drop_shortcut(x)
        x = x + shortcut
        return x  # (B, T, E)


class GPTModel(nn.Module):
    """Token and position embeddings, `n_layers` blocks, final norm, output head (section 4.6).

    Its state dict has parameters only. It also loads one from the book's code, which has mask buffers.

    Raises:
        KeyError: `cfg` lacks a size.
        ValueError: this model does not support `cfg`.
    """

    def __init__(self, cfg):
        super().__init__()
        cfg = book_cfg(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate_emb"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        if cfg["tie_word_embeddings"]:  # as in GPT-2
            self.out_head.weight = self.tok_emb.weight
            self.register_load_state_dict_pre_hook(tie_head)

    def forward(self, in_idx):
        """Logits (B, T, V) of the token that follows each of the token ids `in_idx` (B, T).

        Raises:
            ValueError: more tokens than `context_length`.
        """
        _, seq_len = in_idx.shape
        check_length(seq_len, self.pos_emb.num_embeddings)
        tok_embeds = self.tok_emb(in_idx)  # (B, T, E)
        pos_embeds = self.pos_emb(torch.arange(seq_len, device=in_idx.device))  # (T, E)
        x = tok_embeds + pos_embeds
        x = self.drop_emb(x)
        x = self.trf_blocks(x)
        x = self.final_norm(x)
        return self.out_head(x)  # (B, T, V)


def tie_head(module, state_dict, prefix, *_):
    """Adds the head, which a tied checkpoint stores once with the embedding; raises ValueError if they differ."""
    if prefix + "tok_emb.weight" in state_dict:
        shared = state_dict[prefix + "tok_emb.weight"]
        head = state_dict.setdefault(prefix + "out_head.weight", shared)
        if not torch.equal(head, shared):
            raise ValueError("out_head.weight differs from tok_emb.weight; build the model without tie_word_embeddings")


@torch.no_grad()
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """`idx` (B, T) and the `max_new_tokens` most probable tokens after it, (B, T + max_new_tokens); no cache.

    Call `model.eval()` first, or dropout stays on. Longer contexts are cut to their last `context_size` tokens.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])  # (B, T, V)
        logits = getattr(logits, "logits", logits)  # of a Transformers model
        idx_next = logits[:, -1, :].argmax(dim=-1, keepdim=True)  # (B, 1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx


def text_to_token_ids(text, tokenizer):
    """Token ids (1, T), int64. `tokenizer` is tiktoken's or transformers'; `<|endoftext|>` is one token."""
    if hasattr(tokenizer, "encode_ordinary"):  # tiktoken, which refuses special tokens unless they are allowed
        token_ids = tokenizer.encode(text, allowed_special={"<|endoftext|>"})
    else:
        token_ids = tokenizer.encode(text)
    return torch.tensor([token_ids], dtype=torch.long)


def token_ids_to_text(token_ids, tokenizer):
    """The text of token ids (1, T) or (T,)."""
    return tokenizer.decode(token_ids.flatten().tolist())
