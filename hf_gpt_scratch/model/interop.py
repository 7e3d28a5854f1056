"""Translation in memory from the book's model, and from and to the official one, with checks that nothing changes.

A translation consists of weights and a config. So before a model is translated or saved, its modules must be those that
its config describes, and the outputs of a translated model are compared with its own.
"""

import copy
import inspect
import os
import re
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2PreTrainedModel, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.utils import logging

from .book_cfg import SIZES
from .book_files import BARE, MASK, bare, bare_matrices, has_adapters, heads_in_a_list, parts, shared, weights_in
from .compat import few
from .configuration_gpt_scratch import GPTScratchConfig
from .layers import refuse_other_mask
from .own_code import bring_package, refuse_own_files
from .weight_map import DROPPED_PATTERNS, conversions, to_gpt2_state_dict

logger = logging.get_logger(__name__)


def register_conversions(model_type: str = GPTScratchConfig.model_type) -> None:
    """Makes transformers' own loader read official GPT-2 checkpoints by our table."""
    register_checkpoint_conversion_mapping(model_type, conversions(), overwrite=True)


_model_types: list[str] = []
_for_each_type: list[Callable[[str], None]] = [register_conversions]


def for_each_type(register: Callable[[str], None]) -> None:
    """Calls `register` with the model type of each class, and later with those of classes to come."""
    _for_each_type.append(register)
    for model_type in _model_types:
        register(model_type)


