"""Which tensors differ from the reference's, and what was done to each."""

import re
from dataclasses import dataclass

import torch

from ..errors import few
from .simulate import Weights
from .trace import LOGITS

# Mistakes that count once, however many tensors have them.
COLLECTIVE = ("qkv-order", "block-order", "wrong-tensor", "not-loaded", "rounded-weights", "other-weights")

# A mistake's name, its description of the tensor, and the remedy.
What = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """What was done to one of the reference's tensors."""

    tensor: str
    name: str
    says: str
    remedy: str

    @property
    def owner(self) -> str:
        """The whole block for block-order, else the module without its block."""
        owner = self.tensor.rpartition(".")[0]
        return ".".join(owner.split(".")[:2]) if self.name == "block-order" else in_any_block(owner)


def weight_changes(reference: Weights, candidate: Weights) -> list[Change]:
    """What was done to each of the candidate's tensors that differs from the reference's, in execution order.

    A module that the candidate lacks entirely is left to the diagnosis of the forward pass.
    """
    changes = []
    for name, right in reference.items():
        module, got = name.rpartition(".")[0], candidate.get(name)
        if f"{module}.weight" not in candidate and f"{module}.scale" not in candidate:
            continue
        if got is not None and torch.equal(got, right):
            continue
        if name == f"{LOGITS}.weight" and untied(reference, candidate):
            what: What | None = (
                "untied-head",
                "is not tok_emb.weight, to which the reference ties it",
                "out_head.weight = tok_emb.weight",
            )
        elif name in (f"{LOGITS}.weight", "tok_emb.weight") and untied(candidate, reference):
            other = "tok_emb" if name.startswith(LOGITS) else LOGITS
            says = f"is the same matrix as {other}.weight, but the checkpoint has a head of its own"
            what = "wrong-head", says, "give the head a matrix of its own, and load both"
        else:
            what = what_happened(name, right, got, reference)
        if what:
            changes.append(Change(name, *what))
    return changes


def untied(reference: Weights, candidate: Weights) -> bool:
    """Whether the reference's head is its token embedding, and the candidate's is not."""
    both = f"{LOGITS}.weight", "tok_emb.weight"
    first, second = ([weights[name] for name in both if name in weights] for weights in (reference, candidate))
    return len(first) == len(second) == 2 and torch.equal(*first) and not torch.equal(*second)


def what_happened(name: str, right: torch.Tensor, got: torch.Tensor | None, reference: Weights) -> What | None:
    """What turned the reference's tensor `right` into `got`; None if it is a missing bias that is zero anyway."""
    if got is None:
        missing = "missing-bias", "is missing", "build the layers with bias=True and load it"
        return missing if is_bias(name) and right.any() else None
    if got.shape != right.shape:
        return (
            "other-weights",
            f"has shape {tuple(got.shape)} instead of {tuple(right.shape)}",
            "build both with the same sizes",
        )
    return (
        not_finite(got)
        or other_way_round(right, got)
        or another_tensor(name, got, reference)
        or never_loaded(name, got)
        or shifted(name, right, got)
        or rounded(right, got)
        or scaled(right, got)
        or ("other-weights", "holds other values", "load the reference's checkpoint, without further training")
    )


def not_finite(got: torch.Tensor) -> What | None:
    broken = int((~got.isfinite()).sum())
    says = f"has {broken:,} of {got.numel():,} values that are NaN or infinite"
    return ("nan-weights", says, "load the checkpoint again, or an earlier one") if broken else None


def is_bias(name: str) -> bool:
    return name.endswith((".bias", ".shift"))


