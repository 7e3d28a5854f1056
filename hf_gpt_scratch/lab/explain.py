"""A parameter's source and target names, its role, and its equation.

Sizes come from the config and the model on the meta device; no weights are read.
"""

import difflib
import re
from dataclasses import asdict, dataclass
from typing import Any

from transformers.activations import ACT2FN

from ..errors import UnknownName
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.heads_gpt_scratch import (
    GPTScratchDoubleHeadsModel,
    GPTScratchForQuestionAnswering,
    GPTScratchForSequenceClassification,
    GPTScratchForTokenClassification,
)
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchPreTrainedModel
from ..model.weight_map import DROPPED, GPT2_PREFIX, HEADS, LM_HEAD, SCRATCH_PREFIX, TABLE, Row
from .inspect import BLOCK, ROLES, arithmetic, build, facts, resolve

# Prefixes of a base model in a head model, and those of PEFT, DistributedDataParallel and torch.compile.
PREFIXES = (GPT2_PREFIX[:-1], SCRATCH_PREFIX[:-1], "base_model", "module", "_orig_mod")

# Which class has a head of this name; GPTScratchForCausalLM has the rest.
HEAD_CLASSES: dict[str, type[GPTScratchPreTrainedModel]] = {
    "score.": GPTScratchForSequenceClassification,
    "classifier.": GPTScratchForTokenClassification,
    "qa_outputs.": GPTScratchForQuestionAnswering,
    "multiple_choice_head.": GPTScratchDoubleHeadsModel,
}


@dataclass(frozen=True)
class Part:
    """One tensor of ours. `code` is its Python expression within our block (outside blocks: within our model), `value`
    the equal expression within GPT-2's."""

    name: str
    stored: str
    shape: list[int]
    code: str
    value: str


@dataclass(frozen=True)
class Explanation:
    """A parameter, from GPT-2's tensor to ours and back. Without `parts`, the conversion drops it."""

    gpt2: str
    gpt2_stored: str
    gpt2_shape: list[int]
    gpt2_code: str  # as in `Part`, in the other direction
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
    """The parameters that match `name`: where they come from and go to, with their shapes in `model`.

    Args:
        name: GPT-2's name or ours, in full or in part ("W_query"), with or without prefix and layer number.
        model: anything that `resolve` accepts.

    Raises:
        UnknownName: no parameter matches; the message suggests the closest names.
        ValueError: see `resolve`.
    """
    config, _ = resolve(model)
    query, layer = _normalized(name)
    if layer is not None and layer >= config.n_layers:
        raise UnknownName(f"got {name!r}, but the model has layers 0 to {config.n_layers - 1}; name one of those")
    rows = [(row, picked) for row in TABLE if _meant(row.theirs, query, config) and (picked := _picked(row, query))]
    exact = [(row, picked) for row, picked in rows if query in map(_parts, (row.theirs, *row.ours))]
    if exact:
        return [_explained(row, picked, layer, config) for row, picked in exact]
    dropped = [other for other in DROPPED if _meant(other, query, config) and _within(query, other)]
    if not rows and not dropped:
        raise UnknownName(f"got {name!r}, which is no parameter of GPT-2 or ours; {_suggestion(query)}")
    explanations = [_explained(row, picked, layer, config) for row, picked in rows]
    return explanations + [_dropped(other, layer, config) for other in dropped]


def _meant(name: str, query: tuple[str, ...], config: GPTScratchConfig) -> bool:
    """Cross-attention shares attention's names, so it matches only if the config has it or the query names it."""
    return "cross" not in name or config.add_cross_attention or any("cross" in part for part in query)


def _normalized(name: str) -> tuple[tuple[str, ...], int | None]:
    """The name's parts without prefixes and layer number, and that number."""
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
    """Which of our tensors in the row match; all of them if GPT-2's name does."""
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
    """A name as a Python expression within its block, or within the model if it is outside the blocks."""
    return re.sub(r"\.(\d+)", r"[\1]", re.sub(r"^(h|trf_blocks)\.\{n\}\.", "", name))


def _role(name: str) -> str:
    """The key in `ROLES` of the module that owns this parameter of ours."""
    return BLOCK.sub("", name).removeprefix(".").rpartition(".")[0]


