import hashlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors
from pairs import LAYERS, gpt2_config, random_gpt2, random_ids
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2LMHeadModel, GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.conversion import (
    RECEIPT,
    ConversionError,
    atomic_directory,
    check_checkpoint,
    find_source,
    gpt2_to_scratch,
    scratch_to_gpt2,
)
from hf_gpt_scratch.parity import ParityError

CONVERT = Path(__file__).parents[1] / "convert"


@pytest.fixture
def source(tmp_path):
    directory = tmp_path / "source"
    gpt2 = random_gpt2()
    gpt2.generation_config.max_new_tokens = 7
    gpt2.save_pretrained(directory)
    return directory


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def script(name, *arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **options.pop("env", {})}
    command = [sys.executable, CONVERT / f"{name}.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


def rewrite(directory, change, name="model.safetensors"):
    tensors = change(load_file(directory / name))
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / name, metadata={"format": "pt"})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def leftovers(directory):
    return sorted(path.name for path in directory.parent.iterdir() if path.name.startswith("."))


# What a conversion gives


def test_conversion_keeps_logits_settings_and_tells_so(source, target):
    receipt = gpt2_to_scratch(source, target)
    gpt2, scratch = GPT2LMHeadModel.from_pretrained(source), GPTScratchForCausalLM.from_pretrained(target)
    ids = random_ids()
    torch.testing.assert_close(scratch(ids).logits, gpt2(ids).logits, atol=1e-4, rtol=1e-5)
    assert scratch.generation_config.max_new_tokens == 7
    assert receipt == json.loads((target / RECEIPT).read_text())
    assert receipt["parity"]["passed"] is True
    assert receipt["parity"]["logits"]["relative_error"] <= receipt["parity"]["logit_bound"]
    assert leftovers(target) == []


def test_receipt_has_the_hashes_of_source_and_target(source, target):
    receipt = gpt2_to_scratch(source, target)
    for directory, files in ((source, receipt["source"]["files"]), (target, receipt["target"]["files"])):
        assert "model.safetensors" in files
        for name, figures in files.items():
            assert figures == {"sha256": sha256(directory / name), "bytes": (directory / name).stat().st_size}
    assert receipt["target"]["files"].keys() == {path.name for path in target.iterdir()} - {RECEIPT}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_file(tmp_path, tied, dtype):
    random_gpt2(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path / "a")
    gpt2_to_scratch(tmp_path / "a", tmp_path / "b")
    scratch_to_gpt2(tmp_path / "b", tmp_path / "c")
    assert sha256(tmp_path / "a/model.safetensors") == sha256(tmp_path / "c/model.safetensors")
    a, c = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ac")
    assert a == c


def test_shards_and_the_hubs_layout_convert(tmp_path):
    gpt2 = random_gpt2()
    gpt2.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    gpt2_to_scratch(tmp_path / "shards", tmp_path / "from shards")

    gpt2.save_pretrained(tmp_path / "hub")

    def hub(tensors):
        tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
        masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(LAYERS)}
        masks |= {f"h.{n}.attn.masked_bias": torch.tensor(float("-inf")) for n in range(LAYERS)}
        return tensors | masks

    rewrite(tmp_path / "hub", hub)
    gpt2_to_scratch(tmp_path / "hub", tmp_path / "from hub")
    assert sha256(tmp_path / "from hub/model.safetensors") == sha256(tmp_path / "from shards/model.safetensors")


def test_pickled_weights_convert(source, target):
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert gpt2_to_scratch(source, target)["parity"]["weights_equal"]


def test_model_without_qkv_bias_exports_with_zeros(tmp_path):
    from test_modeling import tiny_model

    tiny_model().save_pretrained(tmp_path / "ours")
    assert scratch_to_gpt2(tmp_path / "ours", tmp_path / "gpt2")["parity"]["passed"]


