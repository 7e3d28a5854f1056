"""The tokenizer beside a checkpoint: loaded as transformers loads it, copied, and checked to give the same ids."""

import fnmatch
import json
import shutil
from pathlib import Path

from tokenizers.models import BPE
from transformers import AutoTokenizer, GPT2Config, GPT2Tokenizer, PreTrainedTokenizerBase

from ..errors import ConversionError
from .checkpoint import read_json

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
        tokenizer(SAMPLE, verbose=False)  # some settings are used only now
    except Exception as error:  # the tokenizers library raises errors of many types
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


def carry_tokenizer(source: Path, target: Path) -> tuple[str | None, list[str]]:
    """Copies the tokenizer of one checkpoint to another, whose config.json must be written already.

    Returns:
        its class, and notes on what was left behind.

    Raises:
        ConversionError: it cannot be loaded, or the copy behaves differently.
    """
    tokenizer = tokenizer_beside(source)
    if tokenizer is None:
        return None, [*left_behind(source, "there is no vocabulary beside them"), *_below(source)]
    _copy(source, target, tokenizer)
    _complete(target, tokenizer)
    carried = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    texts = _texts(tokenizer)
    if _behaviour(carried, texts) != _behaviour(tokenizer, texts):
        raise _refusal(source, f"is a {type(tokenizer).__name__} that gives different ids beside the converted model")
    return type(tokenizer).__name__, []


def _copy(source: Path, target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    names = _files(source, (*VOCABULARIES, *SETTINGS))
    if not names:  # OpenAI's
        tokenizer.save_pretrained(target)
        return
    for name in names:  # copied, since saving may change the tokenizer
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        else:
            shutil.copyfile(source / name, target / name)
    settings = target / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    if not values.get("tokenizer_class"):  # it came from the model's type or from config.json
        values["tokenizer_class"] = type(tokenizer).__name__
        settings.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _complete(target: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds vocab.json and merges.txt, which other programs read; transformers writes only tokenizer.json."""
    old = ("vocab.json", "merges.txt")
    if not isinstance(tokenizer, GPT2Tokenizer) or any((target / name).exists() for name in old):
        return
    if isinstance(tokenizer.backend_tokenizer.model, BPE):
        tokenizer.backend_tokenizer.model.save(str(target))


def left_behind(directory: Path, reason: str) -> list[str]:
    """A note that names the tokenizer files that are not copied; empty if there are none."""
    names = _files(directory, (*VOCABULARIES, *SETTINGS, *OPENAI_FILES))
    return [f"left behind, since {reason}: {', '.join(names[:20])}"] if names else []


def _below(directory: Path) -> list[str]:
    """A note on tokenizer files in folders of a checkpoint, which are not used; empty if there are none."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    names = [f"{folder.name}/{name}" for folder in folders for name in _files(folder, VOCABULARIES)]
    shown = ", ".join(name[:200] for name in names[:5])
    return [f"left behind, since a tokenizer must lie beside the weights, not in a folder: {shown}"] if names else []


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that show whether two tokenizers are the same: a sample, some tokens, the special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), 300))))
    words = [token.replace("Ġ", " ").replace("▁", " ") for token in tokens if isinstance(token, str)]
    special = [str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())]
    return [SAMPLE, " ".join(words), "".join(special), "a".join(special)]


def _behaviour(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple:
    """What must not change when it is copied."""
    ids = [tokenizer(text, verbose=False).input_ids for text in texts]
    return type(tokenizer), len(tokenizer), ids, tokenizer.special_tokens_map, tokenizer.chat_template


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
        "files out of the directory, or out of a copy of it"
    )
