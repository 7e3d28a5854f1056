"""Models to compare: official, ours or a class of your own, each with its parameters in the book's names.

Shapes: E emb_dim, I n_inner, V vocabulary, C context_length.
"""

import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConversionError, LabError, few
from ..model.book_files import bare, weights_in
from ..model.configuration_gpt_scratch import SIZES, TO_GPT2, GPTScratchConfig
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel, GPTScratchPreTrainedModel
from ..model.weight_map import BASE, GPT2_PREFIX, HEADS, SCRATCH_PREFIX, Row, rows
from ..weights.architecture import architecture, kind_of
from ..weights.checkpoint import check_files, read_json, read_pickle, refuse_special_file
from ..weights.formats.directory import Weights
from ..weights.hub import find_source
from ..weights.tensors import LazyTensor, to_scratch
from ..weights.torch_archive import Stored
from .pairing import Match, match_parameters, parameters


@dataclass
class Subject:
    """A model and what is known about it.

    `config` is None if only the model's own code knows it; `guessed` is whether `matches` were guessed. `kind` is our
    corresponding class; a class of your own counts as a language model. `tensors` are those in a checkpoint's files, by
    the book's names, in the files' dtype.
    """

    name: str
    module: nn.Module
    matches: list[Match]
    config: GPTScratchConfig | None = None
    guessed: bool = False
    notes: list[str] = field(default_factory=list)
    kind: type[GPTScratchPreTrainedModel] = GPTScratchForCausalLM
    tensors: Mapping[str, LazyTensor] | None = None

    @property
    def is_language_model(self) -> bool:
        return self.kind is GPTScratchForCausalLM

    def in_book_names(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters or gradients by this model's names, as views by the book's names and in its layout."""
        ours: dict[str, torch.Tensor] = {}
        for match in self.matches:
            if match.row.theirs in tensors:
                ours.update(zip(match.row.ours, match.row.to_ours(tensors[match.row.theirs]), strict=True))
        return ours

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters in the book's names and layout; a tied head appears under both names."""
        return self.in_book_names({name: p.detach() for name, p in parameters(self.module).items()})


def subject(module: nn.Module, config: GPTScratchConfig | None = None, name: str = "", mapping=None) -> Subject:
    """A model in memory; its mode and weights are not changed.

    Args:
        config: the sizes of a class of your own; official models and ours have a config.
        mapping: your names -> the book's or GPT-2's, where the guess is wrong.

    Raises:
        LabError: the parameters cannot be paired unambiguously; the message names them.
    """
    name = name or type(module).__name__
    kind = kind_of(module)
    if kind is not None:
        matches, config = known_matches(module, kind)
        if not mapping and {match.row.theirs for match in matches} == parameters(module).keys():
            return Subject(name, module, matches, config, kind=kind)
    if config is None:
        raise LabError(f"the sizes of {name} are unknown; give its cfg")
    matches = match_parameters(module, config, mapping or {})
    return Subject(name, module, matches, config, guessed=True, kind=kind or GPTScratchForCausalLM)


def known_matches(module: Any, kind: type[GPTScratchPreTrainedModel]) -> tuple[list[Match], GPTScratchConfig]:
    """The matches of an official model or one of ours, by the weight map, and its config."""
    official = isinstance(module, kind.gpt2_class)
    config = GPTScratchConfig.from_gpt2(module.config) if official else module.config
    prefix = "" if kind is GPTScratchModel else GPT2_PREFIX if official else SCRATCH_PREFIX
    own, matches = parameters(module), []
    for where, part in ((prefix, BASE), ("", HEADS)):
        table = part if official else [Row(ours, (ours,), False, row.meaning) for row in part for ours in row.ours]
        for row in rows(config.n_layers, table):
            if where + row.theirs in own:
                matches.append(Match(replace(row, theirs=where + row.theirs), 1.0, "weight map"))
    return matches, config


# Loading


class Settings(dict):
    """A config with the book's access, `cfg["emb_dim"]`, and nanoGPT's, `config.n_embd`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the cfg has no {name!r}; add it with --cfg") from None


def book_settings(config: GPTScratchConfig) -> Settings:
    """The config under the book's names, GPT-2's and nanoGPT's."""
    values = {name: getattr(config, name) for name in SIZES}
    theirs = {TO_GPT2.get(name, name): value for name, value in values.items()}
    others = {"block_size": config.context_length, "dropout": config.drop_rate, "bias": True}
    return Settings(values | theirs | others, drop_rate=config.drop_rate, qkv_bias=config.qkv_bias)


def names_a_class(source: str) -> bool:
    """Whether a source is `file.py:Name` or `package.module:Name`; no hub id has a colon."""
    return bool(re.fullmatch(r".+:\w+", source))


def load(
    source: str,
    *,
    weights: Path | None = None,
    cfg: str | None = None,
    mapping: Mapping[str, str | None] | None = None,
    like: Subject | None = None,
) -> Subject:
    """A model to compare, in float32 and evaluation mode.

    Args:
        source: directory or hub id of an official checkpoint or one of ours, or `file.py:Name` of a class, a function
            that makes a model, or a model. That file is executed.
        weights: a class's state dict, `.pth` or `.safetensors`.
        cfg: a class's config: JSON, a JSON file, or the name of a dict in its file. Default: the sizes of `like`.
        mapping: your parameter names -> the book's or GPT-2's, where the guess is wrong.
        like: the other model, whose weights a class without `weights` gets.

    Raises:
        LabError: it cannot be loaded, or its parameters cannot be paired.
    """
    if names_a_class(source):
        file, _, attribute = source.rpartition(":")
        return load_class(source, file, attribute, weights, cfg, mapping or {}, like)
    if weights or cfg or mapping:
        raise LabError(f"weights, cfg and map are for a class of your own, file.py:Name, but this is {source!r}")
    if source.endswith(".py"):
        raise LabError(f"got {source}, but a file can contain several models; name one of them, {source}:Name")
    if Path(source).is_file():
        raise LabError(
            f"got the file {source}, but a model is a directory or a class; give the directory that it is in, or the "
            f"class with these weights, file.py:Name and --weights {source}"
        )
    try:
        return load_checkpoint(find_source(source), source)
    except (ConversionError, OSError, SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        # A config.json can contain anything, and transformers can fail on it in as many ways.
        raise LabError(f"cannot load {source}: {error}") from error
    except StrictDataclassError as error:
        raise LabError(f"the config of {source} is unusable: {error}") from error


def load_checkpoint(directory: Path, name: str) -> Subject:
    """The model in a directory, of the class that its config names."""
    path = directory / "config.json"
    found = read_json(path) if path.is_file() else None
    values = found if isinstance(found, dict) else {}
    model_type = values.get("model_type")
    if model_type not in ("gpt2", "gpt_scratch"):
        what = f"contains a model of type {model_type!r}" if path.is_file() else "has no config.json"
        raise LabError(f"{name} {what}; the lab compares gpt2 and gpt_scratch checkpoints, and classes, my.py:MyModel")
    quantized = "quantization_config" in values
    weights = None if quantized else Weights(directory, model_type)
    if quantized:
        check_pickles(directory)
    kind = weights.ours if weights else architecture(values, directory)
    model_class: Any = kind.gpt2_class if model_type == "gpt2" else kind
    model, info = model_class.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    check_loaded(info, name)
    model.config.return_dict = True
    result = subject(model.eval(), name=name)
    if weights:
        result.tensors = raw_tensors(weights)
    else:
        result.notes.append(f"{name} is quantized, so its weights are not compared bit for bit")
    return result


def check_pickles(directory: Path) -> None:
    """Checks pickled weights before transformers loads them.

    Raises:
        ConversionError: one is damaged, or contains more than weights.
    """
    check_files(directory)
    for path in sorted(directory.glob("*.bin")):
        read_pickle(path)


def raw_tensors(weights: Weights) -> dict[str, LazyTensor]:
    """A checkpoint's tensors by the book's names; NaN is allowed here, because the lab looks for it."""
    tensors = {name: weights.checkpoint.tensors[there] for name, there in weights.names.items()}
    return to_scratch(tensors, rows(weights.config.num_hidden_layers)) if weights.model_type == "gpt2" else tensors


def check_loaded(info: Mapping[str, Any], source: str) -> None:
    """Raises LabError unless a model uses all weights of its checkpoint and lacks none."""
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, info[f"{what}_keys"])):
            raise LabError(f"{source} does not fit its class: {what} {few(names, 5)}; download or save it again")


