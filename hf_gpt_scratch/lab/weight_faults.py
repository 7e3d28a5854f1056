"""Which tensors hold other numbers than the reference's, and what was done to each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .trace import LOGITS

# Mistakes in the weights that are one mistake in however many tensors.
COLLECTIVE = ("qkv-order", "block-order", "wrong-tensor", "not-loaded", "rounded-weights", "other-weights")


@dataclass(frozen=True)
class Change:
    """What was done to one tensor of the reference."""

    tensor: str
    name: str
    says: str
    remedy: str

    @property
    def owner(self) -> str:
        """What holds something else: the block if it is all of it, else the module in any block."""
        owner = self.tensor.rpartition(".")[0]
        return ".".join(owner.split(".")[:2]) if self.name == "block-order" else in_any_block(owner)


def weight_changes(reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]) -> list[Change]:
    """The tensors of the candidate that hold other numbers, in execution order, each with what was done to it."""
    tied = torch.equal(reference[f"{LOGITS}.weight"], reference["tok_emb.weight"])
    changes = []
    for name, right in reference.items():
        whole = {f"{name.rpartition('.')[0]}.{kind}" for kind in ("weight", "scale")} & candidate.keys()
        if not whole or (name in candidate and torch.equal(candidate[name], right)):
            continue  # what a module does that is not there is for the forward pass to tell
        told = what_happened(name, right, candidate.get(name), reference)
        if name == f"{LOGITS}.weight" and tied and not torch.equal(candidate[name], candidate["tok_emb.weight"]):
            told = (
                "untied-head",
                "is not tok_emb.weight, to which the reference ties it",
                "out_head.weight = tok_emb.weight",
            )
        if told:
            changes.append(Change(name, *told))
    return changes


def what_happened(name, right, got, reference) -> tuple[str, str, str] | None:
    """The name of the mistake, what it says and the remedy; None if nothing is wrong with this tensor."""
    is_bias = name.endswith((".bias", ".shift"))
    if got is None:
        return (
            ("missing-bias", "is missing", "build the layers with bias=True and load it")
            if is_bias and right.any()
            else None
        )
    if got.shape != right.shape:
        return "other-weights", f"has shape {tuple(got.shape)} instead of {tuple(right.shape)}", "build it alike"
    if right.ndim == 2 and right.shape[0] == right.shape[1] and torch.equal(got, right.T):
        return "not-transposed", "is not transposed", "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: use .T"
    if right.ndim == 2 and torch.equal(got, right.T.reshape(right.shape)):
        return "not-transposed", "is reshaped, not transposed", ".T, never .reshape or .view: the shape alone is right"
    for other, tensor in reference.items():
        if other == name or tensor.shape != got.shape:
            continue
        equal = torch.equal(got, tensor)
        if not equal and not (tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1] and torch.equal(got, tensor.T)):
            continue
        more = "" if equal else ", not transposed"
        block, _, rest = name.partition(".att.W_")
        if rest and other.startswith(f"{block}.att.W_"):
            return (
                "qkv-order",
                f"holds {in_any_block(other).rpartition('.')[0]}{more}",
                "c_attn holds query, key, value in this order",
            )
        if re.sub(r"trf_blocks\.\d+", "", name) == re.sub(r"trf_blocks\.\d+", "", other):
            return (
                "block-order",
                f"holds {'.'.join(other.split('.')[:2])}",
                "sort the blocks by number: as text, 10 comes before 2",
            )
        if tensor.any():
            return "wrong-tensor", f"holds {other}{more}", f"load {name}"
    if is_bias and not got.any():
        return "missing-bias", "is zero: never loaded", "load it"
    if name.endswith(".scale") and bool((got == 1).all()):
        return "not-loaded", "is one everywhere: never loaded", "load it"
    if name == "pos_emb.weight":
        for by in (1, -1, 2):
            shifted = got.roll(-by, 0)
            kept = slice(max(-by, 0), len(got) - max(by, 0))
            if torch.equal(shifted[kept], right[kept]):
                return "off-by-one-positions", f"is shifted by {by} rows", "row i belongs to position i, from 0"
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(got, right.to(dtype).to(got.dtype)):
            return "rounded-weights", f"is rounded to {str(dtype).removeprefix('torch.')}", "load the float32 weights"
    factor = (got.flatten() @ right.flatten() / right.square().sum().clamp(min=1e-30)).item()
    if torch.allclose(got, factor * right, rtol=1e-5, atol=0) and factor:
        return "scaled-weights", f"is {factor:.6g} times the reference's", "load it as it is"
    return "other-weights", "holds other numbers", "load the reference's checkpoint, or train no further"


def grouped(changes: list[Change]) -> list[list[Change]]:
    """The changes of one kind to one tensor in all blocks, together."""
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
    """The tensors' names, with equal ones of several blocks told once: `trf_blocks.{0…2}.att.out_proj.weight`."""
    blocks: dict[str, list[int]] = {}
    for tensor in tensors:
        number = re.search(r"(?<=trf_blocks\.)\d+", tensor)
        blocks.setdefault(re.sub(r"(?<=trf_blocks\.)\d+", "{n}", tensor), []).extend([int(number[0])] if number else [])
    told = []
    for name, numbers in blocks.items():
        run = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[-1] + 1))
        shown = f"{{{numbers[0]}…{numbers[-1]}}}" if run else f"{{{','.join(map(str, numbers))}}}"
        told.append(name.replace("{n}", shown if len(numbers) > 1 else "".join(map(str, numbers))))
    return ", ".join(told[:6]) + (f" and {len(told) - 6} more" if len(told) > 6 else "")
