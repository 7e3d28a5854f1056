"""Where batches come from: the arrays of token ids that a script holds, and the windows cut out of them."""

import itertools
from typing import Any

import torch

from .record import Forward, Recorder, tensors_in

# Ids in an array, arrays, and windows that are looked at.
LONGEST, MOST, WINDOWS = 20_000_000, 64, 64
# A window shorter than this is in many texts by chance.
SHORTEST = 8


def id_arrays(frames: list[dict[str, Any]]) -> list[tuple[str, torch.Tensor]]:
    """The arrays of integers, with their names, that the script's variables hold."""
    found: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()

    def look(name: str, value: Any, depth: int) -> None:
        if len(found) >= MOST or id(value) in seen:
            return
        seen.add(id(value))
        array = as_ids(value)
        if array is not None:
            found.append((name, array))
        elif depth and isinstance(value, dict) and len(value) < 200:
            for key, item in list(value.items()):
                look(f"{name}[{key!r}]", item, depth - 1)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)):
            for key, item in list(vars(value).items()):
                look(f"{name}.{key}", item, depth - 1)

    for frame in frames:
        for name, value in list(frame.items()):
            if not name.startswith("__"):
                look(name, value, 2)
    return found


def as_ids(value: Any) -> torch.Tensor | None:
    """A one-dimensional array of integers as a tensor, or None."""
    try:
        if isinstance(value, torch.Tensor):
            integer = not value.is_floating_point() and value.dtype != torch.bool
            flat = value.dim() == 1 or (value.dim() == 2 and 1 in value.shape)
            if integer and flat and 2 * SHORTEST < value.numel() < LONGEST:
                return value.detach().reshape(-1).long().cpu()
            return None
        kind = type(value)
        if kind.__module__ == "numpy" and hasattr(value, "dtype"):
            if value.dtype.kind in "iu" and value.ndim == 1 and 2 * SHORTEST < value.size < LONGEST:
                return torch.from_numpy(value.astype("int64"))
            return None
        if kind is list and 2 * SHORTEST < len(value) < 2_000_000 and all(type(item) is int for item in value):
            return torch.tensor(value)
    except Exception:  # an object of the user's that is not what it seems
        return None
    return None


def glued(frames: list[dict[str, Any]]) -> tuple[str, str] | None:
    """The names of a list of documents and of the text that they were joined to, if nothing marks where each ends."""
    values = {name: value for frame in reversed(frames) for name, value in frame.items() if not name.startswith("__")}
    texts = {name: value for name, value in values.items() if type(value) is str and len(value) > 100}
    arrays = id_arrays(frames)
    for name, documents in values.items():
        if type(documents) is not list or not 3 <= len(documents) <= 100_000:
            continue
        if all(type(one) is str and len(one) >= 20 for one in documents):
            if len({one[-1] for one in documents}) == 1 and documents[0][-1] != ".":
                continue
            for other, text in texts.items():
                if text in ("".join(documents), " ".join(documents)):
                    return name, other
        elif all(type(one) is list and len(one) >= SHORTEST and type(one[0]) is int for one in documents):
            if len({one[-1] for one in documents}) == 1:
                continue
            joined = torch.tensor([token for one in documents for token in one])
            for other, array in arrays:
                if torch.equal(array, joined):
                    return name, other
    return None


def windows(forwards: list[Forward]) -> list[torch.Tensor]:
    rows = [row for forward in forwards if forward.ids is not None for row in forward.ids.cpu().long()]
    return [row for row in rows if len(row) >= SHORTEST][:WINDOWS]


def places(array: torch.Tensor, window: torch.Tensor) -> list[int]:
    """Where the window is in the array; at most two places."""
    last = len(array) - len(window) + 1
    if last <= 0:
        return []
    starts = (array[:last] == window[0]).nonzero()[:, 0]
    for offset in range(1, len(window)):
        if not len(starts):
            break
        starts = starts[array[starts + offset] == window[offset]]
    return starts[:2].tolist()


