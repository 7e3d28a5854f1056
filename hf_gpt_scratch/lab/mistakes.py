"""The mistakes that people make in a GPT's forward pass, as a table, and the words for those that are not in it.

A row has a mistake's name, the first stage that shows it, its description, its remedy, and the slots of the simulation
(`GPT2` in simulate.py) with the values that make it. Functions below the table add the rows that depend on the config,
and what a fit (fits.py) finds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, product
from typing import Any

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .simulate import AFFINE, CHANGES, FORMULAS, NORMS, OUTPUTS, PLAIN, QKV, SCALES, TOKENS, WIRING, Sum, plus
from .trace import BLOCK_STAGES, LOGITS, stages


@dataclass(frozen=True)
class Mistake:
    """A mistake in the forward pass. `stage` is the first that shows it, without the block's number in a block.

    `changes` are the slots with their values; `common` mistakes are also tried in pairs, and in models of which little
    can be recorded.
    """

    name: str
    stage: str
    says: str
    remedy: str
    changes: tuple[tuple[str, Any], ...]
    common: bool = False

    def stage_in(self, block: int | str) -> str:
        """The full name of `stage`, in this block if it is in a block."""
        return f"trf_blocks.{block}.{self.stage}".rstrip(".") if self.stage in BLOCK_STAGES else self.stage

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(slot for slot, _ in self.changes)


def row(name: str, stage: str, says: str, remedy: str, *, common=False, **changes) -> Mistake:
    """A row, with its slots as keywords; slot x of all norms is `all_norms_x`."""
    slots: dict[str, Any] = {}
    for slot, value in changes.items():
        if slot.startswith("all_norms_"):
            slots |= {f"{norm}.{slot.removeprefix('all_norms_')}": value for norm in NORMS}
        else:
            slots[slot] = value
    return Mistake(name, stage, says, remedy, tuple(slots.items()), common)


usual = partial(row, common=True)
BOTH_NORMS = "x = x + att(norm1(x)); x = x + ff(norm2(x))"
MASK = "scores.masked_fill(torch.triu(ones, diagonal=1).bool(), -inf), then softmax"
SCALE = "attn_scores / keys.shape[-1] ** 0.5, once"
POSITIONS = "pos_emb(torch.arange(num_tokens)): the first token has position 0"
EMBEDDED = "x = tok_emb(idx) + pos_emb(torch.arange(num_tokens))"
TRANSPOSE = "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: transpose"
BIAS = "every layer of GPT-2 but the head has a bias"
SHORTCUT = "x = x + shortcut after attention and after the feed-forward network"
HIDES_DIAGONAL = "the mask includes the diagonal: a token does not see itself"
HEADS = ".view(B, T, H, D).transpose(1, 2), and back, .transpose(1, 2).reshape(B, T, E), before out_proj"
LAYER_NORM = "scale * (x - mean) / torch.sqrt(var + eps) + shift, over the last dimension"
SOFTMAX_REMEDY = "torch.softmax(scores, dim=-1): each row over the keys"
LOGITS_REMEDY = "return out_head(final_norm(x)) as it is"
IDS = "look up the ids as they are: a shift belongs to the targets of the loss"


def sums(**slots: Sum) -> dict[str, Sum]:
    """The wiring with other sums: norm1, att, norm2, ff say what these read, output what the block returns."""
    return {("output" if slot == "output" else f"{slot}.input"): value for slot, value in slots.items()}


PARALLEL = "x = x + att(norm1(x)), and only then ff(norm2(x))"
# Ways to join the parts of a block, by what each reads: name, first stage, description, remedy, whether common.
WIRINGS: tuple[tuple[str, str, str, str, dict[str, Any], bool], ...] = (
    ("post-norm", "norm1", "the norms come after the shortcuts are added (post-norm)", BOTH_NORMS,
     sums(norm1=plus("input", "att"), att=plus("input"), norm2=plus("norm1", "ff"), ff=plus("norm1"),
          output=plus("norm2")), True),
    ("norm-on-output", "norm1", "the norms are applied to the outputs of attention and feed-forward", BOTH_NORMS,
     sums(norm1=plus("att"), att=plus("input"), norm2=plus("ff"), ff=plus("input", "norm1"),
          output=plus("input", "norm1", "norm2")), True),
    ("shortcut-after-norm", "norm2.input", "the shortcut adds the normalized input, not the input",
     "keep shortcut = x before x = norm1(x)",
     sums(norm2=plus("norm1", "att"), output=plus("norm2", "ff")), True),
    ("shortcut-after-norm", "norm2.input", "the shortcut around attention adds the normalized input, not the input",
     "keep shortcut = x before x = norm1(x)",
     sums(norm2=plus("norm1", "att"), output=plus("norm1", "att", "ff")), False),
    ("shortcut-after-norm", "", "the shortcut around feed-forward adds the normalized input, not the input",
     "keep shortcut = x before x = norm2(x)", sums(output=plus("norm2", "ff")), False),
    ("missing-shortcut", "norm2.input", "there is no shortcut around attention", SHORTCUT,
     sums(norm2=plus("att"), output=plus("att", "ff")), True),
    ("missing-shortcut", "norm2.input", "there is no shortcut around attention and feed-forward", SHORTCUT,
     sums(norm2=plus("att"), output=plus("ff")), True),
    ("missing-shortcut", "", "there is no shortcut around feed-forward", SHORTCUT, sums(output=plus("ff")), True),
    ("stale-shortcut", "", "the second shortcut adds the block's input, not what attention returned", SHORTCUT,
     sums(output=plus("input", "ff")), True),
    ("doubled-shortcut", "norm2.input", "the shortcut around attention is added twice", SHORTCUT,
     sums(norm2=(("input", 2.0), ("att", 1.0)), output=(("input", 2.0), ("att", 1.0), ("ff", 1.0))), True),
    ("doubled-shortcut", "", "the shortcut around feed-forward is added twice", SHORTCUT,
     sums(output=(("input", 2.0), ("att", 2.0), ("ff", 1.0))), True),
    ("doubled-shortcut", "norm2.input", "both shortcuts are added twice", SHORTCUT,
     sums(norm2=(("input", 2.0), ("att", 1.0)), output=(("input", 4.0), ("att", 2.0), ("ff", 1.0))), False),
    ("doubled-shortcut", "", "the block's input is added a second time at its end", SHORTCUT,
     sums(output=(("input", 2.0), ("att", 1.0), ("ff", 1.0))), True),
    ("missing-norm", "norm1", "norm1 is left out: attention reads the block's input", BOTH_NORMS,
     sums(att=plus("input")), True),
    ("missing-norm", "norm2", "norm2 is left out: feed-forward reads its input without a norm", BOTH_NORMS,
     sums(ff=plus("input", "att")), True),
    ("missing-norm", "norm1", "both norms are left out of the block", BOTH_NORMS,
     sums(att=plus("input"), ff=plus("input", "att")), True),
    ("one-norm-for-both", "norm2", "norm1 is used in place of norm2", "x = ff(norm2(x))",
     sums(ff=plus(("norm1", plus("input", "att")))), True),
    ("doubled-norm", "norm1", "norm1 is applied twice", BOTH_NORMS,
     sums(att=plus(("norm1", plus("norm1")))), True),
    ("doubled-norm", "norm2", "norm2 is applied twice", BOTH_NORMS,
     sums(ff=plus(("norm2", plus("norm2")))), True),
    ("doubled-norm", "norm1", "both norms are applied twice", BOTH_NORMS,
     sums(att=plus(("norm1", plus("norm1"))), ff=plus(("norm2", plus("norm2")))), False),
    ("swapped-norms", "norm1", "norm1 and norm2 are exchanged", BOTH_NORMS,
     sums(att=plus("norm2"), norm2=plus("input"), norm1=plus("input", "att"), ff=plus("norm1")), True),
    ("parallel-block", "norm2.input", "attention and feed-forward are parallel: both read the block's input", PARALLEL,
     sums(norm2=plus("input")), True),
    ("parallel-block", "ff.layers.0", "attention and feed-forward are parallel: both read norm1's output", PARALLEL,
     sums(ff=plus("norm1")), True),
    ("wrong-input", "norm2.input", "feed-forward reads attention's output without the shortcut", BOTH_NORMS,
     sums(norm2=plus("att")), True),
    ("feed-forward-first", "norm1", "feed-forward runs before attention", BOTH_NORMS,
     sums(norm2=plus("input"), norm1=plus("input", "ff")), True),
    ("feed-forward-first", "norm1", "feed-forward, behind the first norm, runs before attention, behind the second",
     BOTH_NORMS, sums(ff=plus("norm1"), norm2=plus("input", "ff"), att=plus("norm2")), True),
    ("missing-feed-forward", "", "the feed-forward network is left out", BOTH_NORMS, sums(output=plus("input", "att")),
     True),
    ("missing-attention", "norm2.input", "attention is left out", BOTH_NORMS,
     sums(norm2=plus("input"), output=plus("input", "ff")), True),
    ("missing-attention", "norm2.input", "attention is left out; its norm is added instead", BOTH_NORMS,
     sums(norm2=plus("input", "norm1"), output=plus("input", "norm1", "ff")), False),
    ("doubled-feed-forward", "", "the feed-forward network's output is added twice", BOTH_NORMS,
     sums(output=(("input", 1.0), ("att", 1.0), ("ff", 2.0))), True),
    ("doubled-feed-forward", "", "the feed-forward network is applied to its own output", BOTH_NORMS,
     sums(output=plus("input", "att", ("ff", plus("ff")))), True),
    ("doubled-feed-forward", "", "the second half of the block runs twice", BOTH_NORMS,
     sums(output=plus("input", "att", "ff", ("ff", plus(("norm2", plus("input", "att", "ff")))))), True),
    ("doubled-attention", "norm2.input", "attention's output is added twice", BOTH_NORMS,
     sums(norm2=(("input", 1.0), ("att", 2.0)), output=(("input", 1.0), ("att", 2.0), ("ff", 1.0))), True),
    ("doubled-attention", "norm2.input", "attention is applied to its own output", BOTH_NORMS,
     sums(norm2=plus("input", ("att", plus("att"))), output=plus("input", ("att", plus("att")), "ff")), True),
    ("sandwich-norm", "", "norm2 is also applied to the block's output", BOTH_NORMS,
     sums(output=plus(("norm2", plus("input", "att", "ff")))), True),
    ("positions-in-each-block", "input", "positions are added again in each block", EMBEDDED,
     sums(norm1=plus("input", "pos_emb"), norm2=plus("input", "pos_emb", "att"),
          output=plus("input", "pos_emb", "att", "ff")), True),
    ("no-activation", "ff.layers.2.input", "the activation comes after the second linear layer", "linear, GELU, linear",
     {"activation": "linear", **sums(output=plus("input", "att", ("act", plus("ff"))))}, True),
    ("no-activation", "ff.layers.0", "the activation comes before the first linear layer", "linear, GELU, linear",
     {"activation": "linear", **sums(ff=plus(("act", plus("norm2"))))}, True),
)  # fmt: skip

# Rows of one stage are tried in this order.
CATALOGUE = (
    usual("off-by-one-positions", "pos_emb", "positions start at 1 instead of 0", POSITIONS, positions=(1, 1)),
    row("off-by-one-positions", "pos_emb", "positions start at -1 instead of 0", POSITIONS, positions=(-1, 1)),
    row("off-by-one-positions", "pos_emb", "positions start at 2 instead of 0", POSITIONS, positions=(2, 1)),
    usual("wrong-positions", "pos_emb", "positions count backwards: the last token has position 0", POSITIONS,
          positions="reversed"),
    row("wrong-positions", "pos_emb", "positions count down from the last row of the table", POSITIONS,
        positions="from the end"),
    row("wrong-positions", "pos_emb", "positions are the last rows of the table", POSITIONS, positions="last"),
    usual("wrong-positions", "pos_emb", "every token has position 0", POSITIONS, positions=(0, 0)),
    row("wrong-positions", "pos_emb", "positions go in steps of 2", POSITIONS, positions=(0, 2)),
    row("wrong-positions", "pos_emb", "each sequence has one position: its number in the batch", POSITIONS,
        positions="sequences"),
    row("wrong-positions", "pos_emb", "token ids are looked up as positions", POSITIONS, positions="tokens"),
    usual("sinusoidal-positions", "pos_emb", "positions are sinusoidal, not the checkpoint's", POSITIONS,
          positions="sinusoidal"),
    row("sinusoidal-positions", "pos_emb", "positions are sinusoidal, sines before cosines, not the checkpoint's",
        POSITIONS, positions="sinusoidal, halves"),
    usual("no-positions", "input", "the position embedding is not added", EMBEDDED, embedded=plus("tok_emb")),
    row("wrong-embedding", "input", "positions are added twice", EMBEDDED,
        embedded=(("tok_emb", 1.0), ("pos_emb", 2.0))),
    row("wrong-embedding", "input", "the token embedding is not added", EMBEDDED, embedded=plus("pos_emb")),
    usual("unbiased-variance", "norm1", "LayerNorm divides the variance by E − 1, not by E",
          "x.var(dim=-1, keepdim=True, unbiased=False)", all_norms_unbiased=True),
    usual("eps-outside-root", "norm1", "LayerNorm adds eps to the standard deviation, not to the variance",
          "(x - mean) / torch.sqrt(var + eps)", all_norms_eps_on_std=True),
    usual("missing-bias", "norm1", "the norms add no bias (shift)", BIAS, all_norms_affine="no shift"),
    usual("missing-norm-scale", "norm1", "the norms are not multiplied by their scale", LAYER_NORM,
          all_norms_affine="no scale"),
    usual("not-transposed", "att.W_query", "W_query, W_key, W_value are applied transposed", TRANSPOSE,
          **{f"{name}.transposed": True for name in QKV}),
    usual("not-transposed", "att.W_query", "out_proj, W_query, W_key, W_value are applied transposed", TRANSPOSE,
          **{f"{name}.transposed": True for name in (*QKV, "out_proj")}),
    usual("missing-bias", "att.W_query", "W_query, W_key, W_value add no bias", BIAS,
          **{f"{name}.bias": 0.0 for name in QKV}),
    usual("heads-not-transposed", "att.weights", "heads are split by .view(B, H, T, D) without transpose", HEADS,
          split="htd", merge="htd"),
    usual("heads-not-transposed", "att.weights", "heads are split by .view(B, H, T, D), but joined with the transpose",
          HEADS, split="htd"),
    usual("heads-not-transposed", "att.out_proj.input", "heads are joined without transposing back", HEADS,
          merge="htd"),
    usual("heads-interleaved", "att.weights", "heads are interleaved: split by .view(B, T, D, H)", HEADS, split="tdh",
          merge="tdh"),
    row("heads-interleaved", "att.weights", "heads are split by .view(B, T, D, H), but joined in the right order",
        HEADS, split="tdh"),
    row("heads-interleaved", "att.out_proj.input", "heads are joined in the order D, H, not H, D", HEADS, merge="tdh"),
    usual("attention-over-heads", "att.weights", "the heads of a token attend to each other, not the tokens", HEADS,
          over="heads", mask=(None, None)),
    row("attention-over-heads", "att.weights", "the heads of a token attend to each other, under a causal mask", HEADS,
        over="heads"),
    usual("attention-over-heads", "att.weights",
          "the heads of a token attend to each other, and are joined as if they had been transposed", HEADS,
          over="heads", mask=(None, None), merge="htd"),
    row("attention-over-heads", "att.weights",
        "the heads of a token attend to each other, under a causal mask, and are joined as if they had been transposed",
        HEADS, over="heads", merge="htd"),
    usual("attention-over-batch", "att.weights", "the sequences of a batch attend to each other, not the tokens",
          "nn.MultiheadAttention(…, batch_first=True), or (B, H, T, D) before the product", over="batch",
          mask=(None, None)),
    row("attention-over-batch", "att.weights", "the sequences of a batch attend to each other, under a causal mask",
        "nn.MultiheadAttention(…, batch_first=True), or (B, H, T, D) before the product", over="batch"),
    usual("rotary-positions", "att.weights", "queries and keys are rotated (RoPE)", "GPT-2 has learned positions only",
          rotary="halves"),
    row("rotary-positions", "att.weights", "queries and keys are rotated (RoPE, neighbouring pairs)",
        "GPT-2 has learned positions only", rotary="pairs"),
    row("rotary-positions", "input", "positions are rotary (RoPE), and the position embedding is not added", EMBEDDED,
        rotary="halves", embedded=plus("tok_emb")),
    row("rotary-positions", "input",
        "positions are rotary (RoPE, neighbouring pairs), and the position embedding is not added", EMBEDDED,
        rotary="pairs", embedded=plus("tok_emb")),
    usual("distance-bias", "att.weights", "a penalty for distance is added to the scores (ALiBi)",
          "GPT-2 has learned positions only", distance=1.0),
    row("distance-bias", "att.weights", "a bonus for distance is added to the scores (ALiBi with another sign)",
        "GPT-2 has learned positions only", distance=-1.0),
    usual("missing-scale", "att.weights", "attention scores are not divided by √head_dim", SCALE, scale="none"),
    usual("doubled-scale", "att.weights", "attention scores are divided by √head_dim twice", SCALE, scale="twice"),
    usual("scale-by-emb-dim", "att.weights", "attention scores are divided by √emb_dim, not by √head_dim", SCALE,
          scale="emb_dim"),
    usual("scale-by-n-heads", "att.weights", "attention scores are divided by √n_heads, not by √head_dim", SCALE,
          scale="n_heads"),
    usual("inverted-scale", "att.weights", "attention scores are multiplied by √head_dim, not divided", SCALE,
          scale="times"),
    usual("scale-by-layer", "att.weights", "attention scores are also divided by the number of the layer", SCALE,
          scale="by layer"),
    usual("no-mask", "att.weights", "there is no causal mask: tokens see the tokens after them", MASK,
          mask=(None, None)),
    usual("mask-hides-diagonal", "att.weights", HIDES_DIAGONAL, MASK, mask=(None, -1)),
    usual("mask-hides-diagonal", "att.weights", HIDES_DIAGONAL, MASK, mask=(None, -1), fill=("set", -1e30)),
    usual("mask-hides-diagonal", "att.weights", f"{HIDES_DIAGONAL}; what sees nothing gets 0", MASK, mask=(None, -1),
          softmax="keys, 0 if none"),
    usual("mask-sees-ahead", "att.weights", "the mask is off by one: a token sees the next one", MASK, mask=(None, 1)),
    usual("mask-upside-down", "att.weights", "the mask is upside down: a token sees itself and the tokens after it",
          MASK, mask=(0, None)),
    usual("mask-upside-down", "att.weights", "the mask is inverted: a token sees only the tokens after it", MASK,
          mask=(-1, None)),
    usual("mask-upside-down", "att.weights", "the mask is inverted: a token sees only the tokens after it", MASK,
          mask=(-1, None), fill=("set", -1e30)),
    usual("mask-upside-down", "att.weights",
          "the mask is inverted: a token sees only the tokens after it; what sees nothing gets 0", MASK,
          mask=(-1, None), softmax="keys, 0 if none"),
    usual("mask-after-softmax", "att.weights", "the mask is applied after softmax: rows do not sum to 1", MASK,
          mask_after=True),
    usual("mask-zero-scores", "att.weights", "masked scores are set to 0, not to -inf, before softmax", MASK,
          fill=("set", 0.0)),
    row("mask-zero-scores", "att.weights", "masked scores are multiplied by 0, not set to -inf, before softmax", MASK,
        fill=("multiply", 0.0)),
    row("mask-added", "att.weights", "the mask is added as 1, not as -inf", MASK, fill=("add", 1.0)),
    row("attention-transposed", "att.out_proj.input", "the attention weights are applied transposed to the values",
        "weights @ values: each row sums over the keys", weights_transposed=True),
    usual("not-transposed", "att.out_proj", "out_proj is applied transposed", TRANSPOSE, **{"out_proj.transposed":
          True}),
    usual("missing-out-proj", "att.out_proj", "out_proj is not applied", "return out_proj(context)", out_proj=False),
    usual("missing-bias", "att.out_proj", "out_proj adds no bias", BIAS, **{"out_proj.bias": 0.0}),
    usual("missing-bias", "ff.layers.0", "ff.layers.0 adds no bias", BIAS, **{"ff.layers.0.bias": 0.0}),
    usual("missing-bias", "ff.layers.2", "ff.layers.2 adds no bias", BIAS, **{"ff.layers.2.bias": 0.0}),
    usual("missing-final-norm", "final_norm", "there is no norm after the last block",
          "logits = out_head(final_norm(x))", **{"head.input": plus("input")}),
    row("missing-final-norm", "final_norm", "there is no norm after the last block", "logits = out_head(final_norm(x))",
        **{"final_norm.formula": "identity"}),
    usual("doubled-norm", "final_norm", "final_norm is applied twice", "logits = out_head(final_norm(x))",
          **{"head.input": plus(("final_norm", plus("final_norm")))}),
    row("wrong-norm", "final_norm", "the last block's norm2 is used in place of final_norm", "out_head(final_norm(x))",
        **{"final_norm.weights": "norm2"}),
    row("wrong-norm", "final_norm", "the last block's norm1 is used in place of final_norm", "out_head(final_norm(x))",
        **{"final_norm.weights": "norm1"}),
    usual("wrong-head", LOGITS, "the head is tok_emb's matrix, but the checkpoint has a head of its own",
          "load out_head.weight", head="tok_emb"),
    usual("not-logits", LOGITS, "the model returns log_softmax of the logits", "return the logits",
          logits="log_softmax"),
    usual("not-logits", LOGITS, "the model returns softmax of the logits", "return the logits", logits="softmax"),
    usual("shifted-logits", LOGITS, "the logits are shifted by one token: those of token t + 1 come at t",
          LOGITS_REMEDY, logits=("rolled", -1)),
    usual("shifted-logits", LOGITS, "the logits are shifted by one token: those of token t − 1 come at t",
          LOGITS_REMEDY, logits=("rolled", 1)),
)  # fmt: skip

EPSILONS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0)
ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "quick_gelu", "tanh", "linear")
MORE_ACTIVATIONS = ("sigmoid", "leaky_relu", "mish", "relu2", "relu6", *((name,) for name in PLAIN))
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function


def wrong_wirings() -> list[Mistake]:
    return [Mistake(a, b, c, d, tuple(changes.items()), common) for a, b, c, d, changes, common in WIRINGS]


def scaled_embedding(config: GPTScratchConfig) -> list[Mistake]:
    remedy, root = "GPT-2 adds tok_emb and pos_emb as they are", config.emb_dim**0.5
    says = f"embeddings are multiplied by √emb_dim = {root:.4g}"
    return [
        usual("embedding-scale", "input", f"token {says}", remedy, embedded=(("tok_emb", root), ("pos_emb", 1.0))),
        row("embedding-scale", "input", f"token and position {says}", remedy,
            embedded=(("tok_emb", root), ("pos_emb", root))),
    ]  # fmt: skip


def wrong_tokens() -> list[Mistake]:
    kinds = [*TOKENS, "plus 1", "minus 1"]
    return [row("wrong-tokens", "tok_emb", f"other ids are looked up: {kind}", IDS, tokens=kind) for kind in kinds]


def wrong_eps(config: GPTScratchConfig, candidate: Iterable[float]) -> list[Mistake]:
    """Other epsilons: those of the candidate's norms, and the usual ones."""
    eps = config.layer_norm_epsilon
    return [eps_row(config, value) for value in dict.fromkeys([*candidate, *EPSILONS]) if value != eps]


