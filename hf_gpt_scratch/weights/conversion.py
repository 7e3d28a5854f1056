"""Checkpoints from official GPT-2 to ours and back: checked, streamed through the weight map, verified, published.

A conversion either ends with the complete, verified target under its final name or leaves things as they were.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ..errors import ConversionError, ParityError, UnknownArchitecture, shortened
from ..model.configuration_gpt_scratch import OF_ANOTHER_TYPE, GPTScratchConfig, ignored_by_gpt2, model_type_of, told
from ..model.modeling_gpt_scratch import GPTScratchPreTrainedModel
from ..model.weight_map import DROPPED_PATTERNS, GPT2_PREFIX, SCRATCH_PREFIX, rows
from .architecture import architecture
from .checkpoint import Checkpoint, Progress, check_files, check_settings, read_json, write_safetensors
from .lazy import Lazy, all_zero, from_scratch, to_scratch, with_qkv_biases
from .model_card import model_card
from .parity import same_bits, verify_models
from .publish import (
    RECEIPT,
    Stamps,
    atomic_directory,
    by_name,
    digests,
    local_path,
    new_receipt,
    publishing,
    refuse_overlap,
    seal,
    target_path,
    told_while,
    verify_receipt,
)
from .tokenizer_files import carry_tokenizer, tokenizer_beside
from .trust import code_beside, refuse_kernels, strip_code

__all__ = [
    "RECEIPT",
    "ConversionError",
    "Progress",
    "atomic_directory",
    "check_checkpoint",
    "find_source",
    "gpt2_to_scratch",
    "scratch_to_gpt2",
    "tokenizer_beside",
    "verify_receipt",
]

CARD = "README.md"
# What is downloaded with the weights: configs and the files of every kind of tokenizer.
BESIDE = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.jinja")
# Of what is read beside the weights: config, generation settings, tokenizer, templates.
SETTINGS = tuple(pattern[1:] for pattern in BESIDE)
# What `save_pretrained` takes too.
MAX_SHARD_SIZE = "50GB"
# transformers makes a name for each label of a classifier; no checkpoint has more.
MAX_LABELS = 1_000_000
MAX_LAYERS = 1000
# Whether the result is compared with the source: as models in float32, or the weights alone, or not.
Check = bool | Literal["weights"]

_DROPPED = [re.compile(pattern) for pattern in DROPPED_PATTERNS]
_PREFIXES = {"gpt2": GPT2_PREFIX, "gpt_scratch": SCRATCH_PREFIX}


def gpt2_to_scratch(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    revision: str | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts an official GPT-2 checkpoint, with whatever head, into ours, weights unchanged, in the same dtype.

    The weights stream: memory holds about two of the largest tensors, unless `check` is True.

    Args:
        source: directory or hub id.
        target: directory to be; must not exist unless `overwrite`.
        revision: branch, tag or commit of a hub id.
        check: before the result is published, compare it with the official model in float32, for which both models
            are in memory; "weights": compare only the weights, bit for bit, streaming; False: compare nothing.
        max_shard_size: as in `save_pretrained`: bytes, or a string such as "5GB".

    Returns:
        the receipt, which also lies in the target: files with their sha256, parity figures, versions.

    Raises:
        ConversionError: source or target is not as it must be.
        ParityError: the result is not the same model.
    """
    return _convert("gpt2", source, target, revision, check, overwrite, max_shard_size, progress or Progress())


