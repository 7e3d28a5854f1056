"""Directories of `save_pretrained`, official and native: checked, and converted one tensor at a time."""

import copy
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from ...errors import ConversionError, UnknownArchitecture, some
from ...model.config_translation import ignored_by_gpt2, model_type_of, of_another_type
from ...model.configuration_gpt_scratch import GPTScratchConfig, listed
from ...model.modeling_gpt_scratch import GPTScratchPreTrainedModel
from ...model.weight_map import DROPPED_PATTERNS, GPT2_PREFIX, SCRATCH_PREFIX, TABLE, Row
from ...tokenizer import complete_tokenizer
from ..architecture import architecture
from ..checkpoint import Checkpoint, Progress, as_progress, check_files, check_settings, read_json, write_safetensors
from ..model_card import model_card
from ..parity import same_bits
from ..publish import by_name, digests
from ..tensors import LazyTensor
from ..trust import code_beside, refuse_kernels
from .format import Contents, Format, Found, Layout, Options, Source, Written, readable
from .torch_file import holds_conv1d, is_safetensors, state_dict

CARD = "README.md"
# Suffixes of the files that are read beside the weights: config, generation settings, tokenizer, templates.
SETTINGS = (".json", ".txt", ".model", ".spm", ".tiktoken", ".bpe", ".codes", ".jinja")
# transformers makes a name for each label of a classifier; no real checkpoint has more.
MAX_LABELS = 1_000_000
MAX_LAYERS = 1000

_DROPPED = [re.compile(pattern) for pattern in DROPPED_PATTERNS]
PREFIXES = {"gpt2": GPT2_PREFIX, "gpt_scratch": SCRATCH_PREFIX}


def config_of(directory: Path) -> Any:
    """The content of its config.json; None if there is none."""
    path = directory / Directory.mark
    return read_json(path) if path.is_file() else None


class Directory(Format):
    """A directory with config.json, which can store every setting and every head.

    Args:
        model_type: as in config.json.
    """

    file = ""
    mark = "config.json"
    suffixes = (".safetensors",)
    tokenizer = "beside"
    plain = False
    loads = True

    def __init__(self, name: str, model_type: str, what: str, layout: Layout):
        self.name, self.model_type, self.what, self.layout = name, model_type, what, layout

    def matches(self, found: Found) -> bool:
        values = found.once(config_of) if found.is_directory else None
        return isinstance(values, dict) and model_type_of(values) == self.model_type

    def near(self, found: Found) -> str | None:
        path = found.path
        if found.is_directory:
            values = found.once(config_of)
            if values is None:
                return None
            model_type = model_type_of(values) if isinstance(values, dict) else None
            known = f"these formats can be read: {readable()}. {of_another_type(model_type)}"
            return f"{path} holds a model of type {model_type!r}; {known}"
        there = state_dict(found)
        if there is not None and holds_conv1d(there):
            return f"{path} is the weights file of an official checkpoint; give its directory, {path.parent}"
        if path.suffix in (".safetensors", ".json") and not is_safetensors(path):
            return f"{found.begins}; give its directory, {path.parent}"
        return None

    def open(self, found: Found) -> Source:
        return Source(self, found.path)

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        weights = Weights(source.path, self.model_type)
        config = weights.config
        if isinstance(config, GPT2Config):
            config = GPTScratchConfig.from_gpt2(config)
        if n_heads not in (None, config.n_heads):
            raise ConversionError(f"got n_heads={n_heads}, but {source.path} says {config.n_heads}; leave n_heads out")
        source.tensors = weights.tensors()
        source.notes += weights.notes
        source.files = [*weights.files(), *(file for file in source.files if file.suffix in SETTINGS)]
        ours = self.layout.to_scratch(source.tensors, config.n_layers)
        return Contents(str(source.path), config, ours, weights.dtype, weights.ours, source.path)

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        return {}

    def model(self, contents: Contents) -> PreTrainedModel:
        """The model without its weights."""
        return meta_model(contents.kind, copy.deepcopy(contents.config))

    def save(self, tensors: dict[str, LazyTensor], contents: Contents, path: Path, options: Options) -> Written:
        model = self.model(contents)
        model.to(dtype=contents.dtype)  # type: ignore[call-arg]  # hidden by a decorator
        if model.can_generate():
            model.generation_config = generation_settings(contents, model.config)
        if options.tokenizer is not None:
            options.tokenizer.save_pretrained(path)
            complete_tokenizer(path, options.tokenizer)
        return Written(hashes=write_model(model, tensors, path, options.max_shard_size, options.progress))

    def load(self, directory: Path, kind: type[GPTScratchPreTrainedModel]) -> PreTrainedModel:
        return kind.from_pretrained(directory, dtype=torch.float32)


