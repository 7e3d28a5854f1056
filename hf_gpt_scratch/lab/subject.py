"""Models to compare: official, ours or a class of your own, each with its parameters in the book's names.

Shapes: E emb_dim, I n_inner, V vocabulary, C context_length.
"""

import copy
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
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
from ..model.book_cfg import SIZES
from ..model.book_files import bare, weights_in
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.modeling_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel, GPTScratchPreTrainedModel
from ..model.weight_map import BASE, GPT2_PREFIX, HEADS, SCRATCH_PREFIX, Row, rows
from ..weights.architecture import architecture, kind_of
from ..weights.checkpoint import check_files, read_json, read_pickle, refuse_special_file
from ..weights.formats.directory import Weights
from ..weights.hub import find_source
from ..weights.tensors import LazyTensor, to_scratch
from ..weights.torch_archive import Stored
from .building import (
    Settings,
    book_settings,
    build,
    concept,
    defaults_of,
    import_file,
    public_model,
    read_cfg,
    values_of,
)
from .calling import own_caller
from .held import Held, unstacked
from .pairing import Folded, Match, joined, match_parameters, parameters, part_of
from .usage import uses


@dataclass
class Subject:
    """A model and what is known about it.

    `config` is None if only the model's own code knows it; `guessed` is whether `matches` were guessed. `kind` is our
    corresponding class; a class of your own counts as a language model. `tensors` are those in a checkpoint's files, by
    the book's names, in the files' dtype. `extras` are the parameters that GPT-2 does not have, `vocab_size` the tokens
    that are compared, where the model may have more, `positions` those that are, where one of the two has fewer than
    the other. `call` runs a model that needs more than the tokens.
    """

    name: str
    module: nn.Module
    matches: list[Match]
    config: GPTScratchConfig | None = None
    guessed: bool = False
    notes: list[str] = field(default_factory=list)
    kind: type[GPTScratchPreTrainedModel] = GPTScratchForCausalLM
    tensors: Mapping[str, LazyTensor] | None = None
    extras: list[str] = field(default_factory=list)
    vocab_size: int | None = None
    positions: int | None = None
    call: Callable[[torch.Tensor], Any] | None = None

    @property
    def blocks(self) -> set[str]:
        """The numbers of the blocks."""
        names = (match.row.ours[0].split(".") for match in self.matches)
        return {parts[1] for parts in names if parts[0] == "trf_blocks"}

    @property
    def shared(self) -> list[int]:
        """The blocks that share a parameter with another, because they are one object."""
        own, places = parameters(self.module), dict[int, set[int]]()
        for match in self.matches:
            if number := re.match(r"trf_blocks\.(\d+)", match.row.ours[0]):
                places.setdefault(id(own[match.row.theirs]), set()).add(int(number[1]))
        return sorted({n for found in places.values() if len(found) > 1 for n in found})

    def run(self, input_ids: torch.Tensor) -> Any:
        """What the model returns for token ids (B, T)."""
        return self.module(input_ids) if self.call is None else self.call(input_ids)

    @property
    def is_language_model(self) -> bool:
        return self.kind is GPTScratchForCausalLM

    def in_book_names(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Parameters or gradients by this model's names, as views by the book's names and in its layout."""
        ours: dict[str, torch.Tensor] = {}
        for match in self.matches:
            if match.row.theirs in tensors:
                ours.update(zip(match.row.ours, match.row.to_ours(tensors[match.row.theirs]), strict=True))
        ours = joined(ours, dim=0)
        if self.positions and "pos_emb.weight" in ours:
            ours["pos_emb.weight"] = ours["pos_emb.weight"][: self.positions]
        return ours

    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters in the book's names and layout; a tied head appears under both names."""
        return self.in_book_names({name: p.detach() for name, p in parameters(self.module).items()})


def subject(
    module: nn.Module,
    config: GPTScratchConfig | None = None,
    name: str = "",
    mapping: Mapping[str, str | None] | None = None,
    my_forward: Callable[..., Any] | None = None,
) -> Subject:
    """A model in memory; its mode and weights are not changed.

    Args:
        config: the sizes of a class of your own; official models and ours have a config.
        mapping: your names -> the book's or GPT-2's, where the guess is wrong.
        my_forward: a function of a model of your own and token ids (B, T), instead of the model itself.

    Raises:
        LabError: the parameters cannot be paired unambiguously; the message names them.
    """
    name = name or type(module).__name__
    kind = kind_of(module)
    if kind is not None:
        matches, config = known_matches(module, kind)
        if not mapping and my_forward is None and {match.row.theirs for match in matches} == parameters(module).keys():
            return Subject(name, module, matches, config, kind=kind)
    if config is None:
        raise LabError(f"the sizes of {name} are unknown; give its cfg")
    notes: list[str] = []
    call = own_caller(module, name, notes, my_forward)
    used = uses(module, call, few_tokens(config)) if not mapping or len(mapping) < len(parameters(module)) else {}
    try:
        matches = match_parameters(module, config, mapping or {}, used)
    except LabError as error:
        raise LabError(f"{error}{'' if used else not_run(call, few_tokens(config))}") from error
    result = Subject(
        name,
        module,
        matches,
        config,
        guessed=True,
        kind=kind or GPTScratchForCausalLM,
        notes=notes,
        vocab_size=config.vocab_size,
        call=call,
    )
    matched = {match.row.theirs for match in matches}
    result.extras = [name for name in parameters(module) if name not in matched]
    if result.extras:
        notes.append(f"{name} has parameters that GPT-2 does not have: {few(result.extras, 6)}")
    for match in matches:
        size = rows_of(match, parameters(module)[match.row.theirs])
        if match.row.ours[0] in ("tok_emb.weight", "out_head.weight") and size > config.vocab_size:
            notes.append(
                f"{match.row.theirs} has {size} rows, {size - config.vocab_size} more than the vocabulary, which are "
                "not compared"
            )
        elif match.row.ours[0] == "pos_emb.weight" and size != config.context_length:
            notes.append(
                f"{match.row.theirs} has {size} positions instead of {config.context_length}; only those that both "
                "models have are compared"
            )
    return result


def not_run(call: Callable[[torch.Tensor], Any], input_ids: torch.Tensor) -> str:
    """Why a model does not run, if it does not, so that nothing is known of how it uses its parameters."""
    try:
        with torch.no_grad():
            call(input_ids)
    except Exception as error:  # whatever the user's class raises
        return (
            f". It does not run on tokens of shape {tuple(input_ids.shape)}, which would tell what they are: "
            f"{type(error).__name__}: {error}. Was one of its sizes misunderstood? Write a function without arguments "
            "that returns the model, and name that, with --weights reference"
        )
    return ""


def rows_of(match: Match, parameter: torch.Tensor) -> int:
    """The rows of a match's matrix in the book's layout, padding included."""
    row = match.row
    plain = [size for size in parameter.shape if size != 1] or [1]
    return plain[row.order[0]] if isinstance(row, Folded) else len(parameter)


def few_tokens(config: GPTScratchConfig) -> torch.Tensor:
    """Some token ids (1, T) that are no positions, for looking at how a model uses its parameters.

    T is no other size, if the context allows it, so that the dimensions of the scores are known by it.
    """
    others = (config.n_heads, config.emb_dim, config.emb_dim // config.n_heads, config.n_inner, 1)
    length = next((n for n in (5, 7, 11, 13, 17, 19) if n not in others), 5)
    length = min(length, config.context_length)
    ids = torch.arange(config.vocab_size - 1, -1, -1)
    return ids.repeat(1 + length // len(ids))[:length].unsqueeze(0)


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


# The weights of a class or function: those of the other model.
REFERENCE = Path("reference")


def names_a_class(source: Any) -> bool:
    """Whether a source is code: a class, function or model, or `file.py:Name`; no hub id has a colon."""
    return not isinstance(source, str) or bool(re.fullmatch(r".+:[\w.]+", source))


def load(
    source: Any,
    *,
    weights: Path | None = None,
    cfg: Any = None,
    mapping: Mapping[str, str | None] | None = None,
    forward: str | Callable[..., Any] | None = None,
    like: Subject | None = None,
) -> Subject:
    """A model to compare, in float32 and evaluation mode; one in memory keeps its mode.

    Args:
        source: directory or hub id of an official checkpoint or one of ours, or `file.py:Name` of a class, a function
            that makes a model, or a model, or one of these itself. That file is executed; it may be a notebook.
        weights: a state dict, `.pth` or `.safetensors`; `REFERENCE` for the weights of `like`.
        cfg: a config: JSON, a JSON file, the name of one in its file, or a mapping. Default: the sizes of `like`.
        mapping: your parameter names -> the book's or GPT-2's, where the guess is wrong.
        forward: a function of the model and token ids (B, T) that returns logits, or its name in the file.
        like: the other model, whose weights a class without `weights` gets.

    Raises:
        LabError: it cannot be loaded, or its parameters cannot be paired.
    """
    if names_a_class(source):
        return load_code(source, weights, cfg, mapping or {}, forward, like)
    if weights or cfg or mapping or forward:
        raise LabError(
            f"weights, cfg, map and forward are for a class of your own, file.py:Name, but this is {source!r}"
        )
    if source.endswith((".py", ".ipynb")):
        raise LabError(f"got {source}, but a file can contain several models; name one of them, {source}:Name")
    if Path(source).is_file():
        beside = Path(source).with_name("config.json").is_file()
        remedy = (
            "give the directory that it is in" if beside else f"hf-gpt-scratch convert {source} DIRECTORY makes one"
        )
        raise LabError(
            f"got the file {source}, but a model is a directory or a class; {remedy}, or give the class with these "
            f"weights, file.py:Name and --weights {source}"
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
        raise LabError(
            f"{name} {what}; the lab compares gpt2 and gpt_scratch checkpoints, and classes, my.py:MyModel, with the "
            f"weights of such a directory by --weights {name}"
        )
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


def load_code(
    source: Any,
    weights: Path | None,
    cfg: Any,
    mapping: Mapping[str, str | None],
    forward: str | Callable[..., Any] | None,
    like: Subject | None,
) -> Subject:
    """A model from your code. A model, and what a function returns, keeps its weights unless `weights` are given."""
    if isinstance(source, str):
        file, _, attribute = source.rpartition(":")
        module: ModuleType | None = import_file(file, attribute)
        made, name = public_model(module, attribute, file), source
    else:
        file, made = "your code", source
        name = getattr(source, "__name__", type(source).__name__)
        home = getattr(made, "__module__", "")
        module = sys.modules.get(home, ModuleType(home))
    is_class = isinstance(made, type)
    if is_class and issubclass(made, PreTrainedModel):
        return load_own_checkpoint(name, made, weights, cfg, mapping)
    if weights is not None and weights.is_dir():
        raise LabError(
            f"--weights {weights} is a directory, which only Transformers classes load; give {name}'s model.pth or "
            ".safetensors"
        )
    if isinstance(forward, str):
        forward = public_model(module, forward, file) if module else None
    notes: list[str] = []
    ready = isinstance(made, nn.Module)
    kind = kind_of(made) if ready else None
    if kind is not None and cfg is None:  # knows its sizes
        _, config = known_matches(made, kind)
    else:
        config, model_of = configured(made, module, cfg, like, name, notes)
    makes = isinstance(made, type | partial) or inspect.isroutine(made)
    model = made if ready else model_of() if makes else Held(copy.deepcopy(made))
    elsewhere = ready and any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters())
    if not is_class and not isinstance(model, Held) and (weights is not None or elsewhere):
        model = copy.deepcopy(model).to("cpu", torch.float32)  # the caller's own stays as it is
        if elsewhere:
            notes.append(f"{name} is compared as a copy on the CPU in float32")
    if weights is not None and weights != REFERENCE:
        model.load_state_dict(read_weights(weights, model))
        notes.append(f"weights: {weights}")
    model, apart = unstacked(model, config.n_layers)
    if apart:
        notes.append(f"{few(apart, 4)} hold all layers in one tensor each, of which each layer is compared by itself")
    own = forward if callable(forward) else None
    # A function gets what computes, not the module around it.
    run = (lambda held, input_ids: own(held.made, input_ids)) if own and isinstance(model, Held) else own
    result = subject(model, config, name, mapping, run)
    result.notes = notes + result.notes
    if result.guessed and cfg is None:
        result.config = None
    if weights == REFERENCE or (is_class and weights is None):
        if like is None:
            raise LabError(
                f"{name} is a class, and has no weights of its own, so the first model must be a checkpoint: "
                "convert a model.pth, or give the checkpoint first"
            )
        result.notes += copy_weights(like, result)
    elif like is not None and weights is None:
        what = "is a model" if ready or not makes else "returns a model"
        result.notes.append(
            f"{name} {what}, which is judged with its own weights; --weights reference gives it the other model's, to "
            "test its forward pass alone"
        )
    if not ready:
        model.float().eval()
    return result


def configured(
    made: Any, module: ModuleType | None, cfg: Any, like: Subject | None, name: str, notes: list[str]
) -> tuple[GPTScratchConfig, Callable[[], nn.Module]]:
    """The sizes of a class, function or model, and the call that builds it. Sizes that a cfg lacks are the other's."""
    config, settings, given = settings_for(made, module, cfg, like, name, notes)
    return config, lambda: build(made, settings, name, module, given)


def settings_for(
    made: Any, module: ModuleType | None, cfg: Any, like: Subject | None, name: str, notes: list[str]
) -> tuple[GPTScratchConfig, Settings, Any]:
    """The sizes of a class, function or model; the settings to build it with; and the config that was given, if any."""
    given = read_cfg(cfg, module)
    base = book_settings(like.config) if like is not None and like.config is not None else Settings()
    base.defaults = defaults_of(module)
    if given is None:
        if not base:
            raise LabError(f"{name} needs a cfg: JSON, a JSON file, or the name of a config in its file")
        if not isinstance(made, nn.Module):
            values = {size: base[size] for size in SIZES}
            notes.append(f"no cfg given; using the other model's: {json.dumps(values)}, qkv_bias {base.qkv_bias}")
        settings = base
    else:
        own = values_of(given)
        meant = {size: value for key, value in own.items() if (size := concept(key))}
        if "emb_dim" in meant or "n_heads" in meant:  # what follows from them
            for size in ("n_inner", "head_dim"):
                dict.pop(base, size, None)
        kept = {key: value for key, value in base.items() if (concept(key) or key) not in meant}
        settings = Settings({**kept, **meant, **own})
        settings.defaults = base.defaults
        for inner in settings.values():
            if isinstance(inner, Settings):  # what an inner config lacks, the outer has
                inner.defaults = settings
    config = sizes(settings, name)
    if given is not None:
        settings.setdefault("n_inner", config.n_inner or 4 * config.emb_dim)
        settings.setdefault("head_dim", config.emb_dim // config.n_heads)
        for key, value in (("device", "cpu"), ("model_type", None), ("drop_rate", config.drop_rate)):
            settings.setdefault(key, value)
    return config, settings, given


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


def sizes(settings: Settings, source: str) -> GPTScratchConfig:
    """The sizes in a cfg, under the book's names, GPT-2's or nanoGPT's."""
    wanted = (*SIZES, "drop_rate", "n_inner", "qkv_bias", "layer_norm_epsilon")
    values = {name: settings[name] for name in wanted if settings.knows(name)}
    missing = set(SIZES) - values.keys()
    if missing:
        raise LabError(
            f"the cfg of {source} lacks {', '.join(sorted(missing))}; add them, in the book's names or GPT-2's"
        )
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
def copy_weights(source: Subject, target: Subject) -> list[str]:
    """Copies the source's weights into the target, by both pairings; what was done to the target, in words.

    Biases that the source lacks become zeros, which GPT-2's checkpoints have there. What the source has nothing like
    becomes random, so that its effect shows.
    """
    ours, own = source.weights(), parameters(target.module)
    generator = torch.Generator().manual_seed(0)
    zeroed = []
    for match in target.matches:
        tensors = [part_of(ours, name) for name in match.row.ours]
        found = [tensor for tensor in tensors if tensor is not None]
        mine = own[match.row.theirs]
        if len(found) < len(tensors):
            zeroed.append(match.row.theirs)
            mine.zero_()
            continue
        values = match.row.to_theirs(found)
        if values.shape != mine.shape:  # a padded vocabulary, or another number of positions
            mine.normal_(0, 0.5, generator=generator)
            common = tuple(slice(0, min(sizes)) for sizes in zip(mine.shape, values.shape, strict=True))
            mine[common] = values[common].to(mine.dtype)
        else:
            mine.copy_(values)
    for name in target.extras:
        if own[name].is_floating_point() and own[name].requires_grad:  # others are constants, such as a mask
            own[name].normal_(0, 0.5, generator=generator)
    changed = f"the other model's weights were copied into {len(target.matches)} parameters of {target.name}"
    notes = [f"{changed}, by the pairing, so that its forward pass alone is tested"]
    if zeroed:
        notes.append(f"{few(zeroed, 4)}: set to zero, since the other model has no such bias")
    return notes