def eps_row(config: GPTScratchConfig, value: float, norms: Iterable[str] = NORMS) -> Mistake:
    eps = config.layer_norm_epsilon
    changes = tuple((f"{norm}.eps", value) for norm in norms)
    says = f"LayerNorm has eps={value:g} instead of {eps:g}"
    return Mistake("wrong-eps", "norm1", says, f"build the norms with eps={eps:g}", changes)


NORM_NAMES = {"rms": "rms-norm", "identity": "missing-norm"}
DIMS = {(1,): "the tokens", (0,): "the batch", (1, 2): "tokens and embedding", (0, 1): "batch and tokens",
        (0, 1, 2): "all dimensions", (0, 2): "batch and embedding"}  # fmt: skip


def wrong_norms() -> list[Mistake]:
    """Other formulas of LayerNorm, in all norms."""
    make = partial(row, stage="norm1", remedy=LAYER_NORM)
    rows = [make(NORM_NAMES.get(f, "wrong-norm"), says=f"LayerNorm {says}", all_norms_formula=f, common=f == "rms")
            for f, says in FORMULAS.items()]  # fmt: skip
    says = "LayerNorm is RMSNorm: it neither subtracts the mean nor adds the shift"
    rows.append(make("rms-norm", says=says, all_norms_formula="rms", all_norms_affine="no shift", common=True))
    for dims, over in DIMS.items():
        says = f"LayerNorm takes mean and variance over {over}, not over the embedding"
        rows.append(make("norm-dimension", says=says, all_norms_dims=dims))
    for affine in [name for name in AFFINE if name not in ("", "no shift", "no scale")]:
        says = f"LayerNorm's scale and shift are applied in another way: {affine}"
        rows.append(make("wrong-norm", says=says, all_norms_affine=affine))
    return rows


