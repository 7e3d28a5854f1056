"""Why a model is not the reference: known mistakes, each tried by experiment, and the one named that explains it.

Two questions are asked apart. Which tensors hold other numbers, and what was done to them? They are compared one by
one. And does the candidate compute something else with its numbers? GPT-2's forward pass, written out here with one
switch for each mistake, runs on the candidate's own weights until it gives what the candidate gives, stage by stage.
The proof is the same run with the mistakes undone one after the other: the error against the reference vanishes.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H, I n_inner, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, permutations
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .compare import LOGITS, Comparison, double_trace, errors, logit_bound, meaning, stage_bound, stages, trace
from .configuration_gpt_scratch import GPTScratchConfig
from .subjects import Subject

QKV = ("W_query", "W_key", "W_value")
# Mistakes in the weights that are one mistake in however many tensors.
COLLECTIVE = ("qkv-order", "block-order", "wrong-tensor", "not-loaded", "rounded-weights", "other-weights")
# Forward mistakes that are looked for at once, and the tokens on which: enough for any mask, and quick.
MOST, SHORT = 4, 12


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


@dataclass(frozen=True)
class Hypothesis:
    """A mistake in the forward pass: its family's name, what it says, where it acts first, and the switch."""

    name: str
    says: str
    remedy: str
    stage: str  # of block 0 if inside the blocks
    changes: dict[str, Any]

    @property
    def place(self) -> int:
        return stages(1).index(self.stage)


@dataclass(frozen=True)
class Fault:
    """A mistake that the experiment confirms.

    `error` is the relative error of the logits against the reference with this fault and those before it repaired.
    """

    name: str
    says: str
    where: str
    remedy: str
    kind: str  # "forward", "weights" or "mode"
    error: float = math.nan


@dataclass
class Diagnosis:
    """The faults in execution order; `explained` says that together they reproduce the candidate.

    `error` is the candidate's relative logit error, `unexplained` that of the candidate against the reference with
    these faults, `tried` the number of experiments.
    """

    faults: list[Fault]
    explained: bool
    error: float
    unexplained: float
    tried: int
    note: str = ""
    also: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [fault.name for fault in self.faults]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# GPT-2's forward pass, with everything that can be got wrong in it


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
    weights: Mapping[str, torch.Tensor], config: GPTScratchConfig, input_ids: torch.Tensor, wrong: Mistakes
) -> Iterator[tuple[str, torch.Tensor]]:
    """GPT-2's forward pass with mistakes, stage after stage under the names of `compare.stages`; lazily.

    Args:
        weights: in the book's names and layout.
        input_ids: (B, T).
    """
    batch, tokens = input_ids.shape
    width, heads = config.emb_dim, wrong.n_heads or config.n_heads
    activation = ACT2FN[wrong.activation or config.activation_function]

    def linear(x, name):
        matrix = weights[f"{name}.weight"]
        short = re.sub(r"^trf_blocks\.\d+\.(att\.)?", "", name)
        matrix = matrix.T if short in wrong.transposed else matrix
        return F.linear(x, matrix, None if short in wrong.no_bias else weights.get(f"{name}.bias"))

    def normed(x, name):
        return norm(x, weights, name, config.layer_norm_epsilon, wrong)

    x = weights["tok_emb.weight"][input_ids]  # (B, T, E)
    yield "tok_emb", x
    if wrong.embedding_scale:
        x = x * width**0.5
    if wrong.positions != "none":
        offset = wrong.positions if isinstance(wrong.positions, int) else 0
        rows = (torch.arange(tokens) + offset).clamp(0, len(weights["pos_emb.weight"]) - 1)
        positions = weights["pos_emb.weight"][rows]  # (T, E)
        yield "pos_emb", positions
        x = x + positions
    for n in range(config.n_layers):
        block = f"trf_blocks.{n}"
        yield f"{block}.input", x
        shortcut = x
        if wrong.norm_order != "post":
            x = normed(x, f"{block}.norm1")
            yield f"{block}.norm1", x
            shortcut = x if wrong.norm_order else shortcut
        projected = [linear(x, f"{block}.att.{name}") for name in QKV]  # 3 of (B, T, E)
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
        x = linear(context, f"{block}.att.out_proj")
        yield f"{block}.att.out_proj", x
        x = x if "attention" in wrong.shortcuts else x + shortcut
        if wrong.norm_order == "post":
            x = normed(x, f"{block}.norm1")
            yield f"{block}.norm1", x
            shortcut = x
        else:
            if not wrong.single_norm:
                yield f"{block}.norm2.input", x
            shortcut = x
            x = normed(x, f"{block}.norm1" if wrong.single_norm else f"{block}.norm2")
            if not wrong.single_norm:
                yield f"{block}.norm2", x
            shortcut = x if wrong.norm_order else shortcut
        x = linear(x, f"{block}.ff.layers.0")
        yield f"{block}.ff.layers.0", x
        x = activation(x)  # (B, T, I)
        yield f"{block}.ff.layers.2.input", x
        x = linear(x, f"{block}.ff.layers.2")
        yield f"{block}.ff.layers.2", x
        x = x if "feed-forward" in wrong.shortcuts else x + shortcut
        if wrong.norm_order == "post":
            yield f"{block}.norm2.input", x
            x = normed(x, f"{block}.norm2")
            yield f"{block}.norm2", x
        yield block, x
    if wrong.final_norm != "missing":
        x = normed(x, "final_norm")
        yield "final_norm", x
    x = F.linear(x, weights["tok_emb.weight" if wrong.tied_head else f"{LOGITS}.weight"])
    outputs: dict[str, Callable[..., torch.Tensor]] = {"log_softmax": torch.log_softmax, "softmax": torch.softmax}
    yield LOGITS, outputs[wrong.output](x, -1) if wrong.output else x


