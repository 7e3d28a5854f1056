"""Why a model is not the reference: known mistakes, each tried by experiment, and the one named that explains it.

Two questions are asked apart. Which tensors hold other numbers, and what was done to them? They are compared one by
one. And does the candidate compute something else with its numbers? GPT-2's forward pass, written out here with one
switch for each mistake, runs on the candidate's own weights until it gives what the candidate gives, stage by stage;
each block by itself where it can be heard, so that a mistake in one of them is found, and said to be there.
The proof is the same run with the mistakes undone one after the other: the error against the reference vanishes.

Shapes: B batch, T tokens, E emb_dim, H heads, D = E / H, I n_inner, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations, pairwise, permutations
from typing import Any

import torch
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .compare import LOGITS, Comparison, double_trace, errors, logit_bound, meaning, stage_bound, stages, trace
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


@dataclass(frozen=True, eq=False)
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

    `error` is the relative error of the logits against the reference with this fault and those before it repaired,
    `blocks` the blocks that have it, where not all of the model does.
    """

    name: str
    says: str
    where: str
    remedy: str
    kind: str  # "forward", "weights" or "mode"
    error: float = math.nan
    blocks: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} in {blocks_told(self.blocks)}" if self.blocks else self.name


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


# Mistakes, each with the places that have it.
Findings = list[tuple[Hypothesis, frozenset[int]]]


def placed(findings: Findings) -> dict[int, Mistakes]:
    """All mistakes of each place."""
    wrong: dict[int, Mistakes] = {}
    for hypothesis, places in findings:
        for place in places:
            wrong[place] = replace(wrong.get(place, Mistakes()), **hypothesis.changes)
    return wrong


def place_of(stage: str, n_layers: int) -> int:
    """The place that a stage shows; the input of block n is what the place before it gives."""
    if number := re.match(r"trf_blocks\.(\d+)(\.input$)?", stage):
        return int(number[1]) - bool(number[2])
    return -1 if stage in ("tok_emb", "pos_emb") else n_layers


@dataclass
class Bench:
    """The candidate's trace and everything to reproduce it with, in some places in a row.

    `start` is what goes into the first of them (B, T, E), `tried` all experiments so far.
    """

    config: GPTScratchConfig
    input_ids: torch.Tensor
    heard: Mapping[str, torch.Tensor]
    bound: float
    weights: Mapping[str, torch.Tensor]
    places: range
    start: torch.Tensor | None = None
    tried: list[Findings] = field(default_factory=list)

    @property
    def shared(self) -> list[str]:
        """The stages here that were heard, in execution order."""
        n_layers = self.config.n_layers
        return [s for s in stages(n_layers) if s in self.heard and place_of(s, n_layers) in self.places]

    def agreement(self, findings: Findings) -> tuple[int, float]:
        """How many of the heard stages agree before the first that does not, and the last's error (inf until then)."""
        self.tried.append(findings)
        agreed, error = 0, math.inf
        for stage, tensor in self.simulated(findings):
            if stage in self.heard:
                error = errors(tensor, self.heard[stage])[2]
                if not error <= self.bound:
                    return agreed, math.inf
                agreed += 1
        return agreed, error

    def explained_by(self, findings: Findings) -> bool:
        return self.agreement(findings)[1] <= self.bound

    def simulated(self, findings: Findings) -> Iterator[tuple[str, torch.Tensor]]:
        return simulate(self.weights, self.config, self.input_ids, placed(findings), self.places, self.start)

    def outcome(self, findings: Findings) -> torch.Tensor:
        """What the last place gives: the logits, or what goes into the next block (B, T, E)."""
        *_, (_, x) = self.simulated(findings)
        return x

    def throughout(self, *hypotheses: Hypothesis) -> Findings:
        return [(hypothesis, frozenset(self.places)) for hypothesis in hypotheses]

    def without(self, doubted: frozenset[str]) -> "Bench":
        """The same without the stages of these meanings, but for the last."""
        kept = [stage for stage in self.shared if meaning(stage) not in doubted or stage == self.shared[-1]]
        return replace(self, heard={stage: self.heard[stage] for stage in kept})

    def parts(self) -> list[range]:
        """The places, cut wherever it was heard what one gives to the next: each block is a part if all was."""
        between = [stage for stage in self.heard if re.fullmatch(r"trf_blocks\.\d+(\.input)?", stage)]
        cuts = {self.places.start, self.places.stop, *(place_of(s, self.config.n_layers) + 1 for s in between)}
        return [range(*pair) for pair in pairwise(sorted(cuts))]

    def heard_before(self, place: int) -> torch.Tensor | None:
        """What the candidate itself gave to a place (B, T, E); None where that was not heard."""
        names = (f"trf_blocks.{place}.input", f"trf_blocks.{place - 1}")
        shape = (*self.input_ids.shape, self.config.emb_dim)
        return next(
            (self.heard[name] for name in names if name in self.heard and self.heard[name].shape == shape), None
        )

    def differing_blocks(self, findings: Findings) -> list[int]:
        """The blocks that do not give what the mistakes let them give, each fed with what the candidate gave it."""
        parts = [replace(self, places=places, start=self.heard_before(places.start)) for places in self.parts()]
        differ = [part for part in parts if part.start is not None and not part.explained_by(findings)]
        return [n for part in differ for n in part.places if n < self.config.n_layers]