def generation_settings(contents: Contents, config: PreTrainedConfig) -> GenerationConfig:
    """The source's settings for `generate`, or if it has none, what the model's config says of them.

    Raises:
        ConversionError: they are not usable.
    """
    settings = contents.directory / GENERATION_CONFIG_NAME if contents.directory else None
    try:
        if settings and settings.exists():
            read_json(settings)
            return GenerationConfig.from_pretrained(settings.parent)
        return GenerationConfig.from_model_config(config)
    except (OSError, ConversionError):
        raise
    except Exception as error:  # wrong settings raise errors of many types
        raise ConversionError(f"{settings or contents.name} is not usable: {error}; correct it") from error


class Native(Directory):
    """A directory of this package's `save_pretrained`; a converted one also has a model card."""

    def finish(self, directory: Path, contents: Contents, receipt: Mapping[str, Any], hub_id: str | None) -> None:
        model: Any = meta_model(contents.kind, GPTScratchConfig.from_pretrained(directory))
        model_card(model, receipt, hub_id).save(directory / CARD)


class Official(Directory):
    """A directory that the official classes read and write."""

    def read(self, source: Source, n_heads: int | None = None) -> Contents:
        contents = super().read(source, n_heads)
        source.notes += code_beside(source.path)  # in native directories it is our own
        return contents

    def limits(self, config: GPTScratchConfig) -> dict[str, tuple]:
        return {"book_classifier": (False,)}

    def model(self, contents: Contents) -> PreTrainedModel:
        return meta_model(contents.kind.gpt2_class, contents.config.to_gpt2())

    def load(self, directory: Path, kind: type[GPTScratchPreTrainedModel]) -> PreTrainedModel:
        return kind.gpt2_class.from_pretrained(directory, dtype=torch.float32)


NATIVE = Native(
    "native",
    "gpt_scratch",
    "GPTScratch's directory with config.json",
    Layout(
        tuple(Row(name, (name,), False, row.meaning) for row in TABLE for name in row.ours), stores_qkv_biases=False
    ),
)
GPT2 = Official("gpt2", "gpt2", "GPT-2's directory with config.json", Layout(TABLE))


