"""The versions of this package and of what it needs; imports nothing that may be missing or broken."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"

LIBRARIES = (
    *("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub", "accelerate", "numpy", "tiktoken"),
    *("typer", "rich", "jinja2"),
)


def versions(libraries: tuple[str, ...] = LIBRARIES) -> dict[str, str | None]:
    """What is installed, by the record of its installer; None: it is not."""
    found: dict[str, str | None] = {"hf_gpt_scratch": __version__, "python": platform.python_version()}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
