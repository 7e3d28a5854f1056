"""Which known mistakes in the forward pass reproduce what the candidate computes: found by experiment.

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
from .mistakes import Hypothesis
from .simulate import Mistakes, simulate
from .trace import meaning, stages

# Forward mistakes that are looked for at once, and the tokens on which: enough for any mask, and quick.
MOST, SHORT = 4, 12

# Mistakes, each with the places that have it.
Findings = list[tuple[Hypothesis, frozenset[int]]]


def placed(findings: Findings) -> dict[int, Mistakes]:
    """All mistakes of each place."""
    wrong: dict[int, Mistakes] = {}
    for hypothesis, places in findings:
        for place in places:
            wrong[place] = replace(wrong.get(place, Mistakes()), **hypothesis.changes)
    return wrong


def place_of(stage: str, n_layers: int) -> int:
    """The place that a stage shows; the input of block n is what the place before it gives."""
    if number := re.match(r"trf_blocks\.(\d+)(\.input$)?", stage):
        return int(number[1]) - bool(number[2])
    return -1 if stage in ("tok_emb", "pos_emb") else n_layers


@dataclass
class Experiment:
    """The candidate's trace and everything to reproduce it with, in some places in a row.

    `start` is what goes into the first of them (B, T, E), `tried` all experiments so far.
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

    def agreement(self, findings: Findings) -> tuple[int, float]:
        """How many recorded stages agree before the first that does not, and the last one's error (inf until then)."""
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
        """What the last place gives: the logits, or what goes into the next block (B, T, E)."""
        *_, (_, x) = self.simulated(findings)
        return x

    def throughout(self, *hypotheses: Hypothesis) -> Findings:
        return [(hypothesis, frozenset(self.places)) for hypothesis in hypotheses]

    def without(self, doubted: frozenset[str]) -> "Experiment":
        """The same without the stages of these meanings, but for the last."""
        kept = [stage for stage in self.shared if meaning(stage) not in doubted or stage == self.shared[-1]]
        return replace(self, activations={stage: self.activations[stage] for stage in kept})

    def parts(self) -> list[range]:
        """The places, cut wherever what one gives to the next is recorded: each block by itself if all is."""
        between = [stage for stage in self.activations if re.fullmatch(r"trf_blocks\.\d+(\.input)?", stage)]
        cuts = {self.places.start, self.places.stop, *(place_of(s, self.config.n_layers) + 1 for s in between)}
        return [range(*pair) for pair in pairwise(sorted(cuts))]

    def activation_before(self, place: int) -> torch.Tensor | None:
        """What the candidate itself gave to a place (B, T, E); None where that was not recorded."""
        names = (f"trf_blocks.{place}.input", f"trf_blocks.{place - 1}")
        shape = (*self.input_ids.shape, self.config.emb_dim)
        return next(
            (
                self.activations[name]
                for name in names
                if name in self.activations and self.activations[name].shape == shape
            ),
            None,
        )

    def differing_blocks(self, findings: Findings) -> list[int]:
        """The blocks that do not give what the mistakes let them give, each fed with what the candidate gave it."""
        parts = [replace(self, places=places, start=self.activation_before(places.start)) for places in self.parts()]
        differ = [part for part in parts if part.start is not None and not part.explained_by(findings)]
        return [n for part in differ for n in part.places if n < self.config.n_layers]


def search(experiment: Experiment, known: list[Hypothesis], *, thorough: bool = True) -> Findings:
    """The forward mistakes that reproduce the candidate with its own weights, found greedily.

    At each step the mistake wins that makes the run agree with the candidate furthest down the graph, be it in all
    places of the experiment or, if `thorough`, in one; where no single one gets further, pairs are tried if `thorough`.
    """
    found: Findings = []
    reached, shared = experiment.agreement([]), experiment.shared
    while not reached[1] <= experiment.bound and len(found) < MOST:
        taken = {name for hypothesis, _ in found for name in hypothesis.changes}
        free = [hypothesis for hypothesis in known if not taken & hypothesis.changes.keys()]
        # It lies behind the last stage that agrees, and not behind the first that does not.
        agreed, differs = (
            place_of(shared[i], experiment.config.n_layers) for i in (max(reached[0] - 1, 0), reached[0])
        )
        alone = (
            range(agreed if reached[0] else experiment.places.start, differs + 1) if len(experiment.places) > 1 else ()
        )
        two = (pair for pair in combinations(free, 2) if not pair[0].changes.keys() & pair[1].changes.keys())
        singles = [experiment.throughout(hypothesis) for hypothesis in free]
        if thorough:
            singles += [[(hypothesis, frozenset({n}))] for n in alone for hypothesis in known]
        groups: list[Iterable[Findings]] = [singles]
        if thorough:
            groups.append(experiment.throughout(*pair) for pair in two)
        for group in groups:
            best: tuple[tuple[int, float], Findings] | None = None
            for supposed in group:
                result = experiment.agreement([*found, *supposed])
                if best is None or (result[0], -result[1]) > (best[0][0], -best[0][1]):
                    best = result, supposed
            if best and (best[0][0] > reached[0] or best[0][1] <= experiment.bound):
                reached, found = best[0], [*found, *best[1]]
                break
        else:
            break
    return found


