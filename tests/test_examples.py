"""The examples run offline, at small sizes."""

import importlib
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forks import run_python
from pairs import random_ids, randomize
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM, GPTScratchForSequenceClassification
from hf_gpt_scratch.cli.app import app

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command, cwd):
    done = run_python(*command, cwd=cwd, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("saved", "given"),
    [
        ("nothing", None),
        *((saved, given) for saved in ("model.pth", "model_and_optimizer.pth") for given in ("--cfg", "--n-heads")),
    ],
)
def test_bring_your_own(tmp_path, saved, given):
    arguments = []
    if saved != "nothing":
        cfg = {"vocab_size": 97, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
        state_dict = GPTModel(cfg).state_dict()
        torch.save({"model_state_dict": state_dict} if "optimizer" in saved else state_dict, tmp_path / saved)
        arguments = [tmp_path / saved, given, json.dumps(cfg) if given == "--cfg" else 3]
    out = run(EXAMPLES / "bring_your_own.py", *arguments, cwd=tmp_path)
    assert "equal: True" in out
    assert (tmp_path / "outputs/mine/model.safetensors").is_file()


def test_bring_your_own_asks_for_the_cfg(tmp_path):
    cfg = {"vocab_size": 97, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2}
    torch.save(GPTModel(cfg).state_dict(), tmp_path / "model.pth")
    for arguments, told in (
        (["model.pth"], "vocab_size=97, emb_dim=24, context_length=32, n_layers=2, but the config says"),
        (["model.pth", "--n-heads", "5"], "number of heads"),
        (["model.pth", "--n-heads", "3", "--cfg", json.dumps(cfg)], "leave n_heads out"),
        (["no.pth"], "No such file"),
        (["model.pth", "--cfg", "{"], "--cfg {"),
        (["model.pth", "--cfg", json.dumps({**cfg, "n_heads": 5})], "number of heads"),
    ):
        done = run_python(EXAMPLES / "bring_your_own.py", *arguments, cwd=tmp_path)
        assert done.returncode == 1 and told in done.stderr and ("--cfg" in done.stderr or "--n-heads" in arguments)
        assert "Traceback" not in done.stderr


def test_the_notebook(tmp_path):
    cells = json.loads((EXAMPLES / "book_to_hub.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)  # kept as it is before it runs
    (tmp_path / "notebook.py").write_text("\n".join("".join(cell["source"]) for cell in code), encoding="utf-8")
    out = run_python(tmp_path / "notebook.py", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert "10 more losses" in out.stdout
    assert (tmp_path / "ready" / "modeling_gpt_scratch.py").is_file()


def test_streaming(tmp_path):
    out = run(EXAMPLES / "streaming.py", "--new-tokens", 20, cwd=tmp_path)
    assert out.count("I had always thought") == 1
    assert "equal to the text generated at once: True" in out


@pytest.mark.parametrize("own_text", [False, True])
@pytest.mark.long
def test_pretrain(tmp_path, own_text):
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
    arguments = ["--text", "text.txt", "--epochs", 2] if own_text else ["--epochs", 1]
    out = run(EXAMPLES / "pretrain.py", *arguments, cwd=tmp_path)
    assert "epoch 1: The" in out
    assert "validation loss 6." in out or own_text
    output = tmp_path / "outputs" / "pretrain"
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    AutoTokenizer.from_pretrained(output)
    assert GPTScratchForCausalLM.from_pretrained(output).config.context_length == 64


@pytest.mark.parametrize("arguments", [[], ["--train-all", "--csv", "spam.tsv"]], ids=str)
def test_classify(tmp_path, arguments):
    lines = [f"{label}\t{word} {n}" for label, word in (("ham", "hello"), ("spam", "win")) for n in range(100)]
    (tmp_path / "spam.tsv").write_text("\n".join(lines))
    out = run(EXAMPLES / "classify.py", *arguments, cwd=tmp_path)
    [accuracy] = re.findall(r"test accuracy: .* -> (.*)%", out)
    assert float(accuracy) > 90
    assert "'label': 'spam'" in out
    model = GPTScratchForSequenceClassification.from_pretrained(tmp_path / "outputs" / "classify")
    assert model.config.id2label == {0: "ham", 1: "spam"}


@pytest.mark.parametrize("own_data", [False, True])
def test_instruct(tmp_path, own_data, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    entries = [{"instruction": f"Count to {n}.", "input": "", "output": "1 2"} for n in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    out = run(EXAMPLES / "instruct.py", "--epochs", 3, *(["--json", "data.json"] if own_data else []), cwd=tmp_path)
    assert out.count("before:") == out.count("after:") == (3 if own_data else 5)
    first, last = map(float, re.findall(r"test loss (.*) -> (.*),", out)[0])
    assert last < first / 2
    saved = tmp_path / "outputs" / "instruct"
    tokenizer, example = AutoTokenizer.from_pretrained(saved), importlib.import_module("instruct")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Count to 3."}], tokenize=False)
    assert asked == example.prompt({"instruction": "Count to 3.", "input": ""})
    told = CliRunner().invoke(app, ["chat", str(saved), "--greedy"], input="Count to 3.\n")
    model = GPTScratchForCausalLM.from_pretrained(saved)
    assert told.exit_code == 0, told.output
    assert told.stdout.strip() == example.respond(model, tokenizer, {"instruction": "Count to 3."})


def test_lora(tmp_path):
    out = run(EXAMPLES / "lora.py", "--steps", 20, cwd=tmp_path)
    assert "55,296 of 611,136 parameters are trained, 9.0%" in out
    assert out.count("equal logits: True") == 2
    GPTScratchForCausalLM.from_pretrained(tmp_path / "outputs" / "lora" / "merged")


def test_custom_head(tmp_path):
    out = run(EXAMPLES / "custom_head.py", cwd=tmp_path)
    assert "equal rewards: True" in out
    assert (tmp_path / "outputs" / "custom_head" / "model.safetensors").is_file()


def test_custom_block(tmp_path):
    out = run(EXAMPLES / "custom_block.py", cwd=tmp_path)
    assert "generated: [5, 8, 11, 14," in out
    assert "equal logits: True" in out


TORCHRUN = "from torch.distributed.run import main; main()"
# What torchrun sets, in two forks of one process.
TWO_FORKS = """
import os, runpy, socket, sys

with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
del sys.argv[0]
for rank in "01":
    if os.fork() == 0:
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit(os.wait()[1] or os.wait()[1])
"""


@pytest.mark.parametrize("how", ["tensor", "sharded", "data"])
@pytest.mark.long
def test_parallel(tmp_path, how):
    if how != "data" and find_spec("transformers.distributed.parallel_utils") is None:
        pytest.skip("sharded loading is for transformers 5.22 on")
    program = [EXAMPLES / "parallel.py", "--how", how]
    if how == "data":
        out = run("-c", TORCHRUN, "--standalone", "--nproc-per-node", 2, *program, cwd=tmp_path)
    else:
        out = run("-c", TWO_FORKS, *program, cwd=tmp_path)
    assert "equal: True" in out
    share = "437,856" if how == "data" else r"2\d\d,\d{3}"
    assert len(re.findall(rf"process [01] holds {share} of 437,856 parameters", out)) == 2


@pytest.fixture
def model(monkeypatch):
    """A tiny model of examples/minimal_model.py with random weights."""
    monkeypatch.syspath_prepend(EXAMPLES)
    module = vars(importlib.import_module("minimal_model"))
    config = module["MinimalConfig"](
        vocab_size=97, context_length=32, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, use_cache=True
    )
    return randomize(module["MinimalGPT"](config)).eval()


def test_minimal_model(tmp_path):
    assert "the book's: True" in run(EXAMPLES / "minimal_model.py", cwd=tmp_path)


def test_the_minimal_model_does_what_transformers_asks(model):
    code = (EXAMPLES / "minimal_model.py").read_text()
    assert len(code[code.index("class MinimalConfig") : code.index("def main")].splitlines()) <= 110  # as docs say

    ids = random_ids(1, 8, vocab_size=97)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 8])
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 11:], alone[:, 8:])
    assert torch.equal(model.generate(ids, use_cache=False, **settings), alone)
    beams = [model.generate(ids, num_beams=3, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*beams)
    logits = model(ids).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
    plain = torch.autograd.grad(model.train()(ids, labels=ids).loss, model.gpt.tok_emb.weight)[0]
    model.gradient_checkpointing_enable()
    again = torch.autograd.grad(model(ids, labels=ids).loss, model.gpt.tok_emb.weight)[0]
    torch.testing.assert_close(again, plain)
    with torch.no_grad():
        model.eval().gpt.trf_blocks[0].att.out_proj.weight *= 1.1
    assert (model(ids).logits - logits).abs().max() > 1e-3
