"""The streamed files are the ones that the libraries write, and memory does not grow with the model."""

import importlib
import json
import zipfile
from pathlib import Path

import pytest
import torch
from files import rewrite, sha256
from forks import run_python
from pairs import gpt2_config, random_gpt2, random_pair, randomize
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.model.heads_gpt_scratch import MODELS
from hf_gpt_scratch.weights.checkpoint import Checkpoint, Progress, read_pickle, write_safetensors
from hf_gpt_scratch.weights.convert import (
    RECEIPT,
    export_checkpoint,
    gpt2_to_scratch,
    import_checkpoint,
    scratch_to_gpt2,
    verify_receipt,
)
from hf_gpt_scratch.weights.formats import detect, torch_file, write
from hf_gpt_scratch.weights.formats.directory import CARD
from hf_gpt_scratch.weights.formats.torch_file import save_tensors
from hf_gpt_scratch.weights.parity import same_bits
from hf_gpt_scratch.weights.tensors import held

pytestmark = pytest.mark.slow


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in (RECEIPT, CARD)}


def official(model_class, **changes):
    with torch.random.fork_rng():
        return randomize(model_class.gpt2_class(gpt2_config(**changes))).eval()


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("shards", [None, "60KB"])
def test_streamed_directory_is_the_one_save_pretrained_writes(tmp_path, model_class, shards):
    options = {} if shards is None else {"max_shard_size": shards}
    gpt2 = official(model_class, tie_word_embeddings=True)
    if gpt2.can_generate():
        gpt2.generation_config.max_new_tokens = 7
    gpt2.save_pretrained(tmp_path / "a", **options)
    receipt = gpt2_to_scratch(tmp_path / "a", tmp_path / "b", **options)
    assert receipt["parity"]["passed"]
    model_class.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "expected", **options)
    assert files(tmp_path / "b") == files(tmp_path / "expected")
    assert len(files(tmp_path / "b")) > (10 if shards else 5)
    scratch_to_gpt2(tmp_path / "b", tmp_path / "c", **options)
    assert files(tmp_path / "c") == files(tmp_path / "a")
    assert verify_receipt(tmp_path / "b") == receipt


def test_outputs_of_a_head_are_verified(tmp_path, monkeypatch):
    """The mutation twin: another epsilon has the same weights, and other outputs."""
    official(MODELS[3]).save_pretrained(tmp_path / "a")
    from_pretrained = MODELS[3].from_pretrained

    def sabotaged(*args, **kwargs):
        model = from_pretrained(*args, **kwargs)
        model.model.final_norm.eps = 1.0
        return model

    monkeypatch.setattr(MODELS[3], "from_pretrained", sabotaged)
    with pytest.raises(ParityError, match=r"weights: equal"):
        gpt2_to_scratch(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_other_architecture_is_refused_by_name(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "a")
    values = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps({**values, "architectures": ["GPT2ForPoetry"]}))
    with pytest.raises(ConversionError, match=r"'GPT2ForPoetry', but must name one of GPT2LMHeadModel, GPT2Model"):
        gpt2_to_scratch(tmp_path / "a", tmp_path / "b")


def test_tensors_keep_their_own_dtypes(tmp_path):
    gpt2 = random_gpt2().to(torch.bfloat16)
    for module in gpt2.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    gpt2.transformer.wpe.half()
    gpt2.save_pretrained(tmp_path / "a")
    gpt2_to_scratch(tmp_path / "a", tmp_path / "b", check="weights")
    dtypes = {name: tensor.dtype for name, tensor in load_file(tmp_path / "b/model.safetensors").items()}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16, torch.float16}
    assert dtypes["model.trf_blocks.1.norm1.scale"] == torch.float32
    scratch_to_gpt2(tmp_path / "b", tmp_path / "c", check="weights")
    assert files(tmp_path / "c") == files(tmp_path / "a")


