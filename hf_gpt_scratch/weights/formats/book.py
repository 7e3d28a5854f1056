"""What the book's code saves: `model.pth`, `model_and_optimizer.pth`, a classifier, and the book's other models."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from ...errors import ConversionError
from ...model.book_files import BARE, MASK, Part, bare_matrices, has_adapters, heads_in_a_list, parts, refusal
from ...model.heads_gpt_scratch import GPTScratchForSequenceClassification
from ...model.weight_map import HEADS, LM_HEAD, Row
from ..tensors import LazyTensor, all_zero, held, zero
from .format import (
    PLAIN,
    Contents,
    Format,
    Found,
    Layout,
    Options,
    Source,
    Written,
    check_tensors,
    finite,
    readable,
    refuse_mask,
)
from .torch_file import StateDict, save_tensors, state_dict

SCORE = tuple(row for row in HEADS if row.theirs.startswith("score."))


class Book(Format):
    name = "book"
    what = "the book's model.pth"
    layout = Layout(
        tuple(Row(name, (name,), False, row.meaning) for row in (*PLAIN, LM_HEAD, *SCORE) for name in row.ours),
        dropped=r"trf_blocks\.[0-9]+\.att\.mask",
        stores_tied_head=True,
        stores_qkv_biases=False,
    )
    file = "model.pth"
    suffixes = (".pth",)
    copies = 2  # see `save_tensors`

    def matches(self, found: Found) -> bool:
        there = state_dict(found)
        return there is not None and any(name.startswith("trf_blocks.0.") for name in there.tensors)

    def near(self, found: Found) -> str | None:
        there = state_dict(found)
        if there is None:
            return None
        embedding = next((name for name in there.tensors if name.endswith("tok_emb.weight")), "")
        if prefix := embedding.removesuffix("tok_emb.weight")[:200]:
            return f"{found.path} has names that begin with {prefix!r}: take that off, name.removeprefix({prefix!r})"
        names = ", ".join(repr(name[:200]) for name in list(there.tensors)[:4])
        return (
            f"{found.path} holds {names}, …, which are not the names of a known model; these formats can be read: "
            f"{readable()}"
        )

    def open(self, found: Found) -> Source:
        there = state_dict(found) or StateDict({})
        if why := refusal({name: tensor.shape for name, tensor in there.tensors.items()}):
            raise ConversionError(f"{found.path} {why}")
        asks = ("activation_function", *(["lora_scale"] if has_adapters(there.tensors) else []))
        return Source(
            self, found.path, there.tensors, {**there.metadata}, [*there.notes], asks=asks, training=there.training
        )

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        metadata, path, source_names = source.metadata, source.path, list(source.tensors)
        if (listed := heads_in_a_list(source.tensors)) is not None:
            metadata["n_heads"] = listed
        source.tensors = made(source.tensors, metadata.pop("lora_scale", None), path)
        if bare_matrices(source_names):
            source.notes.append(BARE)
        source.notes.append(DROP_RATE)
        score = {row.theirs: source.tensors.pop(row.theirs) for row in SCORE if row.theirs in source.tensors}
        contents = super().read(source, n_heads)
        if score:
            self._classify(contents, source, score)
        elif self.layout.head not in source.tensors:
            source.notes.append("the file has one matrix for tok_emb and out_head, so the model is tied")
        elif contents.config.tie_word_embeddings:
            source.notes.append(
                "out_head.weight is equal to tok_emb.weight, so the converted model ties them: they are one matrix, "
                "also in training. GPTScratchForCausalLM.from_book keeps them untied if the file has two copies"
            )
        return contents

    def in_layout(self, tensors: dict[str, LazyTensor], path: Path) -> dict[str, LazyTensor]:
        return made(tensors, None, path)

    def _classify(self, contents: Contents, source: Source, score: dict[str, LazyTensor]) -> None:
        """Makes chapter 6's classifier of what was read."""
        path, config, weight = source.path, contents.config, score["score.weight"]
        labels = weight.shape[0]
        score = {name: finite(tensor, name, path) for name, tensor in score.items()}
        source.tensors |= score
        contents.kind = GPTScratchForSequenceClassification
        contents.tensors |= {"score.bias": zero(weight.shape[:1], weight.dtype), **score}
        shapes = {"score.weight": torch.Size((labels, config.emb_dim)), "score.bias": torch.Size((labels,))}
        head = {name: replace(contents.tensors[name], shape=shape) for name, shape in shapes.items()}
        check_tensors(contents.tensors, contents.tensors | head, str(path), "the other tensors' sizes")
        config.num_labels, config.book_classifier, config.tie_word_embeddings = labels, True, False
        source.notes.append(
            f"out_head scores {labels} labels, so this is chapter 6's classifier. As in the book it reads the last "
            "token, padding or not: pad as in training, and pass no attention_mask"
        )

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        return "trf_blocks.0.att.W_query.bias" in names

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes a state dict that the book's own `GPTModel` loads with `strict=True`."""
        # The book's attention registers its mask as a buffer, so `load_state_dict` expects it; all layers share one.
        size = contents.config.context_length
        [mask] = held({"": torch.ones(size, size).triu(1)}).values()
        masks = {f"trf_blocks.{n}.att.mask": mask for n in range(contents.config.n_layers)}
        return Written(zero_biases(contents), save_tensors({**tensors, **masks}, {}, None, path, options.progress))


DROP_RATE = (
    "the file does not tell the drop_rate of its training, so it is 0.1, as in GPT_CONFIG_124M; to train with another, "
    "from_pretrained(directory, drop_rate=0.0)"
)


def zero_biases(contents: Contents) -> list[str]:
    """A note on zero biases, which other formats store even for a model of the book that was trained without them."""
    kinds = (".W_query.bias", ".W_key.bias", ".W_value.bias")
    biases = [tensor for name, tensor in contents.tensors.items() if name.endswith(kinds)]
    if not biases or not all(all_zero(bias.read()) for bias in biases):
        return []
    return [
        "the biases of W_query, W_key and W_value are all zero, and are kept: use a cfg with 'qkv_bias': True "
        "for these weights, even if the model was trained without them"
    ]


def made(tensors: Mapping[str, LazyTensor], lora_scale: float | None, path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `GPTModel`, made when they are read.

    Raises:
        ConversionError: no `GPTModel` can be made of them.
    """

    for name, tensor in tensors.items():
        if MASK.fullmatch(name):
            refuse_mask(name, tensor.read(), path)

    def one(part: Part) -> LazyTensor:
        sources = [tensors[name] for name in part.sources]
        meta = part.make([torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources])

        def read() -> torch.Tensor:
            try:
                return part.make([source.read() for source in sources])
            except ValueError as error:
                raise ConversionError(f"{path} {error}") from error

        return LazyTensor(meta.shape, meta.dtype, read)

    try:
        found = parts({name: tensor.shape for name, tensor in tensors.items()}, lora_scale)
    except ValueError as error:
        raise ConversionError(f"{path} {error}") from error
    result = {}
    for name, part in found.items():
        try:
            result[name] = one(part) if part.sources != (name,) else tensors[name]
        except (RuntimeError, IndexError) as error:  # of torch
            names = ", ".join(repr(source[:200]) for source in part.sources[:3])
            raise ConversionError(f"{path} has {names}, which do not fit each other; take weights of one model") from (
                error
            )
    return result


BOOK = Book()
