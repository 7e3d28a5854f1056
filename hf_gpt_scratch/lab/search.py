"""The search for mistakes in the forward pass: which edits reproduce the candidate, stage by stage.

Each recorded stage is an equation: what the candidate computed there must be what GPT-2 computes from the candidate's
own values before it. So no mistake hides another. Where the equation fails, edits of what it consults are tried: those
of the table (mistakes.py) and those fitted to the numbers (fits.py).

Shapes: B batch, T tokens, E emb_dim.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import torch

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .compare import errors
from .fits import fits
from .mistakes import Mistake, order_mistake, wiring_mistake
from .simulate import WIRING, Edits, Forward, everywhere
from .trace import BLOCK_STAGES, LOGITS, MODULE_INPUTS

# The most mistakes that are combined, and the most multiplications that a search for pairs may cost.
MOST, MOST_WORK, LEAST_WORK = 12, 6e11, 1e8
# The most tokens per sequence that a search runs on: enough for any mask, and quick.
SHORT = 32
# A relative error below this is rounding, so that of two explanations the first is taken.
ROUNDING = 1e-11

Findings = list[tuple[Mistake, frozenset[int]]]  # mistakes, each with the places that have it
FAILURES = (ValueError, RuntimeError, KeyError, IndexError, TypeError)  # of edits that do not fit this model


def placed(findings: Findings) -> dict[int, dict[str, Any]]:
    """The edits of each place."""
    wrong: dict[int, dict[str, Any]] = {}
    for mistake, places in findings:
        for place in places:
            wrong.setdefault(place, {}).update(mistake.changes)
    return wrong


def recorded_stages(n_layers: int) -> list[str]:
    """Everything that may be recorded, in execution order."""
    inside: list[str] = []
    for stage in BLOCK_STAGES:
        if f"{stage}.input" in MODULE_INPUTS:
            inside.append(f"{stage}.input")
        inside.append(stage)
    blocks = [f"trf_blocks.{n}.{stage}".rstrip(".") for n in range(n_layers) for stage in inside]
    return ["tok_emb", "pos_emb", *blocks, "final_norm.input", "final_norm", f"{LOGITS}.input", LOGITS]


def key_of(stage: str) -> str:
    """A stage without the number of its block."""
    return re.sub(r"^trf_blocks\.\d+", "block", stage)


def agreement(simulated: torch.Tensor, recorded: torch.Tensor) -> float:
    """The relative error; inf if shapes or the positions of values that are not finite differ.

    If no recorded value is finite, 0 where none is in the simulation: that contradicts nothing, but it is no evidence.
    """
    return errors(recorded, simulated)[2]


@dataclass
class Equation:
    """A recorded stage: its error, the slots consulted and the given stages used."""

    error: float
    read: frozenset[tuple[int, str]]
    taken: frozenset[str]


@dataclass
class Experiment:
    """The candidate's trace, and everything needed to reproduce it.

    `findings` are accepted so far; `doubted` stages are neither given nor compared. `repeated` stages ran more often
    than in GPT-2, and only their first run is known. `tried` counts experiments.
    """

    config: GPTScratchConfig
    input_ids: torch.Tensor
    activations: Mapping[str, torch.Tensor]
    bound: float
    weights: Mapping[str, torch.Tensor]
    findings: Findings = field(default_factory=list)
    doubted: frozenset[str] = frozenset()
    repeated: frozenset[str] = frozenset()
    tried: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self):
        self.activations = {
            stage: usable(stage, tensor, self.input_ids, self.config) for stage, tensor in self.activations.items()
        }
        self.targets = [stage for stage in recorded_stages(self.config.n_layers) if stage in self.activations]
        self.solved: dict[str, Equation] = {}
        self.given = {stage: x for stage, x in self.activations.items() if stage not in self.doubted}
        self.wrong = placed(self.findings)

    def forward(self, target: str, more: Edits | None = None) -> Forward:
        """The pass that computes one stage from all that was recorded but itself, with the findings and more edits."""
        wrong = self.wrong
        if more:
            wrong = wrong | {place: {**wrong.get(place, {}), **edits} for place, edits in more.items()}
        return Forward(self.weights, self.config, self.input_ids, wrong, self.given, target)

    def equation(self, target: str, more: Edits | None = None) -> Equation:
        self.tried[0] += 1
        forward = self.forward(target, more)
        try:
            error = agreement(forward.compute(target), self.activations[target])
        except FAILURES:
            error = math.inf
        return Equation(error, frozenset(forward.read), frozenset(forward.taken))

    def state(self, target: str) -> Equation:
        """The equation of a stage with the findings so far."""
        if target not in self.solved:
            self.solved[target] = self.equation(target)
        return self.solved[target]

    def fails(self, target: str) -> bool:
        return not self.state(target).error <= self.bound

    @property
    def compared(self) -> list[str]:
        return [target for target in self.targets if target not in self.doubted]

    def with_findings(self, findings: Findings) -> "Experiment":
        return replace(self, findings=findings)

    def doubting(self, stages: Iterable[str]) -> "Experiment":
        return replace(self, doubted=self.doubted | frozenset(stages))

    def affected(self, added: Findings) -> list[str]:
        """The compared stages whose equation consults what these mistakes change."""
        changed = {(place, slot) for mistake, places in added for place in places for slot in mistake.slots}
        return [target for target in self.compared if self.state(target).read & changed]

    def outcome(self, findings: Findings, weights: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The logits of the whole pass, nothing given (B, T, V)."""
        return Forward(weights or self.weights, self.config, self.input_ids, placed(findings))[LOGITS]


