"""GPT-2's forward pass with a switch for each mistake, independent of the model in `model/`.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H, I n_inner, V vocabulary.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .trace import LOGITS

QKV = ("W_query", "W_key", "W_value")

Weights = Mapping[str, torch.Tensor]  # in the book's names and layout
# Each stage's name and value as it is computed; at last what goes on to the next place (B, T, E).
Stages = Generator[tuple[str, torch.Tensor], None, torch.Tensor]


@dataclass(frozen=True)
class Switches:
    """How a forward pass deviates from GPT-2's; the defaults are GPT-2's."""

    embedding_scale: bool = False
    positions: int | str | None = None  # added to each position, or "none"
    norm_eps: float | None = None
    unbiased: bool = False
    eps_on_std: bool = False
    norm_order: str = ""  # "post", "shortcut after norm"
    single_norm: bool = False
    qkv_order: tuple[int, int, int] | None = None
    n_heads: int | None = None
    heads_not_moved: bool = False
    scale: str = ""
    mask: str = ""
    shortcuts: tuple[str, ...] = ()  # those missing: around "attention", "feed-forward"
    activation: str = ""
    transposed: tuple[str, ...] = ()  # matrices applied transposed
    no_bias: tuple[str, ...] = ()
    final_norm: str = ""
    tied_head: bool = False
    output: str = ""


def scale_of(name: str, head: int, width: int, heads: int) -> float:
    scales = {"": head**-0.5, "none": 1.0, "twice": 1 / head, "emb_dim": width**-0.5, "n_heads": heads**-0.5}
    return {**scales, "times": head**0.5}[name]


def norm(x: torch.Tensor, weights: Weights, name: str, eps: float, wrong: Switches) -> torch.Tensor:
    """LayerNorm of x (…, E)."""
    centred = x - x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=wrong.unbiased)
    eps = eps if wrong.norm_eps is None else wrong.norm_eps
    normed = centred / (variance.sqrt() + eps if wrong.eps_on_std else (variance + eps).sqrt())
    shift = 0 if "norm" in wrong.no_bias else weights[f"{name}.shift"]
    return normed * weights[f"{name}.scale"] + shift


def masked_softmax(scores: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of scores (B, H, T, T) and the attention weights used, which are the same for all kinds but one."""
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = {
        "": ones.triu(1),
        "sees one ahead": ones.triu(2),
        "hides itself": ones.triu(0),
        "hides itself, softly": ones.triu(0),
        "upside down": ones.tril(-1),
        "none": ~ones,
        "after softmax": ones.triu(1),
        "zero scores": ones.triu(1),
    }[kind]
    if kind == "after softmax":
        soft = scores.softmax(-1)
        return soft, soft.masked_fill(hidden, 0.0)
    fill = {"zero scores": 0.0, "hides itself, softly": torch.finfo(scores.dtype).min}.get(kind, -math.inf)
    soft = scores.masked_fill(hidden, fill).softmax(-1)
    return soft, soft


