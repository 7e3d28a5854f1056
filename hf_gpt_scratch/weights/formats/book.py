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
        return f"{found.path} holds {names}, …, which no known model has; what can be read is {readable()}"

    def open(self, found: Found) -> Source:
        there = state_dict(found) or StateDict({}, {})
        return Source(self, found.path, there.tensors, {**there.told})

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        if known := variant({name: tensor.shape for name, tensor in source.tensors.items()}):
            raise ConversionError(f"{source.path} {known}")
        contents = super().read(source, n_heads)
        if contents.config.tie_word_embeddings and self.layout.head in source.tensors:
            source.notes.append(
                "out_head.weight is equal to tok_emb.weight, so the model is tied: one matrix, trained as one. "
                "GPTScratchForCausalLM.from_book keeps them apart if the file has two copies"
            )
        return contents

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        return "trf_blocks.0.att.W_query.bias" in names

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes a state dict that the book's own `GPTModel` loads with `strict=True`."""
        # The book's attention registers its mask as a buffer, so `load_state_dict` asks for it; one serves all layers.
        size = contents.config.context_length
        [mask] = held({"": torch.ones(size, size).triu(1)}).values()
        masks = {f"trf_blocks.{n}.att.mask": mask for n in range(contents.config.n_layers)}
        return Written(hashes=save_tensors({**tensors, **masks}, {}, None, path, options.progress))


BOOK = Book()
