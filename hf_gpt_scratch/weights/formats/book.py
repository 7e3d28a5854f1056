"""The book's `model.pth`, and its `model_and_optimizer.pth`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ...errors import ConversionError
from ...model.weight_map import LM_HEAD, Row
from ..tensors import LazyTensor, held
from .format import PLAIN, Contents, Format, Found, Layout, Options, Source, Written, readable
from .torch_file import StateDict, save_tensors, state_dict

# State dicts with names like the book's that are not a plain GPTModel's: what each one has, and how to convert it.
VARIANTS = {
    r".*\.lora\..*|.*lora_[AB].*": "has LoRA adapters, whose scaling factor is not stored in the file: merge them "
    "first. In the book's appendix E, the merged weight is linear.weight + alpha * (lora.A @ lora.B).T; save it "
    "without 'linear.' in its name",
    r".*\.att\.qkv\.weight": "has query, key and value fused, like GPTModelFast: split att.qkv in three along "
    "dimension 0, into att.W_query, att.W_key and att.W_value; rename att.proj to att.out_proj and, in the norms, "
    "weight to scale and bias to shift",
    r".*\.att\.heads\.\d+\.W_query\.weight": "has its heads in a list: concatenate att.heads.0.W_query, "
    "att.heads.1.W_query and so on along dimension 0 into att.W_query; do the same for W_key and W_value, weights and "
    "biases",
    r".*\.att\.W_query": "has attention weights without nn.Linear, as with einsum: att.W_query transposed is "
    "att.W_query.weight, and att.bias_q is att.W_query.bias; do the same for W_key and W_value",
    r"out_head\.bias": "has a classifier's head, as in chapter 6, instead of the language model's: remove "
    "out_head.weight and out_head.bias, load the rest with GPTScratchModel.from_book, and apply the head to the last "
    "token's hidden state",
    r"h\.0\.attn\.c_attn\.weight": "has nanoGPT's names without 'transformer.': add this prefix to all names but "
    "lm_head.weight",
}


def variant(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """What kind of state dict has these names and shapes, and how to convert it; None if it is not a known variant."""
    for pattern, explanation in VARIANTS.items():
        if found := next((name for name in shapes if re.fullmatch(pattern, name)), None):
            return f"holds {found[:200]!r}, so it {explanation}"
    embedding = next((name for name in shapes if name.endswith("tok_emb.weight")), "")
    if prefix := embedding.removesuffix("tok_emb.weight"):
        return (
            f"has names that begin with {prefix[:200]!r}: remove this prefix with name.removeprefix({prefix[:200]!r})"
        )
    queries, keys = (shapes.get(f"trf_blocks.0.att.{name}.weight") for name in ("W_query", "W_key"))
    if queries and keys and len(queries) == len(keys) == 2 and queries[1] == keys[1] and queries[0] > keys[0]:
        return (
            f"has W_query of shape {list(queries)} and W_key of shape {list(keys)}, so its heads share keys and "
            "values; GPT-2's heads do not, so it cannot be converted"
        )
    vocabulary, head = (shapes.get(name) for name in ("tok_emb.weight", "out_head.weight"))
    if vocabulary and head and vocabulary != head:
        return (
            f"has out_head.weight of shape {list(head)} for a vocabulary of {vocabulary[0]}, so it has a classifier's "
            "head, as in chapter 6, instead of the language model's: remove out_head.weight, load the rest with "
            "GPTScratchModel.from_book, and apply the head to the last token's hidden state"
        )
    return None


class Book(Format):
    name = "book"
    what = "the book's model.pth"
    layout = Layout(
        tuple(Row(name, (name,), False, row.meaning) for row in (*PLAIN, LM_HEAD) for name in row.ours),
        dropped=r"trf_blocks\.[0-9]+\.att\.mask",
        stores_tied_head=True,
        stores_qkv_biases=False,
    )
    file = "model.pth"
    suffixes = (".pth",)
    copies = 2  # see `save_tensors`

    def matches(self, found: Found) -> bool:
        there = state_dict(found)
        return there is not None and "trf_blocks.0.norm1.scale" in there.tensors

    def near(self, found: Found) -> str | None:
        there = state_dict(found)
        if there is None:
            return None
        if known := variant({name: tensor.shape for name, tensor in there.tensors.items()}):
            return f"{found.path} {known}"
        names = ", ".join(repr(name[:200]) for name in list(there.tensors)[:4])
        return (
            f"{found.path} holds {names}, …, which are not the names of a known model; these formats can be read: "
            f"{readable()}"
        )

    def open(self, found: Found) -> Source:
        there = state_dict(found) or StateDict({}, {})
        return Source(self, found.path, there.tensors, {**there.metadata})

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        if known := variant({name: tensor.shape for name, tensor in source.tensors.items()}):
            raise ConversionError(f"{source.path} {known}")
        contents = super().read(source, n_heads)
        if contents.config.tie_word_embeddings and self.layout.head in source.tensors:
            source.notes.append(
                "out_head.weight is equal to tok_emb.weight, so the converted model ties them: they are one matrix, "
                "also in training. GPTScratchForCausalLM.from_book keeps them untied if the file has two copies"
            )
        return contents

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        return "trf_blocks.0.att.W_query.bias" in names

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes a state dict that the book's own `GPTModel` loads with `strict=True`."""
        # The book's attention registers its mask as a buffer, so `load_state_dict` expects it; all layers share one.
        size = contents.config.context_length
        [mask] = held({"": torch.ones(size, size).triu(1)}).values()
        masks = {f"trf_blocks.{n}.att.mask": mask for n in range(contents.config.n_layers)}
        return Written(hashes=save_tensors({**tensors, **masks}, {}, None, path, options.progress))


BOOK = Book()
