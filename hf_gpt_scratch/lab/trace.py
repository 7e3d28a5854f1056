"""A model's activations, stage by stage in execution order, recorded by hooks.

Shapes: B batch, T tokens, E emb_dim, H heads, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from os.path import commonpath
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import LabError
from ..weights.parity import warm_up
from .bare import BareRecorder
from .calling import FUNCTION, logits_in
from .pairing import joined, parameters
from .subject import Subject
from .usage import every_operation, submodule

LOGITS, CHOICES = "out_head", "mc_logits"
# The stages inside a block, in execution order. `x.input` is the input of x.
BLOCK_STAGES = {
    "input": "block input",
    "norm1": "norm before attention",
    "att.W_query": "queries",
    "att.W_key": "keys",
    "att.W_value": "values",
    "att.weights": "attention weights",
    "att.out_proj.input": "context vectors",
    "att.out_proj": "attention output",
    "norm2.input": "after attention and shortcut",
    "norm2": "norm before feed-forward",
    "ff.layers.0": "feed-forward, to n_inner",
    "ff.layers.2.input": "after the activation",
    "ff.layers.2": "feed-forward output",
    "": "block output",
}
OTHER_STAGES = {
    "tok_emb": "token embedding",
    "pos_emb": "position embedding",
    "final_norm": "norm after the last block",
    LOGITS: "logits",
}
# What modules read: recorded for the diagnosis, which compares it with what they should read; no stages of a report.
MODULE_INPUTS = {
    "norm1.input": "input of the norm before attention",
    "att.W_query.input": "input of attention",
    "ff.layers.0.input": "input of the feed-forward network",
    "final_norm.input": "input of the norm after the last block",
    f"{LOGITS}.input": "input of the head",
}
# The stages of other heads, after the last norm.
HEAD_STAGES = {
    "score": "label scores per token",
    "classifier": "label scores per token",
    "qa_outputs": "start and end scores",
    "multiple_choice_head.summary": "score per choice",
    CHOICES: "choices' scores",
}
SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)
PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm, torch.einsum)
DROPOUT, KERNEL = (F.dropout, torch.dropout), F.scaled_dot_product_attention


class Activations(dict[str, torch.Tensor]):
    """What was recorded, by stage; `repeated` are the stages that ran more often than in GPT-2, of which the first
    run is recorded."""

    repeated: frozenset[str] = frozenset()


def meaning(stage: str) -> str:
    """A stage in words."""
    short = re.sub(r"^trf_blocks\.\d+\.?", "", stage)
    return {**OTHER_STAGES, **HEAD_STAGES, **BLOCK_STAGES, **MODULE_INPUTS}[short]


def stages(n_layers: int) -> list[str]:
    """All stages of a language model in execution order."""
    blocks = [f"trf_blocks.{n}.{stage}".rstrip(".") for n in range(n_layers) for stage in BLOCK_STAGES]
    return ["tok_emb", "pos_emb", *blocks, "final_norm", LOGITS]


# Recording


class AttentionRecorder(TorchFunctionMode):
    """Records the result of each attention softmax (B, H, T, T), and what values are multiplied by.

    Switches dropout off if `dropout` is False.
    """

    def __init__(self, dropout: bool, tokens: int):
        super().__init__()
        self.dropout, self.tokens = dropout, tokens
        self.weights: list[torch.Tensor] = []
        self.factors: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not self.dropout and func in DROPOUT:
            return args[0] if args else kwargs["input"]
        if not self.dropout and func is KERNEL:
            args, kwargs = without_dropout(args, kwargs)
        result = func(*args, **kwargs)
        if func in SOFTMAX and result.ndim in (3, 4) and result.shape[-1] == result.shape[-2]:
            self.weights.append(result.detach())
        if func in PRODUCTS and not self.weights:
            factors = [value for value in args if isinstance(value, torch.Tensor) and value.ndim in (3, 4)]
            square = [value.shape[-2:] == (self.tokens, self.tokens) for value in factors]
            if len(factors) == 2 and square.count(True) == 1:
                self.factors.append(factors[square.index(True)].detach().clone())
        return result

    def by_layer(self, layers: int) -> list[torch.Tensor]:
        """The weights of each layer (B, H, T, T); none if there is not one for each layer, or each head.

        Where no softmax is called, they are what the values are multiplied by.
        """
        found = self.weights or self.factors
        if len(found) == layers and all(weights.ndim == 4 for weights in found):
            return found
        heads = len(found) // max(layers, 1)
        if heads and len(found) == layers * heads and all(w.ndim == 3 and w.shape[-1] == self.tokens for w in found):
            return [torch.stack(found[n * heads : (n + 1) * heads], dim=1) for n in range(layers)]
        return []


def without_dropout(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of `scaled_dot_product_attention`, of which dropout_p is the fifth and is_causal the sixth."""
    kept = {name: value for name, value in kwargs.items() if name != "dropout_p"}
    if len(args) > 5:
        kept["is_causal"] = args[5]
    return args[:4], kept