def test_query_key_and_value_of_several_dtypes_are_refused(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "a")
    gpt2_to_scratch(tmp_path / "a", tmp_path / "b", check=False)
    name = "model.trf_blocks.1.att.W_key.weight"
    rewrite(tmp_path / "b", lambda tensors: {**tensors, name: tensors[name].half()})
    with pytest.raises(ConversionError, match=r"W_key\.weight' is torch\.float16.*one tensor"):
        scratch_to_gpt2(tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize("equal", [True, False])
def test_second_copy_of_a_tied_matrix_must_be_equal(tmp_path, equal):
    random_gpt2().save_pretrained(tmp_path / "a")

    def add(tensors):
        head = tensors["transformer.wte.weight"].clone()
        head[3, 5] += 0 if equal else 1e-3
        return {**tensors, "lm_head.weight": head}

    rewrite(tmp_path / "a", add)
    if equal:
        assert gpt2_to_scratch(tmp_path / "a", tmp_path / "b")["parity"]["passed"]
        assert "out_head.weight" not in load_file(tmp_path / "b/model.safetensors")
    else:
        with pytest.raises(ConversionError, match=r"'lm_head\.weight' is not equal to 'transformer\.wte\.weight'"):
            gpt2_to_scratch(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_convert_with_the_same_result(tmp_path, zipped):
    random_gpt2().save_pretrained(tmp_path / "a")
    gpt2_to_scratch(tmp_path / "a", tmp_path / "from safetensors", check=False)
    tensors = load_file(tmp_path / "a/model.safetensors")
    torch.save(tensors, tmp_path / "a/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (tmp_path / "a/model.safetensors").unlink()
    gpt2_to_scratch(tmp_path / "a", tmp_path / "from pickle", check="weights")
    assert files(tmp_path / "from pickle") == files(tmp_path / "from safetensors")


def test_writer_writes_what_safetensors_does(tmp_path):
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float16, torch.float64, torch.bfloat16, torch.float32]
    shapes = [(3, 5), (7,), (), (2, 3, 4), (1, 1)]
    tensors = {
        f"{'ab'[i % 2]}.{i}": torch.randn(shapes[i % 5], generator=generator, dtype=torch.float64).to(dtypes[i % 4])
        for i in range(40)
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    lazies = held(dict(reversed(tensors.items())))
    assert write_safetensors(tmp_path / "ours", lazies, Progress()) == sha256(tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_comparison_of_the_weights_finds_one_wrong_bit(tmp_path, monkeypatch):
    random_gpt2().save_pretrained(tmp_path / "a")
    assert gpt2_to_scratch(tmp_path / "a", tmp_path / "b", check="weights")["parity"] == {
        "passed": True,
        "tensors": len(load_file(tmp_path / "a/model.safetensors")),
        "weights_equal": True,
    }

    def flipped(path, tensors, progress):
        name = "model.trf_blocks.1.att.W_key.weight"
        wrong = tensors[name].read().clone()
        wrong.view(torch.int32)[3, 5] ^= 1
        return write_safetensors(path, {**tensors, **held({name: wrong})}, progress)

    monkeypatch.setattr("hf_gpt_scratch.weights.formats.directory.write_safetensors", flipped)
    with pytest.raises(ParityError, match=r"'h\.1\.attn\.c_attn\.weight' is not equal to the source's"):
        gpt2_to_scratch(tmp_path / "a", tmp_path / "c", check="weights")
    assert not (tmp_path / "c").exists()


def test_biases_that_only_gpt2_has_are_zeros(tmp_path):
    from pairs import tiny_model

    tiny_model().save_pretrained(tmp_path / "ours")
    assert scratch_to_gpt2(tmp_path / "ours", tmp_path / "gpt2", check="weights")["parity"]["passed"]
    zeros = load_file(tmp_path / "gpt2/model.safetensors")["transformer.h.0.attn.c_attn.bias"]
    assert zeros.numel()
    assert not zeros.any()


def test_bad_shard_size_is_refused(tmp_path):
    random_gpt2().save_pretrained(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"max_shard_size='much'.*such as 5GB"):
        gpt2_to_scratch(tmp_path / "a", tmp_path / "b", max_shard_size="much")
    assert not (tmp_path / "b").exists()


# Of memory that is no file's: what is mapped, the system takes back when it needs it.
WATCH = r"""
import json, os, re, sys, threading, warnings
warnings.simplefilter("ignore")

def anonymous():
    return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024

def peak(function, *arguments, **options):
    before, found, stop = anonymous(), [0], threading.Event()
    def watch():
        while not stop.wait(0.002):
            found.append(anonymous() - before)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function(*arguments, **options)
    finally:
        stop.set()
        watcher.join()
    return max(found)
"""

PEAK = (
    WATCH
    + """
from hf_gpt_scratch.weights import convert as conversion

for direction, kind, check in json.loads(sys.argv[2]):
    if os.fork() == 0:
        os.chdir(sys.argv[1])
        convert = getattr(conversion, direction)
        convert(f"small{kind}", f"small{kind} {check}", check=check)
        print(peak(convert, f"big{kind}", f"big{kind} {check}", check=check), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
)


@pytest.mark.long
def test_memory_is_bounded_by_two_of_the_largest_tensors(tmp_path):
    """Whatever the source; the mutation twin is the verification in float32, which needs both models."""
    big = random_gpt2(n_embd=256, n_layer=30, vocab_size=24_000)
    for name, gpt2 in (("small", random_gpt2()), ("big", big)):
        gpt2.save_pretrained(tmp_path / name)
        gpt2_to_scratch(tmp_path / name, tmp_path / f"{name} ours", check=False)
        (tmp_path / f"{name} pickled").mkdir()
        (tmp_path / f"{name} pickled/config.json").write_bytes((tmp_path / name / "config.json").read_bytes())
        torch.save(gpt2.state_dict(), tmp_path / f"{name} pickled/pytorch_model.bin")
    sizes = [spec.nbytes for spec in Checkpoint(tmp_path / "big").tensors.values()]
    assert sum(sizes) > 4.5 * max(sizes)

    there = [("gpt2_to_scratch", kind, check) for kind in ("", " pickled") for check in (False, "weights")]
    back = [("scratch_to_gpt2", " ours", check) for check in (False, "weights")]
    cases = [*there, *back, ("gpt2_to_scratch", "", True)]
    done = run_python("-c", PEAK, tmp_path, json.dumps(cases))
    assert done.returncode == 0, done.stderr
    *streamed, verified = map(int, done.stdout.split())
    # 32 MB for what the allocator keeps of small tensors, and the buffers of the files that are hashed.
    bound = 2 * max(sizes) + 32e6
    assert all(peak < bound for peak in streamed), (cases, streamed, max(sizes))
    assert verified > 1.5 * bound


FORMATS_PEAK = (
    WATCH
    + """
from hf_gpt_scratch.weights import convert as conversion
from hf_gpt_scratch.weights.formats import FORMATS
from hf_gpt_scratch.weights.tensors import held

def convert(size, out, into, twin):
    target = f"{size} from {into} to {out} {twin}"
    if out:
        conversion.export(f"{size} native", target, out)
    else:
        path = f"{size} {into}/{FORMATS[into].file or ''}"
        conversion.convert(path, target, n_heads=4 if into == "book" else None)

def reads_all_at_once(format):
    read = format.read

    def all_at_once(*arguments):
        contents = read(*arguments)
        contents.tensors = held({name: tensor.read().clone() for name, tensor in contents.tensors.items()})
        return contents

    format.read = all_at_once

for out, into, twin in json.loads(sys.argv[2]):
    if os.fork() == 0:
        os.chdir(sys.argv[1])
        if twin:
            reads_all_at_once(FORMATS[into or "native"])
        convert("small", out, into, twin)
        print(peak(convert, "big", out, into, twin), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(1)
"""
)


@pytest.mark.long
def test_memory_of_other_programs_formats_is_bounded_by_two_of_the_largest_tensors(tmp_path, monkeypatch):
    """There and back; the mutation twin reads all tensors before it writes the first."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    write_openai = importlib.import_module("convert").write_openai
    big = random_gpt2(n_embd=256, n_layer=30, vocab_size=24_000)
    for name, gpt2 in (("small", random_gpt2()), ("big", big)):
        gpt2.save_pretrained(tmp_path / name)
        gpt2_to_scratch(tmp_path / name, tmp_path / f"{name} native", check=False)
        write_openai(tmp_path / f"{name} native", tmp_path / f"{name} tensorflow")
        for format in ("book", "nanogpt", "gguf", "llmc"):
            export_checkpoint(tmp_path / f"{name} native", tmp_path / f"{name} {format}", format, check=False)
    sizes = [spec.nbytes for spec in Checkpoint(tmp_path / "big native").tensors.values()]
    assert sum(sizes) > 4.5 * max(sizes)

    cases = [(format, "", False) for format in ("book", "nanogpt", "gguf", "llmc")]
    cases += [("", format, False) for format in ("book", "nanogpt", "gguf", "llmc", "tensorflow")]
    twins = [("book", "", True), ("", "tensorflow", True)]
    done = run_python("-c", FORMATS_PEAK, tmp_path, json.dumps(cases + twins))
    assert done.returncode == 0, done.stderr
    *streamed, one, other = map(int, done.stdout.split())
    bound = 2 * max(sizes) + 32e6
    assert all(peak < bound for peak in streamed), (cases, streamed, max(sizes))
    assert min(one, other) > 1.2 * bound


def test_what_torch_save_writes_from_mapped_memory_is_what_it_writes(tmp_path):
    """The same bytes as of tensors in memory, and the hash of them."""
    ours = random_pair()[1]
    state_dict = {name: tensor.detach() for name, tensor in ours.state_dict().items()}
    for name, place in (("model.pth", None), ("ckpt.pt", "model")):
        hashes = save_tensors(held(state_dict), {"a": 1} if place else {}, place, tmp_path / name, Progress())
        assert hashes[name]["sha256"] == sha256(tmp_path / name)
        assert zipfile.ZipFile(tmp_path / name).testzip() is None
        content = torch.load(tmp_path / name, weights_only=True)
        assert place is None or content.pop("a") == 1
        found = content[place] if place else content
        assert list(found) == list(state_dict)
        assert all(same_bits(found[key], tensor) for key, tensor in state_dict.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "model.pth"]


def test_native_import_has_a_card_that_names_the_format(tmp_path):
    ours = random_pair()[1]
    write(ours, ours.config, tmp_path / "model.pth", "book")
    receipt = import_checkpoint(tmp_path / "model.pth", tmp_path / "native", n_heads=4)
    card = (tmp_path / "native" / CARD).read_text()
    assert "with the weights of a `book` checkpoint" in card
    assert "## Parity with a `book` checkpoint" in card
    assert CARD in receipt["target"]["files"]
    assert verify_receipt(tmp_path / "native") == receipt


@pytest.mark.parametrize("name", ["config.json", "hparams.json"])
def test_key_that_is_there_twice_is_refused_in_any_format(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "gpt2", "model_type": "gpt2"}')
    with pytest.raises(ConversionError, match=r"not valid JSON \(the key 'model_type' occurs twice"):
        detect(tmp_path)


def test_other_heads_do_not_get_lost_in_formats_without_them(tmp_path):
    official(MODELS[3]).save_pretrained(tmp_path / "a")
    with pytest.raises(ConversionError, match=r"'book' stores language models alone; use the format 'gpt2' instead"):
        export_checkpoint(tmp_path / "a", tmp_path / "b", "book")
    assert not (tmp_path / "b").exists()
    import_checkpoint(tmp_path / "a", tmp_path / "native")
    with pytest.raises(ConversionError, match=r"'book' stores language models alone; use the format 'gpt2' instead"):
        export_checkpoint(tmp_path / "native", tmp_path / "b", "book")
    export_checkpoint(tmp_path / "native", tmp_path / "b", "gpt2")  # as it says


def test_foreign_import_is_opened_once_and_shards(tmp_path, monkeypatch):
    ours = random_pair()[1]
    write(ours, ours.config, tmp_path / "model.pth", "book")
    loads = []
    monkeypatch.setattr(torch_file, "read_pickle", lambda path: loads.append(path) or read_pickle(path))
    done = CliRunner().invoke(
        app,
        ["convert", str(tmp_path / "model.pth"), str(tmp_path / "b"), "--n-heads", "4", "--max-shard-size", "60KB"],
    )
    assert done.exit_code == 0, done.output
    assert len(loads) == 1
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 3