def search(bench: Bench, known: list[Hypothesis], *, thorough: bool = True) -> Findings:
    """The forward mistakes that reproduce the candidate with its own weights, found greedily.

    At each step the mistake wins that makes the run agree with the candidate furthest down the graph, be it in all
    places of the bench or, if `thorough`, in one; where no single one gets further, pairs are tried if `thorough`.
    """
    found: Findings = []
    reached, shared = bench.agreement([]), bench.shared
    while not reached[1] <= bench.bound and len(found) < MOST:
        taken = {name for hypothesis, _ in found for name in hypothesis.changes}
        free = [hypothesis for hypothesis in known if not taken & hypothesis.changes.keys()]
        # It lies behind the last stage that agrees, and not behind the first that does not.
        agreed, differs = (place_of(shared[i], bench.config.n_layers) for i in (max(reached[0] - 1, 0), reached[0]))
        alone = range(agreed if reached[0] else bench.places.start, differs + 1) if len(bench.places) > 1 else ()
        two = (pair for pair in combinations(free, 2) if not pair[0].changes.keys() & pair[1].changes.keys())
        singles = [bench.throughout(hypothesis) for hypothesis in free]
        if thorough:
            singles += [[(hypothesis, frozenset({n}))] for n in alone for hypothesis in known]
        groups: list[Iterable[Findings]] = [singles]
        if thorough:
            groups.append(bench.throughout(*pair) for pair in two)
        for group in groups:
            best: tuple[tuple[int, float], Findings] | None = None
            for supposed in group:
                result = bench.agreement([*found, *supposed])
                if best is None or (result[0], -result[1]) > (best[0][0], -best[0][1]):
                    best = result, supposed
            if best and (best[0][0] > reached[0] or best[0][1] <= bench.bound):
                reached, found = best[0], [*found, *best[1]]
                break
        else:
            break
    return found


@dataclass
class Part:
    """Places looked at by themselves: what was found in them, and whether that explains them.

    `bench` has no stages of the meanings in `doubted`.
    """

    bench: Bench
    findings: Findings
    doubted: frozenset[str]
    explained: bool


