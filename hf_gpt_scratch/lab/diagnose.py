"""Why a candidate differs from the reference: the mistakes that reproduce it, established by experiment.

Weights and forward pass are diagnosed separately. Weights: which tensors differ, and what was done to them
(`weight_faults.py`). Forward pass: GPT-2's, made of small operations (`simulate.py`), is edited until it computes from
the candidate's own values what the candidate computes, stage by stage (`search.py`), so that each mistake is located.
The proof: with these edits and the candidate's weights it reproduces the candidate's logits on tokens that the search
has not seen. Where no edit does, `observe.py` says what the stage depends on.

Shapes: B batch, T tokens, E emb_dim, V vocabulary.
"""

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..errors import LabError, few
from ..model.configuration_gpt_scratch import GPTScratchConfig
from .compare import Comparison, errors, logit_bound, stage_bound
from .mistakes import mistakes
from .observe import numbered, observations
from .search import SHORT, Experiment, Found, Outcome, agreement, forward_mistakes
from .simulate import QKV, Edits, Forward, Weights, everywhere
from .subject import Subject
from .trace import LOGITS, Activations, double_trace, meaning, stages, trace
from .weight_faults import Change, grouped, in_any_block, is_bias, listed, weight_changes


@dataclass(frozen=True)
class Fault:
    """A mistake confirmed by experiment.

    `error` is the relative logit error against the reference with this fault and those before it repaired, NaN unless
    the diagnosis is explained; `blocks` are the blocks that have it, empty if the whole model does.
    """

    name: str
    says: str
    where: str
    remedy: str
    kind: str  # "forward", "weights" or "mode"
    error: float = math.nan
    blocks: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name} in {named_blocks(self.blocks)}" if self.blocks else self.name


@dataclass
class Diagnosis:
    """The faults in execution order; `explained` if together they reproduce the candidate on fresh tokens.

    `error` is the candidate's relative logit error, `unexplained` the error with which GPT-2 with these faults
    reproduces the candidate, inf if nothing could be compared, `tried` the number of experiments. `proof` says what was
    reproduced, `observations` what the first unexplained stage depends on.
    """

    faults: list[Fault]
    explained: bool
    error: float
    unexplained: float
    tried: int
    note: str = ""
    alternatives: list[str] = field(default_factory=list)
    proof: str = ""
    observations: list[str] = field(default_factory=list)

    @classmethod
    def failed(cls, error: float, note: str, tried: int = 0) -> "Diagnosis":
        """No faults, and why the search was impossible."""
        return cls([], False, error, error, tried, note)

    @property
    def names(self) -> list[str]:
        return [fault.name for fault in self.faults]

    @property
    def headline(self) -> str:
        """The verdict in a line: only what reproduces the candidate is called found."""
        titles = ", ".join(fault.title for fault in self.faults)
        if not self.faults:
            return "no known mistake"
        return titles if self.explained else f"not fully explained; possibly {titles}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def complete(weights: Weights, reference: Weights) -> dict[str, torch.Tensor]:
    """A model's weights in execution order, with missing tensors filled in.

    Missing biases become zeros and a missing head tok_emb's matrix. Missing norms and positions become the reference's,
    so that only the mistake of leaving them out reproduces the model.
    """
    filled = {}
    for name, right in reference.items():
        if name in weights:
            filled[name] = weights[name]
        elif name == f"{LOGITS}.weight":
            filled[name] = weights["tok_emb.weight"]
        elif is_bias(name) and "final" not in name:
            filled[name] = torch.zeros_like(right)
        else:
            filled[name] = right
    return filled


def in_order(weights: Weights, n_layers: int) -> dict[str, torch.Tensor]:
    """The tensors in execution order, with zeros for missing QKV biases and tok_emb's matrix for a missing head."""
    weights = dict(weights)
    weights.setdefault(f"{LOGITS}.weight", weights["tok_emb.weight"])
    for n in range(n_layers):
        for name in QKV:
            matrix = weights[f"trf_blocks.{n}.att.{name}.weight"]
            weights.setdefault(f"trf_blocks.{n}.att.{name}.bias", matrix.new_zeros(matrix.shape[0]))
    order = {stage: place for place, stage in enumerate(stages(n_layers))}
    return dict(sorted(weights.items(), key=lambda item: order.get(item[0].rpartition(".")[0], -1)))


