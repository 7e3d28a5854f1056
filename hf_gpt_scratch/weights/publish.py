"""Publishes a directory completely or not at all, with a receipt by which it can be checked later.

Only what a conversion has written is ever deleted: `--overwrite` replaces a directory only if it matches its receipt.
"""

import ctypes
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import filelock
import torch
import transformers
from rich.filesize import decimal
from safetensors import SafetensorError

from ..errors import ConversionError, shortened, some
from .checkpoint import Progress, as_progress, read_json

RECEIPT = "conversion_receipt.json"
_CHUNK = 1 << 20
# The errors of renameat2 if the kernel or the file system does not support it.
_NO_RENAMEAT2 = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100  # linux/fs.h, fcntl.h
_SECONDS_FOR_THE_LOCK = 0.5  # a process that has just released it still removes its file


# Targets


def local_path(path: str | os.PathLike) -> Path:
    """A path, with `~` expanded.

    Raises:
        ConversionError: it is empty or not a valid path.
    """
    text = os.fspath(path)
    if not text:
        raise ConversionError("got an empty path; give the name of a directory or file")
    if "\0" in text:
        raise ConversionError(f"the path {shortened(text)!r} contains a null character, which no path can; correct it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversionError(
            f"the path {shortened(text)!r} is not UTF-8, which safetensors cannot read or write; rename it"
        ) from error
    try:
        expanded = Path(text).expanduser()
        expanded.lstat()
    except RuntimeError as error:  # ~nosuch
        raise ConversionError(
            f"{shortened(text)!r} begins with the home directory of an unknown user; write out the path"
        ) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConversionError(f"{shortened(text)!r} is too long for a path here; correct or shorten it") from error
    return expanded


def target_path(target: str | os.PathLike) -> Path:
    """The path of a target, with all links followed.

    Raises:
        ConversionError: no directory can be created there, or it could not be replaced as a whole.
    """
    path = local_path(target)
    shown = shortened(str(path))
    try:
        if path.is_symlink() and not path.exists():
            raise ConversionError(
                f"the target {shown} is a link to {shortened(os.readlink(path))}, which does not exist; remove the "
                "link, or choose another target"
            )
        real = Path(os.path.realpath(path))
        real.lstat()
    except FileNotFoundError:
        pass
    except NotADirectoryError as error:
        raise ConversionError(
            f"the target {shown} would be inside a file; choose a target whose parents are directories"
        ) from error
    except OSError as error:
        raise ConversionError(
            f"the target {shown} cannot be created ({error.strerror}); choose another target"
        ) from error
    if real.exists() and not real.is_dir():
        raise ConversionError(f"{shown} is a file, but the target must be a directory; choose another name")
    if os.path.ismount(real):
        raise ConversionError(
            f"the target {shown} is the root of a file system, which cannot be replaced as a whole; choose a directory "
            "within it"
        )
    if real.exists() and os.path.samefile(real, os.curdir):
        raise ConversionError(
            f"the target {shown} is the working directory, which cannot be replaced as a whole; choose a directory "
            "within it"
        )
    return real


def refuse_overlap(target: Path, source: Path, overwrite: bool) -> None:
    """Refuses a target that is the source, contains it or is inside it, under whatever names and links.

    A new directory inside the source is allowed unless `overwrite` is set, since nothing can be lost.

    Raises:
        ConversionError: it is one of these.
    """

    def same(a: Path, b: Path) -> bool:
        try:
            return os.path.samefile(a, b)
        except OSError:  # one of them does not exist
            return a == b

    source = Path(os.path.realpath(source))
    inside = sorted(source.iterdir()) if source.is_dir() else []
    for path in (source, *(Path(os.path.realpath(path)) for path in inside)):
        for place in (target, *_beside(target)):
            if any(same(place, parent) for parent in (path, *path.parents)):
                raise ConversionError(f"the target {place} is or contains the source {path}; choose another target")
    fresh = not overwrite and not os.path.lexists(target)
    if source.is_dir() and not fresh and any(same(source, place) for place in target.parents):
        raise ConversionError(f"the target {target} is inside the source {source}; choose a target outside it")