def explain_part(bench: Bench, known: list[Hypothesis], earlier: list[Part], *, thorough: bool) -> Part:
    """The forward mistakes of some places: those of an earlier part, or what the search finds.

    A mistake may sit inside a module, so that the module's own output shows it, or behind it. So the first stage that
    differs is believed at first, then not; at last no stage is, but the last.
    """
    ways: dict[tuple[tuple[Hypothesis, ...], frozenset[str]], None] = {((), frozenset()): None}  # a set in order
    for part in earlier:
        ways |= {(told, part.doubted): None for told in (tuple(h for h, _ in part.findings), ()) if part.explained}
    for told, doubted in ways:
        judge, findings = bench.without(doubted), bench.throughout(*told)
        if judge.explained_by(findings):
            return Part(judge, findings, doubted, True)
    shared, (agreed, _) = bench.shared, bench.agreement([])
    first: Findings = []
    trials = [frozenset[str](), frozenset({meaning(shared[agreed])}), frozenset(map(meaning, shared))]
    for trial, doubted in enumerate(trials):
        judge = bench.without(doubted)
        if trial and judge.shared == shared:
            continue
        # With one stage left, each experiment runs to the end: singles only, where there were more.
        findings = search(judge, known, thorough=thorough and (trial < 2 or len(bench.places) == 1))
        if judge.explained_by(findings):
            return Part(judge, findings, doubted, True)
        first = first or findings
    return Part(bench, first, trials[0], False)


@dataclass
class Forward:
    """The forward mistakes.

    `moot` are the other blocks that could have a mistake as well without a difference, `strange` the places that no
    mistake explains, `also` what else would explain a single one.
    """

    findings: Findings
    moot: dict[Hypothesis, list[int]]
    strange: list[range]
    also: list[str]


def forward_mistakes(bench: Bench, known: list[Hypothesis]) -> Forward:
    """The forward mistakes that explain the candidate, or as many of them as could be found.

    Each block is looked at by itself, fed with what the candidate gave it, so that no mistake hides another's place.
    A mistake that all parts could have is one of the whole model.
    """
    parts: list[Part] = []
    start: torch.Tensor | None = None
    for places in bench.parts():
        here = replace(bench, places=places, start=start)
        part = explain_part(here, known, parts, thorough=all(part.explained for part in parts))
        parts.append(part)
        start = part.bench.outcome(part.findings) if part.explained else bench.heard_before(places.stop)
        if start is None:
            break
    strange = [part.bench.places for part in parts if not part.explained]
    if strange and len(bench.parts()) > 1:
        blind = bench.without(frozenset(map(meaning, bench.shared)))
        findings = search(blind, known, thorough=False)
        if blind.explained_by(findings):
            parts, strange = [Part(blind, findings, frozenset(), True)], []
    sure = [part for part in parts if part.explained]
    found: Findings = []
    moot: dict[Hypothesis, list[int]] = {}
    for hypothesis in dict.fromkeys(hypothesis for part in parts for hypothesis, _ in part.findings):
        having = frozenset[int]().union(*(p for part in parts for other, p in part.findings if other is hypothesis))
        fits = [p for p in sure if p.bench.explained_by([*p.findings, *p.bench.throughout(hypothesis)])]
        having = frozenset(bench.places) if len(fits) == len(sure) else having
        found.append((hypothesis, having))
        possible = {n for part in fits for n in part.bench.places if 0 <= n < bench.config.n_layers}
        moot[hypothesis] = sorted(possible - having)
    also = []
    if not strange and len(found) == 1:
        ((named, having),) = found
        others = [hypothesis for hypothesis in known if hypothesis.name != named.name]
        also = [
            other.says
            for other in others
            if all(part.bench.explained_by([(other, having & frozenset(part.bench.places))]) for part in parts)
        ]
    return Forward(found, moot, strange, also)


# What was done to the weights