NORM_SHOWN = {"final_norm": "the final norm"}


def some_norms(known: Iterable[Mistake]) -> list[Mistake]:
    """The mistakes in all norms, also in those of the blocks and in each alone."""
    rows = []
    for mistake in known:
        if {slot.partition(".")[0] for slot in mistake.slots} == set(NORMS):
            alone = [((norm,), NORM_SHOWN.get(norm, norm)) for norm in NORMS]
            for norms, where in ((("norm1", "norm2"), "norm1 and norm2"), *alone):
                changes = tuple((slot, value) for slot, value in mistake.changes if slot.partition(".")[0] in norms)
                says = f"{mistake.says}, in {where} only"
                rows.append(Mistake(mistake.name, norms[0], says, mistake.remedy, changes))
    return rows


def wrong_qkv_orders() -> list[Mistake]:
    remedy = "GPT-2's c_attn holds query, key, value, in this order"
    orders = list(permutations(range(3)))[1:]  # the first is the right one
    rows = [qkv_row(order, remedy, "qkv-order", common=True) for order in orders]
    repeated = [order for order in product(range(3), repeat=3) if len(set(order)) < 3]
    rows += [qkv_row(order, "softmax(query @ key.T) @ value", "wrong-operand", common=False) for order in repeated]
    for layout in ("h3d", "hd3", "3dh", "dh3", "d3h"):
        says = f"c_attn's output is split in the order {' × '.join(AXES[axis] for axis in layout)}"
        rows.append(row("qkv-interleaved", "att.weights", says, f"{remedy}, each with its heads side by side",
                        **{"qkv.layout": layout}))  # fmt: skip
    return rows


