# ruff: noqa: E501
"""A zoo of GPTs with one mistake each, as data: which part of a GPT is replaced by what, and what the lab may call it.

A GPT here is made of `Parts`, plain functions, put together in one of several styles, which differ in what hooks can
reach. Nothing here uses the lab's own edits.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H.
"""

import math
from dataclasses import dataclass

import torch
from pairs import random_ids
from torch import nn
from torch.nn import functional as F

EPS = 1e-5


class Parts:
    """GPT-2's parts. A mistake replaces one."""

    def norm(self, x, scale, shift):
        mean = x.mean(-1, keepdim=True)
        return scale * (x - mean) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt() + shift

    def norm1(self, x, scale, shift):
        return self.norm(x, scale, shift)

    def norm2(self, x, scale, shift):
        return self.norm(x, scale, shift)

    def final_norm(self, x, scale, shift):
        return self.norm(x, scale, shift)

    def qkv(self, q, k, v, heads):
        return q, k, v

    def split(self, x, heads):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rotate(self, x):
        return x

    def scores(self, q, k, n):
        return q @ k.mT / q.shape[-1] ** 0.5

    def mask(self, scores):
        return scores.masked_fill(future(scores), -math.inf)

    def softmax(self, scores):
        return scores.softmax(-1)

    def weigh(self, weights, v):
        return weights @ v

    def merge(self, context):
        return context.transpose(1, 2).flatten(2)

    def out_proj(self, layer, x):
        return layer(x)

    def attend(self, q, k, v, heads, n):
        q, k, v = (self.split(part, heads) for part in self.qkv(q, k, v, heads))
        weights = self.softmax(self.mask(self.scores(self.rotate(q), self.rotate(k), n)))
        return self.merge(self.weigh(weights, v))

    def act(self, x):
        return F.gelu(x, approximate="tanh")

    def ff(self, first, second, act, x):
        return second(act(first(x)))

    def block(self, x, norm1, att, norm2, ff, n):
        x = x + att(norm1(x))
        return x + ff(norm2(x))

    def ids(self, ids):
        return ids

    def positions(self, pos_emb, tokens):
        return pos_emb(torch.arange(tokens))

    def embed(self, tok, pos):
        return tok + pos

    def chain(self, blocks, x):
        for block in blocks:
            x = block(x)
        return x

    def head(self, final_norm, out_head, x):
        return out_head(final_norm(x))


def future(scores):
    return torch.ones(scores.shape[-2:]).triu(1).bool()


# Styles


class Norm(nn.Module):
    def __init__(self, width, function):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.function = function

    def forward(self, x):
        return self.function(x, self.scale, self.shift)


class Act(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return self.parts.act(x)


class Attention(nn.Module):
    def __init__(self, cfg, parts, n):
        super().__init__()
        width = cfg["emb_dim"]
        self.W_query, self.W_key, self.W_value, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.parts, self.heads, self.n = parts, cfg["n_heads"], n

    def forward(self, x):
        context = self.parts.attend(self.W_query(x), self.W_key(x), self.W_value(x), self.heads, self.n)
        return self.parts.out_proj(self.out_proj, context)


class FeedForward(nn.Module):
    def __init__(self, cfg, parts):
        super().__init__()
        width = cfg["emb_dim"]
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), Act(parts), nn.Linear(4 * width, width))
        self.parts = parts

    def forward(self, x):
        return self.parts.ff(self.layers[0], self.layers[2], self.layers[1], x)


class Block(nn.Module):
    def __init__(self, cfg, parts, n):
        super().__init__()
        self.norm1, self.norm2 = (Norm(cfg["emb_dim"], function) for function in (parts.norm1, parts.norm2))
        self.att, self.ff = Attention(cfg, parts, n), FeedForward(cfg, parts)
        self.parts, self.n = parts, n

    def forward(self, x):
        return self.parts.block(x, self.norm1, self.att, self.norm2, self.ff, self.n)


class BookStyle(nn.Module):
    """The book's modules: hooks reach everything."""

    def __init__(self, cfg, parts):
        super().__init__()
        self.parts = parts
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.trf_blocks = nn.ModuleList(Block(cfg, parts, n) for n in range(cfg["n_layers"]))
        self.final_norm = Norm(cfg["emb_dim"], parts.final_norm)
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    @property
    def mapping(self):
        """Its names are the book's: what is diagnosed here is the forward pass, not the pairing."""
        return {name: name for name, _ in self.named_parameters()}

    def forward(self, ids):
        x = self.parts.embed(self.tok_emb(self.parts.ids(ids)), self.parts.positions(self.pos_emb, ids.shape[1]))
        return self.parts.head(self.final_norm, self.out_head, self.parts.chain(self.trf_blocks, x))


class FusedAttention(nn.Module):
    def __init__(self, cfg, parts, n):
        super().__init__()
        width = cfg["emb_dim"]
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.parts, self.heads, self.n = parts, cfg["n_heads"], n

    def forward(self, x):
        context = self.parts.attend(*self.c_attn(x).chunk(3, -1), self.heads, self.n)
        return self.parts.out_proj(self.c_proj, context)


