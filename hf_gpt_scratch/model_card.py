"""Where `model_card` was in 0.1.0; it is in `hf_gpt_scratch` now."""

import sys
import warnings
from types import ModuleType

from .weights.model_card import model_card

__all__ = ["model_card"]

warnings.warn(
    "hf_gpt_scratch.model_card has moved: use `from hf_gpt_scratch import model_card`", FutureWarning, stacklevel=2
)


class _Function(ModuleType):
    """Importing this module puts it in the function's place in the package, so it does what the function does."""

    __call__ = staticmethod(model_card)


sys.modules[__name__].__class__ = _Function
