"""Two models on the same tokens, stage by stage in execution order: where they diverge, and by how much.

Shapes: B batch, T tokens, E emb_dim, H heads, V vocabulary.
"""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import LabError, few
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM
from ..weights.parity import (
    FLOAT64_STAGE,
    FP32_LOGITS,
    FP32_STAGE,
    differing,
    differing_settings,
    finite,
)
from .compare_page import html_fragment, html_report
from .gradients import gradient_bound, gradient_errors
from .pairing import Match
from .subject import Subject
from .trace import (
    BLOCK_STAGES,
    CHOICES,
    HEAD_STAGES,
    LOGITS,
    MODULE_INPUTS,
    OTHER_STAGES,
    Activations,
    double_trace,
    meaning,
    stages,
    trace,
)

if TYPE_CHECKING:
    from .decoding.report import DecodingReport
    from .diagnose import Diagnosis

Traces = tuple[Activations, Activations]  # of reference and candidate
# What `to_dict` has as it is.
PLAIN_FIGURES = ("reference", "candidate", "kind", "same", "verdict", "different_tensors", "different_settings",
                 "dtype", "bound", "deterministic", "perplexity", "growth", "gradients", "gradients_agree", "extras",
                 "quick", "failure", "notes", "tokens")  # fmt: skip


@dataclass(frozen=True)
class StageError:
    """The candidate's error at one stage; inf where shapes or the positions of NaNs differ.

    `relative` is max|a − b| / max|a|; `float32` is the same in the float32 run.
    """

    stage: str
    meaning: str
    max_abs: float
    rms: float
    relative: float
    float32: float
    note: str = ""


@dataclass(frozen=True)
class Distribution:
    """Two models' next-token distributions over all tokens. The KL divergence is KL(reference ‖ candidate) in nats."""

    tokens: int
    max_abs_logit: float
    max_abs_error: float
    relative_error: float
    mean_kl: float
    max_kl: float
    top1_agreement: float


