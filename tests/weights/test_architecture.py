"""Every command loads the model that a config names, head and all, and refuses what is neither ours nor official."""

import json
import logging
import shutil

import pytest
import torch
from pairs import gpt2_config, randomize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, GPTScratchModel
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import UnknownArchitecture
from hf_gpt_scratch.model.heads_gpt_scratch import MODELS
from hf_gpt_scratch.model.weight_map import HEADS
from hf_gpt_scratch.weights.architecture import architecture

pytestmark = pytest.mark.slow

# A model with our config and our tensors' names, and a block that computes something else.
MINE = """
from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.model.modeling_gpt_scratch import GPTScratchBlock

class MyBlock(GPTScratchBlock):
    def forward(self, x, *args, **kwargs):
        return 0.5 * super().forward(x, *args, **kwargs)

class MyGPT(GPTScratchForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for n in range(config.n_layers):
            self.model.trf_blocks[n] = MyBlock(config, n)
        self.post_init()
"""


def run(*arguments, status):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == status, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.output


def official(kind, **changes):
    config = gpt2_config(**changes)
    if kind.__name__.endswith("Classification"):
        config.num_labels = 3
    return randomize(kind.gpt2_class(config)).eval()


@pytest.fixture(scope="module", params=MODELS, ids=lambda kind: kind.__name__)
def pair(request, tmp_path_factory):
    """Directories of an official model and of ours, and the kind."""
    directory = tmp_path_factory.mktemp("pair")
    gpt2 = official(request.param)
    gpt2.save_pretrained(directory / "official")
    request.param.from_gpt2(gpt2).save_pretrained(directory / "ours")
    return directory / "official", directory / "ours", request.param


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    directory = tmp_path_factory.mktemp("language")
    gpt2 = official(GPTScratchForCausalLM)
    gpt2.save_pretrained(directory / "official")
    GPTScratchForCausalLM.from_gpt2(gpt2).save_pretrained(directory / "ours")
    return directory / "official", directory / "ours"