def usable(stage: str, tensor: torch.Tensor, input_ids: torch.Tensor, config: GPTScratchConfig) -> torch.Tensor:
    """A recorded tensor in the usual shape (B, T, …), if it has as many values."""
    batch, tokens = input_ids.shape
    if stage.endswith("att.weights"):
        whole = (batch, config.n_heads, tokens, tokens)
        return tensor.reshape(whole) if tensor.numel() == math.prod(whole) else tensor
    if stage == "pos_emb":
        by_sequence = tensor.ndim == 2 and len(tensor) == batch != tokens
        return tensor[:, None] if by_sequence else tensor
    if tensor.ndim == 3:
        return tensor
    return tensor.reshape(*input_ids.shape, -1) if tensor.numel() % input_ids.numel() == 0 else tensor


# The search


def search(experiment: Experiment, known: list[Mistake], *, thorough: bool = True) -> tuple[Experiment, list[str]]:
    """The experiment with findings that make as many equations true as possible, and the stages still unexplained.

    If `thorough`, pairs of mistakes are tried where no single one explains a stage, and the search goes on behind an
    unexplained stage. Then it names only what a stage in one place shows by itself, and what makes all stages true that
    it changes: an edit found across several places, of which one is not understood, may reproduce one stage by chance.
    """
    unexplained: list[str] = []
    firm: Findings = []
    while len(experiment.findings) < MOST:
        failing = [target for target in experiment.compared if experiment.fails(target) and target not in unexplained]
        if not failing:
            break
        target = failing[0]
        if harmless(experiment, target):
            experiment = experiment.doubting([target])
            continue
        again = any(key_of(other) == key_of(target) for other in unexplained)
        if again and len({place for place, _ in experiment.state(target).read}) > 1:
            added = None  # what is found across places is not kept behind an unexplained stage
        else:
            added = best_edit(experiment, target, known, pairs=thorough and not again, again=again)
        if added is None:
            unexplained.append(target)
            if not thorough:
                break
        else:
            alone = len({place for place, _ in experiment.state(target).read}) == 1
            firm += added if alone and target not in experiment.repeated else []
            experiment = experiment.with_findings([*experiment.findings, *added])
    if unexplained:
        experiment = experiment.with_findings(firm)
        firm = [one for one in firm if not any(experiment.fails(other) for other in experiment.affected([one]))]
        experiment = experiment.with_findings(firm)
    failing = [target for target in experiment.compared if experiment.fails(target)]
    return experiment, [*unexplained, *(target for target in failing if target not in unexplained)]


def harmless(experiment: Experiment, target: str) -> bool:
    """Whether a stage differs, but nothing that follows from it: it is not what the candidate goes on with."""
    without = experiment.doubting([target])
    followers = [other for other in experiment.compared if target in experiment.state(other).taken]
    limit = min(experiment.bound, 1e-3 * experiment.state(target).error)
    return bool(followers) and all(without.equation(other).error <= limit for other in followers)


