"""Where batches come from: the arrays of token ids that a script holds, and the windows cut out of them."""

import copy
import itertools
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import IterableDataset

from .findings import NOTE
from .record import Forward, Recorder, integer_rows, is_library, tensors_in

# Ids in an array, arrays, and windows that are looked at.
LONGEST, MOST, WINDOWS = 20_000_000, 64, 64
# A window shorter than this is in many texts by chance.
SHORTEST = 8
# Items of a dataset that are read to be compared.
READ = 5000


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
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and mine(value):
            for key, item in list(vars(value).items()):
                look(f"{name}.{key}", item, depth - 1)

    for frame in frames:
        for name, value in list(frame.items()):
            if not name.startswith("__"):
                look(name, value, 2)
    return found


def mine(value: Any) -> bool:
    """Whether this is no module of a library, which is large and may warn of what is looked at."""
    return not isinstance(value, ModuleType) or not is_library(getattr(value, "__file__", None) or "<frozen")


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


def glued(frames: list[dict[str, Any]], rows: list[list[int]]) -> tuple[str, str] | None:
    """The names of a list of documents and of the text that they were joined to, if nothing marks where each ends.

    `rows` are those that are trained on, for a text that no variable holds.
    """
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
        elif len(held := [ids.tolist() for ids in map(ids_in, documents) if ids is not None]) == len(documents):
            documents = held
            if 1 in (len({one[-1] for one in documents}), len({one[0] for one in documents})):
                continue
            ends, begins = (
                {tuple(one[part]) for one in documents} for part in (slice(-SHORTEST, None), slice(SHORTEST))
            )
            pieces = ((row[at - SHORTEST : at], row[at : at + SHORTEST]) for row in rows for at in range(len(row)))
            if any(tuple(one) in ends and tuple(other) in begins for one, other in pieces):
                return name, "what is trained on"
            joined = torch.tensor([token for one in documents for token in one])
            for other, array in arrays:
                found = places(joined, array[:64]) if len(array) > max(map(len, documents)) else []
                if any(torch.equal(array, joined[start : start + len(array)]) for start in found):
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
    """The finding that evaluation reads tokens that are trained on, or None.

    That both are cut out of one text proves nothing: its blocks may have been divided. What counts are windows that
    were trained on, or that the draws of training can give.
    """
    evaluations = [forward for forward in recorder.evaluations if forward.losses and forward.ids is not None]
    if not evaluations or not trained:
        return None
    remedy = "evaluate on a part of the text that training never reads, split before the windows are made"
    found = of_one_loader(recorder, [forward for forward in evaluations if not forward.beside])
    if found is not None:
        return dict(where=evaluations[-1].where, remedy=remedy) | found
    loaders = any(not facts["grad"] for _, facts in recorder.loaders)
    found = of_loaders(recorder) if loaders else None
    if found is None and (not loaders or recorder.draws):  # datasets may draw their items
        found = of_windows(recorder, evaluations, [forward for _, forward in trained], frames)
    return None if found is None else dict(where=evaluations[-1].where, remedy=remedy) | found


def of_one_loader(recorder: Recorder, evaluations: list[Forward]) -> dict[str, Any] | None:
    """The same if all that is evaluated comes out of the loader of training.

    Evaluated once, it may be meant for the training loss; twice between two steps, one is a validation.
    """
    training = {facts["loader"] for _, facts in recorder.loaders if facts["grad"]}
    passes = [(forward.backwards, forward.loader) for forward in evaluations if forward.loader is not None]
    if not passes or len(passes) < len(evaluations) or any(facts["loader"] not in training for _, facts in passes):
        return None
    times = [(backwards, id(facts)) for backwards, facts in passes if backwards and not facts["grad"]]
    twice = max((len({one for n, one in times if n == backwards}) for backwards, _ in times), default=0)
    says = f"all {len(passes)} passes of the evaluation are over batches of the loader that is trained on"
    if twice < 2:
        return dict(says=says + ": there is no validation", level=NOTE)
    return dict(
        says=says,
        proof=f"between two steps it goes through that loader {twice} times, and through no other",
        figures={"passes": len(passes), "times": twice},
    )


