"""llm.c's checkpoints, `gpt2_124M.bin` and `model_*.bin`: 256 whole numbers, then the weights, kind by kind.

The names are those of llm.c's `ParameterTensors`; the layout is that of `write_model` in its `train_gpt2.py`. Weights
are `[out, in]`, query, key and value are one, the head is the embedding, and the activation is the tanh GELU.
"""

import math
import struct
from functools import partial
from pathlib import Path

import torch

from ...errors import ConversionError
from ...model.configuration_gpt_scratch import GPTScratchConfig
from ..checkpoint import Progress, read_part
from ..tensors import LazyTensor, all_zero
from .directory import MAX_LAYERS
from .format import Contents, Format, Found, Layout, Options, Source, Written, renamed
from .torch_file import Hashed

MAGIC, HEADER = 20240326, struct.Struct("<256i")
VERSIONS = {3: torch.float32, 5: torch.bfloat16}
# What the header says behind magic and version; the last is the number of rows that wte has in the file.
SIZES = ("context_length", "vocab_size", "n_layers", "n_heads", "emb_dim", "padded")
MULTIPLE = 128  # of which the rows of wte are padded to a multiple
# llm.c's other files, which begin alike.
OTHERS = {
    20240327: "llm.c's reference for its tests",
    20240328: "llm.c's tokenizer",
    20240520: "llm.c's tokens to train on",
    20240801: "llm.c's tokens to train on",
    20240522: "llm.c's evaluation data",
    20240527: "the state of llm.c's optimizer",
    20240803: "llm.c's Llama 3",
}
# GPT-2's names and llm.c's, in the order of the file.
NAMES = {
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    "h.{n}.ln_1.weight": "ln1w.{n}",
    "h.{n}.ln_1.bias": "ln1b.{n}",
    "h.{n}.attn.c_attn.weight": "qkvw.{n}",
    "h.{n}.attn.c_attn.bias": "qkvb.{n}",
    "h.{n}.attn.c_proj.weight": "attprojw.{n}",
    "h.{n}.attn.c_proj.bias": "attprojb.{n}",
    "h.{n}.ln_2.weight": "ln2w.{n}",
    "h.{n}.ln_2.bias": "ln2b.{n}",
    "h.{n}.mlp.c_fc.weight": "fcw.{n}",
    "h.{n}.mlp.c_fc.bias": "fcb.{n}",
    "h.{n}.mlp.c_proj.weight": "fcprojw.{n}",
    "h.{n}.mlp.c_proj.bias": "fcprojb.{n}",
    "ln_f.weight": "lnfw",
    "ln_f.bias": "lnfb",
}


