"""GPT-2 as a reader may have written it: other names, other layouts, other return values, the same function."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class FusedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.n_embd
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(width, 3 * width), "c_proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})
        self.n_head = config.n_head

    def forward(self, x):
        batch, tokens, width = x.shape
        heads = (batch, tokens, self.n_head, width // self.n_head)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.attn["c_attn"](self.ln_1(x)).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class FusedGPT(nn.Module):
    """One matrix for queries, keys and values, a tied head, attributes for a config; of no targets, the last logits."""

    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(FusedBlock(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, idx, targets=None):
        x = self.transformer["wte"](idx) + self.transformer["wpe"](torch.arange(idx.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        x = self.transformer["ln_f"](x)
        return self.lm_head(x if targets is not None else x[:, -1:]), None


class RawLayer(nn.Module):
    """Matrices [in, out] as bare parameters, multiplied from the right."""

    def __init__(self, width):
        super().__init__()
        for name in ("w_q", "w_k", "w_v", "w_o"):
            self.register_parameter(name, nn.Parameter(torch.randn(width, width)))
            self.register_parameter(name.replace("w", "b"), nn.Parameter(torch.randn(width)))


class RawNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return F.layer_norm(x, self.gain.shape, self.gain, self.offset)


class RawBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.before, self.behind = RawNorm(width), RawNorm(width)
        self.attention = RawLayer(width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class RawGPT(nn.Module):
    """No head, bare parameters, names of its own."""

    def __init__(self, vocab_size, context_length, emb_dim, n_heads, n_layers):
        super().__init__()
        self.words = nn.Embedding(vocab_size, emb_dim)
        self.places = nn.Embedding(context_length, emb_dim)
        self.stack = nn.ModuleList(RawBlock(emb_dim) for _ in range(n_layers))
        self.last = RawNorm(emb_dim)
        self.n_heads = n_heads

    def forward(self, ids):
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.stack:
            a, y = block.attention, block.before(x)
            q, k, v = (
                (y @ w + b).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                for w, b in ((a.w_q, a.b_q), (a.w_k, a.b_k), (a.w_v, a.b_v))
            )
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            scores = scores + torch.full(scores.shape[-2:], -math.inf).triu(1)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ a.w_o + a.b_o
            x = x + block.narrow(F.gelu(block.wide(block.behind(x)), approximate="tanh"))
        return self.last(x) @ self.words.weight.T


RAW_MAP = {
    "words.weight": "wte.weight",
    "places.weight": "wpe.weight",
    **{
        f"stack.{{n}}.attention.{mine}_{letter}": f"trf_blocks.{{n}}.att.{name}.{target}"
        for letter, name in (("q", "W_query"), ("k", "W_key"), ("v", "W_value"), ("o", "out_proj"))
        for mine, target in (("w", "weight.T"), ("b", "bias"))
    },
}
