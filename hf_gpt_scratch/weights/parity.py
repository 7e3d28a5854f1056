"""How close a model is to the official one, and the bounds of this project.

Errors of logits and gradients are relative to the largest value of the reference: max|a − b| / max|a|.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, GPT2PreTrainedModel, PreTrainedModel

from ..errors import ParityError
from ..model.modeling_gpt_scratch import GPTScratchPreTrainedModel
from ..model.weight_map import SCRATCH_PREFIX, TABLE, to_gpt2_state_dict, to_scratch_state_dict, without_prefix

# Both models in float32. Measured: at most 4e-7 on tiny random pairs and the trained one, 9.2e-7 at the official sizes
# (tests/model/test_parity_real_size.py, examples/quickstart.py); a wrong transpose, activation or mask makes 1e-3 and
# more.
FP32_LOGITS = 1e-5
# The mean loss averages the errors of the logits; measured at most 1.5e-7 on the same pairs.
FP32_LOSS = 2e-6
# Sums over all tokens; measured at most 1.2e-6 on the same pairs, 1.0e-6 at 355M.
FP32_GRADIENTS = 2e-5
# Our RMS error against a float64 reference ÷ the official model's own, same weights: 1 except for the order of sums.
# Measured 0.98 to 1.02 in float32, 0.96 to 1.02 in bfloat16.
FLOAT64_RATIO = 1.05
# One stage of two models, in the lab. In float64, a correct one has 1e-13 at most, or 1e-7 where it multiplies by a
# float32 constant; eps=1e-6 instead of 1e-5 moves the first norm of a tiny random pair by 3e-5.
FLOAT64_STAGE = 1e-6
# For models that do not run in float64. Measured at most 2e-6 on the same pairs; a wrong eps is only just above it.
FP32_STAGE = 1e-5


@dataclass(frozen=True)
class LogitParity:
    """Two models' logits on the same tokens."""

    tokens: int
    max_abs_logit: float
    max_abs_error: float
    top1_agreement: float

    @property
    def relative_error(self) -> float:
        return self.max_abs_error / self.max_abs_logit if self.max_abs_logit else self.max_abs_error


@dataclass(frozen=True)
class Verification:
    """The measurements of `verify_models`: float32 logits, greedy continuations and the weights themselves."""

    logits: LogitParity
    logit_bound: float
    greedy_tokens: int
    greedy_equal: bool
    tensors: int
    weights_equal: bool

    @property
    def passed(self) -> bool:
        # `<=` is False for NaN, as it must be.
        return self.logits.relative_error <= self.logit_bound and self.greedy_equal and self.weights_equal

    def to_dict(self) -> dict[str, Any]:
        figures = asdict(self)
        figures["logits"]["relative_error"] = self.logits.relative_error
        return finite({**figures, "passed": self.passed})

    def __str__(self) -> str:
        same = {True: "equal", False: "DIFFERENT"}
        return (
            f"logits: max |error| {self.logits.max_abs_error:.1e} of max |logit| {self.logits.max_abs_logit:.3g}, "
            f"relative {self.logits.relative_error:.1e} (bound {self.logit_bound:.0e}), "
            f"top-1 agreement {self.logits.top1_agreement:.2%} on {self.logits.tokens} tokens; "
            f"greedy ids: {same[self.greedy_equal]} ({self.greedy_tokens} tokens); "
            f"weights: {same[self.weights_equal]} bit for bit ({self.tensors} tensors)"
        )


def finite(value: Any) -> Any:
    """The value for JSON, which has neither NaN nor infinity: these become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value


def relative_error(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """max|reference − candidate| / max|reference|, computed in float64."""
    reference, candidate = reference.detach().double(), candidate.detach().double()
    largest = reference.abs().max().item()
    error = (reference - candidate).abs().max().item()
    return error / largest if largest else error


def rms_error(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """√mean(reference − candidate)², computed in float64."""
    return (reference.detach().double() - candidate.detach().double()).square().mean().sqrt().item()


def probe_ids(vocab_size: int, context_length: int, batch: int = 2, length: int = 64) -> torch.Tensor:
    """Random token ids (batch, length), the same on every call; shorter if the model is."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch, min(length, context_length)), generator=generator)