class Interop(PreTrainedModel):
    """Translation from and to the book and GPT-2; `save_pretrained` refuses what would load as another model."""

    config_class: type[GPTScratchConfig]
    gpt2_class: type[GPT2PreTrainedModel]  # the official model of the same kind

    # The last are the mask buffers in the book's state dicts.
    _keys_to_ignore_on_load_unexpected = [*DROPPED_PATTERNS, r"\.att\.mask$"]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # A class with a model type of its own loads official checkpoints, too, and takes PEFT's adapters.
        model_type = cls.config_class.model_type
        if model_type not in _model_types:
            _model_types.append(model_type)
            for register in _for_each_type:
                register(model_type)

    @classmethod
    def kinds(cls) -> "tuple[type[Interop], ...]":
        """The classes that compute the same as their official ones."""
        raise NotImplementedError

    def save_pretrained(self, save_directory: str | os.PathLike, *, save_original_format: bool = False, **kwargs):  # type: ignore[override]  # as the models do
        """Refuses what would load as another model, and makes what is saved independent of this package."""
        _refuse_file(save_directory)
        if save_original_format:
            _refuse_quantized(self)
        _refuse_to_save_other_code(self)
        refuse_own_files(self, save_directory, bool(kwargs.get("push_to_hub")))
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)
        if kwargs.get("is_main_process", True):
            bring_package(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Reads official checkpoints, too, by the weight map."""
        # For a subclass's model type; and again, as a second copy of this module may have been loaded meanwhile.
        register_conversions(cls.config_class.model_type)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def from_book(
        cls,
        source: str | os.PathLike | Mapping[str, Any] | nn.Module,
        cfg: dict | GPTScratchConfig | None = None,
        *,
        n_heads: int | None = None,
        lora_scale: float | None = None,
    ) -> Self:
        """A copy of the book's `GPTModel` as a Transformers model, in evaluation mode.

        Also of `GPTModelFast`, of models whose attention has its heads in a list, one layer for query, key and value or
        bare matrices, and of those with the adapters of appendix E. `GPTScratchForSequenceClassification` reads
        chapter 6's classifier. A model in memory is run beside its copy.

        If `out_head` and `tok_emb` share their memory, as in a model that was tied, so do those of the copy.

        Args:
            source: a file of `torch.save` or safetensors, what `torch.load` gives of it, a state dict, or the model.
            cfg: the dict or config that it was built with. None: the sizes are those of the tensors, dropout is 0.1, or
                what the model in memory has.
            n_heads: without a `cfg`, the number of heads, which no tensor tells; a model in memory does. A wrong number
                that divides emb_dim cannot be noticed: the model computes something else.
            lora_scale: for adapters, what A @ B is multiplied by: alpha / rank, or alpha alone in the first printing. A
                model in memory tells it.

        Raises:
            KeyError: `cfg` lacks a size.
            ValueError: `cfg` has a key that means nothing here, or the state dict is not that of a model with this
                config, or of another model than GPT-2; the message names the tensors.
        """
        state_dict, module = _source(source)
        _refuse_as_cfg(cfg, n_heads)
        given = _book_weights(state_dict)
        for name in filter(MASK.fullmatch, given):
            refuse_other_mask(name, given[name])
        weights = _by_our_names(given, module, lora_scale)
        _refuse_weights(weights)
        _refuse_head(cls, weights)
        if "score.weight" in weights:
            weights.setdefault("score.bias", weights["score.weight"].new_zeros(len(weights["score.weight"])))
        heads = heads_in_a_list(given)
        config = _config(cls, weights, module, cfg, n_heads, heads)
        _check_fit(cls, config, weights)
        if heads not in (None, config.n_heads):
            raise ValueError(
                f"the state dict has {heads} heads in a list, but the cfg says {config.n_heads}; correct it"
            )
        weights = {name: tensor.clone() for name, tensor in weights.items()}
        model = cls.from_pretrained(None, config=config, state_dict=weights)
        if module is not None:
            _refuse_other_logits(module, model)
        return model

    @classmethod
    def from_gpt2(cls, gpt2: GPT2PreTrainedModel) -> Self:
        """A copy of an official model of this kind in memory, in evaluation mode.

        Raises:
            ValueError: it is quantized, or not the official model of its config; the message names the difference.
        """
        if not hasattr(gpt2, "config"):
            raise ValueError(
                f"got a {type(gpt2).__name__}, but an official model is expected; pass the model inside it, such as "
                "its .module"
            )
        _refuse_quantized(gpt2)
        official = _official_class(cls)
        _refuse_other_code(gpt2, official)
        model = _build(cls, cls.config_class.from_gpt2(gpt2.config), gpt2.state_dict(), gpt2)
        if cls in cls.kinds():  # a subclass may compute something else with these weights
            _refuse_other_outputs(gpt2, model)
        return model

    def to_gpt2(self) -> GPT2PreTrainedModel:
        """The official model with a copy of these weights, in evaluation mode.

        The outputs of both for a few tokens are compared, unless the weights are on several devices.

        Raises:
            ValueError: the weights are quantized, or this model computes something else than an official one: its
                modules are not those of its config, or it has adapters, hooks or a forward pass of its own.
        """
        _refuse_quantized(self)
        official = _official_class(type(self))
        _refuse_other_code(self, next(kind for kind in self.kinds() if kind.gpt2_class is official))
        state_dict = to_gpt2_state_dict(self.state_dict(), self.config.n_layers)
        model = _build(official, self.config.to_gpt2(), state_dict, self)
        _refuse_other_outputs(self, model)
        return model

    def save_as_gpt2(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Writes an official checkpoint, which `from_pretrained` of the official class loads.

        Without `qkv_bias` the official biases are zeros. `kwargs` go to `save_pretrained`.
        """
        _refuse_file(save_directory)
        self.to_gpt2().save_pretrained(save_directory, **kwargs)


def _refuse_file(save_directory):
    if os.path.isfile(save_directory):  # transformers would only log an error, and save nothing
        raise NotADirectoryError(
            f"{save_directory} is a file, but a model is saved as a directory; choose another name"
        )


def _refuse_quantized(model):
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"got a model quantized by {getattr(method, 'value', method)}, but only float weights can be translated; "
            "load the checkpoint without quantization_config"
        )


def _build(model_class, config, state_dict, like):
    """A `model_class` with these weights, and with dtype, device, attention and generation settings of `like`."""
    attention = like.config._attn_implementation
    # Activations may have a dtype of their own, as transformers' xIELU does.
    weights = (p for name, p in like.named_parameters() if not re.search(r"\.(act|ff\.layers\.1)\.", name))
    if len(dtypes := {str(p.dtype) for p in weights}) > 1:
        raise ValueError(f"the weights are {', '.join(sorted(dtypes))}, but a copy has one dtype; cast them first")
    model = model_class.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=like.dtype, attn_implementation=attention
    )
    if like.can_generate():
        model.generation_config = copy.deepcopy(like.generation_config)
    shared = {p.untyped_storage().data_ptr() for p in like.parameters()}
    for p in model.parameters():
        if p.untyped_storage().data_ptr() in shared:
            p.data = p.data.clone(memory_format=torch.contiguous_format)
    return model.to(like.device)