@dataclass
class Comparison:
    """The measurements of `compare_models`. `traces` and `tokenizer` are for the reports, not for `to_dict`.

    `different_tensors` names those of the `tensors` in two checkpoints that are not equal bit for bit; None if one of
    the models is not a checkpoint.
    """

    reference: str
    candidate: str
    tokens: list[list[int]]
    dtype: str
    bound: float
    stages: list[StageError]
    logits: Distribution
    logits_float32: Distribution
    matches: dict[str, list[Match]]
    notes: list[str]
    deterministic: bool = True
    perplexity: dict[str, float] | None = None
    gradients: dict[str, float] | None = None
    diagnosis: "Diagnosis | None" = None
    kind: str = GPTScratchForCausalLM.__name__
    tensors: int = 0
    different_tensors: list[str] | None = None
    different_settings: list[str] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    quick: bool = False
    failure: str = ""
    traces: Traces = field(default=(Activations(), Activations()), repr=False)
    tokenizer: Any = field(default=None, repr=False)

    @property
    def first_divergence(self) -> StageError | None:
        return next((stage for stage in self.stages if not stage.relative <= self.bound), None)

    @property
    def is_language_model(self) -> bool:
        return self.kind == GPTScratchForCausalLM.__name__

    @property
    def equivalent(self) -> bool:
        """Whether both compute the same function, within rounding; `<=` is False for NaN, as it must be."""
        bound = logit_bound(self.dtype)
        choices = [stage.relative for stage in self.stages if stage.stage == CHOICES]
        finite_logits = math.isfinite(self.logits_float32.relative_error)
        agree = all(error <= bound for error in (self.logits.relative_error, *choices))
        return self.deterministic and finite_logits and agree

    @property
    def same(self) -> bool:
        """Whether they are equivalent and, as two checkpoints, have equal weights bit for bit and equal settings."""
        same_function = self.equivalent and not self.failure and not self.extras and self.gradients_agree is not False
        return same_function and not self.different_tensors and not self.different_settings

    @property
    def gradients_agree(self) -> bool | None:
        """Whether all gradients are equal within rounding; None if they were not compared."""
        return None if self.gradients is None else self.worst_gradient[1] <= gradient_bound(self.dtype)

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter with the largest gradient error, and that error; nan if there is none in common."""
        return max((self.gradients or {"": math.nan}).items(), key=lambda item: (math.isnan(item[1]), item[1]))

    @property
    def growth(self) -> list[float]:
        """The relative error after each block."""
        return [stage.relative for stage in self.stages if stage.meaning == BLOCK_STAGES[""]]

    @property
    def verdict(self) -> str:
        bug, rounding = self.logits.relative_error, self.logits_float32.relative_error
        if self.same:
            more = f" and {bug:.1e} in float64: the float32 error is rounding" if self.dtype == "float64" else ""
            bits = f"; {self.tensors} tensors equal bit for bit" if self.different_tensors is not None else ""
            told = f"{more}{self.about_gradients}{bits}"
            return f"the same model: relative logit error {rounding:.1e} in float32{told}"
        if self.equivalent and self.failure:
            return f"different: the logits of {len(self.tokens[0])} tokens are equal, but {self.failure}"
        if self.equivalent and self.extras:
            return (
                "different: with these weights the logits are equal, but the candidate has parameters that GPT-2 does "
                f"not have, and they change the logits: {few(self.extras, 4)}"
            )
        if self.equivalent and self.gradients_agree is False:
            name, error = self.worst_gradient
            return (
                f"different gradients: the logits are equal ({rounding:.1e} in float32), but the gradient of {name} "
                f"has a relative error of {error:.1e}, so the two do not learn alike"
            )
        if self.equivalent and not self.different_tensors:
            return (
                f"different settings: the outputs are equal, but the configs have {'; '.join(self.different_settings)}"
            )
        if self.equivalent:
            return (
                f"different weights: the outputs are equal within rounding ({rounding:.1e} in float32), but "
                f"{len(self.different_tensors or [])} of {self.tensors} tensors are not equal bit for bit"
            )
        if not self.deterministic:
            return "different: the candidate returns different logits on every run"
        if not math.isfinite(rounding):
            return "different: logits that are NaN or infinite equal nothing"
        if bug <= logit_bound(self.dtype):
            return f"different: the {OTHER_STAGES[LOGITS]} agree, but not the {HEAD_STAGES[CHOICES]}"
        fewer = "; --quick: fewer experiments" * self.quick
        if self.dtype == "float64":
            both = f"{rounding:.1e} in float32 and {bug:.1e} in float64"
            return f"different: relative logit error {both}: not rounding{fewer}"
        return f"different: relative logit error {rounding:.1e} in float32; these models do not run in float64{fewer}"

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The mistakes that were found: name, says, where, remedy, kind, and the logit error once repaired."""
        return self.to_dict()["diagnosis"]["faults"] if self.diagnosis else []

    @property
    def about_gradients(self) -> str:
        """What the verdict may say about gradients."""
        if not self.is_language_model:
            return ""
        if self.gradients is None:
            return "; gradients not compared" + ", as asked by --quick" * self.quick
        return f"; gradients agree to {self.worst_gradient[1]:.1e}"

    @property
    def last_logits(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of both models (B, T, V), of the last tokens for which both have some."""
        return aligned_logits(self.traces[0][LOGITS], self.traces[1][LOGITS])

    @property
    def worst_token(self) -> tuple[int, int]:
        """Row and position of the token after which the next-token distributions differ most."""
        kl = kl_divergence(*self.last_logits).nan_to_num(-1.0)  # (B, T)
        row, place = divmod(int(kl.argmax()), kl.shape[1])
        return row, place + len(self.tokens[0]) - kl.shape[1]

    def top_tokens(self, k: int = 8) -> list[dict[str, Any]]:
        """The k most probable tokens after `worst_token`, by rank, of both models."""
        row, place = self.worst_token
        both = [logits[row, place - len(self.tokens[0])].softmax(-1) for logits in self.last_logits]
        tops = [probabilities.topk(min(k, len(probabilities))) for probabilities in both]
        return [
            {
                "rank": rank + 1,
                **{
                    side: {"token": top.indices[rank].item(), "probability": top.values[rank].item()}
                    for side, top in zip(("reference", "candidate"), tops, strict=True)
                },
            }
            for rank in range(len(tops[0].values))
        ]

    def to_html(self, decoding: "DecodingReport | None" = None) -> str:
        """The report as one self-contained page; `decoding` is what `check_decoding` found of the candidate."""
        return html_report(self, decoding)

    def _repr_html_(self) -> str:
        return html_fragment(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that are not finite are strings."""
        first = self.first_divergence
        figures = {name: getattr(self, name) for name in PLAIN_FIGURES}
        return finite(
            figures
            | {
                "diagnosis": self.diagnosis.to_dict() if self.diagnosis else None,
                "first_divergence": first.stage if first else None,
                "logits": asdict(self.logits),
                "logits_float32": asdict(self.logits_float32),
                "stages": [asdict(stage) for stage in self.stages],
                "worst_token": list(self.worst_token),
                "top_tokens": self.top_tokens() if self.is_language_model else [],
                "mapping": {side: [match.to_dict() for match in matches] for side, matches in self.matches.items()},
            }
        )


def logit_bound(dtype: str) -> float:
    return FLOAT64_STAGE if dtype == "float64" else FP32_LOGITS


def stage_bound(dtype: str) -> float:
    return FLOAT64_STAGE if dtype == "float64" else FP32_STAGE


# Measuring


def aligned(reference: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both in float64 and in one shape, or None. One may lack the batch dimension, or have the last tokens only."""
    a, b = reference.double(), candidate.double()
    if a.shape != b.shape and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]:
        b = b.reshape(a.shape)
    if a.ndim != b.ndim or a.shape[0] != b.shape[0]:  # a position embedding is (T, E), (1, T, E) or (B, T, E)
        smaller, larger = sorted((a, b), key=torch.Tensor.numel)
        if smaller.shape[-2:] == larger.shape[-2:] and smaller.numel() == math.prod(smaller.shape[-2:]):
            a, b = a.expand_as(larger), b.expand_as(larger)
    if a.ndim == b.ndim == 3 and a.shape[0::2] == b.shape[0::2] and a.shape[1] != b.shape[1]:
        kept = min(a.shape[1], b.shape[1])
        a, b = a[:, -kept:], b[:, -kept:]
    return (a, b) if a.shape == b.shape else None


def errors(reference: torch.Tensor, candidate: torch.Tensor) -> tuple[float, float, float, str]:
    """max|a − b|, √mean(a − b)², max|a − b| / max|a|, and a note; inf if shapes or the positions of NaNs differ."""
    pair = aligned(reference, candidate)
    if pair is None:
        note = f"shape {tuple(candidate.shape)} instead of {tuple(reference.shape)}"
        return math.inf, math.inf, math.inf, note
    a, b = pair
    sound = a.isfinite()
    if not torch.equal(sound, b.isfinite()):
        broken = (~b.isfinite()).double().mean().item()
        return math.inf, math.inf, math.inf, f"{broken:.0%} of the candidate's values are NaN or infinite"
    difference = (a - b)[sound].abs()
    if not difference.numel():
        return 0.0, 0.0, 0.0, "no finite value in either"
    largest, off = a[sound].abs().max().item(), difference.max().item()
    return off, difference.square().mean().sqrt().item(), off / largest if largest else off, ""


def kl_divergence(reference: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(reference ‖ candidate) per token (B, T) in nats, from logits (B, T, V)."""
    p, q = reference.log_softmax(-1), candidate.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def aligned_logits(reference: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two models' logits (B, T, V) in float64, of the last tokens for which both have some.

    Raises:
        LabError: the vocabularies differ.
    """
    pair = aligned(reference, candidate)
    if pair is None:
        raise LabError(
            f"the logits have shapes {tuple(reference.shape)} and {tuple(candidate.shape)}; compare models of one "
            "vocabulary"
        )
    return pair


def distribution(reference: torch.Tensor, candidate: torch.Tensor) -> Distribution:
    """How two models' logits (B, T, V) differ.

    Raises:
        LabError: the vocabularies differ.
    """
    a, b = aligned_logits(reference, candidate)
    off, _, relative, _ = errors(a, b)
    if not (a.isfinite().all() and b.isfinite().all()):  # such a model equals no other
        relative = math.inf
    kl = kl_divergence(a, b)
    agreement = (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    largest = a.abs().max().item()
    return Distribution(kl.numel(), largest, off, relative, kl.mean().item(), kl.max().item(), agreement)


@torch.no_grad()
def compare_models(
    reference: Subject,
    candidate: Subject,
    input_ids: torch.Tensor,
    *,
    text_ids: torch.Tensor | None = None,
    gradients: bool | None = False,
) -> Comparison:
    """Runs both models on `input_ids` (B, T) in float32 and, if they can, in float64, and compares all stages.

    Args:
        text_ids: (1, any length), for the perplexity of both.
        gradients: also compare the gradients of the mean loss on `input_ids`; None: if the logits are equal.

    Raises:
        LabError: the models are of different kinds, or one does not run on the tokens.
    """
    refuse_kinds(reference, candidate, gradients=gradients)
    torch.manual_seed(0)
    single = (trace(reference, input_ids), trace(candidate, input_ids))
    again = trace(candidate, input_ids)[LOGITS]
    deterministic = errors(single[1][LOGITS], again)[2] <= FP32_LOGITS
    double = (double_trace(reference, input_ids, dropout=True), double_trace(candidate, input_ids, dropout=True))
    dtype, used = "float32", single
    if double[0] is not None and double[1] is not None:
        dtype, used = "float64", (double[0], double[1])
    result = Comparison(
        reference=reference.name,
        candidate=candidate.name,
        tokens=input_ids.tolist(),
        dtype=dtype,
        bound=stage_bound(dtype),
        stages=stage_errors(used, single),
        logits=distribution(used[0][LOGITS], used[1][LOGITS]),
        logits_float32=distribution(single[0][LOGITS], single[1][LOGITS]),
        matches={s: m.matches for s, m in (("reference", reference), ("candidate", candidate)) if m.guessed},
        notes=[*reference.notes, *candidate.notes],
        deterministic=deterministic,
        kind=reference.kind.__name__,
        traces=used,
    )
    if reference.tensors is not None and candidate.tensors is not None:
        result.tensors = len(reference.tensors.keys() | candidate.tensors.keys())
        result.different_tensors = differing(reference.tensors, candidate.tensors)
    if isinstance(reference.module, PreTrainedModel) and isinstance(candidate.module, PreTrainedModel):
        result.different_settings = differing_settings(reference.module, candidate.module)
    if text_ids is not None and reference.is_language_model:
        result.perplexity = {
            side: perplexity(subject, text_ids, input_ids.shape[1])
            for side, subject in (("reference", reference), ("candidate", candidate))
        }
    if gradients or (gradients is None and reference.is_language_model and result.equivalent):
        try:
            result.gradients = gradient_errors(reference, candidate, input_ids, getattr(torch, dtype))
        except LabError as error:
            if gradients:
                raise
            result.failure = str(error)
    return result


def refuse_kinds(reference: Subject, candidate: Subject, *, gradients: bool | None) -> None:
    """Raises LabError if the models are of two kinds, or have no loss to differentiate."""
    if reference.kind is not candidate.kind:
        kinds = " and ".join(f"{subject.name} as {subject.kind.__name__}" for subject in (reference, candidate))
        raise LabError(f"the two are models of different kinds, {kinds}; compare two of one kind")
    if gradients and not reference.is_language_model:
        raise LabError(
            f"gradients are those of a language model's loss, but these are {reference.kind.__name__}; leave "
            "--gradients out"
        )


def stage_errors(traces: Traces, single: Traces) -> list[StageError]:
    """The errors of all stages that both traces have, in execution order; `single` are the float32 traces."""
    measured = []
    for stage in traces[0]:
        if stage in traces[1] and re.sub(r"^trf_blocks\.\d+\.", "", stage) not in MODULE_INPUTS:
            off, rms, relative, note = errors(traces[0][stage], traces[1][stage])
            float32 = errors(single[0][stage], single[1][stage])[2]
            measured.append(StageError(stage, meaning(stage), off, rms, relative, float32, note))
    n_layers = sum(bool(re.fullmatch(r"trf_blocks\.\d+\.input", stage)) for stage in traces[0])
    order = [*stages(n_layers)[:-1], *HEAD_STAGES, LOGITS]
    return sorted(measured, key=lambda error: order.index(error.stage))


def perplexity(subject: Subject, text_ids: torch.Tensor, window: int) -> float:
    """exp of the mean next-token loss on a text (1, N), in consecutive windows of `window` tokens."""
    loss, tokens = 0.0, 0
    for ids in text_ids.split(window, dim=1):
        logits = trace(subject, ids)[LOGITS][:, :-1]
        if ids.shape[1] > 1 and logits.shape[1] == ids.shape[1] - 1:
            loss += F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum").item()
            tokens += ids.shape[1] - 1
    return math.exp(loss / tokens) if tokens and loss / tokens < 700 else math.nan