AXES = {"3": "(query, key, value)", "h": "heads", "d": "head_dim"}


def qkv_row(order: tuple[int, ...], remedy: str, name: str, *, common: bool) -> Mistake:
    names = ", ".join(QKV[i].removeprefix("W_") for i in order)
    return row(name, "att.weights", f"{names} are used as query, key, value", remedy, qkv=order, common=common)


def wrong_heads(config: GPTScratchConfig) -> list[Mistake]:
    """All other numbers of heads that divide emb_dim, and the other ways to split and join them."""
    remedy = f"build the model with n_heads={config.n_heads}; no tensor's shape shows it"
    rows = []
    for heads in range(1, config.emb_dim + 1):
        if config.emb_dim % heads == 0 and heads != config.n_heads:
            says = f"attention has {heads} head{'s' * (heads > 1)} instead of {config.n_heads}"
            rows.append(row("wrong-n-heads", "att.weights", says, remedy, n_heads=heads, common=True))
    shown = {"t": "T", "h": "H", "d": "D"}
    for order in map("".join, permutations("thd")):
        if order in ("thd", "htd", "tdh"):
            continue
        dims = ", ".join(shown[axis] for axis in order)
        for says, stage, changes in (
            (f"heads are split and joined in the order {dims}", "att.weights", dict(split=order, merge=order)),
            (f"heads are split in the order {dims}", "att.weights", dict(split=order)),
            (f"heads are joined in the order {dims}", "att.out_proj.input", dict(merge=order)),
        ):
            rows.append(row("heads-not-transposed", stage, says, HEADS, **changes))
    return rows


