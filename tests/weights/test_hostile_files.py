"""Files that are hostile, damaged or odd: what is read is what the libraries read, and all else is refused at once."""

import codecs
import io
import json
import os
import shutil
import struct
import sys
import time
import zipfile
from collections import OrderedDict

import gguf
import pytest
import torch
from gguf.scripts import gguf_convert_endian
from pairs import random_gpt2, random_pair
from peft import LoraConfig, get_peft_model
from programs import TF, Fused, book_model, nanogpt_file
from safetensors.torch import load_file, save_file
from torch import nn

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.errors import LONGEST_MESSAGE, ConversionError
from hf_gpt_scratch.weights import torch_archive
from hf_gpt_scratch.weights.convert import gpt2_to_scratch, import_checkpoint
from hf_gpt_scratch.weights.formats import detect, read, write
from hf_gpt_scratch.weights.formats.tensorflow import read_tensorflow

pytestmark = pytest.mark.slow

HEADS = 4


def text(content):
    return struct.pack("<Q", len(content)) + content


def archive(pickled, **records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in {"data.pkl": pickled, **records}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


GGUF = b"GGUF" + struct.pack("<I", 3)
DOUBLED = b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))  # a pair of the same thing, 200 times
SAME_HASH = [(i * (2**61 - 1)).to_bytes(10, "little") for i in range(30_000)]
HUGE = {
    "array.gguf": GGUF + struct.pack("<QQ", 0, 1) + text(b"x") + struct.pack("<IIQ", 9, 0, 1 << 40),
    "strings.gguf": GGUF + struct.pack("<QQ", 0, 1) + text(b"x") + struct.pack("<IIQ", 9, 8, 1 << 40),
    "arrays.gguf": GGUF + struct.pack("<QQ", 0, 1) + text(b"x") + struct.pack("<IIQ", 9, 9, 1 << 40),
    "string.gguf": GGUF + struct.pack("<QQQ", 0, 1, 1 << 62),
    "pairs.gguf": GGUF + struct.pack("<QQ", 0, 1 << 60),
    "tensors.gguf": GGUF
    + struct.pack("<QQ", 1 << 60, 1)
    + text(b"general.architecture")
    + struct.pack("<I", 8)
    + text(b"gpt2"),
    "key.pth": archive(b"\x80\x02})" + DOUBLED + b"Ns."),
    "bare key.pth": b"\x80\x02})" + DOUBLED + b"Ns.",
    "called.pth": archive(b"\x80\x02)" + DOUBLED + b")R."),
    "deep.pth": archive(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."),
    "steps.pth": archive(b"\x80\x02" + b"N0" * 5_000_000),
    "marks.pth": archive(b"\x80\x02" + b"(" * 300_000 + b"."),
    "string.pth": archive(b"\x80\x02X\xff\xff\xff\x7fabc."),
    "bytearray.pth": archive(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06\0\0\0\0\0\1\x85R."),
    "keys.pth": archive(
        b"\x80\x02}("
        + b"".join(b"\x8a\x0a%bN" % (i * (2**61 - 1)).to_bytes(10, "little") for i in range(30_000))
        + b"u."
    ),
    "name.pth": archive(b"\x80\x02c" + b"x" * 1_000_000),
    "tensor.pth": archive(
        b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\n"
        b"X\1\0\0\x000X\3\0\0\0cpuK\1tQK\0\x8a\x06\0\0\0\0\0\1\x85K\0\x85\x89}tRs.",
        **{"data/0": bytes(4)},
    ),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_promises_much_with_few_bytes_is_refused_at_once(tmp_path, name):
    (tmp_path / name).write_bytes(HUGE[name])
    begin = time.process_time()
    with pytest.raises(ConversionError) as error:
        detect(tmp_path / name)
    assert time.process_time() - begin < 20
    assert len(str(error.value)) <= LONGEST_MESSAGE


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_deep_and_long_json_is_refused_at_once(tmp_path, name):
    random_gpt2().save_pretrained(tmp_path / "a")
    for spoiled in (b'{"a":' * 50_000, b"[" * 3_000_000, b'{"%b": 1}' % (b"x" * 2_000_000)):
        head = struct.pack("<Q", len(spoiled)) if name.endswith("safetensors") else b""
        if name.endswith("index.json"):
            (tmp_path / "a/model.safetensors").unlink(missing_ok=True)
        (tmp_path / "a" / name).write_bytes(head + spoiled)
        with pytest.raises(ConversionError) as error:
            gpt2_to_scratch(tmp_path / "a", tmp_path / "b")
        assert len(str(error.value)) <= LONGEST_MESSAGE


# torch.save


def everything():
    base = torch.randn(6, 8)
    return OrderedDict(
        whole=base,
        turned=base.T,
        part=base[1:5:2, 3:],
        same=base,
        none=torch.empty(0, 3),
        number=torch.tensor(1.5),
        parameter=nn.Parameter(torch.randn(3)),
        **{
            str(dtype): torch.randn(5).to(dtype)
            for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64)
        },
        truth=torch.tensor([True, False]),
        bytes=torch.arange(5, dtype=torch.uint8),
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_are_those_that_torch_load_reads(tmp_path, zipped):
    torch.save(
        {"model": everything(), "lr": [0.1, None, ("a", -3, 2**40)]},
        tmp_path / "a",
        _use_new_zipfile_serialization=zipped,
    )
    ours, theirs = torch_archive.load(tmp_path / "a"), torch.load(tmp_path / "a", weights_only=True)
    assert ours["lr"] == theirs["lr"]
    assert list(ours["model"]) == list(theirs["model"])
    for name, tensor in theirs["model"].items():
        found = ours["model"][name].read()
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor), name


def test_a_training_checkpoint_is_read_and_its_optimizer_passed_over(tmp_path):
    model = book_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    state = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "shape": model.tok_emb.weight.shape,
    }
    torch.save(state, tmp_path / "model.pth")
    _, found = read(tmp_path / "model.pth", n_heads=HEADS)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def recut(path, change):
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in records.items():
            file.writestr(name, data)


def of(records, end):
    return next(name for name in records if name.endswith(end))


DAMAGED_ARCHIVES = {
    r"record '0' has 4\d+ bytes, but according to": lambda r: r.update({of(r, "/data/0"): r[of(r, "/data/0")][:-8]}),
    r"record '0' has 0 bytes": lambda r: r.update({of(r, "/data/0"): b""}),
    r"record '1' has \d+ bytes": lambda r: r.update({of(r, "/data/1"): r[of(r, "/data/1")] + bytes(4)}),
    r"no record '2'": lambda r: r.pop(of(r, "/data/2")),
    r"byte order is b'big'": lambda r: r.update({of(r, "byteorder"): b"big"}),
    r"0 records data\.pkl": lambda r: r.pop(of(r, "data.pkl")),
    r"pickle ends 3 bytes before": lambda r: r.update({of(r, "data.pkl"): r[of(r, "data.pkl")] + b"abc"}),
}


@pytest.mark.parametrize("message", DAMAGED_ARCHIVES)
def test_archive_whose_records_are_not_as_its_pickle_says_is_refused(tmp_path, message):
    """The checksums of all records are right."""
    torch.save(book_model().state_dict(), tmp_path / "model.pth")
    recut(tmp_path / "model.pth", lambda records: None)
    read(tmp_path / "model.pth", n_heads=HEADS)
    recut(tmp_path / "model.pth", DAMAGED_ARCHIVES[message])
    with pytest.raises(ConversionError, match=message):
        read(tmp_path / "model.pth", n_heads=HEADS)


@pytest.mark.parametrize("where", ["behind", "before"])
def test_bytes_that_belong_to_nothing_are_refused(tmp_path, where):
    torch.save(book_model().state_dict(), tmp_path / "model.pth")
    data = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(data + b"x" if where == "behind" else b"PK12" + data)
    with pytest.raises(ConversionError, match=r"bytes after its end|do not start at the beginning"):
        read(tmp_path / "model.pth", n_heads=HEADS)


def test_tensor_beyond_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.randn(4, 6)}, tmp_path / "a")
    # 24 values from the 0th on, then from the 1st on
    recut(tmp_path / "a", lambda r: r.update({of(r, ".pkl"): r[of(r, ".pkl")].replace(b"QK\0K\4K\6", b"QK\1K\4K\6")}))
    with pytest.raises(ValueError, match=r"shape \[4, 6\] that ends beyond its storage"):
        torch_archive.load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning", "ignore:.*quantize:")