def simulate(
    weights: Weights,
    config: GPTScratchConfig,
    input_ids: torch.Tensor,
    wrong: Mapping[int, Switches],
    places: Iterable[int] | None = None,
    x: torch.Tensor | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """GPT-2's forward pass with mistakes: each stage's name, as in `trace.stages`, and value, lazily, in order.

    Args:
        input_ids: (B, T).
        wrong: the switches by place: -1 is what comes before the blocks, n block n, n_layers what comes after them.
        places: those to run; default: all.
        x: the input of the first of them (B, T, E); not needed for place -1.
    """
    for n in everywhere(config.n_layers) if places is None else places:
        here = wrong.get(n, Switches())
        if n < 0:
            x = yield from embedded(weights, input_ids, here)
        elif x is None:
            raise ValueError(f"got no x, but place {n} needs an input; give x, or start at place -1")
        elif n < config.n_layers:
            x = yield from through_block(weights, config, n, x, here)
        else:
            x = yield from headed(weights, config, x, here)
        if n + 1 < config.n_layers:
            yield f"trf_blocks.{n + 1}.input", x


def everywhere(n_layers: int) -> range:
    """All places: before the blocks, each block, and behind them."""
    return range(-1, n_layers + 1)


def embedded(weights: Weights, input_ids: torch.Tensor, wrong: Switches) -> Stages:
    x = weights["tok_emb.weight"][input_ids]  # (B, T, E)
    yield "tok_emb", x
    if wrong.embedding_scale:
        x = x * x.shape[-1] ** 0.5
    if wrong.positions != "none":
        offset = wrong.positions if isinstance(wrong.positions, int) else 0
        rows = (torch.arange(input_ids.shape[1]) + offset).clamp(0, len(weights["pos_emb.weight"]) - 1)
        positions = weights["pos_emb.weight"][rows]  # (T, E)
        yield "pos_emb", positions
        x = x + positions
    return x


def through_block(weights: Weights, config: GPTScratchConfig, n: int, x: torch.Tensor, wrong: Switches) -> Stages:
    order = {"post": post_norm, "on output": output_norm}.get(wrong.norm_order, pre_norm)
    x = yield from order(weights, config, n, x, wrong)
    yield f"trf_blocks.{n}", x
    return x


def pre_norm(weights: Weights, config: GPTScratchConfig, n: int, x: torch.Tensor, wrong: Switches) -> Stages:
    """GPT-2's order: x = x + att(norm1(x)); x = x + ff(norm2(x))."""
    block, eps = f"trf_blocks.{n}", config.layer_norm_epsilon
    normed = norm(x, weights, f"{block}.norm1", eps, wrong)
    yield f"{block}.norm1", normed
    after_norm = wrong.norm_order == "shortcut after norm"
    result = yield from attention(weights, config, n, normed, wrong)
    x = with_shortcut(result, normed if after_norm else x, "attention", wrong)
    if wrong.single_norm:
        normed = norm(x, weights, f"{block}.norm1", eps, wrong)
    else:
        yield f"{block}.norm2.input", x
        normed = norm(x, weights, f"{block}.norm2", eps, wrong)
        yield f"{block}.norm2", normed
    result = yield from feed_forward(weights, config, n, normed, wrong)
    return with_shortcut(result, normed if after_norm else x, "feed-forward", wrong)


def post_norm(weights: Weights, config: GPTScratchConfig, n: int, x: torch.Tensor, wrong: Switches) -> Stages:
    """The first transformer's order: x = norm1(x + att(x)); x = norm2(x + ff(x))."""
    block, eps = f"trf_blocks.{n}", config.layer_norm_epsilon
    result = yield from attention(weights, config, n, x, wrong)
    x = norm(with_shortcut(result, x, "attention", wrong), weights, f"{block}.norm1", eps, wrong)
    yield f"{block}.norm1", x
    result = yield from feed_forward(weights, config, n, x, wrong)
    x = with_shortcut(result, x, "feed-forward", wrong)
    yield f"{block}.norm2.input", x
    x = norm(x, weights, f"{block}.norm2", eps, wrong)
    yield f"{block}.norm2", x
    return x


def output_norm(weights: Weights, config: GPTScratchConfig, n: int, x: torch.Tensor, wrong: Switches) -> Stages:
    """x = x + norm1(att(x)); x = x + norm2(ff(x))."""
    block, eps = f"trf_blocks.{n}", config.layer_norm_epsilon
    result = yield from attention(weights, config, n, x, wrong)
    result = norm(result, weights, f"{block}.norm1", eps, wrong)
    yield f"{block}.norm1", result
    x = with_shortcut(result, x, "attention", wrong)
    result = yield from feed_forward(weights, config, n, x, wrong)
    yield f"{block}.norm2.input", result
    result = norm(result, weights, f"{block}.norm2", eps, wrong)
    yield f"{block}.norm2", result
    return with_shortcut(result, x, "feed-forward", wrong)


def with_shortcut(result: torch.Tensor, shortcut: torch.Tensor, around: str, wrong: Switches) -> torch.Tensor:
    return result if around in wrong.shortcuts else result + shortcut


def linear(weights: Weights, n: int, name: str, x: torch.Tensor, wrong: Switches) -> torch.Tensor:
    """A linear layer of block n applied to x (…, in); (…, out)."""
    matrix, short = weights[f"trf_blocks.{n}.{name}.weight"], name.removeprefix("att.")
    bias = None if short in wrong.no_bias else weights.get(f"trf_blocks.{n}.{name}.bias")
    return F.linear(x, matrix.T if short in wrong.transposed else matrix, bias)


def attention(weights: Weights, config: GPTScratchConfig, n: int, x: torch.Tensor, wrong: Switches) -> Stages:
    (batch, tokens, width), block = x.shape, f"trf_blocks.{n}.att"
    projected = [linear(weights, n, f"att.{name}", x, wrong) for name in QKV]  # 3 of (B, T, E)
    yield from ((f"{block}.{name}", part) for name, part in zip(QKV, projected, strict=True))
    if wrong.qkv_order:
        projected = [projected[i] for i in wrong.qkv_order]
    heads = wrong.n_heads or config.n_heads
    if wrong.heads_not_moved:
        q, k, v = (part.view(batch, heads, tokens, -1) for part in projected)
    else:
        q, k, v = (part.view(batch, tokens, heads, -1).transpose(1, 2) for part in projected)  # (B, H, T, D)
    scale = scale_of(wrong.scale, width // heads, width, heads) if config.scale_attn_weights else 1.0
    scale = scale / (n + 1) if config.scale_attn_by_inverse_layer_idx else scale
    soft, used = masked_softmax(q @ k.transpose(2, 3) * scale, wrong.mask)
    yield f"{block}.weights", soft
    context = used @ v  # (B, H, T, D)
    context = (context if wrong.heads_not_moved else context.transpose(1, 2)).reshape(batch, tokens, width)
    yield f"{block}.out_proj.input", context
    x = linear(weights, n, "att.out_proj", context, wrong)
    yield f"{block}.out_proj", x
    return x


def feed_forward(weights: Weights, config: GPTScratchConfig, n: int, x: torch.Tensor, wrong: Switches) -> Stages:
    block = f"trf_blocks.{n}.ff.layers"
    x = linear(weights, n, "ff.layers.0", x, wrong)
    yield f"{block}.0", x
    x = ACT2FN[wrong.activation or config.activation_function](x)  # (B, T, I)
    yield f"{block}.2.input", x
    x = linear(weights, n, "ff.layers.2", x, wrong)
    yield f"{block}.2", x
    return x


def headed(weights: Weights, config: GPTScratchConfig, x: torch.Tensor, wrong: Switches) -> Stages:
    if wrong.final_norm != "missing":
        x = norm(x, weights, "final_norm", config.layer_norm_epsilon, wrong)
        yield "final_norm", x
    x = F.linear(x, weights["tok_emb.weight" if wrong.tied_head else f"{LOGITS}.weight"])
    if wrong.output:
        x = {"log_softmax": torch.log_softmax, "softmax": torch.softmax}[wrong.output](x, -1)
    yield LOGITS, x
    return x
