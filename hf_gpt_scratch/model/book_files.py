"""What the book's code saves, as the state dict of the book's `GPTModel`.

The book has several models with one function: heads in a list, weights without a layer, query, key and value in one,
PyTorch's norms, adapters, a classifier. `parts` tells from names and shapes alone how each tensor of a `GPTModel` is
made of theirs, so that tensors in memory and tensors in a file go the same way.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")

# Under which names training scripts put the state dict: the book's first, then Lightning's, nanoGPT's, DPO's.
PLACES = ("model_state_dict", "state_dict", "model", "state")
# What torch.compile, DataParallel and a model around the model put before names.
PREFIX = re.compile(r"(_orig_mod\.|module\.|model\.)+")
QKV = ("W_query", "W_key", "W_value")
MASK = re.compile(r"trf_blocks\.\d+\.att\.(.*\.)?mask")  # a buffer

# What else has names like the book's, and why it is no GPT-2.
OTHERS = {
    r".*lora_[AB]\..*": "has PEFT's adapters: save what model.merge_and_unload() returns",
    r".*\.att\.W_(DKV|UK|UV)\..*": "has latent attention, which GPT-2 does not have, and cannot be converted",
    r".*\.ff\.(gate|experts|fc1\.\d+)\..*": "has experts, which GPT-2 does not have, and cannot be converted",
}


@dataclass(frozen=True)
class Part:
    """How one tensor of a `GPTModel` is made: `make` takes the tensors named in `sources`."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]

    def then(self, step: Callable[[torch.Tensor], torch.Tensor]) -> "Part":
        return Part(self.sources, lambda tensors: step(self.make(tensors)))


def weights_in(content: Mapping[Any, Any]) -> tuple[str | None, Mapping[Any, Any]]:
    """The state dict in what a file holds, and the name under which it lies there; None if it is all of it.

    Raises:
        ValueError: there are several.
    """
    found = [name for name in PLACES if isinstance(content.get(name), Mapping) and content[name]]
    if len(found) > 1:
        raise ValueError(
            f"has a dict under each of {', '.join(map(repr, found))}, and only one can be the weights; save that one "
            "alone"
        )
    return (found[0], content[found[0]]) if found else (None, content)


def bare(names: Iterable[str]) -> dict[str, str]:
    """Names without the prefixes, by the names with them.

    Raises:
        ValueError: two become one.
    """
    found: dict[str, str] = {}
    for name in names:
        short = PREFIX.sub("", name) if PREFIX.match(name) else name
        if short in found:
            raise ValueError(
                f"has a tensor twice, {found[short][:200]!r} and {name[:200]!r}, with and without a prefix such as "
                "'module.'; keep one of them"
            )
        found[short] = name
    return {name: short for short, name in found.items()}