def _source(source):
    """The state dict that `from_book` was given, and the model, if it was one in memory."""
    if isinstance(source, nn.DataParallel):
        source = source.module
    if isinstance(source, PreTrainedModel):
        raise ValueError(
            f"got a {type(source).__name__}, which is a Transformers model already; from_gpt2 copies official ones"
        )
    if isinstance(source, nn.Module):
        return source.state_dict(), source
    if isinstance(source, str | os.PathLike):
        source = _read_file(source)
    if not isinstance(source, Mapping):
        raise ValueError(
            f"got a {type(source).__name__} as the state dict; give a path, model.state_dict() or the model"
        )
    return source, None


def _refuse_as_cfg(cfg, n_heads):
    if cfg is None or isinstance(cfg, GPTScratchConfig):
        pass
    elif not isinstance(cfg, Mapping) or any(isinstance(value, torch.Tensor) for value in cfg.values()):
        raise ValueError(
            f"got a {type(cfg).__name__} as the cfg; the state dict comes first, then the dict that the model was "
            "built with, such as GPT_CONFIG_124M"
        )
    elif not isinstance(cfg, dict):
        raise ValueError(f"got a {type(cfg).__name__} as cfg; give the book's dict or a GPTScratchConfig")
    if cfg is not None and n_heads is not None:
        raise ValueError(f"got n_heads={n_heads} and a cfg, which has one too; leave n_heads out")


def _by_our_names(given, module, lora_scale):
    """The weights of a state dict of the book's code; its adapters are merged."""
    if module is not None and lora_scale is None and has_adapters(given):
        lora_scale = _lora_scale(module)
    shapes = {name: tensor.shape for name, tensor in given.items()}
    try:
        weights = {
            name: part.make([given[one] for one in part.sources]) for name, part in parts(shapes, lora_scale).items()
        }
    except ValueError as error:
        raise ValueError(f"the state dict {error}") from error
    except (RuntimeError, IndexError) as error:  # of torch
        raise ValueError(
            f"tensors of the state dict do not fit each other: {error}; take those of one model"
        ) from error
    if bare_matrices(given):
        logger.warning(BARE)
    return weights


def _config(model_class, weights, module, cfg, n_heads, heads):
    """The config of a model with these weights, which are tied if two share their memory or there is one."""
    pair = [weights[name] for name in ("tok_emb.weight", "out_head.weight") if name in weights]
    one_matrix = cfg is None and not {"out_head.weight", "score.weight"} & weights.keys()
    tied = one_matrix or (len(pair) == 2 and len({(tensor.data_ptr(), tensor.shape) for tensor in pair}) == 1)
    if cfg is None:
        cfg = _inferred(weights, module, n_heads, heads)
        if one_matrix:
            logger.warning("there is one matrix for tok_emb and out_head, so the model is tied")
    config = cfg if isinstance(cfg, GPTScratchConfig) else _from_dict(model_class, cfg, tied, weights)
    if tied and not config.tie_word_embeddings:
        logger.warning(
            "out_head and tok_emb share one matrix, but the config says tie_word_embeddings=False, so the copy has "
            "two, which are trained apart; set it to True to keep one"
        )
    if config.tie_word_embeddings and len(pair) == 2 and not torch.equal(*pair):
        raise ValueError(
            "the config says tie_word_embeddings=True, but out_head.weight is not equal to tok_emb.weight; set it "
            "to False if both are to be kept"
        )
    return config


