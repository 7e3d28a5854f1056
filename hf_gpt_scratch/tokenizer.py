"""GPT-2's byte-pair encoding, from tiktoken's copy, as a transformers tokenizer."""

from itertools import pairwise
from pathlib import Path

import tiktoken
from tokenizers.models import BPE
from transformers import GPT2Tokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# File names of GPT-2's merges and vocabulary in tiktoken's cache directory.
CACHED_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")


def gpt2_tokenizer() -> GPT2Tokenizer:
    """The tokenizer of the official checkpoints: 50,257 tokens, no padding token, at most 1024 tokens.

    Raises:
        OSError: tiktoken has no copy of the vocabulary and cannot fetch one.
    """
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken passes on whatever its download raised
        raise OSError(
            f"GPT-2's vocabulary is not cached and cannot be fetched ({type(error).__name__}); set TIKTOKEN_CACHE_DIR "
            f"to a directory with tiktoken's files {' and '.join(CACHED_FILES)}, or connect to the network once"
        ) from error
    ranks = encoding._mergeable_ranks
    letter = bytes_to_unicode()  # byte -> the printable character that stands for it in vocab.json
    spell = {token: "".join(letter[byte] for byte in token) for token in ranks}
    vocab = {spell[token]: rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = [
        tuple(spell[part] for part in last_merge(token, rank, ranks))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]
    # Pairs are accepted; only the annotation omits them.
    return GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=1024)  # type: ignore[arg-type]


def complete_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds GPT-2's vocab.json and merges.txt to a saved tokenizer, which other programs read.

    transformers writes only tokenizer.json.
    """
    old = ("vocab.json", "merges.txt")
    if not isinstance(tokenizer, GPT2Tokenizer) or any((directory / name).exists() for name in old):
        return
    if isinstance(tokenizer.backend_tokenizer.model, BPE):
        tokenizer.backend_tokenizer.model.save(str(directory))


def last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The pair that byte-pair encoding merged into `token`, by applying all earlier merges to its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    left, right = parts
    return left, right