def shared(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a file of safetensors, whose `save_model` keeps one name, the head's, of a tied model's matrix."""
    if "out_head.weight" in tensors and "tok_emb.weight" not in tensors:
        return {"tok_emb.weight" if name == "out_head.weight" else name: one for name, one in tensors.items()}
    return dict(tensors)


def refusal(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why a state dict with names like the book's is no GPT-2, and what to do; None if nothing speaks against it."""
    for pattern, words in OTHERS.items():
        if found := next((name for name in shapes if re.fullmatch(pattern, name)), None):
            return f"holds {found[:200]!r}, so it {words}"
    queries, keys = (shapes.get(f"trf_blocks.0.att.{name}.weight") for name in ("W_query", "W_key"))
    if queries and keys and len(queries) == len(keys) == 2 and queries[1] == keys[1] and queries[0] > keys[0]:
        return (
            f"has W_query of shape {list(queries)} and W_key of shape {list(keys)}, so its heads share keys and "
            "values; GPT-2's do not, and it cannot be converted"
        )
    norm = next((name for name in shapes if re.fullmatch(r"trf_blocks\.0\.norm1\.(weight|scale)", name)), "")
    shift = norm.replace("weight", "bias").replace("scale", "shift")
    if norm and shift not in shapes and "pos_emb.weight" not in shapes:
        return (
            f"holds {norm!r} without {shift!r}, and no pos_emb.weight, so it has RMSNorm and rotary positions, as the "
            "book's Llama, Qwen and Gemma; GPT-2 has neither, and it cannot be converted"
        )
    vocabulary, head = (shapes.get(name) for name in ("tok_emb.weight", "out_head.weight"))
    if vocabulary and head and len(head) == 2 and not is_classifier(shapes):
        if head[0] != vocabulary[0]:
            return (
                f"has out_head.weight of shape {list(head)} for a vocabulary of {vocabulary[0]}, more than there are "
                "tokens; cut it, or take weights of one model"
            )
        if "out_head.bias" in shapes:
            return "holds 'out_head.bias', but GPT-2's output head has no bias, and it cannot be converted"
    return None


def is_classifier(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether the head scores labels, as in chapter 6, and not the vocabulary."""
    vocabulary = shapes.get("tok_emb.weight")
    head = shapes.get("out_head.weight") or shapes.get("out_head.linear.weight")
    return bool(vocabulary and head and len(head) == 2 and head[0] < vocabulary[0])


def has_adapters(names: Iterable[str]) -> bool:
    """Whether it has the adapters of appendix E."""
    return any(name.endswith(".lora.A") for name in names)


def heads_in_a_list(names: Iterable[str]) -> int | None:
    """How many heads the first layer has, if it has them in a list."""
    found = {int(n[1]) for n in (re.match(r"trf_blocks\.0\.att\.heads\.(\d+)\.W_query\.", name) for name in names) if n}
    return len(found) or None


def parts(shapes: Mapping[str, Sequence[int]], lora_scale: float | None = None) -> dict[str, Part]:
    """How the tensors of a `GPTModel`, or `score` of a classifier, are made; names that nobody knows stay as they are.

    Args:
        lora_scale: what the product of an adapter's A and B is multiplied by, which no file tells.

    Raises:
        ValueError: it is no GPT-2, has two tensors for one, or has adapters and `lora_scale` is missing.
    """
    if told := refusal(shapes):
        raise ValueError(told)
    if has_adapters(shapes) != (lora_scale is not None):
        raise ValueError(
            "has the adapters of appendix E, whose scale no tensor tells; pass lora_scale, in a command --lora-scale: "
            "alpha / rank, or alpha where LoRALayer multiplies by that alone, as in the book's first printing"
            if lora_scale is None
            else f"has no adapters, but got lora_scale={lora_scale}; leave it out"
        )
    _check_heads(shapes)
    found = {name: Part((name,), lambda tensors: tensors[0]) for name in shapes}
    if lora_scale is not None:
        found = _once(_merged(found, shapes, lora_scale))
    for step in (_renamed, _split, _joined):
        found = _once(step(found))
    if is_classifier(shapes):
        found = {re.sub(r"^out_head\.", "score.", name): part for name, part in found.items()}
    return {name: part for name, part in found.items() if not MASK.fullmatch(name)}


def _once(named: Iterable[tuple[str, Part]]) -> dict[str, Part]:
    """The parts by name.

    Raises:
        ValueError: a tensor would be made in two ways.
    """
    found: dict[str, Part] = {}
    for name, part in named:
        if name in found:
            both = " and ".join(repr(one.sources[0][:200]) for one in (found[name], part))
            raise ValueError(f"has two tensors for {name[:200]!r}: {both}; keep one of them")
        found[name] = part
    return found


def _check_heads(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises ValueError unless heads in a list are as many and as large in all layers, for query, key and value."""
    heads: dict[str, dict[int, int]] = {}
    for name, shape in shapes.items():
        if head := re.fullmatch(r"trf_blocks\.(\d+)\.att\.heads\.(\d+)\.(W_\w+)\.weight", name):
            heads.setdefault(f"trf_blocks.{head[1]}.att.heads.*.{head[3]}", {})[int(head[2])] = shape[0] if shape else 0
    layers = {found[1] for name in shapes if (found := re.match(r"trf_blocks\.(\d+)\.", name))}
    if not heads:
        return
    [first, *_] = heads.values()
    expected = dict.fromkeys(range(len(first)), next(iter(first.values())))
    for name in (f"trf_blocks.{layer}.att.heads.*.{W}" for layer in sorted(layers, key=int) for W in QKV):
        if heads.get(name) != expected:
            sizes = ", ".join(f"{i}: {size}" for i, size in sorted(heads.get(name, {}).items())) or "no heads"
            raise ValueError(
                f"has heads in a list, but {name} has {sizes} (number: size), and not {len(expected)} heads of size "
                f"{expected[0]} as GPT-2 would in every layer, for query, key and value; it cannot be converted"
            )


def _merged(found: dict[str, Part], shapes: Mapping[str, Sequence[int]], scale: Any) -> Iterator[tuple[str, Part]]:
    """`linear.weight`, `lora.A` and `lora.B` as one weight; computed in float32, in the weight's own dtype."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"got lora_scale={str(scale)[:80]!r}, but it must be a finite number, such as alpha / rank")

    def merged(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        weight, a, b = tensors  # (out, in), (in, rank), (rank, out)
        found = (weight.float() + scale * (a.float() @ b.float()).T).to(weight.dtype)
        if not found.is_meta and not found.isfinite().all() and all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(
                f"has adapters that, merged with lora_scale={scale}, exceed {weight.dtype}; give the scale that they "
                "were trained with, such as alpha / rank"
            )
        return found

    for name, part in found.items():
        module = name.removesuffix(".linear.weight")
        adapter = (f"{module}.lora.A", f"{module}.lora.B")
        if module != name and all(half in found for half in adapter):
            weight, a, b = (list(shapes[one]) for one in (name, *adapter))
            if not (len(weight) == len(a) == len(b) == 2 and a[0] == weight[1] and a[1] == b[0] and b[1] == weight[0]):
                raise ValueError(
                    f"has adapters that do not fit: {module}.lora.A {a} and lora.B {b} for linear.weight {weight}, but "
                    "these must be [in, rank], [rank, out] and [out, in]; take those of one model"
                )
            yield f"{module}.weight", Part((name, *adapter), merged)
        elif name.endswith(".linear.bias"):
            yield name.replace(".linear.bias", ".bias"), part
        elif not (name.endswith((".lora.A", ".lora.B")) and f"{name[:-7]}.linear.weight" in found):
            yield name, part


def _renamed(found: dict[str, Part]) -> Iterator[tuple[str, Part]]:
    """PyTorch's norms and `att.proj` under the book's names."""
    for name, part in found.items():
        if norm := re.fullmatch(r"((?:trf_blocks\.\d+\.norm[12])|final_norm)\.(weight|bias)", name):
            name = f"{norm[1]}.{'scale' if norm[2] == 'weight' else 'shift'}"
        yield name.replace(".att.proj.", ".att.out_proj."), part


def bare_matrices(names: Iterable[str]) -> bool:
    """Whether query, key and value are matrices without an `nn.Linear`."""
    return any(re.fullmatch(r".*\.att\.W_(query|key|value)", name) for name in names)


BARE = (
    "W_query, W_key and W_value are bare matrices, which are taken as [in, out], for x @ W; nothing in a square one "
    "tells its orientation"
)


def _split(found: dict[str, Part]) -> Iterator[tuple[str, Part]]:
    """Query, key and value apart, each an `nn.Linear`; bare matrices are `[in, out]`."""
    for name, part in found.items():
        if ".att.qkv." in name:
            for i, one in enumerate(QKV):
                yield name.replace("qkv", one), part.then(partial(_third, i))
        elif bare_matrices([name]):
            yield f"{name}.weight", part.then(lambda tensor: tensor.transpose(0, -1).contiguous())
        elif letter := re.fullmatch(r"(.*\.att)\.bias_([qkv])", name):
            yield f"{letter[1]}.{QKV['qkv'.index(letter[2])]}.bias", part
        else:
            yield name, part


def _third(i: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.tensor_split(3)[i].contiguous()


def _joined(found: dict[str, Part]) -> Iterator[tuple[str, Part]]:
    """The heads of a list as one layer each for query, key and value."""
    heads: dict[str, dict[int, Part]] = {}
    for name, part in found.items():
        if head := re.fullmatch(r"(.*\.att)\.heads\.(\d+)\.(W_(?:query|key|value)\.\w+)", name):
            heads.setdefault(f"{head[1]}.{head[3]}", {})[int(head[2])] = part
        else:
            yield name, part
    for name, ones in heads.items():
        in_order = [ones[i] for i in sorted(ones)]

        def joined(tensors: Sequence[torch.Tensor], in_order=in_order) -> torch.Tensor:
            given = iter(tensors)
            return torch.cat([part.make([next(given) for _ in part.sources]) for part in in_order])

        yield name, Part(tuple(source for part in in_order for source in part.sources), joined)
