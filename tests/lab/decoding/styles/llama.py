"""A GPT whose cache has places and whose forward pass is told where to start, generating as llama does."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, dim, n_heads, max_seq, max_batch=8):
        super().__init__()
        self.n_heads, self.hd = n_heads, dim // n_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.register_buffer("cache_k", torch.zeros(max_batch, max_seq, n_heads, self.hd), persistent=False)
        self.register_buffer("cache_v", torch.zeros(max_batch, max_seq, n_heads, self.hd), persistent=False)

    def forward(self, x, start_pos, mask):
        b, t, _ = x.shape
        q, k, v = (w(x).view(b, t, self.n_heads, self.hd) for w in (self.wq, self.wk, self.wv))
        if start_pos is not None:
            self.cache_k[:b, start_pos : start_pos + t] = k.detach()
            self.cache_v[:b, start_pos : start_pos + t] = v.detach()
            k, v = self.cache_k[:b, : start_pos + t], self.cache_v[:b, : start_pos + t]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.hd)
        if mask is not None:
            scores = scores + mask
        out = torch.matmul(F.softmax(scores, dim=-1), v)
        return self.wo(out.transpose(1, 2).contiguous().view(b, t, -1))


class Block(nn.Module):
    def __init__(self, dim, n_heads, max_seq):
        super().__init__()
        self.attention = Attention(dim, n_heads, max_seq)
        self.w1, self.w2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.n1, self.n2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, start_pos, mask):
        h = x + self.attention(self.n1(x), start_pos, mask)
        return h + self.w2(F.gelu(self.w1(self.n2(h))))


class LLM(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.max_seq_len = cfg["context_length"]
        self.tok_embeddings = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_embeddings = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.layers = nn.ModuleList(
            Block(cfg["emb_dim"], cfg["n_heads"], cfg["context_length"]) for _ in range(cfg["n_layers"])
        )
        self.norm = nn.LayerNorm(cfg["emb_dim"])
        self.output = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, tokens, start_pos=None):
        t = tokens.shape[1]
        s = start_pos or 0
        h = self.tok_embeddings(tokens) + self.pos_embeddings(torch.arange(s, s + t))
        mask = None
        if t > 1:
            mask = torch.full((t, t), float("-inf"), dtype=h.dtype).triu(1)
            mask = torch.hstack([torch.zeros((t, s), dtype=h.dtype), mask])
        for layer in self.layers:
            h = layer(h, start_pos, mask)
        return self.output(self.norm(h))


def sample_top_p(probs, p):
    probs_sort, probs_idx = torch.sort(probs, dim=-1, descending=True)
    probs_sum = torch.cumsum(probs_sort, dim=-1)
    mask = probs_sum - probs_sort > p
    probs_sort[mask] = 0.0
    probs_sort.div_(probs_sort.sum(dim=-1, keepdim=True))
    next_token = torch.multinomial(probs_sort, num_samples=1)
    return torch.gather(probs_idx, -1, next_token)


@torch.inference_mode()
def generate(model, prompt_tokens, max_gen_len, temperature=0.6, top_p=0.9, eos_id=None):
    bsz = len(prompt_tokens)
    min_len, max_len = min(map(len, prompt_tokens)), max(map(len, prompt_tokens))
    total_len = min(model.max_seq_len, max_gen_len + max_len)
    pad = 0
    tokens = torch.full((bsz, total_len), pad, dtype=torch.long)
    for k, t in enumerate(prompt_tokens):
        tokens[k, : len(t)] = torch.tensor(t)
    given = torch.zeros_like(tokens, dtype=torch.bool)
    for k, t in enumerate(prompt_tokens):
        given[k, : len(t)] = True
    prev_pos, eos_reached = 0, torch.tensor([False] * bsz)
    for cur_pos in range(min_len, total_len):
        logits = model(tokens[:, prev_pos:cur_pos], prev_pos)
        if temperature > 0:
            nxt = sample_top_p(torch.softmax(logits[:, -1] / temperature, dim=-1), top_p).reshape(-1)
        else:
            nxt = torch.argmax(logits[:, -1], dim=-1)
        nxt = torch.where(given[:, cur_pos], tokens[:, cur_pos], nxt)
        tokens[:, cur_pos] = nxt
        if eos_id is not None:
            eos_reached |= (~given[:, cur_pos]) & (nxt == eos_id)
            if all(eos_reached):
                break
        prev_pos = cur_pos
    out = []
    for i, t in enumerate(tokens.tolist()):
        t = t[len(prompt_tokens[i]) : len(prompt_tokens[i]) + max_gen_len]
        if eos_id is not None and eos_id in t:
            t = t[: t.index(eos_id)]
        out.append(t)
    return out