def _from_dict(model_class, cfg, tied, weights):
    for name in SIZES:
        if name in cfg and type(cfg[name]) is not int:
            raise ValueError(f"the cfg has {name}={str(cfg[name])[:80]!r}, but it must be a whole number; convert it")
    settings: dict[str, Any] = {"tie_word_embeddings": tied}
    if "score.weight" in weights:
        settings |= {"book_classifier": True, "num_labels": len(weights["score.weight"])}
    end = 50256 if cfg.get("vocab_size", 0) > 50256 else None  # a smaller vocabulary is not GPT-2's
    return model_class.config_class.from_book(cfg, bos_token_id=end, eos_token_id=end, **settings)


def _read_file(path):
    """What a file of weights holds."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a directory, but the book saves files; from_pretrained reads directories")
    if path.suffix == ".safetensors":
        return shared(load_file(path))
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:  # of torch, which tells a lot
        told = str(error).partition("\n")[0][:200]
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}: {told}); `convert` says what it is, and reads "
            "other programs' files"
        ) from error


def _book_weights(content):
    """The tensors of a state dict, which may lie in what a training script saved, without prefixes."""
    try:
        _, state_dict = weights_in(content)
    except ValueError as error:
        raise ValueError(f"what was given {error}") from error
    for name, tensor in state_dict.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            raise ValueError(
                f"got {type(tensor).__name__} under {str(name)[:80]!r}, but a state dict has tensors only; if it "
                f"is the state dict, pass state_dict[{str(name)[:80]!r}]"
            )
    try:
        names = bare(state_dict)
    except ValueError as error:
        raise ValueError(f"the state dict {error}") from error
    return {names[name]: tensor for name, tensor in state_dict.items()}


def _refuse_head(model_class, weights):
    """Raises ValueError for the head of another kind of model, by what it is."""
    is_classifier, wants = "score.weight" in weights, "Classification" in model_class.__name__
    if is_classifier and not wants:
        raise ValueError(
            f"out_head scores {len(weights['score.weight'])} labels, so this is chapter 6's classifier; "
            "GPTScratchForSequenceClassification.from_book reads it"
        )
    if wants and "out_head.weight" in weights:
        raise ValueError(
            "out_head scores the vocabulary, so this is a language model; GPTScratchForCausalLM.from_book reads it. "
            "For a classifier with a new head, save that model, and load it by "
            f"{model_class.__name__}.from_pretrained(directory, num_labels=2)"
        )


def _inferred(weights, module, n_heads, listed):
    """The cfg that the tensors tell, and a model in memory beside them."""
    sizes: dict[str, Any] = {}
    for name, keys in (("tok_emb.weight", ("vocab_size", "emb_dim")), ("pos_emb.weight", ("context_length",))):
        if name not in weights or weights[name].ndim != 2:
            prefix = next((one.removesuffix(name) for one in weights if one.endswith("." + name)), None)
            remedy = f"take off the prefix {prefix!r} of its names" if prefix else "give all of it"
            raise ValueError(f"the state dict lacks the matrix {name}, which tells the sizes; {remedy}")
        sizes |= zip(keys, weights[name].shape, strict=False)
    layers = {int(found[1]) for found in (re.match(r"trf_blocks\.(\d+)\.", name) for name in weights) if found}
    sizes |= {"n_layers": len(layers), "qkv_bias": "trf_blocks.0.att.W_query.bias" in weights}
    first = weights.get("trf_blocks.0.ff.layers.0.weight")
    if first is not None and len(first) != 4 * sizes["emb_dim"]:
        sizes["n_inner"] = len(first)
    told = _settings_in(module) if module is not None else {}
    known = {count for count in (n_heads, listed, told.get("n_heads")) if count is not None}
    if len(known) != 1:
        raise ValueError(
            f"got {' and '.join(map(str, sorted(known)))} heads; give the number that it was trained with"
            if known
            else "no tensor tells the number of heads; give n_heads=…, or the cfg that the model was built with. A "
            f"wrong number that divides emb_dim={sizes['emb_dim']} cannot be noticed"
        )
    return {**sizes, **told, "n_heads": known.pop()}


def _settings_in(module):
    """What the modules of the book's model say and its tensors do not: heads and dropout."""
    found: dict[str, Any] = {}
    while not hasattr(module, "trf_blocks"):
        inside = getattr(module, "module", None) or getattr(module, "_orig_mod", None) or getattr(module, "model", None)
        if not isinstance(inside, nn.Module):
            return found
        module = inside
    block = module.trf_blocks[0]
    places = (
        ("drop_rate_emb", module, ("drop_emb",)),
        ("drop_rate_attn", block.att, ("dropout",)),
        ("drop_rate_shortcut", block, ("drop_shortcut", "drop_resid")),
    )
    for name, owner, attributes in places:
        rate = next((getattr(owner, one) for one in attributes if hasattr(owner, one)), None)
        rate = getattr(rate, "p", rate)
        if isinstance(rate, int | float):
            found[name] = rate
    if len(set(found.values())) == 1 and len(found) == len(places):
        found = {"drop_rate": next(iter(found.values()))}
    if isinstance(count := getattr(block.att, "num_heads", None), int):
        found["n_heads"] = count
    return found


