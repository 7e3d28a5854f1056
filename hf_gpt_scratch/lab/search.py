"""The search for mistakes in the forward pass: which of them reproduce the candidate, by experiment.

Shapes: B batch, T tokens, E emb_dim.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import torch

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .compare import errors
from .mistakes import Mistake
from .simulate import Switches, simulate
from .trace import meaning, stages

# The most mistakes that a search combines, and how many tokens it runs on: enough for any mask, and quick.
MOST, SHORT = 4, 12

# Mistakes, each with the places that have it.
Findings = list[tuple[Mistake, frozenset[int]]]
# How many recorded stages agree before the first that does not, and the last one's error (inf until all agree).
Agreement = tuple[int, float]


def placed(findings: Findings) -> dict[int, Switches]:
    """The switches of each place."""
    wrong: dict[int, Switches] = {}
    for mistake, places in findings:
        for place in places:
            wrong[place] = mistake.switched_on(wrong.get(place, Switches()))
    return wrong


def place_of(stage: str, n_layers: int) -> int:
    """The place whose computation a stage shows; the input of block n is the result of the place before."""
    if number := re.match(r"trf_blocks\.(\d+)(\.input$)?", stage):
        return int(number[1]) - bool(number[2])
    return -1 if stage in ("tok_emb", "pos_emb") else n_layers


@dataclass
class Experiment:
    """The candidate's trace, and everything needed to reproduce it in some consecutive places.

    `start` is the input of the first place (B, T, E), `tried` all experiments so far.
    """

    config: GPTScratchConfig
    input_ids: torch.Tensor
    activations: Mapping[str, torch.Tensor]
    bound: float
    weights: Mapping[str, torch.Tensor]
    places: range
    start: torch.Tensor | None = None
    tried: list[Findings] = field(default_factory=list)

    @property
    def shared(self) -> list[str]:
        """The recorded stages here, in execution order."""
        n_layers = self.config.n_layers
        return [s for s in stages(n_layers) if s in self.activations and place_of(s, n_layers) in self.places]

    def agreement(self, findings: Findings) -> Agreement:
        """How far the simulation with these mistakes agrees with the candidate."""
        self.tried.append(findings)
        agreed, error = 0, math.inf
        for stage, tensor in self.simulated(findings):
            if stage in self.activations:
                error = errors(tensor, self.activations[stage])[2]
                if not error <= self.bound:
                    return agreed, math.inf
                agreed += 1
        return agreed, error

    def explained_by(self, findings: Findings) -> bool:
        return self.agreement(findings)[1] <= self.bound

    def simulated(self, findings: Findings) -> Iterator[tuple[str, torch.Tensor]]:
        return simulate(self.weights, self.config, self.input_ids, placed(findings), self.places, self.start)

    def outcome(self, findings: Findings) -> torch.Tensor:
        """The result of the last place: the logits, or the next block's input (B, T, E)."""
        *_, (_, x) = self.simulated(findings)
        return x

    def throughout(self, *mistakes: Mistake) -> Findings:
        """The mistakes, each in all places."""
        return [(mistake, frozenset(self.places)) for mistake in mistakes]

    def suspects(self, agreed: int) -> range:
        """The places that may be the only wrong one: from the last stage that agrees to the first that does not."""
        if len(self.places) == 1:
            return range(0)  # then it is all places
        shared, n_layers = self.shared, self.config.n_layers
        first = place_of(shared[agreed - 1], n_layers) if agreed else self.places.start
        return range(first, place_of(shared[agreed], n_layers) + 1)

    def without(self, doubted: frozenset[str]) -> "Experiment":
        """The same experiment without the stages of these meanings, except the last stage."""
        kept = [stage for stage in self.shared if meaning(stage) not in doubted or stage == self.shared[-1]]
        return replace(self, activations={stage: self.activations[stage] for stage in kept})

    def parts(self) -> list[range]:
        """The places, split wherever the activation between two was recorded: into single blocks if all were."""
        between = [stage for stage in self.activations if re.fullmatch(r"trf_blocks\.\d+(\.input)?", stage)]
        cuts = {self.places.start, self.places.stop, *(place_of(s, self.config.n_layers) + 1 for s in between)}
        return [range(*pair) for pair in pairwise(sorted(cuts))]

    def activation_before(self, place: int) -> torch.Tensor | None:
        """The candidate's own input to a place (B, T, E); None if it was not recorded."""
        for name in (f"trf_blocks.{place}.input", f"trf_blocks.{place - 1}"):
            x = self.activations.get(name)
            if x is not None and x.shape == (*self.input_ids.shape, self.config.emb_dim):
                return x
        return None

    def differing_blocks(self, findings: Findings) -> list[int]:
        """The blocks that these mistakes do not explain, each run on the candidate's own input to it."""
        parts = [replace(self, places=places, start=self.activation_before(places.start)) for places in self.parts()]
        differ = [part for part in parts if part.start is not None and not part.explained_by(findings)]
        return [n for part in differ for n in part.places if n < self.config.n_layers]


