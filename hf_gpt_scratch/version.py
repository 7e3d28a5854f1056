"""The versions of this package and its libraries; imports nothing that may be missing or broken."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0"

LIBRARIES = (
    *("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub", "accelerate", "numpy", "tiktoken"),
    *("typer", "rich", "jinja2"),
)


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str | None]:
    """The installed versions according to their metadata; None if not installed."""
    found: dict[str, str | None] = {"hf_gpt_scratch": __version__, "python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
