"""Mistakes that no table can list: constants and sums, fitted to what was recorded at the first stage that differs.

A fit is a guess: the search accepts it only if it reproduces the candidate.

Shapes: B batch, T tokens, E emb_dim, H heads.
"""

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .mistakes import (
    CHAIN,
    EMBEDDED,
    LOGITS_REMEDY,
    MASK,
    NORM_SHOWN,
    POSITIONS,
    SCALE,
    Mistake,
    activation_remedy,
    eps_row,
    row,
    sum_shown,
    wiring_mistake,
)
from .simulate import NORMS, SCALES, WIRING, Forward, Operand, Sum, activate, plus, scale_of
from .trace import LOGITS

if TYPE_CHECKING:
    from .search import Experiment

# Two numbers within this are one: fits of exact constants in float64 are closer, those of float32 constants are not.
SNAP = 1e-9
# The most places in which sums are fitted to one stage: beyond, each of many columns is a long computation.
MOST_PLACES = 3
SUMS = (*WIRING, "input", "embedded", "head.input")


def fits(experiment: "Experiment", target: str, *, more: bool = True) -> list[Mistake]:
    """The mistakes fitted to one stage, with everything recorded before it given; if `more`, sums with more values."""
    recorded = experiment.activations[target]
    forward = experiment.forward(target)
    try:
        forward.compute(target)
    except (ValueError, RuntimeError, KeyError):
        return []
    slots, found = forward.read, []
    places = {place for place, _ in slots}
    if len(places) == 1 or (target.endswith(".input") and len(places) <= MOST_PLACES):
        for place, slot in sorted(slots, key=str):
            if slot in SUMS:
                found += guarded(partial(fitted_sums, experiment, target, place, slot, more=more))
    stage = re.sub(r"^trf_blocks\.\d+\.?", "", target)
    n = int(number[1]) if (number := re.match(r"trf_blocks\.(\d+)", target)) else -1
    forward = experiment.forward(target)
    makers: dict[str, Callable[[], list[Mistake]]] = {
        "pos_emb": lambda: fitted_positions(experiment, recorded),
        "att.weights": lambda: fitted_attention(experiment, forward, recorded, n),
        "att.out_proj.input": lambda: fitted_context(forward, recorded, n),
        "ff.layers.2.input": lambda: fitted_activation(experiment, forward[f"trf_blocks.{n}.ff.layers.0"], recorded),
        LOGITS: lambda: fitted_logits(forward, recorded),
        **{key: partial(fitted_eps, experiment, forward, recorded, n, name) for key, name in NORMED.items()},
    }
    if stage in makers:
        found += guarded(makers[stage])
    return found


def guarded(make: Callable[[], list[Mistake]]) -> list[Mistake]:
    """A fit, or nothing where the recorded tensors do not have the shapes that it needs."""
    try:
        return make()
    except (ValueError, RuntimeError, KeyError, IndexError):
        return []


# Sums


def fitted_sums(experiment: "Experiment", target: str, place: int, slot: str, *, more: bool) -> list[Mistake]:
    """What a module reads, as a sum of values with factors, by least squares; if `more`, with one value more if needed.

    The target must depend linearly on the sum.
    """
    recorded = experiment.activations[target].double()

    def column(operands: Sum) -> torch.Tensor | None:
        try:
            value = experiment.forward(target, {place: {slot: operands}}).compute(target).double()
            return value.expand(recorded.shape).flatten()
        except (ValueError, RuntimeError, KeyError):
            return None

    origin = column(())
    if origin is None:
        return []
    wanted = recorded.flatten() - origin
    sound = wanted.isfinite()
    usual_operands = operands_of(slot, place, experiment.config.n_layers)
    if slot == "output":  # also what was found to be added after attention
        added = experiment.wrong.get(place, {}).get("norm2.input", ())
        usual_operands += [operand for operand, _ in added if operand not in usual_operands]
    base = [(operand, column(plus(operand))) for operand in usual_operands]
    columns = [(operand, value - origin) for operand, value in base if value is not None]
    usual = fitted_sum(wanted, sound, columns)
    if usual is not None:
        return [named_sum(slot, usual)]
    found = []
    for extra in extra_operands(slot, place, experiment.config.n_layers) if more else ():
        value = column(plus(extra))
        if value is not None:
            with_it = fitted_sum(wanted, sound, [*columns, (extra, value - origin)])
            if with_it is not None:
                found.append(named_sum(slot, with_it))
    return found