def of_windows(recorder: Recorder, evaluations: list[Forward], trained: list[Forward], frames: list[dict[str, Any]]):
    """The same for the windows that were seen.

    Each pass of the evaluation has to have some that are trained on: one that has none is a validation as it should
    be, beside which others may be meant for the training loss.
    """
    training = windows(trained)
    passes = [rows for rows in (windows([forward]) for forward in evaluations) if rows]
    total = sum(map(len, passes))
    if len(training) < 2 or total < 4:
        return None
    arrays = sorted(id_arrays(frames), key=lambda item: len(item[1]))
    there = [(name, array, [places(array, row) for row in training]) for name, array in arrays]
    there = [one for one in there if all(one[2])]
    for name, array, mine in there:
        # How often the text has the same window twice by chance.
        repeated = sum(len(one) > 1 for one in mine) / len(mine)
        starts = [one[0] for one in mine if len(one) == 1]
        if repeated > 0.5:
            return None
        drawn = draws_of(recorder, starts)
        if drawn is None:
            continue
        low, end = drawn[0], drawn[1] - 1 + min(map(len, training))
        inside = [
            sum(covered(one, len(row), [(low, end)]) for row in rows for one in [places(array, row)]) for rows in passes
        ]
        if all(inside) and sum(inside) > (0.1 + 1.5 * repeated) * total:
            return dict(
                says=f"{sum(inside)} of {total} windows of the evaluation are among those that training draws",
                proof=f"training draws the starts of its windows in {name} ({len(array)} ids) at random from {low} "
                f"to {drawn[1] - 1}, and each of these windows of the evaluation was found in that part, in one place",
                figures={"windows": total, "inside": sum(inside)},
            )
        return None
    known = {tuple(row.tolist()) for row in training}
    if not there and 2 * len(known) < len(training):
        return None  # a text that repeats itself, or the same batch again
    spans = [(one[0], one[0] + len(row)) for one, row in zip(there[0][2], training, strict=True)] if there else []
    inside = []
    for rows in passes:
        same = [tuple(row.tolist()) in known and len(row.unique()) >= SHORTEST for row in rows]
        if there:
            found = [places(there[0][1], row) for row in rows]
            same = [covered(one, len(row), spans) for one, row in zip(found, rows, strict=True)]
        inside.append(sum(same))
    if all(inside) and sum(inside) >= 4 and 20 * sum(inside) > total:
        return dict(
            says=f"{sum(inside)} of {total} windows of the evaluation were trained on in these steps",
            proof=f"they were compared with the {len(training)} windows of training, token by token"
            + (f", at their places in {there[0][0]} ({len(there[0][1])} ids)" if there else ""),
            figures={"windows": total, "inside": sum(inside)},
        )
    return None


def covered(found: list[int], length: int, spans: list[tuple[int, int]]) -> bool:
    """Whether at least half of a window that is in one place of the text is in one of the spans (start, end)."""
    if len(found) != 1:
        return False
    return any(2 * (min(end, found[0] + length) - max(start, found[0])) >= length for start, end in spans)


def draws_of(recorder: Recorder, starts: list[int]) -> tuple[int, int] | None:
    """The bounds (low, high) of the random integers that these are, high excluded; None if they are none."""
    if not starts:
        return None
    values: dict[tuple[int, int], set[int]] = {}
    for low, high, drawn in recorder.draws:
        values.setdefault((low, high), set()).update(drawn)
    return next((bounds for bounds, drawn in values.items() if drawn.issuperset(starts)), None)


