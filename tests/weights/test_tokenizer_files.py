import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

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
    pipeline,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.weights.convert import (
    export_checkpoint,
    gpt2_to_scratch,
    import_checkpoint,
    scratch_to_gpt2,
    tokenizer_beside,
    write,
)
from hf_gpt_scratch.weights.formats import gguf

pytestmark = pytest.mark.slow

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
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


@pytest.mark.parametrize("format", ["native", "gpt2", "onnx"])
@pytest.mark.long
def test_every_directory_has_vocab_json_and_merges_txt_where_the_tokenizer_is_gpt2s(tmp_path, format):
    """For programs that read no tokenizer.json; ids are those of the tokenizer."""
    model = random_pair(vocab_size=1000)[1]
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    model.save_as_gpt2(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    assert not (tmp_path / "source/vocab.json").exists()  # transformers leaves them out
    if format == "gpt2":
        import_checkpoint(tmp_path / "source", tmp_path / "first", check=False)
        export_checkpoint(tmp_path / "first", tmp_path / "converted", format, check=False)
    else:
        export_checkpoint(tmp_path / "source", tmp_path / "converted", format, check=False)
    write(model, model.config, tmp_path / "written", format, tokenizer=tokenizer)
    for name in ("converted", "written"):
        files = {kind: str(tmp_path / name / kind) for kind in ("vocab.json", "merges.txt")}
        alone = GPT2Tokenizer(vocab=files["vocab.json"], merges=files["merges.txt"])
        assert [alone(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


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


@pytest.mark.parametrize("kind", [gpt2s_own, gpt2s_with_old_files])
def test_a_tokenizer_inside_a_gguf_file_is_the_same_beside_the_model(tmp_path, source, kind):
    kind(source)
    before = AutoTokenizer.from_pretrained(source)
    export_checkpoint(source, tmp_path / "gguf", "gguf")
    receipt = import_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back")
    assert receipt["tokenizer"] == "GPT2Tokenizer" and not receipt["notes"]
    after = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert after.get_vocab() == before.get_vocab()
    assert (after.eos_token, after.pad_token) == (before.eos_token, before.pad_token)
    for text in (*TEXTS, "a<pad>b", "<sep>he"):
        assert after(text).input_ids == before(text).input_ids
    if "<sep>" in before.all_special_tokens:
        assert after.decode(after("<sep>he").input_ids, skip_special_tokens=True) == "he"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pre", "qwen2", "which is 'gpt2', 'qwen2', False"),
        ("merges", ["he"], "which is damaged"),
        ("tokens", None, "which is damaged"),
        ("tokens", "many", "which gives ids up to 4999"),
    ],
)
def test_a_tokenizer_inside_a_gguf_file_that_is_not_gpt2s_is_left_behind_and_named(
    tmp_path, source, monkeypatch, key, value, told
):
    gpt2s_own(source)
    export_checkpoint(source, tmp_path / "gguf", "gguf")
    read = gguf._in_our_names
    if value == "many":
        words = json.loads((source / "vocab.json").read_text())
        value = [*words, *map(str, range(10, 5010))][:5000]

    def changed(path, metadata):
        metadata = {**metadata, f"tokenizer.ggml.{key}": value}
        if len(value or ()) == 5000:
            metadata.pop("tokenizer.ggml.token_type")
        return read(path, metadata)

    monkeypatch.setattr(gguf, "_in_our_names", changed)
    receipt = import_checkpoint(tmp_path / "gguf/model.gguf", tmp_path / "back")
    [note] = receipt["notes"]
    assert receipt["tokenizer"] is None and note.startswith("left behind: ") and told in note and "--tokenizer" in note


# Found elsewhere, or asked for

TEXT = "Every effort moves you.\nYes, é 🤗!"


def characters(text=TEXT):
    stoi = {letter: i for i, letter in enumerate(sorted(set(text)))}
    return {"vocab_size": len(stoi), "itos": {i: letter for letter, i in stoi.items()}, "stoi": stoi}


VOCAB_SIZE = len(characters()["stoi"])


def nanogpt(directory, vocab_size=VOCAB_SIZE):
    """A nanoGPT's ckpt.pt."""
    sizes = dict(vocab_size=vocab_size, context_length=32, emb_dim=8, n_heads=2, n_layers=1)
    config = GPTScratchConfig(**sizes, tie_word_embeddings=True)
    write(GPTScratchForCausalLM(config), config, directory / "ckpt.pt", "nanogpt")
    return directory / "ckpt.pt"


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("option", [False, True])
def test_nanogpts_characters_become_a_tokenizer_that_needs_no_code(tmp_path, protocol, option):
    meta = tmp_path / ("elsewhere" if option else "meta.pkl")
    meta.write_bytes(pickle.dumps(characters(), protocol=protocol))
    receipt = import_checkpoint(nanogpt(tmp_path), tmp_path / "out", tokenizer=meta if option else None)
    assert receipt["tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT).input_ids == [characters()["stoi"][letter] for letter in TEXT]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    with pytest.raises(Exception, match=r"Missing \[UNK\]"):  # a character that it does not know
        tokenizer("Ω")
    written = pipeline("text-generation", model=str(tmp_path / "out"))(
        "Every effort", max_new_tokens=3, clean_up_tokenization_spaces=False
    )
    assert len(written[0]["generated_text"]) == len("Every effort") + 3
    receipt = export_checkpoint(tmp_path / "out", tmp_path / "official", "gpt2")
    assert AutoTokenizer.from_pretrained(tmp_path / "official")(TEXT).input_ids == tokenizer(TEXT).input_ids


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "hf_gpt_scratch.hostile"),)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (Hostile(), "is no meta.pkl"),
        ({"stoi": {"ab": 0, "b": 1}}, "single characters"),
        ({"stoi": {"a": 1, "b": 2}}, "from 0 on"),
        ({"stoi": {"a": 0, "b": True}}, "from 0 on"),
        ({"vocab_size": 3}, "has no 'stoi'"),
        ([1], "has no 'stoi'"),
        ({"stoi": {}}, "has no 'stoi'"),
        ({"stoi": {"a": 0, "b": 1}, "itos": {0: "b", 1: "a"}}, "contradicts itself"),
        ({"stoi": {"a": 0, "b": 1}, "vocab_size": 3}, "contradicts itself"),
        (b"text", "is no meta.pkl"),
        (characters("abc"), "has 3 characters, while vocab_size"),
    ],
)
def test_a_meta_pkl_that_is_none_is_left_behind_and_refused_if_asked_for(tmp_path, values, told):
    meta = tmp_path / "meta.pkl"
    meta.write_bytes(values if isinstance(values, bytes) else pickle.dumps(values))
    receipt = import_checkpoint(nanogpt(tmp_path), tmp_path / "out")
    assert receipt["tokenizer"] is None and any(told in note for note in receipt["notes"])
    if "while vocab_size" not in told:
        with pytest.raises(ConversionError, match=told):
            import_checkpoint(tmp_path / "ckpt.pt", tmp_path / "other", tokenizer=meta)
    assert not (Path(tempfile.gettempdir()) / "hf_gpt_scratch.hostile").exists()


