"""Pairs the parameters of a class of your own with the book's, by name, use, shape and order.

Shapes: E emb_dim, H heads, D = E / H, I n_inner, V vocabulary, C context_length.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from os.path import commonpath
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import LabError, few
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.weight_map import TABLE, Row
from .usage import Use, submodule

# What others call the book's layers; the whole path inside the block has to match.
ATTENTION = r"(?:self_?)?(?:att|attn|attention|mha|sa|multi_?head)[^.]*\."
FEED_FORWARD = r"(?:ff|ffn|mlp|feed_?forward)[^.]*\."
ALIASES = {
    "norm1": r"(layer_?)?(norm|ln)_?1|(input|attn?|attention)_(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_att\w*",
    "norm2": r"(layer_?)?(norm|ln)_?2|(post_attention|ffn?|mlp)_(layer_?)?(norm|ln)|(layer_?)?(norm|ln)_(ff|mlp)\w*",
    "att.W_query": r"(.*\.)?(w_?q(uery)?|q(uery)?(_?(proj|linear))?|to_q)",
    "att.W_key": r"(.*\.)?(w_?k(ey)?|k(ey)?(_?(proj|linear))?|to_k)",
    "att.W_value": r"(.*\.)?(w_?v(alue)?|v(alue)?(_?(proj|linear))?|to_v)",
    "att.c_attn": ATTENTION + r"(c_attn|(w_?)?qkv(_?proj)?|in_?proj|query_key_value|to_qkv)",
    "att.kv": ATTENTION + r"(c_kv|(w_?)?kv(_?proj)?|key_value|to_kv)",
    "att.out_proj": ATTENTION + r"(out_?proj|[co]_?proj|w_?o(ut)?|proj(ection)?|dense|to_out|out)",
    "ff.layers.0": FEED_FORWARD + r"((layers|net)\.0|0|c_fc|fc_?(1|in)|w_?1|linear_?1|up(_?proj)?)",
    "ff.layers.2": FEED_FORWARD + r"((layers|net)\.2|2|c_proj|fc_?(2|out)|w_?2|linear_?2|down(_?proj)?|proj)",
    "tok_emb": r"(.*\.)?(wte|tok(en)?s?(_?emb\w*)?|embed_tokens|word_emb\w*)",
    "pos_emb": r"(.*\.)?(wpe|pos(ition(al|s)?)?(_?emb\w*)?|embed_positions)",
    "final_norm": r"(.*\.)?(final_?(layer_?)?(norm|ln)|(ln|norm)_?f(inal)?|norm|ln)",
    "out_head": r"(.*\.)?(out_?head|lm_?head|head|output|out|unembed|to_logits)",
}
FUSED = tuple(f"att.{name}" for name in ("W_query", "W_key", "W_value"))
# Slots that hold several of the book's matrices.
SEVERAL = {"att.c_attn": FUSED, "att.kv": FUSED[1:]}
ROLES = {"query": FUSED[0], "key": FUSED[1], "value": FUSED[2], "output": "att.out_proj"}
SHIFT_NAMES = ("shift", "bias", "beta", "b", "offset")
WEIGHT_NAMES = ("scale", "weight", "gamma", "gain", "alpha", "g", "w", "a")
# The least difflib ratio of a similar name that is not an alias, and its least lead over the next best slot.
ALIKE, LEAD = 0.6, 0.15
# So many other bare matrices of a block in one layout make a square one that is used otherwise a mistake.
MANY = 3
# The layers without a bias in GPT-2, and what the model must have to be compared at all.
UNBIASED = ("tok_emb", "pos_emb", "out_head")
# What a model may lack even if others of its parameters are left over.
OPTIONAL = ("pos_emb", "final_norm", "out_head")

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Uses = Mapping[str, Use]
Pending = dict[str, list[str]]  # a unit's module -> the slots that it fits
Claim = tuple[str, float, str]  # slot, confidence, reason


@dataclass(frozen=True)
class Folded(Row):
    """A row whose tensor has a shape of its own, such as W_Q [H, E, D].

    `order` are its dimensions, without those of size 1, in the order rows, columns of the book's matrix, of which
    `straight` is the shape; it may have more rows than that.
    """

    shape: Shape = ()
    order: Shape = ()
    straight: Shape = ()

    def to_ours(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = [size for size in tensor.shape if size != 1] or [1]
        whole = tensor.reshape(plain).permute(self.order)
        whole = whole.reshape(-1, *self.straight[1:])[: self.straight[0]]
        return whole.chunk(len(self.ours), dim=0)

    def to_theirs(self, tensors: Any) -> torch.Tensor:
        """The inverse of `to_ours`, with as many rows as are given."""
        whole = torch.cat(list(tensors), dim=0)
        places = [i for i, size in enumerate(self.shape) if size != 1] or [0]
        permuted = [self.shape[places[i]] for i in self.order]
        permuted[0] = whole.numel() // math.prod(permuted[1:])
        sizes = list(self.shape)
        sizes[places[self.order[0]]] = permuted[0]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return whole.reshape(permuted).permute(back).reshape(sizes).contiguous()

    @property
    def layout(self) -> str:
        if self.order in ((0, 1), (0,), (1, 0)):
            return super().layout
        return f"{tuple(self.shape)} as {tuple(self.straight)}"


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


# The weight of which a head has some of the columns; of the others it has rows.
BY_COLUMNS = "att.out_proj.weight"


def joined(tensors: Mapping[str, torch.Tensor], dim: int) -> dict[str, torch.Tensor]:
    """The tensors, those of single heads, "name[0/4]", put together along `dim`, or as columns."""
    whole: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if part := re.fullmatch(r"(.+)\[(\d+)/(\d+)\](.*)", name):
            found = parts.setdefault(part[1] + part[4], {})
            found[int(part[2])] = tensor
            if len(found) == int(part[3]):
                along = 1 if part[1].endswith(BY_COLUMNS) else dim
                whole[part[1] + part[4]] = torch.cat([found[i] for i in range(len(found))], dim=along)
        else:
            whole[name] = tensor
    return whole


def part_of(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The tensor of this name, or of "name[0/4]" the first quarter of its rows, or of its columns."""
    if part := re.fullmatch(r"(.+)\[(\d+)/(\d+)\]", name):
        whole = tensors.get(part[1])
        along = 1 if part[1].endswith(BY_COLUMNS) else 0
        return None if whole is None else whole.chunk(int(part[3]), dim=along)[int(part[2])]
    return tensors.get(name)


