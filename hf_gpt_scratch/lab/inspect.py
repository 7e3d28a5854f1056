"""What a model consists of: its modules, parameters with their arithmetic, and operations in order, explained in words.

Sizes come from the config and from the model on the meta device, the order of operations from running it there. No
weights are read. Shapes: B batch, T tokens; other dimensions are numbers.
"""

import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel

from ..model.configuration_gpt_scratch import PRESETS, GPTScratchConfig
from ..model.layers import GELU, GPT_CONFIG_124M, MultiHeadAttention
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchPreTrainedModel
from ..model.weight_map import SCRATCH_PREFIX, TABLE
from ..weights.architecture import architecture, kind_of

BOOK = "book"  # names the book's GPT_CONFIG_124M, like the official sizes' names
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
BLOCK = re.compile(r"(?<!\w)(h|trf_blocks)\.(\d+|\{n\})(?=\.|$)")


NORM = (
    "normalizes each token's {E} numbers to mean 0 and variance 1, then scales and shifts each",
    "y = scale · (x − mean(x)) / √(var(x) + {eps}) + shift",
)
# Each module's role and equation, by our name without the block's. `facts` fills in the braces.
ROLES: dict[str, tuple[str, str]] = {
    "tok_emb": (
        "row i is the vector of {E} numbers that represents token id i, one of {V}",
        "x = tok_emb[ids] + pos_emb[positions]",
    ),
    "pos_emb": (
        "row t is the vector that encodes position t, one of {C}",
        "x = tok_emb[ids] + pos_emb[positions]",
    ),
    "drop_emb": ("{drop_rate_emb}", "x = dropout(x)"),
    "norm1": NORM,
    "att.W_query": ("the query: what each token looks for, in {H} heads of {D} numbers", "Q = y · W_queryᵀ{qkv_bias}"),
    "att.W_key": ("the key: what each token is matched by, in {H} heads of {D}", "K = y · W_keyᵀ{qkv_bias}"),
    "att.W_value": (
        "the value: what each token passes on when it is attended to, in {H} heads of {D}",
        "V = y · W_valueᵀ{qkv_bias}",
    ),
    "att.softmax": (
        "each token weights itself and the tokens before it, separately in each head: scores Q · Kᵀ {scaling}, later "
        "tokens masked out, softmax; the weights mix the values ({drop_rate_attn})",
        "z = softmax(Q · Kᵀ {scaling} + mask) · V",
    ),
    "att.out_proj": ("mixes the results of the {H} heads", "x = x + dropout(z · W_outᵀ + b)"),
    "drop_shortcut": ("{drop_rate_shortcut}", "dropout(…)"),
    "norm_cross": NORM,
    "cross_att.W_query": ("the query: what each token looks for in the encoder's states", "Q = y · W_queryᵀ{qkv_bias}"),
    "cross_att.W_key": ("the key: what each state of the encoder is matched by", "K = states · W_keyᵀ{qkv_bias}"),
    "cross_att.W_value": (
        "the value: what attention takes from each state",
        "V = states · W_valueᵀ{qkv_bias}",
    ),
    "cross_att.out_proj": ("mixes the results of the {H} heads", "x = x + dropout(z · W_outᵀ + b)"),
    "norm2": NORM,
    "ff.layers.0": ("expands each token separately from {E} to {F} numbers", "h = {activation}(y · W₁ᵀ + b₁)"),
    "ff.layers.1": ("the activation: {activation}, elementwise", "h = {activation}(y · W₁ᵀ + b₁)"),
    "ff.layers.2": ("projects each token from {F} back to {E} numbers", "x = x + dropout(h · W₂ᵀ + b₂)"),
    "final_norm": NORM,
    "out_head": ("scores each of the {V} token ids as the next token", "logits = y · W_headᵀ"),
    "score": ("scores each of {labels} labels; the last token represents its sequence", "logits = y · Wᵀ{score_bias}"),
    "dropout": ("in training, sets some numbers to zero", "y = dropout(y)"),
    "classifier": ("scores each of {labels} labels for every token", "logits = y · Wᵀ + b"),
    "qa_outputs": ("scores every token as the answer's start and as its end", "(start, end) = y · Wᵀ + b"),
    "multiple_choice_head.summary": ("scores a whole continuation by one of its tokens", "score = y · Wᵀ + b"),
    "multiple_choice_head.first_dropout": ("in training, sets some numbers to zero", "y = dropout(y)"),
}


