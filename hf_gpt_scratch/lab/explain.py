"""Where a parameter comes from and goes to, what it does, and in which equation.

Sizes come from the config and the model on the meta device; no weights are read.
"""

import difflib
import re
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UnknownName
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.modeling_gpt_scratch import MODELS, GPTScratchForCausalLM, GPTScratchPreTrainedModel
from ..model.weight_map import DROPPED, GPT2_PREFIX, HEADS, LM_HEAD, SCRATCH_PREFIX, TABLE, Row
from .inspect import BLOCK, ROLES, arithmetic, build, facts, resolve

# What the base model's place in a head, PEFT, DistributedDataParallel and torch.compile put before a name.
PREFIXES = (GPT2_PREFIX[:-1], SCRATCH_PREFIX[:-1], "base_model", "module", "_orig_mod")


@dataclass(frozen=True)
class Part:
    """One tensor of ours: `code` is its name in Python over the modules of a block of ours (outside blocks: of the
    model), `value` what it is over those of GPT-2's."""

    name: str
    stored: str
    shape: list[int]
    code: str
    value: str


@dataclass(frozen=True)
class Explanation:
    """A parameter, from GPT-2's tensor to ours and back. Without `parts` it is dropped on the way."""

    gpt2: str
    gpt2_stored: str
    gpt2_shape: list[int]
    gpt2_code: str  # as in `Part`, the other way round
    gpt2_value: str
    parts: tuple[Part, ...]
    meaning: str
    does: str
    equation: str
    arithmetic: str
    note: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(name: str, model="124M") -> list[Explanation]:
    """Where the parameters called `name` come from and go to, with the shapes that they have in `model`.

    Args:
        name: GPT-2's or ours, whole or in part ("W_query"), with or without prefix and layer number.
        model: what `resolve` understands.

    Raises:
        UnknownName: no parameter is called so; the message has the nearest names.
        ValueError: see `resolve`.
    """
    config, _ = resolve(model)
    query, layer = _normalized(name)
    if layer is not None and layer >= config.n_layers:
        raise UnknownName(f"got {name!r}, but the model has the layers 0 to {config.n_layers - 1}; name one of those")
    # Cross-attention has the names of attention; it is meant only where there is some, or by its own name.
    cross = config.add_cross_attention or any("cross" in part for part in query)
    found = [(row, picked) for row in TABLE if cross or "cross" not in row.theirs if (picked := _picked(row, query))]
    dropped = [other for other in DROPPED if cross or "cross" not in other if _within(query, other)]
    exact = [(row, picked) for row, picked in found if query in map(_parts, (row.theirs, *row.ours))]
    if not found and not dropped:
        raise UnknownName(f"got {name!r}, which is no parameter of GPT-2 or ours; {_suggestion(query)}")
    explanations = [_explained(row, picked, layer, config) for row, picked in exact or found]
    return explanations + [_dropped(other, layer, config) for other in (() if exact else dropped)]


def _normalized(name: str) -> tuple[tuple[str, ...], int | None]:
    """The name's parts without prefixes and layer number, and the number."""
    name = re.sub(r"\[(\d+)\]", r".\1", name.strip())
    numbers = [int(number) for _, number in BLOCK.findall(name) if number.isdigit()]
    parts = list(_parts(name))
    while parts and parts[0] in PREFIXES:
        del parts[0]
    return tuple(parts), numbers[0] if numbers else None


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in BLOCK.sub(r"\1", name).split(".") if part)


def _within(query: tuple[str, ...], name: str) -> bool:
    parts = _parts(name)
    return bool(query) and any(parts[i : i + len(query)] == query for i in range(len(parts)))


def _picked(row: Row, query: tuple[str, ...]) -> list[int]:
    """Which of the row's tensors of ours are meant; all if GPT-2's is."""
    if _within(query, row.theirs):
        return list(range(len(row.ours)))
    return [i for i, name in enumerate(row.ours) if _within(query, name)]


def _suggestion(query: tuple[str, ...]) -> str:
    names = {name for row in TABLE for name in (row.theirs, *row.ours)} | set(DROPPED)
    spelled = {".".join(_parts(name)).lower(): name for name in sorted(names)}
    spelled |= {part.lower(): part for name in sorted(names) for part in _parts(name) if not part.isdigit()}
    near = difflib.get_close_matches(".".join(query).lower(), spelled, n=3, cutoff=0.6)
    near = near or difflib.get_close_matches(query[-1].lower() if query else "", spelled, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(spelled[n] for n in near)}?"
    return "the weight map, docs/weights.md, lists them all"


