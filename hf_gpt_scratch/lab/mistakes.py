"""The mistakes that people make in a GPT's forward pass: what each is called, says and needs, and its switch."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from ..model.configuration_gpt_scratch import GPTScratchConfig
from .simulate import QKV
from .trace import LOGITS, stages


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A mistake in the forward pass: its family's name, what it says, where it acts first, and the switch."""

    name: str
    says: str
    remedy: str
    stage: str  # of block 0 if inside the blocks
    changes: dict[str, Any]

    @property
    def place(self) -> int:
        return stages(1).index(self.stage)


def hypotheses(config: GPTScratchConfig, eps_found: Iterable[float] = ()) -> list[Hypothesis]:
    """All single mistakes in the forward pass that are tried, in execution order.

    Args:
        eps_found: epsilons that the candidate's norms say they use.
    """
    first = "trf_blocks.0."
    width, eps, act = config.emb_dim, config.layer_norm_epsilon, config.activation_function
    known: list[Hypothesis] = []

    def suppose(name: str, stage: str, says: str, remedy: str, **changes: Any) -> None:
        known.append(Hypothesis(name, says, remedy, stage, changes))

    suppose(
        "embedding-scale",
        first + "input",
        f"token embeddings are multiplied by √emb_dim = {width**0.5:.4g}",
        "GPT-2 adds tok_emb and pos_emb as they are",
        embedding_scale=True,
    )
    for offset in (1, -1, 2):
        suppose(
            "off-by-one-positions",
            "pos_emb",
            f"positions start at {offset} instead of 0",
            "pos_emb(torch.arange(num_tokens)): the first token has position 0",
            positions=offset,
        )
    suppose(
        "no-positions",
        first + "input",
        "the position embedding is not added",
        "x = tok_emb(idx) + pos_emb(torch.arange(num_tokens))",
        positions="none",
    )
    suppose(
        "unbiased-variance",
        first + "norm1",
        "LayerNorm divides the variance by E − 1, not by E",
        "x.var(dim=-1, keepdim=True, unbiased=False)",
        unbiased=True,
    )
    for value in dict.fromkeys([*eps_found, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12, 0.0]):
        if value != eps:
            suppose(
                "wrong-eps",
                first + "norm1",
                f"LayerNorm has eps={value:g} instead of {eps:g}",
                f"build the norms with eps={eps:g}",
                norm_eps=value,
            )
    suppose(
        "eps-outside-root",
        first + "norm1",
        "LayerNorm adds eps to the standard deviation, not to the variance",
        "(x - mean) / torch.sqrt(var + eps)",
        eps_on_std=True,
    )
    suppose(
        "post-norm",
        first + "norm1",
        "the norms come after the shortcut additions (post-norm)",
        "x = x + att(norm1(x)); x = x + ff(norm2(x))",
        norm_order="post",
    )
    suppose(
        "shortcut-after-norm",
        first + "norm2.input",
        "the shortcut adds the normed input, not the input",
        "keep shortcut = x before x = norm1(x)",
        norm_order="shortcut after norm",
    )
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            told = ", ".join(QKV[i].removeprefix("W_") for i in order)
            suppose(
                "qkv-order",
                first + "att.weights",
                f"{told} are used as query, key, value",
                "GPT-2's c_attn holds query, key, value, in this order",
                qkv_order=order,
            )
    for heads in (h for h in range(1, width + 1) if width % h == 0 and h != config.n_heads):
        suppose(
            "wrong-n-heads",
            first + "att.weights",
            f"attention has {heads} head{'s' * (heads > 1)} instead of {config.n_heads}",
            f"build the model with n_heads={config.n_heads}; no tensor tells it",
            n_heads=heads,
        )
    suppose(
        "heads-not-transposed",
        first + "att.weights",
        "heads are cut out by .view(B, H, T, D) without transpose",
        ".view(B, T, H, D).transpose(1, 2), and back before out_proj",
        heads_not_moved=True,
    )
    for scale, name, told in (
        ("none", "missing-scale", "attention scores are not divided by √head_dim"),
        ("twice", "doubled-scale", "attention scores are divided by √head_dim twice"),
        ("emb_dim", "scale-by-emb-dim", "attention scores are divided by √emb_dim, not by √head_dim"),
        ("n_heads", "scale-by-n-heads", "attention scores are divided by √n_heads, not by √head_dim"),
        ("times", "inverted-scale", "attention scores are multiplied by √head_dim, not divided"),
    ):
        suppose(name, first + "att.weights", told, "attn_scores / keys.shape[-1] ** 0.5, once", scale=scale)
    for mask, name, told in (
        ("none", "no-mask", "there is no causal mask: tokens see what comes after them"),
        ("hides itself", "mask-hides-diagonal", "the mask includes the diagonal: a token does not see itself"),
        ("hides itself, softly", "mask-hides-diagonal", "the mask includes the diagonal: a token does not see itself"),
        ("sees one ahead", "mask-sees-ahead", "the mask is one off: a token sees the next one"),
        ("upside down", "mask-upside-down", "the mask is upside down: a token sees itself and what comes after it"),
        ("after softmax", "mask-after-softmax", "the mask is applied after softmax: rows do not sum to 1"),
        ("zero scores", "mask-zero-scores", "masked scores are set to 0, not to -inf, before softmax"),
    ):
        suppose(
            name,
            first + "att.weights",
            told,
            "scores.masked_fill(torch.triu(ones, diagonal=1).bool(), -inf), then softmax",
            mask=mask,
        )
    names: tuple[str, ...]
    for names in (("out_proj",), QKV, ("out_proj", *QKV)):
        stage = "att.W_query" if "W_query" in names else "att.out_proj"
        suppose(
            "not-transposed",
            first + stage,
            f"{', '.join(names)} applied the wrong way round",
            "GPT-2 stores its matrices [in, out], nn.Linear [out, in]: transpose",
            transposed=names,
        )
    for names in (QKV, ("out_proj",), ("ff.layers.0",), ("ff.layers.2",), ("norm",)):
        stage = {"W_query": "att.W_query", "out_proj": "att.out_proj", "norm": "norm1"}.get(names[0], names[0])
        suppose(
            "missing-bias",
            first + stage,
            f"no bias is added by {', '.join(names)}",
            "every layer of GPT-2 but the head has a bias",
            no_bias=names,
        )
    around: list[tuple[tuple[str, ...], str]] = [(("attention",), "norm2.input"), (("feed-forward",), "")]
    for names, stage in [*around, (("attention", "feed-forward"), "norm2.input")]:
        suppose(
            "missing-shortcut",
            (first + stage).rstrip("."),
            f"no shortcut around {' and '.join(names)}",
            "x = x + shortcut after attention and after the feed-forward network",
            shortcuts=names,
        )
    suppose(
        "one-norm-for-both", first + "norm2", "norm1 is used where norm2 belongs", "x = ff(norm2(x))", single_norm=True
    )
    for other in ("gelu_new", "gelu", "relu", "silu", "quick_gelu", "tanh", "linear"):
        if other == act or {other, act} <= {"gelu_new", "gelu_pytorch_tanh"}:
            continue
        name = "exact-gelu" if (other, act) == ("gelu", "gelu_new") else "wrong-activation"
        says = "GELU is the exact x · Φ(x), not the tanh approximation" if name == "exact-gelu" else ""
        says = says or f"the activation is {'none at all' if other == 'linear' else other}, not {act}"
        remedy = 'GPT-2 has nn.GELU(approximate="tanh")' if act == "gelu_new" else f"use {act}"
        suppose(name, first + "ff.layers.2.input", says, remedy, activation=other)
    suppose(
        "missing-final-norm",
        "final_norm",
        "there is no norm after the last block",
        "logits = out_head(final_norm(x))",
        final_norm="missing",
    )
    suppose(
        "wrong-head",
        LOGITS,
        "the head is tok_emb's matrix, but the checkpoint has one of its own",
        "load out_head.weight",
        tied_head=True,
    )
    for output in ("log_softmax", "softmax"):
        suppose("not-logits", LOGITS, f"the model returns {output} of the logits", "return the logits", output=output)
    return sorted(known, key=lambda h: h.place)
