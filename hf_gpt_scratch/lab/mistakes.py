"""The mistakes that people make in a GPT's forward pass, as a table.

A row has a mistake's name, the first stage that shows it, its description, its remedy, and the switch of the simulation
(`Switches` in simulate.py) that makes it. Functions below the table add the rows that depend on the config.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .simulate import QKV, Switches
from .trace import BLOCK_STAGES, LOGITS, stages


@dataclass(frozen=True)
class Mistake:
    """A mistake in the forward pass. `stage` is the first that shows it, without the block's number in a block."""

    name: str
    stage: str
    says: str
    remedy: str
    switch: str
    value: Any = True

    def stage_in(self, block: int | str) -> str:
        """The full name of `stage`, in this block if it is in a block."""
        return f"trf_blocks.{block}.{self.stage}".rstrip(".") if self.stage in BLOCK_STAGES else self.stage

    def switched_on(self, switches: Switches) -> Switches:
        """The switches with that of this mistake set too."""
        return Switches(**{**vars(switches), self.switch: self.value})


BOTH_NORMS = "x = x + att(norm1(x)); x = x + ff(norm2(x))"
MASK = "scores.masked_fill(torch.triu(ones, diagonal=1).bool(), -inf), then softmax"
SCALE = "attn_scores / keys.shape[-1] ** 0.5, once"
POSITIONS = "pos_emb(torch.arange(num_tokens)): the first token has position 0"
TRANSPOSE = "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: transpose"
BIAS = "every layer of GPT-2 but the head has a bias"
SHORTCUT = "x = x + shortcut after attention and after the feed-forward network"
HIDES_DIAGONAL = "the mask includes the diagonal: a token does not see itself"

# Rows of one stage are tried in this order.
CATALOGUE = (
    Mistake("off-by-one-positions", "pos_emb", "positions start at 1 instead of 0", POSITIONS, "positions", 1),
    Mistake("off-by-one-positions", "pos_emb", "positions start at -1 instead of 0", POSITIONS, "positions", -1),
    Mistake("off-by-one-positions", "pos_emb", "positions start at 2 instead of 0", POSITIONS, "positions", 2),
    Mistake("no-positions", "input", "the position embedding is not added",
            "x = tok_emb(idx) + pos_emb(torch.arange(num_tokens))", "positions", "none"),
    Mistake("unbiased-variance", "norm1", "LayerNorm divides the variance by E − 1, not by E",
            "x.var(dim=-1, keepdim=True, unbiased=False)", "unbiased"),
    Mistake("eps-outside-root", "norm1", "LayerNorm adds eps to the standard deviation, not to the variance",
            "(x - mean) / torch.sqrt(var + eps)", "eps_on_std"),
    Mistake("post-norm", "norm1", "the norms come after the shortcuts are added (post-norm)",
            BOTH_NORMS, "norm_order", "post"),
    Mistake("norm-on-output", "norm1", "the norms are applied to the outputs of attention and feed-forward",
            BOTH_NORMS, "norm_order", "on output"),
    Mistake("missing-bias", "norm1", "the norms add no bias (shift)", BIAS, "no_bias", ("norm",)),
    Mistake("not-transposed", "att.W_query", "W_query, W_key, W_value are applied transposed",
            TRANSPOSE, "transposed", QKV),
    Mistake("not-transposed", "att.W_query", "out_proj, W_query, W_key, W_value are applied transposed",
            TRANSPOSE, "transposed", ("out_proj", *QKV)),
    Mistake("missing-bias", "att.W_query", "W_query, W_key, W_value add no bias", BIAS, "no_bias", QKV),
    Mistake("heads-not-transposed", "att.weights", "heads are split by .view(B, H, T, D) without transpose",
            ".view(B, T, H, D).transpose(1, 2), and back before out_proj", "heads_not_moved"),
    Mistake("missing-scale", "att.weights", "attention scores are not divided by √head_dim", SCALE, "scale", "none"),
    Mistake("doubled-scale", "att.weights", "attention scores are divided by √head_dim twice", SCALE, "scale", "twice"),
    Mistake("scale-by-emb-dim", "att.weights", "attention scores are divided by √emb_dim, not by √head_dim",
            SCALE, "scale", "emb_dim"),
    Mistake("scale-by-n-heads", "att.weights", "attention scores are divided by √n_heads, not by √head_dim",
            SCALE, "scale", "n_heads"),
    Mistake("inverted-scale", "att.weights", "attention scores are multiplied by √head_dim, not divided",
            SCALE, "scale", "times"),
    Mistake("no-mask", "att.weights", "there is no causal mask: tokens see the tokens after them",
            MASK, "mask", "none"),
    Mistake("mask-hides-diagonal", "att.weights", HIDES_DIAGONAL, MASK, "mask", "hides itself"),
    Mistake("mask-hides-diagonal", "att.weights", HIDES_DIAGONAL, MASK, "mask", "hides itself, softly"),
    Mistake("mask-sees-ahead", "att.weights", "the mask is off by one: a token sees the next one",
            MASK, "mask", "sees one ahead"),
    Mistake("mask-upside-down", "att.weights", "the mask is upside down: a token sees itself and the tokens after it",
            MASK, "mask", "upside down"),
    Mistake("mask-after-softmax", "att.weights", "the mask is applied after softmax: rows do not sum to 1",
            MASK, "mask", "after softmax"),
    Mistake("mask-zero-scores", "att.weights", "masked scores are set to 0, not to -inf, before softmax",
            MASK, "mask", "zero scores"),
    Mistake("not-transposed", "att.out_proj", "out_proj is applied transposed",
            TRANSPOSE, "transposed", ("out_proj",)),
    Mistake("missing-bias", "att.out_proj", "out_proj adds no bias", BIAS, "no_bias", ("out_proj",)),
    Mistake("shortcut-after-norm", "norm2.input", "the shortcut adds the normalized input, not the input",
            "keep shortcut = x before x = norm1(x)", "norm_order", "shortcut after norm"),
    Mistake("missing-shortcut", "norm2.input", "there is no shortcut around attention",
            SHORTCUT, "shortcuts", ("attention",)),
    Mistake("missing-shortcut", "norm2.input", "there is no shortcut around attention and feed-forward",
            SHORTCUT, "shortcuts", ("attention", "feed-forward")),
    Mistake("one-norm-for-both", "norm2", "norm1 is used in place of norm2", "x = ff(norm2(x))", "single_norm"),
    Mistake("missing-bias", "ff.layers.0", "ff.layers.0 adds no bias", BIAS, "no_bias", ("ff.layers.0",)),
    Mistake("missing-bias", "ff.layers.2", "ff.layers.2 adds no bias", BIAS, "no_bias", ("ff.layers.2",)),
    Mistake("missing-shortcut", "", "there is no shortcut around feed-forward",
            SHORTCUT, "shortcuts", ("feed-forward",)),
    Mistake("missing-final-norm", "final_norm", "there is no norm after the last block",
            "logits = out_head(final_norm(x))", "final_norm", "missing"),
    Mistake("wrong-head", LOGITS, "the head is tok_emb's matrix, but the checkpoint has a head of its own",
            "load out_head.weight", "tied_head"),
    Mistake("not-logits", LOGITS, "the model returns log_softmax of the logits",
            "return the logits", "output", "log_softmax"),
    Mistake("not-logits", LOGITS, "the model returns softmax of the logits", "return the logits", "output", "softmax"),
)  # fmt: skip

EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "quick_gelu", "tanh", "linear")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function


def scaled_embedding(config: GPTScratchConfig) -> Mistake:
    says = f"token embeddings are multiplied by √emb_dim = {config.emb_dim**0.5:.4g}"
    return Mistake("embedding-scale", "input", says, "GPT-2 adds tok_emb and pos_emb as they are", "embedding_scale")


def wrong_eps(config: GPTScratchConfig, candidate: Iterable[float]) -> list[Mistake]:
    """Other epsilons: those of the candidate's norms, and the usual ones."""
    eps = config.layer_norm_epsilon
    remedy = f"build the norms with eps={eps:g}"
    return [
        Mistake("wrong-eps", "norm1", f"LayerNorm has eps={value:g} instead of {eps:g}", remedy, "norm_eps", value)
        for value in dict.fromkeys([*candidate, *EPSILONS])
        if value != eps
    ]


def wrong_qkv_orders() -> list[Mistake]:
    remedy = "GPT-2's c_attn holds query, key, value, in this order"
    rows = []
    for order in list(permutations(range(3)))[1:]:  # the first is the right one
        names = ", ".join(QKV[i].removeprefix("W_") for i in order)
        says = f"{names} are used as query, key, value"
        rows.append(Mistake("qkv-order", "att.weights", says, remedy, "qkv_order", order))
    return rows


def wrong_heads(config: GPTScratchConfig) -> list[Mistake]:
    """All other numbers of heads that divide emb_dim."""
    remedy = f"build the model with n_heads={config.n_heads}; no tensor's shape shows it"
    rows = []
    for heads in range(1, config.emb_dim + 1):
        if config.emb_dim % heads == 0 and heads != config.n_heads:
            says = f"attention has {heads} head{'s' * (heads > 1)} instead of {config.n_heads}"
            rows.append(Mistake("wrong-n-heads", "att.weights", says, remedy, "n_heads", heads))
    return rows


def wrong_activations(config: GPTScratchConfig) -> list[Mistake]:
    right = config.activation_function
    remedy = 'GPT-2 has nn.GELU(approximate="tanh")' if right == "gelu_new" else f"use {right}"
    rows = []
    for other in ACTIVATIONS:
        if other == right or (other in TANH_GELUS and right in TANH_GELUS):
            continue
        name, says = "wrong-activation", f"the activation is {other}, not {right}"
        if other == "linear":
            says = f"there is no activation instead of {right}"
        elif (other, right) == ("gelu", "gelu_new"):
            name, says = "exact-gelu", "GELU is the exact x · Φ(x), not the tanh approximation"
        rows.append(Mistake(name, "ff.layers.2.input", says, remedy, "activation", other))
    return rows


def mistakes(config: GPTScratchConfig, candidate_eps: Iterable[float] = ()) -> list[Mistake]:
    """All single mistakes in the forward pass, in execution order.

    Args:
        candidate_eps: the epsilons of the candidate's norms.
    """
    generated = [scaled_embedding(config), *wrong_eps(config, candidate_eps), *wrong_qkv_orders()]
    generated += [*wrong_heads(config), *wrong_activations(config)]
    order = stages(1)
    return sorted([*generated, *CATALOGUE], key=lambda mistake: order.index(mistake.stage_in(0)))
