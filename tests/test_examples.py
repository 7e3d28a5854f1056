"""The examples run offline, at small sizes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, EXAMPLES / name, *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.stdout


@pytest.mark.parametrize("saved", ["nothing", "model.pth", "model_and_optimizer.pth"])
def test_bring_your_own(tmp_path, saved):
    arguments = []
    if saved != "nothing":
        cfg = {"vocab_size": 97, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
        state_dict = GPTModel(cfg).state_dict()
        torch.save({"model_state_dict": state_dict} if "optimizer" in saved else state_dict, tmp_path / saved)
        arguments = [tmp_path / saved, "--cfg", str(cfg).replace("'", '"')]
    out = run("bring_your_own.py", *arguments, cwd=tmp_path)
    assert "equal: True" in out
    assert (tmp_path / "outputs/mine/model.safetensors").is_file()


def test_streaming(tmp_path):
    out = run("streaming.py", "--new-tokens", 20, cwd=tmp_path)
    assert out.count("I had always thought") == 1
    assert "equal to the text generated at once: True" in out


@pytest.mark.parametrize("own_text", [False, True])
def test_pretrain(tmp_path, own_text):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
    arguments = ["--text", "text.txt", "--epochs", 2] if own_text else ["--epochs", 1]
    out = run("pretrain.py", *arguments, cwd=tmp_path)
    assert "epoch 1: The" in out
    assert "validation loss 6." in out or own_text
    output = tmp_path / "outputs" / "pretrain"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    AutoTokenizer.from_pretrained(output)
    assert GPTScratchForCausalLM.from_pretrained(output).config.context_length == 64