@torch.no_grad()
def _lora_scale(module):
    """What the adapters of a model in memory multiply A @ B by, by what they compute; any number if that is 0.

    Raises:
        ValueError: they do not all have the same.
    """
    scales = set()
    for adapted in module.modules():
        if {"lora.A", "lora.B"} <= {name for name, _ in adapted.named_parameters()}:
            adapted = copy.deepcopy(adapted).to("cpu", torch.float64).eval()
            a, b = adapted.lora.A, adapted.lora.B
            x = torch.randn(4, len(a), dtype=a.dtype, generator=torch.Generator().manual_seed(0))
            product, added = x @ a @ b, adapted(x) - adapted.linear(x)
            if product.any():
                scales.add(float(f"{(added * product).sum() / product.square().sum():.9g}"))
    if len(scales) > 1:
        raise ValueError(
            f"the adapters multiply A @ B by different numbers, {few(sorted(map(str, scales)))}, but are merged with "
            "one; merge them into their layers first"
        )
    return scales.pop() if scales else 1.0


def _refuse_other_settings(module, config):
    """Raises ValueError for settings of a model of the book's that small weights hide in its logits."""
    for name, one in module.named_modules():
        eps = getattr(one, "eps", None)
        if isinstance(eps, float) and eps != config.layer_norm_epsilon:
            raise ValueError(
                f"{name} has eps={eps}, but the config says layer_norm_epsilon={config.layer_norm_epsilon}; give a "
                "GPTScratchConfig with the model's own"
            )
        if isinstance(one, nn.GELU) and one.approximate == "none" and config.activation_function == "gelu_new":
            raise ValueError(
                f"{name} is the exact GELU, but the config says activation_function='gelu_new', the tanh one; give a "
                "GPTScratchConfig with activation_function='gelu'"
            )


@torch.no_grad()
def _refuse_other_logits(module, model):
    """Raises ValueError unless the copy of a model of the book's computes what the model does."""
    _refuse_other_settings(module, model.config)
    length = min(1024, model.config.context_length)  # of tokens: a window or a clamped position is not seen before
    ids = torch.linspace(0, model.config.vocab_size - 1, length).long().unsqueeze(0)  # (1, T)
    parameters = {name: p.float() for name, p in module.named_parameters()}
    device = next(iter(parameters.values())).device
    modes = {one: one.training for one in module.modules()}
    try:
        module.eval()
        theirs = torch.func.functional_call(module, parameters, (ids.to(device),)).double().cpu()
    except Exception as error:  # whatever the class raises
        raise ValueError(
            f"this {type(module).__name__} does not run on {length} token ids, its full length "
            f"({type(error).__name__}: {str(error)[:200]}), so it is not known whether it computes what GPT-2 does; "
            "`hf-gpt-scratch compare` finds where they differ. Its state_dict() and its cfg are read without running it"
        ) from error
    finally:
        for one, mode in modes.items():
            one.training = mode
    ours = _outputs(model, ids.to(model.device))["logits"].cpu()
    theirs = theirs[:, -1] if ours.ndim == 2 else theirs  # a classifier's
    bound = SAME_AS_BOOK if device.type == "cpu" else SAME_OUTPUTS_ELSEWHERE
    off = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), torch.finfo().tiny)
    if not off <= bound:  # False for NaN, as it must be
        raise ValueError(
            f"this {type(module).__name__} computes other logits than GPT-2 with its weights, relative error "
            f"{off:.1e}: another activation, number of heads, mask or norm, or hooks; `compare` names the mistake"
        )