@torch.no_grad()
def diagnose(comparison: Comparison, reference: Subject, candidate: Subject) -> Diagnosis | None:
    """Why the candidate differs; None if it does not. `comparison` compares these two; a quick one tries less.

    Raises:
        LabError: a model no longer runs.
    """
    if comparison.same:
        return None
    error = comparison.logits.relative_error
    config = reference.config or candidate.config
    if config is None:
        return Diagnosis.failed(error, "neither model's sizes are known; give --cfg")
    input_ids, target = torch.tensor(comparison.tokens), comparison.traces[0][LOGITS]
    dtype, bound = getattr(torch, comparison.dtype), stage_bound(comparison.dtype)
    right = in_order({name: w.to(dtype) for name, w in reference.weights().items()}, config.n_layers)
    if not agreement(Forward(right, config, input_ids, {})[LOGITS], target) <= bound:
        note = "the reference itself is not the GPT-2 that its config describes, so nothing can be diagnosed against it"
        return Diagnosis.failed(error, note, 1)
    activations = deterministic_trace(comparison, candidate)
    if activations is None:
        note = (
            "the candidate gives other logits when it is run again, even with dropout switched off: it is random, or "
            "keeps something from call to call; make it deterministic first"
        )
        return Diagnosis.failed(error, note, 1)

    given = {name: w.to(dtype) for name, w in candidate.weights().items()}
    # Tensors that are equal are kept once: in float64 a large model is large.
    given = {name: right[name] if name in right and torch.equal(w, right[name]) else w for name, w in given.items()}
    own, changes = complete(given, right), grouped(weight_changes(right, given))
    runner = Runner(candidate, comparison.dtype, dropout=comparison.deterministic)
    short, brief = runner.first_of(searched_tokens(input_ids))
    experiment = Experiment(config, short, brief, bound, own, repeated=brief.repeated)
    outcome = forward_mistakes(experiment, mistakes(config, epsilons(candidate)), thorough=not comparison.quick)
    edits = together(outcome.found)
    proof, unexplained = proved(outcome, runner, own, edits, input_ids)
    simulated = Forward(own, config, input_ids, edits)[LOGITS]
    whole = agreement(simulated, activations[LOGITS])
    explained = not outcome.unexplained and unexplained <= bound
    if activations[LOGITS].isfinite().any():
        explained &= whole <= bound
    faults = undone(config, input_ids, target, own, right, changes, outcome.found)
    if not comparison.deterministic:
        blocks = random_blocks(outcome, comparison.traces[1], input_ids)
        fault = dropout_fault(candidate.module.training, blocks, config.n_layers)
        faults.insert(0, replace(fault, error=errors(target, activations[LOGITS])[2]))
    tried = experiment.tried[0] + 1
    if explained:
        return Diagnosis(faults, True, error, unexplained, tried, alternatives=outcome.alternatives, proof=proof)
    reproduced = reproduced_positions(simulated, activations[LOGITS], bound) if unexplained <= bound else None
    note = unexplained_note(comparison, faults, outcome, reproduced)
    if comparison.quick:
        note += "; --quick has tried no pairs of mistakes, so try without it"
    seen = observations(runner, outcome, short)
    faults = [replace(fault, error=math.nan) for fault in faults]
    return Diagnosis(faults, False, error, unexplained, tried, note, observations=seen)