def hypotheses(config: GPTScratchConfig, eps_found: Iterable[float] = ()) -> list[Hypothesis]:
    """All single mistakes in the forward pass that are tried, in execution order.

    Args:
        eps_found: epsilons that the candidate's norms say they use.
    """
    first = "trf_blocks.0."
    width, eps, act = config.emb_dim, config.layer_norm_epsilon, config.activation_function
    known: list[Hypothesis] = []

    def suppose(name: str, stage: str, says: str, remedy: str, **changes: Any) -> None:
        known.append(Hypothesis(name, says, remedy, stage, changes))

    suppose(
        "embedding-scale",
        first + "input",
        f"token embeddings are multiplied by √emb_dim = {width**0.5:.4g}",
        "GPT-2 adds tok_emb and pos_emb as they are",
        embedding_scale=True,
    )
    for offset in (1, -1, 2):
        suppose(
            "off-by-one-positions",
            "pos_emb",
            f"positions start at {offset} instead of 0",
            "pos_emb(torch.arange(num_tokens)): the first token has position 0",
            positions=offset,
        )
    suppose(
        "no-positions",
        first + "input",
        "the position embedding is not added",
        "x = tok_emb(idx) + pos_emb(torch.arange(num_tokens))",
        positions="none",
    )
    suppose(
        "unbiased-variance",
        first + "norm1",
        "LayerNorm divides the variance by E − 1, not by E",
        "x.var(dim=-1, keepdim=True, unbiased=False)",
        unbiased=True,
    )
    for value in dict.fromkeys([*eps_found, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0]):
        if value != eps:
            suppose(
                "wrong-eps",
                first + "norm1",
                f"LayerNorm has eps={value:g} instead of {eps:g}",
                f"build the norms with eps={eps:g}",
                norm_eps=value,
            )
    suppose(
        "eps-outside-root",
        first + "norm1",
        "LayerNorm adds eps to the standard deviation, not to the variance",
        "(x - mean) / torch.sqrt(var + eps)",
        eps_on_std=True,
    )
    suppose(
        "post-norm",
        first + "norm1",
        "the norms come after the shortcut additions (post-norm)",
        "x = x + att(norm1(x)); x = x + ff(norm2(x))",
        norm_order="post",
    )
    suppose(
        "shortcut-after-norm",
        first + "norm2.input",
        "the shortcut adds the normed input, not the input",
        "keep shortcut = x before x = norm1(x)",
        norm_order="shortcut after norm",
    )
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            told = ", ".join(QKV[i].removeprefix("W_") for i in order)
            suppose(
                "qkv-order",
                first + "att.weights",
                f"{told} are used as query, key, value",
                "GPT-2's c_attn holds query, key, value, in this order",
                qkv_order=order,
            )
    for heads in (h for h in range(1, width + 1) if width % h == 0 and h != config.n_heads):
        suppose(
            "wrong-n-heads",
            first + "att.weights",
            f"attention has {heads} head{'s' * (heads > 1)} instead of {config.n_heads}",
            f"build the model with n_heads={config.n_heads}; no tensor tells it",
            n_heads=heads,
        )
    suppose(
        "heads-not-transposed",
        first + "att.weights",
        "heads are cut out by .view(B, H, T, D) without transpose",
        ".view(B, T, H, D).transpose(1, 2), and back before out_proj",
        heads_not_moved=True,
    )
    for scale, name, told in (
        ("none", "missing-scale", "attention scores are not divided by √head_dim"),
        ("twice", "doubled-scale", "attention scores are divided by √head_dim twice"),
        ("emb_dim", "scale-by-emb-dim", "attention scores are divided by √emb_dim, not by √head_dim"),
        ("n_heads", "scale-by-n-heads", "attention scores are divided by √n_heads, not by √head_dim"),
        ("times", "inverted-scale", "attention scores are multiplied by √head_dim, not divided"),
    ):
        suppose(name, first + "att.weights", told, "attn_scores / keys.shape[-1] ** 0.5, once", scale=scale)
    for mask, name, told in (
        ("none", "no-mask", "there is no causal mask: tokens see what comes after them"),
        ("hides itself", "mask-hides-diagonal", "the mask includes the diagonal: a token does not see itself"),
        ("hides itself, softly", "mask-hides-diagonal", "the mask includes the diagonal: a token does not see itself"),
        ("sees one ahead", "mask-sees-ahead", "the mask is one off: a token sees the next one"),
        ("upside down", "mask-upside-down", "the mask is upside down: a token sees itself and what comes after it"),
        ("after softmax", "mask-after-softmax", "the mask is applied after softmax: rows do not sum to 1"),
        ("zero scores", "mask-zero-scores", "masked scores are set to 0, not to -inf, before softmax"),
    ):
        suppose(
            name,
            first + "att.weights",
            told,
            "scores.masked_fill(torch.triu(ones, diagonal=1).bool(), -inf), then softmax",
            mask=mask,
        )
    names: tuple[str, ...]
    for names in (("out_proj",), QKV, ("out_proj", *QKV)):
        stage = "att.W_query" if "W_query" in names else "att.out_proj"
        suppose(
            "not-transposed",
            first + stage,
            f"{', '.join(names)} applied the wrong way round",
            "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: transpose",
            transposed=names,
        )
    for names in (QKV, ("out_proj",), ("ff.layers.0",), ("ff.layers.2",), ("norm",)):
        stage = {"W_query": "att.W_query", "out_proj": "att.out_proj", "norm": "norm1"}.get(names[0], names[0])
        suppose(
            "missing-bias",
            first + stage,
            f"no bias is added by {', '.join(names)}",
            "every layer of GPT-2 but the head has a bias",
            no_bias=names,
        )
    around: list[tuple[tuple[str, ...], str]] = [(("attention",), "norm2.input"), (("feed-forward",), "")]
    for names, stage in [*around, (("attention", "feed-forward"), "norm2.input")]:
        suppose(
            "missing-shortcut",
            (first + stage).rstrip("."),
            f"no shortcut around {' and '.join(names)}",
            "x = x + shortcut after attention and after the feed-forward network",
            shortcuts=names,
        )
    suppose(
        "one-norm-for-both", first + "norm2", "norm1 is used where norm2 belongs", "x = ff(norm2(x))", single_norm=True
    )
    for other in ("gelu_new", "gelu", "relu", "silu", "quick_gelu", "tanh", "linear"):
        if other == act or {other, act} <= {"gelu_new", "gelu_pytorch_tanh"}:
            continue
        name = "exact-gelu" if (other, act) == ("gelu", "gelu_new") else "wrong-activation"
        says = "GELU is the exact x · Φ(x), not the tanh approximation" if name == "exact-gelu" else ""
        says = says or f"the activation is {'none at all' if other == 'linear' else other}, not {act}"
        remedy = 'GPT-2 has nn.GELU(approximate="tanh")' if act == "gelu_new" else f"use {act}"
        suppose(name, first + "ff.layers.2.input", says, remedy, activation=other)
    suppose(
        "missing-final-norm",
        "final_norm",
        "there is no norm after the last block",
        "logits = out_head(final_norm(x))",
        final_norm="missing",
    )
    suppose(
        "wrong-head",
        LOGITS,
        "the head is tok_emb's matrix, but the checkpoint has one of its own",
        "load out_head.weight",
        tied_head=True,
    )
    for output in ("log_softmax", "softmax"):
        suppose("not-logits", LOGITS, f"the model returns {output} of the logits", "return the logits", output=output)
    return sorted(known, key=lambda h: h.place)


