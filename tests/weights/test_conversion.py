import io
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from files import leftovers, rewrite, sha256
from forks import run_python
from huggingface_hub import errors
from pairs import LAYERS, gpt2_config, random_gpt2, random_ids, random_pair, tiny_model
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

import hf_gpt_scratch
from hf_gpt_scratch import GPTScratchForCausalLM, GPTScratchModel
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.model.heads_gpt_scratch import AUTO_CLASSES
from hf_gpt_scratch.weights import formats
from hf_gpt_scratch.weights.checkpoint import write_safetensors
from hf_gpt_scratch.weights.convert import (
    RECEIPT,
    export,
    find_source,
    gpt2_to_scratch,
    scratch_to_gpt2,
    verify_receipt,
)
from hf_gpt_scratch.weights.formats.directory import check_checkpoint
from hf_gpt_scratch.weights.parity import same_bits
from hf_gpt_scratch.weights.tensors import held
from hf_gpt_scratch.weights.trust import CODE_KEYS

CONVERT = Path(__file__).parents[2] / "convert"


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


def script(name, *arguments):
    return run_python(CONVERT / f"{name}.py", *arguments, env={**os.environ, "COLUMNS": "200"})


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


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same_file(tmp_path, tied, dtype):
    random_gpt2(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path / "a")
    gpt2_to_scratch(tmp_path / "a", tmp_path / "b")
    scratch_to_gpt2(tmp_path / "b", tmp_path / "c")
    assert sha256(tmp_path / "a/model.safetensors") == sha256(tmp_path / "c/model.safetensors")
    a, c = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ac")
    assert a == c


@pytest.mark.slow
def test_numbers_among_the_weights_convert(tmp_path):
    """xIELU has some, of another dtype than the weights."""
    tiny_model(activation_function="xielu", qkv_bias=True).save_pretrained(tmp_path / "native")
    assert export(tmp_path / "native", tmp_path / "official", "gpt2")["parity"]["passed"]
    assert export(tmp_path / "official", tmp_path / "back", "native")["parity"]["passed"]
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("native", "back")]
    assert same[0].keys() == same[1].keys() and any(tensor.ndim == 0 for tensor in same[0].values())
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items())


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
    from pairs import tiny_model

    tiny_model().save_pretrained(tmp_path / "ours")
    assert scratch_to_gpt2(tmp_path / "ours", tmp_path / "gpt2")["parity"]["passed"]


def test_tokenizer_travels_along(target):
    trained = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
    assert gpt2_to_scratch(trained, target)["tokenizer"] == "GPT2Tokenizer"
    text = "I HAD always thought Jack Gisburn rather a cheap genius\n  -- 日本 🤗<|endoftext|>"
    converted = AutoTokenizer.from_pretrained(target)
    assert type(converted) is GPT2Tokenizer
    assert converted(text).input_ids == AutoTokenizer.from_pretrained(trained)(text).input_ids


def test_a_bar_of_tqdm_shows_every_step_to_its_end(source, target):
    class Bar(tqdm):
        def set_description(self, desc=None, refresh=True):
            steps.append([desc, self.total, 0])

        def update(self, n=1):
            steps[-1][2] += n
            super().update(n)

    steps: list = []
    with Bar(file=io.StringIO()) as bar:
        gpt2_to_scratch(source, target, check="weights", progress=bar)
        verify_receipt(target, progress=bar)
    assert [what for what, _, _ in steps[1:3]] == ["Converting", "Verifying the weights"]
    assert len(steps) == 4
    assert all(done == (total or 0) for _, total, done in steps)


def test_verification_can_be_left_out(source, target):
    assert gpt2_to_scratch(source, target, check=False)["parity"] is None


# What must not happen


