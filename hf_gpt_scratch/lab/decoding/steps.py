"""Step by step: are the logits of each forward pass those of the whole prefix, and if not, of what?

Whatever a cache does amounts to a full forward pass over some ids, with some positions, in which each token sees some
others. A hypothesis is such a triple; it is named only if the candidate's own forward pass, run so without a cache,
reproduces the recorded logits of every step of several prompts.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .bench import Bench
from .recording import Call, NotReplayable, Run

Triple = tuple[list[int], list[int] | None, torch.Tensor | None]


@dataclass
class Step:
    """The forward pass that decided one new id: what it was given since the run began, and its logits (V,).

    `prefix` is what it should have seen. `before` are ids fed in an earlier run with the same model.
    """

    prefix: list[int]
    calls: list[Call]
    row: int = 0
    before: list[int] = field(default_factory=list)

    @property
    def logits(self) -> torch.Tensor:
        return self.calls[-1].last[self.row]

    @property
    def fed(self) -> list[list[int]]:
        return [call.ids[min(self.row, len(call.ids) - 1)].tolist() for call in self.calls]

    @property
    def history(self) -> list[list[int]]:
        """The chunks fed since the sequence was last given as a whole."""
        start, seen = 0, 0
        for n, chunk in enumerate(self.fed):
            if n and len(chunk) > 1 and len(chunk) >= seen:
                start, seen = n, 0
            seen += len(chunk)
        return self.fed[start:]

    @property
    def tokens(self) -> list[int]:
        """The history in one list."""
        return [token for chunk in self.history for token in chunk]

    @property
    def cached(self) -> bool:
        return len(self.history) > 1


def steps_of(run: Run, row: int = 0, before: list[int] | None = None) -> tuple[list[Step], bool]:
    """A run's steps, and whether each new id has the largest of the logits that decided it."""
    calls = [call for call in run.calls if call.logits is not None]
    prompt, new = run.prompts[row], run.new[row]
    choices = [int(call.last[min(row, len(call.last) - 1)].argmax()) for call in calls]
    fed = [sum(call.ids.shape[1] for call in calls[: n + 1]) for n in range(len(calls))]
    places = list(range(len(calls) - len(new) + 1))
    whole = min(len(prompt), run.most)  # a longer one is cut
    lasts = [int(call.ids[min(row, len(call.ids) - 1), -1]) for call in calls]
    before_each = [*prompt, *new][len(prompt) - 1 :][: len(new)]
    places = sorted(places, key=lambda n: fed[n] < whole)  # first those that have seen the prompt
    fitting = [n for n in places if choices[n : n + len(new)] == new]
    # Best those whose passes end with the token before each new one.
    fitting.sort(key=lambda n: lasts[n : n + len(new)] != before_each)
    sure = bool(fitting) and lasts[fitting[0] : fitting[0] + len(new)] == before_each
    if not sure and (scattered := one_by_one(choices, lasts, new, before_each)):
        return [Step(prompt + new[:n], calls[: at + 1], row, before or []) for n, at in enumerate(scattered)], True
    if fitting:
        first = fitting[0]
    else:
        first = 0
        while first < len(calls) - len(new) and sum(c.ids.shape[1] for c in calls[: first + 1]) < whole:
            first += 1
    count = min(len(new), len(calls) - first)
    steps = [Step(prompt + new[:n], calls[: first + n + 1], row, before or []) for n in range(count)]
    return steps, choices[first : first + len(new)] == new and bool(new)


def one_by_one(choices: list[int], lasts: list[int], new: list[int], before: list[int]) -> list[int]:
    """The forward passes that decided the new ids, where there are others between them; empty if they are not found.

    Each ends with the token before its id, and has that id as its choice.
    """
    found: list[int] = []
    end = len(choices)
    for token, last in zip(reversed(new), reversed(before), strict=True):
        fits = [at for at in range(end) if choices[at] == token and lasts[at] == last]
        if not fits:
            return []
        end = fits[-1]
        found = [end, *found]
    return found


def first_difference(bench: Bench, steps: list[Step]) -> tuple[int, float] | None:
    """The first step whose logits are not those of the prefix, and its relative error."""
    for n, step in enumerate(steps):
        error = bench.error(step.logits, bench.last(step.prefix[-bench.context_length :]))
        if not error <= bench.rounding:
            return n, error
    return None


