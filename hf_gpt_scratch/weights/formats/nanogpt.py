"""nanoGPT's `ckpt.pt`, and the state dicts of nanoGPT and minGPT, which have the same names."""

import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import ConversionError
from ...model.book_cfg import TANH_GELU
from ...model.configuration_gpt_scratch import GPTScratchConfig
from ...model.weight_map import DROPPED, GPT2_PREFIX
from ..parity import same_bits
from ..tensors import LazyTensor, all_zero, zero
from .format import Contents, Format, Found, Layout, Options, Source, Written, plain_tensors, renamed
from .torch_file import MODEL_ARGS, StateDict, holds_conv1d, save_tensors, state_dict

LAYOUT = Layout(
    renamed(lambda row: GPT2_PREFIX + row.theirs, transposed=False),
    dropped="|".join(re.escape(GPT2_PREFIX + name).replace(r"\{n\}", "[0-9]+") for name in DROPPED),
    stores_tied_head=True,
)


class NanoGPT(Format):
    name = "nanogpt"
    what = "nanoGPT's ckpt.pt"
    layout = LAYOUT
    file: str | None = "ckpt.pt"
    suffixes = (".pt",)
    copies = 2  # see `save_tensors`
    has_bias_choice = True
    # The activation is not stored in these files: the default, and which programs' models have another one.
    activation = (
        "gelu",
        "the exact GELU, as in today's nanoGPT",
        "gelu_new",
        "build-nanogpt or nanoGPT before June 2023",
    )

    def matches(self, found: Found) -> bool:
        there = state_dict(found)
        return there is not None and is_fused(there) and not is_mingpt(there)

    def open(self, found: Found) -> Source:
        there = state_dict(found) or StateDict({})
        source = Source(self, found.path, there.tensors, {**there.metadata}, [*there.notes], training=there.training)
        if "activation_function" not in source.metadata:
            source.asks = ("activation_function",)
        return source

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        if "activation_function" not in source.metadata:
            source.metadata["activation_function"], what, other, whose = self.activation
            source.notes.append(
                f"no file of its kind tells the activation; taken is {what}. If {whose} trained this model, it is "
                f"another: convert it again with activation_function={other!r}, in a command --activation {other}"
            )
        contents = super().read(source, n_heads)
        for name, meta in plain_tensors(contents.config).items():  # the biases of a model without them
            contents.tensors.setdefault(name, zero(meta.shape, contents.dtype))
        return contents

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        return any(name.endswith(".bias") for name in names)

    def expected(self, config: GPTScratchConfig, names: Iterable[str]) -> dict[str, LazyTensor]:
        biased = self.has_qkv_bias(names)
        expected = super().expected(config, names)
        return {name: tensor for name, tensor in expected.items() if biased or not name.endswith(".bias")}

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        return {**super().limits(config), "activation_function": (*TANH_GELU, "gelu")}

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes the checkpoint that nanoGPT's `sample.py` loads."""
        config, bias = contents.config, options.bias
        head, embedding = tensors["lm_head.weight"], tensors["transformer.wte.weight"]
        if head is not embedding and not same_bits(head.read(), embedding.read()):
            raise ConversionError(
                "the model's out_head.weight differs from tok_emb.weight, but nanoGPT has one matrix for both; export "
                "to 'book' or 'gpt2' instead"
            )
        tensors = {**tensors, "lm_head.weight": embedding}
        biases = [name for name, tensor in tensors.items() if name.endswith(".bias") and not all_zero(tensor.read())]
        if bias is None:
            bias = config.qkv_bias or bool(biases)
        if not bias:
            if biases:
                raise ConversionError(
                    f"got bias=False, but {len(biases)} biases are not zero, the first of them {biases[0]!r}; export "
                    "with bias=True"
                )
            tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".bias")}
        about = {
            "model_args": {theirs: getattr(config, ours) for theirs, ours in MODEL_ARGS.items()} | {"bias": bias},
            "config": {"activation_function": config.activation_function},  # nanoGPT ignores it; `open` reads it
        }
        hashes = save_tensors(tensors, about, "model", path, options.progress)
        if config.activation_function == "gelu":
            return Written(hashes=hashes)
        note = (
            f"nanoGPT computes the exact GELU and this model {config.activation_function!r}, so the logits differ "
            "slightly in nanoGPT, as they do for GPT-2 itself; this package reads the activation from the file"
        )
        return Written([note], hashes)


class MinGPT(NanoGPT):
    """Read-only: nothing is written in this format."""

    name = "mingpt"
    what = "minGPT's state dict"
    file = None
    has_bias_choice = False
    activation = (
        "gelu_new",
        "the tanh GELU, as in minGPT",
        "gelu",
        "nanoGPT without flash attention, which also saves its masks,",
    )

    def matches(self, found: Found) -> bool:
        there = state_dict(found)
        return there is not None and is_mingpt(there)

    def has_qkv_bias(self, names: Iterable[str]) -> bool:
        return True


def is_fused(there: StateDict) -> bool:
    """Whether query, key and value are in one `nn.Linear`."""
    return "transformer.h.0.attn.c_attn.weight" in there.tensors and not holds_conv1d(there)


def is_mingpt(there: StateDict) -> bool:
    # minGPT always saves its mask; nanoGPT only if torch has no flash attention.
    return is_fused(there) and not there.metadata and "transformer.h.0.attn.bias" in there.tensors


NANOGPT, MINGPT = NanoGPT(), MinGPT()