def test_tokenizer_travels_along(target):
    trained = Path(__file__).parent / "fixtures" / "tiny-gpt2"
    assert gpt2_to_scratch(trained, target)["tokenizer"] == "GPT2Tokenizer"
    text = "I HAD always thought Jack Gisburn rather a cheap genius\n  -- 日本 🤗<|endoftext|>"
    converted = AutoTokenizer.from_pretrained(target)
    assert type(converted) is GPT2Tokenizer
    assert converted(text).input_ids == AutoTokenizer.from_pretrained(trained)(text).input_ids


def test_verification_can_be_left_out(source, target):
    assert gpt2_to_scratch(source, target, check=False)["parity"] is None


# What must not happen


def test_wrong_result_is_not_published(source, target, monkeypatch):
    def sabotaged(gpt2, scratch):
        scratch.model.trf_blocks[1].norm1.shift.data += 0.1
        return verify(gpt2, scratch)

    from hf_gpt_scratch.parity import verify

    monkeypatch.setattr("hf_gpt_scratch.conversion.verify", sabotaged)
    with pytest.raises(ParityError, match="weights: DIFFERENT"):
        gpt2_to_scratch(source, target)
    assert not target.exists()
    assert leftovers(target) == []


def test_existing_target_is_kept_unless_overwrite(source, target):
    target.mkdir()
    (target / "precious").write_text("mine")
    with pytest.raises(ConversionError, match=r"target exists already.*--overwrite"):
        gpt2_to_scratch(source, target)
    assert (target / "precious").read_text() == "mine"
    gpt2_to_scratch(source, target, overwrite=True)
    assert (target / "model.safetensors").exists()
    assert not (target / "precious").exists()
    assert leftovers(target) == []


def test_failed_overwrite_keeps_the_old_target(source, target, monkeypatch):
    gpt2_to_scratch(source, target)
    before = sha256(target / "model.safetensors")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPTScratchForCausalLM, "save_pretrained", fail)
    with pytest.raises(ConversionError, match=r"writing the target.*No space left.*as it was before.*free disk space"):
        gpt2_to_scratch(source, target, overwrite=True)
    assert sha256(target / "model.safetensors") == before
    assert leftovers(target) == []


def test_failed_swap_puts_the_old_target_back(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def fails_once(self, to):
        if self.name.endswith(".incomplete"):
            raise OSError("rename failed")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="rename failed"), atomic_directory(target, overwrite=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    assert leftovers(target) == []


def drop(name):
    return lambda directory: rewrite(directory, lambda t: {k: v for k, v in t.items() if k != name})


def put(name, tensor):
    return lambda directory: rewrite(directory, lambda t: {**t, name: tensor})


def put_nan(directory):
    def change(tensors):
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 5] = float("nan")
        return tensors

    rewrite(directory, change)


def truncate(directory):
    file = directory / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def corrupt_header(directory):
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    (directory / "model.safetensors").write_bytes(data)


def edit_config(**changes):
    def change(directory):
        values = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**values, **changes}))

    return change


def pickle_bomb(directory):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (directory / "exploded",))

    (directory / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb()}, directory / "pytorch_model.bin")


def raw_pickle(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))


