"""The probabilities that a decoder samples from, and those of each way to be wrong about its settings.

Shapes: V vocabulary. Ids are the columns; a rank is a place in descending order of the logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Logits = torch.Tensor


@dataclass(frozen=True)
class Variant:
    """One way to apply a setting, or not to: what it makes of logits (V,). An empty name is the right one."""

    name: str
    says: str
    remedy: str
    apply: Callable[[Logits, float, Logits], Logits]  # (logits, value, logits before the temperature)
    unnormalized: bool = False  # the probabilities sum to 1 / temperature, which top_p is compared with


def ranks(logits: Logits) -> torch.Tensor:
    return logits.argsort(descending=True).argsort()


def kept(logits: Logits, keep: torch.Tensor) -> Logits:
    return logits.masked_fill(~keep, -math.inf)


def first(logits: Logits, count: int) -> Logits:
    """The `count` largest logits; at least one."""
    return kept(logits, ranks(logits) < max(count, 1))


def nucleus(logits: Logits, p: float) -> int:
    """The size of the smallest set of tokens whose probabilities reach p."""
    shares = logits.softmax(-1).sort(descending=True).values
    return int((shares.cumsum(-1) - shares < p).sum())


def nucleus_unsorted(logits: Logits, p: float, z: Logits) -> Logits:
    shares = logits.softmax(-1)
    keep = shares.cumsum(-1) - shares < p
    return kept(logits, keep)


def nucleus_ascending(logits: Logits, p: float, z: Logits) -> Logits:
    order = logits.argsort()
    shares = logits.softmax(-1)[order]
    keep = torch.zeros_like(logits, dtype=torch.bool)
    keep[order] = shares.cumsum(-1) - shares < p
    return kept(logits, keep)


def by_place(logits: Logits, count: int) -> Logits:
    """The first ids instead of the most probable ones."""
    return kept(logits, torch.arange(len(logits)) < max(count, 1))


DIVIDE = "divide the logits by the temperature, before softmax"
LARGEST = "keep the k largest logits: values, _ = torch.topk(logits, k), then logits < values[..., [-1]] become -inf"
SMALLEST_SET = "keep the tokens whose cumulative probability before them is below top_p: the one that crosses it stays"
ONCE = "take softmax once, of the logits"
TWICE = "softmax is taken of probabilities"
MAP_BACK = "take the ids from the sorted indices: idx_next = indices.gather(-1, drawn)"

TEMPERATURE = [
    Variant("", "", "", lambda z, t, _: z / t),
    Variant("temperature-ignored", "the temperature has no effect on the probabilities", DIVIDE, lambda z, t, _: z),
    Variant(
        "temperature-after-softmax",
        "the probabilities are divided by the temperature, after softmax, so that they do not sum to 1",
        DIVIDE,
        lambda z, t, _: z,
        unnormalized=True,
    ),
    Variant(
        "temperature-multiplied",
        "the logits are multiplied by the temperature, not divided",
        DIVIDE,
        lambda z, t, _: z * t,
    ),
    Variant("temperature-twice", "the logits are divided by the temperature twice", DIVIDE, lambda z, t, _: z / t / t),
    Variant(
        "temperature-after-softmax",
        "softmax is taken of probabilities divided by the temperature",
        DIVIDE,
        lambda z, t, _: z.softmax(-1) / t,
    ),
    Variant(
        "softmax-twice",
        TWICE,
        ONCE,
        lambda z, t, _: (z / t).softmax(-1),
    ),
    Variant(
        "temperature-square-root",
        "the logits are divided by the square root of the temperature",
        DIVIDE,
        lambda z, t, _: z / math.sqrt(t),
    ),
]
TOP_K = [
    Variant("", "", "", lambda z, k, _: first(z, int(k))),
    Variant("top-k-off-by-one", "top_k keeps one token too few", LARGEST, lambda z, k, _: first(z, int(k) - 1)),
    Variant("top-k-off-by-one", "top_k keeps one token too many", LARGEST, lambda z, k, _: first(z, int(k) + 1)),
    Variant("top-k-ignored", "top_k has no effect", LARGEST, lambda z, k, _: z),
    Variant(
        "top-k-smallest",
        "top_k keeps the least probable tokens",
        LARGEST,
        lambda z, k, _: kept(z, ranks(-z) < k),
    ),
    Variant(
        "top-k-zeros",
        "the logits that top_k leaves out become 0, not -inf",
        LARGEST,
        lambda z, k, _: torch.where(ranks(z) < k, z, torch.zeros_like(z)),
    ),
    Variant(
        "top-k-sorted-indices",
        "top_k keeps the first k ids, not the k most probable",
        LARGEST,
        lambda z, k, _: by_place(z, int(k)),
    ),
    Variant(
        "top-k-sorted-indices",
        "the rank within the k largest is taken for an id",
        MAP_BACK,
        lambda z, k, _: torch.cat([z.sort(descending=True).values[: int(k)], torch.full_like(z, -math.inf)[int(k) :]]),
    ),
    Variant(
        "top-k-after-softmax",
        "softmax is taken again of the k largest probabilities",
        "filter the logits, then take softmax once",
        lambda z, k, _: kept(z.softmax(-1), ranks(z) < k),
    ),
    Variant("softmax-twice", TWICE, ONCE, lambda z, k, _: first(z, int(k)).softmax(-1)),
    Variant(
        "top-k-removes-largest",
        "top_k removes the k most probable tokens and keeps the rest",
        LARGEST,
        lambda z, k, _: kept(z, ranks(z) >= k),
    ),
]
TOP_P = [
    Variant("", "", "", lambda z, p, _: first(z, nucleus(z, p))),
    Variant(
        "top-p-off-by-one",
        "top_p keeps one token too few: the one that crosses it is left out",
        SMALLEST_SET,
        lambda z, p, _: first(z, nucleus(z, p) - 1),
    ),
    Variant(
        "top-p-off-by-one", "top_p keeps one token too many", SMALLEST_SET, lambda z, p, _: first(z, nucleus(z, p) + 1)
    ),
    Variant(
        "top-p-off-by-one", "top_p keeps two tokens too many", SMALLEST_SET, lambda z, p, _: first(z, nucleus(z, p) + 2)
    ),
    Variant("top-p-ignored", "top_p has no effect", SMALLEST_SET, lambda z, p, _: z),
    Variant(
        "top-p-complement",
        "top_p keeps a set of probability 1 - top_p",
        SMALLEST_SET,
        lambda z, p, _: first(z, nucleus(z, 1 - p)),
    ),
    Variant(
        "top-p-keeps-tail",
        "top_p keeps the least probable tokens",
        SMALLEST_SET,
        lambda z, p, _: kept(z, ranks(z) >= nucleus(z, p)),
    ),
    Variant(
        "top-p-keeps-tail",
        "top_p keeps the least probable tokens",
        SMALLEST_SET,
        lambda z, p, _: kept(z, ranks(z) >= nucleus(z, p) - 1),
    ),
    Variant(
        "top-p-sorted-indices",
        "the mask of the sorted probabilities is applied to the unsorted ones",
        "scatter the mask back: remove = sorted_remove.scatter(-1, sorted_indices, sorted_remove)",
        lambda z, p, _: by_place(z, nucleus(z, p)),
    ),
    Variant(
        "top-p-sorted-indices",
        "the mask of the sorted probabilities is applied to the unsorted ones",
        "scatter the mask back: remove = sorted_remove.scatter(-1, sorted_indices, sorted_remove)",
        lambda z, p, _: by_place(z, nucleus(z, p) - 1),
    ),
    Variant(
        "top-p-sorted-indices",
        "the rank among the sorted probabilities is taken for an id",
        MAP_BACK,
        lambda z, p, _: first(z, nucleus(z, p)).sort(descending=True).values,
    ),
    Variant("softmax-twice", TWICE, ONCE, lambda z, p, _: first(z, nucleus(z, p)).softmax(-1)),
    Variant(
        "top-p-not-sorted", "top_p sums probabilities in the order of the ids", "sort them first", nucleus_unsorted
    ),
    Variant(
        "top-p-ascending",
        "top_p sums probabilities from the smallest on",
        "sort them in descending order",
        nucleus_ascending,
    ),
]
SETTINGS = {"temperature": TEMPERATURE, "top_k": TOP_K, "top_p": TOP_P}


def right_distributions(z: Logits, values: dict[str, float]) -> list[torch.Tensor]:
    """What well-known programs make of these settings: top_p is measured with or without temperature and top_k."""
    t, k, p = values.get("temperature", 1.0), values.get("top_k"), values.get("top_p")
    scaled = z / t
    count = len(z) if k is None else int(k)
    if p is None:
        return [first(scaled, count).softmax(-1)]
    sizes = {nucleus(x, p) for x in (scaled, z, first(scaled, count), first(z, count))}
    return [first(scaled, min(size, count)).softmax(-1) for size in sorted(sizes)]


def variants_that_give(setting: str, z: Logits, value: float, found: torch.Tensor, bound: float) -> list[int]:
    """The variants of one setting, alone, that give these probabilities (V,)."""
    return [
        n for n, variant in enumerate(SETTINGS[setting]) if close(variant.apply(z, value, z).softmax(-1), found, bound)
    ]


def close(right: torch.Tensor, found: torch.Tensor, bound: float) -> bool:
    return right.shape == found.shape and bool((right - found).abs().max() <= bound)
