"""The book's chapter 4 in five pictures: python examples/lessons.py

From placeholder to GPT, LayerNorm, GELU, shortcuts, and the four official sizes; the numbers are the book's.
"""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.patches import FancyBboxPatch
from rich import print
from torch import nn

from hf_gpt_scratch import GELU, GPT_CONFIG_124M, GPTModel, GPTScratchConfig, LayerNorm, inspect

SIZES = ("124M", "355M", "774M", "1558M")
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#9A9A9A"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
# "Every effort moves you" and "Every day holds a" in GPT-2's encoding.
BATCH = torch.tensor([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])


class NotYet(nn.Module):
    """The placeholder for a part that is not written yet; it adds nothing to the shortcut."""

    def forward(self, x):
        return torch.zeros_like(x)


def stage(written: set[str]) -> GPTModel:
    """The book's 124M model in which only the `written` parts of norm, feed-forward and attention are real."""
    with torch.device("meta"):
        model = GPTModel(GPT_CONFIG_124M)
    block: Any
    for block in model.trf_blocks:
        if "attention" not in written:
            block.att = NotYet()
        if "feed-forward" not in written:
            block.ff = NotYet()
        if "LayerNorm" not in written:
            block.norm1 = block.norm2 = nn.Identity()
    if "LayerNorm" not in written:
        model.final_norm = nn.Identity()  # type: ignore[assignment]  # a part that is not written yet
    model.to_empty(device="cpu")
    torch.manual_seed(123)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.reset_parameters()
        elif isinstance(module, LayerNorm):
            nn.init.ones_(module.scale)
            nn.init.zeros_(module.shift)
    return model


def placeholder(figure: plt.Figure) -> dict:
    """One model that starts with empty blocks and becomes GPT part by part."""
    parts = ("LayerNorm", "feed-forward", "attention")
    titles = ("1. placeholder", "2. LayerNorm", "3. feed-forward with GELU", "4. attention: GPT")
    boxes = ("embeddings", "LayerNorm", "attention", "LayerNorm", "feed-forward", "LayerNorm", "output head")
    heights = (0.9, 2.4, 3.25, 4.55, 5.4, 6.85, 7.7)
    figures: dict[str, list] = {"parameters": [], "first_logits": [], "shape": []}
    for n, (axis, title) in enumerate(zip(figure.subplots(1, 4), titles, strict=True)):
        written = set(parts[:n])
        with torch.no_grad():
            model = stage(written)
            logits = model(BATCH)
        parameters = sum(p.numel() for p in model.parameters())
        figures["parameters"].append(parameters)
        figures["first_logits"].append(logits[0, 0, :3].tolist())
        figures["shape"].append(list(logits.shape))
        del model

        axis.set(xlim=(0, 4), ylim=(-2.1, 9.4))
        axis.axis("off")
        axis.set_title(title, fontweight="bold")
        axis.add_patch(FancyBboxPatch((0.3, 1.95), 3.4, 4.4, boxstyle="round,pad=0.1", fc="#F3F3F3", ec=GREY))
        axis.text(3.7, 1.9, "12 ×", ha="right", va="bottom", color="#555555", fontsize=9)
        axis.annotate("", (2, 8.75), (2, 0.1), arrowprops=dict(arrowstyle="-|>", color="#555555"), zorder=1)
        for below, above in ((2.12, 4.17), (4.28, 6.32)):  # the shortcuts
            axis.plot((2, 0.36, 0.36, 2), (below, below, above, above), color="#555555", lw=1.2, zorder=1)
            axis.text(2, above, "+", ha="center", va="center", bbox=dict(boxstyle="circle,pad=0.1", fc="white"))
        for name, y in zip(boxes, heights, strict=True):
            real, new = name in written or name not in parts, bool(n) and name == parts[n - 1]
            face, edge, line = (ORANGE if new else BLUE, "none", "-") if real else ("white", GREY, "--")
            place = FancyBboxPatch((0.6, y), 2.8, 0.55, boxstyle="round,pad=0.08", fc=face, ec=edge, ls=line, zorder=2)
            axis.add_patch(place)
            axis.text(2, y + 0.27, name, ha="center", va="center", color="white" if real else "#777777", zorder=3)
        axis.text(2, 0, "token ids (2, 4)", ha="center", va="top")
        axis.text(2, 8.85, f"logits ({', '.join(f'{size:,}' for size in logits.shape)})", ha="center")
        axis.text(2, -0.85, f"{parameters:,} parameters", ha="center", va="top", fontweight="bold")
        first = ", ".join(f"{value:.4f}" for value in figures["first_logits"][-1]).replace("-", "−")
        axis.text(2, -1.45, f"first logits {first}", ha="center", va="top", fontsize=9, color="#555555")
    figure.suptitle("The placeholder becomes GPT part by part (dashed: not yet; orange: new); its shapes do not change")
    return figures


