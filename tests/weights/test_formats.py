import json
import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from pairs import LAYERS, random_gpt2, random_ids, random_pair
from programs import (
    HEADS,
    SIZES,
    TF,
    Fused,
    book_masks,
    book_model,
    model_args,
    nanogpt_file,
    tf_weights,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from hf_gpt_scratch import GPTModel, GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.model.weight_map import SCRATCH_PREFIX, rows, without_prefix
from hf_gpt_scratch.weights.checkpoint import Progress
from hf_gpt_scratch.weights.convert import export_checkpoint, import_checkpoint, verify_weights
from hf_gpt_scratch.weights.formats import FORMATS, detect, read, write
from hf_gpt_scratch.weights.formats.book import BOOK
from hf_gpt_scratch.weights.formats.format import Layout
from hf_gpt_scratch.weights.formats.gguf import GGUF
from hf_gpt_scratch.weights.formats.llmc import LLM_C
from hf_gpt_scratch.weights.formats.nanogpt import NANOGPT
from hf_gpt_scratch.weights.formats.tensorflow import TENSORFLOW, masked_crc32c, read_tensorflow
from hf_gpt_scratch.weights.tensors import held

pytestmark = pytest.mark.slow

WRITTEN = [format.name for format in FORMATS.values() if format.file is not None]
FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY = FIXTURES / "tiny-gpt2"


def values(tensors):
    return {name: tensor.read() for name, tensor in tensors.items()}


def built(config, state_dict):
    return GPTScratchForCausalLM.from_book(state_dict, config).eval()


def assert_same_logits(ours, reference, ids=None):
    ids = random_ids() if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, reference(ids), atol=1e-4, rtol=1e-5)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


# What is read


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_has_its_own_logits_after_import(tmp_path, bias, prefix):
    model = Fused(bias)
    path = nanogpt_file(tmp_path / "ckpt.pt", model, prefix)
    assert detect(path) == "nanogpt"
    receipt = import_checkpoint(path, tmp_path / "native")
    ours = GPTScratchForCausalLM.from_pretrained(tmp_path / "native")
    assert_same_logits(ours, model)
    assert (ours.config.activation_function, ours.config.qkv_bias) == ("gelu", bias)
    assert ours.config.tie_word_embeddings
    assert "gelu_new" in receipt["notes"][0]
    if not bias:
        state_dict = without_prefix(ours.state_dict(), SCRATCH_PREFIX)
        zero = {name for name, tensor in state_dict.items() if not tensor.any()}
        assert zero == {name for name in state_dict if name.endswith((".bias", ".shift"))}


def test_padded_vocabulary_stays_padded(tmp_path):
    model = Fused(vocab=50304)
    config, _ = read(nanogpt_file(tmp_path / "ckpt.pt", model))
    assert (config.vocab_size, config.eos_token_id) == (50304, 50256)


def test_mingpt_has_its_own_logits_after_import(tmp_path):
    model = Fused(tied=False, mask=True, gelu="tanh")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    assert detect(tmp_path / "model.pt") == "mingpt"
    import_checkpoint(tmp_path / "model.pt", tmp_path / "native", n_heads=HEADS)
    ours = GPTScratchForCausalLM.from_pretrained(tmp_path / "native")
    assert_same_logits(ours, model)
    assert not ours.config.tie_word_embeddings


