"""`convert` and `export`: check, convert one tensor at a time, verify, publish.

A conversion either publishes the complete, verified target or changes nothing.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ConversionError, ParityError
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM
from .checkpoint import Progress, as_progress
from .formats import FORMATS, Format, Found, Source, detect, open_source, read, writable, write
from .formats.directory import GPT2, NATIVE
from .formats.format import MAX_SHARD_SIZE, Contents, Options
from .hub import find_source, quiet_transformers
from .optimizer import REMEDY, State, state_that_goes_along
from .parity import same_bits, verify_models
from .publish import (
    RECEIPT,
    Stamps,
    errors_explained,
    local_path,
    new_receipt,
    publishing,
    refuse_overlap,
    seal,
    target_path,
    verify_receipt,
)
from .tensors import LazyTensor, all_zero, with_qkv_biases
from .tokenizer_files import Chosen, choose_tokenizer, left_behind, put_tokenizer, tokenizer_beside
from .trust import strip_code

__all__ = [  # including the names of 0.1.0's `conversion` and `formats`
    "RECEIPT",
    "ConversionError",
    "Progress",
    "convert",
    "detect",
    "export",
    "export_checkpoint",
    "find_checkpoint",
    "find_source",
    "gpt2_to_scratch",
    "import_checkpoint",
    "read",
    "scratch_to_gpt2",
    "tokenizer_beside",
    "verify_receipt",
    "write",
]

# How the result is compared with the source: True as models in float32, "weights" by the weights alone, False not.
Check = bool | Literal["weights"]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    n_heads: int | None = None,
    activation_function: str | None = None,
    lora_scale: float | None = None,
    tokenizer: str | os.PathLike | None = None,
    optimizer: bool = True,
    revision: str | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint of any format, local or on the hub, into a native directory, weights unchanged.

    Memory use is about two of the largest tensors, unless `check` is True. Other programs' models are compared by
    their weights alone, unless `check` is False.

    Args:
        source: file, directory or hub id.
        target: directory to be; must not exist unless `overwrite`.
        n_heads: for "book" and "mingpt", whose files do not say it. A wrong number that divides emb_dim cannot be
            noticed: the model loads and computes something else.
        activation_function: for files that do not store it, the book's, nanoGPT's and minGPT's: "gelu" (exact) or
            "gelu_new" (tanh). None: the book's is the tanh one; for the others a note says what is assumed.
        lora_scale: for adapters of the book's appendix E, what A @ B is multiplied by: alpha / rank, or alpha alone in
            its first printing.
        tokenizer: a directory, a hub id, nanoGPT's meta.pkl, "gpt2" or "none"; None: the source's own, or GPT-2's if
            it has none and its vocabulary has GPT-2's size, or none.
        optimizer: take AdamW's state along from the book's and nanoGPT's files, for Trainer to resume from; what is
            left behind is noted.
        revision: branch, tag or commit of a hub id.
        check: before the result is published, compare it with the official model in float32, with both models in
            memory; "weights": compare only the weights, bit for bit, streaming; False: compare nothing.
        overwrite: replace a target that a conversion has written.
        max_shard_size: as in `save_pretrained`: bytes, or a string such as "5GB".
        progress: a tqdm bar, or an object whose `step` and `advance` are called as the conversion proceeds.

    Returns:
        the receipt, which also lies in the target: files with their sha256, parity figures, versions.

    Raises:
        ConversionError: the source or the target is not usable, or `n_heads` is needed and missing.
        ParityError: the result differs from the source.
    """
    options: dict[str, Any] = dict(check=check, overwrite=overwrite, max_shard_size=max_shard_size, progress=progress)
    options |= dict(n_heads=n_heads, activation_function=activation_function, lora_scale=lora_scale)
    return _convert(source, target, NATIVE, tokenizer=tokenizer, optimizer=optimizer, revision=revision, **options)