def is_transpose(matrix: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a square matrix is the other one transposed."""
    return matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, other.T)


def other_way_round(right: torch.Tensor, got: torch.Tensor) -> What | None:
    if is_transpose(got, right):
        return "not-transposed", "is not transposed", "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: use .T"
    if right.ndim == 2 and torch.equal(got, right.T.reshape(right.shape)):
        return (
            "not-transposed",
            "is reshaped, not transposed",
            "use .T, never .reshape or .view",
        )
    return None


def another_tensor(name: str, got: torch.Tensor, reference: Weights) -> What | None:
    """Whether it is another tensor of the reference: another of query, key and value, another block's, or any."""
    for other, tensor in reference.items():
        if other == name or tensor.shape != got.shape:
            continue
        if torch.equal(got, tensor):
            turned = ""
        elif is_transpose(got, tensor):
            turned = ", not transposed"
        else:
            continue
        block, _, rest = name.partition(".att.W_")
        if rest and other.startswith(f"{block}.att.W_"):
            says = f"holds {in_any_block(other).rpartition('.')[0]}{turned}"
            return "qkv-order", says, "c_attn holds query, key, value in this order"
        if in_any_block(name) == in_any_block(other):
            says = f"holds {'.'.join(other.split('.')[:2])}"
            return "block-order", says, "sort the blocks by number: as text, 10 comes before 2"
        if tensor.any():
            return "wrong-tensor", f"holds {other}{turned}", f"load {name}"
    return None


def never_loaded(name: str, got: torch.Tensor) -> What | None:
    if is_bias(name) and not got.any():
        return "missing-bias", "is all zeros: never loaded", "load it"
    if name.endswith(".scale") and bool((got == 1).all()):
        return "not-loaded", "is all ones: never loaded", "load it"
    return None


def shifted(name: str, right: torch.Tensor, got: torch.Tensor) -> What | None:
    for by in (1, -1, 2) if name == "pos_emb.weight" else ():
        kept = slice(max(-by, 0), len(got) - max(by, 0))
        if torch.equal(got.roll(-by, 0)[kept], right[kept]):
            return "off-by-one-positions", f"is shifted by {by} rows", "row i belongs to position i, from 0"
    return None


def rounded(right: torch.Tensor, got: torch.Tensor) -> What | None:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(got, right.to(dtype).to(got.dtype)):
            return "rounded-weights", f"is rounded to {str(dtype).removeprefix('torch.')}", "load the float32 weights"
    return None


def scaled(right: torch.Tensor, got: torch.Tensor) -> What | None:
    """Whether it is a multiple of the reference's, by least squares."""
    factor = (got.flatten() @ right.flatten() / right.square().sum().clamp(min=1e-30)).item()
    if factor and torch.allclose(got, factor * right, rtol=1e-5, atol=0):
        return "scaled-weights", f"is {factor:.6g} times the reference's", "load it without rescaling"
    return None


def grouped(changes: list[Change]) -> list[list[Change]]:
    """Groups changes of one kind to the same tensor of several blocks."""
    groups: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        role = in_any_block(change.tensor)
        if change.name in COLLECTIVE:
            role = ""
        elif change.name == "missing-bias":
            role = role if "W_" not in role else "qkv"
        groups.setdefault((change.name, role), []).append(change)
    return list(groups.values())


def in_any_block(tensor: str) -> str:
    return re.sub(r"^trf_blocks\.\d+\.", "", tensor)


def listed(tensors: list[str]) -> str:
    """The tensors' names, those of several blocks as one: `trf_blocks.{0…2}.att.out_proj.weight`."""
    blocks: dict[str, list[str]] = {}
    for tensor in tensors:
        numbers = blocks.setdefault(re.sub(r"(?<=trf_blocks\.)\d+", "{n}", tensor), [])
        numbers += re.findall(r"(?<=trf_blocks\.)\d+", tensor)
    return few([name.replace("{n}", numbered(numbers)) for name, numbers in blocks.items()], 6)


def numbered(numbers: list[str]) -> str:
    """3; {3,7}; {0…2}."""
    if len(numbers) < 2:
        return "".join(numbers)
    first, last = int(numbers[0]), int(numbers[-1])
    run = numbers == [str(n) for n in range(first, last + 1)]
    return f"{{{first}…{last}}}" if run else f"{{{','.join(numbers)}}}"
