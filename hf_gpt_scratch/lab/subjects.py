"""Models for the parity lab: official, ours or a class of your own, each with its parameters in the book's names.

Shapes: E emb_dim, I n_inner, V vocabulary, C context_length.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..errors import ConversionError, LabError
from ..model.configuration_gpt_scratch import TO_GPT2, GPTScratchConfig
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel, GPTScratchPreTrainedModel
from ..model.weight_map import BASE, GPT2_PREFIX, HEADS, SCRATCH_PREFIX, TABLE, Row, rows
from ..weights.architecture import architecture, kind_of
from ..weights.checkpoint import check_files, read_json, read_pickle, refuse_no_file
from ..weights.conversion import Weights, find_source
from ..weights.lazy import Lazy, to_scratch
from ..weights.torch_archive import Stored

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
SIZES = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers")
# What a model may lack and still be looked at; the lab then finds out what that does.
OPTIONAL = ("pos_emb", "final_norm", "out_head")


@dataclass(frozen=True)
class Match:
    """One parameter of a model and its names here. In `row`, `gpt2` is the model's own name, whatever that is."""

    row: Row
    confidence: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.row.gpt2,
            "book": list(self.row.scratch),
            "layout": self.row.layout,
            "confidence": round(self.confidence, 2),
            "reason": self.reason,
        }