class Mlp(nn.Module):
    def __init__(self, cfg, parts):
        super().__init__()
        width = cfg["emb_dim"]
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.parts = parts

    def forward(self, x):
        return self.parts.ff(self.c_fc, self.c_proj, self.parts.act, x)


class FusedBlock(nn.Module):
    def __init__(self, cfg, parts, n):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(cfg["emb_dim"]), nn.LayerNorm(cfg["emb_dim"])
        self.ln_1.forward = lambda x: parts.norm1(x, self.ln_1.weight, self.ln_1.bias)
        self.ln_2.forward = lambda x: parts.norm2(x, self.ln_2.weight, self.ln_2.bias)
        self.attn, self.mlp = FusedAttention(cfg, parts, n), Mlp(cfg, parts)
        self.parts, self.n = parts, n

    def forward(self, x):
        return self.parts.block(x, self.ln_1, self.attn, self.ln_2, self.mlp, self.n)


class FusedStyle(nn.Module):
    """nanoGPT's modules: one matrix for queries, keys and values, a tied head."""

    def __init__(self, cfg, parts):
        super().__init__()
        self.parts = parts
        width = cfg["emb_dim"]
        blocks = nn.ModuleList(FusedBlock(cfg, parts, n) for n in range(cfg["n_layers"]))
        norm = nn.LayerNorm(width)
        norm.forward = lambda x: parts.final_norm(x, norm.weight, norm.bias)
        embeddings = dict(wte=nn.Embedding(cfg["vocab_size"], width), wpe=nn.Embedding(cfg["context_length"], width))
        self.transformer = nn.ModuleDict(dict(**embeddings, h=blocks, ln_f=norm))
        self.lm_head = nn.Linear(width, cfg["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx):
        parts, t = self.parts, self.transformer
        x = parts.embed(t.wte(parts.ids(idx)), parts.positions(t.wpe, idx.shape[1]))
        return parts.head(t.ln_f, self.lm_head, parts.chain(t.h, x))


class FlatBlock(nn.Module):
    """Parameters only."""

    def __init__(self, cfg):
        super().__init__()
        width = cfg["emb_dim"]
        self.norm1, self.norm2 = (Norm(width, None) for _ in range(2))
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class FlatStyle(nn.Module):
    """One forward function; only its linear layers and embeddings are calls."""

    def __init__(self, cfg, parts):
        super().__init__()
        self.parts, self.heads = parts, cfg["n_heads"]
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.blocks = nn.ModuleList(FlatBlock(cfg) for _ in range(cfg["n_layers"]))
        self.ln_f = Norm(cfg["emb_dim"], None)

    def forward(self, ids):
        parts = self.parts
        x = parts.embed(self.tok_emb(parts.ids(ids)), parts.positions(self.pos_emb, ids.shape[1]))

        def running(b, n):
            def att(x):
                return parts.out_proj(b.proj, parts.attend(b.query(x), b.key(x), b.value(x), self.heads, n))

            def run(x):
                return parts.block(
                    x,
                    lambda x: parts.norm1(x, b.norm1.scale, b.norm1.shift),
                    att,
                    lambda x: parts.norm2(x, b.norm2.scale, b.norm2.shift),
                    lambda x: parts.ff(b.up, b.down, parts.act, x),
                    n,
                )

            return run

        x = parts.chain([running(b, n) for n, b in enumerate(self.blocks)], x)
        norm = lambda x: parts.final_norm(x, self.ln_f.scale, self.ln_f.shift)  # noqa: E731
        return parts.head(norm, lambda x: F.linear(x, self.tok_emb.weight), x)


class BoxStyle(nn.Module):
    """Nothing can be heard but the logits: modules are hidden, parameters copied, and the softmax is written out."""

    def __init__(self, cfg, parts):
        super().__init__()
        self.inner = [BookStyle(cfg, parts)]
        self.inner[0].out_head.weight = self.inner[0].tok_emb.weight
        self.mine = nn.ParameterDict({n.replace(".", "/"): p for n, p in self.inner[0].named_parameters()})

    def forward(self, ids):
        return torch.func.functional_call(
            self.inner[0],
            {name.replace("/", "."): p.clone() for name, p in self.mine.items()},
            (ids,),
            tie_weights=True,
        )

    @property
    def mapping(self):
        return {f"mine.{name}": name.replace("/", ".") for name in self.mine}


STYLES = {"book": BookStyle, "fused": FusedStyle, "flat": FlatStyle, "box": BoxStyle}


# The mistakes


@dataclass(frozen=True)
class Specimen:
    """What is replaced, and the names that the lab may give it; no name if it is outside of what the lab can find."""

    title: str
    names: tuple[str, ...]
    parts: dict

    def built(self):
        parts = Parts()
        for name, function in self.parts.items():
            setattr(parts, name, function.__get__(parts) if getattr(function, "bound", False) else function)
        return parts


def zoo(names, **titles):
    """Specimens with one replaced part each: title=(part, function) or title={part: function}."""
    found = []
    for title, what in titles.items():
        parts = what if isinstance(what, dict) else dict([what])
        found.append(Specimen(title.replace("_", " "), (names,) if isinstance(names, str) else tuple(names), parts))
    return found


def normal(centre=True, over=-1, eps=EPS, unbiased=False):
    def norm(x, scale, shift):
        mean = x.mean(over, keepdim=True) if centre else 0
        variance = x.var(over, keepdim=True, unbiased=unbiased)
        return scale * (x - mean) / (variance + eps).sqrt() + shift

    return norm


def joined_as_if_split(x, heads):
    """What a split with the transpose makes into what .view(B, H, T, D) makes of x (B, T, E)."""
    return x.reshape(len(x), heads, x.shape[1], -1).transpose(1, 2).flatten(2)


def masked(rule, fill=-math.inf):
    """A mask that hides where rule(row, column) is true."""

    def mask(scores):
        rows, columns = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])
        return scores.masked_fill(rule(rows, columns) & torch.ones_like(scores).bool(), fill)

    return mask