SOFTMAX_ROWS = {
    "queries": ("softmax-dimension", "softmax is taken over the queries, not over the keys"),
    "heads": ("softmax-dimension", "softmax is taken over the heads, not over the keys"),
    "batch": ("softmax-dimension", "softmax is taken over the batch, not over the keys"),
    "keys and queries": ("softmax-dimension", "softmax is taken over keys and queries together, not over the keys"),
    "log": ("wrong-softmax", "log_softmax is used in place of softmax"),
    "twice": ("wrong-softmax", "softmax is applied twice"),
    "plus one behind the maximum": ("wrong-softmax", "softmax's denominator has 1 more, once the maximum is taken off"),
    "plus one": ("wrong-softmax", "softmax's denominator has 1 more"),
    "none": ("wrong-softmax", "there is no softmax: the scores are used as attention weights, masked ones as 0"),
    "exponential": ("wrong-softmax", "the exponentials of the scores are not divided by their sum"),
    "sigmoid": ("wrong-softmax", "a sigmoid is used in place of softmax"),
    "relu": ("wrong-softmax", "a ReLU is used in place of softmax"),
    "sum": ("wrong-softmax", "the scores are divided by their sum, without exponentials"),
}


def wrong_softmax() -> list[Mistake]:
    rows = []
    for kind, (name, says) in SOFTMAX_ROWS.items():
        common = name == "softmax-dimension" and "and" not in kind
        for fill in ({}, dict(fill=("set", -1e30))) if kind in ("heads", "batch") else ({},):  # all may be masked
            rows.append(
                row(name, "att.weights", says, SOFTMAX_REMEDY, softmax=kind, common=common and not fill, **fill)
            )
        if kind in ("none", "relu", "log", "sum", "queries"):
            says = f"{says}; the mask comes after it"
            rows.append(row(name, "att.weights", says, SOFTMAX_REMEDY, softmax=kind, mask_after=True))
    others = [name for name in SCALES if name not in ("none", "twice", "emb_dim", "n_heads", "times", "by layer")]
    says = "attention scores have another scale:"
    return rows + [row("wrong-scale", "att.weights", f"{says} {name}", SCALE, scale=name) for name in others]