# The experiment


@dataclass
class Bench:
    """The candidate's trace and everything to reproduce it with."""

    config: GPTScratchConfig
    input_ids: torch.Tensor
    heard: Mapping[str, torch.Tensor]
    bound: float
    tried: int = 0

    def agreement(self, weights: Mapping[str, torch.Tensor], wrong: Mistakes) -> tuple[int, float]:
        """How many of the heard stages agree before the first that does not, and the logits' error (inf until then)."""
        self.tried += 1
        agreed, error = 0, math.inf
        for stage, tensor in simulate(weights, self.config, self.input_ids, wrong):
            if stage in self.heard:
                error = errors(tensor, self.heard[stage])[2]
                if not error <= self.bound:
                    return agreed, math.inf
                agreed += 1
        return agreed, error

    def logits(self, weights: Mapping[str, torch.Tensor], wrong: Mistakes) -> torch.Tensor:
        *_, (_, logits) = simulate(weights, self.config, self.input_ids, wrong)
        return logits

    def explains(self, result: tuple[int, float]) -> bool:
        return result[1] <= self.bound


def with_changes(wrong: Mistakes, *supposed: Hypothesis) -> Mistakes:
    for hypothesis in supposed:
        wrong = replace(wrong, **hypothesis.changes)
    return wrong


