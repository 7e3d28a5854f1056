"""Pairs the parameters of a class of your own with the book's, by name, shape and order."""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import LabError, few
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.weight_map import TABLE, Row

# What others call the book's layers; the whole path inside the block has to match.
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
# The least difflib ratio of a similar name that is not an alias, and its least lead over the next best slot.
ALIKE, LEAD = 0.6, 0.15
# What a model may lack and still be compared; the diagnosis then shows the effect.
OPTIONAL = ("pos_emb", "final_norm", "out_head")

Shape = tuple[int, ...]
Parameters = Mapping[str, nn.Parameter]
Pending = dict[str, list[str]]  # a unit's module -> the slots that it fits
Claim = tuple[str, float, str]  # slot, confidence, reason


@dataclass(frozen=True)
class Match:
    """One parameter of a model, paired. In `row`, `theirs` is the model's name and `ours` the book's."""

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


# Pairing the parameters of a class of your own


def shapes(config: GPTScratchConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """The weights' shapes outside and inside the blocks by module, `[out, in]` as in `nn.Linear`."""
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


@dataclass(frozen=True)
class Place:
    """One of the blocks, or everything outside them.

    `own` are the model's unpaired parameters there, by name without `prefix`; `slots` are the book's modules with the
    shapes of their weights, by name without `book_prefix`.
    """

    prefix: str
    book_prefix: str
    own: dict[str, nn.Parameter]
    slots: dict[str, Shape]

    def has(self, slot: str, name: str) -> bool:
        """Whether the book's parameter of this name belongs to a slot here."""
        return name.startswith(f"{self.book_prefix}{slot}.")


def match_parameters(module: nn.Module, config: GPTScratchConfig, mapping: Mapping[str, str | None]) -> list[Match]:
    """Pairs each parameter of a model of your own with the book's: by `mapping`, then by name, shape and order.

    Raises:
        LabError: the pairing is ambiguous; the message lists what is left over on either side.
    """
    own = parameters(module)
    given = mapped(own, config, mapping)
    given |= beside(given, own)
    matches = [match for match in given.values() if match]
    for match in matches:
        check_shape(match.row, own, config)
    taken = [name for match in matches for name in match.row.ours]
    places = places_of({name: p for name, p in own.items() if name not in given}, taken, config)
    problems = []
    for place in places:
        found, unmatched = match_place(place, module, taken)
        matches += found
        problems += unmatched
    problems += [f"nothing for {name}" for name in lacking(places, matches)]
    refuse_doubt(type(module).__name__, problems, matches)
    return [with_layout(match, module, own, config, matches) for match in matches]


def refuse_doubt(name: str, problems: list[str], matches: list[Match]) -> None:
    """Raises LabError if something is left over, or two parameters match one of the book's."""
    if problems:
        raise LabError(
            f"the parameters of {name} cannot be paired with GPT-2's unambiguously: {few(problems, 8)}; say "
            'what they are with --map FILE, JSON such as {"blocks.{n}.proj.weight": '
            '"trf_blocks.{n}.att.out_proj.weight", "unused.weight": null}'
        )
    targets = [name for match in matches for name in match.row.ours]
    if twice := {name for name in targets if targets.count(name) > 1}:
        raise LabError(f"several parameters are mapped to {', '.join(sorted(twice))}; map each to one name")


def places_of(rest: Parameters, taken: list[str], config: GPTScratchConfig) -> list[Place]:
    """The places of the unpaired parameters; `taken` are the book's names that have a match."""
    begun = {int(number[1]) for name in taken if (number := re.match(r"trf_blocks\.(\d+)\.", name))}
    numbered = any(re.search(r"\.\d+\.", name) for name in rest)
    # A map may name everything in the blocks; then no list of blocks is needed.
    complete = begun.issuperset(range(config.n_layers)) and not numbered
    container = "" if complete else block_container(rest, config.n_layers)
    in_blocks = [name for name in rest if container and name.startswith(container)]
    outside, inside = shapes(config)
    places = [Place("", "", {name: p for name, p in rest.items() if name not in in_blocks}, outside)]
    for n in range(config.n_layers):
        prefix = f"{container}{n}."
        own = {name.removeprefix(prefix): rest[name] for name in in_blocks if name.startswith(prefix)}
        places.append(Place(prefix, f"trf_blocks.{n}.", own, inside))
    return places


def match_place(place: Place, module: nn.Module, taken: list[str]) -> tuple[list[Match], list[str]]:
    """The matches of a place, and the names of the parameters that match nothing."""
    free = {slot: shape for slot, shape in place.slots.items() if not any(place.has(slot, name) for name in taken)}
    layouts = {name: layout_of(module, place.prefix + name) for name in place.own}
    found, unmatched = match_units(place.own, free, layouts)
    together = units(place.own)
    matches = []
    for unit, (slot, confidence, reason) in found.items():
        for kind, name in together[unit].items():
            layers = FUSED if slot == "att.c_attn" else (slot,)
            ours = tuple(f"{place.book_prefix}{layer}.{kind_of_tensor(slot, kind)}" for layer in layers)
            matches.append(Match(Row(place.prefix + name, ours, False, ""), confidence, reason))
    return matches, [place.prefix + name for unit in unmatched for name in together[unit].values()]


def kind_of_tensor(slot: str, kind: str) -> str:
    """What the book calls a module's "weight" or "bias"."""
    return {"weight": "scale", "bias": "shift"}[kind] if "norm" in slot else kind


def lacking(places: list[Place], matches: list[Match]) -> list[str]:
    """The book's modules whose weight is unmatched, except those that a model may lack."""
    matched = {name for match in matches for name in match.row.ours}
    return [
        place.book_prefix + slot
        for place in places
        for slot in place.slots
        if slot not in (*OPTIONAL, "att.c_attn")
        and f"{place.book_prefix}{slot}.{kind_of_tensor(slot, 'weight')}" not in matched
    ]


def mapped(own: Parameters, config: GPTScratchConfig, mapping: Mapping[str, str | None]) -> dict[str, Match | None]:
    """The matches in a map, `{n}` being every layer; None for a parameter that GPT-2 does not have.

    Raises:
        LabError: a name is not in the model, or not in the weight map.
    """
    given: dict[str, Match | None] = {}
    for theirs, target in mapping.items():
        row, layer = (None, None) if target is None else target_row(theirs, target)
        for n in range(config.n_layers if "{n}" in theirs else 1):
            name = theirs.replace("{n}", str(n))
            if name not in own:
                raise LabError(f"the map names {name!r}, which the model does not have; it has {', '.join(own)}")
            given[name] = None
            if row is not None:
                row_here = replace(row, theirs=name, transposed=row.transposed and own[name].ndim > 1)
                given[name] = Match(row_here.at(n if layer is None else layer), 1.0, "your map")
    return given


def target_row(theirs: str, target: str) -> tuple[Row, int | None]:
    """The row of a map's entry, and the layer number in its target, if any.

    Raises:
        LabError: the target is not in the weight map.
    """
    rows = {name: row for row in TABLE for name in (row.theirs, *row.ours)}
    number = r"(?<=\bh\.)\d+|(?<=\btrf_blocks\.)\d+"
    name = target.removesuffix(".T")
    general, layer = re.sub(number, "{n}", name), re.search(number, name)
    if general not in rows:
        raise LabError(f"the map sends {theirs!r} to {target!r}, which is not a name of the book's or GPT-2's")
    row, turned = rows[general], target.endswith(".T")
    if general == row.theirs:
        row = Row(theirs, row.ours, turned or row.transposed, "")
    else:
        row = Row(theirs, (general,), turned, "")
    return row, int(layer[0]) if layer else None


def beside(given: Mapping[str, Match | None], own: Parameters) -> dict[str, Match | None]:
    """The other parameter of each module of which the map names one: a weight's bias, or a bias's weight."""
    other_kind = {"weight": "bias", "bias": "weight", "scale": "shift", "shift": "scale"}
    found: dict[str, Match | None] = {}
    for name, match in given.items():
        owner = name.rpartition(".")[0]
        others = [other for other in own if other.rpartition(".")[0] == owner and other != name]
        if match and len(others) == 1 and others[0] not in given:
            names = [ours.rpartition(".") for ours in match.row.ours]
            ours = tuple(f"{module}.{other_kind[kind]}" for module, _, kind in names)
            found[others[0]] = Match(Row(others[0], ours, False, ""), 1.0, f"beside {name}")
    return found


def block_container(names: Collection[str], n_layers: int) -> str:
    """The path of the list of blocks with its dot: `n_layers` children numbered from 0, with the same names in each."""
    counts: dict[str, int] = {}
    for name in names:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            counts[name[: number.start()]] = counts.get(name[: number.start()], 0) + 1
    for path in sorted(counts, key=lambda path: (-counts[path], len(path))):
        insides: dict[str, set[str]] = {}
        for name in names:
            if name.startswith(path):
                layer, _, inside = name.removeprefix(path).partition(".")
                insides.setdefault(layer, set()).add(inside)
        if insides.keys() == {str(n) for n in range(n_layers)} and len(set(map(frozenset, insides.values()))) == 1:
            return path
    raise LabError(
        f"there is no list of {n_layers} equal blocks among the parameters ({', '.join(list(names)[:4])}, …); check "
        "n_layers in the cfg, keep the blocks in an nn.ModuleList or nn.Sequential, or name all parameters in --map"
    )


def units(own: Parameters) -> dict[str, dict[str, str]]:
    """Parameters that belong together, by the path of their module: {path: {"weight": name, "bias": name}}.

    A module with several matrices of its own makes one unit for each.
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
    """How the module that owns a parameter stores its matrix; None if its class does not determine it."""
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, Conv1D):
        return "[in, out]"
    return "[out, in]" if isinstance(owner, nn.Linear | nn.Embedding) else None


def match_units(
    own: Parameters, slots: Mapping[str, Shape], layouts: Mapping[str, str | None]
) -> tuple[dict[str, Claim], list[str]]:
    """The slot of each unit, with confidence and reason; and the units without one.

    Each pass claims slots for what the last one left: by name, similar name, elimination, order of the norms.
    """
    pending = {unit: fitting(own, kinds, slots, layouts) for unit, kinds in units(own).items()}
    found: dict[str, Claim] = {}
    for claims in (by_name, by_similar_name, by_elimination, by_order_of_norms):
        settle(claims(pending), pending, found)
    return found, list(pending)


def fitting(
    own: Parameters, kinds: dict[str, str], slots: Mapping[str, Shape], layouts: Mapping[str, str | None]
) -> list[str]:
    """The slots that a unit fits by shape, as it is or transposed, as far as its module allows."""
    name = kinds.get("weight", next(iter(kinds.values())))
    shape, layout = tuple(own[name].shape), layouts[name]
    return [
        slot
        for slot, straight in slots.items()
        if (layout != "[in, out]" and shape == straight) or (layout != "[out, in]" and shape == straight[::-1])
    ]


def settle(claims: dict[str, Claim], pending: Pending, found: dict[str, Claim]) -> None:
    """Accepts each claim to a slot that no other unit claims, and closes these slots to the pending units."""
    claimed = [slot for slot, _, _ in claims.values()]
    for unit, claim in claims.items():
        if claimed.count(claim[0]) == 1:
            found[unit] = claim
            del pending[unit]
    closed = {slot for slot, _, _ in found.values()}
    if "att.c_attn" in closed:
        closed |= set(FUSED)
    elif closed & set(FUSED):
        closed.add("att.c_attn")
    for unit, slots in pending.items():
        pending[unit] = [slot for slot in slots if slot not in closed]


def by_name(pending: Pending) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for unit, slots in pending.items():
        named = [slot for slot in slots if re.fullmatch(ALIASES[slot], unit, re.IGNORECASE)]
        if len(named) == 1:
            claims[unit] = (named[0], 1.0, "name and shape")
    return claims


def by_similar_name(pending: Pending) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for unit, slots in pending.items():
        ratios = sorted(((alikeness(unit, slot), slot) for slot in slots), reverse=True)
        if ratios and ratios[0][0] >= ALIKE and ratios[0][0] - (ratios[1][0] if ratios[1:] else 0) >= LEAD:
            claims[unit] = (ratios[0][1], ratios[0][0], "similar name, and shape")
    return claims


def by_elimination(pending: Pending) -> dict[str, Claim]:
    return {
        unit: (slots[0], 0.6, "the only place left for its shape") for unit, slots in pending.items() if len(slots) == 1
    }


def by_order_of_norms(pending: Pending) -> dict[str, Claim]:
    """Pairs norms with slots in the model's order, if all fit the same slots and there are as many of both."""
    norms = {unit: slots for unit, slots in pending.items() if slots and all("norm" in slot for slot in slots)}
    open_slots = next(iter(norms.values()), [])
    if len(norms) != len(open_slots) or any(slots != open_slots for slots in norms.values()):
        return {}
    return {unit: (slot, 0.4, "shape, and order of the norms") for unit, slot in zip(norms, open_slots, strict=True)}


def alikeness(unit: str, slot: str) -> float:
    """difflib's ratio of a path and the closest of the slot's names in the weight map."""
    names = {slot.rpartition(".")[2], slot}
    for row in TABLE:
        if any(f"{slot}." in f"{name}." for name in row.ours):
            names.add(row.theirs.removeprefix("h.{n}.").rpartition(".")[0])
    return max(difflib.SequenceMatcher(None, unit.lower(), name.lower()).ratio() for name in names)


def with_layout(
    match: Match, module: nn.Module, own: Parameters, config: GPTScratchConfig, matches: list[Match]
) -> Match:
    """The match with its matrix's layout: by its shape or, if square, by its module or the other matrices."""
    shape, straight = own[match.row.theirs].shape, shape_of(match.row, config)
    if len(shape) < 2:
        return match
    if straight[0] != straight[1]:
        return replace(match, row=replace(match.row, transposed=shape != straight))
    if known := layout_of(module, match.row.theirs):
        layout, reason = known, f"{known} as its module has it"
    elif match.reason == "your map":
        return match
    else:
        layout = layout_of_others(match, module, own, config, matches)
        reason = f"square: {layout} as the other bare matrices"
    row = replace(match.row, transposed=layout == "[in, out]")
    return replace(match, row=row, reason=f"{match.reason}; {reason}")


def layout_of_others(
    match: Match, module: nn.Module, own: Parameters, config: GPTScratchConfig, matches: list[Match]
) -> str:
    """The layout of the blocks' rectangular bare matrices, which must have one in common.

    Raises:
        LabError: there are none, or both layouts occur.
    """
    layouts = set()
    for row in (other.row for other in matches):
        shape = own[row.theirs].shape
        bare = row.ours[0].startswith("trf_blocks") and not layout_of(module, row.theirs)
        if bare and len(shape) > 1 and shape[0] != shape[1]:
            layouts.add("[out, in]" if shape == shape_of(row, config) else "[in, out]")
    if len(layouts) != 1:
        theirs, name = match.row.theirs, match.row.ours[0]
        raise LabError(
            f"{theirs} is square, and nothing shows whether it is stored [out, in], as in nn.Linear, or "
            f'[in, out]; say so with --map FILE: {{"{theirs}": "{name}"}} or "{name}.T"'
        )
    return layouts.pop()


def check_shape(row: Row, own: Parameters, config: GPTScratchConfig) -> None:
    shape, straight = tuple(own[row.theirs].shape), shape_of(row, config)
    if shape not in ((straight, straight[::-1]) if len(shape) > 1 else (straight[:1],)):
        raise LabError(
            f"{row.theirs} has shape {shape}, but {' + '.join(row.ours)} is {straight}; build both models with the "
            "same sizes (--cfg), or map it elsewhere"
        )


def shape_of(row: Row, config: GPTScratchConfig) -> Shape:
    outside, inside = shapes(config)
    path = re.sub(r"^trf_blocks\.\d+\.", "", row.ours[0]).rpartition(".")[0]
    return {**outside, **inside}["att.c_attn" if len(row.ours) == 3 else path]