# Hypotheses. A token is the i-th of the sequence and the o-th of chunk j; P is the length of the first chunk.


@dataclass(frozen=True)
class Hypothesis:
    name: str
    says: str
    remedy: str
    where: Callable[[int, int, int, int], int] | None = None  # (i, o, j, P) -> its position
    sees: Callable[[int, int, int, int, int, int], bool] | None = None  # (key, i, o, j, P, start of chunk j-1)
    ids: Callable[[Step], list[list[int]]] | None = None  # chunks


def later(position: Callable[[int, int, int, int], int]) -> Callable[[int, int, int, int], int]:
    """Positions of the chunks after the first."""
    return lambda i, o, j, P: position(i, o, j, P) if j else i


def last_tokens(width: int) -> Callable[[int, int, int, int, int, int], bool]:
    """Only the last `width` tokens are seen, from the second chunk on."""
    return lambda k, i, o, j, P, s: i - width < k <= i if j else k <= i


POSITIONS = "give each new token the position after those in the cache: torch.arange(past, past + T)"
MASK = "the rows of the mask for new tokens are those from the cache's length on: mask[past:past + T, :past + T]"
CACHE = "append each step's keys and values to the cache, and attend to all of it"
KEEP = "feed the prompt once, then each new token once"

MOVED = [
    Hypothesis(
        "positions-ignore-cache",
        "positions start at 0 again in every cached step",
        POSITIONS,
        where=later(lambda i, o, j, P: o),
    ),
    Hypothesis(
        "positions-ignore-cache",
        "cached steps have position 1 whatever is in the cache",
        POSITIONS,
        where=later(lambda i, o, j, P: 1),
    ),
    Hypothesis(
        "positions-ignore-cache",
        "positions of cached steps count the steps: 0, 1, 2, …, without the prompt",
        POSITIONS,
        where=later(lambda i, o, j, P: i - P),
    ),
    Hypothesis(
        "positions-ignore-cache",
        "positions of cached steps count the steps: 1, 2, 3, …, without the prompt",
        POSITIONS,
        where=later(lambda i, o, j, P: i - P + 1),
    ),
    Hypothesis(
        "positions-stand-still",
        "all cached steps have the position after the prompt",
        POSITIONS,
        where=later(lambda i, o, j, P: P),
    ),
    Hypothesis(
        "positions-stand-still",
        "all cached steps have the position of the prompt's last token",
        POSITIONS,
        where=later(lambda i, o, j, P: P - 1),
    ),
    Hypothesis(
        "positions-off-by-one",
        "positions of cached steps are one too high",
        POSITIONS,
        where=later(lambda i, o, j, P: i + 1),
    ),
    Hypothesis(
        "positions-off-by-one",
        "positions of cached steps are one too low",
        POSITIONS,
        where=later(lambda i, o, j, P: i - 1),
    ),
    Hypothesis(
        "positions-off-by-one",
        "positions are one too high with a cache, from the prompt on",
        POSITIONS,
        where=lambda i, o, j, P: i + 1,
    ),
]