def load_class(
    source: str,
    file: str,
    attribute: str,
    weights: Path | None,
    cfg: str | None,
    mapping: Mapping[str, str | None],
    like: Subject | None,
) -> Subject:
    """A model from a Python file. An instance keeps its mode, and its weights unless `weights` are given."""
    module = import_file(file)
    made = public_model(module, attribute, file)
    if isinstance(made, type) and issubclass(made, PreTrainedModel):
        return load_own_checkpoint(source, made, weights, cfg, mapping)
    if weights is not None and weights.is_dir():
        raise LabError(
            f"--weights {weights} is a directory, which only Transformers classes load; give {source}'s model.pth or "
            ".safetensors"
        )
    ready, notes = isinstance(made, nn.Module), []
    settings = read_cfg(cfg, module)
    if settings is None:
        if like is None or like.config is None:
            raise LabError(f"{source} needs a cfg: JSON, a JSON file, or the name of a dict in {file}")
        settings = book_settings(like.config)
        if not ready:
            values = {name: settings[name] for name in SIZES}
            notes.append(f"no cfg given; using the other model's: {json.dumps(values)}, qkv_bias {settings.qkv_bias}")
    config = sizes(settings, source)
    model = made if ready else build(made, settings, source)
    result = subject(model, config, source, mapping)
    if result.guessed:
        result.config = config if cfg is not None else None
    result.notes = notes
    if weights is not None:
        model.load_state_dict(read_weights(weights, model))
        notes.append(f"weights: {weights}")
    elif not ready:
        if like is None:
            raise LabError(
                f"{source} is a class, and has no weights of its own, so the first model must be a checkpoint: "
                "convert a model.pth, or give the checkpoint first"
            )
        copy_weights(like, result)
        notes.append("no weights given; using the other model's, through the mapping")
    if not ready:
        model.float().eval()
    return result


