import json
import shutil

import pytest
import tokenizers
from pairs import random_pair
from tokenizers import models, normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_gpt_scratch import GPTScratchConfig
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.weights.convert import (
    export_checkpoint,
    gpt2_to_scratch,
    import_checkpoint,
    scratch_to_gpt2,
    tokenizer_beside,
)

pytestmark = pytest.mark.slow

TEXTS = ["the cat sat on the mat", "Naïve cats; 3.14 %\n\n日本語 🤗", "[CLS] cat <sep> mat [UNK]</s><|endoftext|>"]
WORDS = ["the", "cat", "sat", "on", "mat", "##s", ";", "3", ".", "14"]


def write_json(path, **values):
    path.write_text(json.dumps(values, ensure_ascii=False))


def bert(directory):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (directory / "vocab.txt").write_text("\n".join(vocab))
    write_json(directory / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=False)


def bert_by_config(directory):
    bert(directory)
    (directory / "tokenizer_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", **config, tokenizer_class="BertTokenizer")


def unigram(directory):
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.5), ("▁", -2.0), ("a", -2.5), ("t", -2.6), ("▁mat", -2.7)]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.normalizer = normalizers.NFKC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.save_pretrained(directory)


def gpt2s_own(directory):
    vocab = {letter: i for i, letter in enumerate(bytes_to_unicode().values())}
    write_json(directory / "vocab.json", **vocab, **{"he": 256, "Ġt": 257, "<|endoftext|>": 258})
    (directory / "merges.txt").write_text("#version: 0.2\nh e\nĠ t\n")


def gpt2s_with_old_files(directory):
    gpt2s_own(directory)
    write_json(directory / "added_tokens.json", **{"<pad>": 259, "<sep>": 260})
    special = dict(eos_token="<|endoftext|>", pad_token="<pad>", additional_special_tokens=["<sep>"])
    write_json(directory / "special_tokens_map.json", **special)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}<sep>{{ m.content }}{% endfor %}")


def bytes_alone(directory):
    ByT5Tokenizer(extra_ids=3).save_pretrained(directory)


KINDS = [bert, bert_by_config, unigram, gpt2s_own, gpt2s_with_old_files, bytes_alone]


