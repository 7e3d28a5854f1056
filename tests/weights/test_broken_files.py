"""Checkpoints as people find them: half fetched, under other names, of other programs; and files that never end."""

import argparse
import json
import os
import struct
import subprocess
import sys
import time

import gguf
import numpy as np
import pytest
import torch
from pairs import random_ids, random_pair, randomize
from safetensors.torch import load_file, save_file
from test_hostile_files import HUGE
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification
from typer.testing import CliRunner

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM, model_card
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError, LabError
from hf_gpt_scratch.lab.subject import load
from hf_gpt_scratch.weights import checkpoint
from hf_gpt_scratch.weights.convert import export_checkpoint, import_checkpoint, verify_receipt

pytestmark = pytest.mark.slow

CFG = dict(vocab_size=97, context_length=32, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 548105171\n"
PAGE = "<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


@pytest.fixture
def official(tmp_path):
    gpt2, _ = random_pair()
    gpt2.save_pretrained(tmp_path / "official")
    return gpt2, tmp_path / "official"


@pytest.fixture
def ours(official, tmp_path):
    import_checkpoint(official[1], tmp_path / "ours")
    return tmp_path / "ours"


def refusal(source, **options):
    with pytest.raises(ConversionError) as error:
        import_checkpoint(source, source.parent / "refused", **options)
    assert not (source.parent / "refused").exists()
    return str(error.value)


# Weights that are not there


@pytest.mark.parametrize(("content", "told"), [(POINTER, "git lfs pull"), (PAGE, "is a web page")])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth", "model.gguf"])
def test_what_lies_in_the_place_of_weights_is_called_what_it_is(official, content, told, name):
    (official[1] / "model.safetensors").unlink()
    (official[1] / name).write_text(content)
    in_directory = name in ("model.safetensors", "pytorch_model.bin")
    assert told in refusal(official[1] if in_directory else official[1] / name)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.safetensors.incomplete", "but 'model.safetensors.incomplete'; give a complete checkpoint"),
        ("tf_model.h5", "but 'tf_model.h5'; give a complete checkpoint"),
        ("model-00001-of-00002.safetensors", "its shards lack their index"),
    ],
)
def test_weights_that_cannot_be_read_are_named(official, name, told):
    (official[1] / "model.safetensors").rename(official[1] / name)
    assert told in refusal(official[1])


def test_the_advice_for_weights_under_another_name_works(official, tmp_path):
    source = official[1]
    (source / "model.safetensors").rename(source / "model.fp16.safetensors")
    assert "rename it to model.safetensors" in refusal(source)
    (source / "model.fp16.safetensors").rename(source / "model.safetensors")
    assert import_checkpoint(source, tmp_path / "out")["parity"]["passed"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "transformer."])
def test_the_advice_for_official_names_with_a_prefix_works(official, tmp_path, prefix):
    source = official[1]
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, source / "pytorch_model.bin")
    assert f"name.removeprefix('{prefix}')" in refusal(source)
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, source / "pytorch_model.bin")
    assert import_checkpoint(source, tmp_path / "out")["parity"]["passed"]


def test_adapters_inside_official_weights_are_called_so(official):
    source = official[1]
    tensors = load_file(source / "model.safetensors")
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight"] = torch.zeros(2, 2)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert "merge_and_unload" in refusal(source)


def test_the_advice_for_another_pickle_protocol_works(tmp_path):
    state_dict = randomize(GPTModel(CFG)).state_dict()
    torch.save(state_dict, tmp_path / "model.pth", pickle_protocol=4)
    assert "is of protocol 4" in refusal(tmp_path / "model.pth", n_heads=3)
    torch.save(state_dict, tmp_path / "model.pth")
    import_checkpoint(tmp_path / "model.pth", tmp_path / "out", n_heads=3)


def test_what_scripts_save_beside_the_weights_is_passed_over_and_not_built(tmp_path):
    model = randomize(GPTModel(CFG)).eval()
    beside = {"loss": np.float64(1.5), "args": argparse.Namespace(lr=1e-3), "out_dir": tmp_path / "x"}
    torch.save({"model_state_dict": model.state_dict(), **beside}, tmp_path / "model.pth")
    import_checkpoint(tmp_path / "model.pth", tmp_path / "out", n_heads=3)
    ids = random_ids(1, 8, vocab_size=97)
    logits = GPTScratchForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
    torch.testing.assert_close(logits, model(ids), atol=1e-4, rtol=1e-5)
    torch.save({"tok_emb.weight": np.float64(1.5)}, tmp_path / "model.pth")
    assert "a number of numpy" in refusal(tmp_path / "model.pth", n_heads=3)


def test_a_tokenizer_in_a_folder_is_said_to_be_left_behind(official, tmp_path):
    (official[1] / "tokenizer").mkdir()
    (official[1] / "tokenizer" / "tokenizer.json").write_text("{}")
    [note] = import_checkpoint(official[1], tmp_path / "out")["notes"]
    assert "left behind" in note and "tokenizer/tokenizer.json" in note