def first_tensor(output: Any) -> torch.Tensor | None:
    if isinstance(output, tuple | list):
        return next((tensor for item in output if (tensor := first_tensor(item)) is not None), None)
    return output if isinstance(output, torch.Tensor) else None


def hook_points(subject: Subject) -> Iterator[tuple[nn.Module, tuple[str, ...], bool]]:
    """Where to hook: the module, the stages side by side in its tensor's last dimension, and whether its input."""
    owners: dict[str, set[tuple[str, ...]]] = {}
    blocks: dict[str, list[str]] = {}
    for match in subject.matches:
        owner = match.row.theirs.rpartition(".")[0]
        owners.setdefault(owner, set()).add(tuple(re.sub(r"\.\w+(?=\[|$)", "", name) for name in match.row.ours))
        if layer := re.match(r"trf_blocks\.\d+", match.row.ours[0]):
            blocks.setdefault(layer[0], []).append(owner.replace(".", "/"))
    for owner, named in owners.items():
        if len(named) > 1 or not owner:  # one output cannot be attributed to several matrices
            continue
        module, names = submodule(subject.module, owner), next(iter(named))
        if isinstance(module, nn.MultiheadAttention):  # never calls its out_proj, and returns what that would
            yield module, (re.sub(r"W_query$", "out_proj", names[0]),), False
            continue
        if any(True for _ in module.children()):  # its output is not that of its own matrix alone
            continue
        if isinstance(module, nn.Conv1d) and module.kernel_size != (1,):
            continue
        if names[0] != LOGITS and not re.search(r"att\.out_proj\[", names[0]):  # a head's part of it is no stage
            yield module, names, False
        if re.sub(r"^trf_blocks\.\d+\.|\[.*", "", names[0]) + ".input" in {**BLOCK_STAGES, **MODULE_INPUTS}:
            yield module, (f"{names[0]}.input",), True
        elif any(name.endswith("W_query") for name in names):  # side by side in another order
            yield module, (next(f"{name}.input" for name in names if name.endswith("W_query")),), True
    for stage, paths in blocks.items():
        path = commonpath(paths)
        inside = {name for found in blocks.values() for name in found if name.startswith(f"{path}/")}
        if path and len(set(paths)) > 1 and inside <= set(paths):
            module = submodule(subject.module, path.replace("/", "."))
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                yield module, (f"{stage}.input",), True
                yield module, (stage,), False


def hooked(subject: Subject) -> list[tuple[nn.Module, bool, list[tuple[str, ...]]]]:
    """The hook points by module: one that is in several places has the stages of each call, in execution order."""
    points: dict[tuple[int, bool], tuple[nn.Module, bool, list[tuple[str, ...]]]] = {}
    for module, names, is_input in hook_points(subject):
        points.setdefault((id(module), is_input), (module, is_input, []))[2].append(names)
    order = {name: place for place, name in enumerate(stages(len(subject.blocks)))}
    for _, _, calls in points.values():
        calls.sort(key=lambda names: order.get(re.sub(r"\[.*?\]", "", names[0]), -1))
    return list(points.values())


