"""Why a candidate differs from the reference: the known mistakes that reproduce it, established by experiment.

Weights and forward pass are diagnosed separately. Weights: which tensors differ, and what was done to them
(`weight_faults.py`). Forward pass: GPT-2's, with one switch for each mistake (`simulate.py`), runs on the candidate's
own weights until it reproduces the candidate's activations stage by stage (`search.py`), block by block where hooks
reach the blocks, so that each mistake is located. The proof is the same run with the mistakes undone one after another:
the error against the reference vanishes.

Shapes: B batch, T tokens, E emb_dim, V vocabulary.
"""

import math
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..errors import few
from .compare import Comparison, errors, logit_bound, stage_bound
from .mistakes import Mistake, mistakes
from .search import SHORT, Experiment, Forward, forward_mistakes
from .simulate import QKV, Weights, everywhere
from .subject import Subject
from .trace import LOGITS, Activations, double_trace, stages, trace
from .weight_faults import Change, grouped, in_any_block, is_bias, listed, weight_changes


@dataclass(frozen=True)
class Fault:
    """A mistake confirmed by experiment.

    `error` is the relative logit error against the reference with this fault and those before it repaired; `blocks` are
    the blocks that have it, empty if the whole model does.
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
    """The faults in execution order; `explained` if together they reproduce the candidate.

    `error` is the candidate's relative logit error, `unexplained` the error that remains against the reference with
    these faults, `tried` the number of experiments.
    """

    faults: list[Fault]
    explained: bool
    error: float
    unexplained: float
    tried: int
    note: str = ""
    alternatives: list[str] = field(default_factory=list)

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
    everything = everywhere(config.n_layers)
    check = Experiment(config, input_ids, comparison.traces[0], bound, right, everything)
    if not check.explained_by([]):
        note = "the reference itself is not the GPT-2 that its config describes, so nothing can be diagnosed against it"
        return Diagnosis.failed(error, note, len(check.tried))
    activations = deterministic_trace(comparison, candidate)
    if activations is None:
        note = "the candidate is random even with dropout switched off; make it deterministic first"
        return Diagnosis.failed(error, note, len(check.tried))

    given = {name: w.to(dtype) for name, w in candidate.weights().items()}
    # Tensors that are equal are kept once: in float64 a large model is large.
    given = {name: right[name] if name in right and torch.equal(w, right[name]) else w for name, w in given.items()}
    own, changes = complete(given, right), grouped(weight_changes(right, given))
    short = input_ids[:1, :SHORT]
    brief = run(candidate, short, comparison.dtype, dropout=comparison.deterministic)
    experiment = Experiment(config, short, brief, bound, own, everything)
    forward = forward_mistakes(experiment, mistakes(config, epsilons(candidate)), thorough=not comparison.quick)
    whole = Experiment(config, input_ids, activations, bound, own, everything)
    unexplained = errors(whole.outcome(forward.findings), activations[LOGITS])[2]
    faults = undone(whole, target, right, changes, forward)
    if not comparison.deterministic:
        blocks = replace(whole, activations=comparison.traces[1]).differing_blocks(forward.findings)
        fault = dropout_fault(candidate.module.training, blocks, config.n_layers)
        faults.insert(0, replace(fault, error=errors(target, activations[LOGITS])[2]))
    tried = len(check.tried) + len(experiment.tried)
    if unexplained <= bound:
        return Diagnosis(faults, True, error, unexplained, tried, alternatives=forward.alternatives)
    note = unexplained_note(comparison, faults, forward.unexplained)
    if comparison.quick:
        note += "; --quick has tried only single mistakes, so try without it"
    return Diagnosis(faults, False, error, unexplained, tried, note)


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
    experiment: Experiment,
    target: torch.Tensor,
    right: Weights,
    changes: list[list[Change]],
    forward: Forward,
) -> list[Fault]:
    """All faults in execution order, each with the error that remains once it and those before it are undone.

    Args:
        target: the reference's logits.
        right: the reference's weights.
    """
    n_layers = experiment.config.n_layers
    order = stages(n_layers)
    found: list[tuple[int, Fault, list[str], Mistake | None]] = []
    for alike in changes:
        tensors = [change.tensor for change in alike]
        found.append((order.index(tensors[0].rpartition(".")[0]), weight_fault(alike, n_layers), tensors, None))
    for mistake, places in forward.findings:
        first, fault = forward_fault(mistake, places, forward.undetectable[mistake], n_layers)
        found.append((order.index(first), fault, [], mistake))
    found.sort(key=lambda item: item[0])
    left, faults = list(forward.findings), []
    weights = dict(experiment.weights)
    for _, fault, tensors, undone_mistake in found:
        weights |= {name: right[name] for name in tensors}
        left = [(mistake, places) for mistake, places in left if mistake != undone_mistake]
        error = errors(target, replace(experiment, weights=weights).outcome(left))[2]
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


def forward_fault(
    mistake: Mistake, places: frozenset[int], undetectable: list[int], n_layers: int
) -> tuple[str, Fault]:
    """The stage where a mistake in the forward pass first shows, and the fault.

    Args:
        undetectable: the other blocks where it would make no difference.
    """
    if len(places) == len(everywhere(n_layers)):
        fault = Fault(mistake.name, mistake.says, mistake.stage_in("{n}"), mistake.remedy, "forward")
        return mistake.stage_in(0), fault
    blocks = sorted(n for n in places if 0 <= n < n_layers)
    stages_hit = [mistake.stage_in(n) for n in blocks]
    where = []
    if blocks:
        where.append(named_blocks(blocks) if len(blocks) < n_layers else "all blocks, but not in the final norm")
    if n_layers in places:
        stages_hit.append("final_norm")
        where.append("the final norm")
    says = f"{mistake.says}, in {' and '.join(where)}"
    if undetectable:
        says += f"; in {named_blocks(undetectable)} it makes no difference"
    elif len(blocks) + (n_layers in places) == 1:
        says += " only"
    return stages_hit[0], Fault(mistake.name, says, listed(stages_hit), mistake.remedy, "forward", blocks=blocks)


def named_blocks(blocks: list[int], *, only: bool = False) -> str:
    """block 3; blocks 3 and 7; blocks 2, 3 and 7; blocks 2 to 7. `only`: "block 3 only", if it is one."""
    if len(blocks) == 1:
        return f"block {blocks[0]}" + " only" * only
    if len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1)):
        return f"blocks {blocks[0]} to {blocks[-1]}"
    return f"blocks {', '.join(map(str, blocks[:-1]))} and {blocks[-1]}"


def unexplained_note(comparison: Comparison, faults: list[Fault], unexplained: list[range]) -> str:
    first = comparison.first_divergence
    where = f"the first stage that differs is {first.stage} ({first.meaning})" if first else "only the logits differ"
    if faults and unexplained and len(unexplained[0]) == 1:
        n, last = unexplained[0][0], len(comparison.growth)
        place = "before the blocks" if n < 0 else f"in block {n}" if n < last else "after the blocks"
        where = f"the unexplained error arises {place}"
    known = "the mistakes named do not explain everything" if faults else "no known mistake explains it"
    return f"{known}; {where}: look there"


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