def test_wrong_result_is_not_published(source, target, monkeypatch):
    def sabotaged(gpt2, scratch):
        scratch.model.trf_blocks[1].norm1.shift.data += 0.1
        return verify_models(gpt2, scratch)

    from hf_gpt_scratch.weights.parity import verify_models

    monkeypatch.setattr("hf_gpt_scratch.weights.convert.verify_models", sabotaged)
    with pytest.raises(ParityError, match="weights: DIFFERENT"):
        gpt2_to_scratch(source, target)
    assert not target.exists()
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
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), r"config\.json is not valid JSON.*download"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), r"type None, but 'gpt2' is expected"),
    "another model": (another_model, r"type 'llama', but 'gpt2' is expected"),
    "already converted": (edit_config(model_type="gpt_scratch"), r"'gpt_scratch'.*hf-gpt-scratch export"),
    "wrong option": (edit_config(n_embd="48"), r"config\.json is not usable.*expected int, got str"),
    "cross-attention promised": (edit_config(add_cross_attention=True), r"lacks 'h\.0\.(crossattention|ln_cross_attn)"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"has no model\.safetensors.*complete checkpoint"),
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
    "twice": (put("wte.weight", torch.ones(211, 48)), r"the same tensor as '(transformer\.)?wte\.weight'"),
    "NaN": (put_nan, r"'transformer\.h\.1\.mlp\.c_fc\.weight'.*1 values that are NaN or infinite"),
    "infinite": (
        put("transformer.ln_f.bias", torch.full((48,), float("inf"))),
        r"'transformer\.ln_f\.bias'.*48 values that",
    ),
    "hostile pickle": (pickle_bomb, r"pytorch_model\.bin.*(pickle that refers to|corrupt)"),
    "raw pickle": (raw_pickle, r"pytorch_model\.bin.*(pickle that refers to|corrupt)"),
    "shard elsewhere": (shard_index(a="../secret.safetensors"), r"names the shard '\.\./secret\.safetensors'.*trust"),
    "absolute shard": (shard_index(a="/etc/passwd"), r"names the shard '/etc/passwd'"),
    "shard is a number": (shard_index(a=3), r"names the shard 3"),
    "missing shard": (shard_index(a="model-00002.safetensors"), r"'model-00002\.safetensors', which is missing"),
    "index without map": (
        lambda d: (shard_index()(d), (d / "model.safetensors.index.json").write_text("{}")),
        r"not a valid shard index",
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
    with pytest.raises(ConversionError, match=r"'gpt2', but 'gpt_scratch' is expected; hf-gpt-scratch convert"):
        scratch_to_gpt2(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("./nowhere", r"no directory \./nowhere"),
        ("/no/such/place", r"no directory /no/such/place"),
        ("/a" * 1000, r"no directory (/a)+ … (/?a)+;.{,20}$"),
        ("openai-community/gpt2", r"'openai-community/gpt2' is not a local directory.*connect to the network"),
        ("not a name!", r"neither a directory nor a hub repository 'not a name!'"),
    ],
)
def test_missing_source_and_no_network(name, told, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=told):
        find_source(name)


def test_source_that_is_a_file_and_revision_of_a_directory(source, tmp_path):
    with pytest.raises(ConversionError, match=f"is a file.*give its directory, {re.escape(str(source))}$"):
        find_source(source / "config.json")
    torch.save({}, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=r"hf-gpt-scratch convert .*model\.pth TARGET makes one"):
        find_source(tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=r"--revision main has no meaning"):
        find_source(source, revision="main")


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (errors.RepositoryNotFoundError, "neither a directory nor"),
        (errors.RevisionNotFoundError, r"no revision 'v9'"),
        (errors.GatedRepoError, "is gated"),
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


def test_check_reads_every_file_once_and_hashes_it(source):
    assert check_checkpoint(source, "gpt2").keys() == {"config.json", "model.safetensors"}


# What makes code run


def forged(source):
    """A tokenizer, and settings in every file that name somebody's code, and code beside them."""
    shutil.copytree(TRAINED, source)
    code = {
        "auto_map": {"AutoTokenizer": ["someone/repo--code.Tokenizer", None]},  # of the model it would be refused
        "custom_code": "code.py",
        "custom_generate": "someone/repo",
        "custom_pipelines": {"task": {"impl": "code.Pipeline"}},
        "kernel_config": {"RMSNorm": "someone/repo:RMSNorm"},
        "trust_remote_code": True,
        "use_kernels": True,
    }
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = source / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, **code}))
    (source / "code.py").write_text("raise SystemExit('code has run')")
    (source / "custom_generate").mkdir()
    (source / "custom_generate" / "generate.py").write_text("raise SystemExit('code has run')")
    return source


TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"


def named_code(directory):
    """Everything in a directory's settings that transformers would take code from."""
    found = {}
    for path in directory.glob("*config.json"):
        found.update(
            {(path.name, key): value for key, value in json.loads(path.read_text()).items() if key in CODE_KEYS}
        )
    return found


