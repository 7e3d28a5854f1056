"""Where `convert` and `export` were in 0.1.0; they are in `hf_gpt_scratch` now."""

import warnings

from .weights.formats import detect, export_checkpoint, import_checkpoint, read, write

__all__ = ["detect", "export_checkpoint", "import_checkpoint", "read", "write"]

warnings.warn(
    "hf_gpt_scratch.formats has moved: `from hf_gpt_scratch import convert, export` gives what import_checkpoint and "
    "export_checkpoint were",
    FutureWarning,
    stacklevel=2,
)