def best_edit(
    experiment: Experiment, target: str, known: list[Mistake], *, pairs: bool, again: bool
) -> Findings | None:
    """The edit that makes the equation true, and of several the one that leaves the fewest equations false.

    `pairs` also allows pairs of mistakes. `again`, if such a stage is unexplained in another block, tries only common
    mistakes and simple fits.

    None where no value is finite: any edit that makes NaN would do.
    """
    if not experiment.activations[target].isfinite().any():
        return None
    read = experiment.state(target).read
    slots, places = {slot for _, slot in read}, sorted({place for place, _ in read})
    local = [mistake for mistake in known if mistake.slots & slots and (mistake.common or not again)]
    listed = {mistake.changes for mistake in local}
    fitted = [mistake for mistake in fits(experiment, target, more=not again) if mistake.changes not in listed]
    options = options_of(experiment, target, ([mistake] for mistake in dict.fromkeys([*local, *fitted])), places)
    if not options and pairs:
        common = [mistake for mistake in local if mistake.common]
        narrow = len(places) == 1 and len(local) < 90
        chosen = [*(local if narrow else common), *fitted]
        both = [[a, b] for a, b in combinations(chosen, 2) if not a.slots & b.slots]
        if len(both) * work(experiment, read) <= MOST_WORK:
            options = options_of(experiment, target, both, [])
    if not options:
        return None
    options.sort(key=lambda option: option[0])
    return options[0][1]


def work(experiment: Experiment, read: frozenset[tuple[int, str]]) -> float:
    """Multiplications of one experiment, roughly."""
    width, tokens = experiment.config.emb_dim, experiment.input_ids.numel()
    total = 0.0
    for place in {place for place, _ in read}:
        slots = {slot for other, slot in read if other == place}
        matrices: float = sum(slot.endswith(".transposed") for slot in slots)
        matrices += 3 * any("ff.layers" in slot for slot in slots)
        if "logits" in slots:
            matrices += experiment.config.vocab_size / width
        total += matrices * width * width * tokens + 4 * width * tokens * tokens
    return max(total, LEAST_WORK)


def options_of(
    experiment: Experiment, target: str, groups: Iterable[list[Mistake]], places: list[int]
) -> list[tuple[tuple[float, ...], Findings]]:
    """The groups of mistakes that make the equation of `target` true, each with its rank and places."""
    n_layers = experiment.config.n_layers
    whole = frozenset(everywhere(n_layers))
    options: list[tuple[tuple[float, ...], Findings]] = []
    groups = list(groups)
    for number, group in enumerate(groups):
        changes = {slot: value for mistake in group for slot, value in mistake.changes}
        error = experiment.equation(target, dict.fromkeys(whole, changes)).error
        if error <= experiment.bound:
            left, added = extent(experiment, group, target)
            rank = left, 0.0 if error < ROUNDING else error, float(added[0][1] != whole), float(number)
            options.append((rank, added))
    if not options and len(places) > 1:
        for number, group in enumerate(groups):
            if len(group) == 1 and group[0].common:
                for place in places:
                    error = experiment.equation(target, {place: dict(group[0].changes)}).error
                    if error <= experiment.bound:
                        rank = 0.0, 0.0 if error < ROUNDING else error, 1.0, float(number)
                        options.append((rank, [(group[0], frozenset({place}))]))
    return options


def extent(experiment: Experiment, group: list[Mistake], target: str) -> tuple[float, Findings]:
    """How many equations stay false, at least, with mistakes in all places or in those that have them, and which."""
    whole = frozenset(everywhere(experiment.config.n_layers))
    throughout: Findings = [(mistake, whole) for mistake in group]
    changed = experiment.with_findings([*experiment.findings, *throughout])
    mended, harmed, harmed_in = set(), 0, set()
    slots = frozenset().union(*(mistake.slots for mistake in group))
    affected = experiment.affected(throughout)
    still = 0
    for other in affected:
        before, after = experiment.fails(other), changed.fails(other)
        where = {place for place, slot in experiment.state(other).read if slot in slots}
        if before and not after:
            mended |= where
        elif after and not before:
            harmed += 1
            harmed_in |= where if len(where) == 1 else set()
        still += before and after
    total = sum(experiment.fails(other) for other in experiment.compared if other not in affected)
    if not harmed:
        return float(total + still), throughout
    own = {place for place, slot in experiment.state(target).read if slot in slots}
    # In the places where it mends something; elsewhere it would harm, or make no difference.
    some = frozenset((mended - harmed_in) | own)
    partly: Findings = [(mistake, some) for mistake in group]
    changed = experiment.with_findings([*experiment.findings, *partly])
    return float(total + sum(changed.fails(other) for other in affected)), partly


# The whole search