def check_checkpoint(directory: Path, model_type: str, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Reads and checks a whole checkpoint, one tensor at a time, before it is used.

    Returns:
        sha256 and size of each file that was read.

    Raises:
        ConversionError: it is another kind of model; a file is missing, truncated or corrupt; a tensor is missing,
            unexpected, of the wrong shape or dtype, or not finite.
    """
    progress = as_progress(progress)
    weights = Weights(directory, model_type)
    progress.step("Checking the tensors", sum(tensor.nbytes for tensor in weights.checkpoint.tensors.values()))
    for name in weights.names:
        progress.advance(weights.read(name).nbytes)
    progress.step("Hashing the files", sum(path.stat().st_size for path in weights.files()))
    return by_name(digests(weights.files(), progress))


class Weights:
    """A checkpoint whose names, shapes and dtypes match its config; its tensors have the weight map's names.

    Raises:
        ConversionError: it is another kind of model; a file is missing, truncated or corrupt; a tensor is missing,
            unexpected or of the wrong shape or dtype; or two copies of a tied tensor differ.
    """

    def __init__(self, directory: Path, model_type: str):
        self.directory, self.model_type = directory, model_type
        check_files(directory)
        values = _config_values(directory, model_type)
        self.checkpoint = Checkpoint(directory)
        self.config = _config(directory, model_type, values, len(self.checkpoint.tensors))
        self.notes = []
        if isinstance(self.config, GPT2Config) and (unused := ignored_by_gpt2(self.config)):
            self.notes.append(f"left out of config.json, since GPT-2 ignores it: {listed(unused)}")
        self.ours = _architecture(directory, values)
        self.model_class: type[PreTrainedModel] = self.ours.gpt2_class if model_type == "gpt2" else self.ours
        self.model = meta_model(self.model_class, self.config)
        self.names = self._match()
        dtypes = [self.checkpoint.tensors[name].dtype for name in self.names.values()]
        dtype = self.config.dtype or dtypes[0]
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ConversionError(
                f"{directory} has dtype {dtype} in its config.json, but weights are floats; correct it"
            )
        self.dtype = dtype

    def files(self) -> list[Path]:
        return [self.directory / "config.json", *self.checkpoint.paths]

    def _match(self) -> dict[str, str]:
        """The names in the files, by the names in the table."""
        prefix = PREFIXES[self.model_type]
        shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in self.model.state_dict().items()}
        tied = {
            second.removeprefix(prefix): first.removeprefix(prefix) for second, first in _tied_names(self.model).items()
        }
        names: dict[str, str] = {}
        left_behind: list[str] = []
        for name, tensor in self.checkpoint.tensors.items():
            bare, file = name.removeprefix(prefix), self.checkpoint.places[name].name
            if self.model_type == "gpt2" and any(pattern.search(bare) for pattern in _DROPPED):
                continue
            if self.ours.gpt2_class is GPT2LMHeadModel and name.startswith("v_head."):
                left_behind.append(name)
                continue
            if name == "lm_head.decoder.weight" and "lm_head.weight" in tied:  # of pytorch-pretrained-bert
                bare = "lm_head.weight"
            if bare in names:
                raise ConversionError(f"{file} holds {name!r}, which is the same tensor as {names[bare]!r}; keep one")
            if bare not in shapes:
                old = bare == "lm_head.decoder.weight"
                remedy = "rename it to 'lm_head.weight'" if old else self._about(name, shapes)
                raise ConversionError(
                    f"{file} holds the tensor {name!r}, which a {type(self.model).__name__} of this config.json does "
                    f"not have; {remedy}"
                )
            if tensor.shape != shapes[bare]:
                raise ConversionError(
                    f"{name!r} in {file} has shape {list(tensor.shape)}, but according to config.json it must "
                    f"be {list(shapes[bare])}; use weights and config of the same model"
                )
            names[bare] = name
        if left_behind:  # by trl, from training
            self.notes.append(
                f"left behind, since a {type(self.model).__name__} has no value head: {', '.join(left_behind[:9])}"
            )
        if missing := sorted(shapes.keys() - names.keys() - tied.keys()):
            raise ConversionError(
                f"{self.directory} lacks {some(missing)}, which config.json requires; use weights and config of the "
                "same model, and all shards"
            )
        for second, first in tied.items():
            if second in names and not same_bits(*(self.checkpoint.read(names[name]) for name in (first, second))):
                raise ConversionError(
                    f"{names[second]!r} is not equal to {names[first]!r}, to which config.json ties it; set "
                    "tie_word_embeddings to false if both are to be kept"
                )
            names.pop(second, None)
        return names

    def _about(self, name: str, shapes: Mapping[str, torch.Size]) -> str:
        """The remedy for an unknown name."""
        if any("lora_" in there for there in self.checkpoint.tensors):
            return (
                "it belongs to a model with LoRA adapters: merge them with model.merge_and_unload() and save the model "
                "that this returns"
            )
        for bare in sorted(shapes, key=len, reverse=True):
            for known in (PREFIXES[self.model_type] + bare, bare):
                if name.endswith(f".{known}"):
                    prefix = name.removesuffix(known)[:200]
                    return f"remove the prefix {prefix!r} from the names, with name.removeprefix({prefix!r})"
        return "use weights and config of the same model"

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self.names[name])

    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors under the table's names; reading one raises an error if a value is NaN or infinite."""
        stored = {name: self.checkpoint.tensors[inside] for name, inside in self.names.items()}
        return {name: LazyTensor(one.shape, one.dtype, partial(self.read, name)) for name, one in stored.items()}

    def in_our_names(self) -> dict[str, LazyTensor]:
        """The same under the book's names."""
        layout = (GPT2 if self.model_type == "gpt2" else NATIVE).layout
        return layout.to_scratch(self.tensors(), self.config.num_hidden_layers)


def _tied_names(model: PreTrainedModel) -> Mapping[str, str]:
    """The second name of each tied tensor, and its first."""
    return (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


def _config_values(directory: Path, model_type: str) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise ConversionError(f"{directory} has no config.json; give the directory of a whole checkpoint")
    values = read_json(path)
    found = model_type_of(values) if isinstance(values, dict) else None
    if found != model_type:
        other = {"gpt2": "convert", "gpt_scratch": "export"}.get(str(found))
        remedy = f"hf-gpt-scratch {other} converts such a model" if other else of_another_type(found)
        raise ConversionError(f"{directory} holds a model of type {found!r}, but {model_type!r} is expected; {remedy}")
    refuse_kernels(path, values)
    check_settings(path, values)
    labels = values.get("num_labels")
    if isinstance(labels, int) and labels > MAX_LABELS:
        raise ConversionError(
            f"{path} is not usable: num_labels={labels}, but the largest number is {MAX_LABELS}; correct it"
        )
    return values


def _config(directory: Path, model_type: str, values: dict[str, Any], tensors: int) -> GPT2Config | GPTScratchConfig:
    path = directory / "config.json"
    try:
        if model_type == "gpt2":
            official = GPT2Config.from_dict(values)
            GPTScratchConfig.from_gpt2(official)  # refuses what our model does not support
            config: GPT2Config | GPTScratchConfig = official
        else:
            config = GPTScratchConfig.from_dict(values)
    except Exception as error:  # wrong values make transformers raise errors of many types
        raise ConversionError(f"{path} is not usable: {error}; use the config.json that came with the weights") from (
            error
        )
    # A layer has at least 12 tensors, and takes some memory even without weights.
    if config.num_hidden_layers > min(tensors, MAX_LAYERS):
        raise ConversionError(
            f"{path} requires {config.num_hidden_layers} layers, but {directory} lacks them: it holds {tensors} "
            f"tensors in all, and at most {MAX_LAYERS} layers can be read; use weights and config of the same model"
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
    except Exception as error:  # sizes that overflow, unknown options of the heads, and others
        raise ConversionError(f"cannot build a {model_class.__name__} from its config: {error}; correct it") from error


def write_model(
    model: PreTrainedModel,
    tensors: Mapping[str, LazyTensor],
    directory: Path,
    max_shard_size: int | str,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Writes a model like its `save_pretrained`, with one tensor in memory at a time.

    Args:
        model: an official one or ours, on the meta device.
        tensors: its weights, under the table's official names or ours, like the model's.

    Returns:
        sha256 and size of the files with the weights.
    """
    try:
        model.save_pretrained(directory, state_dict={})  # config, generation config and code, but no weights
    except OSError:
        raise
    except Exception as error:  # wrong settings raise errors of many types
        raise ConversionError(f"the model's settings cannot be saved: {error}; correct them") from error
    prefix = PREFIXES[model.config.model_type]
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
        sha256 = write_safetensors(directory / file, {name: lazies[name] for name in names}, progress)
        hashes[file] = {"sha256": sha256, "bytes": (directory / file).stat().st_size}
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return hashes