def test_bare_state_dict_without_masks_is_nanogpts(tmp_path):
    torch.save(Fused().state_dict(), tmp_path / "model.pt")
    assert detect(tmp_path / "model.pt") == "nanogpt"
    config, state_dict = read(tmp_path / "model.pt", n_heads=HEADS)
    assert_same_logits(built(config, state_dict), Fused())


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_books_file_has_the_books_logits_after_import(tmp_path, qkv_bias, with_optimizer):
    book = book_model(qkv_bias=qkv_bias)
    state_dict = {**book.state_dict(), **book_masks()}
    optimizer = torch.optim.AdamW(book.parameters())
    book(random_ids()).sum().backward()
    optimizer.step()
    optimizer_state = {"model_state_dict": state_dict, "optimizer_state_dict": optimizer.state_dict()}
    torch.save(optimizer_state if with_optimizer else state_dict, tmp_path / "model.pth")
    assert detect(tmp_path / "model.pth") == "book"
    import_checkpoint(tmp_path / "model.pth", tmp_path / "native", n_heads=HEADS)
    ours = GPTScratchForCausalLM.from_pretrained(tmp_path / "native")
    assert_same_logits(ours, book)
    assert ours.config.qkv_bias == qkv_bias
    assert load_file(tmp_path / "native/model.safetensors").keys() == {
        SCRATCH_PREFIX + name if name != "out_head.weight" else name for name in book.state_dict()
    }


def test_tensorflow_checkpoint_gives_the_numbers_that_tensorflow_wrote():
    tensors = values(read_tensorflow(TF))
    assert tensors.keys() == tf_weights().keys()
    assert all(np.array_equal(tensors[name].numpy(), value) for name, value in tf_weights().items())


def test_tensorflow_checkpoint_is_the_official_model(tmp_path):
    assert detect(TF) == "tensorflow"
    import_checkpoint(TF, tmp_path / "native")
    ours = GPTScratchForCausalLM.from_pretrained(tmp_path / "native")
    official = GPT2LMHeadModel(ours.config.to_gpt2()).eval()
    for name, value in tf_weights().items():
        parts = name.removeprefix("model/").replace("h0", "h/0").replace("h1", "h/1").split("/")
        parts[-1] = {"g": "weight", "w": "weight", "b": "bias"}.get(parts[-1], parts[-1] + ".weight")
        with torch.no_grad():
            official.transformer.get_parameter(".".join(parts)).copy_(torch.from_numpy(value).squeeze(0))
    assert_same_logits(ours, lambda ids: official(ids).logits, random_ids(length=12, vocab_size=SIZES["n_vocab"]))


def test_openais_tokenizer_travels_along(tmp_path):
    shutil.copytree(TF, tmp_path / "source")
    model = json.loads((TINY / "tokenizer.json").read_text())["model"]
    (tmp_path / "source/encoder.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "source/vocab.bpe").write_text(f"#version: 0.2\n{merges}\n")
    assert import_checkpoint(tmp_path / "source", tmp_path / "native")["tokenizer"] == "GPT2Tokenizer"
    text = "I HAD always thought Jack Gisburn rather a cheap genius"
    assert AutoTokenizer.from_pretrained(tmp_path / "native")(text) == AutoTokenizer.from_pretrained(TINY)(text)


def test_official_directory_is_read_and_imported(tmp_path):
    gpt2, ours = random_pair()
    gpt2.save_pretrained(tmp_path / "gpt2")
    assert detect(tmp_path / "gpt2") == "gpt2"
    config, state_dict = read(tmp_path / "gpt2")
    assert config.to_diff_dict() == GPTScratchConfig.from_pretrained(tmp_path / "gpt2").to_diff_dict()
    assert_equal(state_dict, {k: v for k, v in plain(ours).items() if k != "out_head.weight"})
    assert import_checkpoint(tmp_path / "gpt2", tmp_path / "native")["parity"]["passed"]
    assert detect(tmp_path / "native") == "native"


def plain(model):
    return without_prefix(model.state_dict(), SCRATCH_PREFIX)


# What is written


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_bit_for_bit(tmp_path, format, dtype, tied):
    ours = random_pair(tie_word_embeddings=tied)[1].to(dtype)
    if format == "nanogpt" and not tied:
        with pytest.raises(ConversionError, match=r"out_head\.weight differs.*one matrix.*export to"):
            write(ours, ours.config, tmp_path / "file", format)
        return
    if format == "llmc" and (not tied or dtype == torch.float16):
        with pytest.raises(ConversionError, match=r"llmc supports only True|llm\.c has float32 and bfloat16"):
            write(ours, ours.config, tmp_path / "file", format)
        return
    notes = write(ours, ours.config, tmp_path / "file", format)
    assert detect(tmp_path / "file") == format
    config, state_dict = read(tmp_path / "file", n_heads=HEADS)
    expected = plain(ours)
    if config.tie_word_embeddings:
        del expected["out_head.weight"]
    assert config.tie_word_embeddings == tied
    assert_equal(state_dict, expected)
    same = ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "qkv_bias", "activation_function")
    assert [getattr(config, name) for name in same] == [getattr(ours.config, name) for name in same]
    assert len(notes) == (format in ("nanogpt", "gguf") or (format == "onnx" and dtype != torch.float32))


