"""What nanoGPT, build-nanogpt and minGPT save, and their state dicts alone."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from pairs import CONTEXT, LAYERS, VOCAB, random_ids
from programs import HEADS, E, Fused, nanogpt_file
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_gpt_scratch import GPTScratchForCausalLM, convert
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import ConversionError
from hf_gpt_scratch.weights.checkpoint import read_pickle
from hf_gpt_scratch.weights.formats import detect, read

pytestmark = pytest.mark.slow

BOUND = 1e-5  # of the largest logit


@dataclass
class GPTConfig:
    """build-nanogpt's."""

    block_size: int = CONTEXT
    vocab_size: int = VOCAB
    n_layer: int = LAYERS
    n_head: int = HEADS
    n_embd: int = E


@pytest.fixture
def of_main(monkeypatch):
    """The class, as a script's own."""
    monkeypatch.setattr(GPTConfig, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    return GPTConfig


def built(path, model, config, **more):
    torch.save({"model": model.state_dict(), "config": config, "step": 5, "val_loss": 3.25, **more}, path)
    return path


@torch.no_grad()
def error_of(directory, reference):
    ours, ids = GPTScratchForCausalLM.from_pretrained(directory), random_ids()
    return ((ours(ids).logits - reference(ids)).abs().max() / reference(ids).abs().max()).item()


def test_build_nanogpts_checkpoint_has_its_logits_and_nothing_is_asked(tmp_path, of_main):
    model = Fused(gelu="tanh")
    optimizer = torch.optim.AdamW(model.parameters())
    model(random_ids()).sum().backward()
    optimizer.step()
    path = built(
        tmp_path / "model_00005.pt", model, of_main(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state()
    )
    assert b"__main__\nGPTConfig" in path.read_bytes()
    assert detect(path) == "nanogpt"
    receipt = convert(path, tmp_path / "out")
    assert receipt["parity"]["passed"]
    assert any("build-nanogpt's, whose activation is the tanh GELU" in note for note in receipt["notes"])
    assert error_of(tmp_path / "out", model) < BOUND


def test_its_twin_with_the_exact_gelu_has_other_logits(tmp_path, of_main):
    path = built(tmp_path / "model_00005.pt", Fused(gelu="none"), of_main())
    convert(path, tmp_path / "out")
    assert error_of(tmp_path / "out", Fused(gelu="none")) > BOUND
    with pytest.raises(ConversionError, match=r"says 'gelu_new'; leave activation_function out"):
        convert(path, tmp_path / "other", activation_function="gelu")


def test_the_config_of_a_model_with_nanogpts_choices_does_not_tell_the_activation(tmp_path):
    config = GPTConfig()
    config.bias, config.dropout = True, 0.25
    path = built(tmp_path / "model.pt", Fused(), config)
    receipt = convert(path, tmp_path / "out")
    assert any("no file of its kind tells the activation" in note for note in receipt["notes"])
    assert read(path)[0].drop_rate == 0.25
    assert error_of(tmp_path / "out", Fused()) < BOUND


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (GPTConfig(n_layer=2), "says n_layers=2, but its tensors say 3"),
        (GPTConfig(vocab_size=50257), "says vocab_size=50257, but its tensors say 211"),
        (GPTConfig(n_head="4"), "a str for n_head in its config"),
        (GPTConfig(n_head=5), "n_heads=5, but it must be a whole number"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, config, told):
    with pytest.raises(ConversionError, match=told):
        convert(built(tmp_path / "model.pt", Fused(), config), tmp_path / "out")


def test_a_config_of_a_larger_class_is_refused_by_its_setting(tmp_path):
    config = GPTConfig()
    config.n_kv_head = 2
    with pytest.raises(ConversionError, match="has the config n_kv_head, which nanoGPT itself does not have"):
        convert(built(tmp_path / "model.pt", Fused(), config), tmp_path / "out")


def test_nothing_of_a_config_class_is_run_or_imported(tmp_path):
    """Whatever the class of that name would do: it is not looked up, and other names are refused as before."""
    script = tmp_path / "train_gpt2.py"
    script.write_text(
        "import torch\n"
        "class GPTConfig:\n"
        "    def __setstate__(self, state): open('ran', 'w')\n"
        "config = GPTConfig()\n"
        "config.n_head = 4\n"
        "torch.save({'model': {'a': torch.ones(2)}, 'config': config}, 'model.pt')\n"
    )
    subprocess.run([sys.executable, script.name], cwd=tmp_path, check=True)
    content = read_pickle(tmp_path / "model.pt")
    assert content["config"].values == {"n_head": 4} and content["config"].what == "__main__.GPTConfig"
    assert not (tmp_path / "ran").exists()


class Config:
    n_head = HEADS


def test_settings_of_another_class_are_refused_by_its_name(tmp_path):
    path = built(tmp_path / "model.pt", Fused(), Config())
    with pytest.raises(ConversionError, match=r"refers to .*Config, and loading such a file can run any program"):
        convert(path, tmp_path / "out")


# State dicts alone, and what else lies around them


@pytest.mark.parametrize("how", ["alone", "safetensors", "without transformer.", "in model", "Lightning's"])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_a_state_dict_asks_for_heads_and_takes_the_activation_that_is_given(tmp_path, how, gelu):
    model = Fused(gelu=gelu, tied=how != "safetensors")
    content, path = model.state_dict(), tmp_path / "model.pt"
    if how == "without transformer.":
        content = {name.removeprefix("transformer."): tensor for name, tensor in content.items()}
    elif how == "in model":
        content = {"model": content, "iter": 3}
    elif how == "Lightning's":
        content = {"epoch": 1, "state_dict": {"model." + name: tensor for name, tensor in content.items()}}
    if how == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(ConversionError, match="pass n_heads"):
        convert(path, tmp_path / "out")
    [note] = convert(path, tmp_path / "out", n_heads=HEADS)["notes"]
    assert "activation_function='gelu_new', in a command --activation gelu_new" in note
    assert (error_of(tmp_path / "out", model) < BOUND) == (gelu == "none")
    command = ["convert", str(path), str(tmp_path / "asked"), "--n-heads", "4", "--activation"]
    done = CliRunner().invoke(app, [*command, "gelu" if gelu == "none" else "gelu_new"])
    assert done.exit_code == 0 and "Note" not in done.output, done.output
    assert error_of(tmp_path / "asked", model) < BOUND
    done = CliRunner().invoke(app, [*command[:2], str(tmp_path / "wrong"), *command[3:], "tanh-gelu"])
    assert done.exit_code == 1


def test_mingpts_state_dict_takes_the_activation_that_is_given(tmp_path):
    model = Fused(tied=False, mask=True, gelu="none")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "out", n_heads=HEADS, activation_function="gelu")
    assert error_of(tmp_path / "out", model) < BOUND
    assert detect(tmp_path / "model.pt") == "mingpt"


def test_what_other_formats_tell_is_not_asked(tmp_path):
    path = nanogpt_file(tmp_path / "ckpt.pt", Fused(), config={"activation_function": "gelu"})
    with pytest.raises(ConversionError, match=r"activation_function='gelu_new', but .* says 'gelu'"):
        convert(path, tmp_path / "out", activation_function="gelu_new")
    with pytest.raises(
        ConversionError, match=r"lora_scale=1\.0, but .* leaves nothing open there; leave lora_scale out"
    ):
        convert(path, tmp_path / "out", lora_scale=1.0)