@functools.cache
def warm_up() -> None:
    """Runs the elementwise functions once on several threads.

    In about one of a few hundred processes, the very first such call has been seen to compute tanh with errors of up
    to 1e-4 in the part of the second thread. The fault is in torch, and affects only the official model's GELU.
    """
    torch.tanh(torch.zeros(1 << 20))


@torch.no_grad()
def compare_logits(reference, candidate, input_ids: torch.Tensor, **inputs) -> LogitParity:
    """The logits of two models on `input_ids` (B, T); `inputs` go to both."""
    warm_up()
    theirs, ours = (model(input_ids, **inputs).logits for model in (reference, candidate))
    return logit_parity(theirs, ours, input_ids.numel())


@torch.no_grad()
def compare_outputs(reference, candidate, input_ids: torch.Tensor) -> LogitParity:
    """Like `compare_logits`, for models with any heads: the figures of the output with the largest error."""
    warm_up()
    theirs, ours = (model(input_ids) for model in (reference, candidate))
    names = [name for name, value in theirs.items() if isinstance(value, torch.Tensor)]
    parities = [logit_parity(theirs[name], ours[name], input_ids.numel()) for name in names]
    return max(parities, key=lambda parity: (math.isnan(parity.relative_error), parity.relative_error))


def logit_parity(theirs: torch.Tensor, ours: torch.Tensor, tokens: int) -> LogitParity:
    theirs, ours = theirs.double(), ours.double()
    return LogitParity(
        tokens=tokens,
        max_abs_logit=theirs.abs().max().item(),
        max_abs_error=(theirs - ours).abs().max().item(),
        top1_agreement=(theirs.argmax(-1) == ours.argmax(-1)).double().mean().item(),
    )


