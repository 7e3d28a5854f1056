"""What the book's code saves, as the state dict of the book's `GPTModel`.

The book has several models with one function: heads in a list, weights without a layer, query, key and value in one,
PyTorch's norms, adapters, a classifier. `parts` tells from names and shapes alone how each tensor of a `GPTModel` is
made of theirs, so that tensors in memory and tensors in a file go the same way.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        ValueError: it is no GPT-2, or has adapters and `lora_scale` is missing.
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
    found = {name: Part((name,), lambda tensors: tensors[0]) for name in shapes}
    if lora_scale is not None:
        found = _merge(found, lora_scale)
    for step in (_rename, _split, _join):
        found = step(found)
    if is_classifier(shapes):
        found = {re.sub(r"^out_head\.", "score.", name): part for name, part in found.items()}
    return {name: part for name, part in found.items() if not re.fullmatch(r"trf_blocks\.\d+\.att\.(.*\.)?mask", name)}


def _merge(found: dict[str, Part], scale: float) -> dict[str, Part]:
    """`linear.weight`, `lora.A` and `lora.B` as one weight; computed in float32, in the weight's own dtype."""

    def merged(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        weight, a, b = tensors  # (out, in), (in, rank), (rank, out)
        return (weight.float() + scale * (a.float() @ b.float()).T).to(weight.dtype)

    new = {}
    for name, part in found.items():
        module = name.removesuffix(".linear.weight")
        adapter = (f"{module}.lora.A", f"{module}.lora.B")
        if module != name and all(half in found for half in adapter):
            new[f"{module}.weight"] = Part((name, *adapter), merged)
        elif name.endswith(".linear.bias"):
            new[name.replace(".linear.bias", ".bias")] = part
        elif not (name.endswith((".lora.A", ".lora.B")) and f"{name[:-7]}.linear.weight" in found):
            new[name] = part
    return new


def _rename(found: dict[str, Part]) -> dict[str, Part]:
    """PyTorch's norms and `att.proj` under the book's names."""
    new = {}
    for name, part in found.items():
        if norm := re.fullmatch(r"((?:trf_blocks\.\d+\.norm[12])|final_norm)\.(weight|bias)", name):
            name = f"{norm[1]}.{'scale' if norm[2] == 'weight' else 'shift'}"
        new[name.replace(".att.proj.", ".att.out_proj.")] = part
    return new


def _split(found: dict[str, Part]) -> dict[str, Part]:
    """Query, key and value apart, each an `nn.Linear`; bare matrices are `[in, out]`."""
    new = {}
    for name, part in found.items():
        if ".att.qkv." in name:
            for i, one in enumerate(QKV):
                new[name.replace("qkv", one)] = part.then(partial(_third, i))
        elif re.fullmatch(r".*\.att\.W_(query|key|value)", name):
            new[f"{name}.weight"] = part.then(lambda tensor: tensor.transpose(0, -1).contiguous())
        elif letter := re.fullmatch(r"(.*\.att)\.bias_([qkv])", name):
            new[f"{letter[1]}.{QKV['qkv'.index(letter[2])]}.bias"] = part
        else:
            new[name] = part
    return new


def _third(i: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.tensor_split(3)[i].contiguous()


def _join(found: dict[str, Part]) -> dict[str, Part]:
    """The heads of a list as one layer each for query, key and value."""
    new: dict[str, Part] = {}
    heads: dict[str, dict[int, Part]] = {}
    for name, part in found.items():
        if head := re.fullmatch(r"(.*\.att)\.heads\.(\d+)\.(W_(?:query|key|value)\.\w+)", name):
            heads.setdefault(f"{head[1]}.{head[3]}", {})[int(head[2])] = part
        else:
            new[name] = part
    for name, ones in heads.items():
        in_order = [ones[i] for i in sorted(ones)]

        def joined(tensors: Sequence[torch.Tensor], in_order=in_order) -> torch.Tensor:
            given = iter(tensors)
            return torch.cat([part.make([next(given) for _ in part.sources]) for part in in_order])

        new[name] = Part(tuple(source for part in in_order for source in part.sources), joined)
    return new