def search(experiment: Experiment, known: list[Mistake], *, thorough: bool = True) -> Findings:
    """The mistakes that reproduce the candidate with its own weights, found greedily, at most `MOST`.

    Each step adds what makes the simulation agree with the candidate furthest down the graph. If `thorough`, a mistake
    may sit in one place alone, and where no single one gets further, pairs are tried.
    """
    findings: Findings = []
    reached = experiment.agreement(findings)
    while reached[1] > experiment.bound and len(findings) < MOST:
        for group in additions(experiment, known, findings, reached[0], thorough=thorough):
            best, added = furthest(experiment, findings, group)
            if best[0] > reached[0] or best[1] <= experiment.bound:
                reached, findings = best, [*findings, *added]
                break
        else:
            break
    return findings


def additions(
    experiment: Experiment, known: list[Mistake], findings: Findings, agreed: int, *, thorough: bool
) -> list[Iterable[Findings]]:
    """What a step of the search may add: single mistakes, then pairs. No switch is set twice."""
    used = {mistake.switch for mistake, _ in findings}
    free = [mistake for mistake in known if mistake.switch not in used]
    singles = [experiment.throughout(mistake) for mistake in free]
    if not thorough:
        return [singles]
    singles += [[(mistake, frozenset({n}))] for n in experiment.suspects(agreed) for mistake in known]
    return [singles, (experiment.throughout(a, b) for a, b in combinations(free, 2) if a.switch != b.switch)]


def furthest(experiment: Experiment, findings: Findings, group: Iterable[Findings]) -> tuple[Agreement, Findings]:
    """The member of a group that agrees furthest, then with the least error, and how far; the first of equals."""
    best: tuple[Agreement, Findings] = ((-1, math.inf), [])
    for added in group:
        agreed, error = experiment.agreement([*findings, *added])
        if (agreed, -error) > (best[0][0], -best[0][1]):
            best = (agreed, error), added
    return best


@dataclass
class Part:
    """Consecutive places examined by themselves: their mistakes, and whether these explain them.

    `doubted` are the meanings of the stages that the comparison ignored; `experiment` is without them.
    """

    experiment: Experiment
    findings: Findings
    doubted: frozenset[str]
    explained: bool

    @property
    def mistakes(self) -> list[Mistake]:
        return [mistake for mistake, _ in self.findings]


def explain_part(experiment: Experiment, known: list[Mistake], earlier: list[Part], *, thorough: bool) -> Part:
    """The mistakes of some places: those of an earlier part if they explain this one too, else by search."""
    for mistakes, doubted in precedents(earlier):
        judge, findings = experiment.without(doubted), experiment.throughout(*mistakes)
        if judge.explained_by(findings):
            return Part(judge, findings, doubted, True)
    shared, (agreed, _) = experiment.shared, experiment.agreement([])
    nothing: frozenset[str] = frozenset()
    partial: Findings = []
    # A mistake may be inside a module, so that the module's own output shows it, or after it. So all stages are
    # trusted first, then all but those like the first that differs, finally only the last. Then every experiment
    # runs to the end, so in several places only single mistakes are tried.
    for doubted, exhaustive in (
        (nothing, thorough),
        (frozenset({meaning(shared[agreed])}), thorough),
        (frozenset(map(meaning, shared)), thorough and len(experiment.places) == 1),
    ):
        judge = experiment.without(doubted)
        if doubted and judge.shared == shared:
            continue
        findings = search(judge, known, thorough=exhaustive)
        if judge.explained_by(findings):
            return Part(judge, findings, doubted, True)
        partial = partial or findings
    return Part(experiment, partial, nothing, False)