def greedy_ids(model, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """`input_ids` (B, T) and exactly `max_new_tokens` greedy tokens after them, whatever the model's own settings."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        mask = torch.ones_like(input_ids)
        return model.generate(input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=0)
    finally:
        model.generation_config = kept


def gradient_errors(gpt2, scratch) -> dict[str, float]:
    """The relative error of the gradient of each parameter that has one, by GPT-2's names.

    Raises:
        ValueError: different parameters have gradients in the two models.
    """
    theirs = {name: p.grad for name, p in gpt2.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in scratch.named_parameters() if p.grad is not None}
    return relative_errors(theirs, to_gpt2_state_dict(ours, scratch.config.n_layers))


def relative_errors(reference: Mapping[str, torch.Tensor], candidate: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The relative error of each of a model's gradients.

    The error is divided by no less than a hundredth of the model's largest gradient: a key bias, for example, shifts
    all scores of a query alike, which softmax ignores, so its gradient is rounding noise.

    Raises:
        ValueError: the names differ.
    """
    if reference.keys() != candidate.keys():
        raise ValueError(f"only one of the models has gradients of {sorted(reference.keys() ^ candidate.keys())}")
    largest = max(gradient.abs().max() for gradient in reference.values())
    return {
        name: ((gradient - candidate[name]).abs().max() / max(gradient.abs().max(), 1e-2 * largest)).item()
        for name, gradient in reference.items()
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether shape, dtype and every bit are equal; −0 is not 0, and a NaN is equal to the same NaN."""
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (a, b)))


class Readable(Protocol):
    """A tensor that is read when it is needed, such as a `LazyTensor`."""

    def read(self) -> torch.Tensor: ...


# Biases that a model of ours without `qkv_bias` does not have, and that are zeros in GPT-2.
_ZEROS = tuple({name.removeprefix("trf_blocks.{n}") for row in TABLE if row.zeros_for for name in row.ours})


def differing(reference: Mapping[str, Readable], candidate: Mapping[str, Readable]) -> list[str]:
    """The names of the tensors that are not equal bit for bit, or that one of two models lacks.

    A missing bias of a query, key or value is equal to zeros.

    Args:
        reference: tensors by the book's names, like `candidate`.
    """

    def equal(name: str) -> bool:
        both = [tensors[name].read() for tensors in (reference, candidate) if name in tensors]
        if len(both) == 1 and name.endswith(_ZEROS):
            both.append(torch.zeros_like(both[0]))
        return len(both) == 2 and same_bits(*both)

    return [name for name in sorted(reference.keys() | candidate.keys()) if not equal(name)]


def differing_settings(reference: PreTrainedModel, candidate: PreTrainedModel) -> list[str]:
    """The settings by which two models of one kind use the same weights differently, as text with both values.

    The end token says where `generate` stops, the padding token which token of a padded sequence is classified, and
    the labels what the classes are.
    """
    names = {"score": ("pad_token_id", "id2label"), "classifier": ("id2label",)}
    of_kind = [setting for head, settings in names.items() if hasattr(reference, head) for setting in settings]
    values = {name: [getattr(model.config, name) for model in (reference, candidate)] for name in of_kind}
    if reference.can_generate() and candidate.can_generate():
        ends = [model.generation_config.eos_token_id for model in (reference, candidate)]
        values["eos_token_id"] = [end[0] if isinstance(end, list) and len(end) == 1 else end for end in ends]
    return [
        f"{name} {str(theirs)[:100]} and {str(ours)[:100]}" for name, (theirs, ours) in values.items() if theirs != ours
    ]


def weights_equal(gpt2: GPT2PreTrainedModel, scratch: GPTScratchPreTrainedModel) -> bool:
    """Whether both hold the same numbers, bit for bit. Biases that ours lacks must be zero in GPT-2."""
    theirs = to_scratch_state_dict(gpt2.state_dict(), gpt2.config.n_layer)
    ours = without_prefix(scratch.state_dict(), SCRATCH_PREFIX)
    return not differing(
        *({name: SimpleNamespace(read=tensor.detach) for name, tensor in tensors.items()} for tensors in (theirs, ours))
    )


def measure(reference: Any, candidate: Any, same_weights: bool) -> Verification:
    """Compares two models that should be the same, in float32: all outputs, and a language model's greedy ids.

    Args:
        reference: an official model or one of ours, like `candidate`.
        same_weights: whether the weights are equal, which is compared elsewhere.
    """
    language = reference.can_generate() and not hasattr(reference, "multiple_choice_head")
    # A classifier takes several sequences only if its config names a padding token.
    context = reference.config.max_position_embeddings
    input_ids = probe_ids(reference.config.vocab_size, context, batch=2 if language else 1)
    prompt = input_ids[:1, : min(8, (context + 1) // 2)]
    new_tokens = min(32, context - prompt.shape[1]) if language else 0
    continuations = [greedy_ids(model, prompt, new_tokens) for model in (reference, candidate) if new_tokens]
    return Verification(
        logits=compare_outputs(reference, candidate, input_ids),
        logit_bound=FP32_LOGITS,
        greedy_tokens=new_tokens,
        greedy_equal=all(torch.equal(ids, continuations[0]) for ids in continuations),
        tensors=len(reference.state_dict()),
        weights_equal=same_weights,
    )


def verify_models(gpt2: GPT2PreTrainedModel, scratch: GPTScratchPreTrainedModel) -> Verification:
    """The result of `measure`, with the weights compared in memory.

    Raises:
        ParityError: they are not the same model; the message has the figures.
    """
    verification = measure(gpt2, scratch, weights_equal(gpt2, scratch))
    if not verification.passed:
        raise ParityError(f"the two models differ: {verification}")
    return verification