# GPT-2's largest model has 48.
MAX_LAYERS = 1000


def resolve(
    model: str | os.PathLike | Mapping[str, Any] | PreTrainedConfig | PreTrainedModel,
) -> tuple[GPTScratchConfig, type[GPTScratchPreTrainedModel]]:
    """The config and the model class that an argument stands for.

    Args:
        model: "124M" to "1558M"; "book", the book's `GPT_CONFIG_124M`; a directory or hub id, official or ours; a
            config.json; the book's dict; a config; a model.

    Raises:
        ValueError: none of these, or a model that is neither GPT-2 nor ours.
        StrictDataclassError: a config with a wrong value.
    """
    if isinstance(model, GPTScratchPreTrainedModel):
        return model.config, type(model)
    if isinstance(model, PreTrainedModel):
        kind = kind_of(model)
        if kind is None or type(model) is not kind.gpt2_class:
            raise ValueError(
                f"got a {type(model).__name__}, but only models of transformers' own GPT-2 classes and of ours are "
                "supported; give the config instead"
            )
        return GPTScratchConfig.from_gpt2(cast(GPT2Config, model.config)), kind
    if isinstance(model, nn.Module):
        raise ValueError(f"got a {type(model).__name__}, which has no config; give the config instead")
    if isinstance(model, GPTScratchConfig):
        return model, GPTScratchForCausalLM
    if isinstance(model, PreTrainedConfig):
        other: Any = model  # of any type; from_gpt2 refuses all but GPT-2's
        return GPTScratchConfig.from_gpt2(other), GPTScratchForCausalLM
    if isinstance(model, Mapping):
        return GPTScratchConfig(**model), GPTScratchForCausalLM
    return _named(str(model))


def _named(name: str) -> tuple[GPTScratchConfig, type[GPTScratchPreTrainedModel]]:
    """The config and the class of a preset, the book's configuration, a directory, a config.json or a hub id."""
    if name in PRESETS:
        return GPTScratchConfig.preset(name), GPTScratchForCausalLM
    if name == BOOK:
        book: dict[str, Any] = {**GPT_CONFIG_124M}
        return GPTScratchConfig(**book), GPTScratchForCausalLM
    if re.fullmatch(r"\d+(\.\d+)?[MB]", name, re.IGNORECASE) and not Path(name).exists():  # the hub need not be asked
        raise ValueError(_unknown(name, "there is no such size"))
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
        if not values:
            raise OSError("no config.json")
        config = GPTScratchConfig.from_pretrained(name)
    except (OSError, json.JSONDecodeError, TypeError, AttributeError) as error:  # a config.json can contain anything
        raise ValueError(_unknown(name, str(error).splitlines()[0])) from error
    except (ValueError, StrictDataclassError):
        raise
    except Exception as error:  # transformers can fail on a bad config in many ways
        raise ValueError(f"{name!r} has an unusable config.json ({error!r}); correct it") from error
    return config, architecture(values, name)


def _unknown(name: str, reason: str) -> str:
    """The message for a name that leads to no config."""
    if Path(name).is_file() and not name.endswith(".json"):
        return (
            f"{name} is a file, but sizes are read from a directory with a config.json; give that, or, if it "
            f"is the book's or another program's checkpoint, convert it: hf-gpt-scratch convert {name} DIRECTORY"
        )
    close = difflib.get_close_matches(name, (*PRESETS, BOOK), n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"got {name!r}{hint} A model is one of {', '.join(PRESETS)}, {BOOK!r}, a directory with a config.json or a "
        f"hub id ({reason})"
    )


