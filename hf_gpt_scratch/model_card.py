"""The place of `model_card` in 0.1.0; it is in `hf_gpt_scratch` now."""

import sys
import warnings
from types import ModuleType

from .weights.model_card import model_card

__all__ = ["model_card"]

warnings.warn(
    "hf_gpt_scratch.model_card has moved: use `from hf_gpt_scratch import model_card`", FutureWarning, stacklevel=2
)


class _Function(ModuleType):
    """Importing this module replaces the function in the package by the module, so the module can be called too."""

    __call__ = staticmethod(model_card)


sys.modules[__name__].__class__ = _Function