@dataclass
class Subject:
    """A model and what is known of it.

    `config` is None where only the model's own code knows it; `guessed` says whether `matches` were guessed. `kind` is
    our class of such a model: a class of one's own is a language model. `tensors` are those in a checkpoint's files, by
    the book's names, in the files' dtype.
    """

    name: str
    module: nn.Module
    matches: list[Match]
    config: GPTScratchConfig | None = None
    guessed: bool = False
    notes: list[str] = field(default_factory=list)
    tokenizer: PreTrainedTokenizerBase | None = None
    kind: type[GPTScratchPreTrainedModel] = GPTScratchForCausalLM
    tensors: Mapping[str, Lazy] | None = None

    @property
    def is_language_model(self) -> bool:
        return self.kind is GPTScratchForCausalLM

    def in_book_names(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors under this model's names, parameters or their gradients, as the book has them; views."""
        ours: dict[str, torch.Tensor] = {}
        for match in self.matches:
            if match.row.gpt2 in tensors:
                ours.update(zip(match.row.scratch, match.row.to_scratch(tensors[match.row.gpt2]), strict=True))
        return ours

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters in the book's names and layout; a tied head is there under both names."""
        return self.in_book_names({name: p.detach() for name, p in parameters(self.module).items()})


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return dict(module.named_parameters(remove_duplicate=False))


def subject(module: nn.Module, config: GPTScratchConfig | None = None, name: str = "", mapping=None) -> Subject:
    """A model in memory, as it is: mode and weights stay as they are.

    Args:
        config: sizes of the model, for a class of your own; official ones and ours know theirs.
        mapping: your names -> the book's or GPT-2's, where the guess is wrong.

    Raises:
        LabError: the parameters cannot be paired with certainty; the message names them.
    """
    name = name or type(module).__name__
    kind = kind_of(module)
    if kind is not None:
        matches, config = known_matches(module, kind)
        if not mapping and {match.row.gpt2 for match in matches} == parameters(module).keys():
            return Subject(name, module, matches, config, kind=kind)
    if config is None:
        raise LabError(f"the sizes of {name} are not known; give its cfg")
    matches = match_parameters(module, config, mapping or {})
    return Subject(name, module, matches, config, guessed=True, kind=kind or GPTScratchForCausalLM)


def known_matches(module: Any, kind: type[GPTScratchPreTrainedModel]) -> tuple[list[Match], GPTScratchConfig]:
    """The parameters with the names that an official model, or one of ours, of this kind has; and the config."""
    official = isinstance(module, kind.gpt2_class)
    config = GPTScratchConfig.from_gpt2(module.config) if official else module.config
    prefix = "" if kind is GPTScratchModel else GPT2_PREFIX if official else SCRATCH_PREFIX
    own, matches = parameters(module), []
    for where, part in ((prefix, BASE), ("", HEADS)):
        table = part if official else [Row(ours, (ours,), False, row.meaning) for row in part for ours in row.scratch]
        for row in rows(config.n_layers, table):
            if where + row.gpt2 in own:
                matches.append(Match(replace(row, gpt2=where + row.gpt2), 1.0, "weight map"))
    return matches, config


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
    taken = {ours for match in told.values() if match for ours in match.row.scratch}
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
    have = {name for match in matches for name in match.row.scratch}
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
    targets = [name for match in matches for name in match.row.scratch]
    if twice := {name for name in targets if targets.count(name) > 1}:
        raise LabError(f"several parameters are mapped to {', '.join(sorted(twice))}; map each to one name")
    return [with_layout(match, module, own, config, matches) for match in matches]


def mapped(own, config, mapping) -> dict[str, Match | None]:
    """The matches that a map gives, `{n}` being every layer; None for what it says is no parameter of GPT-2's.

    Raises:
        LabError: a name that the model, or the table, does not have.
    """
    known = {name: row for row in TABLE for name in (row.gpt2, *row.scratch)}
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
            turned = target.endswith(".T") or (general == row.gpt2 and row.transposed)
            ours = row.scratch if general == row.gpt2 else (general,)
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
            names = [ours.rpartition(".") for ours in match.row.scratch]
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
        if any(f"{slot}." in f"{name}." for name in row.scratch):
            names.add(row.gpt2.removeprefix("h.{n}.").rpartition(".")[0])
    return max(difflib.SequenceMatcher(None, unit.lower(), name.lower()).ratio() for name in names)


def with_layout(match: Match, module: nn.Module, own, config, matches: list[Match]) -> Match:
    """The match with its matrix's layout: by shape; a square one by its module or the other matrices."""
    shape, straight = tuple(own[match.row.gpt2].shape), shape_of(match.row, config)
    if len(shape) < 2:
        return match
    if straight[0] != straight[1]:
        return replace(match, row=replace(match.row, transposed=shape != straight))
    if known := layout_of(module, match.row.gpt2):
        transposed, reason = known == "[in, out]", f"{known} as its module has it"
        return replace(match, row=replace(match.row, transposed=transposed), reason=f"{match.reason}; {reason}")
    if match.reason == "your map":
        return match
    inside = [other.row for other in matches if other.row.scratch[0].startswith("trf_blocks")]
    bare = [row for row in inside if not layout_of(module, row.gpt2)]
    straights = {
        tuple(own[row.gpt2].shape) == shape_of(row, config)
        for row in bare
        if own[row.gpt2].ndim > 1 and own[row.gpt2].shape[0] != own[row.gpt2].shape[1]
    }
    if len(straights) != 1:
        name = match.row.scratch[0]
        raise LabError(
            f"{match.row.gpt2} is square, and nothing tells whether it is stored [out, in], as in nn.Linear, or "
            f'[in, out]; say so by --map FILE: {{"{match.row.gpt2}": "{name}"}} or "{name}.T"'
        )
    transposed = not straights.pop()
    reason = f"square: {'[in, out]' if transposed else '[out, in]'} as the other bare matrices"
    return replace(match, row=replace(match.row, transposed=transposed), reason=f"{match.reason}; {reason}")


def check_shape(row: Row, own, config: GPTScratchConfig) -> None:
    shape, straight = tuple(own[row.gpt2].shape), shape_of(row, config)
    if shape not in ((straight, straight[::-1]) if len(shape) > 1 else (straight[:1],)):
        raise LabError(
            f"{row.gpt2} has shape {shape}, but {' + '.join(row.scratch)} is {straight}; build both models with the "
            "same sizes (--cfg), or map it elsewhere"
        )


def shape_of(row: Row, config: GPTScratchConfig) -> tuple[int, ...]:
    outside, inside = shapes(config)
    path = re.sub(r"^trf_blocks\.\d+\.", "", row.scratch[0]).rpartition(".")[0]
    return {**outside, **inside}["att.c_attn" if len(row.scratch) == 3 else path]


# Loading


class Settings(dict):
    """A config that is read as the book reads it, `cfg["emb_dim"]`, or as nanoGPT does, `config.n_embd`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the cfg has no {name!r}; give it by --cfg") from None


def book_settings(config: GPTScratchConfig) -> Settings:
    """The config under the book's names, GPT-2's and nanoGPT's."""
    values = {name: getattr(config, name) for name in SIZES}
    theirs = {TO_GPT2.get(name, name): value for name, value in values.items()}
    others = {"block_size": config.context_length, "dropout": config.drop_rate, "bias": True}
    return Settings(values | theirs | others, drop_rate=config.drop_rate, qkv_bias=config.qkv_bias)


def names_a_class(source: str) -> bool:
    """Whether a source is `file.py:Name` or `package.module:Name`, which no hub id can be."""
    return bool(re.fullmatch(r".+:\w+", source))


def load(
    source: str,
    *,
    weights: Path | None = None,
    cfg: str | None = None,
    mapping: Mapping[str, str | None] | None = None,
    like: Subject | None = None,
) -> Subject:
    """A model to compare, in float32 and evaluation mode.

    Args:
        source: directory or hub id of an official checkpoint or ours, or `file.py:Name` of a class, a function that
            makes a model, or a model. That file is run.
        weights: state dict for a class, `.pth` or `.safetensors`.
        cfg: for a class: JSON, a JSON file, or the name of a dict in its file. Default: the sizes of `like`.
        mapping: your parameter names -> the book's or GPT-2's, where the guess is wrong.
        like: the other model; a class without `weights` gets its weights.

    Raises:
        LabError: it cannot be had, or its parameters cannot be paired.
    """
    if names_a_class(source):
        file, _, attribute = source.rpartition(":")
        return load_class(source, file, attribute, weights, cfg, mapping or {}, like)
    if weights or cfg or mapping:
        raise LabError(f"weights, cfg and map are for a class of your own, file.py:Name, but this is {source!r}")
    if source.endswith(".py"):
        raise LabError(f"got {source}, but a file can hold many models; name the one that is meant, {source}:Name")
    if Path(source).is_file():
        raise LabError(
            f"got the file {source}, but a model is a directory or a class; give the directory it lies in, or the "
            f"class with these weights, file.py:Name and --weights {source}"
        )
    try:
        return load_checkpoint(find_source(source), source)
    except (ConversionError, OSError, SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        # A config.json can hold anything, and transformers fails of it in as many ways.
        raise LabError(f"cannot load {source}: {error}") from error
    except StrictDataclassError as error:
        raise LabError(f"the config of {source} is not usable: {error}") from error


def load_checkpoint(directory: Path, name: str) -> Subject:
    """A directory's model, of the class that its config names."""
    path = directory / "config.json"
    found = read_json(path) if path.is_file() else None
    values = found if isinstance(found, dict) else {}
    model_type = values.get("model_type")
    if model_type not in ("gpt2", "gpt_scratch"):
        what = f"holds a model of type {model_type!r}" if path.is_file() else "has no config.json"
        raise LabError(f"{name} {what}; the lab compares checkpoints of gpt2 and gpt_scratch, and my.py:MyModel")
    quantized = "quantization_config" in values
    weights = None if quantized else Weights(directory, model_type)
    if quantized:
        check_pickles(directory)
    kind = weights.ours if weights else architecture(values, directory)
    model_class: Any = kind.gpt2_class if model_type == "gpt2" else kind
    model, info = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    check_loaded(info, name)
    model.config.return_dict = True
    result = subject(model.eval(), name=name)
    if weights:
        result.tensors = raw_tensors(weights)
    else:
        result.notes.append(f"{name} is quantized, so its weights are not compared bit for bit")
    return result


def check_pickles(directory: Path) -> None:
    """Looks through pickles of weights that are not read here, before transformers does.

    Raises:
        ConversionError: one is damaged, or is a pickle of more than weights.
    """
    check_files(directory)
    for path in sorted(directory.glob("*.bin")):
        read_pickle(path)


def raw_tensors(weights: Weights) -> dict[str, Lazy]:
    """A checkpoint's tensors by the book's names; NaN is not refused here, but looked for."""
    specs = {name: (there, weights.checkpoint.specs[there]) for name, there in weights.names.items()}
    tensors = {
        name: Lazy(spec.shape, spec.dtype, functools.partial(spec.file.read, there))
        for name, (there, spec) in specs.items()
    }
    return to_scratch(tensors, rows(weights.config.num_hidden_layers)) if weights.model_type == "gpt2" else tensors


def check_loaded(info: Mapping[str, Any], source: str) -> None:
    """Raises LabError unless a model got all its weights from a checkpoint, and left none behind."""
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, info[f"{what}_keys"])):
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise LabError(
                f"{source} does not fit its class: {what} {', '.join(names[:5])}{more}; download or save it again"
            )


