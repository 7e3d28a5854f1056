"""The GPT of *Build a Large Language Model (From Scratch)*, chapters 3 to 5, in plain PyTorch.

Read it from top to bottom: normalisation, activation, feed-forward network, attention, block, model, text.
Names of classes and parameters are the book's. `cfg` is the book's dict or a `GPTScratchConfig`.

Shapes: B batch, T query tokens, S key tokens (cached ones and T), E emb_dim, H heads, D = E / H, V vocabulary.
"""

import difflib
import re

import torch
from torch import nn
from torch.nn import functional as F

GPT_CONFIG_124M = {
    "vocab_size": 50257,  # size of GPT-2's byte-pair encoding
    "context_length": 1024,  # longest sequence, in tokens
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}

# What a config may say beyond the book's seven keys; None means "follow the rule beside it".
DEFAULTS = {
    "drop_rate": 0.1,
    "drop_rate_emb": None,  # drop_rate
    "drop_rate_attn": None,  # drop_rate
    "drop_rate_shortcut": None,  # drop_rate
    "qkv_bias": False,
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,  # 4 * emb_dim
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": False,
}


SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")

# What other programs call them. Beside the book's name, with the same value, such a key does no harm.
OTHER_NAMES = {
    **dict.fromkeys(("n_vocab", "vocabulary_size"), "vocab_size"),
    **dict.fromkeys(
        ("n_positions", "n_ctx", "block_size", "ctx_len", "max_seq_len", "max_seq_length", "max_position_embeddings"),
        "context_length",
    ),
    **dict.fromkeys(
        ("n_embd", "n_embed", "d_model", "embed_dim", "embed_size", "embedding_dim", "embedding_size", "hidden_size"),
        "emb_dim",
    ),
    **dict.fromkeys(("n_head", "num_heads", "heads", "num_attention_heads", "nhead"), "n_heads"),
    **dict.fromkeys(("n_layer", "num_layers", "layers", "n_blocks", "num_blocks", "num_hidden_layers"), "n_layers"),
    **dict.fromkeys(("dropout", "dropout_rate", "p_dropout"), "drop_rate"),
    "embd_pdrop": "drop_rate_emb",
    "attn_pdrop": "drop_rate_attn",
    "resid_pdrop": "drop_rate_shortcut",
    **dict.fromkeys(("hidden_dim", "d_ff", "ffn_dim", "intermediate_size"), "n_inner"),
    **dict.fromkeys(("attention_bias", "use_bias"), "qkv_bias"),
    **dict.fromkeys(("layer_norm_eps", "norm_eps", "eps"), "layer_norm_epsilon"),
    **dict.fromkeys(("tie_weights", "tie_embeddings", "weight_tying"), "tie_word_embeddings"),
    **dict.fromkeys(("activation", "act", "act_fn", "afn", "hidden_activation"), "activation_function"),
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
# Change nothing that GPTModel computes from given weights; of `activation_function` FeedForward sees to that.
HARMLESS = (
    "activation_function",
    "initializer_range",
    "reorder_and_upcast_attn",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


# What other models have, and what to do about it.
FOREIGN = {
    "(torch_)?dtype": "weights keep the dtype that they have; call .to(dtype) on the model",
    ".*kv_(heads|groups)|num_key_value_heads": "here each head has its own keys and values; groups are another model",
    ".*rope.*|.*rotary.*": "here positions are learned, in pos_emb; a model with rotary ones is another model",
    ".*window.*": "here a token sees all before it; take it out if the context is no longer than the window",
    ".*experts?.*|.*moe.*": "here a layer has one feed-forward network; a mixture of experts is another model",
}


def what_to_do(name, known):
    """About a key that means nothing here: its right name, or why there is none; None if nothing can be said."""
    meant = OTHER_NAMES.get(name) or next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), None)
    if meant:
        return f"here it is {meant}: rename it, or take it out"
    return next((words for pattern, words in FOREIGN.items() if re.fullmatch(pattern, name)), None)


def settings(cfg):
    """`cfg`, a dict or a config object, as one dict with nothing left open.

    Raises:
        KeyError: a size is missing.
        ValueError: a key of a dict means nothing here.
    """
    if isinstance(cfg, dict) and "model_type" not in cfg:
        check_keys(cfg)
    else:  # a config, or its `to_dict`: it has checked its keys, and has many of transformers
        cfg = cfg if isinstance(cfg, dict) else vars(cfg)
        cfg = {name: cfg[name] for name in (*SIZES, *DEFAULTS, *HARMLESS) if name in cfg}
    cfg = {**DEFAULTS, **cfg}
    missing = [k for k in SIZES if k not in cfg]
    if missing:
        raise KeyError(f"the model config lacks {missing}; start from GPT_CONFIG_124M and change what differs")
    for place in ("drop_rate_emb", "drop_rate_attn", "drop_rate_shortcut"):
        if cfg[place] is None:
            cfg[place] = cfg["drop_rate"]
    if cfg["n_inner"] is None:
        cfg["n_inner"] = 4 * cfg["emb_dim"]
    return cfg


