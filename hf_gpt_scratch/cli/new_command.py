"""`new`: a package with a Transformers model to change into one of one's own."""

import importlib.util
import keyword
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ..errors import ConversionError, shortened
from .status import FAILED

TEMPLATE = Path(__file__).parents[1] / "template" / "my_model"
OLDEST = "5.24"  # of transformers, for what is written


def new(
    name: Annotated[str, typer.Argument(help="Of the package and the model type: small letters, digits and _.")],
    directory: Annotated[Path | None, typer.Option(help="Directory to write; otherwise the name.")] = None,
) -> None:
    """Writes a package with a Transformers model of your own: its config, its layers, and transformers' tests of it.

    The model begins as a GPT-2 in 200 lines that need torch and transformers alone.
    """
    target = Path(name) if directory is None else directory
    try:
        written = write_package(name, target)
    except ConversionError as error:
        Console(stderr=True).print(f"[bold red]Not written:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(FAILED)
    console = Console()
    console.print(f"[bold green]Written:[/] {escape(str(target))}, files: {', '.join(written)}", soft_wrap=True)
    console.print(f"Its README.md says how to install and test it; it needs transformers {OLDEST} or newer.")


def write_package(name: str, target: Path) -> list[str]:
    """Writes the template under this name; the directory appears only when it is complete.

    Returns:
        its files.

    Raises:
        ConversionError: the name or the directory is not usable.
    """
    from ..weights.publish import atomic_directory, errors_explained, target_path

    target = target_path(target)
    if os.path.lexists(target):
        raise ConversionError(f"{target} exists already; choose another one with --directory")
    check_name(name)
    files = sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    with errors_explained("writing the package", target), atomic_directory(target) as staging:
        for file in files:
            path = staging / renamed(str(file.relative_to(TEMPLATE)), name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(renamed(file.read_text(encoding="utf-8"), name), encoding="utf-8")
    return [renamed(file.relative_to(TEMPLATE).as_posix(), name) for file in files]


def check_name(name: str) -> None:
    """Raises ConversionError unless a new package and a new model type can have this name."""
    shown = repr(shortened(name))
    if keyword.iskeyword(name):
        raise ConversionError(
            f"got the name {shown}, but it is a word of Python's own, so no package can have it; take one such as "
            f"{name.lower()}_model"
        )
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > 40:
        raise ConversionError(
            f"got the name {shown}, but a package and its model type are called by small letters, digits and single _, "
            "at most 40, beginning with a letter; take one such as my_model"
        )
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from ..model.configuration_gpt_scratch import GPTScratchConfig

    if name in CONFIG_MAPPING_NAMES or name == GPTScratchConfig.model_type:
        raise ConversionError(f"got the name {shown}, but there is a model type of this name; choose another one")
    if name == "tests" or name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise ConversionError(
            f"got the name {shown}, but `import {name}` already finds another module; choose another name"
        )


def renamed(text: str, name: str) -> str:
    """The template's text under another name."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    return text.replace("my_model", name).replace("MyModel", camel)