def operands_of(slot: str, place: int, n_layers: int) -> list[Operand]:
    """What a sum may consist of, what it should consist of first."""
    if slot == "embedded":
        return ["tok_emb", "pos_emb"]
    if slot == "head.input":
        return ["final_norm", "input"]
    if slot == "input":
        others = [f"block {k}" for k in range(n_layers) if k not in (place, place - 1)]
        return ["previous", *(["embedded"] if place else []), *others, "tok_emb", "pos_emb"]
    right = [operand for operand, _ in WIRING[slot]]
    own = slot.removesuffix(".input")
    rest = ["input", "norm1", "att", "norm2", "ff", *(["embedded"] if place else []), "pos_emb"]
    return [*right, *(operand for operand in rest if operand not in right and operand != own)]


# What a module of another block may stand for, by the slot that reads it.
ELSEWHERE = {
    "att.input": ("norm1", plus("input")),
    "norm2.input": ("att", plus("norm1")),
    "ff.input": ("norm2", plus("input", "att")),
    "output": ("ff", plus("norm2")),
}


def extra_operands(slot: str, place: int, n_layers: int) -> Iterator[Operand]:
    if slot in ELSEWHERE:
        module, operands = ELSEWHERE[slot]
        yield from ((f"block {k}'s {module}", operands) for k in range(n_layers) if k != place)
    if slot in ("input", "embedded"):
        whole = [plus("previous")] if slot == "input" else [plus("tok_emb", "pos_emb"), plus("tok_emb")]
        for module in ("F.layer_norm", "F.normalize", "final_norm", "act"):
            yield from ((module, operands) for operands in whole)
    if slot == "input" and place > 0:
        yield (f"block {place - 1}", plus("previous"))
        yield (f"block {place - 1}", plus(f"block {place - 1}"))
    if slot == "head.input":
        yield ("final_norm", plus("final_norm"))
    if slot not in WIRING:
        return
    sums = [plus("input"), plus("input", "att"), plus("norm1"), plus("norm2"), plus("att"), plus("ff")]
    sums += [plus("norm1", "att"), plus("att", "ff"), plus("input", "att", "ff"), plus("input", "ff")]
    sums += [plus("input", "norm1"), plus("input", "norm2")]
    for module in ("norm1", "norm2", "ff", "att", "act", "final_norm", "F.layer_norm"):
        for operands in sums:
            if module != "act" or operands in (plus("ff"), plus("att"), plus("norm1"), plus("norm2")):
                yield (module, operands)
    yield ("ff", plus(("norm2", plus("input", "att", "ff"))))
    yield ("ff", plus(("norm2", plus("input"))))
    yield ("ff", plus(("norm1", plus("input", "att"))))


def fitted_sum(wanted: torch.Tensor, sound: torch.Tensor, columns: list[tuple[Operand, torch.Tensor]]) -> Sum | None:
    """The factors with which the columns add up to what is wanted; None if they do not."""
    kept: list[tuple[Operand, torch.Tensor]] = []
    basis: list[torch.Tensor] = []
    for operand, column in columns:
        column = column[sound]
        if not column.isfinite().all():
            continue
        rest, size = column, column.norm().item()
        for direction in (*basis, *basis):
            rest = rest - (rest @ direction) * direction
        if size and rest.norm().item() > 1e-7 * size:
            kept.append((operand, column))
            basis.append(rest / rest.norm())
    wanted = wanted[sound]
    size = wanted.norm().item()
    if not kept:
        return () if size == 0 else None
    matrix = torch.stack([column for _, column in kept], -1)
    factors = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    if not (matrix @ factors - wanted).norm().item() <= 1e-7 * max(size, 1e-300):
        return None
    snapped = [(operand, snap(factor)) for (operand, _), factor in zip(kept, factors.tolist(), strict=True)]
    return tuple((operand, factor) for operand, factor in snapped if factor)


def snap(value: float) -> float:
    """The nearest multiple of 1/4, if it is within rounding; else the value."""
    near = round(value * 4) / 4
    return near if abs(near - value) <= max(SNAP, SNAP * abs(value)) else value


def named_sum(slot: str, operands: Sum) -> Mistake:
    if slot in WIRING:
        return wiring_mistake({slot: operands})
    shown, changes = sum_shown(operands), ((slot, operands),)
    factors = dict(operands)
    if slot == "embedded" and set(factors) == {"tok_emb", "pos_emb"} and factors["pos_emb"] in (1, factors["tok_emb"]):
        both = "" if factors["pos_emb"] == 1 else " and position"
        says = f"token{both} embeddings are multiplied by {factors['tok_emb']:.6g}"
        return Mistake("embedding-scale", "input", says, EMBEDDED, changes)
    if slot == "embedded":
        says = f"the blocks read {shown}, not tok_emb + the positions"
        return Mistake("wrong-embedding", "input", says, EMBEDDED, changes)
    if slot == "head.input":
        says = f"the head reads {shown}, not final_norm's output"
        return Mistake("wrong-wiring", LOGITS, says, LOGITS_REMEDY, changes)
    says = f"it reads {shown}, not what the place before it returns"
    return Mistake("wrong-wiring", "input", says, CHAIN, changes)