def scaled(factor):
    return lambda q, k, n: q @ k.mT * factor(q.shape[-1], q.shape[1], n)


ROOT = math.sqrt(2 / math.pi)


def gelu(a=0.044715, b=ROOT):
    return lambda x: 0.5 * x * (1 + (b * (x + a * x**3)).tanh())


def rope(x, pairs=False):
    half = x.shape[-1] // 2
    angles = torch.outer(
        torch.arange(x.shape[2], dtype=x.dtype), 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    )
    cos, sin = angles.cos(), angles.sin()
    if pairs:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def alibi(q, k, n):
    slopes = torch.tensor([2 ** (-8 * (h + 1) / q.shape[1]) for h in range(q.shape[1])], dtype=q.dtype)
    steps = torch.arange(q.shape[2])
    return q @ k.mT / q.shape[-1] ** 0.5 - slopes[:, None, None] * (steps[:, None] - steps)


def waves(pos_emb, tokens):
    width, dtype = pos_emb.weight.shape[1], pos_emb.weight.dtype
    rates = torch.exp(torch.arange(0, width, 2, dtype=dtype) * (-math.log(10000.0) / width))
    table = torch.zeros(tokens, width, dtype=dtype)
    table[:, 0::2] = (torch.arange(tokens, dtype=dtype)[:, None] * rates).sin()
    table[:, 1::2] = (torch.arange(tokens, dtype=dtype)[:, None] * rates).cos()
    return table


def at(make):
    """Positions looked up at make(tokens)."""
    return "positions", lambda pos_emb, tokens: pos_emb(make(tokens))


def reads(function):
    return "block", function


def interleaved(order):
    """The three projections side by side, split by another order of (3, heads, D)."""

    def qkv(q, k, v, heads):
        sizes = {"3": 3, "h": heads, "d": q.shape[-1] // heads}
        together = torch.cat([q, k, v], -1).unflatten(-1, [sizes[axis] for axis in order])
        moved = together.permute(0, 1, *(2 + order.index(axis) for axis in "3hd"))
        return moved.flatten(3).unbind(2)

    return "qkv", qkv


def over_batch(q, k, v, heads, n):
    q, k, v = (x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))  # (T, H, B, D)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).permute(2, 0, 1, 3).flatten(2)


def over_heads(q, k, v, heads, n):
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # (B, T, H, D)
    return ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v).flatten(2)


def again_in_each_block():
    """Positions that are added to the input of each block, too."""
    kept = {}

    def embed(tok, pos):
        kept["pos"] = pos
        return tok + pos

    def block(x, norm1, att, norm2, ff, n):
        x = x + kept["pos"]
        x = x + att(norm1(x))
        return x + ff(norm2(x))

    return {"embed": embed, "block": block}


def heads_but_joined_as_tokens(q, k, v, heads, n):
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))  # (B, T, H, D)
    context = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    return context.transpose(1, 2).reshape(len(q), q.shape[1], -1)