@contextmanager
def errors_explained(doing: str, target: str | os.PathLike) -> Iterator[None]:
    """Turns errors of the system into ConversionErrors.

    Raises:
        ConversionError: a file cannot be read or written.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        raise ConversionError(
            f"failed while {doing}: {shortened(str(error), 500)}; {shortened(str(target))} is unchanged; free "
            "disk space, check permissions or choose another target, then run again"
        ) from error


@contextmanager
def publishing(target: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """`atomic_directory`, on a disk that has room for `needed` bytes.

    Raises:
        ConversionError: as `atomic_directory`; or the disk is too full, or the system reports another error.
    """
    with errors_explained("writing the target", target):
        check_space(target, needed)
        with atomic_directory(target, overwrite) as staging:
            yield staging


@contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory to fill, which becomes `target` if the block succeeds and is removed if it fails.

    An old target is exchanged for the new one in one step, so that one of them exists whenever the process is killed.
    Where the system does not support this (outside Linux, and on some network file systems), the old one is renamed
    first: after a kill at that moment it lies beside the target, under a name that ends in `.replaced`, until the next
    run restores it. Anything else that a killed process has left there is removed first. A lock keeps other processes
    away from the target while this one runs.

    Raises:
        ConversionError: `target` exists and may not be replaced, or another process is writing it.
    """
    lock, staging, replaced = _beside(target)
    held = filelock.FileLock(lock)
    missing = [parent for parent in target.parents if not parent.exists()]  # innermost first
    try:
        with _uninterrupted():
            target.parent.mkdir(parents=True, exist_ok=True)
            _acquire(held, target)
            _clear(target, staging, replaced)
            old = _replaceable(target, overwrite)
            staging.mkdir()
        yield staging
        for path in (*staging.rglob("*"), staging):
            _fsync(path)
        with _uninterrupted():
            if old:
                staging.chmod(stat.S_IMODE(target.stat().st_mode))
                _replace(target, staging, replaced, old)
            else:
                if old is not None:
                    target.rmdir()
                _rename_without_replacing(staging, target)
            _fsync(target.parent)
    finally:
        with _uninterrupted():
            try:
                if held.is_locked:
                    _clear(target, staging, replaced)
            finally:
                _release(held, lock)
                if not target.exists():
                    with suppress(OSError):  # not empty: another program has put files there
                        for parent in missing:
                            parent.rmdir()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delays SIGINT and SIGTERM until the end of the block, so that it is never interrupted half done."""
    came: list[int] = []
    usual: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not None:  # None: the handler is not Python's
                usual[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for replaced, handler in usual.items():
            signal.signal(replaced, handler)
        for late in came:
            signal.raise_signal(late)


def _beside(target: Path) -> tuple[Path, Path, Path]:
    """The paths of the lock, the unfinished target and the renamed old target; each run removes them at its end."""
    lock, staging, replaced = (f".{target.name}.hf_gpt_scratch.{what}" for what in ("lock", "incomplete", "replaced"))
    return target.with_name(lock), target.with_name(staging), target.with_name(replaced)


def _replaceable(target: Path, overwrite: bool) -> dict[str, tuple] | None:
    """The entries of an old target, which will be replaced; None if there is none.

    Raises:
        ConversionError: it may not be replaced.
    """
    if not os.path.lexists(target):
        return None
    if target.is_symlink() or not target.is_dir():
        raise ConversionError(f"{target} is a file, but the target must be a directory; choose another name")
    if not any(target.iterdir()):
        return {}
    if not overwrite and _has_receipt(target):
        raise ConversionError(
            f"{target} exists already; choose another target, or pass --overwrite "
            "(in Python overwrite=True) to replace it"
        )
    if not _has_receipt(target):
        raise ConversionError(
            f"{target} exists already and has no {RECEIPT}, so no conversion has written it, and --overwrite does not "
            "replace it; move it away yourself, or choose another target"
        )
    entries = _entries(target)
    if changes := _differences(target, read_receipt(target), entries, Progress()):
        raise ConversionError(
            f"{target} has changed since its conversion ({changes}), so --overwrite does not replace it; move away "
            "what you want to keep and delete the rest yourself, or choose another target"
        )
    return entries


def _replace(target: Path, staging: Path, replaced: Path, old: Mapping[str, tuple]) -> None:
    """Replaces `target`, whose entries are `old`, by `staging`.

    Raises:
        ConversionError: `target` has changed meanwhile, and is left alone.
    """
    changed = ConversionError(
        f"another program has changed {target} while its replacement was written, so it was left alone; check it, "
        "then run again"
    )
    if _rename2(staging, target, _EXCHANGE):
        if _entries(staging) != old:
            _rename2(staging, target, _EXCHANGE)
            raise changed
        return
    _rename_without_replacing(target, replaced)
    if _entries(replaced) != old:
        _rename_without_replacing(replaced, target)
        raise changed
    _rename_without_replacing(staging, target)


def _rename_without_replacing(path: Path, target: Path) -> None:
    """Renames a directory without replacing another one.

    Where the system has no such call, an empty directory that another program makes at the last moment is replaced.

    Raises:
        ConversionError: `target` exists.
    """
    try:
        if _rename2(path, target, _NOREPLACE):
            return
        if os.path.lexists(target):
            raise FileExistsError
        path.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise ConversionError(
                f"another program has created {target} meanwhile, so it was left alone; choose another target, or move "
                "it away"
            ) from error
        raise


def _rename2(path: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2; False where it is not supported.

    Raises:
        OSError: it fails.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_RENAMEAT2:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(target))


def _acquire(lock: filelock.BaseFileLock, target: Path) -> None:
    """Acquires a lock, which the system releases when the process ends, however it ends."""
    try:
        lock.acquire(timeout=_SECONDS_FOR_THE_LOCK)
    except filelock.Timeout as error:
        raise ConversionError(
            f"another process is writing {target} at this moment; wait for it to end, or choose another target"
        ) from error


def _release(held: filelock.BaseFileLock, lock: Path) -> None:
    if not held.is_locked:
        return
    if sys.platform == "win32":  # Windows cannot remove an open file
        held.release()
        with suppress(OSError):
            lock.unlink()
    else:  # a process that waits for it notices the removal, and tries again
        lock.unlink(missing_ok=True)
        held.release()


def _clear(target: Path, staging: Path, replaced: Path) -> None:
    """Removes what a run has left beside its target, and restores an old target that it had renamed."""
    if os.path.lexists(replaced) and not os.path.lexists(target):
        _rename_without_replacing(replaced, target)
    for rest in (replaced, staging):
        if not os.path.lexists(rest):
            continue
        if rest.is_symlink() or not rest.is_dir():
            raise ConversionError(
                f"{rest} is in the way, and no conversion has created it; move it away, then run again"
            )
        if _has_receipt(rest):
            _remove_by_receipt(rest)
        elif rest == staging:  # the receipt is written last
            shutil.rmtree(rest, ignore_errors=True)
        elif any(rest.iterdir()):
            raise ConversionError(f"{rest} is in the way, and has no {RECEIPT}; move it away, then run again")
        else:
            rest.rmdir()


def _remove_by_receipt(directory: Path) -> None:
    """Removes a directory's files that its receipt names; if there are others, they and the receipt stay."""
    named = _named(read_receipt(directory))
    entries = _entries(directory)
    folders = [name for name in entries if name.endswith("/")]
    for name in entries.keys() & named.keys():
        (directory / name).unlink()
    with suppress(OSError):  # not empty, which is reported below
        for name in sorted(folders, key=len, reverse=True):
            (directory / name).rmdir()
    if rest := sorted(_entries(directory).keys() - {RECEIPT}):
        raise ConversionError(
            f"{directory} holds {some(rest)}, which no conversion has written; move that away, then run again"
        )
    (directory / RECEIPT).unlink()
    directory.rmdir()


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(target: Path, needed: int) -> None:
    """Checks, before anything is written, that the disk has room for `needed` bytes.

    Raises:
        ConversionError: it has not.
    """
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{existing} has {decimal(free)} free, but the target needs {decimal(needed)}; free some space or choose a "
            "target on another disk"
        )