@dataclass
class Runner:
    """Runs the candidate in a dtype in which it is known to run."""

    candidate: Subject
    dtype: str
    dropout: bool

    def __call__(self, input_ids: torch.Tensor) -> Activations:
        """The candidate's trace.

        Raises:
            LabError: it does not run on these tokens.
        """
        return run(self.candidate, input_ids, self.dtype, dropout=self.dropout)

    def first_of(self, choices: list[torch.Tensor]) -> tuple[torch.Tensor, Activations]:
        """The first tokens on which the candidate runs, and its trace; the last must be known to work."""
        for input_ids in choices[:-1]:
            try:
                return input_ids, self(input_ids)
            except LabError:
                continue
        return choices[-1], self(choices[-1])


def searched_tokens(input_ids: torch.Tensor) -> list[torch.Tensor]:
    """The tokens for the search: two sequences if possible, so that what mixes them shows, and an odd number of tokens
    if possible, so that it is not taken for another size."""
    short = input_ids[:2, :SHORT]
    two = torch.cat([short, short.flip(1)]) if len(short) == 1 else short
    odd = two[:, : (two.shape[1] - 1) // 2 * 2 + 1]
    return [odd, two, short]


def fresh_tokens(input_ids: torch.Tensor, vocab_size: int, context: int) -> list[torch.Tensor]:
    """Tokens that the search has not seen: of another length in another batch size, if the candidate runs on them."""
    tokens = min(input_ids.shape[1], SHORT)
    other = tokens - 5 if tokens > 10 else min(tokens + 3, context)
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, other), (2, other), (1, other), (len(input_ids[:2]), tokens))
    return [torch.randint(vocab_size, shape, generator=generator) for shape in shapes]


def together(found: list[Found]) -> Edits:
    """The edits of all mistakes, by place."""
    edits: dict[int, dict[str, Any]] = {}
    for one in found:
        for place, changes in one.edits.items():
            edits.setdefault(place, {}).update(changes)
    return edits


def proved(outcome: Outcome, runner: Runner, own: Weights, edits: Edits, input_ids: torch.Tensor) -> tuple[str, float]:
    """What GPT-2 with these edits reproduces of the candidate on fresh tokens, and its relative error.

    That are the logits, or, if no logit is finite, the stages that have finite values.
    """
    config = outcome.experiment.config
    choices = fresh_tokens(input_ids, config.vocab_size, config.context_length)
    fresh, recorded = runner.first_of(choices)
    forward = Forward(own, config, fresh, edits)
    batch, tokens = fresh.shape
    on = f"on {batch} × {tokens} tokens that the search has not seen"
    if recorded[LOGITS].isfinite().any():
        return f"the candidate's logits {on}", attempt(forward, LOGITS, recorded[LOGITS])
    fresh_run = Experiment(config, fresh, recorded, 0.0, own, doubted=outcome.experiment.doubted)
    figures = [attempt(forward, stage, fresh_run.activations[stage]) for stage in fresh_run.compared]
    finite = sum(bool(fresh_run.activations[stage].isfinite().any()) for stage in fresh_run.compared)
    return f"the {finite} of the candidate's stages that have finite values, {on}", max(figures) if finite else math.inf


def attempt(forward: Forward, stage: str, recorded: torch.Tensor) -> float:
    """The relative error of a stage; inf if the edits make no forward pass."""
    try:
        return agreement(forward[stage], recorded)
    except (ValueError, RuntimeError, KeyError, IndexError):
        return math.inf


def random_blocks(outcome: Outcome, random: Activations, input_ids: torch.Tensor) -> list[int]:
    """The blocks in which a run with dropout differs from what they compute without."""
    solved = outcome.experiment
    run = replace(solved, input_ids=input_ids, activations=random)
    inside = [stage for stage in run.targets if re.match(r"trf_blocks\.\d+\.(?!input$)", stage)]
    ends = run.doubting(inside)
    numbers = [re.fullmatch(r"trf_blocks\.(\d+)(\.input)?", stage) for stage in ends.compared if ends.fails(stage)]
    return sorted({int(number[1]) for number in numbers if number and not number[2]})