def batch_first(tensor: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """A tensor of tokens of this shape (B, T) as (B, T, …), if it has them in another order."""
    if tensor is not None and tensor.ndim == 3:
        if tensor.shape[:2] == shape[::-1] != shape:
            return tensor.transpose(0, 1)
        if tensor.shape[::2] == shape and tensor.shape[1] != shape[1]:
            return tensor.transpose(1, 2)
    return tensor


def trace(subject: Subject, input_ids: torch.Tensor, *, dropout: bool = True) -> Activations:
    """The outputs of all stages that can be recorded, in the order in which they ran, and the logits.

    Args:
        dropout: False switches it off everywhere, even where the model applies it in evaluation mode.

    Raises:
        LabError: the model does not run on these tokens.
    """
    warm_up()
    activations: dict[str, torch.Tensor] = {}
    repeated: set[str] = set()
    each_token: dict[tuple[str, ...], list[torch.Tensor]] = {}

    def record(names: tuple[str, ...], value: Any) -> None:
        tensor = batch_first(first_tensor(value), input_ids.shape)
        if tensor is not None and tensor.ndim and tensor.shape[-1] % len(names) == 0:
            for name, part in zip(names, tensor.detach().chunk(len(names), dim=-1), strict=True):
                # A copy: later operations may be in place. Of several calls the first counts.
                activations.setdefault(name, part.clone())

    def hook(calls: list[tuple[str, ...]]) -> Callable[[Any], None]:
        left = iter(calls)

        def each(value: Any) -> None:
            tensor = first_tensor(value)
            if len(calls) == 1 and tensor is not None and tensor.shape[:-1] == input_ids.shape[:1]:
                each_token.setdefault(calls[0], []).append(tensor.detach())
            if names := next(left, ()):
                record(names, value)
            else:
                repeated.update(name for names in calls for name in names)

        return each

    def before(each: Callable[[Any], None]) -> Callable[..., None]:
        return lambda module, args, kwargs: each(args or tuple(kwargs.values()))

    def after(each: Callable[[Any], None]) -> Callable[..., None]:
        return lambda module, args, output: each(output)

    points = hooked(subject)
    bare = BareRecorder(parameters(subject.module), subject.matches, input_ids)
    with ExitStack() as stack:
        for module, is_input, calls in points:
            if is_input:
                handle = module.register_forward_pre_hook(before(hook(calls)), with_kwargs=True)
            else:
                handle = module.register_forward_hook(after(hook(calls)))
            stack.callback(handle.remove)
        for module in {module for module, _, _ in points if not any(True for _ in module.children())}:
            stack.callback(module.register_forward_pre_hook(bare.pause).remove)
            stack.callback(module.register_forward_hook(bare.go_on).remove)
        stack.enter_context(written_out_attention(subject.module))
        stack.enter_context(every_operation())
        attention = stack.enter_context(AttentionRecorder(dropout, input_ids.shape[1]))
        stack.enter_context(bare)
        try:
            output = subject.run(input_ids)
        except Exception as error:  # whatever the user's class raises
            raise LabError(
                f"{subject.name} does not run on tokens of shape {tuple(input_ids.shape)}: "
                f"{type(error).__name__}: {error}; if it must be called in another way, write {FUNCTION}"
            ) from error
    for names, parts in each_token.items():
        if len(parts) == input_ids.shape[1] > 1:  # one token after the other
            for name in names:
                activations.pop(name, None)
            repeated -= set(names)
            record(names, torch.stack(parts, 1))
    result = Activations(joined({**bare.found, **activations}, dim=-1))
    result.repeated = frozenset(re.sub(r"\[.*?\]", "", name) for name in repeated)
    logits = logits_of(subject, output, input_ids)
    weights = attention.by_layer(len(subject.blocks))
    result |= {f"trf_blocks.{n}.att.weights": found for n, found in enumerate(weights)}
    if isinstance(getattr(output, CHOICES, None), torch.Tensor):
        result[CHOICES] = output.mc_logits
    result[LOGITS] = logits
    return result


def logits_of(subject: Subject, output: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits (B, T, V) in a model's output; of a padded vocabulary, those of the real tokens."""
    if isinstance(output, ModelOutput) and not subject.guessed:
        logits = outputs_of(output)
        if logits is None or logits.ndim != 3:
            raise LabError(f"{subject.name} returns {type(output).__name__} instead of logits (B, T, V); return them")
        return logits
    return logits_in(output, input_ids.shape, subject.vocab_size, subject.name)[..., : subject.vocab_size]


def outputs_of(output: Any) -> torch.Tensor | None:
    """The logits (B, T, V) in a model's output; for other heads, their result in three dimensions."""
    if isinstance(output, ModelOutput):
        if "start_logits" in output:
            return torch.stack([output["start_logits"], output["end_logits"]], dim=1)  # (B, 2, T)
        if "logits" not in output:
            return output.get("last_hidden_state")  # (B, T, E)
        if output["logits"].ndim == 2:
            return output["logits"].unsqueeze(1)  # (B, 1, labels)
    return first_tensor(output.logits if hasattr(output, "logits") else output)


@contextmanager
def written_out_attention(module: nn.Module) -> Iterator[None]:
    """Transformers' models with eager attention: hooks cannot see inside a fused kernel."""
    config = getattr(module, "config", None)
    used = getattr(config, "_attn_implementation", None)
    if used is None or not isinstance(module, PreTrainedModel):
        yield
        return
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(used)


@contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module in another floating dtype; a float32 model returns from float64 bit for bit."""
    kept = {p.dtype for p in module.parameters()}
    module.to(dtype)
    try:
        yield
    finally:
        module.to(kept.pop() if len(kept) == 1 else torch.float32)


def double_trace(subject: Subject, input_ids: torch.Tensor, *, dropout: bool) -> Activations | None:
    """The trace in float64; None if the model fails in it, or computes in float32 anywhere."""
    try:
        with in_dtype(subject.module, torch.float64):
            activations = trace(subject, input_ids, dropout=dropout)
    except LabError:
        return None
    return activations if all(tensor.dtype == torch.float64 for tensor in activations.values()) else None