def of_loaders(recorder: Recorder) -> dict[str, Any] | None:
    """The same for data loaders: by the indices of their datasets, or by the text that these were cut out of."""
    facts = [facts for _, facts in recorder.loaders]
    training = [one for one in facts if one["grad"]]
    used = {one["loader"] for one in training}
    others = [one for one in facts if not one["grad"] and one["loader"] not in used]
    # One that shares nothing is a validation as it should be, beside which others may be meant for the training loss.
    found = [next((s for mine in training if (s := shared(mine, one)) is not None), None) for one in others]
    return None if not found or None in found else found[0]


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
        if isinstance(dataset, IterableDataset) or isinstance(checked, IterableDataset):
            return same_items(dataset, indices, checked, its)
        if dataset is checked:
            number = len(dataset)
            first = set(range(number) if indices is None else indices)
            second = sorted(set(range(number) if its is None else its))
            reach = reach_of(dataset)
            common = [i for i in second if any(i + step in first for step in range(-reach, reach + 1))]
            if len(common) <= len(second) * (0.5 if reach else 0.1):
                return None
            how = "in both" if reach == 0 else "in windows of both, which overlap"
            return dict(
                says=f"{len(common)} of {len(second)} items of the evaluation's dataset are {how}",
                proof=f"both loaders read one dataset of {number} items; the indices were compared"
                + (f", and items up to {reach} apart share at least half of their tokens" if reach else ""),
                figures={"items": len(second), "shared": len(common)},
            )
        # Which parts of the text are trained on is known only if all items are.
        text, part = (stream(dataset), stream(checked)) if indices is None and its is None else (None, None)
        if text is None or part is None:
            return same_items(dataset, indices, checked, its)
        length = min(len(part), 32)
        starts = range(0, len(part) - length + 1, max(1, (len(part) - length) // 40))
        found = [places(text, part[start : start + length]) for start in starts]
        if sum(len(one) > 1 for one in found) * 5 > len(found):
            return None  # a text that repeats itself
        inside = sum(len(one) == 1 for one in found)
        if 10 * inside <= len(found):
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
    """The ids of an item: its first tensor or list of integers with one dimension."""
    return ids_in(dataset[index], 3)


def ids_in(value: Any, depth: int = 0) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        fits = value.dim() == 1 and not value.is_floating_point() and len(value) >= SHORTEST
        return value.long().cpu() if fits else None
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        fits = value.dtype.kind in "iu" and value.ndim == 1 and value.size >= SHORTEST
        return torch.from_numpy(value.astype("int64")) if fits else None
    if isinstance(value, list) and len(value) >= SHORTEST and all(type(one) is int for one in value):
        return torch.tensor(value)
    if not depth or not isinstance(value, (dict, list, tuple)):
        return None
    inner = [value["input_ids"]] if isinstance(value, dict) and "input_ids" in value else value
    for one in inner.values() if isinstance(inner, dict) else inner:
        found = ids_in(one, depth - 1)
        if found is not None:
            return found
    return None


def same_items(dataset: Any, indices: list[int] | None, checked: Any, its: list[int] | None) -> dict[str, Any] | None:
    """The same for datasets of separate texts, which are compared as wholes."""

    def texts(data: Any, chosen: list[int] | None) -> list[tuple[tuple[int, ...], str]]:
        """The first ids of each item, and all that it has, as of a question and its answer."""
        if isinstance(data, IterableDataset):  # a copy, for one that goes on where it was; what cannot be copied fails
            items = list(itertools.islice(copy.deepcopy(data), READ))
        else:
            items = [data[index] for index in (range(len(data)) if chosen is None else chosen)[:READ]]
        parts = [one.values() if isinstance(one, dict) else one if isinstance(one, tuple) else [one] for one in items]
        pairs = [(ids_in(one, 3), integer_rows(part)) for one, part in zip(items, parts, strict=True)]
        long = [(ids, rows) for ids, rows in pairs if ids is not None or sum(map(len, rows)) >= SHORTEST]
        return [(tuple(rows[0] if ids is None else ids.tolist()), str(rows)) for ids, rows in long]

    mine, theirs = texts(dataset, indices), texts(checked, its)
    known = set(mine)
    if len(theirs) < 4 or 5 * len(known) < 4 * len(mine):
        return None  # texts that repeat themselves
    repeated = 1 - len(known) / max(1, len(mine))
    common = sum(text in known for text in theirs)
    if common < 2:
        return within_blocks([ids for ids, _ in mine], [ids for ids, _ in theirs])
    if common <= (0.1 + 2 * repeated) * len(theirs):
        return None
    return dict(
        says=f"{common} of {len(theirs)} texts of the evaluation's dataset are in the training dataset too",
        proof=f"the items of both datasets were compared; of the {len(mine)} for training {len(known)} are different",
        figures={"items": len(theirs), "shared": common},
    )


def within_blocks(mine: list[tuple[int, ...]], theirs: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """The same for blocks of one length that were cut out of one text at other places."""
    if len({len(text) for text in mine}) != 1 or min(map(len, theirs)) < 2 * SHORTEST:
        return None
    whole = torch.tensor([token for text in mine for token in text])
    chosen = theirs[:: len(theirs) // WINDOWS + 1]
    found = [places(whole, torch.tensor(text)) for text in chosen]
    inside = sum(len(one) == 1 for one in found)
    if 2 * inside <= len(found):
        return None
    return dict(
        says=f"{inside} of {len(found)} texts of the evaluation's dataset are within those of the training dataset",
        proof=f"the {len(mine)} items for training were put one after the other, and each of these texts was found in "
        "them, in one place",
        figures={"items": len(found), "shared": inside},
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
    """Up to how far apart items share half of their tokens; consecutive windows that meet in one token do not."""
    step, row = step_of(dataset), item(dataset, 0)
    return 0 if step is None or row is None else len(row) // 2 // step


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
