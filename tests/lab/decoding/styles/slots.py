"""A cache with a place for every position, in a class of its own; ids are lists; there is no torch.no_grad()."""

import torch
import torch.nn.functional as F
from torch import nn


class KVCache:
    def __init__(self, layers, batch, heads, length, dim):
        self.k = torch.zeros(layers, batch, heads, length, dim)
        self.v = torch.zeros(layers, batch, heads, length, dim)
        self.length = 0

    def write(self, layer, k, v):
        n = k.shape[2]
        self.k[layer, :, :, self.length : self.length + n] = k
        self.v[layer, :, :, self.length : self.length + n] = v
        end = self.length + n
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def advance(self, n):
        self.length += n


class Head(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, cache, layer):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.write(layer, k, v)
        mask = torch.ones(T, k.shape[2], dtype=torch.bool).tril(diagonal=past)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, dim, n_head):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.att = Head(dim, n_head)
        self.fc, self.pr = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, cache, layer):
        x = x + self.att(self.n1(x), cache, layer)
        return x + self.pr(F.gelu(self.fc(self.n2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, vocab_size, context_length, emb_dim, n_heads, n_layers):
        super().__init__()
        self.max_len = context_length
        self.shape = (n_layers, 1, n_heads, context_length, emb_dim // n_heads)
        self.emb = nn.Embedding(vocab_size, emb_dim)
        self.pos = nn.Embedding(context_length, emb_dim)
        self.blocks = nn.ModuleList(Block(emb_dim, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(emb_dim)

    def forward(self, tokens, cache=None):
        T = tokens.shape[1]
        start = cache.length if cache is not None else 0
        h = self.emb(tokens) + self.pos(torch.arange(start, start + T))
        for i, block in enumerate(self.blocks):
            h = block(h, cache, i)
        if cache is not None:
            cache.advance(T)
        return self.norm(h) @ self.emb.weight.T

    def complete(self, prompt: list[int], n_new: int, temp: float = 0.0, nucleus: float = 1.0, stop: int | None = None):
        cache = KVCache(*self.shape)
        out = list(prompt)
        pending = prompt[-self.max_len :]
        for _ in range(n_new):
            if cache.length + len(pending) > self.max_len:
                cache = KVCache(*self.shape)
                pending = out[-self.max_len // 2 :]
            logits = self(torch.tensor([pending]), cache)[0, -1].detach()
            token = self.pick(logits, temp, nucleus)
            out.append(token)
            if token == stop:
                break
            pending = [token]
        return out

    def pick(self, logits, temp, nucleus):
        if temp == 0:
            return int(logits.argmax())
        probs = torch.softmax(logits / temp, -1)
        sorted_probs, order = torch.sort(probs, descending=True)
        before = sorted_probs.cumsum(0) - sorted_probs
        sorted_probs[before >= nucleus] = 0
        sorted_probs /= sorted_probs.sum()
        return int(order[torch.multinomial(sorted_probs, 1)])