# Shapes


@dataclass(frozen=True)
class Slot:
    """The shape of a layer's weight in the book, and the shapes that others give it.

    `rows` and `columns` are the ways to write its two dimensions; a norm's has no columns. `padded` is whether others
    have more rows of it, or, of positions, another number.
    """

    rows: tuple[Shape, ...]
    columns: tuple[Shape, ...] = ((),)
    padded: str = ""

    @property
    def straight(self) -> Shape:
        """The book's shape, [out, in]."""
        return self.rows[0] + self.columns[0]

    def orders(self, shape: Shape, *, exactly: bool = True) -> list[Shape]:
        """The orders of a parameter's dimensions that make it this weight, as `Folded.order`."""
        plain = tuple(size for size in shape if size != 1) or (1,)
        found = []
        for order in permutations(range(len(plain))):
            sizes = tuple(plain[i] for i in order)
            for rows in self.rows:
                first, rest = sizes[: len(rows)], sizes[len(rows) :]
                other = bool(self.padded) and not exactly and (self.padded == "positions" or first >= rows)
                if rest in self.columns and (first == rows or (other and len(first) == 1)):
                    found.append(order)
        return found

    @property
    def bias(self) -> "Slot":
        return Slot(self.rows)


def slots(config: GPTScratchConfig) -> tuple[dict[str, Slot], dict[str, Slot]]:
    """The weights outside and inside the blocks, by the book's module."""
    width, inner, heads = config.emb_dim, config.n_inner or 4 * config.emb_dim, config.n_heads
    per_head = (heads, width // heads) if heads > 1 else (width,)
    across, plain = ((width,), per_head), ((width,),)
    vocabulary = Slot(((config.vocab_size,),), plain, "vocabulary")
    outside = {
        "tok_emb": vocabulary,
        "pos_emb": Slot(((config.context_length,),), plain, "positions"),
        "final_norm": Slot(plain),
        "out_head": vocabulary,
    }
    inside = {
        "norm1": Slot(plain),
        **dict.fromkeys(FUSED, Slot(across, plain)),
        "att.c_attn": Slot(((3 * width,), (3, width), (3, *per_head)), plain),
        "att.kv": Slot(((2 * width,), (2, width), (2, *per_head)), plain),
        "att.out_proj": Slot(plain, across),
        "norm2": Slot(plain),
        "ff.layers.0": Slot(((inner,),), plain),
        "ff.layers.2": Slot(plain, ((inner,),)),
    }
    return outside, inside


# Pairing


@dataclass(frozen=True)
class Place:
    """One of the blocks, or everything outside them.

    `own` are the shapes of the model's unpaired parameters there, by the name inside the block; `names` are their whole
    names, of a layer with a module for each head all of them. `slots` are the book's modules, by name without
    `book_prefix`.
    """

    book_prefix: str
    own: dict[str, Shape]
    names: dict[str, list[str]]
    slots: dict[str, Slot]

    def has(self, slot: str, name: str) -> bool:
        """Whether the book's parameter of this name belongs to a slot here."""
        return name.startswith(f"{self.book_prefix}{slot}.")

    def use(self, name: str, uses: Uses) -> Use | None:
        """The use of a parameter, whose partner is given by its name here too."""
        use = uses.get(self.names[name][0])
        if use is None or use.partner is None:
            return use
        partner = next((short for short, names in self.names.items() if use.partner in names), None)
        return replace(use, partner=partner)


def match_parameters(
    module: nn.Module, config: GPTScratchConfig, mapping: Mapping[str, str | None], uses: Uses | None = None
) -> list[Match]:
    """Pairs each parameter of a model of your own with the book's: by `mapping`, then by name, use, shape and order.

    What is left over although all of GPT-2's has been found is not GPT-2's, and has no match.

    Args:
        uses: what the forward pass does with each parameter.

    Raises:
        LabError: the pairing is ambiguous; the message lists what is left over on either side.
    """
    uses = uses or {}
    own = parameters(module)
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    given = mapped(shapes, config, mapping)
    given |= beside(given, shapes)
    matches = [match for match in given.values() if match]
    for match in matches:
        check_shape(match.row, shapes, config)
    taken = [name for match in matches for name in match.row.ours]
    places = places_of({name: shape for name, shape in shapes.items() if name not in given}, taken, config)
    left = [name for name, match in given.items() if match is None]
    paired = [match_place(place, module, taken, uses) for place in places]
    for place, (found, unmatched) in zip(places, paired, strict=True):
        if unmatched and (like := paired_like(place, places, paired)):
            found, unmatched = like, []
        matches += found
        left += unmatched
    matches = norms_across_blocks(matches, uses, config.n_layers)
    refuse_doubt(type(module).__name__, left, lacking(places, matches), matches)
    return [with_layout(match, module, shapes, config, matches, uses) for match in matches]


def norms_across_blocks(matches: list[Match], uses: Uses, n_layers: int) -> list[Match]:
    """The matches, where the norm outside of the blocks is the first to run, and the first block's come behind its
    attention and its feed-forward network: a block's second norm is then the first of the next block."""
    norms = [f"trf_blocks.{n}.{norm}" for n in range(n_layers) for norm in ("norm1", "norm2")]
    orders = {match.row.ours[0]: uses[match.row.theirs].order for match in matches if match.row.theirs in uses}
    running = sorted((order, name.removesuffix(".scale")) for name, order in orders.items() if name.endswith(".scale"))
    attention = min((order for name, order in orders.items() if name.startswith("trf_blocks.0.att.")), default=math.inf)
    named = {match.row.ours[0] for match in matches if match.reason == "name and shape"}
    outside_first = {name for _, name in running} == {*norms, "final_norm"} and running[0][1] == "final_norm"
    if not outside_first or "final_norm.scale" in named or running[1][0] < attention:
        return matches
    right = dict(zip(["final_norm", *norms], [*norms, "final_norm"], strict=True))
    found = []
    for match in matches:
        owner, _, kind = match.row.ours[0].rpartition(".")
        if owner in right:
            row = replace(match.row, ours=(f"{right[owner]}.{kind}",))
            match = replace(match, row=row, confidence=0.9, reason="order of use across the blocks, and shape")
        found.append(match)
    return found


def refuse_doubt(name: str, left: list[str], lacking: list[str], matches: list[Match]) -> None:
    """Raises LabError if parameters are left over on both sides, or two match one of the book's."""
    if any(re.search(r"\blora\b|lora_[AB]\b", one) for one in left):
        raise LabError(
            f"{name} has adapters, {few(left, 4)}, which are compared when they are merged: `hf-gpt-scratch convert` "
            "merges those of the book's appendix E, model.merge_and_unload() PEFT's"
        )
    if (left and lacking) or "tok_emb" in lacking:
        problems = [*left, *(f"nothing for {slot}" for slot in lacking)]
        raise LabError(
            f"the parameters of {name} cannot be paired with GPT-2's unambiguously: {few(problems, 8)}; say "
            'what they are with --map FILE, JSON such as {"blocks.{n}.proj.weight": '
            '"trf_blocks.{n}.att.out_proj.weight", "unused.weight": null}'
        )
    targets = [name for match in matches for name in match.row.ours]
    if twice := {name for name in targets if targets.count(name) > 1}:
        raise LabError(f"several parameters are mapped to {', '.join(sorted(twice))}; map each to one name")


def places_of(rest: Shapes, taken: list[str], config: GPTScratchConfig) -> list[Place]:
    """The places of the unpaired parameters; `taken` are the book's names that have a match."""
    begun = {int(number[1]) for name in taken if (number := re.match(r"trf_blocks\.(\d+)\.", name))}
    layers = layers_of(rest, config.n_layers)
    # A map may name everything in the blocks; then no list of blocks is needed.
    if not layers and not begun.issuperset(range(config.n_layers)):
        raise LabError(
            f"there is no list of {config.n_layers} equal blocks among the parameters ({', '.join(list(rest)[:4])}, …)"
            "; check n_layers in the cfg, keep the blocks in an nn.ModuleList or nn.Sequential, or name all parameters "
            "in --map"
        )
    outside, inside = slots(config)
    others = {name: shape for name, shape in rest.items() if name not in layers}
    places = [Place("", others, {name: [name] for name in others}, outside)]
    for n in range(config.n_layers):
        own = {short: name for name, (layer, short) in layers.items() if layer == n}
        shapes, names = with_heads_stacked({short: rest[name] for short, name in own.items()}, config)
        whole = {short: [own[part] for part in parts] for short, parts in names.items()}
        places.append(Place(f"trf_blocks.{n}.", shapes, whole, inside))
    return places


def layers_of(shapes: Shapes, n_layers: int) -> dict[str, tuple[int, str]]:
    """The block of each parameter that is in one, and its name there.

    A block is known by a number: the first in a name that has `n_layers` consecutive values, with equal shapes. In a
    list of parameters, `ln1_w.0`, it is the place in the list, not a number in the list's name. In a list of attention,
    feed-forward, attention, … and of all norms, several numbers in a row are one block's; a last one is outside.
    """
    found: dict[str, tuple[int, str, str]] = {}
    shared: dict[str, tuple[int, str, str]] = {}
    for name, shape in shapes.items():
        listed = re.fullmatch(r"((?!\d+\.)[^.]+\.)+\d+", name)
        for number in re.finditer(r"\d+$" if listed else r"\d+", name):
            before, after = name[: number.start()], name[number.end() :]
            whole = f".{before}".endswith(".")
            like = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
            values = sorted(int(m[1]) for other in shapes if shapes[other] == shape and (m := like.fullmatch(other)))
            alone = whole and (after.startswith(".") or listed) and values == [0]
            if not whole and n_layers == 2 and values == [1, 2] and re.match(r"\.[01]\.", after):
                continue  # of two things in each block: `norm1.0`, `norm2.0`
            consecutive = values == list(range(values[0], values[0] + n_layers))
            if consecutive and (n_layers > 1 or alone):
                found[name] = (int(number[0]) - values[0], before, after.lstrip("._"))
                break
            each, more = divmod(len(values), n_layers)
            step = values[1] - values[0] if len(values) == n_layers > 1 else 1
            place = int(number[0]) - values[0]
            if step > 1 and values == list(range(values[0], values[0] + step * n_layers, step)):
                found[name] = (place // step, before, f"{values[0]}{after}")
            elif n_layers > 1 < each and more < 2 and values[-1] - values[0] < len(values) and place < each * n_layers:
                shared[name] = (place // each, before, f"{place % each}{after}")
            if len(values) > 1 and whole:
                break
    found |= shared if found else nested(shapes, n_layers)
    lists = {before for _, before, _ in found.values()}
    single = len(lists) == 1
    return {
        name: (n, after if single else f"{before}{after}".rstrip(".")) for name, (n, before, after) in found.items()
    }


def nested(shapes: Shapes, n_layers: int) -> dict[str, tuple[int, str, str]]:
    """The block of each parameter, as in `layers_of`, where each block is in the one before: `first.next.next.fc`."""
    best: dict[str, tuple[int, str, str]] = {}
    for word in sorted({part for name in shapes for part in name.split(".")}) if n_layers > 1 else ():
        alike: dict[tuple[str, Shape], list[str]] = {}
        for name, shape in shapes.items():
            alike.setdefault((".".join(part for part in name.split(".") if part != word), shape), []).append(name)
        found: dict[str, tuple[int, str, str]] = {}
        for (rest, _), names in alike.items():
            depths = sorted((name.split(".").count(word), name) for name in names)
            if [depth - depths[0][0] for depth, _ in depths] == list(range(n_layers)):
                found |= {name: (n, "", rest) for n, (_, name) in enumerate(depths)}
        best = max(best, found, key=len)
    return best


def with_heads_stacked(
    own: dict[str, Shape], config: GPTScratchConfig
) -> tuple[dict[str, Shape], dict[str, list[str]]]:
    """The parameters of a block, those of one module for each head as one of shape (H, …); and the names of each."""
    heads, size = config.n_heads, config.emb_dim // config.n_heads
    shapes, names = dict(own), {name: [name] for name in own}
    if heads == 1:
        return shapes, names
    for name, shape in own.items():
        if name not in shapes or size not in shape or len(shape) > 2:
            continue
        for number in re.finditer(r"\d+", name):
            before, after = name[: number.start()], name[number.end() :]
            parts = [f"{before}{h}{after}" for h in range(heads)]
            if all(own.get(part) == shape for part in parts) and f"{before}{heads}{after}" not in own:
                for part in parts:
                    del shapes[part], names[part]
                whole = f"{before}{{h}}{after}"
                shapes[whole], names[whole] = (heads, *shape), parts
                break
    return shapes, names


def match_place(place: Place, module: nn.Module, taken: list[str], uses: Uses) -> tuple[list[Match], list[str]]:
    """The matches of a place, and the names of the parameters that match nothing."""
    free = {slot: shape for slot, shape in place.slots.items() if not any(place.has(slot, name) for name in taken)}
    used = {name: use for name in place.own if (use := place.use(name, uses))}
    layouts = {name: layout_of(module, place.names[name][0]) or layout_by_use(used.get(name)) for name in place.own}
    together = units(place.own, used)
    pending = {unit: fitting(place.own, kinds, free, layouts) for unit, kinds in together.items()}
    by_unit = {
        unit: used[name]
        for unit, kinds in together.items()
        if (name := next((kinds[kind] for kind in ("weight", "bias") if kinds.get(kind) in used), None))
    }
    found = settled(pending, by_unit)
    bias_left(place, pending, found, together, used)
    matches = []
    left = [name for unit in pending for kind in together[unit].values() for name in place.names[kind]]
    for unit, (slot, confidence, reason) in found.items():
        for kind, name in together[unit].items():
            wanted = place.slots[slot].bias if kind == "bias" else place.slots[slot]
            if kind == "bias" and (slot in UNBIASED or not wanted.orders(place.own[name])):
                left += place.names[name]
                continue
            layers = in_named_order(unit, SEVERAL.get(slot, (slot,)))
            ours = tuple(f"{place.book_prefix}{layer}.{kind_of_tensor(slot, kind)}" for layer in layers)
            parts = place.names[name]
            for h, theirs in enumerate(parts):
                part = f"[{h}/{len(parts)}]" if len(parts) > 1 else ""
                row = Row(theirs, tuple(our + part for our in ours), False, "")
                matches.append(Match(row, confidence, reason))
    return matches, left


def in_named_order(unit: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    """The layers side by side in a matrix, in the order that its name spells: `kqv`."""
    letters = {layer.removeprefix("att.W_")[0]: layer for layer in layers}
    spelled = [word for word in re.split(r"[^a-z]+", unit.lower()) if len(letters) > 1 and set(word) == set(letters)]
    return tuple(letters[letter] for letter in spelled[-1]) if spelled and len(spelled[-1]) == len(letters) else layers


def bias_left(
    place: Place, pending: Pending, found: dict[str, Claim], together: dict[str, dict[str, str]], used: Uses
) -> None:
    """Gives a bias that is left over to the layer that lacks one, if there is one such bias and one such layer."""
    single = {unit: next(iter(together[unit].values())) for unit in pending if len(together[unit]) == 1}
    alone = {unit: name for unit, name in single.items() if name in used and used[name].kind == "bias"}
    lacking = [
        (unit, slot)
        for unit, (slot, _, _) in found.items()
        if "bias" not in together[unit] and slot not in UNBIASED and "norm" not in slot
    ]
    if len(alone) != 1 or len(lacking) != 1:
        return
    [(extra, name)], [(unit, slot)] = alone.items(), lacking
    if place.slots[slot].bias.orders(place.own[name]) and len(place.names[name]) == 1:
        together[unit] = {**together[unit], "bias": name}
        del pending[extra]


def paired_like(place: Place, places: list[Place], paired: list[tuple[list[Match], list[str]]]) -> list[Match]:
    """The matches of a block that does not run: as those of another block with the same parameters, if there is one."""
    for other, (found, unmatched) in zip(places, paired, strict=True):
        if place.book_prefix and other.book_prefix and other.own == place.own and not unmatched:
            names = [(other.names[short], place.names[short]) for short in place.own]
            theirs = {name: mine for both in names for name, mine in zip(*both, strict=True)}
            found = [
                replace(match, row=replace(match.row, theirs=theirs[match.row.theirs], ours=tuple(
                    place.book_prefix + name.removeprefix(other.book_prefix) for name in match.row.ours
                )), reason="as in the other blocks")
                for match in found
            ]  # fmt: skip
            return found
    return []


def kind_of_tensor(slot: str, kind: str) -> str:
    """What the book calls a module's "weight" or "bias"."""
    return {"weight": "scale", "bias": "shift"}[kind] if "norm" in slot else kind


def lacking(places: list[Place], matches: list[Match]) -> list[str]:
    """The book's modules whose weight is unmatched, except those that a model may always lack."""
    matched = {re.sub(r"\[.*", "", name) for match in matches for name in match.row.ours}
    return [
        place.book_prefix + slot
        for place in places
        for slot in place.slots
        if slot not in (*OPTIONAL, *SEVERAL)
        and f"{place.book_prefix}{slot}.{kind_of_tensor(slot, 'weight')}" not in matched
    ]


def mapped(shapes: Shapes, config: GPTScratchConfig, mapping: Mapping[str, str | None]) -> dict[str, Match | None]:
    """The matches in a map, `{n}` being every layer; None for a parameter that GPT-2 does not have.

    Raises:
        LabError: a name is not in the model, or not in the weight map.
    """
    given: dict[str, Match | None] = {}
    for theirs, target in mapping.items():
        row, layer = (None, None) if target is None else target_row(theirs, target)
        for n in range(config.n_layers if "{n}" in theirs else 1):
            name = theirs.replace("{n}", str(n))
            if name not in shapes:
                raise LabError(f"the map names {name!r}, which the model does not have; it has {', '.join(shapes)}")
            given[name] = None
            if row is not None:
                row_here = replace(row, theirs=name, transposed=row.transposed and len(shapes[name]) > 1)
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


def beside(given: Mapping[str, Match | None], shapes: Shapes) -> dict[str, Match | None]:
    """The other parameter of each module of which the map names one: a weight's bias, or a bias's weight."""
    other_kind = {"weight": "bias", "bias": "weight", "scale": "shift", "shift": "scale"}
    found: dict[str, Match | None] = {}
    for name, match in given.items():
        owner = name.rpartition(".")[0]
        others = [other for other in shapes if other.rpartition(".")[0] == owner and other != name]
        if match and len(others) == 1 and others[0] not in given:
            names = [ours.rpartition(".") for ours in match.row.ours]
            ours = tuple(f"{module}.{other_kind[kind]}" for module, _, kind in names)
            found[others[0]] = Match(Row(others[0], ours, False, ""), 1.0, f"beside {name}")
    return found


def units(own: Shapes, used: Uses) -> dict[str, dict[str, str]]:
    """Parameters that belong together: {module or weight: {"weight": name, "bias": name}}.

    A bias belongs to the weight that is called alike, else to that after which it is added, else to that in its module.
    A module with several matrices of its own makes one unit for each.
    """
    called = {bias: name for name in own if (bias := bias_called_like(name, own))}
    known = {*called, *called.values()}
    pairs = {name: use.partner for name, use in used.items() if use.partner in own and name not in known}
    pairs |= called
    together: dict[str, list[str]] = {}
    for name in own:
        together.setdefault(name.rpartition(".")[0], []).append(name)
    # Two in one module belong together, whatever a mistaken forward pass adds them to.
    pairs = {
        bias: weight
        for bias, weight in pairs.items()
        if weight not in pairs and (weight in (near := together[bias.rpartition(".")[0]]) or len(near) != 2)
    }
    result: dict[str, dict[str, str]] = {}
    for path, names in together.items():
        alone = [name for name in names if name not in pairs and name not in pairs.values()]
        for bias, weight in pairs.items():
            if weight in names:
                whole = path if set(names) == {bias, weight} else weight
                result[whole] = {"weight": weight, "bias": bias}
        matrices = [name for name in alone if len(own[name]) > 1]
        if len(alone) > 2 or len(matrices) > 1 or not path or (alone and len(alone) < len(names)):
            result |= {name: {"weight": name} for name in alone}
        elif matrices:
            result[path] = {"weight" if len(own[name]) > 1 else "bias": name for name in alone}
        elif alone:
            result[path] = {"bias" if n.rpartition(".")[2] in SHIFT_NAMES else "weight": n for n in alone}
    return result


def bias_called_like(weight: str, own: Shapes) -> str | None:
    """The bias beside a weight by its name: `b_Q` of `W_Q`, `ln_1_b` of `ln_1_g`, `bq` of `wq`."""
    path, dot, last = weight.rpartition(".")
    words = re.split("(_)", last)
    names = [
        path + dot + "".join([*words[:i], bias, *words[i + 1 :]])
        for i, word in enumerate(words)
        if word.lower() in WEIGHT_NAMES
        for bias in SHIFT_NAMES
    ]
    if re.fullmatch("[wW][a-zA-Z0-9]{1,2}", last):
        names += [f"{path}{dot}{letter}{last[1:]}" for letter in "bB"]
    shape = own[weight]
    found = [
        name for name in names if name in own and (len(own[name]) < len(shape) or own[name] == shape[-1:] == shape)
    ]
    return found[0] if len(found) == 1 else None


def layout_of(module: nn.Module, name: str) -> str | None:
    """How the module that owns a parameter stores its matrix; None if its class does not determine it."""
    owner = submodule(module, name.rpartition(".")[0])
    if isinstance(owner, Conv1D):
        return "[in, out]"
    return "[out, in]" if isinstance(owner, nn.Linear | nn.Embedding | nn.Conv1d) else None


def layout_by_use(use: Use | None) -> str | None:
    if use is None or use.transposed is None:
        return None
    return "[in, out]" if use.transposed else "[out, in]"


def settled(pending: Pending, used: Uses) -> dict[str, Claim]:
    """The slot of each unit, with confidence and reason; what is left in `pending` has none.

    Each pass claims slots for what the last one left: norms by their names, their modules or their use, then by name,
    use, similar name, elimination, order of the norms.
    """
    passes: list[Callable[[Pending], dict[str, Claim]]] = [
        by_name_of_norms,
        lambda pending: by_module_of_norms(pending, used),
        lambda pending: by_use_of_norms(pending, used),
        by_name,
        lambda pending: by_use(pending, used),
        by_similar_name,
        by_elimination,
        by_order_of_norms,
    ]
    found: dict[str, Claim] = {}
    before = -1
    while len(found) > before:  # what one pass settles leaves fewer places to the one before
        before = len(found)
        for claims in passes:
            settle(claims(pending), pending, found)
    return found


def fitting(
    own: Shapes, kinds: dict[str, str], free: Mapping[str, Slot], layouts: Mapping[str, str | None]
) -> list[str]:
    """The slots that a unit fits by shape, in any layout that its module allows.

    One with other numbers of rows counts only where none fits exactly.
    """
    if "weight" not in kinds:
        return []
    name = kinds["weight"]
    layout = layouts[name] if sum(size != 1 for size in own[name]) == 2 else None
    allowed = {"[out, in]": ((0, 1), (0,)), "[in, out]": ((1, 0),), None: None}[layout]
    for exactly in (True, False):
        fit = [
            slot
            for slot, wanted in free.items()
            if any(allowed is None or order in allowed for order in wanted.orders(own[name], exactly=exactly))
        ]
        if fit:
            return fit
    return []


def settle(claims: dict[str, Claim], pending: Pending, found: dict[str, Claim]) -> None:
    """Accepts each claim to a slot that no other unit claims, and closes these slots to the pending units."""
    claimed = [slot for slot, _, _ in claims.values()]
    for unit, claim in claims.items():
        if claimed.count(claim[0]) == 1:
            found[unit] = claim
            del pending[unit]
    closed = {slot for slot, _, _ in found.values()}
    filled = {layer for slot in closed for layer in SEVERAL.get(slot, (slot,))}
    closed |= filled | {slot for slot, layers in SEVERAL.items() if filled & set(layers)}
    for unit, slots in pending.items():
        pending[unit] = [slot for slot in slots if slot not in closed]


def plain(unit: str) -> str:
    """A unit's name without the place of a head or the word for a weight: `sa.q` of `sa.q.{h}`, `ln1` of `ln1_g`."""
    return re.sub(rf"\.{{h}}$|_({'|'.join(WEIGHT_NAMES)})$", "", unit)


def by_name(pending: Pending) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for unit, slots in pending.items():
        named = [slot for slot in slots if re.fullmatch(ALIASES[slot], plain(unit), re.IGNORECASE)]
        if len(named) == 1:
            claims[unit] = (named[0], 1.0, "name and shape")
    return claims


def by_name_of_norms(pending: Pending) -> dict[str, Claim]:
    """A block's two norms, if both are named for their places or are called alike but for 1 and 2."""
    norms = [unit for unit, slots in pending.items() if slots == ["norm1", "norm2"]]
    named = {
        slot: [unit for unit in norms if re.fullmatch(ALIASES[slot], plain(unit), re.IGNORECASE)]
        for slot in ("norm1", "norm2")
    }
    if len(norms) == 2 and not (named["norm1"] and named["norm2"]):
        first, second = sorted(norms)
        places = [i for i, pair in enumerate(zip(first, second, strict=False)) if pair == ("1", "2")]
        alike = len(places) == 1 and first[: places[0]] + "2" + first[places[0] + 1 :] == second
        named = {"norm1": [first], "norm2": [second]} if alike else named
    claims = {units[0]: (slot, 1.0, "name and shape") for slot, units in named.items() if len(units) == 1}
    return claims if len(norms) == len(claims) == 2 else {}


def by_module_of_norms(pending: Pending, used: Uses) -> dict[str, Claim]:
    """A block's two norms, if one is in a module with the attention, and the other with the feed-forward network."""
    attention = [unit for unit, use in used.items() if use.roles]
    feed_forward = [unit for unit, use in used.items() if use.kind == "matrix" and not use.roles]

    def nearness(unit: str, others: list[str]) -> int:
        """The length of the longest path that a unit has in common with another."""
        paths = [[name.replace(".", "/") for name in (unit, other)] for other in others]
        return max((len(commonpath(both)) for both in paths), default=0)

    claims: dict[str, Claim] = {}
    for unit in (unit for unit, slots in pending.items() if slots == ["norm1", "norm2"]):
        near = nearness(unit, attention) - nearness(unit, feed_forward)
        if near:
            owner = "attention" if near > 0 else "feed-forward"
            claims[unit] = ("norm1" if near > 0 else "norm2", 0.95, f"in a module with {owner}, and shape")
    return claims if len({slot for slot, _, _ in claims.values()}) == len(claims) == 2 else {}


def by_use_of_norms(pending: Pending, used: Uses) -> dict[str, Claim]:
    """Norms in the order in which they run, whatever they are called, if as many run as there are slots."""
    norms = {unit: slots for unit, slots in pending.items() if slots and all("norm" in slot for slot in slots)}
    running = sorted((used[unit].order, unit) for unit in norms if unit in used)
    open_slots = next(iter(norms.values()), [])
    first_matrix = min((use.order for use in used.values() if use.kind == "matrix"), default=math.inf)
    if len(running) == 1 and len(open_slots) == 2 and running[0][0] < first_matrix:
        open_slots = open_slots[:1]  # the other does not run; this one may run twice
    if len(running) != len(open_slots):
        return {}
    return {unit: (slot, 0.9, "order of use, and shape") for (_, unit), slot in zip(running, open_slots, strict=True)}


def by_use(pending: Pending, used: Uses) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for unit, slots in pending.items():
        use = used.get(unit)
        if use is None:
            continue
        if use.role:
            wanted = ROLES[use.role]
        elif use.roles:
            wanted = "att.c_attn" if "query" in use.roles else "att.kv"
        else:
            wanted = {"lookup": "tok_emb", "position": "pos_emb", "matrix": "out_head"}.get(use.kind, "")
        if wanted in slots:
            claims[unit] = (wanted, 0.95, f"use as {use.role or use.kind}, and shape")
    return claims


def by_similar_name(pending: Pending) -> dict[str, Claim]:
    claims: dict[str, Claim] = {}
    for unit, slots in pending.items():
        if all("norm" in slot for slot in slots):  # of which only the order is known
            continue
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
    match: Match, module: nn.Module, shapes: Shapes, config: GPTScratchConfig, matches: list[Match], uses: Uses
) -> Match:
    """The match with its tensor's layout: by its shape or, if square, by its module, its use or the other matrices."""
    row, shape, slot = match.row, shapes[match.row.theirs], slot_of(match.row, config)
    orders = slot.orders(shape) or slot.orders(shape, exactly=False)
    straight = slot.straight
    if part := re.search(r"/(\d+)\]$", row.ours[0]):  # of one head
        parts = int(part[1])
        by_columns = BY_COLUMNS in row.ours[0]
        straight = (straight[0], straight[1] // parts) if by_columns else (straight[0] // parts, *straight[1:])
        orders = Slot((straight[:1],), (straight[1:],)).orders(shape)
    reason = match.reason
    order = orders[0]
    if {(0, 1), (1, 0)} <= set(orders):
        known = layout_of(module, row.theirs)
        use = uses.get(row.theirs)
        if known:
            reason = f"{reason}; {known} as its module has it"
        elif match.reason == "your map":
            known = "[in, out]" if row.transposed else "[out, in]"
        elif "emb" in row.ours[0]:
            known = "[out, in]"
        elif use is not None and use.transposed is not None:
            known = "[in, out]" if use.transposed else "[out, in]"
            block = ".".join([*row.ours[0].split(".")[:2], ""])
            beside_it = layouts_of(match, module, shapes, config, matches, uses, block)
            if len(beside_it) >= MANY and set(beside_it) == {"[out, in]", "[in, out]"} - {known}:
                known = beside_it[0]
                reason = (
                    f"{reason}; square: {known} as the block's other bare matrices, though it is multiplied otherwise"
                )
            else:
                reason = f"{reason}; square: {known} as it is multiplied"
        else:
            layouts = set(layouts_of(match, module, shapes, config, matches, {}))
            if len(layouts) != 1:
                raise LabError(
                    f"{row.theirs} is square, and nothing shows whether it is stored [out, in], as in nn.Linear, or "
                    f'[in, out]; say so with --map FILE: {{"{row.theirs}": "{row.ours[0]}"}} or "{row.ours[0]}.T"'
                )
            known = layouts.pop()
            reason = f"{reason}; square: {known} as the other bare matrices"
        order = (1, 0) if known == "[in, out]" else (0, 1)
    folded = Folded(row.theirs, row.ours, order == (1, 0), row.meaning, shape, order, straight)
    return replace(match, row=folded, reason=reason)


def layouts_of(
    match: Match,
    module: nn.Module,
    shapes: Shapes,
    config: GPTScratchConfig,
    matches: list[Match],
    uses: Uses,
    block="",
) -> list[str]:
    """The layouts of the other bare matrices in a match's block, or in all: by shape, of square ones by use."""
    found = []
    for row in (other.row for other in matches if other is not match and other.row.ours[0].startswith(block)):
        shape, use = shapes[row.theirs], uses.get(row.theirs)
        if len(shape) != 2 or layout_of(module, row.theirs) or not row.ours[0].startswith("trf_blocks"):
            continue
        if shape[0] != shape[1]:
            found.append("[out, in]" if shape == slot_of(row, config).straight else "[in, out]")
        elif layout := layout_by_use(use):
            found.append(layout)
    return found


def check_shape(row: Row, shapes: Shapes, config: GPTScratchConfig) -> None:
    shape, slot = shapes[row.theirs], slot_of(row, config)
    if not (slot.orders(shape) or slot.orders(shape, exactly=False)):
        raise LabError(
            f"{row.theirs} has shape {shape}, but {' + '.join(row.ours)} is {slot.straight}; build both models with "
            "the same sizes (--cfg), or map it elsewhere"
        )


def slot_of(row: Row, config: GPTScratchConfig) -> Slot:
    """The shape of a row's tensor in the book."""
    outside, inside = slots(config)
    path, _, kind = re.sub(r"^trf_blocks\.\d+\.", "", row.ours[0]).rpartition(".")
    slot = {**outside, **inside}[{3: "att.c_attn", 2: "att.kv"}.get(len(row.ours), path)]
    return slot.bias if kind.startswith(("bias", "shift")) else slot