def layer_norm(figure: plt.Figure) -> dict:
    """Mean and variance of a layer's outputs before and after LayerNorm, and throughout the model."""
    torch.manual_seed(123)
    batch = torch.randn(2, 5)
    layer = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    with torch.no_grad():
        before = layer(batch)
        after = (before - before.mean(-1, keepdim=True)) / before.var(-1, keepdim=True).sqrt()
        model = stage({"LayerNorm", "feed-forward", "attention"}).eval()
        variances: dict[str, list[float]] = {"before": [], "after": []}

        def watch(norm, args, output):
            variances["before"].append(args[0].var(-1, unbiased=False).mean().item())
            variances["after"].append(output.var(-1, unbiased=False).mean().item())

        for norm in [*(block.get_submodule("norm1") for block in model.trf_blocks), model.final_norm]:
            norm.register_forward_hook(watch)
        model(BATCH)
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    for axis, x, title in zip(axes, (before, after), ("before", "after"), strict=False):
        for row, colour, shift in zip(x, (BLUE, ORANGE), (-0.2, 0.2), strict=True):
            label = f"mean {abs(row.mean()):.2f}, variance {row.var():.2f}"
            axis.bar(torch.arange(1, 7) + shift, row, 0.38, color=colour, label=label)
            axis.axhline(row.mean(), color=colour, ls="--", lw=1)
        axis.set(title=f"{title} normalization", xlabel="output of the layer", xticks=range(1, 7), ylabel="value")
        axis.grid(axis="x", visible=False)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.3 * (high - low))
        axis.legend(title="two examples (dashed: the mean)", loc="upper left", fontsize=10, title_fontsize=10)
    axes[2].plot(variances["before"], "o-", color=BLUE, label="before the norm")
    axes[2].plot(variances["after"], "s--", color=GREEN, label="after it")
    axes[2].set(title="in the untrained 124M model", ylabel="variance of a token's vector", ylim=(0, 4.2))
    axes[2].set_xticks([0, 3, 6, 9, 12], ["norm1 of\nblock 0", "3", "6", "9", "final\nnorm"])
    axes[2].legend(loc="upper left")
    figure.suptitle("LayerNorm gives every example mean 0 and variance 1")
    return {
        "outputs": before.tolist(),
        "mean": before.mean(-1).tolist(),
        "variance": before.var(-1).tolist(),
        "mean_after": after.mean(-1).tolist(),
        "variance_after": after.var(-1).tolist(),
        "variances": variances,
    }


def gelu(figure: plt.Figure) -> dict:
    """GELU and ReLU, and how much of a gradient each passes on."""
    x = torch.linspace(-3, 3, 601, requires_grad=True)
    functions: tuple[tuple[str, nn.Module, str, str], ...] = (
        ("GELU", GELU(), BLUE, "-"),
        ("ReLU", nn.ReLU(), ORANGE, "--"),
    )
    values, slopes = {}, {}
    left, right = figure.subplots(1, 2)
    for name, function, colour, line in functions:
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        values[name], slopes[name] = y.detach(), slope
        left.plot(x.detach(), values[name], line, color=colour, lw=2, label=name)
        right.plot(x.detach(), slope, line, color=colour, lw=2, label=name)
    at = values["GELU"].argmin()
    lowest = (x[at].item(), values["GELU"][at].item())
    arrow = dict(arrowstyle="->", color="#555555")
    left.annotate(f"lowest: −{-lowest[1]:.2f} at −{-lowest[0]:.2f}", lowest, (-2.8, 0.7), arrowprops=arrow)
    left.set(title="the activation", xlabel="x", ylabel="f(x)")
    learning = (-0.5, slopes["GELU"][250].item())
    right.annotate("negative inputs\nstill learn", learning, (-2.8, 0.6), arrowprops=arrow)
    right.set(title="its slope: how much of a gradient it passes on", xlabel="x", ylabel="f′(x)")
    for axis in (left, right):
        axis.axhline(0, color="#555555", lw=0.8)
        axis.legend(loc="upper left")
    figure.suptitle("GELU is smooth and, unlike ReLU, not zero below zero")
    negative = x.detach() < 0
    return {
        "lowest": lowest,
        "at": {name: function(torch.tensor([-1.0, 0.0, 1.0])).tolist() for name, function, *_ in functions},
        "silent_below_zero": {name: bool((slopes[name][negative] == 0).all()) for name in slopes},
    }


def _mean_gradient(layer: nn.Module) -> float:
    gradient = layer.get_parameter("0.weight").grad
    assert gradient is not None
    return gradient.abs().mean().item()


class DeepNetwork(nn.Module):
    """The book's five small layers, with or without shortcuts."""

    def __init__(self, sizes, shortcuts):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after), GELU()) for before, after in pairwise(sizes)
        )
        self.shortcuts = shortcuts

    def forward(self, x):
        for layer in self.layers:
            output = layer(x)
            x = x + output if self.shortcuts and x.shape == output.shape else output
        return x


