"""Finds a checkpoint: a local directory, or a repository on the hub, which is downloaded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import ConversionError, shortened
from .publish import local_path

# What is downloaded with the weights: configs and the files of every kind of tokenizer.
BESIDE = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.jinja")


def find_source(
    source: str | os.PathLike, revision: str | None = None, patterns: tuple[str, ...] | None = None
) -> Path:
    """The directory of a checkpoint; a hub id is downloaded into the hub's cache.

    Args:
        patterns: of the files that are downloaded; None: the weights and what lies beside them.

    Raises:
        ConversionError: it does not exist, or cannot be downloaded.
    """
    path = local_path(source)
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a directory, so --revision {revision} has no meaning; leave it out")
        return path
    if path.exists():
        if revision is not None:
            raise ConversionError(f"{source} is a file, so --revision {revision} has no meaning; leave it out")
        remedy = f"give its directory, {path.parent}"
        if not (path.parent / "config.json").is_file():
            remedy = f"hf-gpt-scratch convert {source} TARGET makes one of another program's file, verified against it"
        raise ConversionError(f"{source} is a file, but here a checkpoint is a directory; {remedy}")
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConversionError(f"there is no directory {shortened(name)}; check the path")
    wanted = [*(patterns or (*BESIDE, "*.safetensors"))]
    try:
        directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        if patterns is None and not any(directory.glob("*.safetensors")):
            wanted = [*BESIDE, "pytorch_model*.bin"]
            directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        return directory
    except GatedRepoError as error:
        raise ConversionError(
            f"{name} is gated, and you do not have access; request it, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{name} has no revision {revision!r}; check its branches and tags") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConversionError(f"there is neither a directory nor a hub repository {name!r}; check the name") from error
    except (OSError, ConnectionError) as error:
        raise ConversionError(
            f"{name!r} is not a local directory, and the hub cannot be reached ({error.__cause__ or error}); connect "
            "to the network, or give the directory of a downloaded checkpoint"
        ) from error


def find_tokenizer(name: str | os.PathLike) -> Path | None:
    """The directory or file of a tokenizer; that of a hub id is downloaded into the hub's cache.

    None for "gpt2" and "none", unless a directory has that name.

    Raises:
        ConversionError: it does not exist, or cannot be had.
    """
    path = local_path(name)
    if path.exists():
        return path
    return None if str(name) in ("gpt2", "none") else find_source(name, patterns=BESIDE)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides transformers' progress bars, since our own progress is shown."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
