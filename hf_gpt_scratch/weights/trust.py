"""Keeps code in a source out of the target, whose model card says `trust_remote_code=True`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from .checkpoint import read_json

# Settings by which transformers finds code: of classes, pipelines, `generate`, attention and other kernels.
CODE_KEYS = (
    "auto_map",
    "custom_code",
    "custom_generate",
    "custom_pipelines",
    "kernel_config",
    "trust_remote_code",
    "use_kernels",
)
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def refuse_kernels(path: Path, values: Mapping[str, Any]) -> None:
    """Refuses a config whose attention is code on the hub, which transformers fetches when it builds a model.

    Raises:
        ConversionError: it is such a config.
    """
    for key in KERNEL_KEYS:
        if "/" in str(values.get(key)):
            raise ConversionError(
                f"{path} has {key}={str(values[key])[:200]!r}, which is code on the hub and is not run here; remove "
                "the key"
            )


def code_beside(directory: Path) -> list[str]:
    """Notes that name the code in a source, which is left behind."""
    names = [path.name for path in directory.iterdir() if path.suffix == ".py" or path.name == "custom_generate"]
    return [f"left behind, since it is code: {name!r}" for name in sorted(names)]


def strip_code(directory: Path) -> list[str]:
    """Removes settings that make code run from a directory that is being written, except for our own classes.

    Returns:
        notes on what was removed.
    """
    notes = []
    for path in sorted(directory.glob("*config.json")):
        values = read_json(path)
        taken = [key for key in (*CODE_KEYS, *KERNEL_KEYS) if key in values and not _is_ours(path, key, values[key])]
        for key in taken:
            value = json.dumps(values.pop(key))
            notes.append(f"left out of {path.name}, since it makes code run: {key!r}, which was {value[:200]}")
        if taken:
            path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return notes


def _is_ours(path: Path, key: str, value: Any) -> bool:
    """Whether a config's `auto_map` names only files that `save_pretrained` has written beside it."""
    if (path.name, key) != ("config.json", "auto_map") or not isinstance(value, dict):
        return False
    return all(
        isinstance(name, str) and "--" not in name and (path.parent / f"{name.partition('.')[0]}.py").is_file()
        for name in value.values()
    )