def _refuse_weights(weights):
    """Raises ValueError for tensors of a state dict that no model can be made of."""
    for name, tensor in weights.items():
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device, so it has no values; load them first")
        if tensor.is_floating_point() and not name.endswith("mask") and not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values; use a checkpoint from before training diverged")
    dtypes = sorted({str(tensor.dtype) for name, tensor in weights.items() if not name.endswith("mask")})
    if len(dtypes) > 1:
        raise ValueError(f"the weights are {', '.join(dtypes)}, but a model has one dtype; cast them first")


# Bounds for two models with the same weights, in float32: 4e-7 on a CPU; a GPU may compute float32 in TF32.
SAME_OUTPUTS, SAME_OUTPUTS_ELSEWHERE = 1e-4, 1e-2
# The book's classes and ours on a CPU: 3e-7; with the exact GELU instead of the tanh one: 6e-5.
SAME_AS_BOOK = 1e-5

# Attributes that do not change the output, and sizes, which are stale after resizing: the weights' shapes are compared.
NO_DIFFERENCE = ("training", "gradient_checkpointing", "in_features", "out_features", "num_embeddings")


def _check_fit(model_class, config, weights):
    """Raises ValueError unless these are the weights of the book's model with this config."""
    found: dict[str, int | bool] = {"qkv_bias": "trf_blocks.0.att.W_query.bias" in weights}
    for name, sizes in (("tok_emb", ("vocab_size", "emb_dim")), ("pos_emb", ("context_length", "emb_dim"))):
        shape = weights[f"{name}.weight"].shape if f"{name}.weight" in weights else ()
        found |= zip(sizes, shape, strict=False)
    layers = [int(name.split(".")[1]) for name in weights if re.match(r"trf_blocks\.\d+\.", name)]
    found["n_layers"] = max(layers, default=-1) + 1
    other = [name for name, value in found.items() if value != getattr(config, name)]
    if layers and other:
        values = [", ".join(f"{n}={value(n)}" for n in other) for value in (found.get, config.__getattribute__)]
        raise ValueError(
            f"the state dict is of a model with {values[0]}, but the config says {values[1]}; give the cfg that this "
            "model was built with, or none, and n_heads=… alone"
        )
    with torch.device("meta"):
        expected = {name.removeprefix("model."): w for name, w in model_class(copy.copy(config)).state_dict().items()}
    ignored = "|".join(model_class._keys_to_ignore_on_load_unexpected)
    tied = "out_head.weight" if config.tie_word_embeddings else None
    lacks = sorted(expected.keys() - weights.keys() - {tied})
    has = sorted(name for name in weights.keys() - expected.keys() if not re.search(ignored, name))
    wrong = [
        f"{len(names)} tensors {what}: {few(names)}" for what, names in (("missing", lacks), ("unknown", has)) if names
    ]
    wrong += [
        f"{name} has shape {list(tensor.shape)} instead of {list(expected[name].shape)}"
        for name, tensor in sorted(weights.items())
        if name in expected and tensor.shape != expected[name].shape
    ][:5]
    if wrong:
        remedy = "give the complete state dict of a GPTModel and the cfg that it was built with"
        if model_class not in model_class.kinds():
            remedy = f"convert it, and {model_class.__name__}.from_pretrained takes of the directory what fits"
        raise ValueError(f"the state dict does not fit the config ({'; '.join(wrong)}); {remedy}")


def _official_class(model_class):
    found = getattr(model_class, "gpt2_class", None)
    if found is None:
        raise ValueError(
            f"{model_class.__name__} has no official counterpart, but its base model has: translate `model.model`, or "
            "load an official checkpoint with from_pretrained"
        )
    return found


