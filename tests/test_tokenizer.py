import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from hf_gpt_scratch import text_to_token_ids, token_ids_to_text
from hf_gpt_scratch.tokenizer import CACHED_FILES, gpt2_tokenizer, last_merge

HARD_TEXTS = [
    "",
    " ",
    "<|endoftext|>",
    "a<|endoftext|><|endoftext|> b <|endoftext",
    "Every effort moves you",
    "  leading, trailing and   runs of    spaces     ",
    "what clean-up would join : do n't , you 're . ' x ' !",
    "\t\n\r\n\x0b\x0c \u00a0\u2003\u200b end",
    "\x00\x01\x02\x1b[0m\x7f\x80\x9f",
    "👩‍👩‍👧‍👦 🤗 🏳️‍🌈 🇩🇪 ☝🏽",
    "日本語の文章。中文字符，한국어 텍스트",
    "e\u0301 e\u0301\u0302\u0303 a\u0308 n\u0303 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "العربية עברית हिन्दी ไทย",
    "I'm you're he'll it's 'tis DON'T isn't",
    "x = {'a': [1, 2.5e-10], \"b\": None}  # 100% !?;",
    "0123456789 ²³ ½ Ⅷ ٣",
    "\ufeff\ufffd\uffff\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
]


@contextmanager
def skip_without_vocabulary():
    try:
        yield
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def ours():
    with skip_without_vocabulary():
        return gpt2_tokenizer()


@pytest.fixture(scope="module")
def theirs(ours):
    return tiktoken.get_encoding("gpt2")


@pytest.fixture(scope="module")
def original(ours, tmp_path_factory):
    """The tokenizer that transformers reads from OpenAI's own two files, as tiktoken caches them."""
    directory = tmp_path_factory.mktemp("original")
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", f"{tempfile.gettempdir()}/data-gym-cache"))
    with skip_without_vocabulary():  # tiktoken may hold it in memory and keep no files
        for cached, name in zip(CACHED_FILES, ("merges.txt", "vocab.json"), strict=True):
            shutil.copy(cache / cached, directory / name)
    return GPT2Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def reloaded(ours, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    ours.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.slow
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_ids_of_hard_text(text, ours, theirs, original, reloaded):
    ids = theirs.encode(text, allowed_special="all")
    assert ours(text).input_ids == original(text).input_ids == reloaded(text).input_ids == ids
    assert ours.decode(ids) == reloaded.decode(ids) == theirs.decode(ids) == text


any_text = st.text() | st.text(st.characters(codec="utf-8", categories=["So", "Mn", "Zs", "Cc", "Lo", "Sk"]))
pieces = st.lists(st.sampled_from([*HARD_TEXTS, "<|endoftext|>", " ", "\n\n", "'s", "é", "\u0301", "🤗"])).map("".join)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(text=any_text | pieces)
@example(text="\u0130\u0307 \u00df\u1e9e")
@example(text=" " * 3000 + "end" + " \n" * 300)
def test_ids_of_any_text(text, ours, theirs, original):
    ids = theirs.encode(text, allowed_special="all")
    assert ours(text).input_ids == original(text).input_ids == ids
    assert ours.decode(ids) == text


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 50256) | st.integers(0, 255) | st.just(50256)))
def test_text_of_any_ids(ids, ours, theirs):
    """Also of ids whose bytes are no UTF-8, as a model may write them."""
    assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(text=any_text | pieces)
@example(text="")
@example(text="<|endoftext|>")
def test_the_books_functions_take_either_tokenizer(text, ours, theirs):
    ids = text_to_token_ids(text, theirs)
    assert ids.tolist() == text_to_token_ids(text, ours).tolist()
    assert ids.shape == (1, len(theirs.encode(text, allowed_special="all")))
    assert token_ids_to_text(ids, theirs) == token_ids_to_text(ids, ours) == text


@pytest.mark.slow
def test_backend_equals_that_of_openais_files(ours, original):
    a, b = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (ours, original))
    assert len(a["model"]["vocab"]) == 50257
    assert len(a["model"]["merges"]) == 50000
    assert a["model"].pop("vocab") == b["model"].pop("vocab")
    assert a["model"].pop("merges") == b["model"].pop("merges")
    assert a == b


def test_one_missing_merge_is_noticed(ours, theirs):
    vocab = ours.get_vocab()
    merges = json.loads(ours.backend_tokenizer.to_str())["model"]["merges"]
    lacking = GPT2Tokenizer(vocab=vocab, merges=[tuple(m) for m in merges if "".join(m) != "Ġeffort"])
    assert lacking("Every effort").input_ids != theirs.encode("Every effort")


def test_last_merge_undoes_one_merge():
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4}
    assert last_merge(b"bc", 3, ranks) == (b"b", b"c")
    assert last_merge(b"abc", 4, ranks) == (b"a", b"bc")


def test_settings_are_those_of_the_official_checkpoints(ours, reloaded):
    for tokenizer in (ours, reloaded):
        assert type(tokenizer) is GPT2Tokenizer
        assert len(tokenizer) == 50257
        assert tokenizer.model_max_length == 1024
        assert tokenizer.pad_token is None
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256


def test_padding_without_a_pad_token_is_refused(ours):
    with pytest.raises(ValueError, match="padding token"):
        ours(["ab", "a"], padding=True)


def test_batches_pad_on_the_left_when_asked(ours):
    tokenizer = GPT2Tokenizer(vocab=ours.get_vocab(), merges=[], padding_side="left", pad_token="<|endoftext|>")
    batch = tokenizer(["ab", "a"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]


def test_without_vocabulary_and_network_the_error_says_what_to_set(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", unreachable)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(OSError, match=rf"ConnectionError.*set TIKTOKEN_CACHE_DIR.*{CACHED_FILES[0]}.*network"):
        gpt2_tokenizer()
