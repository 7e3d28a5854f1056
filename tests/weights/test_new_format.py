"""A format that somebody adds: one class, registered; all guarantees come with it."""

import json
import re
import shutil
import zipfile
from functools import partial

import pytest
import torch
from pairs import gpt2_config, random_gpt2, random_pair
from transformers import GPT2ForSequenceClassification
from typer.testing import CliRunner

from hf_gpt_scratch import convert, export
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.weights.checkpoint import parse_json, read_part
from hf_gpt_scratch.weights.convert import verify_receipt
from hf_gpt_scratch.weights.formats import FORMATS, detect, read, register, write
from hf_gpt_scratch.weights.formats.format import Format, Layout, Source, Written, renamed
from hf_gpt_scratch.weights.tensors import LazyTensor

pytestmark = pytest.mark.slow


class Toy(Format):
    """A line of JSON, then the numbers in float32."""

    name = "toy"
    what = "the toy's file"
    layout = Layout(renamed(lambda row: f"toy/{row.theirs}", transposed=False), stores_tied_head=True)
    file = "model.toy"
    suffixes = (".toy",)

    def matches(self, found):
        return found.start == b'{"to'

    def open(self, found):
        with found.path.open("rb") as file:
            line = file.readline(1 << 20)
        try:
            about, at, tensors = parse_json(line)["toy"], len(line), {}
        except ValueError as error:
            raise ConversionError(f"{found.path} is corrupt ({error}); download it again") from error
        for name, shape in about["shapes"].items():
            values = LazyTensor(torch.Size(shape), torch.float32, lambda: None)
            tensors[name] = LazyTensor(
                values.shape, values.dtype, partial(read_part, found.path, at, values.shape, values.dtype)
            )
            at += values.nbytes
        return Source(self, found.path, tensors, {"n_heads": about["n_heads"]})

    def save(self, tensors, contents, path, options):
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        with path.open("wb") as file:
            about = {"n_heads": contents.config.n_heads, "shapes": shapes}
            file.write(json.dumps({"toy": about}).encode() + b"\n")
            for tensor in tensors.values():
                file.write(tensor.read().contiguous().numpy().tobytes())
                options.progress.advance(tensor.nbytes)
        return Written(["toys are for play"])


@pytest.fixture
def toy():
    before = dict(FORMATS)
    register(Toy())
    yield FORMATS["toy"]
    FORMATS.clear()
    FORMATS.update(before)


@pytest.fixture
def native(tmp_path):
    random_gpt2(tie_word_embeddings=False).save_pretrained(tmp_path / "official")
    convert(tmp_path / "official", tmp_path / "native", check=False)
    return tmp_path / "native"


def test_it_goes_there_and_back_with_receipts(toy, native, tmp_path):
    receipt = export(native, tmp_path / "there", "toy")
    assert receipt["what"] == "native converted to toy by hf_gpt_scratch"
    assert receipt["parity"] == {"passed": True, "weights_equal": True, "tensors": 52 + 1}
    assert "toys are for play" in receipt["notes"]
    assert verify_receipt(tmp_path / "there") == receipt
    assert detect(tmp_path / "there/model.toy") == "toy"
    back = convert(tmp_path / "there/model.toy", tmp_path / "back")
    assert back["source"]["format"] == "toy" and back["source"]["files"].keys() == {"model.toy"}
    assert (tmp_path / "back/model.safetensors").read_bytes() == (native / "model.safetensors").read_bytes()
    assert "a `toy` checkpoint" in (tmp_path / "back/README.md").read_text()
    export(tmp_path / "there/model.toy", tmp_path / "official again", "gpt2")
    again = (tmp_path / "official again/model.safetensors").read_bytes()
    assert again == (tmp_path / "official/model.safetensors").read_bytes()