def _explained(row: Row, picked: list[int], layer: int | None, config: GPTScratchConfig) -> Explanation:
    model, note = _model_with(row, config)
    tensors = model.state_dict()
    ours = [tensors[_stored(row, name)] for name in row.at(0).ours]
    shapes, filled = [list(tensor.shape) for tensor in ours], facts(model)
    numbered = row if layer is None else row.at(layer)
    parts = []
    for i in picked:
        name, code = numbered.ours[i], _expression(row.ours[i])
        parts.append(Part(name, _stored(row, name), shapes[i], code, _value_of_part(row, i, shapes)))
    back = ", ".join(map(_expression, row.ours))
    back = f"torch.cat([{back}])" if len(row.ours) > 1 else back
    step = 1 if row.theirs in ("wte.weight", "wpe.weight") else -1  # in × out, as in the tree
    roles = list(dict.fromkeys(ROLES[_role(row.ours[i])] for i in picked))
    return Explanation(
        gpt2=numbered.theirs,
        gpt2_stored=numbered.theirs if row in HEADS else GPT2_PREFIX + numbered.theirs,
        gpt2_shape=list(row.to_theirs(ours).shape),
        gpt2_code=_expression(row.theirs),
        gpt2_value=back + (".T" if row.transposed else ""),
        parts=tuple(parts),
        meaning=row.meaning,
        does="; ".join(does for does, _ in roles).format(**filled),
        equation="; ".join(equation for _, equation in roles).format(**filled),
        arithmetic=arithmetic([tuple(shapes[i][::step]) or (1,) for i in picked]),
        note=note,
    )


def _stored(row: Row, name: str) -> str:
    """The name of a row's tensor in our files; heads are outside the base model."""
    return name if row in HEADS else SCRATCH_PREFIX + name


def _value_of_part(row: Row, i: int, shapes: list[list[int]]) -> str:
    """The i-th of our tensors as a Python expression within GPT-2's block."""
    value = _expression(row.theirs)
    if len(row.ours) > 1:
        rows = f"{i * shapes[i][0]}:{(i + 1) * shapes[i][0]}"
        value += f"[:, {rows}]" if row.transposed else f"[{rows}]"
    return value + (".T" if row.transposed else "")


def _model_with(row: Row, config: GPTScratchConfig) -> tuple[GPTScratchPreTrainedModel, str]:
    """A one-block model that has the row's tensors, and a note if this config's language model does not."""
    model_class = next((c for name, c in HEAD_CLASSES.items() if row.ours[0].startswith(name)), GPTScratchForCausalLM)
    changes = _changes_for(row.ours[0], config)
    values = {**config.to_dict(), "n_layers": 1, "tie_word_embeddings": False, **changes}
    model = build(GPTScratchConfig.from_dict(values), model_class)
    if changes:
        needed = " and ".join(f"{key}={value!r}" for key, value in changes.items())
        return model, f"this model does not have it: that takes {needed}"
    if model_class is not GPTScratchForCausalLM:
        return model, f"only {model_class.__name__} has it"
    tied = row is LM_HEAD and config.tie_word_embeddings
    return model, "tied: the same matrix as tok_emb.weight, stored once" if tied else ""


def _changes_for(name: str, config: GPTScratchConfig) -> dict[str, Any]:
    """The settings that this parameter of ours requires and the config lacks."""
    changes: dict[str, Any] = {}
    if "att.W_" in name and name.endswith(".bias") and not config.qkv_bias:
        changes["qkv_bias"] = True
    if "cross" in name and not config.add_cross_attention:
        changes["add_cross_attention"] = True
    if name == "score.bias" and not config.book_classifier:
        changes["book_classifier"] = True
    if ".ff.layers.1." in name:
        own = name.rpartition(".")[2]
        if own not in ACT2FN[config.activation_function].state_dict():
            changes["activation_function"] = "prelu" if own == "weight" else "xielu"
    return changes


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
        meaning="the causal mask" if mask else "the value that the causal mask once filled in",
        does="not a weight: dropped, because it is computed when needed",
        equation="position t sees positions 0 to t",
        arithmetic="",
        note="",
    )