def load_class(source, file, attribute, weights, cfg, mapping, like) -> Subject:
    module = import_file(file)
    made = getattr(module, attribute, None)
    if made is None:
        public = [
            name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)
        ]
        raise LabError(f"{file} has no {attribute!r}; its models are {', '.join(public) or 'none'}")
    if isinstance(made, type) and issubclass(made, PreTrainedModel):
        return load_own_checkpoint(source, made, weights, cfg, mapping)
    if weights is not None and weights.is_dir():
        raise LabError(
            f"weights {weights} is a directory, which only Transformers classes have; give {source}'s model.pth or "
            ".safetensors"
        )
    notes = []
    settings = read_cfg(cfg, module)
    if settings is None and like is not None and like.config is not None:
        settings = book_settings(like.config)
        if not isinstance(made, nn.Module):
            shown = {name: settings[name] for name in SIZES}
            notes.append(f"cfg: none given, so the other model's: {json.dumps(shown)}, qkv_bias {settings.qkv_bias}")
    if settings is None:
        raise LabError(f"{source} needs a cfg: JSON, a JSON file, or the name of a dict in {file}")
    config = sizes(settings, source)
    model = made if isinstance(made, nn.Module) else build(made, settings, source)
    result = subject(model, config, source, mapping)
    if result.guessed:
        result.config = config if cfg is not None else None
    result.notes = notes
    if weights is not None:
        model.load_state_dict(read_weights(weights, model))
        notes.append(f"weights: {weights}")
    elif not isinstance(made, nn.Module):
        if like is None:
            raise LabError(f"{source} is a class; give its --weights")
        copy_weights(like, result)
        notes.append("weights: none given, so the other model's, through the mapping")
    if not isinstance(made, nn.Module):
        model.float().eval()
    return result