def test_the_command_knows_it(toy, native, tmp_path):
    done = CliRunner().invoke(app, ["export", str(native), str(tmp_path / "there"), "--format", "toy"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["export", str(native), str(tmp_path / "other"), "--format", "toys"])
    assert done.exit_code == 2 and "toy" in done.output


def test_messages_name_it(toy, native, tmp_path):
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(ConversionError, match=r"these formats can be read: .*the toy's file"):
        detect(tmp_path / "text.txt")
    with pytest.raises(ConversionError, match=r"no such|cannot be read \(No such file"):
        convert(tmp_path / "nowhere.toy", tmp_path / "out")  # its suffix says that it is no hub id
    export(native, tmp_path / "there", "toy")
    with pytest.raises(ConversionError, match=r"give the file, .*model\.toy"):
        detect(tmp_path / "there")
    with pytest.raises(ConversionError, match=r"got format 'toys'.*gguf, llmc, onnx, toy"):
        export(native, tmp_path / "out", "toys")
    with pytest.raises(ConversionError, match="already has the format 'toy'"):
        export(tmp_path / "there/model.toy", tmp_path / "out", "toy")


def test_what_it_cannot_express_is_refused_before_anything_is_written(toy, tmp_path):
    ours = random_pair(activation_function="relu")[1]
    with pytest.raises(ConversionError, match=r"activation_function='relu'.*toy supports only"):
        write(ours, ours.config, tmp_path / "model.toy", "toy")
    GPT2ForSequenceClassification(gpt2_config()).save_pretrained(tmp_path / "head")
    with pytest.raises(ConversionError, match="'toy' stores language models alone; use the format 'gpt2' instead"):
        export(tmp_path / "head", tmp_path / "out", "toy")
    ours = random_pair()[1]
    with pytest.raises(ConversionError, match="only 'nanogpt' has the choice"):
        write(ours, ours.config, tmp_path / "model.toy", "toy", bias=True)
    assert {path.name for path in tmp_path.iterdir()} == {"head"}


def test_damage_is_refused_and_leaves_nothing(toy, native, tmp_path):
    export(native, tmp_path / "there", "toy")
    whole = (tmp_path / "there/model.toy").read_bytes()
    nan = whole[:-4] + b"\xff\xff\xff\xff"
    for damaged, told in (
        (whole[:-8], "truncated|corrupt"),
        (nan, "1 values that are NaN"),
        (whole.replace(b"ln_f.weight", b"ln_f.weights"), "lacks .*ln_f"),
    ):
        (tmp_path / "damaged.toy").write_bytes(damaged)
        with pytest.raises(ConversionError, match=told):
            convert(tmp_path / "damaged.toy", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    config, state_dict = read(tmp_path / "there/model.toy")
    assert config.n_heads == 4 and len(state_dict) == 52 + 1


@pytest.mark.parametrize("mistake", ["a value", "a name", "another format"])
def test_what_it_writes_wrong_is_not_published(toy, native, tmp_path, monkeypatch, mistake):
    save = toy.save

    def wrong(tensors, contents, path, options):
        written = save(tensors, contents, path, options)
        data = path.read_bytes()
        if mistake == "another format":
            shutil.copyfile(tmp_path / "book/model.pth", path)
        elif mistake == "a value":
            path.write_bytes(data[:-4] + b"\0\0\0\0")
        else:
            path.write_bytes(
                re.sub(rb"h\.(1)\.(ln_1\.bias.*)h\.\1\.ln_2\.bias", rb"h.1.ln_2.bias\2h.1.ln_1.bias", data)
            )
        return written

    export(native, tmp_path / "book", "book")
    monkeypatch.setattr(toy, "save", wrong)
    with pytest.raises((ParityError, ConversionError)):
        export(native, tmp_path / "out", "toy")
    assert not (tmp_path / "out").exists()


def test_it_is_asked_before_those_that_would_refuse_its_files(toy, tmp_path):
    class Zipped(Toy):
        name = "zipped"

        def matches(self, found):
            return found.path.suffix == ".zipped"

        def open(self, found):
            return Source(self, found.path)

    register(Zipped())
    with zipfile.ZipFile(tmp_path / "a.zipped", "w") as archive:
        archive.writestr("a", "b")
    assert detect(tmp_path / "a.zipped") == "zipped"
    shutil.copyfile(tmp_path / "a.zipped", tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"0 records data\.pkl instead of one"):
        detect(tmp_path / "a.pth")


def test_a_name_that_is_taken_is_refused(toy):
    with pytest.raises(ValueError, match="there already is a format 'toy'"):
        register(Toy())