def shortcuts(figure: plt.Figure) -> dict:
    """The mean size of each layer's gradient."""
    figures: dict[str, dict[str, list[float]]] = {"five": {}, "thirty": {}}
    networks = {"five": [3, 3, 3, 3, 3, 1], "thirty": [64] * 31}
    axes = figure.subplots(1, 2)
    for axis, (kind, widths) in zip(axes, networks.items(), strict=True):
        sample = torch.tensor([[1.0, 0.0, -1.0]]) if kind == "five" else torch.linspace(-1, 1, 64)[None]
        for present, colour, marker in ((True, BLUE, "s-"), (False, ORANGE, "o-")):
            torch.manual_seed(123)
            network = DeepNetwork(widths, present)
            network(sample).square().mean().backward()  # the target is 0
            name = "with shortcuts" if present else "without shortcuts"
            gradients = [_mean_gradient(layer) for layer in network.layers]
            figures[kind][name] = gradients
            axis.semilogy(gradients, marker, color=colour, label=name, markersize=5)
            for n, size in enumerate(gradients if kind == "five" else []):
                place = dict(xytext=(0, 11 if present else -17), textcoords="offset points", ha="center", fontsize=10)
                axis.annotate(f"{size:.4f}", (n, size), **place)
    axes[0].set(title="the book's five layers", xlabel="layer", xticks=range(5), xlim=(-0.4, 4.4), ylim=(3e-5, 5))
    axes[0].set_ylabel("mean |gradient| of the weights")
    axes[0].legend(loc="center right")
    axes[1].set(title="thirty layers of width 64", xlabel="layer")
    figure.suptitle("Shortcuts carry the gradient back to the first layers")
    return figures


def sizes(figure: plt.Figure) -> dict:
    """Parameters and memory of the four official sizes, without qkv_bias and untied, as in the book."""
    figures: dict[str, dict[str, float]] = {}
    parts: dict[str, list[float]] = {}
    for name in SIZES:
        found = inspect(GPTScratchConfig.preset(name, qkv_bias=False, tie_word_embeddings=False))
        blocks = found.tree["model.trf_blocks"].children[0]
        counts = {
            "embeddings": found.tree["model.tok_emb"].parameters + found.tree["model.pos_emb"].parameters,
            "attention": blocks["att"].parameters * blocks.copies,
            "feed-forward": blocks["ff"].parameters * blocks.copies,
            "output head": found.tree["out_head"].parameters,
        }
        for part, count in counts.items():
            parts.setdefault(part, []).append(count / 1e6)
        figures[name] = {**found.parameters, "MiB": found.memory["float32"]["untied"] / 2**20}
    left, right = figure.subplots(1, 2)
    bottom = torch.zeros(len(SIZES))
    for (part, millions), colour in zip(parts.items(), (PINK, BLUE, GREEN, ORANGE), strict=True):
        left.bar(SIZES, millions, 0.65, bottom=bottom, color=colour, label=part)
        bottom += torch.tensor(millions)
    for n, size in enumerate(figures.values()):
        left.text(n, bottom[n] + 20, f"{size['untied']:,}\n(tied {size['tied']:,})", ha="center", fontsize=9)
        for shift, divisor, colour, dtype in ((-0.2, 1, BLUE, "float32"), (0.2, 2, GREEN, "bfloat16")):
            memory = size["MiB"] / divisor
            label = f"{dtype}, {4 // divisor} bytes per parameter" if n == 0 else None
            right.bar(n + shift, memory, 0.38, color=colour, label=label)
            right.text(n + shift - 0.19, memory + 60, f"{memory:,.2f}", fontsize=9)
    left.set(title="parameters", ylabel="millions", ylim=(0, 1900))
    right.set(title="memory of the untied weights", ylabel="MiB (1024² bytes)", xticks=range(4), ylim=(0, 7000))
    right.set_xticklabels(SIZES)
    for axis in (left, right):
        axis.grid(axis="x", visible=False)
        axis.legend(loc="upper left")
    figure.suptitle("The four sizes of GPT-2, as the book counts them: no query, key and value biases")
    return figures


LESSONS: tuple[tuple[Callable[[plt.Figure], dict], tuple[float, float]], ...] = (
    (placeholder, (12, 6.2)),
    (layer_norm, (13, 4.4)),
    (gelu, (10, 4.4)),
    (shortcuts, (11, 4.6)),
    (sizes, (12, 5.2)),
)


def main(
    output: Annotated[Path, typer.Option(help="Where to save the pictures and numbers.")] = Path("outputs/lessons"),
) -> None:
    """Draws the five pictures and saves their numbers."""
    matplotlib.use("agg")
    plt.rcParams.update(STYLE)
    output.mkdir(parents=True, exist_ok=True)
    figures = {}
    for lesson, size in LESSONS:
        picture = plt.figure(figsize=size, layout="constrained")
        figures[lesson.__name__] = lesson(picture)
        picture.savefig(output / f"{lesson.__name__}.png")
        plt.close(picture)
        print(f"[bold]{lesson.__name__}.png[/]: {lesson.__doc__}")
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print("saved to", output)
    gradients = figures["shortcuts"]["five"]
    sys.exit(0 if gradients["with shortcuts"][0] > 100 * gradients["without shortcuts"][0] else 3)


if __name__ == "__main__":
    typer.run(main)