def test_written_names_are_those_of_each_program(tmp_path):
    ours = random_pair()[1]
    write(ours, ours.config, tmp_path / "model.pth", "book")
    book = torch.load(tmp_path / "model.pth", weights_only=True)
    assert book.keys() == {**book_model(qkv_bias=True).state_dict(), **book_masks()}.keys()
    assert all(torch.equal(book[name], mask) for name, mask in book_masks().items())

    write(ours, ours.config, tmp_path / "ckpt.pt", "nanogpt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert checkpoint["model_args"] == {**model_args(), "dropout": 0.1}
    model = Fused(gelu="tanh")
    model.load_state_dict(checkpoint["model"], strict=True)
    assert_same_logits(ours, model)

    write(ours, ours.config, tmp_path / "model.gguf", "gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, LAYERS)
    official = (name.rsplit(".", 1) for name in GPT2LMHeadModel(ours.config.to_gpt2()).state_dict())
    assert names == {f"{name_map.get_name(name)}.{kind}" for name, kind in official} - {"output.weight"}


def test_books_own_class_loads_what_is_written_for_it(tmp_path):
    ours = random_pair(tie_word_embeddings=False)[1]
    write(ours, ours.config, tmp_path / "model.pth", "book")
    book = GPTModel(ours.config).eval()
    book.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True), strict=True)
    assert_same_logits(ours, book)


def test_parameters_are_taken_as_well_as_plain_tensors(tmp_path):
    book = book_model()
    torch.save(dict(book.named_parameters()), tmp_path / "model.pth")
    config, _ = read(tmp_path / "model.pth", n_heads=HEADS)
    for format in ("book", "gguf"):
        write(dict(book.named_parameters()), config, tmp_path / "file", format)
        assert_same_logits(built(*read(tmp_path / "file", n_heads=HEADS if format == "book" else None)), book)


def test_minus_zero_is_not_zero():
    def compare(one, other):
        verify_weights(held(one), held(other), Progress())

    zero, one = torch.tensor([0.0]), torch.ones(3)
    with pytest.raises(ParityError, match="'a' is not equal to the source's"):
        compare({"a": zero}, {"a": -zero})
    with pytest.raises(ParityError):
        compare({"a": torch.randn(4, 6).T}, {"a": torch.randn(4, 6).T})
    compare({}, {"bias": zero})
    with pytest.raises(ParityError):
        compare({}, {"bias": one})


def test_files_hold_no_more_than_the_weights(tmp_path):
    gpt2, _ = random_pair()
    gpt2.save_pretrained(tmp_path / "gpt2")  # its query, key and value are views of one matrix
    export_checkpoint(tmp_path / "gpt2", tmp_path / "nano", "nanogpt")
    weights = sum(tensor.nbytes for tensor in read(tmp_path / "gpt2")[1].values())
    assert weights < (tmp_path / "nano/ckpt.pt").stat().st_size < 1.2 * weights


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_goes_there_and_back_with_the_same_keys(tmp_path, bias):
    source = nanogpt_file(tmp_path / "ckpt.pt", Fused(bias))
    import_checkpoint(source, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "back", "nanogpt")
    before, after = (torch.load(path, weights_only=True) for path in (source, tmp_path / "back/ckpt.pt"))
    assert_equal(before["model"], after["model"])
    assert after["model_args"] == model_args(bias=bias)