@dataclass(frozen=True)
class Change:
    """What was done to one tensor of the reference."""

    tensor: str
    name: str
    says: str
    remedy: str

    @property
    def owner(self) -> str:
        """What holds something else: the block if it is all of it, else the module in any block."""
        owner = self.tensor.rpartition(".")[0]
        return ".".join(owner.split(".")[:2]) if self.name == "block-order" else in_any_block(owner)


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
                f"holds {in_any_block(other).rpartition('.')[0]}{more}",
                "c_attn holds query, key, value in this order",
            )
        if re.sub(r"trf_blocks\.\d+", "", name) == re.sub(r"trf_blocks\.\d+", "", other):
            return (
                "block-order",
                f"holds {'.'.join(other.split('.')[:2])}",
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


def grouped(changes: list[Change]) -> list[list[Change]]:
    """The changes of one kind to one tensor in all blocks, together."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        role = in_any_block(change.tensor)
        if change.name in COLLECTIVE:
            role = ""
        elif change.name == "missing-bias":
            role = role if "W_" not in role else "qkv"
        groups.setdefault((change.name, role), []).append(change)
    return list(groups.values())


def in_any_block(tensor: str) -> str:
    return re.sub(r"^trf_blocks\.\d+\.", "", tensor)


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
    check = Bench(config, input_ids, comparison.traces[0], bound, right, everywhere(config.n_layers))
    if not check.explained_by([]):
        note = "the reference is itself no GPT-2 as its config says, so that nothing can be told by comparison with it"
        return Diagnosis([], False, before, before, len(check.tried), note)

    heard = comparison.traces[1]
    if not comparison.deterministic:
        quiet = without_dropout(candidate, input_ids, comparison.dtype)
        if quiet is None:
            note = "the candidate is random even with dropout switched off; make it deterministic first"
            return Diagnosis([], False, before, before, len(check.tried), note)
        heard = quiet

    short = input_ids[:1, :SHORT]
    brief = run(candidate, short, comparison.dtype, dropout=comparison.deterministic)
    given = {name: w.to(dtype) for name, w in candidate.weights().items()}
    # Tensors that are equal are kept once: in float64 a large model is large.
    given = {name: right[name] if name in right and torch.equal(w, right[name]) else w for name, w in given.items()}
    own = complete(given, right)
    changes = grouped(weight_changes(right, given))
    eps_found = {m.eps for m in candidate.module.modules() if isinstance(getattr(m, "eps", None), float)}
    bench = Bench(config, short, brief, bound, own, everywhere(config.n_layers))
    forward = forward_mistakes(bench, hypotheses(config, sorted(eps_found)))
    whole = Bench(config, input_ids, heard, bound, own, everywhere(config.n_layers))
    unexplained = errors(whole.outcome(forward.findings), heard[LOGITS])[2]
    explained = unexplained <= bound
    faults = undone(whole, target, right, changes, forward)
    if not comparison.deterministic:
        blocks = replace(whole, heard=comparison.traces[1]).differing_blocks(forward.findings)
        fault = dropout_fault(candidate.module.training, blocks, config.n_layers)
        faults.insert(0, replace(fault, error=errors(target, heard[LOGITS])[2]))
    note = "" if explained else unexplained_note(comparison, faults, forward.strange)
    tried = len(check.tried) + len(bench.tried)
    return Diagnosis(faults, explained, before, unexplained, tried, note, forward.also if explained else [])


def undone(
    bench: Bench,
    target: torch.Tensor,
    right: Mapping[str, torch.Tensor],
    changes: list[list[Change]],
    forward: Forward,
) -> list[Fault]:
    """All faults in execution order, each with the error against the reference once it and those before it are undone.

    Args:
        target: the reference's logits.
        right: the reference's weights.
    """
    n_layers = bench.config.n_layers
    order = stages(n_layers)
    found: list[tuple[int, Fault, list[str], Hypothesis | None]] = []
    for alike in changes:
        tensors = [change.tensor for change in alike]
        found.append((order.index(tensors[0].rpartition(".")[0]), weight_fault(alike, n_layers), tensors, None))
    for supposed, places in forward.findings:
        first, fault = forward_fault(supposed, places, forward.moot[supposed], n_layers)
        found.append((order.index(first), fault, [], supposed))
    found.sort(key=lambda item: item[0])
    left, faults = list(forward.findings), []
    weights = dict(bench.weights)
    for _, fault, tensors, hypothesis in found:
        weights |= {name: right[name] for name in tensors}
        left = [finding for finding in left if finding[0] is not hypothesis]
        error = errors(target, replace(bench, weights=weights).outcome(left))[2]
        faults.append(replace(fault, error=error))
    return faults


def weight_fault(changes: list[Change], n_layers: int) -> Fault:
    """The fault of tensors that were changed alike."""
    tensors = [change.tensor for change in changes]
    numbers = [re.match(r"trf_blocks\.(\d+)\.", tensor) for tensor in tensors]
    blocks = sorted({int(number[1]) for number in numbers if number})
    blocks = blocks if all(numbers) and len(blocks) < n_layers else []
    first, roles = changes[0], set(map(in_any_block, tensors))
    what = f"{len(tensors)} tensors: each" if len(tensors) > 1 else tensors[0]
    says = f"{roles.pop() if blocks and len(roles) == 1 else what} {first.says}"
    if len({change.says for change in changes}) > 1:
        told = list(dict.fromkeys(f"{change.owner} {change.says}" for change in changes))
        says = ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")
    says += f", in {told_only(blocks)}" if blocks and first.name != "block-order" else ""
    return Fault(first.name, says, listed(tensors), first.remedy, "weights", blocks=blocks)


def forward_fault(supposed: Hypothesis, places: frozenset[int], moot: list[int], n_layers: int) -> tuple[str, Fault]:
    """The stage where a mistake in the forward pass acts first, and the fault.

    Args:
        moot: the other blocks where it would make no difference.
    """
    if len(places) == len(everywhere(n_layers)):
        where = supposed.stage.replace("trf_blocks.0", "trf_blocks.{n}")
        return supposed.stage, Fault(supposed.name, supposed.says, where, supposed.remedy, "forward")
    blocks = sorted(places & set(range(n_layers)))
    acts = [supposed.stage.replace("trf_blocks.0", f"trf_blocks.{n}") for n in blocks]
    acts += ["final_norm"] if n_layers in places else []
    names = (
        [blocks_told(blocks) if len(blocks) < n_layers else "all blocks, but not in the final norm"] if blocks else []
    )
    told = ", in " + " and ".join([*names, "the final norm"] if n_layers in places else names)
    if moot:
        told += f"; in {blocks_told(moot)} it makes no difference"
    elif len(blocks) + (n_layers in places) == 1:
        told += " only"
    return acts[0], Fault(supposed.name, supposed.says + told, listed(acts), supposed.remedy, "forward", blocks=blocks)


def blocks_told(blocks: list[int]) -> str:
    """block 3; blocks 3 and 7; blocks 2, 3 and 7; blocks 2 to 7."""
    if len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"blocks {blocks[0]} to {blocks[-1]}"
    *most, last = map(str, blocks)
    return f"blocks {', '.join(most)} and {last}" if most else f"block {last}"


def told_only(blocks: list[int]) -> str:
    return blocks_told(blocks) + " only" * (len(blocks) == 1)


def unexplained_note(comparison: Comparison, faults: list[Fault], strange: list[range]) -> str:
    first = comparison.first_divergence
    where = f"the first stage that differs is {first.stage} ({first.meaning})" if first else "only the logits differ"
    if faults and strange and len(strange[0]) == 1:
        n, last = strange[0][0], len(comparison.growth)
        place = "before the blocks" if n < 0 else f"in block {n}" if n < last else "behind the blocks"
        where = f"what goes wrong besides is {place}"
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


def dropout_fault(training: bool, blocks: list[int], n_layers: int) -> Fault:
    says = "dropout is on: the model is in training mode" if training else "dropout is on even in evaluation mode"
    remedy = "call model.eval() before you compare or generate"
    if not training:
        remedy = "nn.Dropout, or F.dropout(x, p, training=self.training): plain F.dropout ignores model.eval()"
    if not blocks or len(blocks) == n_layers:
        return Fault("dropout-on", says, "all of the model", remedy, "mode")
    return Fault(
        "dropout-on",
        f"{says}, in {told_only(blocks)}",
        listed([f"trf_blocks.{n}" for n in blocks]),
        remedy,
        "mode",
        blocks=blocks,
    )