def shard_index(**weight_map):
    def change(directory):
        (directory / "model.safetensors").rename(directory / "model-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def another_model(directory):
    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    LlamaForCausalLM(config).save_pretrained(directory)


BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is no valid JSON.*download"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), r"type 'none', but 'gpt2' is wanted"),
    "another model": (another_model, r"type 'llama', but 'gpt2' is wanted"),
    "already converted": (edit_config(model_type="gpt_scratch"), r"'gpt_scratch'.*scratch_to_gpt2\.py"),
    "wrong option": (edit_config(n_embd="48"), r"config\.json is not usable.*expected int, got str"),
    "cross-attention promised": (edit_config(add_cross_attention=True), r"lacks 'h\.0\.(crossattention|ln_cross_attn)"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has no model\.safetensors.*whole checkpoint"),
    "truncated": (truncate, r"model\.safetensors is truncated or corrupt.*download it again"),
    "corrupt header": (corrupt_header, r"model\.safetensors is truncated or corrupt"),
    "empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), r"truncated or corrupt"),
    "missing tensor": (drop("transformer.h.1.ln_2.bias"), r"lacks 'h\.1\.ln_2\.bias'"),
    "more layers promised": (edit_config(n_layer=LAYERS + 1), r"lacks 'h\.3\..*and 7 more"),
    "fewer layers promised": (edit_config(n_layer=LAYERS - 1), r"'transformer\.h\.2\.attn.*does not have"),
    "missing head": (edit_config(tie_word_embeddings=False), r"lacks 'lm_head\.weight'"),
    "unexpected tensor": (put("score.weight", torch.ones(2, 48)), r"holds the tensor 'score\.weight'"),
    "wrong shape": (
        put("transformer.h.0.mlp.c_fc.weight", torch.ones(192, 48)),
        r"'transformer\.h\.0\.mlp\.c_fc\.weight'.*shape \[192, 48\].*must be \[48, 192\]",
    ),
    "twice": (put("wte.weight", torch.ones(211, 48)), r"there already as '(transformer\.)?wte\.weight'"),
    "NaN": (put_nan, r"'transformer\.h\.1\.mlp\.c_fc\.weight'.*1 values that are NaN or infinite"),
    "infinite": (
        put("transformer.ln_f.bias", torch.full((48,), float("inf"))),
        r"'transformer\.ln_f\.bias'.*48 values that",
    ),
    "hostile pickle": (pickle_bomb, r"pytorch_model\.bin.*(pickle that asks for|corrupt)"),
    "raw pickle": (raw_pickle, r"pytorch_model\.bin.*(pickle that asks for|corrupt)"),
    "shard elsewhere": (shard_index(a="../secret.safetensors"), r"names the shard '\.\./secret\.safetensors'.*trust"),
    "absolute shard": (shard_index(a="/etc/passwd"), r"names the shard '/etc/passwd'"),
    "shard is a number": (shard_index(a=3), r"names the shard 3"),
    "missing shard": (shard_index(a="model-00002.safetensors"), r"'model-00002\.safetensors', which is missing"),
    "index without map": (
        lambda d: (shard_index()(d), (d / "model.safetensors.index.json").write_text("{}")),
        r"no valid shard index",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_refused_by_name_and_nothing_is_left(source, target, case):
    spoil, told = BAD[case]
    spoil(source)
    with pytest.raises(ConversionError) as error:
        gpt2_to_scratch(source, target)
    assert re.search(told, str(error.value), re.DOTALL), str(error.value)
    assert not target.exists()
    assert leftovers(target) == []
    assert not (source / "exploded").exists()


def test_bad_checkpoint_of_ours_is_refused_by_our_names(source, target, tmp_path):
    gpt2_to_scratch(source, target)
    drop("model.trf_blocks.2.att.W_key.bias")(target)
    with pytest.raises(ConversionError, match=r"lacks 'trf_blocks\.2\.att\.W_key\.bias'"):
        scratch_to_gpt2(target, tmp_path / "back")
    with pytest.raises(ConversionError, match=r"'gpt2', but 'gpt_scratch' is wanted; convert/gpt2_to_scratch\.py"):
        scratch_to_gpt2(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./nowhere", r"no directory \./nowhere"),
        ("/no/such/place", r"no directory /no/such/place"),
        ("openai-community/gpt2", r"'openai-community/gpt2' is no directory here.*connect to the network"),
        ("not a name!", r"neither a directory nor a hub repository 'not a name!'"),
    ],
)
def test_missing_source_and_no_network(name, told, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=told):
        find_source(name)


def test_source_that_is_a_file_and_revision_of_a_directory(source):
    with pytest.raises(ConversionError, match="is a file"):
        find_source(source / "config.json")
    with pytest.raises(ConversionError, match=r"--revision main has no meaning"):
        find_source(source, revision="main")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (errors.RepositoryNotFoundError, "neither a directory nor"),
        (errors.RevisionNotFoundError, r"no revision 'v9'"),
        (errors.GatedRepoError, "asks for access"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ],
)
def test_hub_errors_are_told_apart(monkeypatch, kind, told):
    def fail(*args, **kwargs):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConversionError, match=told):
        find_source("some/model", revision="v9")