def test_nanogpt_without_biases_is_refused_to_a_model_that_has_some(tmp_path):
    model = Fused(bias=False)
    config, state_dict = read(nanogpt_file(tmp_path / "ckpt.pt", model))
    write(state_dict, config, tmp_path / "with.pt", "nanogpt", bias=True)
    assert torch.load(tmp_path / "with.pt", weights_only=True)["model"].keys() == Fused().state_dict().keys()
    state_dict["trf_blocks.1.norm2.shift"][3] = 1e-3
    with pytest.raises(ConversionError, match=r"bias=False.*1 biases are not zero.*'transformer\.h\.1\.ln_2\.bias'"):
        write(state_dict, config, tmp_path / "without.pt", "nanogpt", bias=False)
    with pytest.raises(ConversionError, match="only 'nanogpt' has the choice"):
        write(state_dict, config, tmp_path / "model.pth", "book", bias=False)
    write(state_dict, config, tmp_path / "by itself.pt", "nanogpt")
    assert torch.load(tmp_path / "by itself.pt", weights_only=True)["model_args"]["bias"] is True


@pytest.mark.parametrize(
    ("changes", "format", "named"),
    [
        ({"activation_function": "relu"}, "book", "activation_function='relu'"),
        ({"activation_function": "relu"}, "gguf", "activation_function='relu'"),
        ({"activation_function": "relu"}, "nanogpt", "activation_function='relu'"),
        ({"layer_norm_epsilon": 1e-6}, "book", "layer_norm_epsilon=1e-06"),
        ({"n_inner": 100}, "nanogpt", "n_inner=100"),
        ({"scale_attn_weights": False}, "gguf", "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "book", "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_what_a_format_cannot_say_is_refused_by_name(tmp_path, changes, format, named):
    ours = random_pair(**changes)[1]
    with pytest.raises(ConversionError, match=rf"{named}.*{format} supports only.*use the format 'gpt2'"):
        write(ours, ours.config, tmp_path / "file", format)
    assert not (tmp_path / "file").exists()


# GGUF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gguf_reader_gives_the_weights_bit_for_bit(tmp_path, dtype):
    gpt2, ours = random_pair(n_inner=100, layer_norm_epsilon=1e-6)
    ours.to(dtype), gpt2.to(dtype)
    write(ours, ours.config, tmp_path / "model.gguf", "gguf")
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, LAYERS)
    theirs = gpt2.state_dict()
    del theirs["lm_head.weight"]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, weight in theirs.items():
        name, kind = name.rsplit(".", 1)
        found = tensors.pop(f"{name_map.get_name(name)}.{kind}")
        values = torch.from_numpy(gguf.dequantize(np.array(found.data), found.tensor_type))
        assert torch.equal(values, (weight.T if "c_" in name and weight.ndim == 2 else weight).float()), name
    assert not tensors
    config, _ = read(tmp_path / "model.gguf")
    assert (config.n_inner, config.layer_norm_epsilon) == (100, 1e-6)


def test_transformers_reads_our_gguf_with_its_tokenizer(tmp_path):
    """transformers takes the vocabulary's size from the tokenizer, and always 1024 positions."""
    ours = random_pair(vocab_size=1000, n_positions=1024, bos_token_id=999, eos_token_id=999)[1]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ours.save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    receipt = export_checkpoint(tmp_path / "native", tmp_path / "gguf", "gguf")
    assert receipt["notes"] == []
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    assert_equal(theirs.state_dict(), ours.to_gpt2().state_dict())
    assert_same_logits(ours, lambda ids: theirs(ids).logits)
    text = "I HAD always thought Jack Gisburn\n rather a cheap genius<|endoftext|>"
    read_back = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    assert read_back(text).input_ids == tokenizer(text).input_ids


def test_gguf_of_another_model_or_quantised_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), dtype=np.float32))
    close(writer)
    with pytest.raises(ConversionError, match="architecture 'llama'"):
        read(tmp_path / "llama.gguf")
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "gpt2")
    q8 = gguf.quants.quantize(np.ones((4, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    close(writer)
    with pytest.raises(ConversionError, match=r"'token_embd\.weight'.*quantised \(Q8_0\)"):
        read(tmp_path / "q8.gguf")


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_missing_gguf_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    ours = random_pair()[1]
    with pytest.raises(ConversionError, match=r"pip install 'hf-gpt-scratch\[gguf\]'"):
        write(ours, ours.config, tmp_path / "model.gguf", "gguf")


# The tables


@pytest.mark.parametrize("layout", [format.layout for format in (BOOK, NANOGPT, TENSORFLOW, GGUF, LLM_C)])
def test_tables_are_injective_and_cover_every_weight(layout):
    ours = set(plain(random_pair()[1])) - ({"out_head.weight"} if layout.head is None else set())
    there = list(rows(LAYERS, layout.table))
    score = {"score.weight", "score.bias"} if layout is BOOK.layout else set()  # of a classifier
    assert {name for row in there for name in row.ours} == ours | score
    assert len({row.theirs for row in there}) == len(there)


def mutants(layout):
    """The layout with one mistake: another layout of a matrix, or the name of another row of its shape."""
    table = layout.table
    matrices = ("W_query.weight", "out_proj.weight", "layers.0.weight", "layers.2.weight")
    for i, row in enumerate(table):
        if row.ours[0].endswith(matrices):
            yield f"{row.theirs} transposed", i, i, replace(row, transposed=not row.transposed), None
        if len(row.ours) == 3:
            yield f"{row.theirs} reversed", i, i, replace(row, ours=row.ours[::-1]), None
    pairs = [("norm1.scale", "norm2.scale"), ("norm1.shift", "norm2.shift"), ("norm1.shift", "out_proj.bias")]
    pairs += [
        ("norm2.shift", "layers.2.bias"),
        ("norm2.scale", "final_norm.scale"),
        ("final_norm.shift", "norm1.scale"),
    ]
    for one, other in pairs:
        i, j = (next(k for k, row in enumerate(table) if row.ours[0].endswith(end)) for end in (one, other))
        if ("{n}" in table[i].theirs) == ("{n}" in table[j].theirs):
            yield (
                f"{one} and {other}",
                i,
                j,
                replace(table[i], theirs=table[j].theirs),
                replace(table[j], theirs=table[i].theirs),
            )


def mutated(layout: Layout, i, j, first, second) -> Layout:
    table = list(layout.table)
    table[i] = first
    if second is not None:
        table[j] = second
    return replace(layout, table=tuple(table))


@pytest.mark.parametrize("format", ["book", "nanogpt", "tensorflow", "gguf", "llmc"])
def test_every_mistake_in_a_table_is_refused_or_shows_in_the_logits(tmp_path, format, monkeypatch):
    if format == "tensorflow":
        path, ids = TF, random_ids(length=12, vocab_size=19)
    else:
        ours = random_pair()[1]
        path, ids = tmp_path / "file", random_ids()
        write(ours, ours.config, path, format)
    reference = built(*read(path, n_heads=None if format != "book" else HEADS))(ids).logits
    count = 0
    for what, *mistake in mutants(FORMATS[format].layout):
        monkeypatch.setattr(FORMATS[format], "layout", mutated(FORMATS[format].layout, *mistake))
        try:
            logits = built(*read(path, n_heads=None if format != "book" else HEADS))(ids).logits
            assert (logits - reference).abs().max() > 1e-2, what
        except ConversionError:
            pass
        monkeypatch.undo()
        count += 1
    assert count >= 6


def test_every_row_carries_its_own_tensor(tmp_path):
    """A change of one tensor in any file changes exactly the tensors of its row."""
    ours = random_pair(tie_word_embeddings=False)[1]
    config, state_dict = ours.config, plain(ours)
    for layout in (BOOK.layout, NANOGPT.layout, GGUF.layout):
        tensors = values(layout.from_scratch(held(state_dict), LAYERS))
        for row in (row for row in rows(LAYERS, layout.table) if row.theirs in tensors):
            theirs = held({**tensors, row.theirs: tensors[row.theirs] + 1})
            changed = values(layout.to_scratch(theirs, config.n_layers))
            assert {n for n in state_dict if not torch.equal(changed[n], state_dict[n])} == set(row.ours)


# What is refused


def test_n_heads_is_asked_for_where_no_file_tells_it(tmp_path):
    torch.save(book_model().state_dict(), tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=r"does not store n_heads.*pass n_heads.*cannot be detected"):
        read(tmp_path / "model.pth")
    for wrong in (5, 0, -4, True, 4.0):
        with pytest.raises(ConversionError, match=rf"got n_heads={wrong}, but.*divides emb_dim=48"):
            read(tmp_path / "model.pth", n_heads=wrong)
    with pytest.raises(ConversionError, match=r"got n_heads=6, but .*ckpt\.pt says 4; leave n_heads out"):
        read(nanogpt_file(tmp_path / "ckpt.pt", Fused()), n_heads=6)
    random_pair()[0].save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConversionError, match=r"got n_heads=6, but .*gpt2 says 4; leave n_heads out"):
        import_checkpoint(tmp_path / "gpt2", tmp_path / "native", n_heads=6)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 20), (1600, 25)])