def search(
    bench: Bench, weights: Mapping[str, torch.Tensor], known: list[Hypothesis], *, pairs: bool = True
) -> list[Hypothesis]:
    """The forward mistakes that reproduce the candidate with its own weights, found greedily.

    At each step the mistake wins that makes the run agree with the candidate furthest down the graph; where no single
    one gets further, pairs are tried.
    """
    found: list[Hypothesis] = []
    reached = bench.agreement(weights, Mistakes())
    while not bench.explains(reached) and len(found) < MOST:
        taken = {name for hypothesis in found for name in hypothesis.changes}
        free = [hypothesis for hypothesis in known if not taken & hypothesis.changes.keys()]
        singles = ((hypothesis,) for hypothesis in free)
        both = ((a, b) for a, b in combinations(free if pairs else [], 2) if not a.changes.keys() & b.changes.keys())
        for group in (singles, both):
            best: tuple[tuple[int, float], tuple[Hypothesis, ...]] | None = None
            for supposed in group:
                result = bench.agreement(weights, with_changes(Mistakes(), *found, *supposed))
                if best is None or (result[0], -result[1]) > (best[0][0], -best[0][1]):
                    best = result, supposed
            if best and (best[0][0] > reached[0] or bench.explains(best[0])):
                reached, found = best[0], [*found, *best[1]]
                break
        else:
            break
    return sorted(found, key=lambda h: h.place)


def forward_mistakes(bench: Bench, weights: Mapping[str, torch.Tensor], known: list[Hypothesis]) -> list[Hypothesis]:
    """The forward mistakes that explain the candidate, or as many of them as could be found.

    A mistake may sit inside a module, so that the module's own output shows it, or behind it. So the first stage that
    differs is believed at first, then not, in any block; at last no stage is, but the logits.
    """
    agreed, _ = bench.agreement(weights, Mistakes())
    shared = [stage for stage in stages(bench.config.n_layers) if stage in bench.heard]
    doubted = meaning(shared[min(agreed, len(shared) - 1)])
    trusted = [shared, [stage for stage in shared if meaning(stage) != doubted or stage == LOGITS], [LOGITS]]
    first: list[Hypothesis] = []
    for attempt, names in enumerate(trusted):
        part = replace(bench, heard={name: bench.heard[name] for name in names}, tried=0)
        # Without stages each experiment is a whole forward pass: pairs only where there never was a stage.
        found = search(part, weights, known, pairs=attempt < 2)
        explained = part.explains(part.agreement(weights, with_changes(Mistakes(), *found)))
        bench.tried += part.tried
        if explained:
            return found
        first = first or found
        if shared == [LOGITS]:
            break
    return first