def check_keys(cfg):
    """Raises ValueError when a dict has a key that would be ignored, though it may say what the model computes."""
    for name, value in cfg.items():
        same = OTHER_NAMES.get(name)
        if name in (*SIZES, *DEFAULTS, *HARMLESS) or (same in cfg and cfg[same] == value):
            continue
        if name == "bias" and value is True:  # nanoGPT's: on all layers, as here, where qkv_bias says which are not
            continue
        raise ValueError(
            f"the model config has {name}={str(value)[:80]}, which GPTModel does not know; "
            f"{what_to_do(name, (*SIZES, *DEFAULTS)) or 'take it out if it says nothing about the model'}"
        )


def check_length(num_tokens, context_length):
    """Raises ValueError when a sequence asks for positions that the model does not have."""
    if num_tokens > context_length:
        raise ValueError(
            f"the sequence has {num_tokens} tokens, but the model has only context_length={context_length} positions; "
            f"keep the last ones, idx[:, -{context_length}:], generate fewer, or train with a longer context_length"
        )


class LayerNorm(nn.Module):
    """scale · (x − mean) / √(var + eps) + shift over the last dimension, with the biased variance (1/E)."""

    def __init__(self, emb_dim, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)

    def extra_repr(self):
        return f"{self.scale.numel()}, eps={self.eps}"


class GELU(nn.Module):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))): GPT-2's approximation of x · Φ(x)."""

    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """Linear from E to `n_inner` (4E), activation, Linear back to E; each token by itself (section 4.3).

    Args:
        activation: a module instead of the book's GELU.
    """

    def __init__(self, cfg, activation=None):
        super().__init__()
        cfg = settings(cfg)
        if activation is None and cfg.get("activation_function", TANH_GELU[0]) not in TANH_GELU:
            raise ValueError(
                f"got activation_function={cfg['activation_function']!r}, but the book's layers have {TANH_GELU[0]!r}; "
                "build a GPTScratchForCausalLM, or give FeedForward the activation"
            )
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], cfg["n_inner"]),
            activation or GELU(),
            nn.Linear(cfg["n_inner"], cfg["emb_dim"]),
        )

    def forward(self, x):  # (B, T, E)
        return self.layers(x)  # (B, T, E)


def causal_mask(num_queries, num_keys, padding_mask=None, device=None):
    """True where a query may see a key: not a later one, and not padding.

    The queries are the last `num_queries` of the `num_keys` tokens; the earlier keys come from a cache.

    Args:
        padding_mask: (B, S), 1 for tokens and 0 for padding.

    Returns:
        (T, S), or (B, 1, T, S) with a padding mask; bool.
    """
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    if padding_mask is not None:
        mask = mask & padding_mask.bool()[:, None, None, :]
    return mask


def causal_attention(module, queries, keys, values, attention_mask=None, *, scaling, dropout=0.0, **kwargs):
    """softmax(Q Kᵀ · scaling + mask) V, written out; the signature is that of transformers' attention functions.

    Args:
        queries: (B, H, T, D); keys and values: (B, H, S, D).
        attention_mask: broadcasts to (B, H, T, S); bool (True: may see) or added to the scores. None: plain causal.

    Returns:
        context vectors (B, T, H, D) and attention weights (B, H, T, S).
    """
    attn_scores = queries @ keys.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is None:
        attention_mask = causal_mask(queries.shape[2], keys.shape[2], device=queries.device)
    if attention_mask.dtype == torch.bool:
        # The smallest number, not -inf: a row of nothing but padding must not become NaN.
        attn_scores = attn_scores.masked_fill(~attention_mask, torch.finfo(attn_scores.dtype).min)
    else:
        attn_scores = attn_scores + attention_mask
    attn_weights = torch.softmax(attn_scores, dim=-1).to(values.dtype)
    attn_weights = F.dropout(attn_weights, dropout, training=module.training)
    return (attn_weights @ values).transpose(1, 2), attn_weights


def drop_mask_buffer(module, state_dict, prefix, *_):
    """The book keeps its causal mask in the state dict (4 MiB a layer at 1024 tokens); here it is computed."""
    state_dict.pop(prefix + "mask", None)


