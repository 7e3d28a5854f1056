"""Whose parameters are whose: those of a class of one's own paired with the book's, by name, shape and place."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import LabError
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.weight_map import TABLE, Row

# What a layer of one's own may be called; the whole path inside the block has to fit.
ATTENTION = r"(?:self_?)?(?:att|attn|attention|mha|sa|multi_?head)[^.]*\."
FEED_FORWARD = r"(?:ff|ffn|mlp|feed_?forward)[^.]*\."
ALIASES = {
    "norm1": r"(layer_?)?(norm|ln)_?1|(input|attn?|attention)_(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_att\w*",
    "norm2": r"(layer_?)?(norm|ln)_?2|(post_attention|ffn?|mlp)_(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_(ff|mlp)\w*",
    "att.W_query": ATTENTION + r"(w_?q(uery)?|q(uery)?(_?(proj|linear))?|to_q)",
    "att.W_key": ATTENTION + r"(w_?k(ey)?|k(ey)?(_?(proj|linear))?|to_k)",
    "att.W_value": ATTENTION + r"(w_?v(alue)?|v(alue)?(_?(proj|linear))?|to_v)",
    "att.c_attn": ATTENTION + r"(c_attn|(w_?)?qkv(_?proj)?|in_?proj|query_key_value|to_qkv)",
    "att.out_proj": ATTENTION + r"(out_?proj|[co]_?proj|w_?o(ut)?|proj(ection)?|dense|to_out|out)",
    "ff.layers.0": FEED_FORWARD + r"((layers|net)\.0|0|c_fc|fc_?(1|in)|w_?1|linear_?1|up(_?proj)?)",
    "ff.layers.2": FEED_FORWARD + r"((layers|net)\.2|2|c_proj|fc_?(2|out)|w_?2|linear_?2|down(_?proj)?|proj)",
    "tok_emb": r"(.*\.)?(wte|tok(en)?s?(_?emb\w*)?|embed_tokens|word_emb\w*)",
    "pos_emb": r"(.*\.)?(wpe|pos(ition(al|s)?)?(_?emb\w*)?|embed_positions)",
    "final_norm": r"(.*\.)?(final_?(layer_?)?(norm|ln)|(ln|norm)_?f(inal)?|norm|ln)",
    "out_head": r"(.*\.)?(out_?head|lm_?head|head|output|out|unembed|to_logits)",
}
FUSED = tuple(f"att.{name}" for name in ("W_query", "W_key", "W_value"))
SHIFT_NAMES = ("shift", "bias", "beta", "b", "offset")
# difflib's ratio above which a name that is no alias still counts as alike, and its lead over the next best slot.
ALIKE, LEAD = 0.6, 0.15
# What a model may lack and still be looked at; the lab then finds out what that does.
OPTIONAL = ("pos_emb", "final_norm", "out_head")


@dataclass(frozen=True)
class Match:
    """One parameter of a model and its names here. In `row`, `theirs` is the model's own name."""

    row: Row
    confidence: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.row.theirs,
            "book": list(self.row.ours),
            "layout": self.row.layout,
            "confidence": round(self.confidence, 2),
            "reason": self.reason,
        }


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


# Pairing the parameters of a class of one's own