def wrong_biases() -> list[Mistake]:
    rows = []
    for layer in (*QKV, "out_proj", "ff.layers.0", "ff.layers.2"):
        stage = f"att.{layer}" if not layer.startswith("ff") else layer
        if layer in QKV:
            rows.append(Mistake("missing-bias", stage, f"{layer} adds no bias", BIAS, ((f"{layer}.bias", 0.0),)))
        rows.append(
            row("doubled-bias", stage, f"{layer}'s bias is added twice", "add it once", **{f"{layer}.bias": 2.0})
        )
        if not layer.startswith("ff") and layer != "out_proj":
            says = f"{layer} is applied transposed"
            rows.append(Mistake("not-transposed", stage, says, TRANSPOSE, ((f"{layer}.transposed", True),)))
    return rows


def wrong_parts() -> list[Mistake]:
    """Queries, keys, values, scores or attention weights that something else is made of first."""
    remedy = "softmax(q @ k.transpose(2, 3) / head_dim ** 0.5) @ v, each head by itself, and nothing else"
    rows = []
    for change in filter(None, CHANGES):
        for which in ("q", "k", "v", "qk", "kv", "qkv"):
            says = f"{' and '.join(PARTS[layer] for layer in QKV if layer[2] in which)} are {change}"
            stage = "att.out_proj.input" if which == "v" else "att.weights"
            called = ("heads-not-transposed", HEADS) if "split" in change else ("wrong-operand", remedy)
            rows.append(row(called[0], stage, says, called[1], parts=(which, change)))
        if "token" not in change and "split" not in change:
            says = f"attention scores are {change}"
            rows.append(row("wrong-scores", "att.weights", says, remedy, scores=change))
            if change not in ("taken without their sign", "put through a ReLU"):  # they are positive
                says = f"attention weights are {change}, before they are applied to the values"
                rows.append(row("wrong-scores", "att.out_proj.input", says, remedy, weights=change))
    says = "attention is by cosine: queries and keys are scaled to length 1, and the scores not divided"
    cosine = row("wrong-operand", "att.weights", says, remedy, parts=("qk", "scaled to length 1"), scale="none")
    rows.append(cosine)
    return rows


