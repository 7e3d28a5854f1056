"""Models and files of other programs: the book's, nanoGPT's and minGPT's, OpenAI's TensorFlow checkpoint."""

import runpy
from pathlib import Path

import torch
from pairs import CONTEXT, LAYERS, VOCAB, randomize
from torch import nn
from torch.nn import functional as F

from hf_gpt_scratch import GPTModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
TF = FIXTURES / "tiny-tensorflow"
E, HEADS = 48, 4
SIZES, tf_weights = (runpy.run_path(str(FIXTURES / "write_tiny_tensorflow.py"))[name] for name in ("SIZES", "weights"))


class Attention(nn.Module):
    def __init__(self, bias, mask):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E, bias=bias)
        if mask:
            self.register_buffer("bias", torch.ones(1, 1, CONTEXT, CONTEXT).tril())

    def forward(self, x):  # (B, T, E)
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, bias, mask):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(E, bias=bias), nn.LayerNorm(E, bias=bias)
        self.attn = Attention(bias, mask)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(E, 4 * E, bias=bias), "c_proj": nn.Linear(4 * E, E, bias=bias)})


class Fused(nn.Module):
    """GPT-2 as nanoGPT and minGPT lay it out: `nn.Linear`s, query, key and value in one."""

    def __init__(self, bias=True, tied=True, mask=False, gelu="none", vocab=VOCAB):
        super().__init__()
        self.gelu = gelu
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, E),
                "wpe": nn.Embedding(CONTEXT, E),
                "h": nn.ModuleList(Block(bias, mask) for _ in range(LAYERS)),
                "ln_f": nn.LayerNorm(E, bias=bias),
            }
        )
        self.lm_head = nn.Linear(E, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight
        randomize(self).eval()

    def forward(self, ids):  # (B, T)
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = x + block.attn(block.ln_1(x))
            x = x + block.mlp["c_proj"](F.gelu(block.mlp["c_fc"](block.ln_2(x)), approximate=self.gelu))
        return self.lm_head(self.transformer["ln_f"](x))  # (B, T, V)


def model_args(vocab=VOCAB, bias=True):
    sizes = dict(n_layer=LAYERS, n_head=HEADS, n_embd=E, block_size=CONTEXT, vocab_size=vocab)
    return {**sizes, "bias": bias, "dropout": 0.0}


def nanogpt_file(path, model, prefix="", **more):
    state_dict = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    args = model_args(len(model.lm_head.weight), "lm_head.bias" in state_dict or "transformer.ln_f.bias" in state_dict)
    torch.save({"model": state_dict, "model_args": args, "optimizer": {}, "iter_num": 7, **more}, path)
    return path


def book_model(**changes):
    cfg = dict(vocab_size=VOCAB, context_length=CONTEXT, emb_dim=E, n_heads=HEADS, n_layers=LAYERS, drop_rate=0.1)
    return randomize(GPTModel({**cfg, "qkv_bias": False, **changes})).eval()


def book_masks(layers=LAYERS):
    return {f"trf_blocks.{n}.att.mask": torch.ones(CONTEXT, CONTEXT).triu(1) for n in range(layers)}