@pytest.mark.parametrize(
    ("kind", "make"),
    {
        "torch.sparse": lambda t: t.to_sparse(),
        "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "nested": lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]]),
        "on the meta device": lambda t: t.to("meta"),
        "repeats": lambda t: torch.zeros(1).expand(t.shape),
    }.items(),
)
def test_tensors_that_are_not_dense_are_named(tmp_path, kind, make):
    state_dict = book_model().state_dict()
    name = "trf_blocks.1.ff.layers.0.weight"
    torch.save({**state_dict, name: make(state_dict[name])}, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=rf"holds '{name}': a .*{kind}"):
        read(tmp_path / "model.pth", n_heads=HEADS)


# GGUF


@pytest.fixture
def gguf_file(tmp_path):
    ours = random_pair()[1]
    write(ours, ours.config, tmp_path / "model.gguf", "gguf")
    return tmp_path / "model.gguf"


def test_big_endian_gguf_is_refused_and_the_advice_works(gguf_file, monkeypatch):
    before = read(gguf_file)[1]
    monkeypatch.setattr("builtins.input", lambda *args: "YES")

    def convert(order):
        monkeypatch.setattr(sys, "argv", ["gguf-convert-endian", str(gguf_file), order])
        gguf_convert_endian.main()

    convert("big")
    with pytest.raises(ConversionError, match=r"is big-endian.*: gguf-convert-endian .*model\.gguf little"):
        read(gguf_file)
    convert("little")
    assert all(torch.equal(tensor, before[name]) for name, tensor in read(gguf_file)[1].items())