@dataclass
class Found:
    """A mistake, the places that have it, and its edits there.

    `undetectable` are the other blocks in which it would make no difference.
    """

    mistake: Mistake
    edits: dict[int, dict[str, Any]]
    undetectable: list[int] = field(default_factory=list)

    @property
    def places(self) -> frozenset[int]:
        return frozenset(self.edits)


@dataclass
class Outcome:
    """The mistakes in the forward pass, and the experiment that found them.

    `unexplained` are the stages that no mistake explains, `alternatives` what other mistakes would explain a single
    one's effects.
    """

    found: list[Found]
    unexplained: list[str]
    alternatives: list[str]
    experiment: Experiment


def forward_mistakes(experiment: Experiment, known: list[Mistake], *, thorough: bool = True) -> Outcome:
    """The mistakes in the forward pass that explain the candidate, or as many of them as the search finds.

    Unless `thorough`, no pairs are tried, and no stage is doubted.
    """
    solved, unexplained = search(experiment, known, thorough=thorough)
    if unexplained and thorough:
        # A mistake may be behind a module's own result, so what ran too often is doubted, then stages like the first
        # that differs, then all inside the blocks.
        inside = [stage for stage in experiment.targets if re.match(r"trf_blocks\.\d+\.(?!input$)", stage)]
        alike = [stage for stage in experiment.targets if key_of(stage) == key_of(unexplained[0])]
        for doubted in filter(None, (experiment.repeated, alike, inside)):
            other, left = search(experiment.doubting(doubted), known, thorough=False)
            if not left and other.compared:
                solved, unexplained = other, left
                break
    found = merged(solved.findings, experiment.config.n_layers)
    for one in found:
        one.undetectable = elsewhere(solved, one)
    alternatives = []
    if len(solved.findings) == 1 and not unexplained:
        alternatives = other_explanations(solved.with_findings([]), known, *solved.findings[0])
    return Outcome(found, unexplained, alternatives, solved)


def merged(findings: Findings, n_layers: int) -> list[Found]:
    """The findings with what each block's modules read as one mistake, so too what the blocks read from each other."""
    wirings: dict[int, list[Mistake]] = {}
    chain: dict[int, Mistake] = {}
    result: dict[Mistake, Found] = {}
    for mistake, places in findings:
        for place in sorted(places):
            if mistake.slots <= set(WIRING):
                if 0 <= place < n_layers:
                    wirings.setdefault(place, []).append(mistake)
            elif mistake.slots == {"input"}:
                if place >= 0:
                    chain[place] = mistake
            else:
                result.setdefault(mistake, Found(mistake, {})).edits[place] = dict(mistake.changes)
    for place, several in wirings.items():
        changes = {slot: value for mistake in several for slot, value in mistake.changes}
        one = several[0] if len(several) == 1 else wiring_mistake(changes)
        result.setdefault(one, Found(one, {})).edits[place] = changes
    for found in result.values():
        if found.mistake.slots <= set(WIRING) and found.places == set(range(n_layers)):
            found.edits |= {-1: {}, n_layers: {}}  # the whole model: nothing else has such slots
    if chain:
        one = order_mistake({place: dict(mistake.changes)["input"] for place, mistake in chain.items()}, n_layers)
        result[one] = Found(one, {place: dict(mistake.changes) for place, mistake in chain.items()})
    return list(result.values())


def elsewhere(experiment: Experiment, found: Found) -> list[int]:
    """The other blocks in which a mistake would make no difference."""
    n_layers, others = experiment.config.n_layers, []
    for n in sorted(set(range(n_layers)) - found.places):
        consulted = experiment.affected([(found.mistake, frozenset({n}))])
        more = {n: dict(found.mistake.changes)}
        if all(experiment.equation(other, more).error <= experiment.bound for other in consulted):
            others.append(n)
    return others


def other_explanations(
    experiment: Experiment, known: list[Mistake], named: Mistake, places: frozenset[int]
) -> list[str]:
    """The descriptions of other mistakes that, in the same places, make all equations true as well."""
    failing = [target for target in experiment.compared if experiment.fails(target)]
    says = []
    for other in known if failing else []:
        added: Findings = [(other, places)]
        if other.name == named.name or failing[0] not in experiment.affected(added):
            continue
        more = {place: dict(other.changes) for place in places}
        if experiment.equation(failing[0], more).error <= experiment.bound:
            changed = experiment.with_findings(added)
            if not any(changed.fails(target) for target in {*failing, *experiment.affected(added)}):
                says.append(other.says)
    return says