def test_n_heads_of_the_official_widths_is_suggested(tmp_path, width, heads):
    book = book_model(emb_dim=width, vocab_size=2, context_length=2, n_layers=1, n_heads=1)
    torch.save(book.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=rf"the official model of emb_dim={width} has {heads}\)"):
        read(tmp_path / "model.pth")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("place", ["alone", "in the state dict", "pickle of protocol 2", "pickle of protocol 4"])
def test_hostile_pickle_runs_nothing(tmp_path, place):
    path, evil = tmp_path / "model.pth", Hostile(str(tmp_path / "pwned"))
    if place.startswith("pickle"):
        path.write_bytes(pickle.dumps({"tok_emb.weight": evil}, protocol=int(place[-1])))
    else:
        torch.save(evil if place == "alone" else {**book_model().state_dict(), "tok_emb.weight": evil}, path)
    message = r"is a pickle that refers to .*open, and .*do not trust it|weights \(its pickle is of protocol 4"
    for function in (detect, read, lambda path: import_checkpoint(path, tmp_path / "target", n_heads=HEADS)):
        with pytest.raises(ConversionError, match=message):
            function(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pth"]


def sabotaged(change):
    state_dict = book_model().state_dict()
    change(state_dict)
    return state_dict


BAD_STATE_DICTS = {
    r"lacks 'trf_blocks\.1\.ff\.layers\.2\.bias'": lambda s: s.pop("trf_blocks.1.ff.layers.2.bias"),
    r"has 'adapter', which this model does not have": lambda s: s.update(adapter=torch.ones(3)),
    r"'pos_emb\.weight' in .* has shape \[3\]": lambda s: s.update({"pos_emb.weight": torch.ones(3)}),
    r"shape \[48, 47\], but .* \[48, 48\]": lambda s: s.update({"trf_blocks.0.att.W_key.weight": torch.ones(48, 47)}),
    r"'trf_blocks\.2\.norm1\.shift'.*NaN or inf": lambda s: s["trf_blocks.2.norm1.shift"].__setitem__(0, float("nan")),
    r"'tok_emb\.weight'.*NaN or inf": lambda s: s["tok_emb.weight"].__setitem__((210, 47), -float("inf")),
    r"mixes torch\.float16, torch\.float32": lambda s: s.update({"final_norm.scale": torch.ones(48).half()}),
    r"is torch\.int64, but weights must be floats": lambda s: s.update({"final_norm.scale": torch.ones(48).long()}),
    r"got the layers \[0, 2\].*without a gap": lambda s: [s.pop(n) for n in list(s) if n.startswith("trf_blocks.1.")],
    r"has a tensor twice, .*'module\.final_norm\.scale'": lambda s: s.update(
        {"module.final_norm.scale": torch.ones(48)}
    ),
    r"holds 'final_norm\.scale': a list": lambda s: s.update({"final_norm.scale": [1.0] * 48}),
    r"holds 'final_norm\.scale': a torch\.sparse": lambda s: s.update({"final_norm.scale": torch.ones(48).to_sparse()}),
    r"holds 'tok_emb\.weight': a .* \[1000000000, 48\]": lambda s: s.update(
        {"tok_emb.weight": torch.ones(1, 48).expand(10**9, 48)}
    ),
}


@pytest.mark.parametrize("message", BAD_STATE_DICTS)
def test_bad_state_dict_is_refused_by_name(tmp_path, message):
    torch.save(sabotaged(BAD_STATE_DICTS[message]), tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=message):
        import_checkpoint(tmp_path / "model.pth", tmp_path / "target", n_heads=HEADS)
    assert not (tmp_path / "target").exists()


def test_model_args_that_contradict_the_weights_are_refused(tmp_path):
    state_dict = Fused().state_dict()
    for change, message in (
        ({"block_size": 65}, "context_length=65, but its tensors say 64"),
        ({"n_layer": 4}, "n_layers=4, but its tensors say 3"),
        ({"use_rmsnorm": True}, "model_args use_rmsnorm, which nanoGPT itself does not have"),
        ({"n_head": "4"}, "a str for n_head in its model_args, but it must be a number"),
        ({"dropout": 7.0}, "dropout rate"),
    ):
        torch.save({"model": state_dict, "model_args": {**model_args(), **change}}, tmp_path / "ckpt.pt")
        with pytest.raises(ConversionError, match=message):
            read(tmp_path / "ckpt.pt")
    torch.save({"model": state_dict, "model_args": None}, tmp_path / "ckpt.pt")
    with pytest.raises(ConversionError, match="pass n_heads"):
        read(tmp_path / "ckpt.pt")


def test_unknown_content_is_refused_with_what_is_known(tmp_path):
    known = "nanoGPT's ckpt.pt"
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"bert.embeddings.weight": torch.ones(2)}, tmp_path / "bert.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    for name in ("text.pth", "empty.pth", "list.pth", "bert.pth", "empty", "bert", "nowhere.pth"):
        for function in (detect, lambda path: import_checkpoint(path, tmp_path / "target")):
            with pytest.raises(ConversionError, match=known):
                function(tmp_path / name)
    gpt2, ours = random_pair()
    torch.save(gpt2.state_dict(), tmp_path / "pytorch_model.bin")
    gpt2.save_pretrained(tmp_path / "gpt2")
    for name in ("pytorch_model.bin", "gpt2/model.safetensors"):
        with pytest.raises(ConversionError, match="give its directory"):
            detect(tmp_path / name)
    write(ours, ours.config, tmp_path / "empty/model.pth", "book")
    with pytest.raises(ConversionError, match=r"give the file, .*empty/model\.pth"):
        detect(tmp_path / "empty")


