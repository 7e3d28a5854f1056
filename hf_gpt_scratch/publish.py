"""A directory that appears complete or not at all, and the receipt by which it can be checked later."""

import datetime
import fcntl
import hashlib
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from .checkpoint import ConversionError, Progress, read_json

RECEIPT = "conversion_receipt.json"
_CHUNK = 1 << 20


@contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `target` when the block ends well and disappears when it does not.

    What a killed process has left beside `target` is cleared away first, and an old target that it had moved aside is
    put back. A lock keeps a second process off for as long as the first lives.

    Raises:
        ConversionError: there is something at `target`, and `overwrite` is not set; or another process is writing it.
    """
    refuse_existing(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock, staging, replaced = (
        target.with_name(f".{target.name}.hf_gpt_scratch.{what}") for what in ("lock", "incomplete", "replaced")
    )
    with _locked(lock, target):
        _clear(target, staging, replaced)
        refuse_existing(target, overwrite)
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
            _clear(target, staging, replaced)


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Lets no target through that would have to be destroyed unasked.

    Raises:
        ConversionError: there is something at `target`.
    """
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file, but the target is a directory; choose another name")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise ConversionError(f"{target} exists already; choose another target, or pass --overwrite to replace it")


@contextmanager
def _locked(lock: Path, target: Path) -> Iterator[None]:
    """Holds a lock that the system takes back when the process ends, however it ends."""
    while True:
        held = False
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConversionError(
                    f"another process is writing {target} at this moment; wait for it to end, or choose another target"
                ) from error
            with suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(descriptor), lock.stat())
            if not held:
                continue  # its last holder has just removed it
            try:
                yield
            finally:
                lock.unlink()
            return
        finally:
            os.close(descriptor)


def _clear(target: Path, staging: Path, replaced: Path) -> None:
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


def check_space(target: Path, needed: int) -> None:
    """Tells before anything is written that the disk is too full for `needed` bytes.

    Raises:
        ConversionError: it is.
    """
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{existing} has {free / 1e9:.2f} GB free, but the target needs {needed / 1e9:.2f} GB; free some space or "
            "choose a target on another disk"
        )


def digests(
    paths: Iterable[Path], progress: Progress | None = None, stop: threading.Event | None = None
) -> dict[Path, dict[str, Any]]:
    """sha256 and size of each file; of none once `stop` is set."""
    figures = {}
    buffer = memoryview(bytearray(_CHUNK))  # one for all: new memory costs as much as the reading
    for path in paths:
        digest, size = hashlib.sha256(), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                if stop is not None and stop.is_set():
                    return {}
                digest.update(buffer[:count])
                size += count
                if progress is not None:
                    progress.advance(count)
        figures[path] = {"sha256": digest.hexdigest(), "bytes": size}
    return figures


@contextmanager
def hashed_meanwhile(paths: Iterable[Path]) -> Iterator[Future[dict[Path, dict[str, Any]]]]:
    """Hashes files in a thread beside the block, and stops when the block is left."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(digests, paths, None, stop)
        finally:
            stop.set()


def by_name(hashes: Mapping[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of `digests`, sorted by the files' names."""
    return {path.name: hashes[path] for path in sorted(hashes, key=lambda path: path.name)}


def new_receipt(what: str, **entries: Any) -> dict[str, Any]:
    """What was converted, when, and with which versions; `entries` in between."""
    return {
        "what": f"{what} by hf_gpt_scratch",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **entries,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)} | {"python": platform.python_version()},
    }


def write_receipt(directory: Path, receipt: dict[str, Any]) -> None:
    """Puts the receipt beside the files that it is about."""
    (directory / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


def verify_receipt(directory: str | os.PathLike, progress: Progress | None = None) -> dict[str, Any]:
    """Compares a converted directory with its receipt, file by file.

    The receipt tells accidents, not forgers: who can change a file can change the receipt.

    Returns:
        the receipt.

    Raises:
        ConversionError: there is no receipt; or files are missing, extra or changed, each of which is named.
    """
    directory, progress = Path(directory).expanduser(), progress or Progress()
    if not (directory / RECEIPT).is_file():
        raise ConversionError(f"{directory} has no {RECEIPT}; give a directory that a conversion has written")
    receipt = read_json(directory / RECEIPT)
    try:
        expected = {
            str(name): (str(figures["sha256"]), int(figures["bytes"]))
            for name, figures in receipt["target"]["files"].items()
        }
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"{directory / RECEIPT} is no receipt of a conversion ({error!r}); convert the checkpoint again"
        ) from error
    found = {str(path.relative_to(directory)): path for path in directory.rglob("*") if not path.is_dir()}
    del found[RECEIPT]
    both = {name: found[name] for name in sorted(expected.keys() & found.keys()) if found[name].is_file()}
    progress.step(f"Hashing {directory}", sum(path.stat().st_size for path in both.values()))
    hashed = digests(both.values(), progress)
    actual = {name: (hashed[path]["sha256"], hashed[path]["bytes"]) for name, path in both.items()}
    wrong = {
        "missing": expected.keys() - found.keys(),
        "extra": found.keys() - expected.keys(),
        "changed": {name for name in expected.keys() & found.keys() if actual.get(name) != expected[name]},
    }
    if any(wrong.values()):
        told = "; ".join(
            f"{kind}: {', '.join(repr(name) for name in sorted(names))}" for kind, names in wrong.items() if names
        )
        raise ConversionError(
            f"{directory} is not as its conversion left it ({told}); convert the checkpoint again, or restore the files"
        )
    return receipt
