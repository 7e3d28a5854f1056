"""As in gpt-fast: positions are given, the k largest are drawn from by an exponential race, tokens are yielded."""

import torch
import torch.nn.functional as F
from torch import nn


class Attn(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d = cfg["emb_dim"]
        self.nh = cfg["n_heads"]
        self.wqkv, self.wo = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.k_cache = self.v_cache = None

    def forward(self, x, mask, input_pos):
        b, t, d = x.shape
        q, k, v = (z.view(b, t, self.nh, d // self.nh).transpose(1, 2) for z in self.wqkv(x).split(d, -1))
        if self.k_cache is not None:
            self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k, v
            k, v = self.k_cache, self.v_cache
        return self.wo(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, d))


class Transformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        d, n = cfg["emb_dim"], cfg["context_length"]
        self.tok, self.pos = nn.Embedding(cfg["vocab_size"], d), nn.Embedding(n, d)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    n1=nn.LayerNorm(d),
                    att=Attn(cfg),
                    n2=nn.LayerNorm(d),
                    up=nn.Linear(d, 4 * d),
                    dn=nn.Linear(4 * d, d),
                )
            )
            for _ in range(cfg["n_layers"])
        )
        self.norm, self.output = nn.LayerNorm(d), nn.Linear(d, cfg["vocab_size"], bias=False)
        self.register_buffer("causal", torch.tril(torch.ones(n, n, dtype=torch.bool)), persistent=False)

    def setup_caches(self, batch):
        n, h = self.cfg["context_length"], self.cfg["n_heads"]
        for layer in self.layers:
            shape = (batch, h, n, self.cfg["emb_dim"] // h)
            layer["att"].k_cache, layer["att"].v_cache = torch.zeros(shape), torch.zeros(shape)

    def clear_caches(self):
        for layer in self.layers:
            layer["att"].k_cache = layer["att"].v_cache = None

    def forward(self, idx, input_pos=None):
        t = idx.shape[1]
        if input_pos is None:
            input_pos, mask = torch.arange(t), self.causal[:t, :t]
        else:
            mask = self.causal[input_pos]
        x = self.tok(idx) + self.pos(input_pos)
        for layer in self.layers:
            x = x + layer["att"](layer["n1"](x), mask, input_pos)
            x = x + layer["dn"](F.gelu(layer["up"](layer["n2"](x)), approximate="tanh"))
        return self.output(self.norm(x))


def logits_to_probs(logits, temperature=1.0, top_k=None):
    logits = logits / max(temperature, 1e-5)
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        pivot = v.select(-1, -1).unsqueeze(-1)
        logits = torch.where(logits < pivot, -float("Inf"), logits)
    return F.softmax(logits, dim=-1)


def sample(logits, temperature, top_k):
    probs = logits_to_probs(logits[:, -1], temperature, top_k)
    q = torch.empty_like(probs).exponential_(1)
    return torch.argmax(probs / q, dim=-1, keepdim=True)


@torch.no_grad()
def generate_stream(model, prompt, max_new_tokens, temperature=1.0, top_k=None):
    model.setup_caches(prompt.shape[0])
    input_pos = torch.arange(prompt.shape[1])
    token = prompt
    for _ in range(max_new_tokens):
        token = sample(model(token, input_pos), temperature, top_k)
        yield token
        input_pos = input_pos[-1:] + 1
    model.clear_caches()