# Constants


def fitted_positions(experiment: "Experiment", recorded: torch.Tensor) -> list[Mistake]:
    """Positions that begin elsewhere, go in other steps, stop or begin again: which rows of the table were added?"""
    table = experiment.weights["pos_emb.weight"]
    rows = recorded.reshape(-1, recorded.shape[-2], recorded.shape[-1])[0].to(table.dtype)
    found = torch.cdist(rows, table).argmin(-1)
    if not torch.equal(table[found], rows) or len(found) < 2:
        return []
    start, step = found[0].item(), (found[1] - found[0]).item()
    wanted = start + step * torch.arange(len(found))
    says, last = f"positions start at {start} and go in steps of {step}", int(found.max())
    for more, positions, kind in (
        ("", wanted, ()),
        (f", but not beyond {last}", wanted.clamp(max=last), ("up to", last)),
        (f", modulo {last + 1}", wanted % (last + 1), ("modulo", last + 1)),
    ):
        if torch.equal(found, positions):
            return [row("wrong-positions", "pos_emb", says + more, POSITIONS, positions=(start, step, *kind))]
    return []


def fitted_attention(experiment: "Experiment", forward: Forward, recorded: torch.Tensor, n: int) -> list[Mistake]:
    """Another scale, another band of visible tokens, another value of masked scores."""
    scores, weights, found = forward.scores(n), recorded.double(), []
    if scores.shape != weights.shape:
        return []
    seen = weights > 0
    visible = seen.any(0).any(0)
    found += [band_row(*band) for band in [visible_band(visible, visible.any(-1))] if band not in (None, (None, 0))]
    # A row that is hidden altogether by a finite number is uniform: it says nothing of the band.
    uneven = (weights - weights.mean(-1, keepdim=True)).abs().amax((0, 1, 3)) > 1e-12
    band = visible_band(visible, uneven)
    if not uneven.all() and band not in (None, (None, 0)):
        found.append(band_row(*band, fill=-1e30))
    past = torch.ones(weights.shape[-2:], dtype=torch.bool).tril() & seen & scores.isfinite()
    logs = torch.where(past, weights.clamp(min=1e-300).log(), 0.0)
    raw = torch.where(past, scores, 0.0)
    count = past.sum(-1, keepdim=True).clamp(min=1)
    logs = torch.where(past, logs - logs.sum(-1, keepdim=True) / count, 0.0)
    raw = torch.where(past, raw - raw.sum(-1, keepdim=True) / count, 0.0)
    ratio = ((logs * raw).sum() / raw.square().sum()).item()
    if math.isfinite(ratio) and abs(ratio) > 1e-9 and abs(ratio - 1) > 1e-7:
        head = experiment.config.emb_dim // forward.n_heads(n)
        now = forward.slot(n, "scale")
        usual = now if isinstance(now, float) else head**-0.5 if experiment.config.scale_attn_weights else 1.0
        factor = ratio * usual
        heads = forward.n_heads(n)
        named = [scale_of(name, head, experiment.config.emb_dim, heads, n, scores.shape[-1]) for name in SCALES]
        if not any(abs(factor - value) <= 1e-9 * abs(value) for value in named):
            says = f"attention scores are multiplied by {factor:.6g} = 1/{1 / factor:.6g}, not by 1/√head_dim"
            found.append(row("wrong-scale", "att.weights", says, SCALE, scale=factor))
    found += fitted_factors("scores", raw, logs)
    found += fitted_limits(scores, weights.clamp(min=1e-300).log(), past)
    found += fitted_fill(scores, weights, seen)
    return found


def fitted_factors(slot: str, right: torch.Tensor, got: torch.Tensor) -> list[Mistake]:
    """The factors of the scores or attention weights in each head, from what follows from them (B, H, T, …)."""
    factors = ((right * got).sum((0, 2, 3)) / right.square().sum((0, 2, 3))).tolist()
    values = [snap(factor) if math.isfinite(factor) else 0.0 for factor in factors]
    if all(abs(value - 1) <= 1e-7 for value in values):
        return []
    says = f"are multiplied, head by head, by {', '.join(f'{value:.6g}' for value in values)}"
    kind = ("wrong-scale", "att.weights", f"attention scores {says}", SCALE)
    if slot == "weights":
        kind = ("wrong-scores", "att.out_proj.input", f"attention weights {says}", "context = weights @ values")
    return [Mistake(*kind, ((slot, ("factors", *values)),))]


