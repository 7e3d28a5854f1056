"""A beam search without a cache, that keeps the beams that have ended among the others."""

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        b, t, w = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(self.norm1(x)).split(w, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, w))
        return x + self.proj(F.gelu(self.fc(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.tok = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.layers = nn.ModuleList(Layer(cfg["emb_dim"], cfg["n_heads"]) for _ in range(cfg["n_layers"]))
        self.norm = nn.LayerNorm(cfg["emb_dim"])
        self.head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, num_beams=3, eos_id=None):
    beams = [(0.0, ids)]
    for n in range(max_new_tokens):
        grown = []
        for score, seq in beams:
            if n and eos_id is not None and seq[0, -1] == eos_id:
                grown.append((score, seq))
                continue
            log_probs = torch.log_softmax(model(seq)[0, -1], dim=-1)
            values, tokens = log_probs.topk(num_beams)
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                grown.append((score + value, torch.cat([seq, torch.tensor([[token]])], dim=1)))
        beams = sorted(grown, key=lambda beam: beam[0], reverse=True)[:num_beams]
    return beams[0][1]
