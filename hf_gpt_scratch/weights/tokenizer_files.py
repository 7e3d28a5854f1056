"""The tokenizer of a checkpoint: read as transformers reads it, and carried along with the ids that it gives.

Where files of weights have none, it is found elsewhere: nanoGPT's characters in meta.pkl, GPT-2's by its size.
"""

import fnmatch
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import ConversionError, shortened
from ..tokenizer import complete_tokenizer, gpt2_tokenizer
from .checkpoint import read_json
from .formats.format import Source
from .hub import find_tokenizer
from .torch_archive import ForbiddenName, load_values

OPENAI_FILES = ("encoder.json", "vocab.bpe")
VOCABULARIES = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "tekken.json"),
    *("*.model", "*.spm", "*.tiktoken"),
)
# These mean nothing without a vocabulary, except for tokenizers that need none.
SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("chat_template.json", "additional_chat_templates"),
)
META = "meta.pkl"  # nanoGPT's name for the characters of a data set
# GPT-2's own, and nanoGPT's when it trains on GPT-2's tokens: the next multiple of 64.
GPT2_SIZES = (50257, 50304)
REMEDY = "give the model's own with --tokenizer DIRECTORY"
LARGEST_META = 1 << 26  # bytes; that of a data set of characters has some hundreds
SAMPLE = "Every effort moves you; it's 3.14 % of 2,700! \n\n\tNaïve 日本語 🤗 Ünïcödé  `x_1 = {'a': [0]}`"