def offsets(path):
    reader = gguf.GGUFReader(path)
    return [tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) - 8 for tensor in reader.tensors]


@pytest.mark.parametrize("move", [4, 32, -32, 1 << 40])
def test_gguf_tensors_that_overlap_or_leave_a_hole_are_refused(gguf_file, move):
    data = bytearray(gguf_file.read_bytes())
    at = offsets(gguf_file)[3]
    struct.pack_into("<Q", data, at, struct.unpack_from("<Q", data, at)[0] + move)
    gguf_file.write_bytes(data)
    with pytest.raises(ConversionError, match=r"begins at \d+, but the one before it ends at"):
        read(gguf_file)


def test_other_damage_to_gguf_is_refused_by_what_it_is(gguf_file):
    whole = gguf_file.read_bytes()
    for old, new, message in (
        (b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight", "'blk.0.attn_norm.weight' occurs twice"),
        (b"gpt2.block_count", b"gpt2.bloke_count", r"has gpt2\.bloke_count=3, but a GPT-2 has only"),
        (b"gpt2.block_count\4", b"gpt2.block_count\6", r"has gpt2\.block_count=\d.*whole numbers"),
        (b"general.file_type", b"general.alignment", r"general\.alignment=0, which is not a power of two"),
    ):
        assert old in whole
        gguf_file.write_bytes(whole.replace(old, new))
        with pytest.raises(ConversionError, match=message):
            read(gguf_file)
    for spoiled in (whole[:-40], whole + bytes(32)):
        gguf_file.write_bytes(spoiled)
        with pytest.raises(ConversionError, match=r"it has \d+ bytes, but according to its header"):
            read(gguf_file)


def test_gguf_is_read_without_the_package(gguf_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert read(gguf_file)[0].n_heads == HEADS


# TensorFlow


def test_directory_written_on_windows_is_read(tmp_path):
    shutil.copy(TF / "hparams.json", tmp_path)
    for end in (".index", ".data-00000-of-00001"):
        shutil.copy(TF / f"model.ckpt{end}", tmp_path / f"model-1000{end}")
        shutil.copy(TF / f"model.ckpt{end}", tmp_path / f"model-2000{end}")
    for told in (r"C:\\Users\\me\\run1\\model-1000", "/content/run1/model-1000", "model-1000"):
        (tmp_path / "checkpoint").write_text(f'model_checkpoint_path: "{told}"\nall_model_checkpoint_paths: "x"\n')
        assert len(read_tensorflow(tmp_path)) == len(read_tensorflow(TF))
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "C:\\\\model-3000"\n')
    with pytest.raises(ConversionError, match=r"\(model-3000\)"):
        read_tensorflow(tmp_path)


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    shutil.copytree(TF, tmp_path / "tf")
    with (tmp_path / "tf/model.ckpt.data-00000-of-00001").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(ConversionError, match=r"bytes, but its tensors end at"):
        read_tensorflow(tmp_path / "tf")


# Directories


@pytest.fixture
def source(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32, torch.float16])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_mask_buffers_are_dropped_whatever_their_dtype(tmp_path, source, dtype, file):
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 9, 9).tril().to(dtype) for n in range(3)}
    masks |= {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(3)}
    if file.endswith("bin"):
        torch.save(weights | masks, source / file)
    else:
        save_file(weights | masks, source / file, metadata={"format": "pt"})
    gpt2_to_scratch(source, tmp_path / "target")
    back = GPTScratchForCausalLM.from_pretrained(tmp_path / "target").to_gpt2().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_a_weight_of_another_dtype_is_still_refused(tmp_path, source):
    weights = load_file(source / "model.safetensors")
    weights["transformer.h.0.attn.c_attn.bias"] = weights["transformer.h.0.attn.c_attn.bias"].to(torch.uint8)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=r"'transformer\.h\.0\.attn\.c_attn\.bias'.*uint8"):
        gpt2_to_scratch(source, tmp_path / "target")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_are_followed_as_from_pretrained_follows_them(tmp_path, source, name):
    (tmp_path / "elsewhere").mkdir()
    (source / name).rename(tmp_path / "elsewhere" / "blob")
    (source / name).symlink_to("../elsewhere/blob")
    gpt2_to_scratch(source, tmp_path / "target")
    assert not (tmp_path / "target" / name).is_symlink()
    (tmp_path / "elsewhere/blob").unlink()
    with pytest.raises(ConversionError, match=r"link to '\.\./elsewhere/blob', which does not exist|no config\.json"):
        gpt2_to_scratch(source, tmp_path / "other")