# What was done to the weights


@dataclass(frozen=True)
class Change:
    """What was done to one tensor of the reference."""

    tensor: str
    name: str
    says: str
    remedy: str


def weight_changes(reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]) -> list[Change]:
    """The tensors of the candidate that hold other numbers, in execution order, each with what was done to it."""
    tied = torch.equal(reference[f"{LOGITS}.weight"], reference["tok_emb.weight"])
    changes = []
    for name, right in reference.items():
        whole = {f"{name.rpartition('.')[0]}.{kind}" for kind in ("weight", "scale")} & candidate.keys()
        if not whole or (name in candidate and torch.equal(candidate[name], right)):
            continue  # what a module does that is not there is for the forward pass to tell
        told = what_happened(name, right, candidate.get(name), reference)
        if name == f"{LOGITS}.weight" and tied and not torch.equal(candidate[name], candidate["tok_emb.weight"]):
            told = (
                "untied-head",
                "is not tok_emb.weight, to which the reference ties it",
                "out_head.weight = tok_emb.weight",
            )
        if told:
            changes.append(Change(name, *told))
    return changes


def what_happened(name, right, got, reference) -> tuple[str, str, str] | None:
    """The name of the mistake, what it says and the remedy; None if nothing is wrong with this tensor."""
    is_bias = name.endswith((".bias", ".shift"))
    if got is None:
        return (
            ("missing-bias", "is missing", "build the layers with bias=True and load it")
            if is_bias and right.any()
            else None
        )
    if got.shape != right.shape:
        return "other-weights", f"has shape {tuple(got.shape)} instead of {tuple(right.shape)}", "build it alike"
    if right.ndim == 2 and right.shape[0] == right.shape[1] and torch.equal(got, right.T):
        return "not-transposed", "is not transposed", "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: use .T"
    if right.ndim == 2 and torch.equal(got, right.T.reshape(right.shape)):
        return "not-transposed", "is reshaped, not transposed", ".T, never .reshape or .view: the shape alone is right"
    for other, tensor in reference.items():
        if other == name or tensor.shape != got.shape:
            continue
        equal = torch.equal(got, tensor)
        if not equal and not (tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] and torch.equal(got, tensor.T)):
            continue
        more = "" if equal else ", not transposed"
        block, _, rest = name.partition(".att.W_")
        if rest and other.startswith(f"{block}.att.W_"):
            return (
                "qkv-order",
                f"holds {other.partition('.att.')[2]}{more}",
                "c_attn holds query, key, value in this order",
            )
        if re.sub(r"trf_blocks\.\d+", "", name) == re.sub(r"trf_blocks\.\d+", "", other):
            return (
                "block-order",
                f"holds {other.partition('.')[0]} {other.split('.')[1]}'s",
                "sort the blocks by number: as text, 10 comes before 2",
            )
        if tensor.any():
            return "wrong-tensor", f"holds {other}{more}", f"load {name}"
    if is_bias and not got.any():
        return "missing-bias", "is zero: never loaded", "load it"
    if name.endswith(".scale") and bool((got == 1).all()):
        return "not-loaded", "is one everywhere: never loaded", "load it"
    if name == "pos_emb.weight":
        for by in (1, -1, 2):
            shifted = got.roll(-by, 0)
            kept = slice(max(-by, 0), len(got) - max(by, 0))
            if torch.equal(shifted[kept], right[kept]):
                return "off-by-one-positions", f"is shifted by {by} rows", "row i belongs to position i, from 0"
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(got, right.to(dtype).to(got.dtype)):
            return "rounded-weights", f"is rounded to {str(dtype).removeprefix('torch.')}", "load the float32 weights"
    factor = (got.flatten() @ right.flatten() / right.square().sum().clamp(min=1e-30)).item()
    if torch.allclose(got, factor * right, rtol=1e-5, atol=0) and factor:
        return "scaled-weights", f"is {factor:.6g} times the reference's", "load it as it is"
    return "other-weights", "holds other numbers", "load the reference's checkpoint, or train no further"