@dataclass
class Part:
    """Places looked at by themselves: what was found in them, and whether that explains them.

    `experiment` has no stages of the meanings in `doubted`.
    """

    experiment: Experiment
    findings: Findings
    doubted: frozenset[str]
    explained: bool


def explain_part(experiment: Experiment, known: list[Hypothesis], earlier: list[Part], *, thorough: bool) -> Part:
    """The forward mistakes of some places: those of an earlier part, or what the search finds.

    A mistake may sit inside a module, so that the module's own output shows it, or behind it. So the first stage that
    differs is believed at first, then not; at last no stage is, but the last.
    """
    ways: dict[tuple[tuple[Hypothesis, ...], frozenset[str]], None] = {((), frozenset()): None}  # a set in order
    for part in earlier:
        ways |= {(told, part.doubted): None for told in (tuple(h for h, _ in part.findings), ()) if part.explained}
    for told, doubted in ways:
        judge, findings = experiment.without(doubted), experiment.throughout(*told)
        if judge.explained_by(findings):
            return Part(judge, findings, doubted, True)
    shared, (agreed, _) = experiment.shared, experiment.agreement([])
    first: Findings = []
    trials = [frozenset[str](), frozenset({meaning(shared[agreed])}), frozenset(map(meaning, shared))]
    for trial, doubted in enumerate(trials):
        judge = experiment.without(doubted)
        if trial and judge.shared == shared:
            continue
        # With one stage left, each experiment runs to the end: singles only, where there were more.
        findings = search(judge, known, thorough=thorough and (trial < 2 or len(experiment.places) == 1))
        if judge.explained_by(findings):
            return Part(judge, findings, doubted, True)
        first = first or findings
    return Part(experiment, first, trials[0], False)


@dataclass
class Forward:
    """The forward mistakes.

    `undetectable` are the other blocks that could have a mistake without making a difference, `unexplained` the places
    that no mistake explains, `alternatives` what else would explain a single one.
    """

    findings: Findings
    undetectable: dict[Hypothesis, list[int]]
    unexplained: list[range]
    alternatives: list[str]


def forward_mistakes(experiment: Experiment, known: list[Hypothesis]) -> Forward:
    """The forward mistakes that explain the candidate, or as many of them as could be found.

    Each block is looked at by itself, fed with what the candidate gave it, so that no mistake hides another's place.
    A mistake that all parts could have is one of the whole model.
    """
    parts: list[Part] = []
    start: torch.Tensor | None = None
    for places in experiment.parts():
        here = replace(experiment, places=places, start=start)
        part = explain_part(here, known, parts, thorough=all(part.explained for part in parts))
        parts.append(part)
        start = part.experiment.outcome(part.findings) if part.explained else experiment.activation_before(places.stop)
        if start is None:
            break
    unexplained = [part.experiment.places for part in parts if not part.explained]
    if unexplained and len(experiment.parts()) > 1:
        blind = experiment.without(frozenset(map(meaning, experiment.shared)))
        findings = search(blind, known, thorough=False)
        if blind.explained_by(findings):
            parts, unexplained = [Part(blind, findings, frozenset(), True)], []
    sure = [part for part in parts if part.explained]
    found: Findings = []
    undetectable: dict[Hypothesis, list[int]] = {}
    for hypothesis in dict.fromkeys(hypothesis for part in parts for hypothesis, _ in part.findings):
        having = frozenset[int]().union(*(p for part in parts for other, p in part.findings if other is hypothesis))
        fits = [p for p in sure if p.experiment.explained_by([*p.findings, *p.experiment.throughout(hypothesis)])]
        having = frozenset(experiment.places) if len(fits) == len(sure) else having
        found.append((hypothesis, having))
        possible = {n for part in fits for n in part.experiment.places if 0 <= n < experiment.config.n_layers}
        undetectable[hypothesis] = sorted(possible - having)
    alternatives = []
    if not unexplained and len(found) == 1:
        ((named, having),) = found
        others = [hypothesis for hypothesis in known if hypothesis.name != named.name]
        alternatives = [
            other.says
            for other in others
            if all(
                part.experiment.explained_by([(other, having & frozenset(part.experiment.places))]) for part in parts
            )
        ]
    return Forward(found, undetectable, unexplained, alternatives)