PARTS = {"W_query": "queries", "W_key": "keys", "W_value": "values"}


def wrong_inputs() -> list[Mistake]:
    """Queries, keys or values, but not all of them, from the block's input instead of norm1's output."""
    rows = []
    for layers in (*combinations(QKV, 1), *combinations(QKV, 2)):
        says = f"{' and '.join(PARTS[layer] for layer in layers)} are computed from the block's input, not from norm1's"
        remedy = "x = norm1(x), and queries, keys and values all from this x"
        changes = {f"{layer}.input": plus("input") for layer in layers}
        rows.append(row("wrong-input", f"att.{layers[0]}", says, remedy, **changes))
    return rows


def hidden_rows() -> list[Mistake]:
    """Masks that hide all from a token and are added as a large negative number: that token then sees everything."""
    rows = []
    for value in (-1e4, -1e9, -1e10):
        for name, says, mask in (
            ("mask-hides-diagonal", HIDES_DIAGONAL, (None, -1)),
            ("mask-upside-down", "the mask is inverted: a token sees only the tokens after it", (-1, None)),
        ):
            says = f"{says}; what sees nothing sees all, because {value:g} is added to all of it"
            rows.append(row(name, "att.weights", says, MASK, mask=mask, fill=("add", value)))
    return rows


def activation_remedy(config: GPTScratchConfig) -> str:
    right = config.activation_function
    return 'GPT-2 has nn.GELU(approximate="tanh")' if right == "gelu_new" else f"use {right}"


def wrong_activations(config: GPTScratchConfig) -> list[Mistake]:
    right, remedy, stage = config.activation_function, activation_remedy(config), "ff.layers.2.input"
    rows = []
    twice = [] if right in ("relu", "relu6", "linear") else [("twice", right)]  # those are the same twice
    for other in (*ACTIVATIONS, *MORE_ACTIVATIONS, *twice):
        if other == right or (other in TANH_GELUS and right in TANH_GELUS):
            continue
        shown = other if isinstance(other, str) else " ".join(other)
        name, says = "wrong-activation", f"the activation is {shown}, not {right}"
        if other == "linear":
            says = f"there is no activation instead of {right}"
        elif other == ("twice", right):
            says = f"the activation {right} is applied twice"
        elif (other, right) == ("gelu", "gelu_new"):
            name, says = "exact-gelu", "GELU is the exact x · Φ(x), not the tanh approximation"
        rows.append(row(name, stage, says, remedy, activation=other, common=other in ACTIVATIONS))
    return rows


def wrong_outputs() -> list[Mistake]:
    names = {"reversed": "shifted-logits"}
    says, kinds = "what the model returns is not the logits, but these:", [k for k in OUTPUTS if k[-7:] != "softmax"]
    return [row(names.get(k, "not-logits"), LOGITS, f"{says} {k}", LOGITS_REMEDY, logits=k) for k in kinds]


# Names for what is read between the blocks.


SHARED = "each block computes with its own weights, trf_blocks[n]"


def wrong_order(config: GPTScratchConfig) -> list[Mistake]:
    """Blocks that are left out, run twice, have another's weights, or read what they should not."""
    twice = plus(("block before", plus("previous")))
    alike = sorted({0, config.n_layers - 1}) if config.n_layers > 1 else []
    return [
        *(row("shared-blocks", "norm1", f"all blocks have the weights of block {n}", SHARED, owner=n) for n in alike),
        usual("blocks-not-chained", "input", "each block reads the embeddings", CHAIN, input=plus("embedded")),
        usual("skipped-block", "input", "the block before is left out", CHAIN, input=plus("two before")),
        usual("doubled-block", "input", "the block before runs twice", CHAIN, input=twice),
    ]


def mistakes(config: GPTScratchConfig, candidate_eps: Iterable[float] = ()) -> list[Mistake]:
    """All single mistakes in the forward pass, in execution order.

    Args:
        candidate_eps: the epsilons of the candidate's norms.
    """
    generated = [*scaled_embedding(config), *wrong_tokens(), *wrong_eps(config, candidate_eps), *wrong_norms()]
    generated += [*wrong_qkv_orders(), *wrong_heads(config), *wrong_softmax(), *wrong_biases(), *wrong_inputs()]
    generated += [*wrong_parts(), *hidden_rows(), *wrong_activations(config), *wrong_outputs(), *wrong_wirings()]
    generated += wrong_order(config)
    everything = [*CATALOGUE, *generated]
    everything += some_norms(everything)
    order = stages(1)
    return sorted(everything, key=lambda mistake: order.index(mistake.stage_in(0)))


# Words for what is found by a fit

WORDS = {"input": "x", "previous": "what the block before returns", "embedded": "the embeddings", "tok_emb": "tok_emb",
         "pos_emb": "the positions"}  # fmt: skip


def operand_shown(operand: Any) -> str:
    if isinstance(operand, tuple):
        return f"{operand[0]}({sum_shown(operand[1])})"
    return WORDS.get(operand, operand)


