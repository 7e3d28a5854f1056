"""The config's translation from and to `GPT2Config`, and from the book's dict; it does not ship with a model."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import GPT2Config
from transformers.utils import logging

from .book_cfg import DEFAULTS, SIZES, settings
from .configuration_gpt_scratch import FROM_GPT2, LOOKED_UP, GPTScratchConfig, ignored, listed

logger = logging.get_logger(__name__)

TO_GPT2 = {ours: theirs for theirs, ours in FROM_GPT2.items()}

# Keys that describe the class and not the model, and so are never copied from one config to the other.
IDENTITY = ("model_type", "architectures", "transformers_version", "auto_map", "_name_or_path", "name_or_path")


def from_gpt2(config_class: type[GPTScratchConfig], config: GPT2Config) -> GPTScratchConfig:
    """`GPTScratchConfig.from_gpt2`, for it and for classes that inherit from it."""
    if config.model_type != "gpt2":
        raise ValueError(f"got a config of model type {config.model_type!r}, but only 'gpt2' can be translated")
    ours, theirs = ({field.name: field.default for field in fields(either)} for either in (config_class, config))
    unused = ignored_by_gpt2(config)
    if unused:
        logger.warning_once(f"GPT-2 ignores {listed(unused)} of its config, so GPTScratch leaves it out")
    values = {}
    for name, value in config.to_dict().items():
        translated = FROM_GPT2.get(name, name)
        if name in IDENTITY or name in unused:
            continue
        if name not in theirs or translated in ours:
            values[translated] = value
        elif value != theirs[name]:  # an option of another version or of a subclass
            raise ValueError(
                f"got {listed({name: value})}, an option of {type(config).__name__} that GPTScratch does not know; "
                "only a model without it can be translated"
            )
    rates = [values["drop_rate_emb"], values["drop_rate_attn"], values["drop_rate_shortcut"]]
    values["drop_rate"] = rates[-1]
    if len(set(rates)) == 1:  # as in the book: one rate for all places
        values.update(drop_rate_emb=None, drop_rate_attn=None, drop_rate_shortcut=None)
    return config_class(qkv_bias=True, **values)


def ignored_by_gpt2(config: GPT2Config) -> dict[str, Any]:
    """The keys of a `GPT2Config` that GPT-2 ignores, but GPTScratch would use or refuse."""
    theirs = {field.name for field in fields(config)}
    unused = {name: value for name, value in config.to_dict().items() if name not in theirs and name not in IDENTITY}
    if unused.get("n_ctx") == config.n_positions:
        del unused["n_ctx"]
    ours = {*(field.name for field in fields(GPTScratchConfig)), *GPTScratchConfig.attribute_map}
    return {n: value for n, value in unused.items() if n in ours or ignored(n, value, GPTScratchConfig)}


def to_gpt2(config: GPTScratchConfig) -> GPT2Config:
    """`GPTScratchConfig.to_gpt2`."""
    if config.book_classifier:
        raise ValueError(
            "got book_classifier=True, but the official classifier has no bias and reads the last token that is "
            "not padding; keep this model as it is, or train a new head with book_classifier=False"
        )
    values = {TO_GPT2.get(k, k): v for k, v in config.to_dict().items() if k not in (*IDENTITY, *LOOKED_UP)}
    for place in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if values[place] is None:
            values[place] = config.drop_rate
    for ours_alone in ("drop_rate", "qkv_bias", "book_classifier"):
        del values[ours_alone]
    return GPT2Config(**values)


def from_book(config_class: type[GPTScratchConfig], cfg: dict[str, Any], defaults: dict[str, Any]) -> GPTScratchConfig:
    """`GPTScratchConfig.from_book`, for it and for classes that inherit from it."""
    known = {field.name for field in fields(config_class)} - {"dtype"} | {"num_labels"}
    settings({name: value for name, value in cfg.items() if name not in known or name in (*SIZES, *DEFAULTS)})
    if "model_type" not in cfg:  # otherwise it is the `to_dict` of a config
        cfg = {name: value for name, value in cfg.items() if name in known}
    return config_class(**{**defaults, **cfg})


def read(config_class: type[GPTScratchConfig], values: dict[str, Any], source: Any) -> dict[str, Any]:
    """The content of a config.json for a class, translated if it is an official model's.

    Raises:
        ValueError: it is of another model type; `source`, where it lies, is named.
    """
    model_type = model_type_of(values)
    if model_type == "gpt2":
        return config_class.from_gpt2(GPT2Config.from_dict({**values, "model_type": "gpt2"})).to_dict()
    if model_type == GPTScratchConfig.model_type != config_class.model_type:
        values = {name: value for name, value in values.items() if name not in IDENTITY}
        return {**values, "model_type": config_class.model_type}
    if model_type != config_class.model_type:
        types = dict.fromkeys(("gpt2", GPTScratchConfig.model_type, config_class.model_type))
        raise ValueError(
            f"{source} holds a model of type {model_type!r}, but {config_class.__name__} reads only checkpoints of "
            f"{', '.join(map(repr, types))}; {of_another_type(model_type)}"
        )
    return values


def model_type_of(values: Mapping[str, Any]) -> str | None:
    """The model type of a config.json; early files of GPT-2 do not state it."""
    model_type = values.get("model_type")
    if model_type is None:
        named = values.get("architectures") or ["GPT2"]
        of_gpt2 = isinstance(named, list) and all(str(name).startswith("GPT2") for name in named)
        if of_gpt2 and ("architectures" in values or values.keys() >= {"n_embd", "n_layer", "n_head"}):
            return "gpt2"
    return model_type


def of_another_type(model_type: Any) -> str:
    """The remedy for a config.json of another type, or without one."""
    others = (
        "AutoModelForCausalLM loads other models, with trust_remote_code=True where their code lies beside the weights"
    )
    lacking = 'if this is one of these and only lacks its type, add "model_type" to its config.json'
    return others if model_type else f"{others}; {lacking}"