def fitted_context(forward: Forward, recorded: torch.Tensor, n: int) -> list[Mistake]:
    both = (x.double().unflatten(-1, (forward.n_heads(n), -1)).transpose(1, 2) for x in (forward.context(n), recorded))
    return fitted_factors("weights", *both)


def fitted_limits(scores: torch.Tensor, logs: torch.Tensor, past: torch.Tensor) -> list[Mistake]:
    """Clamped scores, by the logarithms of the weights: these are scores but for a constant of each row, which at least
    two scores within the limits show."""
    rest = torch.where(past, scores - logs, math.nan)
    alike = (rest[..., None] - rest[..., None, :]).abs() <= SNAP * rest.abs().clamp(min=1)[..., None]
    most, where = alike.sum(-1).max(-1)
    clamped = logs + rest.gather(-1, where[..., None])
    sound = past & (most > 1)[..., None]
    low, high = (clamped[sound & (sign * (scores - clamped) > 1e-7)] for sign in (-1, 1))
    if not low.numel() + high.numel():
        return []
    least = snap(low.mean().item()) if low.numel() else -math.inf
    largest = snap(high.mean().item()) if high.numel() else math.inf
    says = f"attention scores are clamped between {least:.6g} and {largest:.6g}"
    limits, unmasked = ("clamped", least, largest), f"{says}, the masked ones, too"
    return [
        row("wrong-scores", "att.weights", says, SCALE, scores=limits),
        row("wrong-scores", "att.weights", unmasked, MASK, scores=limits, fill=("set", least)),
    ]


def visible_band(seen: torch.Tensor, rows: torch.Tensor) -> tuple[int | None, int | None] | None:
    """The band in which (T, T) is True, judged by some of its rows (T); None if it is no band."""
    size = len(seen)
    distance = torch.arange(size)[:, None] - torch.arange(size)
    if not seen[rows].any():
        return None
    behind, ahead = (distance[rows][seen[rows]].max().item(), -distance[rows][seen[rows]].min().item())
    band = (distance <= behind) & (distance >= -ahead)
    if not torch.equal(band[rows], seen[rows]):
        return None
    return (None if behind >= size - 1 else int(behind)), (None if ahead >= size - 1 else int(ahead))


def band_row(behind: int | None, ahead: int | None, fill: float = -math.inf) -> Mistake:
    changes: dict[str, Any] = {"mask": (behind, ahead), **({} if fill == -math.inf else {"fill": ("set", fill)})}
    if ahead == 0 and behind is not None:
        says = f"a local window: a token sees only itself and the {behind} tokens before it"
        return row("local-window", "att.weights", says, MASK, **changes)
    first = "all tokens before it" if behind is None else f"{behind} tokens before it"
    last = "all tokens after it" if ahead is None else f"{ahead} after it"
    if ahead is not None and ahead < 0:
        first, last = first.replace("before it", f"that are at least {-ahead} before it"), "no others"
    return row("wrong-mask", "att.weights", f"a token sees {first} and {last}", MASK, **changes)


def fitted_fill(scores: torch.Tensor, weights: torch.Tensor, seen: torch.Tensor) -> list[Mistake]:
    """A masked score that is a constant, or a score to which a constant was added."""
    found = []
    later = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1).expand_as(weights) & seen
    if not later.any():
        return []
    own = weights.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).log()
    normaliser = (scores.diagonal(dim1=-2, dim2=-1) - own)[..., None]
    level = (weights.clamp(min=1e-300).log() + normaliser).expand_as(weights)
    for how, values in (("set", level[later]), ("add", (level - scores)[later])):
        value = values.mean().item()
        if values.std().item() <= 1e-8 * max(1.0, abs(value)):
            value = snap(value)
            verb = "set to" if how == "set" else "lowered by" if value < 0 else "raised by"
            says = f"masked scores are {verb} {value if how == 'set' else abs(value):.6g}, not set to -inf"
            found.append(row("mask-fill", "att.weights", says, MASK, fill=(how, value)))
    return found