class LLMC(Format):
    name = "llmc"
    what = "llm.c's model.bin"
    layout = Layout(renamed(lambda row: NAMES[row.theirs], transposed=False, head=None))
    file = "model.bin"

    def matches(self, found: Found) -> bool:
        return found.start == struct.pack("<i", MAGIC)

    def near(self, found: Found) -> str | None:
        other = OTHERS.get(int.from_bytes(found.start, "little"))
        if other is None:
            return None
        return f"{found.path} is {other}, and holds no GPT-2; give the model's file, such as gpt2_124M.bin"

    def open(self, found: Found) -> Source:
        path = found.path
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            size = path.stat().st_size
        if len(header) < HEADER.size:
            raise ConversionError(
                f"{path} has {size} bytes, but llm.c's header alone has {HEADER.size}; copy or download it again"
            )
        _, version, *sizes = HEADER.unpack(header)[: 2 + len(SIZES)]
        if version not in VERSIONS:
            raise ConversionError(
                f"{path} is of version {version}, but read are 3 (float32) and 5 (bfloat16), of which the rows of wte "
                "are padded; write it again with today's llm.c"
            )
        metadata = dict(zip(SIZES, sizes, strict=True))
        if (
            min(sizes) < 1
            or metadata["padded"] != padded_rows(metadata["vocab_size"])
            or metadata["n_layers"] > MAX_LAYERS
        ):
            raise ConversionError(
                f"the header of {path} says {', '.join(f'{name}={value}' for name, value in metadata.items())}, "
                "which no model has; copy or download it again"
            )
        padded, dtype = metadata.pop("padded"), VERSIONS[version]
        width, vocab, context = metadata["emb_dim"], metadata["vocab_size"], metadata["context_length"]
        values = (padded + context + 2) * width + metadata["n_layers"] * width * (12 * width + 13)
        if size != HEADER.size + values * dtype.itemsize:
            raise ConversionError(
                f"{path} has {size} bytes, but by its header {HEADER.size + values * dtype.itemsize}; it is truncated "
                "or corrupt: copy or download it again"
            )
        tensors, at, notes = {}, HEADER.size, []
        for name, shape in shapes(metadata).items():
            shape = torch.Size(shape)
            tensors[name] = LazyTensor(shape, dtype, partial(read_part, path, at, shape, dtype))
            at += math.prod(shape) * dtype.itemsize
            if name == "wte":  # and behind it, rows of no token
                extra = torch.Size((padded - vocab, width))
                if not all_zero(read_part(path, at, extra, dtype)):
                    notes.append(
                        f"left behind: the last {padded - vocab} rows of wte, which are not zero, though no id below "
                        f"vocab_size={vocab} reads them"
                    )
                at += extra.numel() * dtype.itemsize
        return Source(self, path, tensors, metadata, notes=notes)

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        return {**super().limits(config), "tie_word_embeddings": (True,)}

    def check(self, contents: Contents, options: Options) -> None:
        super().check(contents, options)
        if contents.dtype not in VERSIONS.values():
            raise ConversionError(
                f"the weights are {contents.dtype}, but llm.c has float32 and bfloat16 alone; cast them first, "
                "model.to(torch.float32), and save it"
            )

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        """Writes the file that llm.c loads with `-e`."""
        config = contents.config
        sizes = {name: getattr(config, name) for name in SIZES[:-1]}
        version = next(version for version, dtype in VERSIONS.items() if dtype == contents.dtype)
        extra = padded_rows(config.vocab_size) - config.vocab_size
        header = (MAGIC, version, *sizes.values(), config.vocab_size + extra)
        progress: Progress = options.progress
        progress.step(f"Writing {path.name}", sum(tensor.nbytes for tensor in tensors.values()))
        with Hashed(path, progress) as file:
            file.write(HEADER.pack(*header, *[0] * (256 - len(header))))
            for name in shapes(sizes):
                file.write(tensors[name].read().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                if name == "wte":
                    file.write(bytes(extra * config.emb_dim * contents.dtype.itemsize))
        hashed = {"sha256": file.digest.hexdigest(), "bytes": path.stat().st_size}
        return Written(hashes={path.name: hashed})


def padded_rows(vocab_size: int) -> int:
    """The rows of wte, which are padded to a multiple of 128."""
    return -(-vocab_size // MULTIPLE) * MULTIPLE


def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model by llm.c's names, in the order of the file; wte without its padding."""
    width, found = sizes["emb_dim"], {}
    inside = {
        **dict.fromkeys(("ln1w", "ln1b", "attprojb", "ln2w", "ln2b", "fcprojb", "lnfw", "lnfb"), (width,)),
        "wte": (sizes["vocab_size"], width),
        "wpe": (sizes["context_length"], width),
        "qkvw": (3 * width, width),
        "qkvb": (3 * width,),
        "attprojw": (width, width),
        "fcw": (4 * width, width),
        "fcb": (4 * width,),
        "fcprojw": (width, 4 * width),
    }
    for name in NAMES.values():
        kind = name.removesuffix(".{n}")
        for n in range(sizes["n_layers"] if name != kind else 1):
            found[name.replace("{n}", str(n))] = inside[kind]
    return found


LLM_C = LLMC()