def deterministic_trace(comparison: Comparison, candidate: Subject) -> Activations | None:
    """The candidate's trace, without dropout if dropout makes it random; None if it is random even then."""
    if comparison.deterministic:
        return comparison.traces[1]
    first, second = (run(candidate, torch.tensor(comparison.tokens), comparison.dtype, dropout=False) for _ in range(2))
    return first if errors(first[LOGITS], second[LOGITS])[2] <= logit_bound(comparison.dtype) else None


def epsilons(model: Subject) -> list[float]:
    """The epsilons of a model's norms."""
    found = (getattr(module, "eps", None) for module in model.module.modules())
    return sorted({eps for eps in found if isinstance(eps, float)})


def undone(
    config: GPTScratchConfig,
    input_ids: torch.Tensor,
    target: torch.Tensor,
    own: Weights,
    right: Weights,
    changes: list[list[Change]],
    forward: list[Found],
) -> list[Fault]:
    """All faults in execution order, each with the error that remains once it and those before it are undone.

    Args:
        target: the reference's logits.
        own: the candidate's weights.
        right: the reference's weights.
    """
    order = stages(config.n_layers)
    found: list[tuple[int, Fault, list[str], Found | None]] = []
    for alike in changes:
        tensors = [change.tensor for change in alike]
        found.append((order.index(tensors[0].rpartition(".")[0]), weight_fault(alike, config.n_layers), tensors, None))
    for one in forward:
        first, fault = forward_fault(one, config.n_layers)
        found.append((order.index(first), fault, [], one))
    found.sort(key=lambda item: item[0])
    left, faults, weights = list(forward), [], dict(own)
    for _, fault, tensors, undone_mistake in found:
        weights |= {name: right[name] for name in tensors}
        left = [one for one in left if one is not undone_mistake]
        error = attempt(Forward(weights, config, input_ids, together(left)), LOGITS, target)
        faults.append(replace(fault, error=error))
    return faults


def weight_fault(changes: list[Change], n_layers: int) -> Fault:
    """The fault of tensors that were changed in the same way."""
    tensors = [change.tensor for change in changes]
    first, blocks, roles = changes[0], some_blocks(tensors, n_layers), {in_any_block(tensor) for tensor in tensors}
    if any(change.says != first.says for change in changes):
        says = few(list(dict.fromkeys(f"{change.owner} {change.says}" for change in changes)), 3)
    elif blocks and len(roles) == 1:
        says = f"{roles.pop()} {first.says}"
    elif len(tensors) > 1:
        says = f"{len(tensors)} tensors: each {first.says}"
    else:
        says = f"{tensors[0]} {first.says}"
    if blocks and first.name != "block-order":
        says += f", in {named_blocks(blocks, only=True)}"
    return Fault(first.name, says, listed(tensors), first.remedy, "weights", blocks=blocks)


def some_blocks(tensors: list[str], n_layers: int) -> list[int]:
    """The blocks of the tensors; none if these are all blocks, or a tensor is outside them."""
    numbers = [re.match(r"trf_blocks\.(\d+)\.", tensor) for tensor in tensors]
    blocks = sorted({int(number[1]) for number in numbers if number})
    return blocks if all(numbers) and len(blocks) < n_layers else []


def forward_fault(one: Found, n_layers: int) -> tuple[str, Fault]:
    """The stage where a mistake in the forward pass first shows, and the fault."""
    mistake, places = one.mistake, one.places
    if len(places) == len(everywhere(n_layers)):
        fault = Fault(mistake.name, mistake.says, mistake.stage_in("{n}"), mistake.remedy, "forward")
        return mistake.stage_in(0), fault
    blocks = sorted(n for n in places if 0 <= n < n_layers)
    if mistake.slots == {"input"} or mistake.stage_in(0) == mistake.stage_in(1):
        # What blocks read from each other is said by the mistake itself.
        first = [mistake.stage_in(n) for n in blocks] or ["final_norm"]
        return first[0], Fault(mistake.name, mistake.says, listed(first), mistake.remedy, "forward")
    stages_hit = [mistake.stage_in(n) for n in blocks]
    where = []
    if blocks:
        where.append(named_blocks(blocks) if len(blocks) < n_layers else "all blocks, but not in the final norm")
    if n_layers in places:
        stages_hit.append("final_norm")
        where.append("the final norm")
    says = f"{mistake.says}, in {' and '.join(where)}"
    if one.undetectable:
        says += f"; in {named_blocks(one.undetectable)} it makes no difference"
    elif len(blocks) + (n_layers in places) == 1:
        says += " only"
    return stages_hit[0], Fault(mistake.name, says, listed(stages_hit), mistake.remedy, "forward", blocks=blocks)