def grouped(changes: list[Change]) -> list[tuple[Change, list[str]]]:
    """The changes of one kind to one tensor in all blocks, together: the first of them and all tensors' names."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        role = re.sub(r"trf_blocks\.\d+", "trf_blocks.{n}", change.tensor)
        if change.name in COLLECTIVE:
            role = ""
        elif change.name == "missing-bias":
            role = role if "W_" not in role else "qkv"
        groups.setdefault((change.name, role), []).append(change)
    return [(group[0], [change.tensor for change in group]) for group in groups.values()]


def listed(tensors: list[str]) -> str:
    """The tensors' names, with equal ones of several blocks told once: `trf_blocks.{0…2}.att.out_proj.weight`."""
    blocks: dict[str, list[int]] = {}
    for tensor in tensors:
        number = re.search(r"(?<=trf_blocks\.)\d+", tensor)
        blocks.setdefault(re.sub(r"(?<=trf_blocks\.)\d+", "{n}", tensor), []).extend([int(number[0])] if number else [])
    told = []
    for name, numbers in blocks.items():
        run = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        shown = f"{{{numbers[0]}…{numbers[-1]}}}" if run else f"{{{','.join(map(str, numbers))}}}"
        told.append(name.replace("{n}", shown if len(numbers) > 1 else "".join(map(str, numbers))))
    return ", ".join(told[:6]) + (f" and {len(told) - 6} more" if len(told) > 6 else "")


# Together