def public_model(module: ModuleType, attribute: str, file: str) -> Any:
    """The class, function or model of this name.

    Raises:
        LabError: there is none; the message names the file's classes.
    """
    made = getattr(module, attribute, None)
    if made is None:
        models = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)]
        raise LabError(f"{file} has no {attribute!r}; its models are {', '.join(models) or 'none'}")
    return made


def load_own_checkpoint(source, made: Any, weights: Path | None, cfg, mapping) -> Subject:
    """A Transformers class of your own, loaded from the directory that its `save_pretrained` wrote."""
    if weights is None or not weights.is_dir() or cfg is not None:
        raise LabError(
            f"{source} is a Transformers class: it is loaded by its from_pretrained; give the directory that its "
            "save_pretrained wrote with --weights, and no --cfg"
        )
    try:
        model, info = made.from_pretrained(weights, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # whatever the user's class raises
        raise LabError(f"{source} cannot be loaded from {weights}: {type(error).__name__}: {error}") from error
    check_loaded(info, str(weights))
    result = subject(model.eval(), name=source, mapping=mapping)
    result.notes.append(f"weights: {weights}")
    return result


def import_file(file: str) -> ModuleType:
    """Executes a Python file, or imports a module by its dotted name."""
    path = Path(file).expanduser()
    try:
        if path.suffix != ".py":
            return importlib.import_module(file)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise LabError(f"there is no file {file}; check the path")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent.resolve()))  # its own imports
        try:
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
        finally:
            sys.path.pop(0)
        return module
    except LabError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file raises
        raise LabError(f"{file} does not run: {type(error).__name__}: {error}") from error


def read_cfg(cfg: str | None, module: ModuleType) -> Settings | None:
    if cfg is None:
        return None
    if isinstance(named := getattr(module, cfg, None), dict):
        return Settings(named)
    if cfg.endswith(".json") and not Path(cfg).is_file():
        raise LabError(f"there is no file {cfg}; check the path")
    try:
        values = json.loads(Path(cfg).read_text(encoding="utf-8") if not cfg.lstrip().startswith("{") else cfg)
        return Settings(**values)
    except (OSError, ValueError, TypeError) as error:
        raise LabError(
            f"got cfg {cfg!r}, which is neither JSON, nor a JSON file, nor a dict in your file ({error})"
        ) from error