def fitted_activation(experiment: "Experiment", x: torch.Tensor, recorded: torch.Tensor) -> list[Mistake]:
    """GELU with other constants, x · σ(kx), a leaky ReLU, or a multiple of the right activation."""
    x, y = x.double().flatten(), recorded.double().flatten()
    right, remedy = experiment.config.activation_function, activation_remedy(experiment.config)
    found = []

    def add(says: str, kind: Any) -> None:
        found.append(row("wrong-activation", "ff.layers.2.input", says, remedy, activation=kind))

    gate = 2 * y / x - 1
    sound = (gate.abs() < 0.999) & (x.abs() > 1e-2) & gate.isfinite()
    if sound.sum() > 8:
        inner = torch.atanh(gate[sound])
        matrix = torch.stack([x[sound], x[sound] ** 3], -1)
        b, ab = torch.linalg.lstsq(matrix, inner[:, None]).solution[:, 0].tolist()
        if b:
            a = ab / b
            says = (
                f"GELU has other constants: tanh({b:.6g} · (x + {a:.6g} · x³)), not tanh(√(2/π) · (x + 0.044715 · x³))"
            )
            kind = ("tanh gelu", a, b)
            if abs(a) < 1e-9:
                add(f"the activation is x · σ({2 * b:.6g} · x), not {right}", ("sigmoid", 2 * b))
            else:
                add(says, kind)
    negative = x < -1e-3
    if negative.any():
        slope = (y[negative] / x[negative]).median().item()
        add(f"the activation is a leaky ReLU with slope {slope:.6g}, not {right}", ("leaky", slope))
    for base in (right, "gelu", "relu", "silu"):
        z = activate(x, base)
        factor = snap((y @ z / (z @ z)).item()) if (z @ z).item() else 0.0
        if factor and abs(factor - 1) > 1e-7:
            add(f"the activation is {factor:.6g} · {base}(x), not {right}(x)", ("times", factor, base))
    return found


# The stages that show a norm's result.
NORMED = {norm: norm for norm in NORMS} | {
    "att.W_query.input": "norm1",
    "ff.layers.0.input": "norm2",
    f"{LOGITS}.input": "final_norm",
}


def fitted_eps(experiment: "Experiment", forward: Forward, recorded: torch.Tensor, n: int, name: str) -> list[Mistake]:
    owner = name if name == "final_norm" else f"trf_blocks.{n}.{name}"
    x = forward[f"{owner}.input"].double()
    scale, shift = experiment.weights[f"{owner}.scale"], experiment.weights[f"{owner}.shift"]
    normed = (recorded.double() - shift) / scale
    centred = x - x.mean(-1, keepdim=True)
    sound = (normed.abs() > 0.1) & normed.isfinite()
    eps = ((centred / normed).square() - x.var(-1, keepdim=True, unbiased=False))[sound].median().item()
    if not (math.isfinite(eps) and eps > -1e-12):
        return []
    eps = float(f"{max(eps, 0.0):.4g}")
    if eps == experiment.config.layer_norm_epsilon:
        return []
    everywhere, alone = eps_row(experiment.config, eps), eps_row(experiment.config, eps, [name])
    says = f"{alone.says}, in {NORM_SHOWN.get(name, name)} only"
    return [everywhere, Mistake(alone.name, name, says, alone.remedy, alone.changes)]


def fitted_logits(forward: Forward, recorded: torch.Tensor) -> list[Mistake]:
    """Logits that are multiplied by a number, or capped by a tanh."""
    right, got = forward.compute(LOGITS).double(), recorded.double()
    if got.shape != right.shape:
        right = right[:, -got.shape[1] :]
    found = []
    factor = snap(((right * got).sum() / right.square().sum()).item())
    if factor and abs(factor - 1) > 1e-7:
        temperature = f", a temperature of {1 / factor:.6g}" if factor > 0 else ""
        says = f"the logits are multiplied by {factor:.6g}{temperature}"
        found.append(row("scaled-logits", LOGITS, says, LOGITS_REMEDY, logits=("times", factor)))
    x, y = (t.flatten()[right.flatten().argmax()].item() for t in (right, got))
    if 0 < y < x:
        low, high = y * (1 + 1e-12), 1e6 * x
        for _ in range(200):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if middle * math.tanh(x / middle) < y else (low, middle)
        cap = low
        rounded = float(f"{cap:.6g}")
        cap = rounded if abs(rounded - cap) < 1e-6 * cap else cap
        says = f"the logits are capped: {cap:.6g} · tanh(logits / {cap:.6g})"
        found.append(row("capped-logits", LOGITS, says, LOGITS_REMEDY, logits=("cap", cap)))
    return found