@pytest.fixture
def source(tmp_path):
    sizes = dict(vocab_size=400, n_positions=64, n_embd=12, n_layer=1, n_head=3, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def assert_same_tokenizer(one, other):
    one, other = map(AutoTokenizer.from_pretrained, (one, other))
    assert type(one) is type(other) and len(one) == len(other)
    for text in TEXTS:
        assert one(text) == other(text)
        assert one.decode(one(text).input_ids) == other.decode(one(text).input_ids)
    assert (one.special_tokens_map, one.chat_template) == (other.special_tokens_map, other.chat_template)
    if one.chat_template:
        messages = [{"role": "user", "content": "cat"}]
        assert one.apply_chat_template(messages) == other.apply_chat_template(messages)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_gives_the_same_ids_after_conversion_and_back(tmp_path, source, kind):
    kind(source)
    name = gpt2_to_scratch(source, tmp_path / "native", check="weights")["tokenizer"]
    assert name == type(AutoTokenizer.from_pretrained(source)).__name__
    assert_same_tokenizer(source, tmp_path / "native")
    assert scratch_to_gpt2(tmp_path / "native", tmp_path / "back", check="weights")["tokenizer"] == name
    assert_same_tokenizer(source, tmp_path / "back")


@pytest.mark.parametrize("kind", [bert, gpt2s_own])
def test_a_source_that_does_not_say_what_it_is_keeps_its_tokenizer(tmp_path, source, kind):
    kind(source)
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", **{name: value for name, value in config.items() if name != "model_type"})
    gpt2_to_scratch(source, tmp_path / "native", check="weights")
    write_json(source / "config.json", **config)
    assert_same_tokenizer(source, tmp_path / "native")


def test_a_vocabulary_that_transformers_would_not_read_is_refused_and_the_way_told_works(tmp_path, source):
    bert(source)
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(ConversionError, match=r"\(vocab\.txt\) is loaded by AutoTokenizer as a GPT2Tokenizer") as error:
        gpt2_to_scratch(source, tmp_path / "native")
    assert '"tokenizer_class" in tokenizer_config.json' in str(error.value)
    write_json(source / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    gpt2_to_scratch(source, tmp_path / "native", check="weights")
    assert_same_tokenizer(source, tmp_path / "native")


@pytest.mark.parametrize(
    ("name", "tokenizer_class"),
    [("spiece.model", "T5Tokenizer"), ("tokenizer.json", None), ("tekken.json", None), ("x.tiktoken", None)],
)
def test_a_tokenizer_that_cannot_be_carried_is_refused_by_name_and_without_it_the_weights_go(
    tmp_path, source, name, tokenizer_class
):
    (source / name).write_bytes(b"\x0a\x07no such")
    if tokenizer_class:
        write_json(source / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    with pytest.raises(ConversionError, match=rf"\({name}.*take these files out of the directory"):
        gpt2_to_scratch(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    for file in (name, "tokenizer_config.json"):
        (source / file).unlink(missing_ok=True)
    receipt = gpt2_to_scratch(source, tmp_path / "native", check="weights")
    assert (receipt["tokenizer"], receipt["notes"]) == (None, [])


def test_a_setting_that_is_looked_at_only_in_use_is_refused_before_the_work(tmp_path, source):
    gpt2s_own(source)
    settings = source / "tokenizer_config.json"
    values = json.loads(settings.read_text()) if settings.is_file() else {}
    write_json(settings, **values, model_max_length={"a": 1})
    with pytest.raises(ConversionError, match=r"cannot be read \(TypeError"):
        gpt2_to_scratch(source, tmp_path / "native")


def test_settings_without_a_vocabulary_are_left_behind_and_noted(tmp_path, source):
    write_json(source / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    receipt = gpt2_to_scratch(source, tmp_path / "native", check="weights")
    assert receipt["tokenizer"] is None
    assert "no vocabulary beside them: chat_template.jinja, tokenizer_config.json" in receipt["notes"][0]
    assert not (tmp_path / "native/tokenizer_config.json").exists()


def test_one_that_gives_other_ids_beside_the_model_is_not_published(tmp_path, source, monkeypatch):
    bert(source)
    copy = shutil.copyfile

    def wrong(source, target, **options):
        copy(source, target, **options)
        if target.name == "vocab.txt":
            target.write_text(target.read_text().replace("cat", "dog"))

    monkeypatch.setattr(shutil, "copyfile", wrong)
    with pytest.raises(ConversionError, match="gives different ids beside the converted model"):
        gpt2_to_scratch(source, tmp_path / "native")
    assert not (tmp_path / "native").exists()


# Files of other programs


@pytest.mark.parametrize("kind", [bert, unigram, bytes_alone])
def test_gguf_has_no_tokenizer_that_is_not_gpt2s_and_says_so(tmp_path, source, kind):
    kind(source)
    receipt = export_checkpoint(source, tmp_path / "gguf", "gguf")
    assert receipt["tokenizer"] is None
    assert "the file has no tokenizer" in receipt["notes"][0]
    assert import_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back")["notes"] == []


def test_a_bpe_that_splits_text_as_gpt2_does_not_is_no_gpt2s(tmp_path, source):
    gpt2s_own(source)
    backend = tokenizer_beside(source).backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(source)
    assert "byte-level BPE" in export_checkpoint(source, tmp_path / "gguf", "gguf")["notes"][0]


def test_a_tokenizer_inside_a_gguf_file_is_said_to_be_left_behind(tmp_path, source):
    gpt2s_own(source)
    receipt = export_checkpoint(source, tmp_path / "gguf", "gguf")
    assert (receipt["tokenizer"], receipt["notes"]) == ("GPT2Tokenizer", [])
    receipt = import_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back")
    assert receipt["tokenizer"] is None and "left behind: the tokenizer inside" in receipt["notes"][0]


@pytest.mark.parametrize("format", ["book", "nanogpt"])
def test_a_file_that_has_no_place_for_a_tokenizer_says_which_it_left_behind(tmp_path, source, format):
    gpt2s_with_old_files(source)
    receipt = export_checkpoint(source, tmp_path / "out", format)
    assert receipt["tokenizer"] is None
    names = "added_tokens.json, chat_template.jinja, merges.txt, special_tokens_map.json, vocab.json"
    assert any(f"has no place for a tokenizer: {names}" in note for note in receipt["notes"])


def test_a_tokenizer_beside_a_file_of_weights_is_said_to_be_left_behind(tmp_path, source):
    gpt2s_own(source)
    export_checkpoint(source, tmp_path / "book", "book")
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(source / name, tmp_path / "book" / name)
    heads = GPTScratchConfig.from_pretrained(source).n_heads
    receipt = import_checkpoint(tmp_path / "book/model.pth", tmp_path / "back", n_heads=heads)
    told = "left behind, since nothing says that they belong to model.pth: merges.txt, vocab.json"
    assert receipt["tokenizer"] is None and told in receipt["notes"]


def test_without_any_file_there_is_no_tokenizer(tmp_path):
    random_pair()[0].save_pretrained(tmp_path / "source")
    assert tokenizer_beside(tmp_path / "source") is None
    assert tokenizer_beside(tmp_path / "source" / "config.json") is None


def test_gpt2s_vocabulary_goes_along_in_its_two_old_files_too(tmp_path, source):
    gpt2s_own(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink()
    tokenizer.save_pretrained(source)
    assert not (source / "vocab.json").exists()
    gpt2_to_scratch(source, tmp_path / "target", check=False)
    vocab, merges = (str(tmp_path / "target" / name) for name in ("vocab.json", "merges.txt"))
    again = GPT2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids
    assert not (source / "vocab.json").exists()