def sum_shown(operands: Sum) -> str:
    """x + att; 2·x − 0.5·ff; norm1(x + att); nothing."""
    text = ""
    for operand, factor in operands:
        sign = "−" if factor < 0 else "+"
        size = "" if abs(factor) == 1 else f"{abs(factor):.6g}·"
        text += (
            f" {sign} {size}{operand_shown(operand)}" if text else f"{'−' * (factor < 0)}{size}{operand_shown(operand)}"
        )
    return text or "nothing"


READERS = {"norm1.input": "norm1 reads", "att.input": "attention reads", "norm2.input": "norm2 reads",
           "ff.input": "feed-forward reads", "output": "the block returns", "head.input": "the head reads",
           "embedded": "the embeddings are", "input": "it reads"}  # fmt: skip
WIRING_STAGES = {"norm1.input": "norm1", "att.input": "att.W_query", "norm2.input": "norm2.input",
                 "ff.input": "ff.layers.0", "output": ""}  # fmt: skip


def reachable(wiring: Mapping[str, Sum]) -> dict[str, Sum]:
    """The sums that a block's output depends on."""
    found: dict[str, Sum] = {}
    todo = ["output"]
    while todo:
        slot = todo.pop()
        if slot in wiring and slot not in found:
            found[slot] = wiring[slot]
            todo += [f"{name}.input" for name in names_in(wiring[slot])]
    return found


def names_in(operands: Sum) -> list[str]:
    """The names in a sum. A module that is applied to something else is not one of them."""
    names: list[str] = []
    for operand, _ in operands:
        names += names_in(operand[1]) if isinstance(operand, tuple) else [operand]
    return names


def canonical(wiring: Mapping[str, Any]) -> dict[str, Any]:
    """A block's sums, all that matter, in an order of their own, with other slots that were changed."""
    whole = {**WIRING, **{slot: value for slot, value in wiring.items() if slot in WIRING}}
    return {slot: tuple(sorted(value, key=repr)) for slot, value in reachable(whole).items()}


def wiring_mistake(changes: Mapping[str, Sum]) -> Mistake:
    """The one mistake that a block's changed sums make: by name if it has one, else in words."""
    right = canonical({})
    found = canonical(changes)
    for name, stage, says, remedy, named, _ in WIRINGS:
        if set(named) <= set(WIRING) and canonical(named) == found:
            return Mistake(name, stage, says, remedy, tuple(named.items()))
    different = {slot: value for slot, value in found.items() if right.get(slot) != value} or dict(changes)
    told = [f"{READERS[slot]} {sum_shown(changes.get(slot, WIRING[slot]))}, not {sum_shown(WIRING[slot])}"
            for slot in WIRING if slot in different]  # fmt: skip
    first = next(slot for slot in WIRING if slot in different)
    return Mistake("wrong-wiring", WIRING_STAGES[first], "; ".join(told), BOTH_NORMS, tuple(changes.items()))


CHAIN = "for block in trf_blocks: x = block(x)"


def order_mistake(reads: Mapping[int, Sum], n_layers: int) -> Mistake:
    """The one mistake that is made by what the blocks, and the final norm behind them, read from each other.

    Args:
        reads: the sum that a place reads, where it is not the result of the place before.
    """
    path, doubled = block_path(reads, n_layers)
    if path is None:
        told = [f"{'final_norm' if n == n_layers else f'block {n}'} reads {sum_shown(reads[n])}" for n in sorted(reads)]
        says = "; ".join(told).replace(WORDS["previous"], "the block before")
        name = "wrong-wiring"
    elif doubled:
        name, says = "doubled-block", f"{numbered_blocks(doubled)} run{'s' * (len(doubled) == 1)} twice"
    elif sorted(path) == list(range(n_layers)):
        name, says = "block-order", f"the blocks run in the order {', '.join(map(str, path))}"
    else:
        unused = [n for n in range(n_layers) if n not in path]
        name, says = "skipped-block", f"the result of {numbered_blocks(unused)} is not used"
        if path == [n_layers - 1] and len(reads) > 1:
            name, says = "blocks-not-chained", "each block reads the embeddings; only the last block counts"
    return Mistake(name, "input", says, CHAIN, (("input", tuple(sorted(reads.items()))),))


def block_path(reads: Mapping[int, Sum], n_layers: int) -> tuple[list[int] | None, list[int]]:
    """The blocks through which x goes, in order, and those that run twice; None if it is no single path."""
    before: dict[int, int] = {}
    doubled = []
    for place in range(n_layers + 1):
        operands = reads.get(place, plus("previous"))
        if len(operands) != 1 or operands[0][1] != 1:
            return None, []
        operand = operands[0][0]
        if isinstance(operand, tuple):
            if operand not in twice_before(place):
                return None, []
            doubled.append(place - 1)
            operand = "previous"
        source = {"previous": place - 1, "two before": place - 2, "embedded": -1}.get(operand)
        if source is None:
            if not operand.startswith("block "):
                return None, []
            source = int(operand.removeprefix("block "))
        before[place] = max(source, -1)
    path: list[int] = []
    place = n_layers
    while before[place] >= 0:
        place = before[place]
        if place in path:
            return None, []
        path.insert(0, place)
    return path, doubled


def twice_before(place: int) -> tuple[Any, ...]:
    """The ways to say that the block before a place is applied to its own result."""
    own = f"block {place - 1}"
    return (own, plus("previous")), (own, plus(own)), ("block before", plus("previous"))


def numbered_blocks(blocks: list[int]) -> str:
    return f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