def tokenizer_beside(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a directory, in transformers' files or OpenAI's; None if there is none.

    Raises:
        ConversionError: there are tokenizer files, but they cannot be loaded.
    """
    vocabulary = _files(directory, VOCABULARIES)
    try:
        if not vocabulary and all((directory / name).is_file() for name in OPENAI_FILES):
            vocab, merges = (str(directory / name) for name in OPENAI_FILES)
            return GPT2Tokenizer(vocab=vocab, merges=merges)
        if not vocabulary and not _files(directory, SETTINGS):
            return None
        tokenizer = AutoTokenizer.from_pretrained(directory, config=_config(directory), trust_remote_code=False)
        tokenizer(_words(tokenizer)[0], verbose=False)  # some settings are looked at only now
    except Exception as error:  # the files are the tokenizers library's, and so are the kinds of errors
        reason = " ".join(str(error).split())[:500]
        raise _refusal(directory, f"cannot be read ({type(error).__name__}: {reason})") from error
    wanted = set(tokenizer.vocab_files_names.values())
    lacking = {name for name in wanted if not (directory / name).is_file()}
    if (tokenizer.is_fast and "tokenizer.json" in vocabulary) or lacking <= {"tokenizer.json"}:
        return tokenizer
    if not vocabulary:  # settings without their tokenizer
        return None
    raise _refusal(
        directory,
        f"is loaded by AutoTokenizer as a {type(tokenizer).__name__}, which needs {', '.join(sorted(wanted))} and "
        'finds no vocabulary here; if that class is wrong, set the right "tokenizer_class" in tokenizer_config.json',
    )


@dataclass(frozen=True)
class Chosen:
    """The tokenizer of a conversion.

    Args:
        tokenizer: None if there is none.
        directory: where its files lie, to be copied as they are; None if it was made here.
        notes: where it is from if not from the source, and what was left behind, in sentences.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    directory: Path | None = None
    notes: list[str] = field(default_factory=list)


def choose_tokenizer(asked: str | os.PathLike | None, source: Source, vocab_size: int) -> Chosen:
    """The tokenizer that is asked for, or else the source's, or else GPT-2's if the vocabulary has its size.

    Args:
        asked: "none"; "gpt2", for GPT-2's from tiktoken's copy; a directory, a meta.pkl, or a hub id.

    Raises:
        ConversionError: that which is asked for cannot be had or has ids beyond the vocabulary, or the source's cannot
            be read.
    """
    path = source.path
    left = [] if path.is_dir() else _left_beside(path)
    if asked is not None:
        chosen = _asked(asked)
        if chosen.tokenizer is not None and (beyond := _beyond(chosen.tokenizer, vocab_size)):
            raise ConversionError(f"the tokenizer {asked} {beyond}; {REMEDY}")
        within = ["left behind, since --tokenizer says so: the tokenizer inside the file"] if source.tokenizer else []
        beside = left_behind(path, "--tokenizer says so") if path.is_dir() and path != chosen.directory else []
        return replace(chosen, notes=[*within, *beside])
    if path.is_dir():
        if (found := tokenizer_beside(path)) is not None:
            named = _files(path, (*VOCABULARIES, *SETTINGS))
            return Chosen(found, path if named else None)  # OpenAI's files are not transformers'
        left = [*left_behind(path, "there is no vocabulary beside them"), *_below(path)]
        if left:  # there was another tokenizer
            return Chosen(notes=left)
    elif source.tokenizer:
        try:
            inside = source.tokenizer()
            if beyond := _beyond(inside, vocab_size):
                raise ConversionError(f"the tokenizer inside {path.name}, which {beyond}")
            return Chosen(inside, notes=left)
        except ConversionError as error:
            return Chosen(notes=[f"left behind: {error}; {REMEDY}", *left])
    elif (path.parent / META).is_file():
        try:
            characters = character_tokenizer(path.parent / META)
            if len(characters) == vocab_size:
                return Chosen(
                    characters, notes=[f"the tokenizer is that of the characters in {path.parent / META}", *left]
                )
            left.append(
                f"left behind: {META}, which has {len(characters)} characters, while vocab_size is {vocab_size}"
            )
        except ConversionError as error:
            left.append(f"left behind: {error}")
    if vocab_size not in GPT2_SIZES:
        return Chosen(notes=left)
    try:
        told = (
            "there is no tokenizer, but the vocabulary has the size of GPT-2's, whose tokenizer is taken; if the model "
            "was trained with another one, give that: --tokenizer DIRECTORY"
        )
        return Chosen(gpt2_tokenizer(), notes=[told, *left])
    except OSError as error:
        told = f"GPT-2's tokenizer, which suits the vocabulary's size, is not there: {error}; then try again"
        return Chosen(notes=[told, *left])


def _beyond(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """That it has ids which the model does not have, if it has."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    return f"gives ids up to {largest}, while the model's vocab_size is {vocab_size}" if largest >= vocab_size else None


def _asked(name: str | os.PathLike) -> Chosen:
    place = find_tokenizer(name)
    if place is None and str(name) == "none":
        return Chosen()
    if place is None:
        try:
            return Chosen(gpt2_tokenizer())
        except OSError as error:
            raise ConversionError(f"the tokenizer {name} cannot be had: {error}") from error
    if place.is_file():
        return Chosen(character_tokenizer(place))
    found = tokenizer_beside(place)
    if found is None:
        raise ConversionError(f"{place} has no tokenizer; give the directory of one, or a meta.pkl, or gpt2, or none")
    return Chosen(found, place if _files(place, (*VOCABULARIES, *SETTINGS)) else None)


def character_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a meta.pkl of nanoGPT describes: one token for each character. Nothing in it runs.

    A character that it does not have is an error, as it is in nanoGPT.

    Raises:
        ConversionError: the file is damaged, or describes something else.
    """
    try:
        if path.stat().st_size > LARGEST_META:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than characters take")
        values = load_values(path)
    except (ForbiddenName, ValueError, OSError) as error:
        raise ConversionError(
            f"{path} is no meta.pkl of nanoGPT's ({shortened(str(error))}); give the one that prepare.py wrote"
        ) from error
    found = values.get("stoi") if isinstance(values, dict) else None
    stoi: dict[Any, Any] = found if isinstance(found, dict) else {}
    ids = list(stoi.values())
    if (
        not ids
        or not all(isinstance(one, str) and len(one) == 1 for one in stoi)
        or any(type(i) is not int for i in ids)
        or sorted(ids) != list(range(len(ids)))
    ):
        raise ConversionError(
            f"{path} has no 'stoi' that numbers single characters from 0 on, as nanoGPT's prepare.py for characters "
            "writes it; give another, or a directory with the tokenizer in transformers' files"
        )
    itos, vocab_size = values.get("itos", {}), values.get("vocab_size", len(ids))
    if (itos and itos != {number: one for one, number in stoi.items()}) or vocab_size != len(ids):
        raise ConversionError(
            f"{path} contradicts itself: its 'itos' is not the inverse of 'stoi', or its 'vocab_size', "
            f"{str(vocab_size)[:80]}, is not their number, {len(ids)}; take the meta.pkl that prepare.py wrote"
        )
    if any(0xD800 <= ord(one) < 0xE000 for one in stoi):
        raise ConversionError(f"{path} has half a character, which a text in UTF-8 cannot have; correct its 'stoi'")
    backend = Tokenizer(WordLevel(stoi))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


def put_tokenizer(chosen: Chosen, target: Path) -> str | None:
    """Puts a tokenizer beside a checkpoint, whose config.json is there already.

    Returns:
        its class; None if there is none.

    Raises:
        ConversionError: it is another one once it is there.
    """
    tokenizer = chosen.tokenizer
    if tokenizer is None:
        return None
    if chosen.directory is None:
        tokenizer.save_pretrained(target)
    else:
        _copy(chosen.directory, target, tokenizer)
    complete_tokenizer(target, tokenizer)
    _limit(target)
    carried = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    texts = _texts(tokenizer)
    if _behaviour(carried, texts) != _behaviour(tokenizer, texts):
        what = f"is a {type(tokenizer).__name__} that gives different ids beside the converted model"
        raise _refusal(chosen.directory or target, what)
    return type(tokenizer).__name__


def _limit(target: Path) -> None:
    """Writes the model's length into the settings of a tokenizer that says none, or a larger one."""
    settings = target / "tokenizer_config.json"
    values, config = read_json(settings), read_json(target / "config.json")
    length = config.get("context_length", config.get("n_positions"))
    given = values.get("model_max_length")
    if length is not None and (not isinstance(given, int) or given > length):
        values["model_max_length"] = length
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    names = _files(source, (*VOCABULARIES, *SETTINGS))
    for name in names:  # as they are: what is saved anew may be another tokenizer
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copyfile(source / name, target / name)
    settings = target / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    if not values.get("tokenizer_class"):  # it came from the model's type or from config.json
        values["tokenizer_class"] = type(tokenizer).__name__
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def left_behind(directory: Path, reason: str) -> list[str]:
    """A note that names the tokenizer files that are not copied; empty if there are none."""
    names = _files(directory, (*VOCABULARIES, *SETTINGS, *OPENAI_FILES))
    return [f"left behind, since {reason}: {', '.join(names[:20])}"] if names else []


def _left_beside(file: Path) -> list[str]:
    return left_behind(file.parent, f"nothing says that they belong to {file.name}; if they do, {REMEDY}")


def _below(directory: Path) -> list[str]:
    """A note on tokenizer files in folders of a checkpoint, which are not used; empty if there are none."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    names = [f"{folder.name}/{name}" for folder in folders for name in _files(folder, VOCABULARIES)]
    shown = ", ".join(name[:200] for name in names[:5])
    return [f"left behind, since a tokenizer must lie beside the weights, not in a folder: {shown}"] if names else []


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Some of its tokens as they are in a text."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), 300))))
    return [token.replace("Ġ", " ").replace("▁", " ") for token in tokens if isinstance(token, str)] or [SAMPLE]


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What shows whether another tokenizer is the same: a sample, some of its words, its special tokens."""
    words = _words(tokenizer)
    special = [str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())]
    return [SAMPLE, " ".join(words), "".join(words), "".join(special), "a".join(special)]


def _behaviour(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple:
    """What must not change on the way."""
    ids = [_ids(tokenizer, text) for text in texts]
    return type(tokenizer), len(tokenizer), ids, tokenizer.special_tokens_map, tokenizer.chat_template


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | str:
    """The text's ids, or that it has characters that the tokenizer does not know."""
    try:
        return tokenizer(text, verbose=False).input_ids
    except Exception as error:  # the tokenizers library's, which are no more than that
        return str(error)


def _config(directory: Path) -> GPT2Config | None:
    """A config for AutoTokenizer if no config.json names the model's type: all models here are GPT-2s."""
    path = directory / "config.json"
    values = read_json(path) if path.is_file() else {}
    return None if values.get("model_type") else GPT2Config(tokenizer_class=values.get("tokenizer_class"))  # type: ignore[call-arg]  # by **kwargs


def _files(directory: Path, patterns: tuple[str, ...]) -> list[str]:
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _refusal(directory: Path, what: str) -> ConversionError:
    names = _files(directory, (*VOCABULARIES, *SETTINGS, *OPENAI_FILES))
    return ConversionError(
        f"the tokenizer in {directory} ({', '.join(names[:20])}) {what}. To convert the weights alone, take these "
        "files out of the directory, or out of a copy of it, or add --tokenizer none"
    )