def test_no_code_of_the_source_comes_into_a_target(tmp_path, target):
    receipt = gpt2_to_scratch(forged(tmp_path / "forged"), target)
    ours = {"AutoConfig": "configuration_gpt_scratch.GPTScratchConfig"}
    for name, kind in AUTO_CLASSES.items():
        file = "modeling" if kind in (GPTScratchForCausalLM, GPTScratchModel) else "heads"
        ours[name] = f"{file}_gpt_scratch.{kind.__name__}"
    assert named_code(target) == {("config.json", "auto_map"): ours}
    own = {path.name for path in (Path(hf_gpt_scratch.__file__).parent / "model").glob("*.py")}
    assert {path.name for path in target.rglob("*.py")} <= own
    assert not any(path.is_dir() for path in target.iterdir())
    notes = "\n".join(receipt["notes"])
    assert "left out of tokenizer_config.json, since it makes code run: 'auto_map', which was {" in notes
    assert "left out of config.json, since it makes code run: 'custom_pipelines'" in notes
    assert "left behind, since it is code: 'code.py'" in notes
    assert "left behind, since it is code: 'custom_generate'" in notes
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert type(tokenizer) is GPT2Tokenizer
    assert AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True).config.n_layers


def test_what_was_taken_out_is_printed(tmp_path, target):
    done = CliRunner().invoke(app, ["convert", str(forged(tmp_path / "forged")), str(target), "--no-verify"])
    assert done.exit_code == 0
    assert "Note: left out of tokenizer_config.json, since it makes code run: 'auto_map'" in done.output
    assert "Note: left behind, since it is code: 'code.py'" in done.output


def test_a_chat_template_is_data_and_comes_along(tmp_path, target):
    source = forged(tmp_path / "forged")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    gpt2_to_scratch(source, target, check=False)
    assert AutoTokenizer.from_pretrained(target).chat_template == "{{ messages[0].content }}"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["gpt2", "gguf", "book", "onnx"])
def test_no_code_goes_the_other_way(tmp_path, target, format):
    native = tmp_path / "native"
    gpt2_to_scratch(TRAINED, native, check=False)
    values = json.loads((native / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["someone/repo--code.Tokenizer", None]}
    (native / "tokenizer_config.json").write_text(json.dumps({**values, "auto_map": auto_map}))
    receipt = export(native, target, format, check=False)
    assert named_code(target) == {}
    assert list(target.rglob("*.py")) == []
    told = "left out of tokenizer_config.json, since it makes code run: 'auto_map'"
    assert any(note.startswith(told) for note in receipt["notes"]) == (format in ("gpt2", "onnx"))


def test_nothing_is_said_where_nothing_was_taken_out(source, target, tmp_path):
    assert gpt2_to_scratch(source, target, check=False)["notes"] == []
    assert scratch_to_gpt2(target, tmp_path / "back", check=False)["notes"] == []


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_a_program_on_the_hub_is_refused_before_it_is_fetched(
    source, target, tmp_path, key, monkeypatch
):
    fetched = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", fetched.append)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched.append)
    edit_config(**{key: "someone/kernel"})(source)
    with pytest.raises(
        ConversionError, match=rf"config\.json has {key}='someone/kernel', which is code on the hub.*remove"
    ):
        gpt2_to_scratch(source, target)
    assert fetched == []


# Bit for bit


def test_one_bit_of_float64_is_seen(tmp_path, target, monkeypatch):
    """Which float32, in which the models are compared, does not have; the mutation twin is the sound writer."""
    source = tmp_path / "source"
    random_gpt2().double().save_pretrained(source)
    assert gpt2_to_scratch(source, target)["parity"]["passed"]

    def nudged(path, tensors, progress):
        name = "model.trf_blocks.1.att.out_proj.bias"
        return write_safetensors(path, {**tensors, **held({name: tensors[name].read() + 1e-9})}, progress)

    monkeypatch.setattr("hf_gpt_scratch.weights.formats.directory.write_safetensors", nudged)
    with pytest.raises(ParityError, match=r"'h\.1\.attn\.c_proj\.bias' is not equal to the source's bit for bit"):
        gpt2_to_scratch(source, tmp_path / "nudged")
    assert not (tmp_path / "nudged").exists()


@pytest.mark.slow
@pytest.mark.parametrize("check", [True, "weights"])
def test_the_sign_of_a_zero_is_kept_and_seen(source, target, tmp_path, monkeypatch, check):
    def negative(tensors):
        return {**tensors, "transformer.h.1.attn.c_attn.bias": -torch.zeros(3 * 48)}

    rewrite(source, negative)
    gpt2_to_scratch(source, target, check=check)
    bias = load_file(target / "model.safetensors")["model.trf_blocks.1.att.W_key.bias"]
    assert same_bits(bias, -torch.zeros(48))

    def unsigned(path, tensors, progress):
        return write_safetensors(path, held({name: t.read() + 0.0 for name, t in tensors.items()}), progress)

    monkeypatch.setattr("hf_gpt_scratch.weights.formats.directory.write_safetensors", unsigned)
    with pytest.raises(ParityError, match=r"'h\.1\.attn\.c_attn\.bias' is not equal to the source's"):
        gpt2_to_scratch(source, tmp_path / "unsigned", check=check)


def test_a_bias_of_negative_zeros_is_not_left_out(tmp_path):
    """nanoGPT's `bias=False` has no place for it, and zeros in its stead would be other bits."""
    model = random_pair()[1]
    config = model.config
    state_dict = {name: -torch.zeros_like(t) if name.endswith("bias") else t for name, t in model.state_dict().items()}
    state_dict = {name: torch.zeros_like(t) if name.endswith("shift") else t for name, t in state_dict.items()}
    with pytest.raises(ConversionError, match=r"got bias=False, but \d+ biases are not zero"):
        formats.write(state_dict, config, tmp_path / "ckpt.pt", "nanogpt", bias=False)
    formats.write(state_dict, config, tmp_path / "ckpt.pt", "nanogpt", bias=True)
    _, back = formats.read(tmp_path / "ckpt.pt")
    assert same_bits(back["trf_blocks.0.att.W_query.bias"], -torch.zeros(48))


# The scripts


@pytest.mark.slow
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
    assert "Not verified, as requested." in back.stdout
    assert sha256(source / "model.safetensors") == sha256(tmp_path / "back/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["./nowhere", "{target}"], 1, "Not converted: there is no directory ./nowhere"),
        (["{source}"], 2, "target"),
    ],
)
def test_scripts_exit_with_a_status_and_a_reason(source, target, arguments, status, told):
    done = script("gpt2_to_scratch", *(a.format(source=source, target=target) for a in arguments))
    assert done.returncode == status
    assert told.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["openai-community/gpt2", "{target}"], "the hub cannot be reached"),
        (["{source}", "{source}"], "is or contains the source"),
    ],
)
def test_the_command_ends_with_a_reason(source, target, arguments, told, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, ["convert", *(a.format(source=source, target=target) for a in arguments)])
    assert done.exit_code == 1
    assert told in " ".join(done.output.split())
    assert not target.exists()


