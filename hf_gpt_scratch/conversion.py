"""Checkpoints from official GPT-2 to ours and back: checked, converted by transformers' loader, verified, published.

A conversion either ends with the complete, verified target under its final name or leaves things as they were.
"""

import datetime
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .configuration_gpt_scratch import GPTScratchConfig
from .model_card import model_card
from .modeling_gpt_scratch import GPTScratchForCausalLM
from .parity import verify
from .weight_map import DROPPED_PATTERNS, GPT2_PREFIX, LM_HEAD, SCRATCH_PREFIX

RECEIPT = "conversion_receipt.json"
CARD = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_DROPPED = [re.compile(pattern) for pattern in DROPPED_PATTERNS]


class ConversionError(Exception):
    """What stands in the way of a conversion: the value, the rule and the remedy."""


class Progress:
    """Hears how far a conversion is; this one says nothing."""

    def step(self, what: str, total: int | None = None) -> None:
        """A new step begins; `total` bytes if they are known."""

    def advance(self, done: int) -> None:
        """So many bytes more are done."""


def gpt2_to_scratch(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    revision: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts an official `GPT2LMHeadModel` checkpoint into ours, weights unchanged, in the same dtype.

    Args:
        source: directory or hub id.
        target: directory to be; must not exist unless `overwrite`.
        revision: branch, tag or commit of a hub id.
        check: compare the result with `GPT2LMHeadModel` in float32 before it is published.

    Returns:
        the receipt, which also lies in the target: source files with their sha256, parity figures, versions.

    Raises:
        ConversionError: source or target is not as it must be.
        ParityError: the result is not the same model.
    """
    return _convert("gpt2", "gpt_scratch", source, target, revision, check, overwrite, progress or Progress())


def scratch_to_gpt2(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    revision: str | None = None,
    check: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Converts our checkpoint into an official one; the inverse of `gpt2_to_scratch`, with the same arguments."""
    return _convert("gpt_scratch", "gpt2", source, target, revision, check, overwrite, progress or Progress())


def _convert(source_type, target_type, source, target, revision, check, overwrite, progress):
    target = Path(target).expanduser().resolve()
    step = "reading the source"
    try:
        progress.step(f"Finding {source}")
        directory = find_source(source, revision)
        if directory.resolve() == target:
            raise ConversionError(f"source and target are both {target}; choose another target")
        hashes = check_checkpoint(directory, source_type, progress)
        _check_space(target, sum(file["bytes"] for file in hashes.values()))
        step = "writing the target"
        with atomic_directory(target, overwrite) as staging, quiet_transformers():
            progress.step("Converting")
            model = GPTScratchForCausalLM.from_pretrained(directory)
            if target_type == "gpt2":
                model = model.to_gpt2()
            model.save_pretrained(staging)
            del model
            receipt = {
                "what": f"{source_type} converted to {target_type} by hf_gpt_scratch",
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "source": {"name": str(source), "revision": revision, "files": hashes},
                "tokenizer": _copy_tokenizer(directory, staging),
                "parity": _verify(directory, staging, source_type, progress) if check else None,
                "versions": {m.__name__: m.__version__ for m in (torch, transformers)}
                | {"python": platform.python_version()},
            }
            if target_type == "gpt_scratch":
                with torch.device("meta"):
                    model = GPTScratchForCausalLM(GPTScratchConfig.from_pretrained(staging))
                hub_id = None if directory == Path(source).expanduser() else str(source)
                model_card(model, receipt, hub_id).save(staging / CARD)
            progress.step("Hashing the result", sum(path.stat().st_size for path in staging.iterdir()))
            receipt["target"] = {
                "files": {p.name: _digest(p, progress) for p in sorted(staging.iterdir()) if p.is_file()}
            }
            (staging / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise ConversionError(
            f"failed while {step}: {error}; {target} is as it was before; free disk space, check permissions or choose "
            "another target, then run again"
        ) from error
    return receipt


def find_source(source: str | os.PathLike, revision: str | None = None) -> Path:
    """The directory of a checkpoint; a hub id is downloaded into the hub's cache.

    Raises:
        ConversionError: it does not exist, or cannot be had.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"{source} is a directory, so --revision {revision} has no meaning; leave it out")
        return path
    if path.exists():
        raise ConversionError(f"{source} is a file, but a checkpoint is a directory; give the directory it lies in")
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ConversionError(f"there is no directory {source}; check the path")
    wanted = ["*.json", "*.txt", "*.safetensors"]
    try:
        directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        if not any(directory.glob("*.safetensors")):
            wanted = ["*.json", "*.txt", "pytorch_model*.bin"]
            directory = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
        return directory
    except GatedRepoError as error:
        raise ConversionError(
            f"{name} asks for access that you do not have; request it, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ConversionError(f"{name} has no revision {revision!r}; check its branches and tags") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConversionError(f"there is neither a directory nor a hub repository {name!r}; check the name") from error
    except (OSError, ConnectionError) as error:
        raise ConversionError(
            f"{name!r} is no directory here, and the hub cannot be reached ({error.__cause__ or error}); connect to "
            "the network, or give the directory of a downloaded checkpoint"
        ) from error


def check_checkpoint(directory: Path, model_type: str, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Reads all of a checkpoint before anything trusts it.

    Returns:
        sha256 and size of each file that was read.

    Raises:
        ConversionError: another kind of model; a file that is missing, truncated or corrupt; a tensor that is missing,
            unexpected, of the wrong shape or not finite.
    """
    progress = progress or Progress()
    config = _read_config(directory, model_type)
    files = _weight_files(directory)
    progress.step("Hashing the source", sum(path.stat().st_size for path in files))
    hashes = {path.name: _digest(path, progress) for path in [directory / "config.json", *files]}

    expected, optional = _expected_shapes(config)
    prefix = GPT2_PREFIX if model_type == "gpt2" else SCRATCH_PREFIX
    progress.step("Checking the tensors", sum(path.stat().st_size for path in files))
    seen: dict[str, str] = {}
    for path in files:
        for name, tensor in _tensors(path):
            progress.advance(tensor.nbytes)
            bare = name.removeprefix(prefix)
            if model_type == "gpt2" and any(pattern.search(bare) for pattern in _DROPPED):
                continue
            if bare in seen:
                raise ConversionError(f"{path.name} holds {name!r}, which is there already as {seen[bare]!r}; keep one")
            seen[bare] = name
            if bare not in expected:
                raise ConversionError(
                    f"{path.name} holds the tensor {name!r}, which a {model_type} language model of this config.json "
                    "does not have; take weights and config from the same language model"
                )
            if tensor.shape != expected[bare]:
                raise ConversionError(
                    f"{name!r} in {path.name} has shape {list(tensor.shape)}, but by config.json it must be "
                    f"{list(expected[bare])}; take weights and config from the same model"
                )
            if not torch.isfinite(tensor).all():
                bad = int((~torch.isfinite(tensor)).sum())
                raise ConversionError(
                    f"{name!r} in {path.name} has {bad} values that are NaN or infinite, but weights are finite; "
                    "take an earlier checkpoint"
                )
    missing = sorted(expected.keys() - seen.keys() - optional)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConversionError(
            f"{directory} lacks {', '.join(repr(name) for name in missing[:5])}{more}, which config.json promises; "
            "take weights and config from the same model, and all shards"
        )
    return hashes


@contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well and disappears when it does not.

    Raises:
        ConversionError: there is something at `target`, and `overwrite` is not set.
    """
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file, but the target is a directory; choose another name")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ConversionError(f"{target} exists already; choose another target, or pass --overwrite to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.incomplete")
    replaced = staging.with_suffix(".replaced")
    try:
        staging.mkdir()
        yield staging
        for path in (*staging.rglob("*"), staging):
            _fsync(path)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
        _fsync(target.parent)
    finally:  # an interruption may come between any two of the lines above
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for rest in (replaced, staging):
            shutil.rmtree(rest, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(target: Path, needed: int) -> None:
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{existing} has {free / 1e9:.2f} GB free, but the target needs {needed / 1e9:.2f} GB; free some space or "
            "choose a target on another disk"
        )


def _read_config(directory: Path, model_type: str) -> GPT2Config | GPTScratchConfig:
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{directory} has no config.json; give the directory of a whole checkpoint") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} is no valid JSON ({error}); download it again") from error
    found = str(values.get("model_type")) if isinstance(values, dict) else "none"
    if found != model_type:
        other = {"gpt2": "convert/gpt2_to_scratch.py", "gpt_scratch": "convert/scratch_to_gpt2.py"}.get(found)
        remedy = f"{other} converts those" if other else "this converter reads no other models"
        raise ConversionError(f"{directory} holds a model of type {found!r}, but {model_type!r} is wanted; {remedy}")
    try:
        if model_type == "gpt2":
            config = GPT2Config.from_dict(values)
            GPTScratchConfig.from_gpt2(config)  # refuses what our model does not do
            return config
        return GPTScratchConfig.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(f"{path} is not usable: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (directory / single).is_file():
            return [directory / single]
        if (directory / index).is_file():
            return _shards(directory / index)
    raise ConversionError(f"{directory} has no {SAFE_WEIGHTS_NAME}, nor any other weights; give a whole checkpoint")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(f"{index} is no valid shard index ({error!r}); download it again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ConversionError(
                f"{index} names the shard {name!r}, but a shard lies beside its index; do not trust it"
            )
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index} names the shard {name!r}, which is missing; download it again")
    return [index.parent / name for name in names]


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a weights file, one at a time."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 -- not a dict
                    yield name, file.get_tensor(name)
        else:
            yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    except (SafetensorError, RuntimeError, EOFError, AttributeError, OSError) as error:
        raise ConversionError(f"{path} is truncated or corrupt ({error}); download it again") from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise ConversionError(f"{path} is a pickle of more than weights ({error}); do not trust it") from error


def _expected_shapes(config: GPT2Config | GPTScratchConfig) -> tuple[Mapping[str, torch.Size], set[str]]:
    """Names without prefix and shapes that the weights must have, and the names that may be missing."""
    with torch.device("meta"):
        if isinstance(config, GPT2Config):
            model, prefix, head = GPT2LMHeadModel(config), GPT2_PREFIX, LM_HEAD.gpt2
        else:
            model, prefix, head = GPTScratchForCausalLM(config), SCRATCH_PREFIX, LM_HEAD.scratch[0]
    shapes = {name.removeprefix(prefix): tensor.shape for name, tensor in model.state_dict().items()}
    return shapes, {head} if config.tie_word_embeddings else set()


def _digest(path: Path, progress: Progress) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            progress.advance(len(chunk))
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def _copy_tokenizer(directory: Path, staging: Path) -> str | None:
    """The class of the tokenizer that travelled along, or None if the source has none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.save_pretrained(staging)
    return type(tokenizer).__name__


def _verify(directory: Path, staging: Path, source_type: str, progress: Progress) -> dict[str, Any]:
    progress.step("Verifying against GPT2LMHeadModel")
    gpt2_directory, scratch_directory = (directory, staging) if source_type == "gpt2" else (staging, directory)
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_directory, dtype=torch.float32)
    scratch = GPTScratchForCausalLM.from_pretrained(scratch_directory, dtype=torch.float32)
    return verify(gpt2, scratch).to_dict()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Our own progress is shown instead of transformers' bars."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