@pytest.fixture(params=[50257, 50304])
def of_gpt2s_size(request, tmp_path):
    return nanogpt(tmp_path, request.param)


def test_a_vocabulary_of_gpt2s_size_gets_gpt2s_tokenizer_and_the_models_length(tmp_path, of_gpt2s_size):
    receipt = import_checkpoint(of_gpt2s_size, tmp_path / "out", check=False)
    assert receipt["tokenizer"] == "GPT2Tokenizer" and any("size of GPT-2's" in note for note in receipt["notes"])
    generate = pipeline("text-generation", model=str(tmp_path / "out"))
    assert generate.tokenizer("Every effort moves you").input_ids == [6109, 3626, 6100, 345]
    assert generate.tokenizer.model_max_length == 32
    [written] = generate("Every effort moves you", max_new_tokens=3, do_sample=False)
    assert written["generated_text"].startswith("Every effort moves you")
    back = import_checkpoint(export_to(tmp_path / "out", tmp_path / "gguf", "gguf"), tmp_path / "again", check=False)
    assert back["tokenizer"] == "GPT2Tokenizer"


def export_to(source, target, format):
    export_checkpoint(source, target, format, check=False)
    return target / "model.gguf"


def test_without_gpt2s_vocabulary_the_conversion_succeeds_and_says_what_to_do(tmp_path, monkeypatch):
    def lacking():
        raise OSError("not cached; set TIKTOKEN_CACHE_DIR")

    monkeypatch.setattr("hf_gpt_scratch.weights.tokenizer_files.gpt2_tokenizer", lacking)
    source = nanogpt(tmp_path, 50257)
    receipt = import_checkpoint(source, tmp_path / "out", check=False)
    assert receipt["tokenizer"] is None
    assert any("not cached; set TIKTOKEN_CACHE_DIR; then try again" in note for note in receipt["notes"])
    with pytest.raises(ConversionError, match="the tokenizer gpt2 cannot be had: not cached"):
        import_checkpoint(source, tmp_path / "other", tokenizer="gpt2")