def build(make: Callable[..., nn.Module], settings: Settings, source: str) -> nn.Module:
    """The model: `make(cfg)` if its one required argument is not a setting, else with the settings it names."""
    if not callable(make):
        raise LabError(f"{source} is a {type(make).__name__}; name a model, a class or a function that returns one")
    accepted = inspect.signature(make).parameters
    required = [p.name for p in accepted.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    try:
        if len(required) == 1 and required[0] not in settings:
            model = make(settings)
        else:
            model = make(**{name: settings[name] for name in accepted if name in settings})
    except Exception as error:  # whatever the class raises
        raise LabError(f"{source} cannot be built: {type(error).__name__}: {error}; see --cfg") from error
    if not isinstance(model, nn.Module):
        raise LabError(f"{source} returns a {type(model).__name__}, not a torch.nn.Module; name one that does")
    return model


def sizes(settings: Settings, source: str) -> GPTScratchConfig:
    """The sizes in a cfg, under the book's names, GPT-2's or nanoGPT's."""
    aliases = {"context_length": "block_size", "drop_rate": "dropout"}
    values: dict[str, Any] = {}
    for name in (*SIZES, "drop_rate", "n_inner", "qkv_bias"):
        for known in (name, TO_GPT2.get(name), aliases.get(name)):
            if known in settings:
                values.setdefault(name, settings[known])
    missing = set(SIZES) - values.keys()
    if missing:
        raise LabError(f"the cfg of {source} lacks {', '.join(sorted(missing))}, in the book's names or GPT-2's")
    try:
        return GPTScratchConfig(bos_token_id=None, eos_token_id=None, **values)
    except StrictDataclassError as error:
        raise LabError(f"the cfg of {source} is unusable: {error}") from error


def read_weights(file: Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict that fits the model.

    Raises:
        LabError: it cannot be read, or does not fit; the message names the tensors.
    """
    if not file.exists():
        raise LabError(f"there is no file {file} to read weights from; check the path")
    try:
        values = read_state_dict(file)
        if not values.keys() & parameters(model).keys():  # with the prefix of torch.compile or DataParallel, then
            names = bare(values)
            values = {names[name]: tensor for name, tensor in values.items()}
    except ConversionError as error:
        raise LabError(f"cannot read weights: {error}") from error
    except Exception as error:  # OSError, SafetensorError, …: whatever a damaged file causes
        raise LabError(f"cannot read weights from {file}: {type(error).__name__}: {error}") from error
    own = model.state_dict()
    wrong = misfits(values, own, parameters(model))
    if wrong:
        raise LabError(f"{file} does not fit the model: {'; '.join(wrong[:6])}; check --cfg and --weights")
    return {name: values.get(name, tensor) for name, tensor in own.items()}


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """A file's state dict, alone or in a training checkpoint.

    Raises:
        TypeError: it contains something else.
        Exception: whatever a damaged file causes.
    """
    refuse_special_file(file)
    values: Any = load_file(file) if file.suffix == ".safetensors" else read_pickle(file)
    if not isinstance(values, Mapping):
        raise TypeError(f"it contains a {type(values).__name__}, not a state dict; save model.state_dict()")
    _, values = weights_in(values)
    for name, value in values.items():
        if not isinstance(value, torch.Tensor | Stored):
            raise TypeError(f"{name!r} is not a tensor, but a state dict has only tensors; save model.state_dict()")
    return {str(name): value.read() if isinstance(value, Stored) else value for name, value in values.items()}


def misfits(values: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], needed: Collection[str]) -> list[str]:
    """Why a state dict does not fit a model with the state dict `own`; extra masks and missing buffers are fine."""
    wrong = [f"missing {name}" for name in own if name in needed and name not in values]
    wrong += [f"unexpected {name}" for name in values.keys() - own.keys() if not name.endswith(("mask", "attn.bias"))]
    wrong += [
        f"{name}: {tuple(values[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & values.keys()
        if values[name].shape != own[name].shape
    ]
    return sorted(wrong)


@torch.no_grad()
def copy_weights(source: Subject, target: Subject) -> None:
    """Copies the source's weights into the target, by both pairings; biases that the source lacks become zeros."""
    ours, own = source.weights(), parameters(target.module)
    for match in target.matches:
        tensors = [ours.get(name) for name in match.row.ours]
        if any(tensor is None for tensor in tensors):
            own[match.row.theirs].zero_()
        else:
            own[match.row.theirs].copy_(match.row.to_theirs([tensor for tensor in tensors if tensor is not None]))