def named_blocks(blocks: list[int], *, only: bool = False) -> str:
    """block 3; blocks 3 and 7; blocks 2, 3 and 7; blocks 2 to 7. `only`: "block 3 only", if it is one."""
    return numbered("block", blocks) + " only" * (only and len(blocks) == 1)


def reproduced_positions(simulated: torch.Tensor, logits: torch.Tensor, bound: float) -> int:
    """The number of first tokens whose logits (B, T, V) are reproduced."""
    if simulated.shape != logits.shape:
        return 0
    return next(
        (t for t in range(logits.shape[1]) if not agreement(simulated[:, t], logits[:, t]) <= bound), logits.shape[1]
    )


def unexplained_note(comparison: Comparison, faults: list[Fault], outcome: Outcome, reproduced: int | None) -> str:
    """What is not explained, and where it arises as far as that was recorded."""
    known = "the mistakes named do not explain everything" if faults else "no known mistake explains it"
    if not outcome.unexplained:
        if reproduced is not None:
            return (
                f"{known}: the first {reproduced} tokens of each sequence are reproduced, but not those from position "
                f"{reproduced} on; look for what depends on the position: a window, a limit, a mask of another size"
            )
        return (
            f"{known}: each recorded stage is reproduced by itself, but not the logits on tokens not used in the search"
        )
    stage = outcome.unexplained[0]
    # What another stage that is as it should be has consulted, too, is not where it arises.
    experiment = outcome.experiment
    right = [experiment.state(other).read for other in experiment.compared if not experiment.fails(other)]
    read = experiment.state(stage).read
    places = {place for place, _ in read - frozenset().union(*right)} or {place for place, _ in read}
    n_layers = outcome.experiment.config.n_layers
    if len(places) > 1:
        return (
            f"{known}; what was recorded does not say where it arises: {places_in_words(places, n_layers)} may have it"
        )
    [n] = places
    where = "before the blocks" if n < 0 else f"in block {n}" if n < n_layers else "after the blocks"
    return f"{known}; the unexplained error arises {where}, at {stage} ({meaning(stage)}): look there"


def places_in_words(places: set[int], n_layers: int) -> str:
    blocks = sorted(n for n in places if 0 <= n < n_layers)
    words = ["the embeddings"] if -1 in places else []
    words += [named_blocks(blocks)] if blocks else []
    words += ["what follows the blocks"] if n_layers in places else []
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def run(candidate: Subject, input_ids: torch.Tensor, dtype: str, *, dropout: bool) -> Activations:
    """The candidate's trace in a dtype in which it is known to run."""
    exact = double_trace(candidate, input_ids, dropout=dropout) if dtype == "float64" else None
    return exact or trace(candidate, input_ids, dropout=dropout)


def dropout_fault(training: bool, blocks: list[int], n_layers: int) -> Fault:
    if training:
        says, remedy = (
            "dropout is on: the model is in training mode",
            "call model.eval() before comparing or generating",
        )
    else:
        says = "dropout is on even in evaluation mode"
        remedy = "nn.Dropout, or F.dropout(x, p, training=self.training): plain F.dropout ignores model.eval()"
    if not blocks or len(blocks) == n_layers:
        return Fault("dropout-on", says, "the whole model", remedy, "mode")
    says, where = f"{says}, in {named_blocks(blocks, only=True)}", listed([f"trf_blocks.{n}" for n in blocks])
    return Fault("dropout-on", says, where, remedy, "mode", blocks=blocks)