def test_settings_of_another_tokenizer_keep_gpt2s_away(tmp_path):
    source = tmp_path / "source"
    GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(source)
    write_json(source / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    receipt = import_checkpoint(source, tmp_path / "out", check=False)
    assert receipt["tokenizer"] is None and "tokenizer_config.json" in receipt["notes"][0]
    receipt = import_checkpoint(source, tmp_path / "asked", check=False, tokenizer="gpt2")
    assert receipt["tokenizer"] == "GPT2Tokenizer"
    assert "left behind, since --tokenizer says so: tokenizer_config.json" in receipt["notes"]


def test_another_tokenizer_can_be_asked_for_or_none(tmp_path, source):
    gpt2s_own(source)
    (tmp_path / "bert").mkdir()
    bert(tmp_path / "bert")
    receipt = import_checkpoint(source, tmp_path / "out", tokenizer=tmp_path / "bert")
    assert receipt["tokenizer"] == "BertTokenizer"
    expected = AutoTokenizer.from_pretrained(tmp_path / "bert")(TEXTS[0]).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS[0]).input_ids == expected
    assert "left behind, since --tokenizer says so: merges.txt, vocab.json" in receipt["notes"]
    assert import_checkpoint(source, tmp_path / "none", tokenizer="none")["tokenizer"] is None
    assert not (tmp_path / "none" / "vocab.json").exists()


def test_one_that_is_asked_for_in_vain_is_refused_before_the_work(tmp_path, source):
    (tmp_path / "empty").mkdir()
    for asked, told in (
        ("gpt2", r"the tokenizer gpt2 gives ids up to 50256, while the model's vocab_size is \d+"),
        (tmp_path / "nowhere", "there is no directory"),
        (tmp_path / "empty", "has no tokenizer"),
    ):
        with pytest.raises(ConversionError, match=told):
            import_checkpoint(source, tmp_path / "out", tokenizer=asked)
    with pytest.raises(ConversionError, match=r"model\.pth has no place for the tokenizer gpt2"):
        export_checkpoint(source, tmp_path / "out", "book", tokenizer="gpt2")
    assert not (tmp_path / "out").exists()


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
    told = "left behind, since nothing says that they belong to model.pth; if they do, give"
    [note] = [note for note in receipt["notes"] if told in note]
    assert receipt["tokenizer"] is None and note.endswith("--tokenizer DIRECTORY: merges.txt, vocab.json")
    receipt = import_checkpoint(
        tmp_path / "book/model.pth", tmp_path / "with", n_heads=heads, tokenizer=tmp_path / "book"
    )
    assert receipt["tokenizer"] == "GPT2Tokenizer" and not any("left behind" in note for note in receipt["notes"])


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