class MultiHeadAttention(nn.Module):
    """Causal self-attention in `num_heads` heads side by side (section 3.6).

    Args:
        scaling: factor on the attention scores; 1/√D if None.
        layer_idx: this layer's place in the cache.

    Raises:
        ValueError: `d_out` is not a multiple of `num_heads`.
    """

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False, *, scaling=None, layer_idx=0):
        super().__init__()
        if d_out % num_heads != 0:
            raise ValueError(f"d_out={d_out} must be a multiple of num_heads={num_heads}, so that all heads are equal")
        self.context_length = context_length
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.scaling = self.head_dim**-0.5 if scaling is None else scaling
        self.layer_idx = layer_idx
        self.is_causal = True

        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(drop_mask_buffer)

    def forward(
        self,
        x,
        attention_mask=None,
        past_key_values=None,
        attention_function=causal_attention,
        return_weights=False,
        **kwargs,
    ):
        """Context vectors: for each token, the values of the tokens it may see, weighted.

        Args:
            x: (B, T, d_in).
            attention_mask: as `attention_function` wants it; None is plain causal for `causal_attention`.
            past_key_values: anything with `update(keys, values, layer_idx, kwargs=kwargs)` that returns all keys and
                values so far; a paged cache also writes into `kwargs` what the attention function is to know.
            kwargs: handed to `attention_function`.

        Returns:
            (B, T, d_out), and the attention weights (B, H, T, S) beside it if asked for (None where the
            attention function does not compute them).
        """
        if attention_mask is None and past_key_values is None and attention_function is causal_attention:
            check_length(x.shape[1], self.context_length)

        heads = (*x.shape[:-1], -1, self.head_dim)  # (B, T, H, D)
        queries = self.W_query(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        keys = self.W_key(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        values = self.W_value(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx, kwargs=kwargs)  # (B, H, S, D)

        context_vec, attn_weights = attention_function(
            self,
            queries,
            keys,
            values,
            attention_mask,
            scaling=self.scaling,
            dropout=self.dropout.p if self.training else 0.0,
            **kwargs,
        )  # (B, T, H, D)
        context_vec = self.out_proj(context_vec.reshape(*x.shape[:-1], -1))  # (B, T, d_out)
        return (context_vec, attn_weights) if return_weights else context_vec


class TransformerBlock(nn.Module):
    """Norm, attention, dropout, shortcut; norm, feed-forward, dropout, shortcut (section 4.5).

    Args:
        layer_idx: number of the block, from 0.
        activation: a module for `FeedForward`.
    """

    def __init__(self, cfg, layer_idx=0, activation=None):
        super().__init__()
        cfg = settings(cfg)
        scaling = (cfg["emb_dim"] // cfg["n_heads"]) ** -0.5 if cfg["scale_attn_weights"] else 1.0
        if cfg["scale_attn_by_inverse_layer_idx"]:
            scaling /= layer_idx + 1
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate_attn"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
            scaling=scaling,
            layer_idx=layer_idx,
        )
        self.ff = FeedForward(cfg, activation)
        self.norm1 = LayerNorm(cfg["emb_dim"], cfg["layer_norm_epsilon"])
        self.norm2 = LayerNorm(cfg["emb_dim"], cfg["layer_norm_epsilon"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate_shortcut"])

    def forward(self, x, attention_mask=None, past_key_values=None, **kwargs):  # (B, T, E)
        shortcut = x
        x = self.norm1(x)
        x, _ = self.att(x, attention_mask, past_key_values, return_weights=True, **kwargs)
        x = self.drop_shortcut(x)
        x = x + shortcut

        shortcut = x
        x = self.norm2(x)
        x = self.ff(x)
        x = self.drop_shortcut(x)
        x = x + shortcut
        return x  # (B, T, E)


def tie_missing_head(module, state_dict, prefix, *_):
    """A tied checkpoint stores the shared matrix once."""
    if module.out_head.weight is module.tok_emb.weight and prefix + "tok_emb.weight" in state_dict:
        state_dict.setdefault(prefix + "out_head.weight", state_dict[prefix + "tok_emb.weight"])


class GPTModel(nn.Module):
    """Token and position embeddings, `n_layers` blocks, final norm, output head (section 4.6).

    Its state dict has parameters only. It also loads one of the book's code, mask buffers and all, and, if tied, one
    that stores the shared matrix once.
    """

    def __init__(self, cfg):
        super().__init__()
        cfg = settings(cfg)
        self.context_length = cfg["context_length"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate_emb"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg, i) for i in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"], cfg["layer_norm_epsilon"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        if cfg["tie_word_embeddings"]:
            self.out_head.weight = self.tok_emb.weight
        self.register_load_state_dict_pre_hook(tie_missing_head)

    def forward(self, in_idx, attention_mask=None, past_key_values=None):
        """Logits (B, T, V) of the token that follows each of the token ids `in_idx` (B, T).

        Args:
            attention_mask: (B, S), 1 for tokens and 0 for padding, also over what is cached.
            past_key_values: cache of the tokens before `in_idx`, for example transformers' `DynamicCache()`.

        Raises:
            ValueError: more tokens, padding not counted, than `context_length`.
        """
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_tokens = num_past + in_idx.shape[1]  # S
        positions = torch.arange(num_past, num_tokens, device=in_idx.device)  # (T,)
        if attention_mask is None:
            check_length(num_tokens, self.context_length)
        else:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, num_past:]  # (B, T)
            check_length(int(positions.max()) + 1, self.context_length)
        mask = causal_mask(in_idx.shape[1], num_tokens, attention_mask, in_idx.device)

        x = self.tok_emb(in_idx) + self.pos_emb(positions)  # (B, T, E)
        x = self.drop_emb(x)
        for block in self.trf_blocks:
            x = block(x, mask, past_key_values)
        x = self.final_norm(x)
        return self.out_head(x)  # (B, T, V)


@torch.no_grad()
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """`idx` (B, T) and the `max_new_tokens` most probable tokens after it, (B, T + max_new_tokens); no cache.

    Call `model.eval()` first, or dropout stays on. Longer contexts are cut to their last `context_size` tokens.
    """
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])  # (B, T, V)
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