HIDDEN = [
    Hypothesis(
        "mask-not-moved",
        "the mask is not moved with the cache: a new token has the mask's first row, and sees only the first token",
        MASK,
        sees=lambda k, i, o, j, P, s: k <= o if j else k <= i,
    ),
    Hypothesis(
        "cache-ignored",
        "a new token sees only itself: nothing in the cache is attended to",
        CACHE,
        sees=lambda k, i, o, j, P, s: i - o <= k <= i if j else k <= i,
    ),
    Hypothesis(
        "cache-not-extended",
        "a new token sees the prompt and itself, but no token that was generated before it",
        CACHE,
        sees=lambda k, i, o, j, P, s: k <= i and (k < P or k >= i - o) if j else k <= i,
    ),
    Hypothesis(
        "cache-overwritten",
        "a new token sees only the step before and itself: each step replaces the cache",
        CACHE,
        sees=lambda k, i, o, j, P, s: s <= k <= i if j else k <= i,
    ),
    Hypothesis(
        "prompt-not-cached",
        "new tokens see each other, but not the prompt",
        CACHE,
        sees=lambda k, i, o, j, P, s: P <= k <= i if j else k <= i,
    ),
    Hypothesis(
        "mask-hides-itself",
        "a new token sees the cache, but not itself",
        MASK,
        sees=lambda k, i, o, j, P, s: k < i if j else k <= i,
    ),
    Hypothesis(
        "cache-misses-token",
        "a new token does not see the token before it",
        CACHE,
        sees=lambda k, i, o, j, P, s: k <= i and k != i - 1 if j else k <= i,
    ),
    Hypothesis(
        "cache-misses-token",
        "new tokens do not see the prompt's last token",
        CACHE,
        sees=lambda k, i, o, j, P, s: k <= i and k != P - 1 if j else k <= i,
    ),
    Hypothesis(
        "cache-misses-token",
        "new tokens do not see the prompt's first token",
        CACHE,
        sees=lambda k, i, o, j, P, s: 0 < k <= i if j else k <= i,
    ),
    Hypothesis(
        "future-leak",
        "with a cache, the prompt's tokens see those after them",
        "mask the prompt in the cached pass too, wherever it has more than one token",
        sees=lambda k, i, o, j, P, s: k <= i or (j == 0 and k < P),
    ),
    *(
        Hypothesis(
            "cache-loses-tokens",
            f"a new token sees only the last {width} tokens, though the context has room for more",
            CACHE,
            sees=last_tokens(width),
        )
        for width in range(2, 12)
    ),
]

# Where the position is also the place in the cache: what is written there replaces what was.
PLACES = "each new token's position, and its place in the cache, is the number of tokens in the cache"
PLACED = [
    Hypothesis(
        "positions-ignore-cache",
        "cached steps start at position 0 again, and replace what the cache has there",
        PLACES,
        where=later(lambda i, o, j, P: o),
        sees=lambda k, i, o, j, P, s: i - o <= k <= i if j else k <= i,
    ),
    Hypothesis(
        "positions-ignore-cache",
        "positions of cached steps count the steps from 0, and replace what the cache has there",
        PLACES,
        where=later(lambda i, o, j, P: i - P),
        sees=lambda k, i, o, j, P, s: P <= k <= i if j else k <= i,
    ),
    Hypothesis(
        "positions-ignore-cache",
        "positions of cached steps count the steps from 1, and replace what the cache has there",
        PLACES,
        where=later(lambda i, o, j, P: i - P + 1),
        sees=lambda k, i, o, j, P, s: (k == 0 or k >= P) and k <= i if j else k <= i,
    ),
    Hypothesis(
        "positions-stand-still",
        "all cached steps have the position after the prompt, and each replaces the one before in the cache",
        PLACES,
        where=later(lambda i, o, j, P: P),
        sees=lambda k, i, o, j, P, s: (k < P or k == i) and k <= i if j else k <= i,
    ),
    Hypothesis(
        "positions-stand-still",
        "all cached steps have the position of the prompt's last token, and each replaces it in the cache",
        PLACES,
        where=later(lambda i, o, j, P: P - 1),
        sees=lambda k, i, o, j, P, s: (k < P - 1 or k == i) and k <= i if j else k <= i,
    ),
    Hypothesis(
        "positions-off-by-one",
        "positions of cached steps are one too low, and the first replaces the prompt's last token in the cache",
        PLACES,
        where=later(lambda i, o, j, P: i - 1),
        sees=lambda k, i, o, j, P, s: k != P - 1 and k <= i if j else k <= i,
    ),
]

NOT_EXTENDED = Hypothesis("cache-not-extended", PLACED[3].says, CACHE)

FED = [
    Hypothesis(
        "wrong-tokens-fed",
        "what the model is given, step after step, is not the prompt and then each new token once",
        KEEP,
        ids=lambda step: step.fed,
    ),
    Hypothesis(
        "wrong-tokens-fed",
        "what the model is given is not the prompt and the new tokens",
        KEEP,
        ids=lambda step: step.fed[-1:] if len(step.fed[-1]) > 1 else [],
    ),
    Hypothesis(
        "cache-ignored",
        "a cached step is run as if there were nothing before it",
        "hand the cache of each step to the next, and attend to all of it",
        ids=lambda step: step.fed[-1:] if step.cached else step.history,
    ),
]

