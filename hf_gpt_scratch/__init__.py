"""GPT-2 in the layers of *Build a Large Language Model (From Scratch)*, as a first-class Transformers model."""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.api"), name)


# The command imports torch and transformers only when it needs them: `--help` and completion do not wait seconds.
# Everyone else gets all of the package at once, since transformers' Auto classes must know the model from here on.
if TYPE_CHECKING or Path(*sys.argv[:1]).stem != "hf-gpt-scratch":
    from .api import *  # noqa: F403
    from .api import __all__  # noqa: F401
