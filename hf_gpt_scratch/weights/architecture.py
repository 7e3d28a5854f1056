"""The class that a config.json names: one of our models or the official one of the same kind, and no other."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import UnknownArchitecture, shortened
from ..model.config_translation import model_type_of
from ..model.configuration_gpt_scratch import GPTScratchConfig
from ..model.heads_gpt_scratch import MODELS
from ..model.modeling_gpt_scratch import GPTScratchPreTrainedModel

# The code that our own saved models name.
_CONFIG_CODE = f"configuration_gpt_scratch.{GPTScratchConfig.__name__}"
_MODEL_CODE = {  # until 0.1.0 all in one file
    f"{module}.{kind.__name__}" for kind in MODELS for module in ("modeling_gpt_scratch", "heads_gpt_scratch")
}


def architecture(values: Mapping[str, Any], directory: str | os.PathLike) -> type[GPTScratchPreTrainedModel]:
    """Our class of a checkpoint's model, official or ours; the official one is its `gpt2_class`.

    A config that names no architecture is a language model's.

    Args:
        values: the content of config.json.
        directory: its directory, or its name on the hub.

    Raises:
        UnknownArchitecture: the model is of another class, by its name or by its code, or has an adapter beside it.
    """
    if not isinstance(values, Mapping):
        raise UnknownArchitecture(
            f"config.json of {directory} is not a map of settings; use the one that came with the weights"
        )
    official = model_type_of(values) == "gpt2"
    known = {(kind.gpt2_class if official else kind).__name__: kind for kind in MODELS}
    named = values.get("architectures") or [next(iter(known))]
    names = list(dict.fromkeys(str(name) for name in (named if isinstance(named, list) else [named])))
    unknown = [name for name in names if name not in known]
    if unknown or len(names) > 1:
        raise UnknownArchitecture(
            f"config.json of {directory} names the architecture {_short(unknown or names)}, but must "
            f"name one of {', '.join(known)}; {_remedy(unknown, directory)}"
        )
    codes = values.get("auto_map") or {}
    if not isinstance(codes, Mapping):
        raise UnknownArchitecture(f"config.json of {directory} has an auto_map that is not a map; remove it")
    for auto_class, code in codes.items():
        ours = {_CONFIG_CODE} if auto_class == "AutoConfig" else _MODEL_CODE
        is_ours = isinstance(code, str) and code.rpartition("--")[2] in ours and not official
        if auto_class.startswith(("AutoModel", "AutoConfig")) and not is_ours:
            name = str(code).rpartition(".")[2]
            raise UnknownArchitecture(
                f"config.json of {directory} has an auto_map in which {auto_class} is {_short([code])}, which is not "
                f"{'an official' if official else 'our'} class; {_remedy([name], directory)}"
            )
    if (Path(directory) / "adapter_config.json").is_file():
        raise UnknownArchitecture(
            f"{directory} has an adapter beside the weights, which changes what the model computes; merge it with "
            "PEFT's merge_and_unload and save the model, or move adapter_config.json and the adapter's weights "
            "elsewhere"
        )
    return known[names[0]]


def kind_of(module: nn.Module) -> type[GPTScratchPreTrainedModel] | None:
    """Our class for a model in memory that is official, ours, or of a class that inherits from one; else None."""
    for base in type(module).__mro__:
        for kind in MODELS:
            if base in (kind, kind.gpt2_class):
                return kind
    return None


def _remedy(names: list[str], directory: str | os.PathLike) -> str:
    name = names[0] if names and re.fullmatch(r"\w{1,60}", names[0]) else "MyModel"
    return (
        f"to compare a class of your own, give its code: compare REFERENCE my.py:{name} --weights {directory}. Correct "
        "config.json only if the weights are those of a known class"
    )


def _short(names: list[Any]) -> str:
    text = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shortened(text)
