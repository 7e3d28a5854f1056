"""The book's other models with GPT-2's function, small: other attentions, PyTorch's layers, adapters, a classifier."""

import torch
from pairs import randomize
from torch import nn
from torch.nn import functional as F

from hf_gpt_scratch import GELU, GPTModel, LayerNorm
from hf_gpt_scratch.weights.formats.book import DROP_RATE

VOCAB, CONTEXT, E, HEADS, LAYERS = 97, 32, 24, 3, 2
CFG = dict(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=E, n_heads=HEADS, n_layers=LAYERS, drop_rate=0.1)
CFG["qkv_bias"] = True


def masked(length):
    return torch.ones(length, length).triu(1).bool()


class Fused(nn.Module):
    """`PyTorchMultiHeadAttention` of GPTModelFast and of the scripts in chapter 5 that train fast."""

    def __init__(self, bias):
        super().__init__()
        self.num_heads, self.dropout = HEADS, 0.1
        self.qkv, self.proj = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E)

    def forward(self, x):  # (B, T, E)
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, E // HEADS)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)
        return self.proj(y.transpose(1, 2).flatten(2))


class Einsum(nn.Module):
    """Query, key and value without layers: matrices `[in, out]`, and vectors."""

    def __init__(self, bias):
        super().__init__()
        for name in ("W_query", "W_key", "W_value"):
            self.register_parameter(name, nn.Parameter(torch.empty(E, E)))
            self.register_parameter(f"bias_{name[2]}", nn.Parameter(torch.empty(E)) if bias else None)
        self.out_proj = nn.Linear(E, E)
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).triu(1))

    def forward(self, x):
        heads = []
        for name in ("W_query", "W_key", "W_value"):
            y = torch.einsum("btd,do->bto", x, getattr(self, name))
            if (bias := getattr(self, f"bias_{name[2]}")) is not None:
                y = y + bias
            heads.append(y.unflatten(2, (HEADS, -1)).transpose(1, 2))
        q, k, v = heads
        scores = torch.einsum("bhtd,bhsd->bhts", q, k).masked_fill(masked(x.shape[1]), -torch.inf)
        weights = (scores / (E // HEADS) ** 0.5).softmax(-1)
        return self.out_proj(torch.einsum("bhts,bhsd->bthd", weights, v).flatten(2))


class Head(nn.Module):
    """`CausalAttention`."""

    def __init__(self, bias):
        super().__init__()
        self.W_query, self.W_key, self.W_value = (nn.Linear(E, E // HEADS, bias=bias) for _ in range(3))
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).triu(1))

    def forward(self, x):
        scores = self.W_query(x) @ self.W_key(x).transpose(1, 2)
        scores = scores.masked_fill(masked(x.shape[1]), -torch.inf) / (E // HEADS) ** 0.5
        return scores.softmax(-1) @ self.W_value(x)


class Listed(nn.Module):
    """`MultiHeadAttentionWrapper`, with a layer behind it."""

    def __init__(self, bias):
        super().__init__()
        self.heads = nn.ModuleList(Head(bias) for _ in range(HEADS))
        self.out_proj = nn.Linear(E, E)

    def forward(self, x):
        return self.out_proj(torch.cat([head(x) for head in self.heads], dim=-1))


class Cached(nn.Module):
    """Attention that keeps keys and values, as in chapter 4's bonus; nothing of it is in the state dict."""

    def __init__(self, bias):
        super().__init__()
        self.num_heads = HEADS
        self.W_query, self.W_key, self.W_value = (nn.Linear(E, E, bias=bias) for _ in range(3))
        self.out_proj, self.dropout = nn.Linear(E, E), nn.Dropout(0.1)
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT).triu(1), persistent=False)
        self.register_buffer("cache_k", None, persistent=False)
        self.register_buffer("cache_v", None, persistent=False)

    def forward(self, x, use_cache=False):
        q, k, v = (W(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for W in (self.W_query, self.W_key, self.W_value))
        past = 0
        if use_cache:
            past = 0 if self.cache_k is None else self.cache_k.shape[2]
            k = k if self.cache_k is None else torch.cat((self.cache_k, k), 2)
            v = v if self.cache_v is None else torch.cat((self.cache_v, v), 2)
            self.cache_k, self.cache_v = k, v
        scores = (q @ k.transpose(2, 3)).masked_fill(masked(k.shape[2])[past:], -torch.inf)
        weights = self.dropout((scores / (E // HEADS) ** 0.5).softmax(-1))
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention, norm, bias, gelu):
        super().__init__()
        self.att, self.norm1, self.norm2 = attention(bias), norm(E), norm(E)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(nn.Linear(E, 4 * E), gelu(), nn.Linear(4 * E, E))
        self.drop_shortcut = nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff.layers(self.norm2(x)))


class Other(nn.Module):
    """A `GPTModel` of these."""

    def __init__(self, attention, norm=LayerNorm, bias=True, gelu=GELU):
        super().__init__()
        self.tok_emb, self.pos_emb = nn.Embedding(VOCAB, E), nn.Embedding(CONTEXT, E)
        self.drop_emb = nn.Dropout(0.1)
        self.trf_blocks = nn.Sequential(*(Block(attention, norm, bias, gelu) for _ in range(LAYERS)))
        self.final_norm, self.out_head = norm(E), nn.Linear(E, VOCAB, bias=False)

    def forward(self, ids):
        x = self.drop_emb(self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1])))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


class Adapted(nn.Module):
    """`LinearWithLoRA` of appendix E; `by_rank`: as it is today, and not as first printed."""

    def __init__(self, linear, rank=4, alpha=6, by_rank=True):
        super().__init__()
        self.linear, self.lora = linear, nn.Module()
        self.lora.A = nn.Parameter(torch.empty(linear.in_features, rank))
        self.lora.B = nn.Parameter(torch.empty(rank, linear.out_features))
        self.scale = alpha / rank if by_rank else alpha

    def forward(self, x):
        return self.linear(x) + self.scale * (x @ self.lora.A @ self.lora.B)


def adapt(module, **options):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Adapted(child, **options))
        else:
            adapt(child, **options)
    return module


def plain(bias=True):
    return randomize(GPTModel({**CFG, "qkv_bias": bias})).eval()


def classifier(model=None, labels=2, bias=True):
    """Chapter 6's, whose answer is the last token's."""
    model = plain() if model is None else model
    model.out_head = nn.Linear(E, labels, bias=bias)
    return randomize(model).eval()


def fast(bias=True):
    return randomize(Other(Fused, nn.LayerNorm, bias, lambda: nn.GELU(approximate="tanh"))).eval()


# Every model of the book with GPT-2's function, by what it is.
MODELS = {
    "the book's": plain,
    "without biases of query, key and value": lambda: plain(False),
    "GPTModelFast": fast,
    "GPTModelFast without biases": lambda: fast(False),
    "heads in a list": lambda: randomize(Other(Listed)).eval(),
    "heads in a list without biases": lambda: randomize(Other(Listed, bias=False)).eval(),
    "einsum": lambda: randomize(Other(Einsum)).eval(),
    "einsum without biases": lambda: randomize(Other(Einsum, bias=False)).eval(),
    "with a cache": lambda: randomize(Other(Cached)).eval(),
}


def further_notes(receipt):
    """The notes of a conversion, without the one that every file of the book's has."""
    return [note for note in receipt["notes"] if note != DROP_RATE]
