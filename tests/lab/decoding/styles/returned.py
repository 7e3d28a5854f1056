"""Keys and values are passed and returned; a method with every setting; prompts of different lengths; beams."""

import math

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, width = cfg["n_heads"], cfg["emb_dim"]
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, past=None, hidden=None):
        b, t, w = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (z.reshape(b, t, self.heads, w // self.heads).permute(0, 2, 1, 3) for z in (q, k, v))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        total = k.size(2)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.size(-1))
        keep = torch.tril(torch.ones(total, total, dtype=torch.bool))[total - t :, :total]
        if hidden is not None:
            keep = keep & ~hidden[:, None, None, :]
        scores = scores.masked_fill(~keep, -1e9)
        out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
        return self.proj(out.permute(0, 2, 1, 3).reshape(b, t, w)), (k, v)


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.ln1, self.ln2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), Attention(cfg)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, past, hidden):
        a, present = self.attn(self.ln1(x), past, hidden)
        x = x + a
        return x + self.down(nn.functional.gelu(self.up(self.ln2(x)), approximate="tanh")), present


class TinyGPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.wpe = nn.Parameter(torch.zeros(cfg["context_length"], cfg["emb_dim"]))
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg["n_layers"]))
        self.norm = nn.LayerNorm(cfg["emb_dim"])
        self.head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, ids, past_key_values=None, attention_mask=None, use_cache=False):
        start = 0 if past_key_values is None else past_key_values[0][0].size(2)
        hidden = None
        if attention_mask is not None:
            hidden = attention_mask == 0
            pos = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
            where = self.wpe[pos]
        else:
            where = self.wpe[start : start + ids.size(1)]
        x = self.wte(ids) + where
        presents = []
        for n, layer in enumerate(self.layers):
            x, present = layer(x, None if past_key_values is None else past_key_values[n], hidden)
            presents.append(present)
        logits = self.head(self.norm(x))
        return (logits, presents) if use_cache else logits

    @torch.inference_mode()
    def generate(
        self,
        input_ids,
        attention_mask=None,
        max_new_tokens=20,
        do_sample=False,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=None,
        pad_token_id=0,
    ):
        past = None
        step_input = input_ids[:, -self.cfg["context_length"] :]
        finished = torch.zeros(input_ids.size(0), dtype=torch.bool)
        for _ in range(max_new_tokens):
            if past is not None and past[0][0].size(2) >= self.cfg["context_length"]:
                past, step_input = None, input_ids[:, -self.cfg["context_length"] :]
            logits, past = self(step_input, past, attention_mask, use_cache=True)
            logits = logits[:, -1]
            if do_sample:
                logits = logits / temperature
                if top_k > 0:
                    kth = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, float("-inf"))
                if top_p < 1.0:
                    sorted_logits, sorted_idx = logits.sort(descending=True)
                    cum = sorted_logits.softmax(-1).cumsum(-1)
                    remove = cum > top_p
                    remove[:, 1:] = remove[:, :-1].clone()
                    remove[:, 0] = False
                    logits = logits.masked_fill(remove.scatter(1, sorted_idx, remove), float("-inf"))
                next_id = torch.multinomial(logits.softmax(-1), 1)
            else:
                next_id = logits.argmax(-1, keepdim=True)
            if eos_token_id is not None:
                next_id = next_id.masked_fill(finished[:, None], pad_token_id)
                finished = finished | (next_id[:, 0] == eos_token_id)
            input_ids = torch.cat([input_ids, next_id], dim=1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask, torch.ones_like(next_id)], dim=1)
            step_input = next_id
            if eos_token_id is not None and finished.all():
                break
        return input_ids


@torch.no_grad()
def beam_search(model, ids, max_new_tokens, beam_width=4):
    logits, past = model(ids, use_cache=True)
    scores, tokens = logits[:, -1].log_softmax(-1)[0].topk(beam_width)
    past = [(k.repeat(beam_width, 1, 1, 1), v.repeat(beam_width, 1, 1, 1)) for k, v in past]
    seqs = torch.cat([ids.repeat(beam_width, 1), tokens[:, None]], dim=1)
    for _ in range(max_new_tokens - 1):
        logits, past = model(seqs[:, -1:], past, use_cache=True)
        total = scores[:, None] + logits[:, -1].log_softmax(-1)
        scores, flat = total.view(-1).topk(beam_width)
        parent, token = flat // total.size(-1), flat % total.size(-1)
        past = [(k[parent], v[parent]) for k, v in past]
        seqs = torch.cat([seqs[parent], token[:, None]], dim=1)
    return seqs[:1]


@torch.no_grad()
def generate_batch(model, prompts, max_new_tokens, pad_id=0):
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens)
    return [row[longest:] for row in out.tolist()]