def complete(weights: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's weights with something in place of what it lacks, in execution order.

    Biases become zeros and a missing head tok_emb's matrix; norms and positions become the reference's, so that only
    the forward pass without them is like the model's.
    """
    filled = {}
    for name, right in reference.items():
        if name in weights:
            filled[name] = weights[name]
        elif name == f"{LOGITS}.weight":
            filled[name] = weights["tok_emb.weight"]
        else:
            filled[name] = (
                torch.zeros_like(right) if name.endswith((".bias", ".shift")) and "final" not in name else right
            )
    return filled


def in_order(weights: Mapping[str, torch.Tensor], n_layers: int) -> dict[str, torch.Tensor]:
    """The same tensors in execution order, with zeros for biases and tok_emb's matrix for a head that are not there."""
    weights = dict(weights)
    weights.setdefault(f"{LOGITS}.weight", weights["tok_emb.weight"])
    for n in range(n_layers):
        for name in QKV:
            matrix = weights[f"trf_blocks.{n}.att.{name}.weight"]
            weights.setdefault(f"trf_blocks.{n}.att.{name}.bias", matrix.new_zeros(matrix.shape[0]))
    order = {stage: place for place, stage in enumerate(stages(n_layers))}
    return dict(sorted(weights.items(), key=lambda item: order.get(item[0].rpartition(".")[0], -1)))


@torch.no_grad()
def diagnose(comparison: Comparison, reference: Subject, candidate: Subject) -> Diagnosis | None:
    """Why the candidate differs; None if it does not. `comparison` is that of these two.

    Raises:
        LabError: a model does not run any more.
    """
    if comparison.same:
        return None
    before = comparison.logits.relative_error
    config = reference.config or candidate.config
    if config is None:
        return Diagnosis([], False, before, before, 0, "the sizes of neither model are known; give --cfg")
    input_ids, target = torch.tensor(comparison.tokens), comparison.traces[0][LOGITS]
    dtype, bound = getattr(torch, comparison.dtype), stage_bound(comparison.dtype)
    right = in_order({name: w.to(dtype) for name, w in reference.weights().items()}, config.n_layers)
    check = Bench(config, input_ids, comparison.traces[0], bound)
    if not check.explains(check.agreement(right, Mistakes())):
        note = "the reference is itself no GPT-2 as its config says, so that nothing can be told by comparison with it"
        return Diagnosis([], False, before, before, check.tried, note)

    mode, heard = [], comparison.traces[1]
    if not comparison.deterministic:
        quiet = without_dropout(candidate, input_ids, comparison.dtype)
        if quiet is None:
            note = "the candidate is random even with dropout switched off; make it deterministic first"
            return Diagnosis([], False, before, before, check.tried, note)
        heard = quiet
        mode = [replace(dropout_fault(candidate.module.training), error=errors(target, heard[LOGITS])[2])]

    short = input_ids[:1, :SHORT]
    brief = run(candidate, short, comparison.dtype, dropout=comparison.deterministic)
    bench = Bench(config, short, brief, bound)
    given = {name: w.to(dtype) for name, w in candidate.weights().items()}
    # Tensors that are equal are kept once: in float64 a large model is large.
    given = {name: right[name] if name in right and torch.equal(w, right[name]) else w for name, w in given.items()}
    own = complete(given, right)
    changes = grouped(weight_changes(right, given))
    eps_found = {m.eps for m in candidate.module.modules() if isinstance(getattr(m, "eps", None), float)}
    known = hypotheses(config, sorted(eps_found))
    forward = forward_mistakes(bench, own, known)
    whole = Bench(config, input_ids, heard, bound)
    unexplained = errors(whole.logits(own, with_changes(Mistakes(), *forward)), heard[LOGITS])[2]
    explained = unexplained <= bound
    faults = [*mode, *undone(whole, target, right, own, changes, forward)]
    also = []
    if explained and len(forward) == 1:
        others = [h for h in known if h.name != forward[0].name]
        also = [h.says for h in others if bench.explains(bench.agreement(own, with_changes(Mistakes(), h)))]
    note = "" if explained else unexplained_note(comparison, faults)
    return Diagnosis(faults, explained, before, unexplained, bench.tried + check.tried, note, also)


def undone(
    bench: Bench,
    target: torch.Tensor,
    right: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    changes: list[tuple[Change, list[str]]],
    forward: list[Hypothesis],
) -> list[Fault]:
    """All faults in execution order, each with the error against the reference once it and those before it are undone.

    Args:
        target: the reference's logits.
        right, own: the weights of the reference and the candidate's.
    """
    order = stages(bench.config.n_layers)
    found: list[tuple[int, Fault, list[str], Hypothesis | None]] = []
    for change, tensors in changes:
        says = f"{len(tensors)} tensors: each {change.says}" if len(tensors) > 1 else f"{tensors[0]} {change.says}"
        fault = Fault(change.name, says, listed(tensors), change.remedy, "weights")
        found.append((order.index(tensors[0].rpartition(".")[0]), fault, tensors, None))
    for supposed in forward:
        where = supposed.stage.replace("trf_blocks.0", "trf_blocks.{n}")
        fault = Fault(supposed.name, supposed.says, where, supposed.remedy, "forward")
        found.append((order.index(supposed.stage), fault, [], supposed))
    found.sort(key=lambda item: item[0])
    weights, left, faults = dict(own), list(forward), []
    for _, fault, tensors, hypothesis in found:
        weights |= {name: right[name] for name in tensors}
        left = [other for other in left if other is not hypothesis]
        error = errors(target, bench.logits(weights, with_changes(Mistakes(), *left)))[2]
        faults.append(replace(fault, error=error))
    return faults


def unexplained_note(comparison: Comparison, faults: list[Fault]) -> str:
    first = comparison.first_divergence
    where = f"the first stage that differs is {first.stage} ({first.meaning})" if first else "only the logits differ"
    known = "what is named is wrong, but it does not explain all" if faults else "no known mistake explains it"
    return f"{known}; {where}: look there"


def run(candidate: Subject, input_ids: torch.Tensor, dtype: str, *, dropout: bool) -> dict[str, torch.Tensor]:
    """The candidate's trace in a dtype that it has been seen to run in."""
    exact = double_trace(candidate, input_ids, dropout=dropout) if dtype == "float64" else None
    return exact or trace(candidate, input_ids, dropout=dropout)


def without_dropout(candidate: Subject, input_ids: torch.Tensor, dtype: str) -> dict[str, torch.Tensor] | None:
    """The candidate's trace with dropout switched off; None if that does not make it deterministic."""
    first, second = (run(candidate, input_ids, dtype, dropout=False) for _ in range(2))
    return first if errors(first[LOGITS], second[LOGITS])[2] <= logit_bound(dtype) else None


def dropout_fault(training: bool) -> Fault:
    says = "dropout is on: the model is in training mode" if training else "dropout is on even in evaluation mode"
    remedy = "call model.eval() before you compare or generate"
    if not training:
        remedy = "nn.Dropout, or F.dropout(x, p, training=self.training): plain F.dropout ignores model.eval()"
    return Fault("dropout-on", says, "all of the model", remedy, "mode")