def edited(directory, target, change):
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_every_head_is_the_same_and_its_noise_is_noticed(pair, command, tmp_path):
    gpt2, ours, kind = pair
    assert "The same model" in run(command, gpt2, ours, status=0)
    heads = {name for row in HEADS[1:] for name in row.ours}

    def noise(tensors):
        names = heads & tensors.keys() or {next(name for name in tensors if name.endswith("final_norm.shift"))}
        for name in names:
            tensors[name] += torch.randn_like(tensors[name])

    output = run(command, gpt2, edited(ours, tmp_path / "noise", noise), status=3)
    assert "Different" in output and ("final_norm" in output or any(name in output for name in heads))
    assert kind.__name__ in json.loads((ours / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("command", ["verify", "compare"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_another_end_token_is_a_difference(language, command, file, tmp_path):
    gpt2, ours = language
    shutil.copytree(ours, tmp_path / "other")
    if file == "config.json":
        (tmp_path / "other" / "generation_config.json").unlink()
    values = json.loads((tmp_path / "other" / file).read_text())
    (tmp_path / "other" / file).write_text(json.dumps(values | {"eos_token_id": 7}))
    assert "eos_token_id" in run(command, gpt2, tmp_path / "other", status=3)


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_models_of_two_kinds_are_refused_by_name(pair, language, command):
    gpt2, ours, kind = pair
    if kind is not GPTScratchForCausalLM:
        output = run(command, language[0], ours, status=1)
        assert kind.__name__ in output and ("GPT2LMHeadModel" in output or "GPTScratchForCausalLM" in output)
        assert kind.gpt2_class.__name__ in run("verify", gpt2, language[1], status=1)


def test_gradients_and_perplexity_are_of_language_models(pair):
    gpt2, ours, kind = pair
    if kind is not GPTScratchForCausalLM:
        assert "gradients are those of a language model" in run("compare", gpt2, ours, "--gradients", status=1)


@pytest.mark.parametrize("command", ["verify", "compare"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model.trf_blocks.1.att.W_key.bias"].view(torch.int64).add_(1),
        lambda t: t["model.trf_blocks.0.ff.layers.0.weight"][1].add_(1e-9),
        lambda t: t["model.trf_blocks.2.norm1.shift"][3].neg_(),
        lambda t: t.update({"model.final_norm.scale": t["model.final_norm.scale"].float()}),
    ],
    ids=["one bit", "1e-9", "minus zero", "float32"],
)
def test_weights_are_compared_in_the_files_dtype_bit_by_bit(command, change, tmp_path):
    gpt2 = official(GPTScratchForCausalLM).double()
    gpt2.transformer.h[2].ln_1.bias.data[3] = 0.0
    gpt2.transformer.ln_f.weight.data = gpt2.transformer.ln_f.weight.data.float().double()
    gpt2.save_pretrained(tmp_path / "official")
    GPTScratchForCausalLM.from_gpt2(gpt2).save_pretrained(tmp_path / "ours")
    run(command, tmp_path / "official", tmp_path / "ours", status=0)
    other = edited(tmp_path / "ours", tmp_path / "other", change)
    assert "ifferent" in run(command, tmp_path / "official", other, status=3)


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_a_tensor_that_one_model_lacks_is_a_difference(language, command, tmp_path):
    gpt2, ours = language
    head = load_file(ours / "model.safetensors")["model.tok_emb.weight"]
    untied = edited(ours, tmp_path / "untied", lambda tensors: tensors.update({"out_head.weight": head}))
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "out_head.weight" in run(command, gpt2, untied, status=3)


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_logits_that_are_no_numbers_are_never_the_same(language, command, tmp_path):
    def overflow(name):
        return lambda tensors: tensors[name].fill_(3e38)

    gpt2 = edited(language[0], tmp_path / "official", overflow("transformer.h.1.mlp.c_proj.bias"))
    ours = edited(language[1], tmp_path / "ours", overflow("model.trf_blocks.1.ff.layers.2.bias"))
    run(command, gpt2, ours, status=3)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Directories with models that are neither ours nor official, by name."""
    place = tmp_path_factory.mktemp("strangers")
    (place / "my.py").write_text(MINE)
    gpt2 = official(GPTScratchForCausalLM)
    gpt2.save_pretrained(place / "official")
    ours = GPTScratchForCausalLM.from_gpt2(gpt2)
    ours.save_pretrained(place / "ours")

    def copied(name, source="ours", **changes):
        shutil.copytree(place / source, place / name)
        config = json.loads((place / name / "config.json").read_text())
        (place / name / "config.json").write_text(json.dumps(config | changes))

    copied("subclass", architectures=["MyGPT"])
    copied("its code", auto_map={"AutoModelForCausalLM": "my.MyGPT"})
    copied("its code on the hub", auto_map={"AutoModelForCausalLM": "me/gpt--my.MyGPT"})
    copied("official class of one's own", "official", architectures=["MyGPT"])
    copied("official with code", "official", auto_map={"AutoModelForCausalLM": "my.MyGPT"})
    copied("two", architectures=["GPTScratchForCausalLM", "MyGPT"])
    copied("with an adapter")
    (place / "with an adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return place


def test_a_class_of_ones_own_is_loaded_as_ours_with_a_warning(strangers, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_gpt_scratch.model.modeling_gpt_scratch"), "propagate", True)
    for name in ("ours", "official"):
        GPTScratchForCausalLM.from_pretrained(strangers / name)
    assert not caplog.records
    for load in (GPTScratchForCausalLM, GPTScratchModel, AutoModelForCausalLM):
        caplog.clear()
        load.from_pretrained(strangers / "subclass")
        assert "the checkpoint is of the class 'MyGPT', but is loaded as GPTScratch" in caplog.text


STRANGERS = ["subclass", "its code", "its code on the hub", "two", "with an adapter"]
STRANGERS += ["official class of one's own", "official with code"]


@pytest.mark.parametrize("name", STRANGERS)
def test_no_command_takes_a_stranger(strangers, name, tmp_path):
    stranger, target = strangers / name, tmp_path / "target"
    if name.startswith("official"):
        commands = [("convert", stranger, target), ("verify", stranger, strangers / "ours")]
    else:
        commands = [("export", stranger, target), ("verify", strangers / "official", stranger)]
        commands += [("export", stranger, target, "--format", "book")]
    commands += [("compare", strangers / "official", stranger), ("compare", stranger, strangers / "ours")]
    commands += [("inspect", stranger), ("explain", "W_key", "--model", stranger)]
    for command in commands:
        output = run(*command, status=1)
        assert ("adapter" if "adapter" in name else "MyGPT") in output, command
        assert len(output) < 1500
    assert not target.exists()


def test_what_is_refused_can_be_compared_by_its_code(strangers):
    output = run("compare", strangers / "official", strangers / "subclass", status=1)
    advice = f"compare REFERENCE my.py:MyGPT --weights {strangers / 'subclass'}"
    assert advice in output
    for name in ("official", "my.py"):
        advice = advice.replace("REFERENCE" if name == "official" else name, str(strangers / name))
    output = run(*advice.split(" "), status=3)
    assert "trf_blocks.0" in output and "the first that differs" in output


def test_a_transformers_class_needs_its_directory(strangers, tmp_path):
    code = f"{strangers / 'my.py'}:MyGPT"
    assert "give the directory" in run("compare", strangers / "official", code, status=1)
    lacking = edited(strangers / "subclass", tmp_path / "lacking", lambda t: t.pop("model.final_norm.scale"))
    output = run("compare", strangers / "official", code, "--weights", lacking, status=1)
    assert "missing model.final_norm.scale" in output


def test_a_config_without_architectures_is_a_language_models():
    values = GPTScratchConfig().to_dict() | {"architectures": None}
    assert architecture(values, "here") is GPTScratchForCausalLM
    for wrong in ({"architectures": [["GPTScratchModel"]]}, {"auto_map": "modeling_gpt_scratch.GPTScratchModel"}):
        with pytest.raises(UnknownArchitecture, match="here"):
            architecture(values | wrong, "here")
    with pytest.raises(UnknownArchitecture):
        architecture(["GPTScratchModel"], "here")