SPECIMENS = [
    *zoo(
        "wrong-scale",
        scale_by_a_constant=("scores", scaled(lambda d, h, n: 0.1)),
        scale_negative=("scores", scaled(lambda d, h, n: -(d**-0.5))),
        scale_cube=("scores", scaled(lambda d, h, n: d**-1.5)),
        scale_fourth_root=("scores", scaled(lambda d, h, n: d**-0.25)),
        scale_by_twice=("scores", scaled(lambda d, h, n: 1 / math.sqrt(2 * d))),
    ),
    *zoo("scale-by-layer", scale_by_layer=("scores", scaled(lambda d, h, n: d**-0.5 / (n + 1)))),
    *zoo("missing-scale", scale_missing=("scores", scaled(lambda d, h, n: 1.0))),
    *zoo("doubled-scale", query_scaled_too=("scores", scaled(lambda d, h, n: 1 / d))),
    *zoo("scale-by-emb-dim", scale_by_width=("scores", scaled(lambda d, h, n: (d * h) ** -0.5))),
    *zoo("scale-by-n-heads", scale_by_heads=("scores", scaled(lambda d, h, n: h**-0.5))),
    # Masks
    *zoo("no-mask", mask_missing=("mask", lambda s: s)),
    *zoo("mask-sees-ahead", mask_one_ahead=("mask", masked(lambda i, j: j > i + 1))),
    *zoo("wrong-mask", mask_two_ahead=("mask", masked(lambda i, j: j > i + 2)),
         mask_hides_two=("mask", masked(lambda i, j: j > i - 2, -1e9))),
    *zoo("mask-hides-diagonal", mask_diagonal=("mask", masked(lambda i, j: j >= i)),
         mask_diagonal_finite=("mask", masked(lambda i, j: j >= i, -1e9))),
    *zoo("mask-upside-down", mask_tril=("mask", masked(lambda i, j: j < i)),
         mask_inverted=("mask", masked(lambda i, j: j <= i)),
         mask_inverted_finite=("mask", masked(lambda i, j: j <= i, -1e9))),
    *zoo("local-window", window_of_4=("mask", masked(lambda i, j: (j > i) | (i - j >= 4))),
         window_of_9=("mask", masked(lambda i, j: (j > i) | (i - j >= 9)))),
    *zoo("mask-zero-scores", mask_zero=("mask", masked(lambda i, j: j > i, 0.0)),
         mask_multiplied=("mask", lambda s: s * ~future(s))),
    *zoo("mask-fill", mask_minus_1=("mask", masked(lambda i, j: j > i, -1.0)),
         mask_minus_5_added=("mask", lambda s: s - 5.0 * future(s))),
    *zoo(("mask-added", "mask-fill"), mask_added_as_one=("mask", lambda s: s + future(s).to(s.dtype))),
    *zoo("mask-after-softmax", mask_after={"mask": lambda s: s, "weigh": lambda w, v: w.masked_fill(future(w), 0) @ v}),
    # Softmax
    *zoo("softmax-dimension", softmax_queries=("softmax", lambda s: s.softmax(-2)),
         softmax_heads=("softmax", lambda s: s.softmax(1)), softmax_batch=("softmax", lambda s: s.softmax(0))),
    *zoo("wrong-softmax", softmax_twice=("softmax", lambda s: s.softmax(-1).softmax(-1)),
         softmax_log=("softmax", lambda s: s.log_softmax(-1).masked_fill(future(s), 0.0)),
         softmax_missing=("softmax", lambda s: s.masked_fill(future(s), 0.0)),
         softmax_plus_one=("softmax", lambda s: s.exp() / (1 + s.exp().sum(-1, keepdim=True))),
         softmax_sigmoid=("softmax", lambda s: s.sigmoid()),
         softmax_not_divided=("softmax", lambda s: s.exp()),
         softmax_plus_one_stable=("softmax", lambda s: (e := (s - s.amax(-1, keepdim=True)).exp()) / (1 + e.sum(-1, keepdim=True)))),
    # Heads
    *zoo("heads-not-transposed", merge_without_transpose=("merge", lambda c: c.reshape(len(c), c.shape[2], -1)),
         split_without_transpose=("split", lambda x, h: x.reshape(len(x), h, x.shape[1], -1)),
         both_without_transpose={"split": lambda x, h: x.reshape(len(x), h, x.shape[1], -1),
                                 "merge": lambda c: c.reshape(len(c), c.shape[2], -1)},
         merge_dims_reversed=("merge", lambda c: c.permute(0, 3, 2, 1).reshape(len(c), c.shape[2], -1))),
    *zoo(("heads-interleaved", "heads-not-transposed"),
         merge_interleaved=("merge", lambda c: c.permute(0, 2, 3, 1).flatten(2)),
         split_interleaved=("split", lambda x, h: x.unflatten(-1, (-1, h)).permute(0, 3, 1, 2)),
         both_interleaved={"split": lambda x, h: x.unflatten(-1, (-1, h)).permute(0, 3, 1, 2),
                           "merge": lambda c: c.permute(0, 2, 3, 1).flatten(2)}),
    *zoo("qkv-interleaved", qkv_by_head=interleaved("h3d"), qkv_last=interleaved("hd3")),
    *zoo(("qkv-interleaved", "heads-interleaved"), qkv_d_first=interleaved("3dh"), qkv_dh3=interleaved("dh3")),
    *zoo("wrong-n-heads", twice_the_heads={"split": lambda x, h: x.unflatten(-1, (2 * h, -1)).transpose(1, 2)},
         half_the_heads={"split": lambda x, h: x.unflatten(-1, (h // 2, -1)).transpose(1, 2)}),
    *zoo("attention-over-batch", over_batch=("attend", over_batch)),
    *zoo("attention-over-heads", over_heads=("attend", over_heads)),
    # Operands
    *zoo("qkv-order", q_and_k_swapped=("qkv", lambda q, k, v, h: (k, q, v)),
         k_and_v_swapped=("qkv", lambda q, k, v, h: (q, v, k)), turned=("qkv", lambda q, k, v, h: (v, q, k))),
    *zoo("wrong-operand", values_from_keys=("qkv", lambda q, k, v, h: (q, k, k)),
         keys_from_queries=("qkv", lambda q, k, v, h: (q, q, v)), values_from_queries=("qkv", lambda q, k, v, h: (q, k, q)),
         keys_from_values=("qkv", lambda q, k, v, h: (q, v, v)),
         cosine_attention=("scores", lambda q, k, n: F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT),
         keys_of_one_head=("scores", lambda q, k, n: q @ k[:, :1].mT / q.shape[-1] ** 0.5),
         queries_relu=("scores", lambda q, k, n: q.relu() @ k.mT / q.shape[-1] ** 0.5),
         values_of_the_token_before=("weigh", lambda w, v: w @ v.roll(1, 2)),
         values_summed=("weigh", lambda w, v: w @ v.cumsum(2)),
         heads_reversed=("weigh", lambda w, v: (w @ v).flip(1))),
    *zoo("wrong-scores", scores_averaged=("scores", lambda q, k, n: (q @ k.mT / q.shape[-1] ** 0.5).mean(1, keepdim=True).expand(-1, q.shape[1], -1, -1)),
         scores_without_sign=("scores", lambda q, k, n: (q @ k.mT / q.shape[-1] ** 0.5).abs()),
         weights_squared=("weigh", lambda w, v: w**2 @ v), weights_averaged=("weigh", lambda w, v: w.mean(1, keepdim=True) @ v)),
    *zoo("rotary-positions", rope_on_top=("rotate", rope), rope_pairs=("rotate", lambda x: rope(x, pairs=True))),
    *zoo("distance-bias", alibi=("scores", alibi)),
    *zoo("missing-out-proj", out_proj_missing=("out_proj", lambda layer, x: x)),
    *zoo("missing-bias", out_proj_without_bias=("out_proj", lambda layer, x: x @ layer.weight.T)),
    *zoo("not-transposed", out_proj_transposed=("out_proj", lambda layer, x: x @ layer.weight + layer.bias)),
    *zoo("doubled-bias", out_proj_bias_twice=("out_proj", lambda layer, x: layer(x) + layer.bias)),
    # Norms
    *zoo("rms-norm", rms=("norm", lambda x, w, b: w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() + b),
         rms_without_shift=("norm", lambda x, w, b: w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt())),
    *zoo("norm-dimension", norm_over_tokens=("norm", normal(over=1)), norm_over_batch=("norm", normal(over=0)),
         norm_over_tokens_and_width=("norm", normal(over=(1, 2)))),
    *zoo("wrong-norm", norm_not_centred=("norm", normal(centre=False)),
         norm_without_root=("norm", lambda x, w, b: w * (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS) + b),
         norm_centred_only=("norm", lambda x, w, b: w * (x - x.mean(-1, True)) + b),
         norm_shift_first=("norm", lambda x, w, b: w * (F.layer_norm(x, w.shape) + b)),
         norm_one_more=("norm", lambda x, w, b: (1 + w) * F.layer_norm(x, w.shape) + b)),
    *zoo("missing-norm-scale", norm_without_scale=("norm", lambda x, w, b: F.layer_norm(x, w.shape) + b)),
    *zoo("missing-bias", norm_without_shift=("norm", lambda x, w, b: F.layer_norm(x, w.shape, w))),
    *zoo("wrong-eps", norm_without_eps=("norm", normal(eps=0.0)), norm_eps_big=("norm", normal(eps=0.07))),
    *zoo("unbiased-variance", norm_unbiased=("norm", normal(unbiased=True))),
    *zoo(("unbiased-variance",), norm2_unbiased=("norm2", normal(unbiased=True))),
    *zoo("rms-norm", final_norm_rms=("final_norm", lambda x, w, b: w * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() + b)),
    *zoo("missing-norm", norms_identity=("norm", lambda x, w, b: x), norm1_identity=("norm1", lambda x, w, b: x),
         norm2_identity=("norm2", lambda x, w, b: x),
         norm1_missing=reads(lambda x, n1, att, n2, ff, n: (y := x + att(x)) + ff(n2(y))),
         norm2_missing=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + ff(y))),
    *zoo("doubled-norm", norm1_twice=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(n1(x)))) + ff(n2(y))),
         norm2_twice=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + ff(n2(n2(y)))),
         final_norm_twice=("head", lambda norm, head, x: head(norm(norm(x))))),
    *zoo(("missing-final-norm", "missing-norm"), final_norm_missing=("head", lambda norm, head, x: head(x)),
         final_norm_identity=("final_norm", lambda x, w, b: x)),
    # Activations
    *zoo("wrong-activation", relu=("act", F.relu), silu=("act", F.silu), tanh=("act", torch.tanh),
         sigmoid_gelu=("act", lambda x: x * (1.702 * x).sigmoid()), elu=("act", F.elu), none=("act", lambda x: x),
         gelu_constant=("act", gelu(a=0.44715)), gelu_root=("act", gelu(b=math.sqrt(2) / math.pi)),
         gelu_without_half=("act", lambda x: x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())),
         gelu_twice=("act", lambda x: F.gelu(F.gelu(x, approximate="tanh"), approximate="tanh")),
         leaky=("act", lambda x: F.leaky_relu(x, 0.13)), sigmoid_only=("act", torch.sigmoid),
         softplus=("act", F.softplus), mish=("act", F.mish), relu_squared=("act", lambda x: x.relu() ** 2),
         gelu_square=("act", gelu(a=0.04715))),
    *zoo("wrong-scores", scores_clamped=("scores", lambda q, k, n: (q @ k.mT / q.shape[-1] ** 0.5).clamp(-0.2, 0.2)),
         scores_clamped_above=("scores", lambda q, k, n: (q @ k.mT / q.shape[-1] ** 0.5).clamp(max=0.1)),
         one_head_zeroed=("weigh", lambda w, v: (w @ v) * (torch.arange(v.shape[1]) > 0)[:, None, None]),
         context_halved=("weigh", lambda w, v: w @ v / 2)),
    *zoo("wrong-scale", factor_of_each_head=("scores", lambda q, k, n: q @ k.mT / (q.shape[-1] * (torch.arange(q.shape[1]) + 1)[:, None, None]) ** 0.5)),
    *zoo("heads-not-transposed",
         keys_alone_not_transposed=("qkv", lambda q, k, v, heads: (q, joined_as_if_split(k, heads), v)),
         values_alone_not_transposed=("qkv", lambda q, k, v, heads: (q, k, joined_as_if_split(v, heads)))),
    *zoo("wrong-norm", norm_sum_of_squares=("norm", lambda x, w, b: w * (y := x - x.mean(-1, keepdim=True)) / (y.square().sum(-1, keepdim=True) + EPS).sqrt() + b),
         norm_sum_as_mean=("norm", lambda x, w, b: w * (x - x.sum(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt() + b),
         norm_sum_as_mean_for_both=("norm", lambda x, w, b: w * (y := x - x.sum(-1, keepdim=True)) / (y.square().mean(-1, keepdim=True) + EPS).sqrt() + b),
         norm_two_sums=("norm", lambda x, w, b: w * (y := x - x.sum(-1, keepdim=True)) / (y.square().sum(-1, keepdim=True) + EPS).sqrt() + b),
         norm_without_brackets=("norm", lambda x, w, b: w * (x - x.mean(-1, keepdim=True) / (x.var(-1, keepdim=True, unbiased=False) + EPS).sqrt()) + b)),
    *zoo("exact-gelu", exact_gelu=("act", F.gelu)),
    *zoo("no-activation", act_last=("ff", lambda first, second, act, x: act(second(first(x))))),
    *zoo(("missing-feed-forward",), ff_missing=reads(lambda x, n1, att, n2, ff, n: x + att(n1(x)))),
    # Wiring
    *zoo("post-norm", post_norm=reads(lambda x, n1, att, n2, ff, n: n2((y := n1(x + att(x))) + ff(y)))),
    *zoo("norm-on-output", on_output=reads(lambda x, n1, att, n2, ff, n: (y := x + n1(att(x))) + n2(ff(y)))),
    *zoo("parallel-block", parallel=reads(lambda x, n1, att, n2, ff, n: x + att(n1(x)) + ff(n2(x))),
         parallel_one_norm=reads(lambda x, n1, att, n2, ff, n: (z := n1(x)) is None or x + att(z) + ff(z))),
    *zoo("missing-shortcut", no_first_shortcut=reads(lambda x, n1, att, n2, ff, n: (y := att(n1(x))) + ff(n2(y))),
         no_second_shortcut=reads(lambda x, n1, att, n2, ff, n: ff(n2(x + att(n1(x))))),
         no_shortcuts=reads(lambda x, n1, att, n2, ff, n: ff(n2(att(n1(x)))))),
    *zoo("doubled-shortcut", first_doubled=reads(lambda x, n1, att, n2, ff, n: (y := 2 * x + att(n1(x))) + ff(n2(y))),
         second_doubled=reads(lambda x, n1, att, n2, ff, n: 2 * (y := x + att(n1(x))) + ff(n2(y))),
         input_again=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + ff(n2(y)) + x)),
    *zoo("shortcut-after-norm", shortcut_normed=reads(lambda x, n1, att, n2, ff, n: (y := n2((z := n1(x)) + att(z))) + ff(y)),
         shortcut_first_normed=reads(lambda x, n1, att, n2, ff, n: (y := (z := n1(x)) + att(z)) + ff(n2(y))),
         shortcut_second_normed=reads(lambda x, n1, att, n2, ff, n: (z := n2(x + att(n1(x)))) + ff(z))),
    *zoo("stale-shortcut", stale=reads(lambda x, n1, att, n2, ff, n: x + ff(n2(x + att(n1(x)))))),
    *zoo("one-norm-for-both", norm1_for_both=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + ff(n1(y)))),
    *zoo("swapped-norms", norms_swapped=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n2(x))) + ff(n1(y)))),
    *zoo("feed-forward-first", ff_first=reads(lambda x, n1, att, n2, ff, n: (y := x + ff(n2(x))) + att(n1(y)))),
    *zoo(("doubled-feed-forward", "wrong-wiring"),
         ff_doubled=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + 2 * ff(n2(y))),
         ff_of_ff=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + ff(ff(n2(y))))),
    *zoo("doubled-attention", att_doubled=reads(lambda x, n1, att, n2, ff, n: (y := x + 2 * att(n1(x))) + ff(n2(y)))),
    *zoo("missing-attention", att_missing=reads(lambda x, n1, att, n2, ff, n: x + ff(n2(x)))),
    *zoo("wrong-wiring", half_attention=reads(lambda x, n1, att, n2, ff, n: (y := x + 0.5 * att(n1(x))) + ff(n2(y))),
         minus_ff=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) - ff(n2(y))),
         half_of_all=reads(lambda x, n1, att, n2, ff, n: 0.5 * ((y := x + att(n1(x))) + ff(n2(y)))),
         scaled_by_root_two=reads(lambda x, n1, att, n2, ff, n: (y := (x + att(n1(x))) / math.sqrt(2)) + ff(n2(y))),
         sandwich=reads(lambda x, n1, att, n2, ff, n: (y := x + n2(att(n1(x)))) + ff(n2(y)))),
    *zoo("sandwich-norm", norm2_of_output=reads(lambda x, n1, att, n2, ff, n: n2((y := x + att(n1(x))) + ff(n2(y))))),
    *zoo("wrong-input", norm2_of_attention=reads(lambda x, n1, att, n2, ff, n: x + (a := att(n1(x))) + ff(n2(a)))),
    *zoo("positions-in-each-block", positions_again=again_in_each_block()),
    *zoo(("doubled-block", "wrong-wiring"), last_block_twice=("chain", lambda bs, x: bs[-1](bs[2](bs[1](bs[0](x)))) if len(bs) == 3 else x)),
    # Between the blocks
    *zoo("block-order", reversed_blocks=("chain", lambda bs, x: bs[0](bs[1](bs[2](x)))),
         first_two_swapped=("chain", lambda bs, x: bs[2](bs[0](bs[1](x))))),
    *zoo("skipped-block", middle_skipped=("chain", lambda bs, x: bs[2](bs[0](x))),
         first_skipped=("chain", lambda bs, x: bs[2](bs[1](x))), last_skipped=("chain", lambda bs, x: bs[1](bs[0](x)))),
    *zoo("doubled-block", middle_twice=("chain", lambda bs, x: bs[2](bs[1](bs[1](bs[0](x)))))),
    *zoo("wrong-scale", scale_by_tokens=("scores", lambda q, k, n: q @ k.mT / q.shape[2] ** 0.5)),
    *zoo("blocks-not-chained", each_reads_embedding=("chain", lambda bs, x: [b(x) for b in bs][-1])),
    *zoo("wrong-wiring", blocks_added=("chain", lambda bs, x: sum(b(x) for b in bs)),
         dense=("chain", lambda bs, x: bs[2](bs[1](bs[0](x)) + x))),
    # Embeddings
    *zoo("off-by-one-positions", positions_from_1=at(lambda t: torch.arange(t) + 1)),
    *zoo(("off-by-one-positions", "wrong-positions"), positions_from_3=at(lambda t: torch.arange(t) + 3)),
    *zoo("wrong-positions", positions_reversed=at(lambda t: torch.arange(t).flip(0)),
         positions_zero=at(lambda t: torch.zeros(t, dtype=torch.long)), positions_in_twos=at(lambda t: 2 * torch.arange(t))),
    *zoo("wrong-positions", positions_stop=at(lambda t: torch.arange(t).clamp(max=9)),
         positions_begin_again=at(lambda t: torch.arange(t) % 8)),
    *zoo("wrong-embedding", embedding_normed=("embed", lambda tok, pos: F.layer_norm(tok + pos, tok.shape[-1:])),
         tokens_of_length_1=("embed", lambda tok, pos: F.normalize(tok, dim=-1) + 0 * pos)),
    *zoo("sinusoidal-positions", sinusoidal=("positions", waves)),
    *zoo("no-positions", positions_missing=("embed", lambda tok, pos: tok)),
    *zoo("embedding-scale", embedding_halved=("embed", lambda tok, pos: (tok + pos) / 2), tokens_by_root=("embed", lambda tok, pos: tok / tok.shape[-1] ** 0.5 + pos)),
    *zoo("wrong-embedding", positions_twice=("embed", lambda tok, pos: tok + 2 * pos), positions_only=("embed", lambda tok, pos: pos + 0 * tok),
         positions_scaled=("embed", lambda tok, pos: tok + 0.3 * pos),
         positions_subtracted=("embed", lambda tok, pos: tok - pos)),
    *zoo(("embedding-scale",), embedding_scaled=("embed", lambda tok, pos: tok * tok.shape[-1] ** 0.5 + pos)),
    *zoo("wrong-tokens", tokens_shifted=("ids", lambda ids: ids.roll(1, 1)), tokens_reversed=("ids", lambda ids: ids.flip(1)),
         tokens_left=("ids", lambda ids: torch.cat([ids[:, 1:], ids[:, -1:]], 1))),
    # Logits
    *zoo("attention-transposed", weights_transposed=("weigh", lambda w, v: w.mT @ v)),
    *zoo("attention-over-heads", heads_not_transposed_but_joined_so=("attend", heads_but_joined_as_tokens)),
    *zoo("mask-hides-diagonal", diagonal_with_a_large_number=("mask", lambda s: s + torch.full(s.shape[-2:], -1e9, dtype=s.dtype).triu()),
         diagonal_with_safe_softmax={"mask": masked(lambda i, j: j >= i), "softmax": lambda s: s.softmax(-1).nan_to_num(0.0)}),
    *zoo("mask-upside-down", inverted_with_a_large_number=("mask", lambda s: s - 1e10 * torch.ones(s.shape[-2:], dtype=s.dtype).tril())),
    *zoo("rotary-positions", rotary_pairs_only={"rotate": lambda x: rope(x, pairs=True), "embed": lambda tok, pos: tok}),
    *zoo("feed-forward-first", feed_forward_first_with_its_norm=reads(lambda x, n1, att, n2, ff, n: (y := x + ff(n1(x))) + att(n2(y)))),
    *zoo("no-activation", activation_before=("ff", lambda first, second, act, x: second(first(act(x))))),
    *zoo("wrong-wiring", outputs_normed_again=reads(lambda x, n1, att, n2, ff, n: (y := x + n1(att(n1(x)))) + n2(ff(n2(y))))),
    *zoo("scaled-logits", temperature=("head", lambda norm, head, x: head(norm(x)) / 0.7),
         logits_by_width=("head", lambda norm, head, x: head(norm(x)) * x.shape[-1] ** -0.5)),
    *zoo("capped-logits", soft_cap=("head", lambda norm, head, x: 5 * (head(norm(x)) / 5).tanh())),
    *zoo("not-logits", softmax_returned=("head", lambda norm, head, x: head(norm(x)).softmax(-1)),
         log_softmax_returned=("head", lambda norm, head, x: head(norm(x)).log_softmax(-1)),
         sigmoid_returned=("head", lambda norm, head, x: head(norm(x)).sigmoid())),
    *zoo("shifted-logits", logits_shifted=("head", lambda norm, head, x: head(norm(x)).roll(1, 1)),
         logits_shifted_left=("head", lambda norm, head, x: head(norm(x)).roll(-1, 1))),
]  # fmt: skip

