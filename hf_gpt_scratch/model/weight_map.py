"""The table of GPT-2's parameter names and ours, for both directions.

GPT-2 has query, key and value in one matrix and stores its matrices like Conv1D, `[in, out]`; the book has three
`nn.Linear`s, which store `[out, in]`. Everything that moves weights or pairs names uses `TABLE`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from .configuration_gpt_scratch import SHARDED_LOADING
from .sharded_loading import Gather, Scatter

# The base model's name in a model with a head: transformers' `GPT2LMHeadModel.transformer`, and ours.
GPT2_PREFIX, SCRATCH_PREFIX = "transformer.", "model."


@dataclass(frozen=True)
class Row:
    """One tensor of another program (of GPT-2 in `TABLE`), and our tensors that hold it.

    `{n}` in a name is the layer. If we have several tensors, the other program's is their concatenation along our
    dimension 0, the output.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool
    meaning: str

    def to_ours(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """GPT-2's tensor as ours, one for each name; views."""
        tensor = tensor.T if self.transposed else tensor
        return tensor.chunk(len(self.ours), dim=0) if len(self.ours) > 1 else (tensor,)  # which may be a number

    def to_theirs(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        """Our tensors as GPT-2's; the inverse of `to_ours`."""
        tensors = list(tensors)
        tensor = torch.cat(tensors, dim=0) if len(tensors) > 1 else tensors[0]
        return tensor.T.contiguous() if self.transposed else tensor

    def at(self, layer: int) -> "Row":
        """The row with the layer's number in its names."""
        names = tuple(name.replace("{n}", str(layer)) for name in self.ours)
        return replace(self, theirs=self.theirs.replace("{n}", str(layer)), ours=names)

    @property
    def zeros_for(self) -> str | None:
        """GPT-2's weight to this bias, if the bias is zeros for a model of ours without `qkv_bias`, which has none."""
        name = self.theirs.removesuffix("bias")
        return name + "weight" if self.theirs.endswith(("c_attn.bias", "q_attn.bias")) else None

    @property
    def layout(self) -> str:
        """How GPT-2's tensor is converted, for tables."""
        words = ["transposed"] if self.transposed else []
        words += [f"split in {len(self.ours)}"] if len(self.ours) > 1 else []
        return ", ".join(words) or "same"


def _names(module: str, layers: tuple[str, ...], kind: str) -> tuple[str, ...]:
    return tuple(f"trf_blocks.{{n}}.{module}.{layer}.{kind}" for layer in layers)


_QKV = ("W_query", "W_key", "W_value")


BASE = (
    Row("wte.weight", ("tok_emb.weight",), False, "token embedding"),
    Row("wpe.weight", ("pos_emb.weight",), False, "position embedding"),
    Row("h.{n}.ln_1.weight", ("trf_blocks.{n}.norm1.scale",), False, "norm before attention"),
    Row("h.{n}.ln_1.bias", ("trf_blocks.{n}.norm1.shift",), False, "norm before attention"),
    Row("h.{n}.attn.c_attn.weight", _names("att", _QKV, "weight"), True, "query, key and value projections"),
    Row(
        "h.{n}.attn.c_attn.bias",
        _names("att", _QKV, "bias"),
        False,
        "query, key and value biases; zeros without `qkv_bias`",
    ),
    Row("h.{n}.attn.c_proj.weight", ("trf_blocks.{n}.att.out_proj.weight",), True, "attention output"),
    Row("h.{n}.attn.c_proj.bias", ("trf_blocks.{n}.att.out_proj.bias",), False, "attention output"),
    Row("h.{n}.ln_2.weight", ("trf_blocks.{n}.norm2.scale",), False, "norm before feed-forward"),
    Row("h.{n}.ln_2.bias", ("trf_blocks.{n}.norm2.shift",), False, "norm before feed-forward"),
    Row("h.{n}.mlp.c_fc.weight", ("trf_blocks.{n}.ff.layers.0.weight",), True, "feed-forward, E to 4E"),
    Row("h.{n}.mlp.c_fc.bias", ("trf_blocks.{n}.ff.layers.0.bias",), False, "feed-forward, E to 4E"),
    *(
        Row(f"h.{{n}}.mlp.act.{name}", (f"trf_blocks.{{n}}.ff.layers.1.{name}",), False, f"activation `{which}`")
        for name, which in (
            ("weight", "prelu"),
            ("alpha_p", "xielu"),
            ("alpha_n", "xielu"),
            ("beta", "xielu"),
            ("eps", "xielu"),
        )
    ),
    Row("h.{n}.mlp.c_proj.weight", ("trf_blocks.{n}.ff.layers.2.weight",), True, "feed-forward, 4E to E"),
    Row("h.{n}.mlp.c_proj.bias", ("trf_blocks.{n}.ff.layers.2.bias",), False, "feed-forward, 4E to E"),
    Row("h.{n}.ln_cross_attn.weight", ("trf_blocks.{n}.norm_cross.scale",), False, "norm before cross-attention"),
    Row("h.{n}.ln_cross_attn.bias", ("trf_blocks.{n}.norm_cross.shift",), False, "norm before cross-attention"),
    *(
        Row(f"h.{{n}}.crossattention.{theirs}.{kind}", _names("cross_att", ours, kind), kind == "weight", meaning)
        for theirs, ours, meaning in (
            ("q_attn", ("W_query",), "cross-attention, query projection"),
            ("c_attn", ("W_key", "W_value"), "cross-attention, key and value projections"),
            ("c_proj", ("out_proj",), "cross-attention output"),
        )
        for kind in ("weight", "bias")
    ),
    Row("ln_f.weight", ("final_norm.scale",), False, "norm after the last block"),
    Row("ln_f.bias", ("final_norm.shift",), False, "norm after the last block"),
)

# Outside the base model, and so without its prefix.
HEADS = (
    Row("lm_head.weight", ("out_head.weight",), False, "logits; tied checkpoints store `wte.weight` alone"),
    Row("score.weight", ("score.weight",), False, "sequence classification"),
    Row("score.bias", ("score.bias",), False, "sequence classification with `book_classifier`; not in official files"),
    Row("classifier.weight", ("classifier.weight",), False, "token classification"),
    Row("classifier.bias", ("classifier.bias",), False, "token classification"),
    Row("qa_outputs.weight", ("qa_outputs.weight",), False, "question answering"),
    Row("qa_outputs.bias", ("qa_outputs.bias",), False, "question answering"),
    Row("multiple_choice_head.summary.weight", ("multiple_choice_head.summary.weight",), False, "double heads"),
    Row("multiple_choice_head.summary.bias", ("multiple_choice_head.summary.bias",), False, "double heads"),
)
LM_HEAD = HEADS[0]
TABLE = BASE + HEADS

# Buffers in official files that are not weights: the causal mask, and the number that masked scores were set to.
DROPPED = (
    "h.{n}.attn.bias",
    "h.{n}.attn.masked_bias",
    "h.{n}.crossattention.bias",
    "h.{n}.crossattention.masked_bias",
)
DROPPED_PATTERNS = [re.escape(name.removeprefix("h.{n}")) + "$" for name in DROPPED]


def rows(n_layers: int, table: Iterable[Row] = TABLE) -> Iterator[Row]:
    """The table's rows for a model of `n_layers`; a row with `{n}` is repeated for each layer."""
    for row in table:
        yield from (row.at(n) for n in range(n_layers)) if "{n}" in row.theirs else (row,)


def without_prefix(state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under the table's names, whether or not they had the base model's prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}


def to_gpt2_state_dict(state_dict: Mapping[str, torch.Tensor], n_layers: int) -> dict[str, torch.Tensor]:
    """Our state dict, with or without the prefix, as the official model's with the same head.

    Raises:
        ValueError: a tensor has no row, or some tensors of a row are missing.
    """
    ours = without_prefix(state_dict, SCRATCH_PREFIX)
    theirs = {}
    for row in rows(n_layers):
        found = [ours.pop(name) for name in row.ours if name in ours]
        if len(found) not in (0, len(row.ours)):
            raise ValueError(f"{row.theirs} needs all of {', '.join(row.ours)}, but only {len(found)} are given")
        if found:
            theirs[row.theirs if row in HEADS else GPT2_PREFIX + row.theirs] = row.to_theirs(found)
    if ours:
        raise ValueError(f"no GPT-2 name for {', '.join(sorted(ours))}; the model has {n_layers} layers")
    for row in rows(n_layers):
        weight = theirs.get(f"{GPT2_PREFIX}{row.zeros_for}")
        if weight is not None:
            theirs.setdefault(GPT2_PREFIX + row.theirs, weight.new_zeros(weight.shape[1]))
    return theirs


def to_scratch_state_dict(state_dict: Mapping[str, torch.Tensor], n_layers: int) -> dict[str, torch.Tensor]:
    """GPT-2's state dict, with or without the prefix, under the book's names; mask buffers are dropped.

    Raises:
        ValueError: a tensor has no row.
    """
    theirs = without_prefix(state_dict, GPT2_PREFIX)
    for n in range(n_layers):
        for name in DROPPED:
            theirs.pop(name.replace("{n}", str(n)), None)
    ours: dict[str, torch.Tensor] = {}
    for row in rows(n_layers):
        if row.theirs in theirs:
            ours.update(zip(row.ours, row.to_ours(theirs.pop(row.theirs)), strict=True))
    if theirs:
        raise ValueError(f"no name of ours for {', '.join(sorted(theirs))}; the model has {n_layers} layers")
    return ours


def only(tensors):
    """The only tensor that the loader passes to an operation under a name."""
    return tensors[0] if isinstance(tensors, list) else tensors


class ToScratch(ConversionOps):
    """`Row.to_ours` for the loader; each of our tensors owns its storage."""

    def __init__(self, row: Row):
        self.row = row

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        [tensor] = map(only, input_dict.values())
        parts = self.row.to_ours(tensor)
        copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
        return dict(zip(target_patterns, copies, strict=True))

    @property
    def reverse_op(self):
        return ToGPT2(self.row)


class ToGPT2(ConversionOps):
    """`Row.to_theirs` for the loader, which saves by the reverse of its loading operations."""

    def __init__(self, row: Row):
        self.row = row

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        [target] = target_patterns
        return {target: self.row.to_theirs([only(input_dict[name]) for name in source_patterns])}

    @property
    def reverse_op(self):
        return ToScratch(self.row)


class QuantizableConverter(WeightConverter):
    """A converter that quantizes each of its targets on loading.

    transformers passes all targets of a converter to one quantizer operation, and most operations use only the first:
    W_key and W_value would not get their weights.
    """

    quantization_operation: ConversionOps | None

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None):
        operation, self.quantization_operation = self.quantization_operation, None
        tensors = super().convert(layer_name, model=model, config=config, loading_info=loading_info)
        if operation is None:
            return tensors
        quantized = {}
        for name, tensor in tensors.items():
            if not hf_quantizer.param_needs_quantization(model, name):
                quantized[name] = tensor
                continue
            quantized |= operation.convert(
                {name: [tensor.contiguous()]},
                source_patterns=self.source_patterns,
                target_patterns=self.target_patterns,
                full_layer_name=name,
                model=model,
                config=config,
                missing_keys=loading_info.missing_keys if loading_info else None,
            )
        return quantized


def conversions() -> list[WeightRenaming | WeightConverter]:
    """The table in the form of transformers' loader.

    The loader searches for each pattern in a name, applies every renaming that matches, then at most one converter; to
    save, it swaps the patterns. So they are escaped on both sides and match only whole parts between dots.
    """
    renamings: list[WeightRenaming | WeightConverter] = [
        WeightRenaming(rf"^{re.escape(GPT2_PREFIX)}", rf"^{re.escape(SCRATCH_PREFIX)}"),
        WeightRenaming(r"(?<!\w)h\.", r"trf_blocks\."),
    ]
    converters: list[WeightRenaming | WeightConverter] = []
    for row in TABLE:
        # It follows the layer's number; without one, it is the whole name or follows the prefix.
        source = re.escape(row.theirs.removeprefix("h.{n}"))
        targets = [re.escape(name.removeprefix("trf_blocks.{n}")) for name in row.ours]
        operations: list[ConversionOps] = [ToScratch(row)] if row.transposed or len(targets) > 1 else []
        if operations and SHARDED_LOADING:
            operations = [Gather(row.transposed, len(targets)), *operations, Scatter()]
        if "{n}" not in row.theirs:
            source, targets = rf"(?<!\w){source}", [rf"(?<!\w){target}" for target in targets]
        if [source] == targets:
            continue
        if operations:
            converters.append(QuantizableConverter(source, targets, operations=operations))
        else:
            renamings.append(WeightRenaming(source, targets))
    return renamings + converters


def markdown() -> str:
    """The table for the documentation."""
    lines = ["| GPT-2 | here | layout | what |", "| --- | --- | --- | --- |"]
    for row in TABLE:
        names = "<br>".join(f"`{name}`" for name in row.ours)
        lines.append(f"| `{row.theirs}` | {names} | {row.layout} | {row.meaning} |")
    lines += [f"| `{name}` | | dropped | the causal mask, computed here |" for name in DROPPED]
    return "\n".join(lines)