# With tokens that an earlier prompt left behind.
STALE = "the cache is not emptied between prompts: the second one also sees the first"
RESET = "empty the cache, and set its length to 0, at the start of each generation"


def triple(bench: Bench, step: Step, hypotheses: tuple[Hypothesis, ...]) -> Triple | None:
    """Ids, positions and visibility of a step under hypotheses; None if they say nothing else than the truth."""
    chunks = step.history
    whole = True
    for one in hypotheses:
        if one.ids is not None:
            chunks, whole = one.ids(step), False
    ids = [token for chunk in chunks for token in chunk]
    if not ids or (whole and ids != step.prefix):
        return None
    first = len(chunks[0])
    places = []  # (i, o, j, start of chunk j - 1)
    starts = [0]
    for j, chunk in enumerate(chunks):
        places += [(starts[-1] + o, o, j, starts[max(j - 1, 0)]) for o in range(len(chunk))]
        starts.append(starts[-1] + len(chunk))
    positions = None
    visible = None
    for one in hypotheses:
        if one.where is not None:
            positions = [one.where(i, o, j, first) for i, o, j, _ in places]
        if one.sees is not None:
            sees = one.sees
            visible = torch.tensor([[sees(k, i, o, j, first, s) for k in range(len(ids))] for i, o, j, s in places])
    if positions is not None and min(positions) < 0:
        return None
    if visible is not None and not visible.any(-1).all():
        return None
    return ids, positions, visible


def observed_positions(step: Step) -> list[int] | None:
    """The positions that the candidate looked up for the tokens of its history, if it looked up one for each."""
    calls = step.calls[-len(step.history) :]
    found = []
    for call in calls:
        if call.positions is None or len(call.positions) != call.ids.shape[1]:
            return None
        found += call.positions
    return found


def reproduces(bench: Bench, step: Step, hypotheses: tuple[Hypothesis, ...]) -> bool:
    made = triple(bench, step, hypotheses)
    if made is None:
        return False
    try:
        return bench.equal(step.logits, bench.last(*made))
    except (NotReplayable, ValueError):
        return False


def explanations() -> Iterator[tuple[Hypothesis, ...]]:
    for one in (*MOVED, *HIDDEN, *PLACED, *FED):
        yield (one,)
    for fed in FED:
        for one in MOVED:
            yield (fed, one)
    for moved in MOVED:
        for hidden in HIDDEN:
            yield (moved, hidden)


def explain(bench: Bench, runs: list[list[Step]]) -> tuple[Hypothesis, ...] | None:
    """The first hypotheses, alone or two together, that reproduce every step of every run."""
    cached = [step.calls[-1] for steps in runs for step in steps if step.cached]
    # Of a step whose attention has no other keys than its own, nothing is replaced in a cache: it was given none.
    alone = bool(cached) and all(0 < call.keys <= call.ids.shape[1] for call in cached)
    found = next(
        (
            h
            for h in explanations()
            if not (alone and h[0] in PLACED) and all(reproduces(bench, step, h) for steps in runs for step in steps)
        ),
        None,
    )
    # A cache of places has one for each token of the context; one that is never longer is not extended.
    short = all(step.calls[-1].keys == len(step.history[0]) + 1 for steps in runs for step in steps if step.cached)
    return (NOT_EXTENDED,) if found and found[0] in PLACED and found[0].says == NOT_EXTENDED.says and short else found


def explain_stale(bench: Bench, runs: list[list[Step]]) -> bool:
    """Whether every step is that of a sequence which begins with what an earlier run fed."""

    def reproduced(step: Step, way: str) -> bool:
        before, fed = len(step.before), len(step.prefix)
        ids, positions = [*step.before, *step.prefix], list(range(before + fed))
        if way == "keys only":
            positions[before:] = range(fed)
        elif way == "positions only":
            ids, positions = step.prefix, positions[before:]
        try:
            return bench.equal(step.logits, bench.last(ids, positions if bench.can_move else None))
        except NotReplayable:
            return False

    ways = ("all", "keys only", "positions only")
    return any(all(reproduced(step, way) for steps in runs for step in steps) for way in ways)