def build(config: GPTScratchConfig, model_class: type[GPTScratchPreTrainedModel]) -> GPTScratchPreTrainedModel:
    """The model on the meta device, without memory for its weights, in evaluation mode."""
    if config.n_layers > MAX_LAYERS:
        raise ValueError(
            f"got a config of {config.n_layers} layers, but at most {MAX_LAYERS} are supported; is it a typo?"
        )
    config = GPTScratchConfig.from_dict(config.to_dict())  # building modifies it
    config.return_dict = True
    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation="eager")
    model.tie_weights()
    return model.eval()


def facts(model: GPTScratchPreTrainedModel) -> dict[str, Any]:
    """The values for the braces in `ROLES`, read from the model's modules."""
    base: Any = model.base_model  # a subclass may have modules of other classes
    block = base.trf_blocks[0]
    wide, act, _ = block.ff.layers
    scalings = [block.att.scaling for block in base.trf_blocks]
    if len(set(scalings)) > 1:
        scaling = f"· {scalings[0]:.4g} in block 0 to {scalings[-1]:.4g} in block {len(scalings) - 1}"
    elif scalings[0] == block.att.head_dim**-0.5:
        scaling = f"/ √{block.att.head_dim}"
    else:
        scaling = "(not scaled)" if scalings[0] == 1 else f"· {scalings[0]:.4g}"
    return {
        "V": f"{base.tok_emb.num_embeddings:,}",
        "C": f"{base.pos_emb.num_embeddings:,}",
        "E": f"{base.tok_emb.embedding_dim:,}",
        "F": f"{wide.out_features:,}",
        "H": block.att.num_heads,
        "D": block.att.head_dim,
        "L": len(base.trf_blocks),
        "eps": f"{block.norm1.eps:g}",
        "scaling": scaling,
        "qkv_bias": "" if block.att.W_query.bias is None else " + b",
        "score_bias": " + b" if base.config.book_classifier else "",
        "activation": "GELU (tanh)" if isinstance(act, GELU) else model.config.activation_function,
        "labels": model.config.num_labels,
        "drop_rate_emb": _dropout(base.drop_emb.p),
        "drop_rate_attn": _dropout(block.att.dropout.p),
        "drop_rate_shortcut": _dropout(block.drop_shortcut.p),
    }


def _dropout(rate: float) -> str:
    return f"in training, sets {rate:.0%} to zero" if rate else "no dropout: the rate is 0"


def arithmetic(terms: Sequence[tuple[int, ...]]) -> str:
    """A sum of products, step by step: "768 × 3,072 + 3,072 = 2,359,296 + 3,072 = 2,362,368"."""
    factors = [(n, *term) if n > 1 else term for term, n in Counter(term for term in terms if prod(term)).items()]
    products = [f"{prod(term):,}" for term in factors]
    steps = [" + ".join(" × ".join(f"{n:,}" for n in term) for term in factors), " + ".join(products)]
    steps.append(f"{sum(map(prod, factors)):,}")
    return " = ".join(dict.fromkeys(step for step in steps if step))


@dataclass(frozen=True)
class Node:
    """A module: its class, its own tensors, and its children. `name` is "0-11" for twelve equal modules."""

    name: str
    kind: str
    gpt2: str | None
    shapes: dict[str, list[int]]
    parameters: int
    arithmetic: str
    tied_to: str | None = None
    copies: int = 1
    children: tuple["Node", ...] = ()

    def walk(self, depth: int = 0) -> Iterator[tuple[int, "Node"]]:
        yield depth, self
        for child in self.children:
            yield from child.walk(depth + 1)

    def __getitem__(self, name: str) -> "Node":
        """The descendant of that name: `tree["model.trf_blocks"]`."""
        head, _, rest = name.partition(".")
        child = next((child for child in self.children if child.name == head), None)
        if child is None:
            raise KeyError(f"{self.name or self.kind} has no {head!r}, only {', '.join(c.name for c in self.children)}")
        return child[rest] if rest else child