# Hashes


def digests(
    paths: Iterable[Path], progress: Progress | None = None, stop: threading.Event | None = None
) -> dict[Path, dict[str, Any]]:
    """sha256 and size of each file; nothing if `stop` is set meanwhile."""
    figures = {}
    buffer = memoryview(bytearray(_CHUNK))  # one for all files: allocating memory costs as much as reading
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


class Stamps:
    """The state of a source's files before the first of them was opened, by which a later change is noticed.

    Args:
        folders: those of a directory in which its files lie.
    """

    def __init__(self, source: Path, folders: Iterable[str] = (".",)):
        inside = [path for folder in folders for path in (source / folder).glob("*")]
        self.stamps = {path: _stamp(path) for path in (inside if source.is_dir() else [source])}

    @contextmanager
    def hashed_meanwhile(self, paths: Iterable[Path]) -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
        """Hashes files in another thread during the block, and stops at its end.

        Yields a function to call when everything has been read, which returns sha256 and size by file name. They are
        those of the bytes that were read: it raises ConversionError if a file has changed since the stamps were taken.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(digests, sorted(set(paths), key=lambda path: path.name), None, stop)

            def result() -> dict[str, dict[str, Any]]:
                found = future.result()
                for path in found:
                    if path not in self.stamps or self.stamps[path] != _stamp(path):
                        raise ConversionError(
                            f"{path} has changed while it was read; run again when no other program is writing it"
                        )
                return by_name(found)

            try:
                yield result
            finally:
                stop.set()


def _stamp(path: Path) -> tuple | None:
    """What changes when a file is written to or replaced; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def by_name(hashes: Mapping[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of `digests`, sorted by the files' names."""
    return {path.name: hashes[path] for path in sorted(hashes, key=lambda path: path.name)}


# Receipts


def program_version() -> str:
    """The version of this package, as it was installed."""
    try:
        return importlib.metadata.version("hf-gpt-scratch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def new_receipt(what: str, **entries: Any) -> dict[str, Any]:
    """A receipt: what was converted, when, and with which versions; `entries` come in between."""
    versions = {"hf_gpt_scratch": program_version(), "torch": torch.__version__}
    return {
        "what": f"{what} by hf_gpt_scratch",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **entries,
        "versions": {**versions, "transformers": transformers.__version__, "python": platform.python_version()},
    }


def seal(directory: Path, receipt: dict[str, Any], known: Mapping[str, dict[str, Any]]) -> None:
    """Adds sha256 and size of every file to the receipt, and writes it beside them.

    Args:
        known: the figures of files that were hashed when they were written, by name.
    """
    files = [path for path in directory.rglob("*") if not path.is_dir()]
    names = {path: path.relative_to(directory).as_posix() for path in files}
    hashed = digests(path for path in files if names[path] not in known)
    figures = {**known, **{names[path]: figures for path, figures in hashed.items()}}
    receipt["target"] = {"files": dict(sorted(figures.items()))}
    # Completely or not at all: what a killed run has left is known to be incomplete by the missing receipt.
    part = directory / f"{RECEIPT}.part"
    part.write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")
    part.replace(directory / RECEIPT)


def read_receipt(directory: Path) -> dict[str, Any]:
    """The receipt in a directory.

    Raises:
        ConversionError: there is none, or it is not valid.
    """
    path = directory / RECEIPT
    if not directory.is_dir():
        raise ConversionError(f"there is no directory {directory}; check the path")
    if not _has_receipt(directory):
        raise ConversionError(f"{directory} has no {RECEIPT}; give a directory that a conversion has written")
    receipt = read_json(path)
    if problem := _problem(receipt):
        raise ConversionError(f"{path} is not a valid receipt: {problem}; convert the checkpoint again")
    return receipt


def _has_receipt(directory: Path) -> bool:
    return (directory / RECEIPT).is_file() and not (directory / RECEIPT).is_symlink()


def _problem(receipt: Any) -> str | None:
    if not isinstance(receipt, dict):
        return f"it is a {type(receipt).__name__}, but must be an object"
    for name in ("what", "created"):
        if not isinstance(receipt.get(name), str):
            return f"{name!r} is {shortened(repr(receipt.get(name)))}, but must be a string"
    try:
        datetime.datetime.fromisoformat(receipt["created"])
    except ValueError:
        return f"'created' is {shortened(repr(receipt['created']))}, but must be a date and time"
    parity = receipt.get("parity")
    if parity is not None and not (isinstance(parity, dict) and isinstance(parity.get("passed"), bool)):
        return f"'parity' is {shortened(repr(parity))}, but must be null, or have figures and 'passed'"
    files = receipt["target"].get("files") if isinstance(receipt.get("target"), dict) else None
    if not isinstance(files, dict) or not files:
        return f"'target' is {shortened(repr(receipt.get('target')))}, but must have 'files'"
    for name, figures in files.items():
        if not _is_below(name):
            return f"it names the file {shortened(repr(name))}, but its files must be inside its own directory"
        sha256, size = (figures.get(key) if isinstance(figures, dict) else None for key in ("sha256", "bytes"))
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            shown = shortened(repr(sha256))
            return f"the sha256 of {shortened(repr(name))} is {shown}, but must be 64 digits of 0-9 and a-f"
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            return f"the bytes of {shortened(repr(name))} are {shortened(repr(size))}, but must be a whole number"
    return None


def _is_below(name: str) -> bool:
    """Whether a receipt may name such a file: by a relative path without detours, and not the receipt itself."""
    plain = PurePosixPath(name)
    parts_are_plain = not plain.is_absolute() and ".." not in plain.parts and str(plain) == name
    return parts_are_plain and name not in (".", RECEIPT) and "\0" not in name and "\\" not in name


def _named(receipt: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return receipt["target"]["files"]


def verify_receipt(directory: str | os.PathLike, progress: Progress | None = None) -> dict[str, Any]:
    """Compares a converted directory with its receipt: every file, and anything extra.

    The receipt detects accidents, not forgery: whoever can change a file can change the receipt.

    Returns:
        the receipt.

    Raises:
        ConversionError: there is no receipt; or files are missing, extra or changed; the message names them.
    """
    directory = local_path(directory)
    try:
        receipt = read_receipt(directory)
        changes = _differences(directory, receipt, _entries(directory), as_progress(progress))
    except OSError as error:
        raise ConversionError(f"{directory} cannot be read ({error}); check its permissions") from error
    if changes:
        raise ConversionError(
            f"{directory} has changed since its conversion ({changes}); convert the checkpoint again, or restore the "
            "files"
        )
    return receipt


def _differences(directory: Path, receipt: Mapping[str, Any], entries: Mapping[str, tuple], progress: Progress) -> str:
    """What is missing, extra or changed, for messages; empty if nothing is."""
    named = _named(receipt)
    folders = {f"{parent}/" for name in named for parent in PurePosixPath(name).parents if parent.name}
    plain = {name for name in named.keys() & entries.keys() if stat.S_ISREG(entries[name][0])}
    same_size = {name: directory / name for name in sorted(plain) if entries[name][2] == named[name]["bytes"]}
    progress.step(f"Hashing {directory}", sum(entries[name][2] for name in same_size))
    hashed = digests(same_size.values(), progress)
    same = {name for name, path in same_size.items() if hashed[path] == {k: named[name][k] for k in hashed[path]}}
    wrong = {
        "missing": named.keys() - entries.keys(),
        "extra": entries.keys() - named.keys() - folders - {RECEIPT},
        "changed": (named.keys() & entries.keys()) - same,
    }
    return "; ".join(f"{kind}: {some(sorted(names))}" for kind, names in wrong.items() if names)


def _entries(directory: Path) -> dict[str, tuple]:
    """Everything in a directory, by relative path: mode, inode, size and modification time; links are not followed.

    The names of directories end in a slash.
    """
    found, folders = {}, [""]
    while folders:  # no recursion, since a directory can be too deep for it
        below = folders.pop()
        with os.scandir(f"{directory}/{below}") as entries:
            for entry in entries:
                about, name = entry.stat(follow_symlinks=False), below + entry.name
                if stat.S_ISDIR(about.st_mode):
                    name += "/"
                    folders.append(name)
                found[name] = (about.st_mode, about.st_ino, about.st_size, about.st_mtime_ns)
    return found
