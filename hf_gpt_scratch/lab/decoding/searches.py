"""A beam search on the candidate's own forward pass, and the mistakes that are made in one.

Without an end token all beams are of one length, so that dividing scores by it changes nothing.

Shapes: V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

Logits = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Search:
    """A way to search; the defaults are those of a beam search.

    Args:
        gain: what a token adds to the score, (V,), from its logits (V,).
        total: the score after a gain: (score before, gain (V,), tokens before) -> (V,).
        worst: the lowest scores are kept.
        parents: "own": a token is appended to the beam that it was found for; "slot": to whichever has its place;
            "shown": the model sees the former, and the latter is returned.
        alone: after the first step, each beam takes its own most probable token.
        returned: which of the beams in the end.
    """

    name: str = ""
    says: str = ""
    remedy: str = ""
    gain: Callable[[torch.Tensor], torch.Tensor] = lambda x: x.log_softmax(-1)
    total: Callable[[float, torch.Tensor, int], torch.Tensor] = lambda before, gain, n: before + gain
    worst: bool = False
    parents: str = "own"
    alone: bool = False
    returned: int = 0

    def run(self, logits: Logits, prompt: list[int], new: int, width: int) -> list[int]:
        """The new ids that it returns; `logits` are the logits (V,) after ids."""
        beams: list[tuple[float, list[int], list[int]]] = [(0.0, [], [])]  # score, seen by the model, returned
        for n in range(new):
            grown = []
            for parent, (score, seen, _) in enumerate(beams):
                totals = self.total(score, self.gain(logits([*prompt, *seen]).double()), n)
                best = totals.topk(1 if self.alone and n else width)
                grown += [(s, parent, t) for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            kept = grown if self.alone and n else sorted(grown, key=lambda one: one[0], reverse=not self.worst)[:width]
            after = []
            for place, (score, parent, token) in enumerate(kept):
                slot = min(place, len(beams) - 1)
                seen = [*beams[slot if self.parents == "slot" else parent][1], token]
                shown = [*beams[parent if self.parents == "own" else slot][2], token]
                after.append((score, seen, shown))
            beams = after
        if self.alone:
            beams.sort(key=lambda one: one[0], reverse=True)
        return beams[self.returned][2]


@dataclass(frozen=True)
class Ending:
    """What a beam search with an end token does with the beams that end; its scores are sums of log probabilities.

    Args:
        ended: "aside": they leave, and others take their places; "fewer": they leave, and their places with them;
            "stay": they keep their places and scores. Mistakes: "dropped": they are thrown away; "on": they are set
            aside, and grow on as well; "unseen": they grow on.
        power: of the length by which a score is divided to choose among the ended.
        whole: whether the length counts the prompt.
        first: how many have to have ended so that they come before all that have not: "one", "all" or "never".
        early: whether it stops as soon as there are as many ended beams as beams, or all beams end.
        ranked: whether "aside" takes only those among the best as many as beams.
    """

    ended: str
    power: float = 0.0
    whole: bool = False
    first: str = "never"
    early: bool = True
    ranked: bool = True

    def run(self, logits: Logits, prompt: list[int], new: int, width: int, end: int) -> list[int]:
        """The new ids that it returns, up to the end token."""
        live: list[tuple[float, list[int]]] = [(0.0, [])]
        done: list[tuple[float, list[int]]] = []
        for _ in range(new):
            grown = [one for one in live if self.ended == "stay" and end in one[1]]
            for score, ids in (one for one in live if one not in grown):
                best = logits([*prompt, *ids]).double().log_softmax(-1).topk(2 * width)
                grown += [
                    (score + s, [*ids, t]) for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                ]
            grown.sort(key=lambda one: one[0], reverse=True)
            if self.ended in ("stay", "unseen"):
                live = grown[:width]
            elif self.ended in ("fewer", "on"):
                live = grown[: len(live) if self.ended == "fewer" and len(live[0][1]) else width]
                done += [one for one in live if one[1][-1] == end]
                live = [one for one in live if one[1][-1] != end or self.ended == "on"]
            else:
                going = [one for one in grown if one[1][-1] != end][:width]
                last = going[-1][0]
                places = grown[:width] if self.ranked else [one for one in grown if one[0] > last]
                done += [one for one in places if one[1][-1] == end and self.ended == "aside"]
                live = going
            if not live or (self.early and (len(done) >= width or all(ids[-1] == end for _, ids in live))):
                break
        if done and len(done) >= {"one": 1, "all": width, "never": new * width + 1}[self.first]:
            live = []
        chosen = max([*done, *live], key=lambda one: self.worth(prompt, one[0], one[1], end))[1]
        return chosen[: chosen.index(end) + 1] if end in chosen and self.ended == "stay" else chosen

    def worth(self, prompt: list[int], score: float, ids: list[int], end: int) -> float:
        ended = ids.index(end) + 1 if end in ids and self.ended == "stay" else len(ids)
        return score / (ended + len(prompt) * self.whole) ** self.power


def endings(ended: tuple[str, ...], powers: tuple[float, ...]) -> Iterator[Ending]:
    """All conventions with these."""
    either = (False, True)
    for settings in product(ended, powers, either, ("never", "one", "all"), either, either):
        yield Ending(*settings)


KEEP_BEST = "keep the beams with the largest scores: sorted(beams, key=score, reverse=True)[:num_beams], or topk"
ADD = "score of a beam = score of its parent + log probability of its token: scores[:, None] + log_probs"
PARENTS = "append each token to the beam that it was found for: torch.cat([sequences[parent], token], dim=1)"

# Beams of one: where the right answer is another, the others were not searched.
ONE = Search(
    "beams-ignored",
    "several beams give what one beam gives: all are the same, or only the first goes on",
    "start from one beam, expand every beam, and keep the best of all continuations",
)
MISTAKES = [
    Search("worst-beams-kept", "the beams with the smallest scores are kept", KEEP_BEST, worst=True),
    Search("worst-beams-kept", "the beams with the smallest scores are kept", KEEP_BEST, worst=True, returned=-1),
    Search("beam-score-not-accumulated", "a beam's score is that of its last token alone", ADD,
           total=lambda before, gain, n: gain),
    Search("beam-score-sums-probabilities", "probabilities are summed, not log probabilities", ADD,
           gain=lambda x: x.softmax(-1)),
    Search("beam-score-sums-logits", "logits are summed, not log probabilities", "log_probs = log_softmax(logits, -1)",
           gain=lambda x: x),
    Search("beam-score-divided-each-step", "the score is divided by the length in every step, and kept so",
           "add up the log probabilities, and divide only a copy by the length",
           total=lambda before, gain, n: (before + gain) / (n + 1)),
    Search("beams-not-compared", "after the first step each beam takes its own most probable token",
           "keep the best of all beams' continuations: (scores[:, None] + log_probs).view(-1).topk(num_beams)",
           alone=True),
    Search("beam-sequences-not-reordered", "tokens are appended to other beams than they were found for", PARENTS,
           parents="slot"),
    Search("beam-sequences-not-reordered", "tokens are appended to other beams than they were found for", PARENTS,
           parents="shown"),
    Search("worst-beam-returned", "the last of the beams is returned, not the best", "return the first of the sorted "
           "beams", returned=-1),
]  # fmt: skip