def test_pipes_devices_and_sockets_are_refused(tmp_path, source):
    os.mkfifo(source / "pipe")
    with pytest.raises(ConversionError, match="not a file but a pipe or a device"):
        gpt2_to_scratch(source, tmp_path / "target")
    (source / "pipe").unlink()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ConversionError, match="not a file but a pipe or a device"):
        gpt2_to_scratch(source, tmp_path / "target")


def test_an_adapter_is_no_model_and_the_advice_works(tmp_path, source):
    official = random_gpt2()
    adapted = get_peft_model(
        official, LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    )
    adapted.save_pretrained(source)
    adapted.save_pretrained(tmp_path / "alone")
    for directory in (source, tmp_path / "alone"):
        for convert in (gpt2_to_scratch, import_checkpoint):
            with pytest.raises(ConversionError, match=r"PEFT adapter.*merge_and_unload\(\)\.save_pretrained"):
                convert(directory, tmp_path / "target")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    gpt2_to_scratch(tmp_path / "merged", tmp_path / "target")


@pytest.fixture
def shards(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "source", max_shard_size="100KB")
    return tmp_path / "source"


def index_of(directory):
    return json.loads((directory / "model.safetensors.index.json").read_text())


def test_index_without_metadata_is_refused_and_the_advice_works(tmp_path, shards):
    index = index_of(shards)
    del index["metadata"]
    path = shards / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r'has no "metadata".*add "metadata": \{\} to it'):
        gpt2_to_scratch(shards, tmp_path / "target")
    path.write_text(json.dumps({"metadata": {}, **index}))
    assert gpt2_to_scratch(shards, tmp_path / "target")["parity"]["passed"]