LIMITED = """
import resource, runpy, signal, sys

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the system has no limits for a process")
def test_script_on_a_disk_that_fills_up(source, target):
    """A limit on the file size stops the write half-way, as a full disk does."""
    done = run_python("-c", LIMITED, CONVERT / "gpt2_to_scratch.py", source, target)
    assert done.returncode == 1
    assert "failed while writing the target" in done.stderr
    assert "File too large" in done.stderr or "os error 27" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    assert leftovers(target) == []


INTERRUPTED = """
import os, runpy, sys, time

_, number, directory, *sys.argv = sys.argv
script = os.fork()
if script == 0:
    runpy.run_path(sys.argv[0], run_name="__main__")
    os._exit(0)
deadline = time.monotonic() + 60
while not any(name.endswith(".incomplete") for name in os.listdir(directory)):
    if os.waitpid(script, os.WNOHANG)[0] or time.monotonic() > deadline:
        sys.exit("the script wrote nothing that could be interrupted")
    time.sleep(0.002)
os.kill(script, int(number))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(script, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the system cannot send these signals to one process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_script_interrupted_half_way(tmp_path, number):
    source, target = tmp_path / "source", tmp_path / "target"
    GPT2LMHeadModel(gpt2_config(n_layer=60, n_embd=128)).save_pretrained(source)
    done = run_python("-c", INTERRUPTED, int(number), tmp_path, CONVERT / "gpt2_to_scratch.py", source, target)
    assert done.returncode == 130, done.stderr
    assert "Interrupted:" in done.stderr
    assert "is either complete or unchanged" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()
    assert leftovers(target) == []


@pytest.mark.parametrize("check", ["wieghts", None, 2])
def test_a_comparison_that_there_is_not_is_refused_by_name(source, target, check):
    with pytest.raises(ConversionError, match=f"got check='{check}', but it must be True, False or 'weights'"):
        gpt2_to_scratch(source, target, check=check)
    assert not target.exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.bin", "missing.pth"])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(name, target):
    with pytest.raises(ConversionError, match=rf"{name} cannot be read \(No such file"):
        export(name, target, "book")