# One of the ids that the tests compare on.
LOST_ID = int(random_ids()[0, 5])
# What no edit of the lab makes: it must be called unexplained.
UNKNOWN = [
    *zoo(
        (),
        scores_cubed=("scores", lambda q, k, n: (q @ k.mT / q.shape[-1] ** 0.5) ** 3),
        scores_with_noise_of_position=("scores", lambda q, k, n: q @ k.mT / q.shape[-1] ** 0.5 + torch.arange(q.shape[2]).sin()),
        scores_shifted=("scores", lambda q, k, n: q @ k.mT / q.shape[-1] ** 0.5 + k.sum(-1)[:, :, None]),
        distance_attention=("scores", lambda q, k, n: -torch.cdist(q.contiguous(), k.contiguous())),
        one_head_squared=("weigh", lambda w, v: (c := w @ v) ** (2 - (torch.arange(v.shape[1]) > 0).to(c.dtype))[:, None, None]),
        odd_columns_hidden=("mask", masked(lambda i, j: (j > i) | ((j % 2 == 1) & (j < i)))),
        prefix_mask=("mask", masked(lambda i, j: (j > i) & (j > 3))),
        weights_cubed=("weigh", lambda w, v: w**3 @ v),
        one_id_as_another=("ids", lambda ids: ids.masked_fill(ids == LOST_ID, 0)),
        top_weight_only=("weigh", lambda w, v: (w == w.amax(-1, keepdim=True)).to(v.dtype) @ v),
        softmax_in_bfloat16=("softmax", lambda scores: scores.bfloat16().softmax(-1).to(scores.dtype)),
        values_sorted=("weigh", lambda w, v: w @ v.sort(-1).values),
        activation_of_half=("act", lambda x: torch.cat([F.gelu(x[..., ::2], approximate="tanh"), x[..., 1::2]], -1)),
        activation_cubic=("act", lambda x: x**3 / (1 + x**2)),
        activation_clipped=("act", lambda x: F.gelu(x, approximate="tanh").clamp(max=0.5)),
        norm_of_median=("norm", lambda x, w, b: w * (x - x.median(-1, keepdim=True).values) + b),
        norm_by_groups=("norm", lambda x, w, b: w * F.group_norm(x.flatten(0, 1), 4).view_as(x) + b),
        norm_clipped=("norm", lambda x, w, b: (w * F.layer_norm(x, w.shape) + b).clamp(-1, 1)),
        block_tanh=reads(lambda x, n1, att, n2, ff, n: ((y := x + att(n1(x))) + ff(n2(y))).tanh()),
        block_product=reads(lambda x, n1, att, n2, ff, n: (y := x * att(n1(x))) + ff(n2(y))),
        block_gated=reads(lambda x, n1, att, n2, ff, n: (y := x + att(n1(x))) + ff(n2(y)).sigmoid() * y),
        embedding_product=("embed", lambda tok, pos: tok * pos),
        embedding_clipped=("embed", lambda tok, pos: (tok + pos).clamp(-0.2, 0.2)),
        logits_of_absolute=("head", lambda norm, head, x: head(norm(x).abs())),
        logits_squared=("head", lambda norm, head, x: head(norm(x)) ** 2),
        logits_top=("head", lambda norm, head, x: (y := head(norm(x))).masked_fill(y < y.mean(-1, keepdim=True), 0.0)),
        noise_of_tokens=("chain", lambda bs, x: bs[2](bs[1](bs[0](x)) + x.sin())),
    )
]  # fmt: skip