def precedents(earlier: list[Part]) -> list[tuple[list[Mistake], frozenset[str]]]:
    """Mistakes and doubted stages to try first: none at all, then what explained the earlier parts."""
    ways: list[tuple[list[Mistake], frozenset[str]]] = [([], frozenset())]
    for part in earlier:
        for way in ((part.mistakes, part.doubted), ([], part.doubted)):
            if part.explained and way not in ways:
                ways.append(way)
    return ways


@dataclass
class Forward:
    """The mistakes in the forward pass.

    `undetectable` are the other blocks in which a mistake would make no difference, `unexplained` the places that no
    mistake explains, `alternatives` what other mistakes would explain a single one's effects.
    """

    findings: Findings
    undetectable: dict[Mistake, list[int]]
    unexplained: list[range]
    alternatives: list[str]


def forward_mistakes(experiment: Experiment, known: list[Mistake], *, thorough: bool = True) -> Forward:
    """The mistakes in the forward pass that explain the candidate, or as many of them as the search finds.

    Unless `thorough`, only single mistakes are tried.
    """
    parts = explain_parts(experiment, known, thorough=thorough)
    unexplained = [part.experiment.places for part in parts if not part.explained]
    if thorough and unexplained and len(experiment.parts()) > 1:
        blind = experiment.without(frozenset(map(meaning, experiment.shared)))
        together = search(blind, known, thorough=False)
        if blind.explained_by(together):
            parts, unexplained = [Part(blind, together, frozenset(), True)], []
    findings: Findings = []
    undetectable: dict[Mistake, list[int]] = {}
    for mistake in (mistake for part in parts for mistake in part.mistakes):
        if mistake not in undetectable:
            places, undetectable[mistake] = extent(experiment, parts, mistake)
            findings.append((mistake, places))
    alternatives = other_explanations(parts, known, *findings[0]) if len(findings) == 1 and not unexplained else []
    return Forward(findings, undetectable, unexplained, alternatives)


def explain_parts(experiment: Experiment, known: list[Mistake], *, thorough: bool = True) -> list[Part]:
    """Each part by itself, run on the candidate's own input to it, so that no mistake hides another.

    Stops after an unexplained part if the input of the next was not recorded.
    """
    parts: list[Part] = []
    start: torch.Tensor | None = None
    for places in experiment.parts():
        here = replace(experiment, places=places, start=start)
        part = explain_part(here, known, parts, thorough=thorough and all(part.explained for part in parts))
        parts.append(part)
        start = part.experiment.outcome(part.findings) if part.explained else experiment.activation_before(places.stop)
        if start is None:
            break
    return parts


def extent(experiment: Experiment, parts: list[Part], mistake: Mistake) -> tuple[frozenset[int], list[int]]:
    """The places that have a mistake, and the other blocks where it would make no difference.

    A mistake that all explained parts could have is one of the whole model.
    """
    explained = [part for part in parts if part.explained]
    possible = [
        part
        for part in explained
        if part.experiment.explained_by([*part.findings, *part.experiment.throughout(mistake)])
    ]
    places = frozenset(n for part in parts for other, where in part.findings if other == mistake for n in where)
    if len(possible) == len(explained):
        places = frozenset(experiment.places)
    blocks = {n for part in possible for n in part.experiment.places if 0 <= n < experiment.config.n_layers}
    return places, sorted(blocks - places)


def other_explanations(parts: list[Part], known: list[Mistake], named: Mistake, places: frozenset[int]) -> list[str]:
    """The descriptions of other mistakes that, in the same places, would explain all parts as well."""
    return [
        other.says
        for other in known
        if other.name != named.name
        and all(part.experiment.explained_by([(other, places & frozenset(part.experiment.places))]) for part in parts)
    ]