def _differences(model, kind):
    """How the model differs from what `kind` builds from its config, as texts; dropout rates are ignored."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        built = kind(config)
    expected, found = dict(built.named_modules()), dict(model.named_modules())
    differences = [f"{name} is missing" for name in expected.keys() - found.keys()]
    differences += [f"{name} is an unknown {_class_name(found[name])}" for name in found.keys() - expected.keys()]
    for name in expected.keys() & found.keys():
        ours, theirs = expected[name], found[name]
        if _computes_otherwise(theirs, ours):
            differences.append(f"{name or 'the model'} is a {_class_name(theirs)} instead of a {_class_name(ours)}")
        elif (
            "forward" in vars(theirs)
            and not hasattr(theirs, "_hf_hook")  # accelerate's hooks only move tensors
            and not (theirs is model and _computes_as_its_class(model))
        ):
            differences.append(f"{name or 'the model'} has a forward pass of its own")
        elif not isinstance(ours, PreTrainedModel | nn.Dropout):
            differences += [
                f"{name}.{key} is {getattr(theirs, key, None)!r} instead of {value!r}"
                for key, value in _settings(ours).items()
                if getattr(theirs, key, None) != value
            ]
    shapes = ({name: tuple(p.shape) for name, p in m.named_parameters(remove_duplicate=False)} for m in (built, model))
    expected_shapes, found_shapes = shapes
    differences += [f"{name} is an unknown parameter" for name in found_shapes.keys() - expected_shapes.keys()]
    for name in expected_shapes.keys() & found_shapes.keys():
        if found_shapes[name] != expected_shapes[name]:
            differences.append(f"{name} has shape {found_shapes[name]} instead of {expected_shapes[name]}")
    return sorted(differences, key=lambda text: (not text.startswith("the model is"), text.count("."), text))


def _computes_otherwise(theirs, ours):
    """Whether a module's class has other methods than ours; for a whole model only the forward pass counts."""
    if type(theirs) is type(ours):
        return False
    if isinstance(ours, PreTrainedModel):
        return type(theirs).forward is not type(ours).forward
    methods = (name for name, value in inspect.getmembers(type(ours), callable) if not name.startswith("__"))
    return any(getattr(type(theirs), name, None) is not getattr(type(ours), name) for name in methods)


def _settings(module):
    """Attributes of a module and its class that can change what it computes: numbers, switches, names."""
    names = {*vars(module), *dir(type(module))}
    values = {name: getattr(module, name) for name in names if not name.startswith("_") and name not in NO_DIFFERENCE}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}


def _class_name(module):
    return f"{type(module).__module__.rpartition('.')[2]}.{type(module).__qualname__}"


def _few(texts):
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more" if len(texts) > 4 else "")


def _refuse_other_code(model, kind):
    if any(p.device.type == "meta" for p in model.parameters()):
        raise ValueError(
            f"the weights of this {type(model).__name__} are on the meta device, or offloaded, so there is nothing to "
            "translate; load the model without device_map"
        )
    if differences := _differences(model, kind):
        raise ValueError(
            f"this {type(model).__name__} is not the {kind.__name__} that its config describes: {_few(differences)}. "
            "Such a model cannot be translated: merge adapters first (PEFT's merge_and_unload), restore the modules, "
            "and build a new model to change its config"
        )


def _refuse_to_save_other_code(model):
    """A saved model consists of our code, its config and its weights, so code and config must describe it."""
    adapted = getattr(model, "_hf_peft_config_loaded", False)  # then only the adapter is saved
    # A distributed model has modules around its own.
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if adapted or distributed or getattr(model, "hf_quantizer", None) is not None:
        return
    own = (kind for kind in model.kinds() if isinstance(model, kind))
    kind = max(own, key=lambda kind: len(kind.__mro__), default=None)  # the nearest
    if kind is None or (type(model) is not kind and model.config.model_type != GPTScratchConfig.model_type):
        return
    differences = _differences(model, kind)
    if differences and type(model) is not kind:
        raise ValueError(
            f"{type(model).__name__} has the model_type {kind.config_class.model_type!r}, by which Auto classes would "
            f"load what is saved as a {kind.__name__}, which it is not: {_few(differences)}. Give it a config class "
            "with a model_type of its own"
        )
    elif differences:
        raise ValueError(
            f"saved, this {kind.__name__} would load as another model: {_few(differences)}. Merge adapters first "
            "(PEFT's merge_and_unload), restore the modules, build a new model to change its config; or write a class "
            "of your own that builds these modules, with a model_type of its own"
        )