def shapes(config: GPTScratchConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of weights outside and inside the blocks by module, `[out, in]` as `nn.Linear` has them."""
    width, inner = config.emb_dim, config.n_inner or 4 * config.emb_dim
    outside = {
        "tok_emb": (config.vocab_size, width),
        "pos_emb": (config.context_length, width),
        "final_norm": (width,),
        "out_head": (config.vocab_size, width),
    }
    inside = {
        "norm1": (width,),
        **dict.fromkeys(FUSED, (width, width)),
        "att.c_attn": (3 * width, width),
        "att.out_proj": (width, width),
        "norm2": (width,),
        "ff.layers.0": (inner, width),
        "ff.layers.2": (width, inner),
    }
    return outside, inside


def match_parameters(module: nn.Module, config: GPTScratchConfig, mapping: Mapping[str, str | None]) -> list[Match]:
    """Pairs each parameter of a model of one's own with the book's, by `mapping`, name, shape and order.

    Raises:
        LabError: the pairing is not certain; the message has what is left over on either side.
    """
    own = parameters(module)
    told = mapped(own, config, mapping)
    told |= beside(told, own)
    for match in filter(None, told.values()):
        check_shape(match.row, own, config)
    rest = {name: p for name, p in own.items() if name not in told}
    taken = {ours for match in told.values() if match for ours in match.row.ours}
    unnamed = [n for n in range(config.n_layers) if not any(name.startswith(f"trf_blocks.{n}.") for name in taken)]
    container = ""
    if unnamed or any(re.search(r"\.\d+\.", name) for name in rest):
        container = block_container(rest, config.n_layers)
    outside, inside = shapes(config)
    matches = [match for match in told.values() if match]
    places: list[tuple[str, str, dict[str, tuple[int, ...]]]] = [("", "", outside)]
    places += [(f"{container}{n}.", f"trf_blocks.{n}.", inside) for n in range(config.n_layers)]
    problems = []
    for prefix, ours, slots in places:
        here = {
            name.removeprefix(prefix): p
            for name, p in rest.items()
            if (name.startswith(prefix) if prefix else not (container and name.startswith(container)))
        }
        free = {slot: shape for slot, shape in slots.items() if not any(t.startswith(f"{ours}{slot}.") for t in taken)}
        found, unknown = match_units(here, free, {name: layout_of(module, prefix + name) for name in here})
        for unit, (slot, confidence, reason) in found.items():
            names = FUSED if slot == "att.c_attn" else (slot,)
            for kind, local in units(here)[unit].items():
                which = {"weight": "scale", "bias": "shift"}[kind] if "norm" in slot else kind
                row = Row(prefix + local, tuple(f"{ours}{name}.{which}" for name in names), False, "")
                matches.append(Match(row, confidence, reason))
        problems += [prefix + local for unit in unknown for local in units(here)[unit].values()]
    have = {name for match in matches for name in match.row.ours}
    for _, ours, slots in places:
        for slot in (slot for slot in slots if slot not in (*OPTIONAL, "att.c_attn")):
            if f"{ours}{slot}.{'scale' if 'norm' in slot else 'weight'}" not in have:
                problems.append(f"nothing for {ours}{slot}")
    if problems:
        listed = ", ".join(problems[:8]) + (f" and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise LabError(
            f"the parameters of {type(module).__name__} cannot be paired with GPT-2's without doubt: {listed}; say "
            'what they are by --map FILE, JSON such as {"blocks.{n}.proj.weight": '
            '"trf_blocks.{n}.att.out_proj.weight", "unused.weight": null}'
        )
    targets = [name for match in matches for name in match.row.ours]
    if twice := {name for name in targets if targets.count(name) > 1}:
        raise LabError(f"several parameters are mapped to {', '.join(sorted(twice))}; map each to one name")
    return [with_layout(match, module, own, config, matches) for match in matches]


def mapped(own, config, mapping) -> dict[str, Match | None]:
    """The matches that a map gives, `{n}` being every layer; None for what it says is no parameter of GPT-2's.

    Raises:
        LabError: a name that the model, or the table, does not have.
    """
    known = {name: row for row in TABLE for name in (row.theirs, *row.ours)}
    told: dict[str, Match | None] = {}
    for theirs, target in mapping.items():
        name = (target or "").removesuffix(".T")
        layer = re.search(r"(?<=\bh\.)\d+|(?<=\btrf_blocks\.)\d+", name)
        general = re.sub(r"(?<=\bh\.)\d+|(?<=\btrf_blocks\.)\d+", "{n}", name)
        if target is not None and general not in known:
            raise LabError(f"the map sends {theirs!r} to {target!r}, which is no name of the book's or GPT-2's")
        for n in range(config.n_layers if "{n}" in theirs else 1):
            numbered = theirs.replace("{n}", str(n))
            if numbered not in own:
                raise LabError(f"the map names {numbered!r}, which the model does not have; it has {', '.join(own)}")
            if target is None:
                told[numbered] = None
                continue
            row = known[general]
            turned = target.endswith(".T") or (general == row.theirs and row.transposed)
            ours = row.ours if general == row.theirs else (general,)
            row = Row(numbered, ours, turned and own[numbered].ndim > 1, "").at(int(layer[0]) if layer else n)
            told[numbered] = Match(row, 1.0, "your map")
    return told


def beside(told: Mapping[str, Match | None], own) -> dict[str, Match | None]:
    """The other parameter of each module of which the map tells one: a weight's bias, or a bias's weight."""
    found: dict[str, Match | None] = {}
    for name, match in told.items():
        owner = name.rpartition(".")[0]
        others = [other for other in own if other.rpartition(".")[0] == owner and other != name]
        if match and len(others) == 1 and others[0] not in told:
            kinds = {"weight": "bias", "bias": "weight", "scale": "shift", "shift": "scale"}
            names = [ours.rpartition(".") for ours in match.row.ours]
            scratch = tuple(f"{module}.{kinds[kind]}" for module, _, kind in names)
            found[others[0]] = Match(Row(others[0], scratch, False, ""), 1.0, f"beside {name}")
    return found


def block_container(names, n_layers: int) -> str:
    """The path, dot and all, of the list of blocks: `n_layers` parts numbered from 0 with the same names in each."""
    counts: dict[str, int] = {}
    for name in names:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            counts[name[: number.start()]] = counts.get(name[: number.start()], 0) + 1
    for path in sorted(counts, key=lambda path: (-counts[path], len(path))):
        insides: dict[str, set[str]] = {}
        for name in names:
            if name.startswith(path):
                number, _, inside = name.removeprefix(path).partition(".")
                insides.setdefault(number, set()).add(inside)
        if insides.keys() == {str(n) for n in range(n_layers)} and len(set(map(frozenset, insides.values()))) == 1:
            return path
    raise LabError(
        f"found no list of {n_layers} equal blocks among the parameters ({', '.join(list(names)[:4])}, …); check "
        "n_layers in the cfg, keep the blocks in an nn.ModuleList or nn.Sequential, or name all parameters by --map"
    )


def units(own: Mapping[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """Parameters that belong together, by the path of their module: {path: {"weight": name, "bias": name}}.

    A module with several matrices of its own gives one unit for each.
    """
    together: dict[str, list[str]] = {}
    for name in own:
        together.setdefault(name.rpartition(".")[0], []).append(name)
    result: dict[str, dict[str, str]] = {}
    for path, names in together.items():
        matrices = [name for name in names if own[name].ndim > 1]
        if len(names) > 2 or len(matrices) > 1 or not path:
            result |= {name: {"weight": name} for name in names}
        elif matrices:
            result[path] = {"weight" if own[name].ndim > 1 else "bias": name for name in names}
        else:
            result[path] = {"bias" if n.rpartition(".")[2] in SHIFT_NAMES else "weight": n for n in names}
    return result


def layout_of(module: nn.Module, name: str) -> str | None:
    """How the module that owns a parameter stores its matrix; None if it does not say."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, Conv1D):
        return "[in, out]"
    return "[out, in]" if isinstance(owner, nn.Linear | nn.Embedding) else None


def match_units(own, slots, layouts) -> tuple[dict[str, tuple[str, float, str]], list[str]]:
    """Each unit's slot, confidence and reason; and the units without one."""
    pending = {}
    for unit, kinds in units(own).items():
        name = kinds.get("weight", next(iter(kinds.values())))
        shape, straight, turned = tuple(own[name].shape), layouts[name] != "[in, out]", layouts[name] != "[out, in]"
        pending[unit] = [
            slot for slot in slots if (straight and shape == slots[slot]) or (turned and shape == slots[slot][::-1])
        ]
    found: dict[str, tuple[str, float, str]] = {}

    def take(claims: dict[str, tuple[str, float, str]]) -> None:
        slots_claimed = [slot for slot, _, _ in claims.values()]
        for unit, claim in claims.items():
            if slots_claimed.count(claim[0]) == 1:  # two that claim one slot both stay without
                found[unit] = claim
                del pending[unit]
        gone = {slot for slot, _, _ in found.values()}
        gone |= set(FUSED) if "att.c_attn" in gone else {"att.c_attn"} if gone & set(FUSED) else set()
        for unit in pending:
            pending[unit] = [slot for slot in pending[unit] if slot not in gone]

    def only(unit: str, fits: list[str], confidence: float, reason: str) -> dict[str, tuple[str, float, str]]:
        return {unit: (fits[0], confidence, reason)} if len(fits) == 1 else {}

    claims: dict[str, tuple[str, float, str]] = {}
    for unit, fitting in pending.items():
        named = [slot for slot in fitting if re.fullmatch(ALIASES[slot], unit, re.IGNORECASE)]
        claims |= only(unit, named, 1.0, "name and shape")
    take(claims)
    claims = {}
    for unit, fitting in pending.items():
        ratios = sorted(((alikeness(unit, slot), slot) for slot in fitting), reverse=True)
        if ratios and ratios[0][0] >= ALIKE and ratios[0][0] - (ratios[1][0] if ratios[1:] else 0) >= LEAD:
            claims[unit] = (ratios[0][1], ratios[0][0], "similar name, and shape")
    take(claims)
    claims = {}
    for unit, fitting in pending.items():
        claims |= only(unit, fitting, 0.6, "the only place left for its shape")
    take(claims)
    norms = [unit for unit in pending if pending[unit] and all("norm" in slot for slot in pending[unit])]
    if norms and all(pending[unit] == pending[norms[0]] for unit in norms) and len(norms) == len(pending[norms[0]]):
        take(
            {
                unit: (slot, 0.4, "shape, and order of the norms")
                for unit, slot in zip(norms, pending[norms[0]], strict=True)
            }
        )
    return found, list(pending)


def alikeness(unit: str, slot: str) -> float:
    """difflib's ratio of a path and the nearest of the slot's two names in the table."""
    names = {slot.rpartition(".")[2], slot}
    for row in TABLE:
        if any(f"{slot}." in f"{name}." for name in row.ours):
            names.add(row.theirs.removeprefix("h.{n}.").rpartition(".")[0])
    return max(difflib.SequenceMatcher(None, unit.lower(), name.lower()).ratio() for name in names)


def with_layout(match: Match, module: nn.Module, own, config, matches: list[Match]) -> Match:
    """The match with its matrix's layout: by shape; a square one by its module or the other matrices."""
    shape, straight = tuple(own[match.row.theirs].shape), shape_of(match.row, config)
    if len(shape) < 2:
        return match
    if straight[0] != straight[1]:
        return replace(match, row=replace(match.row, transposed=shape != straight))
    if known := layout_of(module, match.row.theirs):
        transposed, reason = known == "[in, out]", f"{known} as its module has it"
        return replace(match, row=replace(match.row, transposed=transposed), reason=f"{match.reason}; {reason}")
    if match.reason == "your map":
        return match
    inside = [other.row for other in matches if other.row.ours[0].startswith("trf_blocks")]
    bare = [row for row in inside if not layout_of(module, row.theirs)]
    straights = {
        tuple(own[row.theirs].shape) == shape_of(row, config)
        for row in bare
        if own[row.theirs].ndim > 1 and own[row.theirs].shape[0] != own[row.theirs].shape[1]
    }
    if len(straights) != 1:
        name = match.row.ours[0]
        raise LabError(
            f"{match.row.theirs} is square, and nothing tells whether it is stored [out, in], as in nn.Linear, or "
            f'[in, out]; say so by --map FILE: {{"{match.row.theirs}": "{name}"}} or "{name}.T"'
        )
    transposed = not straights.pop()
    reason = f"square: {'[in, out]' if transposed else '[out, in]'} as the other bare matrices"
    return replace(match, row=replace(match.row, transposed=transposed), reason=f"{match.reason}; {reason}")


def check_shape(row: Row, own, config: GPTScratchConfig) -> None:
    shape, straight = tuple(own[row.theirs].shape), shape_of(row, config)
    if shape not in ((straight, straight[::-1]) if len(shape) > 1 else (straight[:1],)):
        raise LabError(
            f"{row.theirs} has shape {shape}, but {' + '.join(row.ours)} is {straight}; build both models with the "
            "same sizes (--cfg), or map it elsewhere"
        )


def shape_of(row: Row, config: GPTScratchConfig) -> tuple[int, ...]:
    outside, inside = shapes(config)
    path = re.sub(r"^trf_blocks\.\d+\.", "", row.ours[0]).rpartition(".")[0]
    return {**outside, **inside}["att.c_attn" if len(row.ours) == 3 else path]