def load_own_checkpoint(source, made: Any, weights: Path | None, cfg, mapping) -> Subject:
    """A Transformers class of one's own, from the directory that its `save_pretrained` wrote."""
    if weights is None or not weights.is_dir() or cfg is not None:
        raise LabError(
            f"{source} is a Transformers class: it is loaded by its from_pretrained; give the directory that its "
            "save_pretrained wrote by --weights, and no --cfg"
        )
    try:
        model, info = made.from_pretrained(weights, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever the user's class raises
        raise LabError(f"{source} cannot be loaded from {weights}: {type(error).__name__}: {error}") from error
    check_loaded(info, str(weights))
    result = subject(model.eval(), name=source, mapping=mapping)
    result.notes.append(f"weights: {weights}")
    return result


def import_file(file: str) -> ModuleType:
    """Runs a Python file, or imports a module by its dotted name."""
    path = Path(file).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(file)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise LabError(f"there is no file {file}; check the path")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent.resolve()))  # its own imports
        try:
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
        finally:
            sys.path.pop(0)
        return module
    except LabError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file raises
        raise LabError(f"{file} does not run: {type(error).__name__}: {error}") from error


def read_cfg(cfg: str | None, module: ModuleType) -> Settings | None:
    if cfg is None:
        return None
    if isinstance(named := getattr(module, cfg, None), dict):
        return Settings(named)
    if cfg.endswith(".json") and not Path(cfg).is_file():
        raise LabError(f"there is no file {cfg}; check the path")
    try:
        values = json.loads(Path(cfg).read_text(encoding="utf-8") if not cfg.lstrip().startswith("{") else cfg)
        return Settings(**values)
    except (OSError, ValueError, TypeError) as error:
        raise LabError(
            f"got cfg {cfg!r}, which is neither JSON, nor a JSON file, nor a dict of yours ({error})"
        ) from error