def scratch_to_gpt2(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    revision: str | None = None,
    check: Check = True,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts our checkpoint into an official one; the inverse of `gpt2_to_scratch`, with the same arguments."""
    return _convert("gpt_scratch", source, target, revision, check, overwrite, max_shard_size, progress or Progress())


def _convert(source_type, source, target, revision, check, overwrite, max_shard_size, progress):
    target_type = "gpt_scratch" if source_type == "gpt2" else "gpt2"
    target = target_path(target)
    progress.step(f"Finding {source}")
    with told_while("reading the source", target):
        directory = find_source(source, revision)
        refuse_overlap(target, directory, overwrite)
        stamps = Stamps(directory)
        weights = Weights(directory, source_type)
        settings = [path for path in directory.iterdir() if path.suffix in SETTINGS and path.is_file()]
    with (
        publishing(target, overwrite, sum(spec.nbytes for spec in weights.checkpoint.specs.values())) as staging,
        stamps.hashed_meanwhile([*weights.files(), *settings]) as source_files,
        quiet_transformers(),
    ):
        target_hashes = _write(weights, staging, max_shard_size, progress)
        tokenizer, left = carry_tokenizer(directory, staging)
        notes = [*weights.notes, *left, *strip_code(staging)]
        if source_type == "gpt2":  # our own code is no news
            notes += code_beside(directory)
        result = Weights(staging, target_type)
        parity = _verify(weights, result, check, progress) if check else None
        receipt = new_receipt(
            f"{source_type} converted to {target_type}",
            source={"name": str(source), "revision": revision, "files": source_files()},
            tokenizer=tokenizer,
            parity=parity,
            notes=notes,
        )
        if target_type == "gpt_scratch":
            hub_id = None if directory == local_path(source) else str(source)
            model_card(result.model, receipt, hub_id).save(staging / CARD)
        seal(staging, receipt, target_hashes)
    return receipt


def find_source(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The directory of a checkpoint; a hub id is downloaded into the hub's cache.

    Raises:
        ConversionError: it does not exist, or cannot be had.
    """
    path = local_path(source)
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a directory, so --revision {revision} has no meaning; leave it out")
        return path
    if path.exists():
        if revision is not None:
            raise ConversionError(f"{source} is a file, so --revision {revision} has no meaning; leave it out")
        raise ConversionError(f"{source} is a file, but a checkpoint is a directory; give the directory it lies in")
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConversionError(f"there is no directory {shortened(name)}; check the path")
    wanted = [*BESIDE, "*.safetensors"]
    try:
        directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        if not any(directory.glob("*.safetensors")):
            wanted = [*BESIDE, "pytorch_model*.bin"]
            directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        return directory
    except GatedRepoError as error:
        raise ConversionError(
            f"{name} asks for access that you do not have; request it, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{name} has no revision {revision!r}; check its branches and tags") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConversionError(f"there is neither a directory nor a hub repository {name!r}; check the name") from error
    except (OSError, ConnectionError) as error:
        raise ConversionError(
            f"{name!r} is no directory here, and the hub cannot be reached ({error.__cause__ or error}); connect to "
            "the network, or give the directory of a downloaded checkpoint"
        ) from error


def check_checkpoint(directory: Path, model_type: str, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Reads all of a checkpoint, one tensor at a time, before anything trusts it.

    Returns:
        sha256 and size of each file that was read.

    Raises:
        ConversionError: another kind of model; a file that is missing, truncated or corrupt; a tensor that is missing,
            unexpected, of the wrong shape or dtype, or not finite.
    """
    progress = progress or Progress()
    weights = Weights(directory, model_type)
    progress.step("Checking the tensors", sum(spec.nbytes for spec in weights.checkpoint.specs.values()))
    for name in weights.names:
        progress.advance(weights.read(name).nbytes)
    progress.step("Hashing the files", sum(path.stat().st_size for path in weights.files()))
    return by_name(digests(weights.files(), progress))


class Weights:
    """A checkpoint whose names, shapes and dtypes are what its config promises, by the names of the weight map.

    Raises:
        ConversionError: another kind of model; a file that is missing, truncated or corrupt; a tensor that is missing,
            unexpected or of the wrong shape or dtype; a second copy of a tied tensor that is not equal.
    """

    def __init__(self, directory: Path, model_type: str):
        self.directory, self.model_type = directory, model_type
        check_files(directory)
        values = _config_values(directory, model_type)
        self.checkpoint = Checkpoint(directory)
        self.config = _config(directory, model_type, values, len(self.checkpoint.specs))
        self.notes = []
        if isinstance(self.config, GPT2Config) and (unused := ignored_by_gpt2(self.config)):
            self.notes.append(f"left out of config.json, since GPT-2 ignores it: {told(unused)}")
        self.ours = _architecture(directory, values)
        self.model = meta_model(self.ours.gpt2_class if model_type == "gpt2" else self.ours, self.config)
        self.names = self._match()
        dtypes = [self.checkpoint.specs[name].dtype for name in self.names.values()]
        self.dtype = self.config.dtype or dtypes[0]
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ConversionError(f"{directory} has dtype {self.dtype} in its config.json, but weights are floats")

    def files(self) -> list[Path]:
        return [self.directory / "config.json", *self.checkpoint.paths]

    def _match(self) -> dict[str, str]:
        """The names in the files, by the names in the table."""
        prefix = _PREFIXES[self.model_type]
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in self.model.state_dict().items()}
        tied = {
            second.removeprefix(prefix): first.removeprefix(prefix) for second, first in _tied_names(self.model).items()
        }
        names: dict[str, str] = {}
        left_behind: list[str] = []
        for name, spec in self.checkpoint.specs.items():
            bare, file = name.removeprefix(prefix), spec.file.path.name
            if self.model_type == "gpt2" and any(pattern.search(bare) for pattern in _DROPPED):
                continue
            if self.ours.gpt2_class is GPT2LMHeadModel and name.startswith("v_head."):
                left_behind.append(name)
                continue
            if name == "lm_head.decoder.weight" and "lm_head.weight" in tied:  # of pytorch-pretrained-bert
                bare = "lm_head.weight"
            if bare in names:
                raise ConversionError(f"{file} holds {name!r}, which is there already as {names[bare]!r}; keep one")
            if bare not in shapes:
                old = bare == "lm_head.decoder.weight"
                remedy = "rename it to 'lm_head.weight'" if old else self._about(name, shapes)
                raise ConversionError(
                    f"{file} holds the tensor {name!r}, which a {type(self.model).__name__} of this config.json does "
                    f"not have; {remedy}"
                )
            if spec.shape != shapes[bare]:
                raise ConversionError(
                    f"{name!r} in {file} has shape {list(spec.shape)}, but by config.json it must be "
                    f"{list(shapes[bare])}; take weights and config from the same model"
                )
            names[bare] = name
        if left_behind:  # by trl, from training
            self.notes.append(
                f"left behind, since a {type(self.model).__name__} has no value head: {', '.join(left_behind[:9])}"
            )
        if missing := sorted(shapes.keys() - names.keys() - tied.keys()):
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ConversionError(
                f"{self.directory} lacks {', '.join(repr(name) for name in missing[:5])}{more}, which config.json "
                "promises; take weights and config from the same model, and all shards"
            )
        for second, first in tied.items():
            if second in names and not same_bits(*(self.checkpoint.read(names[name]) for name in (first, second))):
                raise ConversionError(
                    f"{names[second]!r} is not equal to {names[first]!r}, to which config.json ties it; set "
                    "tie_word_embeddings to false if both are meant"
                )
            names.pop(second, None)
        return names

    def _about(self, name: str, shapes: Mapping[str, torch.Size]) -> str:
        """What to do about a name that is unknown."""
        if any("lora_" in there for there in self.checkpoint.specs):
            return (
                "it is of a model with LoRA adapters: merge them, model.merge_and_unload(), and save what that returns"
            )
        for bare in sorted(shapes, key=len, reverse=True):
            for known in (_PREFIXES[self.model_type] + bare, bare):
                if name.endswith(f".{known}"):
                    prefix = name.removesuffix(known)[:200]
                    return f"save it with names without {prefix!r}, name.removeprefix({prefix!r})"
        return "take weights and config from the same model"

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self.names[name])

    def tensors(self) -> dict[str, Lazy]:
        """All of them, by the names of the table."""
        specs = {name: self.checkpoint.specs[there] for name, there in self.names.items()}
        return {name: Lazy(spec.shape, spec.dtype, functools.partial(self.read, name)) for name, spec in specs.items()}

    def translated(self) -> dict[str, Lazy]:
        """The other model's tensors, by the names of the table."""
        n_layers = self.config.num_hidden_layers
        if self.model_type == "gpt2":
            return to_scratch(self.tensors(), rows(n_layers))
        return from_scratch(with_qkv_biases(self.tensors(), n_layers), rows(n_layers))


def _tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """Second names of tensors, and the first."""
    return (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


def _config_values(directory: Path, model_type: str) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ConversionError(f"{directory} has no config.json; give the directory of a whole checkpoint")
    values = read_json(path)
    found = str(model_type_of(values)) if isinstance(values, dict) else "none"
    if found != model_type:
        other = {"gpt2": "convert", "gpt_scratch": "export"}.get(found)
        remedy = OF_ANOTHER_TYPE
        if other:
            remedy = f"hf-gpt-scratch {other} takes those; verify takes the official one first"
        raise ConversionError(f"{directory} holds a model of type {found!r}, but {model_type!r} is wanted; {remedy}")
    refuse_kernels(path, values)
    check_settings(path, values)
    labels = values.get("num_labels")
    if isinstance(labels, int) and labels > MAX_LABELS:
        raise ConversionError(f"{path} is not usable: num_labels={labels}, but at most {MAX_LABELS} can be; correct it")
    return values


def _config(directory: Path, model_type: str, values: dict[str, Any], tensors: int) -> GPT2Config | GPTScratchConfig:
    path = directory / "config.json"
    try:
        if model_type == "gpt2":
            config = GPT2Config.from_dict(values)
            GPTScratchConfig.from_gpt2(config)  # refuses what our model does not do
        else:
            config = GPTScratchConfig.from_dict(values)
    except Exception as error:  # transformers takes what it finds there in many ways, and fails in as many
        raise ConversionError(f"{path} is not usable: {error}; take the config.json that came with the weights") from (
            error
        )
    # Each layer has 12 tensors and more, and takes some memory even without weights.
    if config.num_hidden_layers > min(tensors, MAX_LAYERS):
        raise ConversionError(
            f"{path} promises {config.num_hidden_layers} layers, but {directory} lacks them: it holds {tensors} "
            f"tensors in all, and {MAX_LAYERS} layers are the most that are read; take weights and config from the "
            "same model"
        )
    return config


def _architecture(directory: Path, values: Mapping[str, Any]) -> type[GPTScratchPreTrainedModel]:
    """Our class of the model; the official one is its `gpt2_class`."""
    try:
        return architecture(values, directory)
    except UnknownArchitecture as error:
        raise ConversionError(str(error)) from error


def meta_model(model_class: type[PreTrainedModel], config: GPT2Config | GPTScratchConfig) -> PreTrainedModel:
    """A model without weights."""
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # sizes that overflow, options of the heads that do not exist, and what else there is
        raise ConversionError(f"no {model_class.__name__} can be built from its config: {error}; correct it") from error


def _write(weights: Weights, staging: Path, max_shard_size: int | str, progress: Progress) -> dict[str, dict[str, Any]]:
    if isinstance(weights.config, GPT2Config):
        model = meta_model(weights.ours, GPTScratchConfig.from_gpt2(weights.config))
    else:
        model = meta_model(weights.ours.gpt2_class, weights.config.to_gpt2())
    model.to(weights.dtype)
    generation = weights.directory / GENERATION_CONFIG_NAME
    try:
        if model.can_generate() and generation.exists():
            read_json(generation)
            model.generation_config = GenerationConfig.from_pretrained(weights.directory)
    except (OSError, ConversionError):
        raise
    except Exception as error:  # as many kinds as there are settings
        raise ConversionError(f"{generation} is not usable: {error}; correct it") from error
    return write_model(model, weights.translated(), staging, max_shard_size, progress)


def write_model(
    model: PreTrainedModel,
    tensors: Mapping[str, Lazy],
    directory: Path,
    max_shard_size: int | str,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Writes a model as its `save_pretrained` would, with one tensor in memory at a time.

    Args:
        model: an official one or ours, on the meta device.
        tensors: its weights, by the names of the table.

    Returns:
        sha256 and size of the files with the weights.
    """
    try:
        model.save_pretrained(directory, state_dict={})  # config, generation config and code, but no weights
    except OSError:
        raise
    except Exception as error:  # as many kinds as there are settings
        raise ConversionError(f"the model's settings cannot be saved: {error}; correct them") from error
    prefix = _PREFIXES[model.config.model_type]
    names = [name for name in model.state_dict() if name not in _tied_names(model)]
    lazies = {name: tensors[name.removeprefix(prefix)] for name in names}
    specs = {name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for name, lazy in lazies.items()}
    try:
        split = huggingface_hub.split_torch_state_dict_into_shards(specs, max_shard_size=max_shard_size)
    except (ValueError, OverflowError) as error:
        raise ConversionError(
            f"max_shard_size={str(max_shard_size)[:80]!r}: {error}; give a size such as 5GB"
        ) from error
    progress.step("Converting", sum(lazy.nbytes for lazy in lazies.values()))
    hashes = {}
    for file, names in split.filename_to_tensors.items():
        shard = {name: (lazies[name].shape, lazies[name].dtype) for name in names}
        sha256 = write_safetensors(directory / file, shard, lambda name: lazies[name].read(), progress)
        hashes[file] = {"sha256": sha256, "bytes": (directory / file).stat().st_size}
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes


def _verify(source: Weights, result: Weights, check: Check, progress: Progress) -> dict[str, Any]:
    verify_weights(source.tensors(), result.translated(), progress)  # in their own dtype, as below they are not
    if check == "weights":
        return {"passed": True, "tensors": len(source.names), "weights_equal": True}
    gpt2_directory, scratch_directory = (w.directory for w in sorted((source, result), key=lambda w: w.model_type))
    progress.step(f"Verifying against {source.ours.gpt2_class.__name__}")
    gpt2 = source.ours.gpt2_class.from_pretrained(gpt2_directory, dtype=torch.float32)
    scratch = source.ours.from_pretrained(scratch_directory, dtype=torch.float32)
    return verify_models(gpt2, scratch).to_dict()


def verify_weights(source: Mapping[str, Lazy], back: Mapping[str, Lazy], progress: Progress) -> None:
    """Compares the source's tensors with the result's that were mapped back to their names.

    Raises:
        ParityError: one is different; the message names it.
    """

    def equal(name: str) -> bool:
        both = [tensors[name].read() for tensors in (source, back) if name in tensors]
        # A bias that only one of them has.
        return same_bits(*both) if len(both) == 2 else all_zero(both[0])

    progress.step("Verifying the weights", sum(lazy.nbytes for lazy in source.values()))
    for name in sorted(source.keys() | back.keys()):
        if not equal(name):
            raise ParityError(f"{name!r} is not the source's, bit for bit; please report this")
        if name in source:
            progress.advance(source[name].nbytes)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Our own progress is shown instead of transformers' bars."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