def test_a_receipt_does_not_write_what_it_likes_on_the_terminal(ours):
    values = json.loads((ours / "conversion_receipt.json").read_text()) | {"what": "\x1b[31mred" * 500}
    (ours / "conversion_receipt.json").write_text(json.dumps(values))
    status, output = run("verify-receipt", ours)
    assert status == 0 and len(output) < 1000 and "\x1b[31m" not in output


def test_a_terminal_without_some_letters_gets_the_others(encoding="ascii"):
    code = "from hf_gpt_scratch.cli.app import app; app(['explain', 'W_key'])"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert result.returncode == 0 and b"W_key" in result.stdout and b"Traceback" not in result.stderr


# GGUF


def gguf_copy(source, path, dtype=np.float32, **values):
    """A GGUF file's tensors in another dtype, with other metadata beside its own."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(path, "gpt2")
    for name, field in reader.fields.items():
        if name.startswith("gpt2."):
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, value in values.items():
        writer.add_uint16(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data).astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_of_float64_is_read_bit_for_bit(ours, tmp_path):
    export_checkpoint(ours, tmp_path / "gguf", "gguf")
    wide = gguf_copy(tmp_path / "gguf" / "model.gguf", tmp_path / "wide.gguf", np.float64)
    import_checkpoint(wide, tmp_path / "out")
    found, wanted = (load_file(directory / "model.safetensors") for directory in (tmp_path / "out", ours))
    assert all(found[name].dtype == torch.float64 and torch.equal(found[name], wanted[name].double()) for name in found)


def test_a_part_of_a_gguf_model_is_called_so(ours, tmp_path):
    export_checkpoint(ours, tmp_path / "gguf", "gguf")
    part = gguf_copy(tmp_path / "gguf" / "model.gguf", tmp_path / "part.gguf", **{"split.count": 2})
    assert "one of 2 parts" in refusal(part)


# What was asked for


def test_a_revision_is_never_passed_over(official, ours, tmp_path):
    torch.save(randomize(GPTModel(CFG)).state_dict(), tmp_path / "model.pth")
    for source, *options in (
        (ours, "--format", "gpt2"),
        (ours, "--format", "book"),
        (ours, "--format", "gguf"),
        (tmp_path / "model.pth", "--format", "gguf"),
    ):
        status, output = run("export", source, tmp_path / "out", *options, "--revision", "v1")
        assert status == 1 and "--revision v1 has no meaning" in output
    status, output = run("convert", tmp_path / "model.pth", tmp_path / "out", "--n-heads", 3, "--revision", "v1")
    assert status == 1 and "--revision v1 has no meaning" in output


def test_every_format_is_exported_from_the_hub(ours, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(ours))
    for format in ("gpt2", "book"):
        status, output = run("export", "me/mine", tmp_path / format, "--format", format, "--revision", "v1")
        assert status == 0, output


def test_a_shard_size_beyond_all_numbers_is_refused(official, tmp_path):
    status, output = run("convert", official[1], tmp_path / "out", "--max-shard-size", "9" * 400 + "GB")
    assert status == 1 and "give a size such as 5GB" in output and len(output) < 2000


@pytest.mark.parametrize("change", [{"pad_token_id": 5}, {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}}])
def test_classifiers_with_other_labels_or_padding_are_not_the_same(tmp_path, change):
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    sizes = dict(vocab_size=97, n_positions=32, n_embd=24, n_layer=2, n_head=3)
    config = GPT2Config(**sizes, num_labels=2, pad_token_id=0, id2label=labels)
    randomize(GPT2ForSequenceClassification(config)).save_pretrained(tmp_path / "official")
    import_checkpoint(tmp_path / "official", tmp_path / "ours")
    for command in ("verify", "compare"):
        assert run(command, tmp_path / "official", tmp_path / "ours")[0] == 0
    values = json.loads((tmp_path / "ours" / "config.json").read_text()) | change
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    for command in ("verify", "compare"):
        status, output = run(command, tmp_path / "official", tmp_path / "ours")
        assert status == 3 and next(iter(change)) in output and "The same model" not in output
    status, output = run("verify", tmp_path / "official", tmp_path / "ours", "--json")
    assert status == 3 and json.loads(output)["passed"] is False


def test_verify_takes_any_two_directories_and_tells_them_apart(official, ours, tmp_path):
    gpt2, place = official
    places = {"official": place, "ours": ours}
    for kind, model in (("official", gpt2), ("ours", GPTScratchForCausalLM.from_pretrained(ours))):
        with torch.no_grad():
            model.get_input_embeddings().weight[0, 0] += 1e-3
        places[f"other {kind}"] = tmp_path / f"other {kind}"
        model.save_pretrained(places[f"other {kind}"])
    for first in places:
        for second in places:
            same = first.startswith("other") == second.startswith("other")
            status, output = run("verify", places[first], places[second])
            assert status == (0 if same else 3), output
            assert same or "Different tensors: tok_emb.weight" in output


# Models in memory


def test_a_model_of_two_dtypes_is_not_rounded_in_silence():
    gpt2 = random_pair()[0].to(torch.bfloat16)
    gpt2.transformer.ln_f.float()
    with pytest.raises(ValueError, match=r"torch\.bfloat16, torch\.float32.*cast them first"):
        GPTScratchForCausalLM.from_gpt2(gpt2)
    GPTScratchForCausalLM.from_gpt2(gpt2.float())


def test_the_advice_for_a_data_parallel_model_works():
    parallel = nn.DataParallel(random_pair()[0])
    with pytest.raises(ValueError, match=r"got a DataParallel.*\.module"):
        GPTScratchForCausalLM.from_gpt2(parallel)
    GPTScratchForCausalLM.from_gpt2(parallel.module)
    parallel = nn.DataParallel(random_pair()[1])
    with pytest.raises(TypeError, match=r"model_card got a DataParallel; .*\.module"):
        model_card(parallel)
    model_card(parallel.module)


def test_the_books_model_is_taken_out_of_data_parallel():
    book, ids = randomize(GPTModel(CFG)).eval(), random_ids(vocab_size=97)
    ours = GPTScratchForCausalLM.from_book(nn.DataParallel(book))
    torch.testing.assert_close(ours(ids).logits, book(ids), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("change", [{"vocab_size": "97"}, {"n_heads": 3.0}, {"emb_dim": None}])
def test_a_size_that_is_no_whole_number_is_refused_by_name(change):
    [(name, value)] = change.items()
    with pytest.raises(ValueError, match=f"{name}='{value}'"):
        GPTScratchForCausalLM.from_book(GPTModel(CFG).state_dict(), CFG | change)


# Files that never end


@pytest.mark.parametrize("name", ["key.pth", "bare key.pth", "keys.pth"])
def test_weights_for_compare_are_read_as_all_others(ours, tmp_path, name):
    (tmp_path / "mine.py").write_text("from hf_gpt_scratch import GPTModel")
    (tmp_path / "model.pth").write_bytes(HUGE[name])
    begin = time.perf_counter()
    with pytest.raises(LabError, match="cannot read weights"):
        load(f"{tmp_path / 'mine.py'}:GPTModel", weights=tmp_path / "model.pth", cfg=json.dumps(CFG))
    assert time.perf_counter() - begin < 10


def test_pickles_of_a_quantized_model_are_looked_through_before_they_are_loaded(official, tmp_path):
    source = official[1]
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(HUGE["key.pth"])
    values = json.loads((source / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(LabError, match="as a key"):
        load(str(source))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.pth")
    assert "a pipe or a device" in refusal(tmp_path / "model.pth")
    with pytest.raises(ConversionError, match="a pipe or a device"):
        export_checkpoint(tmp_path / "model.pth", tmp_path / "out", "gpt2", n_heads=3)
    (tmp_path / "run1").mkdir()
    (tmp_path / "run1" / "hparams.json").write_text("{}")
    os.mkfifo(tmp_path / "run1" / "checkpoint")
    assert "a pipe or a device" in refusal(tmp_path / "run1")


def test_layers_that_a_long_header_promises_are_not_built(official):
    source, count = official[1], 50_000
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"h.{n}.ln_1.weight": nothing for n in range(count)}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    values = json.loads((source / "config.json").read_text()) | {"n_layer": count}
    (source / "config.json").write_text(json.dumps(values))
    begin = time.perf_counter()
    assert "at most 1000 layers" in refusal(source)
    assert time.perf_counter() - begin < 10


def test_directories_within_directories_are_extra_however_deep(ours, tmp_path, monkeypatch):
    monkeypatch.chdir(ours)
    for _ in range(1200):
        os.mkdir("a")
        os.chdir("a")
    os.chdir(tmp_path)
    try:
        with pytest.raises(ConversionError, match="extra: 'a/'"):
            verify_receipt(ours)
        assert run("convert", tmp_path / "official", ours, "--overwrite", "--weights-only")[0] == 1
    finally:
        deepest = ours
        os.chdir(ours)
        while os.path.isdir("a"):
            os.chdir("a")
        while not os.path.samefile(".", deepest):
            os.chdir("..")
            os.rmdir("a")
        os.chdir(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_is_cut_short_while_it_is_read_is_refused(name, tmp_path):
    random_pair()[0].save_pretrained(tmp_path)
    path = tmp_path / name
    if name == "model.safetensors":
        opened = checkpoint.safetensors(path)
    else:
        torch.save(load_file(tmp_path / "model.safetensors"), path)
        opened = checkpoint.pickled(path)
    last = list(opened.values())[-1]
    whole = last.read()
    os.truncate(path, path.stat().st_size // 2)
    assert whole.isfinite().all()  # memory of its own, not the file's
    with pytest.raises(ConversionError, match=f"{name} is truncated or corrupt"):
        last.read()