def build(make: Callable[..., nn.Module], settings: Settings, source: str) -> nn.Module:
    """The model: `make(cfg)` if it takes one thing that is no setting, else by the settings that it names."""
    if not callable(make):
        raise LabError(f"{source} is a {type(make).__name__}; name a model, a class or a function that makes one")
    accepted = inspect.signature(make).parameters
    required = [p.name for p in accepted.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    try:
        if len(required) == 1 and required[0] not in settings:
            model = make(settings)
        else:
            model = make(**{name: settings[name] for name in accepted if name in settings})
    except Exception as error:  # whatever the class raises
        raise LabError(f"{source} cannot be built: {type(error).__name__}: {error}; see --cfg") from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{source} gives a {type(model).__name__}, but a torch.nn.Module is wanted")
    return model


def sizes(settings: Settings, source: str) -> GPTScratchConfig:
    """The sizes in a cfg, in the book's names or GPT-2's."""
    aliases = {"context_length": "block_size", "drop_rate": "dropout"}
    values: dict[str, Any] = {}
    for name in (*SIZES, "drop_rate", "n_inner", "qkv_bias"):
        for known in (name, TO_GPT2.get(name), aliases.get(name)):
            if known in settings:
                values.setdefault(name, settings[known])
    missing = set(SIZES) - values.keys()
    if missing:
        raise LabError(f"the cfg of {source} lacks {', '.join(sorted(missing))}, in the book's names or GPT-2's")
    try:
        return GPTScratchConfig(bos_token_id=None, eos_token_id=None, **values)
    except StrictDataclassError as error:
        raise LabError(f"the cfg of {source} is not usable: {error}") from error


def read_weights(file: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict that fits the model; one inside a training checkpoint is found there.

    Raises:
        LabError: it cannot be read, or does not fit; the message names the tensors.
    """
    if not file.exists():
        raise LabError(f"there is no file {file} to read weights from; check the path")
    try:
        refuse_no_file(file)
        values: Any = load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
        if not isinstance(values, Mapping):
            raise TypeError(f"it holds a {type(values).__name__}, and no state dict; save model.state_dict()")
        for key in ("model_state_dict", "state_dict", "model"):
            if isinstance(values.get(key), Mapping):
                values = values[key]
        values = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in values.items()}  # of torch.compile
        others = [name for name, tensor in values.items() if not isinstance(tensor, torch.Tensor | Stored)]
        if others:
            raise TypeError(f"{others[0]!r} is no tensor, but a state dict has nothing else; save model.state_dict()")
        values = {name: tensor.read() if isinstance(tensor, Stored) else tensor for name, tensor in values.items()}
    except ConversionError as error:
        raise LabError(f"cannot read weights: {error}") from error
    except Exception as error:  # OSError, SafetensorError, …: whatever a broken file leads to
        raise LabError(f"cannot read weights from {file}: {type(error).__name__}: {error}") from error
    own = model.state_dict()
    persistent = {name for name in own if name in parameters(model)}
    wrong = [f"missing {name}" for name in persistent - values.keys()]
    wrong += [f"unexpected {name}" for name in values.keys() - own.keys() if not name.endswith(("mask", "attn.bias"))]
    wrong += [
        f"{name}: {tuple(values[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & values.keys()
        if values[name].shape != own[name].shape
    ]
    if wrong:
        raise LabError(f"{file} does not fit the model: {'; '.join(sorted(wrong)[:6])}; check --cfg and --weights")
    return {name: values.get(name, tensor) for name, tensor in own.items()}


@torch.no_grad()
def copy_weights(source: Subject, target: Subject) -> None:
    """The source's weights into the target, by both mappings; biases that the source lacks are zeros there."""
    ours, own = source.weights(), parameters(target.module)
    for match in target.matches:
        tensors = [ours.get(name) for name in match.row.scratch]
        if any(tensor is None for tensor in tensors):
            own[match.row.gpt2].zero_()
        else:
            own[match.row.gpt2].copy_(match.row.to_gpt2([tensor for tensor in tensors if tensor is not None]))