def test_hub_id_is_fetched_at_its_revision(source, target, monkeypatch):
    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    receipt = gpt2_to_scratch("some/model", target, revision="v2")
    assert asked == {"name": "some/model", "revision": "v2"}
    assert (receipt["source"]["name"], receipt["source"]["revision"]) == ("some/model", "v2")


def test_source_is_no_target(source):
    with pytest.raises(ConversionError, match="source and target are both"):
        gpt2_to_scratch(source, source, overwrite=True)


def test_full_disk_is_told_before_anything_is_written(source, target, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ConversionError, match=r"0\.00 GB free, but the target needs"):
        gpt2_to_scratch(source, target)
    assert not target.exists()


def test_check_reads_every_file_once_and_hashes_it(source):
    assert check_checkpoint(source, "gpt2").keys() == {"config.json", "model.safetensors"}


# The scripts


def test_scripts_convert_and_report(source, target, tmp_path):
    done = script("gpt2_to_scratch", source, target)
    assert done.returncode == 0, done.stderr
    for told in (
        "Converted:",
        "Verified in float32",
        "relative",
        "32 greedy ids equal",
        "bit for bit",
        "Tokenizer: none",
    ):
        assert told in done.stdout
    back = script("scratch_to_gpt2", target, tmp_path / "back", "--no-verify")
    assert back.returncode == 0, back.stderr
    assert "Not verified, as asked." in back.stdout
    assert sha256(source / "model.safetensors") == sha256(tmp_path / "back/model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["./nowhere", "{target}"], 1, "Not converted: there is no directory ./nowhere"),
        (["openai-community/gpt2", "{target}"], 1, "the hub cannot be reached"),
        (["{source}", "{source}"], 1, "source and target are both"),
        (["{source}"], 2, "target"),
    ],
)
def test_scripts_exit_with_a_status_and_a_reason(source, target, arguments, status, told):
    done = script("gpt2_to_scratch", *(a.format(source=source, target=target) for a in arguments))
    assert done.returncode == status
    assert told.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert not target.exists()


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_script_on_a_disk_that_fills_up(source, target):
    """A limit on the file size stops the write half-way, as a full disk does."""
    done = script("gpt2_to_scratch", source, target, preexec_fn=limit_file_size)
    assert done.returncode == 1
    assert "failed while writing the target" in done.stderr
    assert "File too large" in done.stderr or "os error 27" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    assert leftovers(target) == []


def heed_interrupts():
    # A shell starts its background jobs with SIGINT ignored, and tests may run in one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_interrupted_half_way(tmp_path, number):
    source, target = tmp_path / "source", tmp_path / "target"
    GPT2LMHeadModel(gpt2_config(n_layer=60, n_embd=128)).save_pretrained(source)
    command = [sys.executable, CONVERT / "gpt2_to_scratch.py", source, target]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    deadline = time.monotonic() + 60
    while not any(path.name.endswith(".incomplete") for path in tmp_path.iterdir()):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Interrupted:" in errors
    assert "as it was before" in errors
    assert "Traceback" not in errors
    assert not target.exists()
    assert leftovers(target) == []


@pytest.mark.parametrize("step", range(6))
def test_interruption_between_any_two_steps_of_publishing(tmp_path, monkeypatch, step):
    """The old target or the new one is there, whole, and nothing else is."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    calls = iter(range(100))

    def interrupted(function):
        def wrapper(*args, **kwargs):
            if next(calls) == step:
                function(*args, **kwargs)
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    for name in ("mkdir", "rename"):
        monkeypatch.setattr(Path, name, interrupted(getattr(Path, name)))
    try:
        with atomic_directory(target, overwrite=True) as staging:
            (staging / "new").touch()
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    assert [path.name for path in target.iterdir()] in (["old"], ["new"])
    assert [path.name for path in target.iterdir()] == (["new"] if step >= 3 else ["old"])
    assert leftovers(target) == []