def test_index_that_names_other_tensors_than_the_shards_hold_is_refused(tmp_path, shards):
    index = index_of(shards)
    path, (name, other) = shards / "model.safetensors.index.json", sorted(index["weight_map"])[:2]
    without = {key: file for key, file in index["weight_map"].items() if key != name}
    for weight_map, message in (
        (without, rf"holds '{name}', which the shard index does not name"),
        ({**index["weight_map"], "x": index["weight_map"][name]}, r"names 'x' in .*which does not hold it"),
        ({**index["weight_map"], name: "../other.safetensors"}, r"shards must be beside their index"),
        ({**index["weight_map"], other: "absent.safetensors"}, r"'absent\.safetensors', which is missing"),
    ):
        path.write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(ConversionError, match=message):
            gpt2_to_scratch(shards, tmp_path / "target")


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_byte_order_mark_is_refused_and_the_advice_works(tmp_path, shards, name):
    path = shards / name
    content = path.read_bytes()
    for spoiled in (codecs.BOM_UTF8 + content, content.decode().encode("utf-16")):
        path.write_bytes(spoiled)
        with pytest.raises(ConversionError, match=r"begins with a byte-order mark.*save it as UTF-8"):
            gpt2_to_scratch(shards, tmp_path / "target")
    path.write_bytes(content)
    gpt2_to_scratch(shards, tmp_path / "target")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_dict", False),
        ("return_dict", None),
        ("is_encoder_decoder", True),
        ("output_hidden_states", 3.5),
        ("output_hidden_states", [1]),
        ("output_attentions", {"a": 1}),
        ("pad_token_id", -1e30),
        ("pad_token_id", 10**30),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", float("inf")),
        ("initializer_range", float("inf")),
        ("resid_pdrop", float("nan")),
        ("task_specific_params", {"a": {"b": [float("nan")]}}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("pruned_heads", {"0": [1]}),
        ("dtype", "int8"),
        ("torch_dtype", 3),
        ("architectures", "GPT2LMHeadModel"),
        ("architectures", [3]),
        ("id2label", [1]),
        ("label2id", "x"),
        ("n_head", "4"),
        ("n_embd", 48.0),
        ("vocab_size", True),
        ("activation_function", ["gelu"]),
        ("eos_token_id", "x" * 100_000),
    ],
)
def test_settings_that_no_model_can_obey_are_refused_by_name(tmp_path, source, name, value):
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, name: value}))
    with pytest.raises(ConversionError, match=rf"config\.json is not usable: .*{name}") as error:
        gpt2_to_scratch(source, tmp_path / "target")
    assert len(str(error.value)) <= LONGEST_MESSAGE
    assert not (tmp_path / "target").exists()


def test_strange_model_args_of_a_checkpoint_are_refused(tmp_path):
    """Lists that hold each other, of which a message must not show all."""
    deep = []
    for _ in range(100):
        deep = [deep, deep]
    path = nanogpt_file(tmp_path / "ckpt.pt", Fused())
    content = torch.load(path, weights_only=True)
    content["model_args"]["n_head"] = deep
    torch.save(content, path)
    with pytest.raises(ConversionError, match="a list for n_head in its model_args"):
        read(path)
