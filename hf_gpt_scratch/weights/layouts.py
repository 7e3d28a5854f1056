"""The one table of parameter names, written for the files of other programs.

In their rows `theirs` is the other program's name. Only what differs from GPT-2 is said here: the name, and that
`nn.Linear` needs no transposition.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..model.weight_map import BASE, DROPPED, GPT2_PREFIX, LM_HEAD, Row, rows
from .lazy import Lazy, from_scratch, to_scratch

# What `formats` reads, for messages.
READABLE = (
    "a directory with the config.json of GPTScratch or GPT-2, OpenAI's TensorFlow directory with hparams.json, and "
    "files: the book's model.pth, nanoGPT's ckpt.pt, minGPT's state dict, GGUF"
)
# GPT-2's name: OpenAI's in TensorFlow, GGUF's.
ELSEWHERE = {
    "wte.weight": ("model/wte", "token_embd.weight"),
    "wpe.weight": ("model/wpe", "position_embd.weight"),
    "h.{n}.ln_1.weight": ("model/h{n}/ln_1/g", "blk.{n}.attn_norm.weight"),
    "h.{n}.ln_1.bias": ("model/h{n}/ln_1/b", "blk.{n}.attn_norm.bias"),
    "h.{n}.attn.c_attn.weight": ("model/h{n}/attn/c_attn/w", "blk.{n}.attn_qkv.weight"),
    "h.{n}.attn.c_attn.bias": ("model/h{n}/attn/c_attn/b", "blk.{n}.attn_qkv.bias"),
    "h.{n}.attn.c_proj.weight": ("model/h{n}/attn/c_proj/w", "blk.{n}.attn_output.weight"),
    "h.{n}.attn.c_proj.bias": ("model/h{n}/attn/c_proj/b", "blk.{n}.attn_output.bias"),
    "h.{n}.ln_2.weight": ("model/h{n}/ln_2/g", "blk.{n}.ffn_norm.weight"),
    "h.{n}.ln_2.bias": ("model/h{n}/ln_2/b", "blk.{n}.ffn_norm.bias"),
    "h.{n}.mlp.c_fc.weight": ("model/h{n}/mlp/c_fc/w", "blk.{n}.ffn_up.weight"),
    "h.{n}.mlp.c_fc.bias": ("model/h{n}/mlp/c_fc/b", "blk.{n}.ffn_up.bias"),
    "h.{n}.mlp.c_proj.weight": ("model/h{n}/mlp/c_proj/w", "blk.{n}.ffn_down.weight"),
    "h.{n}.mlp.c_proj.bias": ("model/h{n}/mlp/c_proj/b", "blk.{n}.ffn_down.bias"),
    "ln_f.weight": ("model/ln_f/g", "output_norm.weight"),
    "ln_f.bias": ("model/ln_f/b", "output_norm.bias"),
}
PLAIN = tuple(row for row in BASE if row.theirs in ELSEWHERE)  # the rows that every GPT-2 has


# What a state dict in names like the book's is, though it is no plain GPTModel's, and the way from there.
VARIANTS = {
    r".*\.lora\..*|.*lora_[AB].*": "has LoRA adapters, whose factor no file tells: merge them first. In the book's "
    "appendix E that is linear.weight + alpha * (lora.A @ lora.B).T, saved without 'linear.' in its name",
    r".*\.att\.qkv\.weight": "has query, key and value fused, as GPTModelFast has: split att.qkv in three along "
    "dimension 0, into att.W_query, att.W_key and att.W_value; rename att.proj to att.out_proj, and of the norms "
    "weight to scale and bias to shift",
    r".*\.att\.heads\.\d+\.W_query\.weight": "has its heads in a list: join att.heads.0.W_query, att.heads.1.W_query "
    "and so on along dimension 0 into att.W_query, and so W_key and W_value, weights and biases",
    r".*\.att\.W_query": "has attention of bare matrices, as with einsum: att.W_query transposed is "
    "att.W_query.weight, att.bias_q is att.W_query.bias, and so W_key and W_value",
    r"out_head\.bias": "has a head that is not the language model's but, as in chapter 6, a classifier's: without "
    "out_head.weight and out_head.bias, GPTScratchModel.from_book reads it, and the head goes on its last token",
    r"h\.0\.attn\.c_attn\.weight": "has nanoGPT's names without 'transformer.': put that before all but lm_head.weight",
}


def variant(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """What a state dict with such names and shapes is, and what to do with it; None if nothing is known."""
    for pattern, words in VARIANTS.items():
        if found := next((name for name in shapes if re.fullmatch(pattern, name)), None):
            return f"holds {found[:200]!r}, so it {words}"
    embedding = next((name for name in shapes if name.endswith("tok_emb.weight")), "")
    if prefix := embedding.removesuffix("tok_emb.weight"):
        return f"has names that begin with {prefix[:200]!r}: take that off, name.removeprefix({prefix[:200]!r})"
    queries, keys = (shapes.get(f"trf_blocks.0.att.{name}.weight") for name in ("W_query", "W_key"))
    if queries and keys and len(queries) == len(keys) == 2 and queries[1] == keys[1] and queries[0] > keys[0]:
        return (
            f"has W_query of shape {list(queries)} and W_key of shape {list(keys)}, so its heads share keys and "
            "values; GPT-2's do not, and it cannot be converted"
        )
    vocabulary, head = (shapes.get(name) for name in ("tok_emb.weight", "out_head.weight"))
    if vocabulary and head and vocabulary != head:
        return (
            f"has out_head.weight of shape {list(head)} for a vocabulary of {vocabulary[0]}, so its head is not the "
            "language model's but, as in chapter 6, a classifier's: without it, GPTScratchModel.from_book reads the "
            "rest, and the head goes on its last token"
        )
    return None


@dataclass(frozen=True)
class Layout:
    """How a program names and lays out GPT-2's tensors.

    Args:
        table: its rows.
        dropped: pattern of names that are no weights of the model.
        stores_tied_head: the file has the output head even when it is the token embedding.
    """

    table: tuple[Row, ...]
    dropped: str = r"(?!)"
    stores_tied_head: bool = False

    def named(self, ours: str) -> str:
        """The program's name of the tensor that holds ours; `{n}` stands for the layer in both."""
        return next(row.theirs for row in self.table if ours in row.ours)

    def count_layers(self, names: Iterable[str]) -> int:
        """How many layers the names have.

        Raises:
            ValueError: a number between them is left out.
        """
        norm = re.escape(self.named("trf_blocks.{n}.norm1.scale")).replace(r"\{n\}", "(0|[1-9][0-9]*)")
        numbers = sorted(int(found[1]) for found in (re.fullmatch(norm, name) for name in names) if found)
        if not numbers or numbers != list(range(len(numbers))):
            raise ValueError(f"got the layers {numbers}, but layers are numbered from 0 without a gap")
        return len(numbers)

    def to_scratch(self, tensors: Mapping[str, Lazy], n_layers: int) -> dict[str, Lazy]:
        """The program's tensors in the book's names; those that the table does not know are left out."""
        return to_scratch(tensors, rows(n_layers, self.table))

    def from_scratch(self, tensors: Mapping[str, Lazy], n_layers: int) -> dict[str, Lazy]:
        """The book's tensors as the program has them; the inverse of `to_scratch`."""
        return from_scratch(tensors, rows(n_layers, self.table))


NATIVE = Layout(tuple(Row(name, (name,), False, row.meaning) for row in (*PLAIN, LM_HEAD) for name in row.ours))
GPT2 = Layout((*PLAIN, LM_HEAD))
BOOK = replace(NATIVE, dropped=r"trf_blocks\.[0-9]+\.att\.mask", stores_tied_head=True)
NANOGPT = Layout(
    (*(replace(row, theirs=GPT2_PREFIX + row.theirs, transposed=False) for row in PLAIN), LM_HEAD),
    dropped="|".join(re.escape(GPT2_PREFIX + name).replace(r"\{n\}", "[0-9]+") for name in DROPPED),
    stores_tied_head=True,
)
# The optimizer's moments lie beside the weights; the output head is always the token embedding.
TENSORFLOW = Layout(
    tuple(replace(row, theirs=ELSEWHERE[row.theirs][0]) for row in PLAIN), dropped=r"(?!model/).*|.*/Adam(_1)?"
)
GGUF = Layout(
    (
        *(replace(row, theirs=ELSEWHERE[row.theirs][1], transposed=False) for row in PLAIN),
        replace(LM_HEAD, theirs="output.weight"),
    )
)