def export(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    *,
    n_heads: int | None = None,
    activation_function: str | None = None,
    lora_scale: float | None = None,
    tokenizer: str | os.PathLike | None = None,
    optimizer: bool = True,
    revision: str | None = None,
    bias: bool | None = None,
    quantize: str | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts a native checkpoint, or one of any other format, into `format`, weights unchanged.

    The target is a directory: it holds `model.pth`, `ckpt.pt`, `model.gguf`, `model.bin` or `onnx/model.onnx`, or is
    the checkpoint, and the receipt. For the first two the disk must have room for the weights twice.

    Args:
        source: file, directory or hub id.
        target: directory to be; must not exist unless `overwrite`.
        format: "gpt2", "book", "nanogpt", "gguf", "llmc", "onnx" or "native".
        n_heads, activation_function, lora_scale: as in `convert`.
        tokenizer: as in `convert`, for the formats that have a place for one.
        optimizer: as in `convert`, for "gpt2".
        revision: branch, tag or commit of a hub id.
        bias: for "nanogpt": whether to store biases; None: unless all are zero and `qkv_bias` is off.
        quantize: for "onnx": "int8" also writes a graph with int8 weights, `onnx/model_quantized.onnx`.
        check: as in `convert`; for "onnx", what onnxruntime computes is compared with the model.
        overwrite: replace a target that a conversion has written.
        max_shard_size: as in `save_pretrained`: bytes, or a string such as "5GB".
        progress: a tqdm bar, or an object whose `step` and `advance` are called as the conversion proceeds.

    Returns:
        the receipt, which also lies in the target.

    Raises:
        ConversionError: the source or the target is not usable, or the format cannot express the model.
        ParityError: the result differs from the source.
    """
    options: dict[str, Any] = dict(check=check, overwrite=overwrite, max_shard_size=max_shard_size, progress=progress)
    options |= dict(n_heads=n_heads, activation_function=activation_function, lora_scale=lora_scale)
    options |= dict(tokenizer=tokenizer, optimizer=optimizer, revision=revision, bias=bias, quantize=quantize)
    return _convert(source, target, writable(format), **options)


def gpt2_to_scratch(source: str | os.PathLike, target: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """`convert`, with its options, of an official checkpoint and nothing else: a directory or hub id."""
    return _convert(source, target, NATIVE, only=GPT2, **options)


def scratch_to_gpt2(source: str | os.PathLike, target: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """`export` to "gpt2", with its options, of a native checkpoint and nothing else: a directory or hub id."""
    return _convert(source, target, GPT2, only=NATIVE, **options)


# The names of 0.1.0.
import_checkpoint, export_checkpoint = convert, export


def _convert(
    name: str | os.PathLike,
    target: str | os.PathLike,
    wanted: Format,
    *,
    only: Format | None = None,
    n_heads: int | None = None,
    activation_function: str | None = None,
    lora_scale: float | None = None,
    tokenizer: str | os.PathLike | None = None,
    optimizer: bool = True,
    revision: str | None = None,
    bias: bool | None = None,
    quantize: str | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts any format into any other.

    Args:
        only: the only format that is accepted; None: any.
    """
    if check not in (True, False, "weights"):
        raise ConversionError(
            f"got check={str(check)[:80]!r}, but it must be True, False or 'weights'; give one of them"
        )
    place = target_path(target)
    options = Options(as_progress(progress), max_shard_size, bias, quantize=quantize, runs=check is True)
    options.progress.step(f"Finding {name}")
    with errors_explained("reading the source", place):
        path = find_source(name, revision) if only else find_checkpoint(name, revision)
        refuse_overlap(place, path, overwrite)
        stamps = Stamps(path, {str(Path(format.mark).parent) for format in FORMATS.values() if format.mark})
        source = only.open(Found(path)) if only else open_source(path)
        if source.format is wanted:
            raise ConversionError(f"{path} already has the format {wanted.name!r}; export it with another --format")
        answer(source, activation_function, lora_scale)
        contents = source.format.read(source, n_heads)
        wanted.check(contents, options)
        chosen = _tokenizer(tokenizer, source, contents, wanted)
        state, about_state = state_that_goes_along(source, contents, wanted, optimizer)
    needed = wanted.room(contents, options)
    needed += 2 * state.nbytes if state else 0
    with (
        publishing(place, overwrite, needed) as staging,
        stamps.hashed_meanwhile(source.files) as source_files,
        quiet_transformers(),
    ):
        file = staging / (wanted.file or "")
        inside = chosen.tokenizer if wanted.tokenizer == "inside" else None
        written = wanted.write(contents, file, replace(options, tokenizer=inside))
        carried = put_tokenizer(chosen, staging) if wanted.tokenizer == "beside" else written.tokenizer
        hashes = {**written.hashes, **(state.write(staging, options) if state else {})}
        notes = [*source.notes, *written.notes, *chosen.notes, *strip_code(staging)]
        notes += about_state
        if state and check:
            _verify_optimizer(state, source, contents, staging, wanted, options.progress)
        parity = _verify(source, contents, file, wanted, check, options.progress) if check else None
        receipt = new_receipt(
            f"{source.format.name} converted to {wanted.name}",
            source={"name": str(name), "format": source.format.name, "revision": revision, "files": source_files()},
            tokenizer=carried,
            parity=parity,
            notes=notes,
        )
        wanted.finish(staging, contents, receipt, None if path == local_path(name) else str(name))
        seal(staging, receipt, hashes)
    return receipt


def answer(source: Source, activation_function: str | None, lora_scale: float | None) -> None:
    """Tells the source what its file leaves open, and adds a note on what that changes in the weights.

    Raises:
        ConversionError: the file leaves nothing open there.
    """
    source.answer(activation_function=activation_function, lora_scale=lora_scale)
    if lora_scale is not None:
        source.notes.append(
            f"the adapters of appendix E are merged into their layers, with lora_scale={lora_scale}; the merged "
            "weights are what is compared"
        )


def _tokenizer(asked: str | os.PathLike | None, source: Source, contents: Contents, wanted: Format) -> Chosen:
    """The tokenizer that goes along, before anything is written; none where the format has no place for one."""
    if wanted.tokenizer is not None:
        return choose_tokenizer(asked, source, contents.config.vocab_size)
    if asked is not None:
        raise ConversionError(f"{wanted.file} has no place for the tokenizer {asked}; leave --tokenizer out")
    inside = [f"left behind: the tokenizer inside {source.path.name}"] if source.tokenizer else []
    place = source.path if source.path.is_dir() else source.path.parent
    return Chosen(notes=[*inside, *left_behind(place, f"{wanted.file} has no place for a tokenizer")])


def find_checkpoint(name: str | os.PathLike, revision: str | None) -> Path:
    """A local file or directory, or that of a hub id; a name with the suffix of a file is not a hub id."""
    path = local_path(name)
    files = {suffix for format in FORMATS.values() if format.mark is None for suffix in format.suffixes}
    is_here = os.path.exists(path) or path.suffix in {*files, ".safetensors", ".bin"}
    return path if is_here and revision is None else find_source(name, revision)


def _verify(
    source: Source, contents: Contents, written: Path, wanted: Format, check: Check, progress: Progress
) -> dict[str, Any]:
    """The figures of a comparison of the written result with the source.

    Raises:
        ParityError: they differ.
    """
    result = open_source(written)
    if result.format is not wanted:
        raise ParityError(
            f"the result was written as {wanted.name!r} but is recognised as {result.format.name!r}; please report this"
        )
    config, layout = contents.config, source.format.layout
    back = wanted.read(result, config.n_heads).tensors
    there = source.tensors
    head = layout.head if contents.kind is GPTScratchForCausalLM else None
    if head and (head in there) != ("out_head.weight" in back):  # a tied head, which only one of the two stores
        back.setdefault("out_head.weight", back["tok_emb.weight"])
        there = {head: there[layout.named("tok_emb.weight")], **there}
    back = layout.from_scratch(with_qkv_biases(back, config.n_layers), config.n_layers)
    verify_weights(there, back, progress)  # in their own dtype; below, as models in float32
    if check == "weights" or not (source.format.loads and wanted.loads):
        figures = {"passed": True, "tensors": len(source.tensors), "weights_equal": True}
        return figures if check == "weights" else figures | wanted.run(written, contents, progress)
    official = contents.kind.gpt2_class
    progress.step(f"Verifying against {official.__name__}")
    models: list[Any] = [
        format.load(path, contents.kind) for format, path in ((source.format, source.path), (wanted, written))
    ]
    models.sort(key=lambda model: not isinstance(model, official))
    return verify_models(*models).to_dict()


def _verify_optimizer(
    state: State, source: Source, contents: Contents, written: Path, wanted: Format, progress: Progress
) -> None:
    """Raises ParityError if the optimizer's state, read back from the target, is not the source's."""
    for there, back in state.read_back(written, wanted, source.format, contents.config.n_layers):
        try:
            verify_weights(there, back, progress)
        except ParityError as error:
            raise ParityError(f"of the optimizer's state: {error}; {REMEDY}") from error


def verify_weights(source: Mapping[str, LazyTensor], back: Mapping[str, LazyTensor], progress: Progress) -> None:
    """Compares the source's tensors with the result's, mapped back to the source's names.

    Raises:
        ParityError: one is different; the message names it.
    """

    def equal(name: str) -> bool:
        both = [tensors[name].read() for tensors in (source, back) if name in tensors]
        # A bias that only one of them has must be zero.
        return same_bits(*both) if len(both) == 2 else all_zero(both[0])

    progress.step("Verifying the weights", sum(lazy.nbytes for lazy in source.values()))
    for name in sorted(source.keys() | back.keys()):
        if not equal(name):
            raise ParityError(f"{name!r} is not equal to the source's bit for bit; please report this")
        if name in source:
            progress.advance(source[name].nbytes)