def overlap(
    recorder: Recorder, trained: list[tuple[int, Forward]], frames: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The finding that evaluation reads what training reads, or None.

    Windows are compared by their place in the data, never by their content alone, which a text that repeats itself has
    in both.
    """
    evaluations = [forward for forward in recorder.evaluations if forward.losses and forward.ids is not None]
    if not evaluations or not trained:
        return None
    remedy = "evaluate on a part of the text that training never reads, split before the windows are made"
    found = of_loaders(recorder) if recorder.loaders else of_arrays(evaluations, trained, frames)
    return None if found is None else dict(where=evaluations[-1].where, remedy=remedy) | found


def of_arrays(evaluations: list[Forward], trained: list[tuple[int, Forward]], frames: list[dict[str, Any]]):
    """The same for windows that are cut out of arrays: those that the script's variables hold."""
    training = windows([forward for _, forward in trained])
    passes = [windows([forward]) for forward in evaluations]
    if len(training) < 2 or sum(map(len, passes)) < 4:
        return None
    arrays = sorted(id_arrays(frames), key=lambda item: len(item[1]))
    for name, array in arrays:
        mine = [places(array, row) for row in training]
        if not all(mine):
            continue
        # How often the text has the same window twice by chance.
        repeated = sum(len(one) > 1 for one in mine) / len(mine)
        if repeated > 0.5:
            return None
        found = [[places(array, row) for row in rows] for rows in passes]
        elsewhere = [one for places_ in found if not all(places_) for one in places_]
        if elsewhere:  # a pass that stays in the array may be meant for the training loss
            inside = sum(map(bool, elsewhere))
            known = len(elsewhere) >= 4 and inside > (0.25 + 1.5 * repeated) * len(elsewhere)
            return facts_of(name, array, inside, len(elsewhere)) if known else None
        theirs = [one[0] for places_ in found for one in places_ if len(one) == 1]
        starts = [one[0] for one in mine if len(one) == 1]
        within = sum(min(starts) <= start <= max(starts) for start in theirs)
        # Another array that is not part of this one, or that overlaps it, is what the evaluation should have read.
        shorter = [other for _, other in arrays if other is not array and len(other) < len(arrays[-1][1])]
        pieces = [(other, places(array, other[: 4 * SHORTEST])) for other in shorter]
        others = any(not piece or 4 * len(other) > len(array) for other, piece in pieces)
        if theirs and (within == len(theirs) or (others and 2 * within > len(theirs))):
            return facts_of(name, array, sum(map(len, passes)), sum(map(len, passes)))
        return None
    return None


def facts_of(name: str, array: torch.Tensor, inside: int, total: int) -> dict[str, Any]:
    return dict(
        says=f"{inside} of {total} windows of the evaluation are in {name}, out of which those of training are cut",
        proof=f"{name} ({len(array)} ids) is the shortest array that has all windows of training",
        figures={"windows": total, "inside": inside},
    )


def of_loaders(recorder: Recorder) -> dict[str, Any] | None:
    """The same for data loaders: by the indices of their datasets, or by the text that these were cut out of."""
    facts = [facts for _, facts in recorder.loaders]
    training = [one for one in facts if one["grad"]]
    used = {one["loader"] for one in training}
    for other in facts:
        if other["grad"] or other["loader"] in used:
            continue
        for mine in training:
            found = shared(mine, other)
            if found is not None:
                return found
    return None


def base_of(facts: dict[str, Any]) -> tuple[Any, list[int] | None]:
    """The dataset under subsets, and the indices of it that the loader reads; None for all."""
    dataset, indices = facts["dataset"], facts["indices"]
    while isinstance(dataset, torch.utils.data.Subset):
        own = [int(index) for index in dataset.indices]
        indices = own if indices is None else [own[index] for index in indices]
        dataset = dataset.dataset
    return dataset, indices


def shared(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any] | None:
    (dataset, indices), (checked, its) = base_of(mine), base_of(other)
    try:
        if dataset is checked:
            number = len(dataset)
            first = set(range(number) if indices is None else indices)
            second = sorted(set(range(number) if its is None else its))
            reach = reach_of(dataset)
            common = [i for i in second if any(i + step in first for step in range(-reach, reach + 1))]
            if 2 * len(common) <= len(second) or not second:
                return None
            how = "in both" if reach == 0 else "in windows of both, which overlap"
            return dict(
                says=f"{len(common)} of {len(second)} items of the evaluation's dataset are {how}",
                proof=f"both loaders read one dataset of {number} items; the indices were compared"
                + (f", and items up to {reach} apart share tokens" if reach else ""),
                figures={"items": len(second), "shared": len(common)},
            )
        text, part = stream(dataset), stream(checked)
        if text is None or part is None:
            return same_items(dataset, indices, checked, its)
        length = min(len(part), 32)
        starts = range(0, len(part) - length + 1, max(1, (len(part) - length) // 40))
        found = [places(text, part[start : start + length]) for start in starts]
        if sum(len(one) > 1 for one in found) * 5 > len(found):
            return None  # a text that repeats itself
        inside = sum(len(one) == 1 for one in found)
        if 2 * inside <= len(found):
            return None
        return dict(
            says=f"{inside} of {len(found)} pieces of the evaluation's text are in the training text too",
            proof=f"pieces of {length} tokens were looked for in the {len(text)} tokens that the training dataset "
            "was cut out of; each was found in one place",
            figures={"pieces": len(found), "inside": inside},
        )
    except Exception:  # a dataset of the user's that cannot be read again
        return None


def item(dataset: Any, index: int) -> torch.Tensor | None:
    """The ids of an item: its first one-dimensional tensor of integers."""
    for tensor in tensors_in(dataset[index]):
        if tensor.dim() == 1 and not tensor.is_floating_point() and len(tensor) >= SHORTEST:
            return tensor.long().cpu()
    return None


def same_items(dataset: Any, indices: list[int] | None, checked: Any, its: list[int] | None) -> dict[str, Any] | None:
    """The same for datasets of separate texts, which are compared as wholes."""

    def texts(data: Any, chosen: list[int] | None) -> list[tuple[int, ...]]:
        found = []
        for index in (range(len(data)) if chosen is None else chosen)[:5000]:
            value = data[index]
            lists = [value] if as_ids(value) is not None else list(tensors_in(value))
            if isinstance(value, list) and value and all(type(one) is int for one in value):
                found.append(tuple(value))
            elif lists and lists[0].dim() == 1:
                found.append(tuple(lists[0].tolist()))
        return found

    mine, theirs = texts(dataset, indices), texts(checked, its)
    known = set(mine)
    if len(theirs) < 4 or 5 * len(known) < 4 * len(mine):
        return None  # texts that repeat themselves
    common = sum(text in known for text in theirs)
    if 2 * common <= len(theirs):
        return None
    return dict(
        says=f"{common} of {len(theirs)} texts of the evaluation's dataset are in the training dataset too",
        proof=f"the items of both datasets were compared; of the {len(mine)} for training {len(known)} are different",
        figures={"items": len(theirs), "shared": common},
    )


def step_of(dataset: Any) -> int | None:
    """How many tokens apart consecutive items begin, if they are windows of one text."""
    number = min(len(dataset), 6)
    rows = [item(dataset, index) for index in range(number)]
    if number < 3 or any(row is None or len(row) != len(rows[0]) for row in rows):  # type: ignore[arg-type]
        return None
    pairs = list(itertools.pairwise(rows))
    length = len(rows[0])  # type: ignore[arg-type]
    for step in range(1, length):
        if all(torch.equal(one[step:], other[:-step]) for one, other in pairs):  # type: ignore[index]
            return step
    following = []
    for index in range(number - 1):
        ids = [one for one in tensors_in(dataset[index]) if one.dim() == 1 and len(one) == length]
        following.append(int(ids[1][-1]) if len(ids) > 1 else None)
    if all(token is not None and token == int(row[0]) for token, row in zip(following, rows[1:], strict=False)):  # type: ignore[index]
        return length
    return None


def reach_of(dataset: Any) -> int:
    """Up to how far apart items share tokens."""
    step, row = step_of(dataset), item(dataset, 0)
    return 0 if step is None or row is None else (len(row) - 1) // step


def stream(dataset: Any) -> torch.Tensor | None:
    """The text that the items are windows of, without gaps; None if they are not. Reads at most 20,000 items."""
    step = step_of(dataset)
    if step is None:
        return None
    number = min(len(dataset), 20_000)
    rows = [item(dataset, index) for index in range(number)]
    if any(row is None for row in rows):
        return None
    whole = [row for row in rows if row is not None]
    return torch.cat([*(row[:step] for row in whole[:-1]), whole[-1]])