def damaged(content, count, seed=0):
    """Copies with a bit flipped, cut off, or with bytes put in; at random places."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        at = int(generator.integers(len(content)))
        copy = bytearray(content)
        if i % 3 == 0:
            copy[at] ^= 1 << int(generator.integers(8))
        elif i % 3 == 1:
            del copy[at:]
        else:
            copy[at:at] = generator.bytes(int(generator.integers(1, 9)))
        yield bytes(copy)


@pytest.mark.parametrize("length", [0, 1, 9, 511, 512, 513, (1 << 20) + 512, (1 << 21) + 700])
def test_checksum_is_crc_32c(length):
    def masked(crc):
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)

    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ 0x82F63B78 * (crc & 1) for crc in table]
    data = np.random.default_rng(0).integers(256, size=length, dtype=np.uint8)
    crc = 0xFFFFFFFF
    for byte in data.tolist():
        crc = table[crc & 0xFF ^ byte] ^ crc >> 8
    assert masked_crc32c(data) == masked(crc ^ 0xFFFFFFFF)
    assert masked_crc32c(np.frombuffer(b"123456789", dtype=np.uint8)) == masked(0xE3069283)  # the published check


def test_incomplete_tensorflow_directory_is_refused_by_what_is_missing(tmp_path):
    def changed(name, change):
        shutil.rmtree(tmp_path / "tf", ignore_errors=True)
        shutil.copytree(TF, tmp_path / "tf")
        change(tmp_path / "tf" / name)
        return tmp_path / "tf"

    for name, change, message in (
        ("model.ckpt.index", Path.unlink, r"has 1 TensorFlow checkpoints \(model\.ckpt\)"),
        ("model.ckpt.data-00000-of-00001", Path.unlink, r"data-00000-of-00001 is missing or empty"),
        ("hparams.json", lambda path: path.write_text('{"n_vocab": 19}'), r"must have n_vocab, n_ctx.*'n_ctx'"),
        ("hparams.json", lambda path: path.write_text(json.dumps({**SIZES, "n_layer": 3})), "n_layers=3, but .* say 2"),
        (
            "hparams.json",
            lambda path: path.write_text(json.dumps({**SIZES, "n_head": 3})),
            "got n_heads=3.*divides emb_dim",
        ),
        ("model.ckpt.index", lambda path: path.write_bytes(b"x" * 100), "last 8 bytes are not those of an index"),
    ):
        with pytest.raises(ConversionError, match=message):
            read(changed(name, change))
    assert read(changed("checkpoint", Path.unlink))[0].n_heads == SIZES["n_head"]  # there is one index


@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_every_damage_to_a_tensorflow_checkpoint_is_noticed(tmp_path, name):
    shutil.copytree(TF, tmp_path / "tf")
    content = (TF / name).read_bytes()
    survived = 0
    for damage in damaged(content, 300):
        (tmp_path / "tf" / name).write_bytes(damage)
        try:
            tensors = values(read_tensorflow(tmp_path / "tf"))
        except ConversionError as error:
            assert re.search("download (it|them) again", str(error))
        else:
            assert_equal(tensors, values(read_tensorflow(TF)))  # bytes that belong to nothing
            survived += 1
    assert survived <= 30


@pytest.mark.parametrize("format", ["book", "nanogpt", "gguf", "llmc"])
def test_damaged_file_is_a_clear_error_or_a_whole_model(tmp_path, format):
    ours = random_pair()[1]
    write(ours, ours.config, tmp_path / "whole", format)
    whole = read(tmp_path / "whole", n_heads=HEADS)[1]
    refused = 0
    for damage in damaged((tmp_path / "whole").read_bytes(), 60):
        (tmp_path / "damaged").write_bytes(damage)
        try:
            config, state_dict = read(tmp_path / "damaged", n_heads=HEADS)
        except ConversionError:
            refused += 1
        else:
            built(config, state_dict)
            if format not in ("gguf", "llmc"):  # which have no checksums, so a weight may be another
                assert_equal(state_dict, whole)
    assert refused > 30


@pytest.mark.parametrize("zero", [True, False])
def test_who_expects_a_model_without_biases_back_is_told_of_zeros(zero, tmp_path):
    gpt2 = random_gpt2()
    with torch.no_grad():
        for block in gpt2.transformer.h:
            if zero:
                block.attn.c_attn.bias.zero_()
    gpt2.save_pretrained(tmp_path / "official")
    receipt = export_checkpoint(tmp_path / "official", tmp_path / "book", "book", check="weights")
    assert any("'qkv_bias': True" in note for note in receipt["notes"]) == zero
