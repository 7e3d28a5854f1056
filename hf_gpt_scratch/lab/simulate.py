"""GPT-2's forward pass, with everything that can be got wrong in it as a switch.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H, I n_inner, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .trace import LOGITS

QKV = ("W_query", "W_key", "W_value")


@dataclass(frozen=True)
class Mistakes:
    """What a forward pass does otherwise than GPT-2's; None, 0, () and "" mean nothing."""

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
    shortcuts: tuple[str, ...] = ()  # those left out: "attention", "feed-forward"
    activation: str = ""
    transposed: tuple[str, ...] = ()  # applied the wrong way round
    no_bias: tuple[str, ...] = ()
    final_norm: str = ""
    tied_head: bool = False
    output: str = ""


def scale_of(name: str, head: int, width: int, heads: int) -> float:
    scales = {"": head**-0.5, "none": 1.0, "twice": 1 / head, "emb_dim": width**-0.5, "n_heads": heads**-0.5}
    return {**scales, "times": head**0.5}[name]


def norm(x: torch.Tensor, weights: Mapping[str, torch.Tensor], name: str, eps: float, wrong: Mistakes) -> torch.Tensor:
    """LayerNorm of x (…, E)."""
    centred = x - x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=wrong.unbiased)
    eps = eps if wrong.norm_eps is None else wrong.norm_eps
    normed = centred / (variance.sqrt() + eps if wrong.eps_on_std else (variance + eps).sqrt())
    shift = 0 if "norm" in wrong.no_bias else weights[f"{name}.shift"]
    return normed * weights[f"{name}.scale"] + shift


def masked_softmax(scores: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax of scores (B, H, T, T), and the attention weights that are used; the same but for one kind."""
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
    weights: Mapping[str, torch.Tensor],
    config: GPTScratchConfig,
    input_ids: torch.Tensor,
    wrong: Mapping[int, Mistakes],
    places: Iterable[int] | None = None,
    x: torch.Tensor | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """GPT-2's forward pass with mistakes, stage after stage under the names of `compare.stages`; lazily.

    Args:
        weights: in the book's names and layout.
        input_ids: (B, T).
        wrong: the mistakes by place: -1 is what comes before the blocks, n block n, n_layers what comes behind.
        places: those to run; default: all.
        x: what goes into the first of them (B, T, E).
    """
    for n in places if places is not None else everywhere(config.n_layers):
        here = wrong.get(n, Mistakes())
        if n < 0:
            x = yield from embedded(weights, input_ids, here)
        elif n < config.n_layers:
            x = yield from through_block(weights, config, n, x, here)
        else:
            x = yield from headed(weights, config, x, here)
        if n + 1 < config.n_layers:
            yield f"trf_blocks.{n + 1}.input", x


def everywhere(n_layers: int) -> range:
    """All places: before the blocks, each block, and behind them."""
    return range(-1, n_layers + 1)


def embedded(weights, input_ids, wrong):
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


def through_block(weights, config, n, x, wrong):
    batch, tokens, width = x.shape
    heads, block = wrong.n_heads or config.n_heads, f"trf_blocks.{n}"

    def linear(x, name):
        matrix = weights[f"{block}.{name}.weight"]
        short = name.removeprefix("att.")
        matrix = matrix.T if short in wrong.transposed else matrix
        return F.linear(x, matrix, None if short in wrong.no_bias else weights.get(f"{block}.{name}.bias"))

    def normed(x, name):
        return norm(x, weights, f"{block}.{name}", config.layer_norm_epsilon, wrong)

    shortcut = x
    if wrong.norm_order != "post":
        x = normed(x, "norm1")
        yield f"{block}.norm1", x
        shortcut = x if wrong.norm_order else shortcut
    projected = [linear(x, f"att.{name}") for name in QKV]  # 3 of (B, T, E)
    yield from ((f"{block}.att.{name}", part) for name, part in zip(QKV, projected, strict=True))
    if wrong.qkv_order:
        projected = [projected[i] for i in wrong.qkv_order]
    if wrong.heads_not_moved:
        q, k, v = (part.view(batch, heads, tokens, -1) for part in projected)
    else:
        q, k, v = (part.view(batch, tokens, heads, -1).transpose(1, 2) for part in projected)  # (B, H, T, D)
    scale = scale_of(wrong.scale, width // heads, width, heads) if config.scale_attn_weights else 1.0
    scale = scale / (n + 1) if config.scale_attn_by_inverse_layer_idx else scale
    soft, used = masked_softmax(q @ k.transpose(2, 3) * scale, wrong.mask)
    yield f"{block}.att.weights", soft
    context = used @ v
    context = (context if wrong.heads_not_moved else context.transpose(1, 2)).reshape(batch, tokens, width)
    yield f"{block}.att.out_proj.input", context
    x = linear(context, "att.out_proj")
    yield f"{block}.att.out_proj", x
    x = x if "attention" in wrong.shortcuts else x + shortcut
    if wrong.norm_order == "post":
        x = normed(x, "norm1")
        yield f"{block}.norm1", x
        shortcut = x
    else:
        if not wrong.single_norm:
            yield f"{block}.norm2.input", x
        shortcut = x
        x = normed(x, "norm1" if wrong.single_norm else "norm2")
        if not wrong.single_norm:
            yield f"{block}.norm2", x
        shortcut = x if wrong.norm_order else shortcut
    x = linear(x, "ff.layers.0")
    yield f"{block}.ff.layers.0", x
    x = ACT2FN[wrong.activation or config.activation_function](x)  # (B, T, I)
    yield f"{block}.ff.layers.2.input", x
    x = linear(x, "ff.layers.2")
    yield f"{block}.ff.layers.2", x
    x = x if "feed-forward" in wrong.shortcuts else x + shortcut
    if wrong.norm_order == "post":
        yield f"{block}.norm2.input", x
        x = normed(x, "norm2")
        yield f"{block}.norm2", x
    yield block, x
    return x


def headed(weights, config, x, wrong):
    if wrong.final_norm != "missing":
        x = norm(x, weights, "final_norm", config.layer_norm_epsilon, wrong)
        yield "final_norm", x
    x = F.linear(x, weights["tok_emb.weight" if wrong.tied_head else f"{LOGITS}.weight"])
    outputs: dict[str, Callable[..., torch.Tensor]] = {"log_softmax": torch.log_softmax, "softmax": torch.softmax}
    x = outputs[wrong.output](x, -1) if wrong.output else x
    yield LOGITS, x
    return x