@contextmanager
def _evaluated(model):
    """Without gradients, dropout, and attention functions that do not run everywhere; the model is left unchanged."""
    modes = {module: module.training for module in model.modules()}
    attention = model.config._attn_implementation
    try:
        for module in modes:
            module.training = False
        if attention not in ("eager", "sdpa"):
            model.set_attn_implementation("sdpa")
        with torch.no_grad():
            yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        for module, mode in modes.items():
            module.training = mode


def _outputs(model, input_ids, **inputs):
    """A model's outputs in float32 and without dropout; the model is left unchanged."""
    parameters = dict(model.named_parameters())
    half = {name: p.float() for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)}
    with _evaluated(model), torch.autocast(input_ids.device.type, enabled=False):
        output = torch.func.functional_call(model, half, (input_ids,), {"use_cache": False, **inputs})
    return {name: value.double() for name, value in output.items() if isinstance(value, torch.Tensor)}


def _few_tokens(config, device, dtype, with_states):
    """A model's inputs: token ids (1, T) and, with cross-attention, an encoder's states (1, S, E)."""
    length = min(8, config.max_position_embeddings)
    inputs = {"input_ids": torch.linspace(0, config.vocab_size - 1, length, device=device).long().unsqueeze(0)}
    if config.add_cross_attention and with_states:
        states = torch.linspace(-1, 1, 3 * config.hidden_size, device=device).view(1, 3, -1)  # (B, S, E)
        inputs["encoder_hidden_states"] = states.to(dtype)
    return inputs


def _reads_states(model):
    return type(model).__name__.endswith(("Model", "ForCausalLM"))


def _without_own_forward(model):
    """The model, with its class's forward pass if it has one of its own."""
    if "forward" not in vars(model):
        return model
    plain = copy.copy(model)
    del vars(plain)["forward"]
    return plain


def _computes_as_its_class(model):
    """Whether a forward pass that was set on a model computes what its class's does, perhaps under autocast.

    accelerate sets such a one for mixed precision, and TRL for losses of its own; the outputs for a few tokens decide.
    """
    [device, *others] = {p.device for p in model.parameters()}
    if others or device.type == "meta":
        return False
    inputs = _few_tokens(model.config, device, model.dtype, _reads_states(model))

    def outputs(one, dtype=None):
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            output = one(**inputs, use_cache=False)
        return {name: value.double() for name, value in output.items() if isinstance(value, torch.Tensor)}

    with _evaluated(model):
        found, plain = outputs(model), _without_own_forward(model)
        for dtype in (None, torch.bfloat16, torch.float16):
            expected = outputs(plain, dtype)
            if found.keys() == expected.keys() and all(_error(found[k], expected[k]) <= SAME_OUTPUTS for k in found):
                return True
    return False


def _error(found, expected):
    """The largest difference, relative to the largest value; NaN if there is one."""
    return (found - expected).abs().max().item() / max(found.abs().max().item(), torch.finfo().tiny)


def _refuse_other_outputs(model, translated):
    devices = {p.device for one in (model, translated) for p in one.parameters()}
    if len(devices) > 1:
        logger.warning(
            f"The weights of this {type(model).__name__} are not all on one device, so its outputs were not compared "
            "with its translation's: modules and config were checked, but not hooks or replaced methods."
        )
        return
    [device] = devices
    dtype = torch.promote_types(model.dtype, torch.float32)
    inputs = _few_tokens(model.config, device, dtype, _reads_states(model))
    # One of its own computes the same, as was checked, but perhaps under autocast.
    ours, theirs = (_outputs(_without_own_forward(one), **inputs) for one in (model, translated))
    bound = SAME_OUTPUTS if device.type == "cpu" else SAME_OUTPUTS_ELSEWHERE
    for name, output in ours.items():
        error = _error(output, theirs[name])
        if not error <= bound:  # False for NaN, as it must be
            raise ValueError(
                f"this {type(model).__name__} and its translation compute different {name}, relative error "
                f"{error:.1e}: hooks, a replaced forward pass, methods of its class or NaN are not translated; remove "
                "them"
            )