def _expression(name: str) -> str:
    """A name as Python over the modules of its block, or of the model if it is in none."""
    return re.sub(r"\.(\d+)", r"[\1]", re.sub(r"^(h|trf_blocks)\.\{n\}\.", "", name))


def _role(name: str) -> str:
    """The key in `ROLES` of the module that has this parameter of ours."""
    return BLOCK.sub("", name).removeprefix(".").rpartition(".")[0]


def _explained(row: Row, picked: list[int], layer: int | None, config: GPTScratchConfig) -> Explanation:
    shapes, gpt2_shape, filled, note = _shapes(row, config)
    numbered = row if layer is None else row.at(layer)
    prefixed = row not in HEADS
    parts = []
    for i in picked:
        value = _expression(row.theirs)
        if len(row.ours) > 1:
            rows = f"{i * shapes[i][0]}:{(i + 1) * shapes[i][0]}"
            value += f"[:, {rows}]" if row.transposed else f"[{rows}]"
        value += ".T" if row.transposed else ""
        name = numbered.ours[i]
        parts.append(Part(name, SCRATCH_PREFIX * prefixed + name, shapes[i], _expression(row.ours[i]), value))
    back = ", ".join(map(_expression, row.ours))
    back = f"torch.cat([{back}])" if len(row.ours) > 1 else back
    step = 1 if row.theirs in ("wte.weight", "wpe.weight") else -1  # in × out, as in the tree
    roles = dict.fromkeys(ROLES[_role(row.ours[i])] for i in picked)
    return Explanation(
        gpt2=numbered.theirs,
        gpt2_stored=GPT2_PREFIX * prefixed + numbered.theirs,
        gpt2_shape=gpt2_shape,
        gpt2_code=_expression(row.theirs),
        gpt2_value=back + (".T" if row.transposed else ""),
        parts=tuple(parts),
        meaning=row.meaning,
        does="; ".join(does for does, _ in roles).format(**filled),
        equation="; ".join(equation for _, equation in roles).format(**filled),
        arithmetic=arithmetic([tuple(shapes[i][::step]) or (1,) for i in picked]),
        note=note,
    )


def _shapes(row: Row, config: GPTScratchConfig) -> tuple[list[list[int]], list[int], dict[str, Any], str]:
    """Shapes of a row's tensors of ours and of GPT-2's, the model's facts, and what must change for it to have them."""
    values: dict[str, Any] = {**config.to_dict(), "n_layers": 1, "tie_word_embeddings": False}
    causal = GPTScratchForCausalLM
    others: list[tuple[type[GPTScratchPreTrainedModel], dict]] = [(model_class, {}) for model_class in MODELS[1:]]
    changes: tuple[dict[str, Any], ...] = (
        {"qkv_bias": True},
        {"activation_function": "prelu"},
        {"activation_function": "xielu"},
        {"qkv_bias": True, "add_cross_attention": True},
    )
    for model_class, change in [(causal, {}), *others, *((causal, change) for change in changes)]:
        model = build(GPTScratchConfig.from_dict({**values, **change}), model_class)
        tensors = {name.removeprefix(SCRATCH_PREFIX): tensor for name, tensor in model.state_dict().items()}
        found = [tensors[name] for name in row.at(0).ours if name in tensors]
        if found:
            break
    note = f"only {model_class.__name__} has it" if model_class is not GPTScratchForCausalLM else ""
    for key, value in change.items():
        note = f"this model has none: only one with {key}={value!r} does"
    if row is LM_HEAD and config.tie_word_embeddings:
        note = "tied: the same matrix as tok_emb.weight, stored once"
    return [list(t.shape) for t in found], list(row.to_theirs(found).shape), facts(model), note


def _dropped(name: str, layer: int | None, config: GPTScratchConfig) -> Explanation:
    stored = name if layer is None else name.replace("{n}", str(layer))
    mask = not name.endswith("masked_bias")
    return Explanation(
        gpt2=stored,
        gpt2_stored=GPT2_PREFIX + stored,
        gpt2_shape=[1, 1, config.context_length, config.context_length] if mask else [],
        gpt2_code=_expression(name),
        gpt2_value="",
        parts=(),
        meaning="the causal mask" if mask else "the number that the causal mask once filled in",
        does="no weight: it is dropped, since it is computed when it is needed",
        equation="position t sees the positions 0 to t",
        arithmetic="",
        note="",
    )