@dataclass(frozen=True)
class Inspection:
    """A model's module tree, its totals, the memory of its weights, and a summary in words."""

    model: str
    kind: str
    dtype: str | None
    tree: Node
    parameters: dict[str, int]  # "tied": one matrix for embedding and head; "untied": two; "all": no such head
    tied: bool
    arithmetic: dict[str, str]
    memory: dict[str, dict[str, int]]  # bytes, by dtype, then as `parameters`
    summary: str
    steps: tuple["Step", ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Step:
    """One operation, in the order of execution; `steps` are those of a block, `copies` times."""

    name: str
    gpt2: str | None
    does: str
    equation: str
    shape: tuple[str | int, ...]
    copies: int = 1
    steps: tuple["Step", ...] = ()


def inspect(model) -> Inspection:
    """Inspects anything that `resolve` accepts.

    Raises:
        ValueError: see `resolve`.
    """
    config, model_class = resolve(model)
    try:
        built = build(config, model_class)
        events = trace(built)
    except Exception as error:  # invalid settings of heads, invalid dtypes, and so on
        raise ValueError(f"no {model_class.__name__} can be built from its config ({error}); correct it") from error
    steps = _steps(built, events)
    tree = _node(built, "", "", [name for name, _, _ in events], {})
    total = tree.parameters
    head = built.get_output_embeddings()
    if head is None:
        parameters, sums = {"all": total}, {"all": tree.arithmetic}
    else:
        matrix, tied = head.weight.numel(), head.weight is built.get_input_embeddings().weight
        untied = total + matrix if tied else total
        parameters = {"tied": untied - matrix, "untied": untied}
        sums = {
            "tied": f"{untied:,} − {matrix:,} = {untied - matrix:,}",
            "untied": f"{untied - matrix:,} + {matrix:,} = {untied:,}",
        }
    name = type(model).__name__ if not isinstance(model, str | os.PathLike) else str(model)
    return Inspection(
        model=name,
        kind=type(built).__name__,
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype else None,
        tree=tree,
        parameters=parameters,
        tied=config.tie_word_embeddings and head is not None,
        arithmetic=sums,
        memory={dtype: {k: n * size for k, n in parameters.items()} for dtype, size in BYTES.items()},
        summary=_summary(built, steps, total),
        steps=tuple(steps),
    )


def _node(module: nn.Module, name: str, path: str, order: list[str], seen: dict[int, str]) -> Node:
    def first_use(child: str) -> int:
        below = f"{path}{child}"
        return next((i for i, used in enumerate(order) if used == below or used.startswith(below + ".")), len(order))

    terms, shapes, tied_to = [], {}, None
    for key, parameter in module.named_parameters(recurse=False):
        shapes[key] = list(parameter.shape)
        if id(parameter) in seen:
            tied_to = seen[id(parameter)]
            continue
        seen[id(parameter)] = path + key
        # in × out, as usually written; nn.Linear stores [out, in].
        terms.append(tuple(parameter.shape[::-1] if isinstance(module, nn.Linear) else parameter.shape))
    names = sorted((child for child, _ in module.named_children()), key=first_use)
    children = _grouped([_node(module.get_submodule(n), n, f"{path}{n}.", order, seen) for n in names])
    terms += [(child.parameters,) for child in children for _ in range(child.copies)]
    return Node(
        name=name,
        kind=type(module).__name__,
        gpt2=gpt2_module(path.removesuffix(".")),
        shapes=shapes,
        parameters=sum(map(prod, terms)),
        arithmetic=arithmetic(terms),
        tied_to=tied_to,
        children=children,
    )


def _grouped(children: list[Node]) -> tuple[Node, ...]:
    """The same nodes, with neighbours that differ only in their number merged."""
    groups: list[list[Node]] = []
    for child in children:
        if groups and child.name.isdigit() and groups[-1][0].name.isdigit() and _alike(groups[-1][0], child):
            groups[-1].append(child)
        else:
            groups.append([child])
    return tuple(
        replace(group[0], name=f"{group[0].name}-{group[-1].name}", copies=len(group)) if group[1:] else group[0]
        for group in groups
    )


def _alike(a: Node, b: Node) -> bool:
    def facts_of(node: Node) -> list[tuple]:
        return [(depth, n.name if depth else "", n.kind, n.shapes, n.tied_to) for depth, n in node.walk()]

    return facts_of(a) == facts_of(b)


@cache
def _module_names() -> dict[str, str]:
    """Our modules' names and GPT-2's, as the weight map pairs them; containers are paired by depth."""
    names = {}
    for row in TABLE:
        theirs = row.theirs.split(".")[:-1]
        for scratch in row.ours:
            ours = scratch.split(".")[:-1]
            names[".".join(ours)] = ".".join(theirs)
            for depth in range(1, len(theirs)):
                names.setdefault(".".join(ours[:depth]), ".".join(theirs[:depth]))
    return names


def gpt2_module(path: str) -> str | None:
    """The last part of GPT-2's name for our module at `path`, if the weight map has one."""
    ours = BLOCK.sub(r"\1.{n}", path.removeprefix(SCRATCH_PREFIX))
    theirs = _module_names().get(ours)
    return theirs.rpartition(".")[2] if theirs and not theirs.endswith("}") else None


Event = tuple[str, tuple[int, ...], str]


def trace(model: GPTScratchPreTrainedModel) -> list[Event]:
    """The operations of one forward pass in order: name, shape of the result, and for a sum the terms.

    An operation is a module without children, named by its path; a sum of hidden states, `….+`; or `….softmax`. One
    sequence of at most 7 tokens runs through the model on the meta device.
    """
    events: list[Event] = []
    running: list[str] = []
    known: dict[int, tuple[torch.Tensor, str]] = {}  # keeps the tensors, so that no id is reused

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = running[-1] if running else ""
            module = model.get_submodule(name)
            if function is torch.ops.aten._softmax.default and isinstance(module, MultiHeadAttention):
                events.append((f"{name}.softmax", tuple(result.shape), ""))
            hidden = isinstance(result, torch.Tensor) and result.ndim == 3 and result.is_floating_point()
            if function is torch.ops.aten.add.Tensor and hidden and any(module.children()):
                added = [known[id(arg)][1] for arg in args if id(arg) in known]
                events.append((f"{name}.+", tuple(result.shape), " and ".join(added)))
                known[id(result)] = (result, "the previous sum")
            return result

    def enter(name):
        def hook(module, args):
            running.append(name)
            if name.rpartition(".")[2].isdigit() and "." not in name.partition("trf_blocks.")[2]:
                known[id(args[0])] = (args[0], "the block's input")

        return hook

    def leave(name):
        def hook(module, args, output):
            running.pop()
            if not any(module.children()) and not isinstance(module, nn.Identity):
                events.append((name, tuple(output.shape), ""))

        return hook

    hooks = [m.register_forward_pre_hook(enter(name)) for name, m in model.named_modules()]
    hooks += [m.register_forward_hook(leave(name)) for name, m in model.named_modules()]
    ids = torch.zeros(1, min(7, model.config.context_length), dtype=torch.long, device="meta")
    # A ready-made mask: transformers would derive one from the positions, which have no values on the meta device.
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device="meta")
    with torch.no_grad(), Sums():
        model(ids, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return events


def _steps(model: GPTScratchPreTrainedModel, events: list[Event]) -> list[Step]:
    """The trace in words; equal blocks are merged into one step."""
    filled = facts(model)
    steps: list[Step] = []
    for event in events:
        path = event[0].removeprefix(SCRATCH_PREFIX).removeprefix(".")
        block = BLOCK.match(path)
        step = _step(model, event, path[block.end() + 1 :] if block else path, filled)
        if not block:
            steps.append(step)
        elif steps and steps[-1].name == f"trf_blocks.{block[2]}":
            steps[-1] = replace(steps[-1], steps=(*steps[-1].steps, step), shape=step.shape)
        else:
            gpt2 = f"{gpt2_module('trf_blocks')}.{block[2]}"
            steps.append(Step(f"trf_blocks.{block[2]}", gpt2, "", "", step.shape, steps=(step,)))
    return _merged(steps)


def _step(model: GPTScratchPreTrainedModel, event: Event, name: str, filled: dict[str, Any]) -> Step:
    """One operation in words; `name` is its module's, without the block's."""
    full, sizes, added = event
    shape: tuple[str | int, ...] = ("B", "T", *sizes[2:]) if len(sizes) > 2 else ("B", *sizes[1:])
    if name == "att.softmax":
        shape = ("B", sizes[1], "T", "T")
    if name == "+":
        # In a block, one of the two is the shortcut; outside, they are the two embeddings.
        does = f"adds {added}: the shortcut" if added else "adds the two: what the token is, and its position"
        return Step(name, None, does, "x = x + …", shape)
    does, equation = ROLES.get(name) or (f"a {type(model.get_submodule(full)).__name__}", "")
    return Step(name, gpt2_module(full), does.format(**filled), equation.format(**filled), shape)


def _merged(steps: list[Step]) -> list[Step]:
    merged: list[Step] = []
    for step in steps:
        last = merged[-1] if merged else None
        if last and step.steps and last.steps == step.steps:
            first, number = last.name.partition("-")[0], step.name.rpartition(".")[2]
            gpt2 = f"{(last.gpt2 or '').partition('-')[0]}-{number}"
            merged[-1] = replace(last, name=f"{first}-{number}", gpt2=gpt2, copies=last.copies + 1)
        else:
            merged.append(step)
    return merged


def _summary(model: GPTScratchPreTrainedModel, steps: list[Step], total: int) -> str:
    n = facts(model)
    base: Any = model.base_model
    wide, width = base.trf_blocks[0].ff.layers[0].out_features, base.tok_emb.embedding_dim
    times = f"{wide // width} × {width:,}" if wide % width == 0 else f"{wide / width:.2f} × {width:,}"
    inside = sum(p.numel() for p in base.trf_blocks.parameters())
    embedded = base.tok_emb.weight.numel() + base.pos_emb.weight.numel()
    shape = ", ".join(f"{size:,}" for size in steps[-1].shape[2:])
    gives = f"and gives {shape} numbers for each of them" if shape else "and gives one number for all of them"
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    head = " The output head reuses the token embedding's matrix." if tied else ""
    return (
        f"{type(model).__name__} reads up to {n['C']} tokens, each one of {n['V']}, {gives}. Every token is a vector "
        f"of {n['E']} numbers, which {n['L']} transformer blocks rewrite in turn: {n['H']} attention heads "
        f"of {n['D']} numbers let it attend to the tokens before it, and a feed-forward network {n['F']} wide "
        f"({times}, {n['activation']}) processes it alone. {_order_in_block(steps)} Of {total:,} parameters "
        f"{inside / total:.1%} are in the blocks and {embedded / total:.1%} in the embeddings.{head}"
    )


def _order_in_block(steps: list[Step]) -> str:
    """Where the first block has its norms and shortcuts."""
    inner = [step.name.partition(".")[0] for step in next(step.steps for step in steps if step.steps)]
    norms = "before" if inner.index("norm1") < inner.index("att") else "after"
    shortcuts = {0: "no shortcut leads around either", 1: "a shortcut leads around one"}
    around = shortcuts.get(inner.count("+"), "shortcuts lead around both")
    return f"Norms come {norms} attention and feed-forward, and {around}."
