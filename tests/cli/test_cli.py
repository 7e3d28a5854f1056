"""The command `hf-gpt-scratch`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import run_python
from pairs import random_pair
from rich.cells import cell_len
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_gpt_scratch import GPTModel, GPTScratchForCausalLM, __version__
from hf_gpt_scratch.cli.app import COMMANDS, MAX_SHARD_SIZE, WRITTEN, app, written
from hf_gpt_scratch.weights.formats import FORMATS, format
from hf_gpt_scratch.weights.formats.directory import NATIVE

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
STARTED = "from hf_gpt_scratch.cli.app import app; app()"


def run(*arguments, status=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == status, result.output
    return result


def in_a_process(*arguments, **environment):
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", **environment}
    return run_python("-c", STARTED, *arguments, env=environment)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An official checkpoint and ours, the same model."""
    directory = tmp_path_factory.mktemp("pair")
    for model, name in zip(random_pair(), ("official", "ours"), strict=True):
        model.save_pretrained(directory / name)
    return directory / "official", directory / "ours"


def test_help_names_every_part():
    assert all(command.__name__ in run("--help").output for command in COMMANDS)


@pytest.mark.slow
def test_the_command_and_the_package_work_in_one_process(tmp_path):
    done = in_a_process("convert", TRAINED, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "Verified in float32" in done.stdout and "Tokenizer: GPT2Tokenizer" in done.stdout
    assert GPTScratchForCausalLM.from_pretrained(tmp_path / "ours").config.n_layers == 4


@pytest.mark.slow
@pytest.mark.parametrize(("command", "format"), [("convert", None), ("export", "gpt2"), ("export", "gguf")])
def test_the_number_of_heads_is_asked_for_by_an_option_that_there_is(tmp_path, command, format):
    cfg = {"vocab_size": 97, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "qkv_bias": True}
    torch.save(GPTModel(cfg).state_dict(), tmp_path / "model.pth")
    asked = [command, tmp_path / "model.pth", tmp_path / "out", *(["--format", format] if format else [])]
    message = " ".join(run(*asked, status=1).output.split())
    [option] = re.findall(r"--n-heads", message)
    run(*asked, option, 3)
    assert list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_where_no_tokenizer_goes_along_the_command_says_how_to_give_one(tmp_path):
    """Converting again helps only where the format has a place for it."""
    told = run("export", TRAINED, tmp_path / "book", "--format", "book", "--no-verify").output
    [line] = re.findall("^Tokenizer: .*", told, re.M)
    assert "the format has no place" in line and "--tokenizer" in line and "Convert again" not in line
    told = run("convert", tmp_path / "book/model.pth", tmp_path / "ours", "--n-heads", 6).output
    [line] = re.findall("^Tokenizer: .*", told, re.M)
    assert "Convert again with --tokenizer" in line and "`generate` and `chat` take one" in line
    for model in (tmp_path / "book/model.pth", tmp_path / "ours"):
        heads = ["--n-heads", 6] if model.is_file() else []
        assert run("generate", model, "I had", *heads, "--tokenizer", TRAINED).stdout.startswith("I had")


@pytest.mark.slow
def test_merged_adapters_are_told_with_their_scale(tmp_path):
    cfg = {"vocab_size": 97, "context_length": 32, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "qkv_bias": False}
    weights = GPTModel(cfg).state_dict()
    weights["out_head.linear.weight"] = weights.pop("out_head.weight")
    weights |= {"out_head.lora.A": torch.randn(24, 2), "out_head.lora.B": torch.randn(2, 97)}
    torch.save(weights, tmp_path / "lora.pth")
    told = run("convert", tmp_path / "lora.pth", tmp_path / "ours", "--n-heads", 3, "--lora-scale", 2).output
    assert "merged into their layers, with lora_scale=2.0" in told
    assert "lora_scale" not in run("convert", TRAINED, tmp_path / "other", "--weights-only").output


@pytest.mark.parametrize("command", ["convert", "export"])
def test_two_options_that_contradict_one_another_are_a_wrong_command_line(pair, command, tmp_path):
    out = run(command, pair[0], tmp_path / "out", "--weights-only", "--no-verify", status=2)
    assert "give one of them" in " ".join(out.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_while_libraries_are_imported_ends_the_command_without_a_traceback():
    script = """
import sys
import hf_gpt_scratch_command

class Interrupted:
    def find_spec(name, *_):
        if name == "hf_gpt_scratch.cli.app":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted)
hf_gpt_scratch_command.main()
"""
    done = run_python("-c", script, "inspect", "124M")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "Interrupted")
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_a_command_imports_its_libraries_is_130():
    script = """
import sys
import hf_gpt_scratch_command

class Interrupted:
    def find_spec(name, *_):
        if name == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted)
hf_gpt_scratch_command.main()
"""
    done = subprocess.run([sys.executable, "-c", script, "inspect", "124M"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "Interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("--version", 0),
        ("--help", 0),
        *((f"{command.__name__} --help", 0) for command in COMMANDS),
        ("nonsense", 2),
        ("explain", 2),
        ("compare a b --nonsense", 2),
        ("export a b --format nonsense", 2),
        ("convert a b --weights-only --no-verify", 2),
    ],
)
def test_what_needs_no_library_imports_none(arguments, status):
    script = """
import atexit, sys
import hf_gpt_scratch_command
atexit.register(lambda: print({"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)))
hf_gpt_scratch_command.main()
"""
    command = [sys.executable, "-c", script, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (status, "set()"), done.stdout + done.stderr


def test_the_formats_that_the_help_names_are_those_that_can_be_written():
    formats = [one.name for one in FORMATS.values() if one.file is not None and one is not NATIVE]
    assert formats == list(WRITTEN) == written()
    assert MAX_SHARD_SIZE == format.MAX_SHARD_SIZE


def test_a_directory_that_is_not_there_is_named():
    assert "there is no directory nowhere" in run("verify-receipt", "nowhere", status=1).output


@pytest.mark.slow
def test_a_name_that_is_not_utf_8_is_refused_before_the_work(pair, tmp_path):
    done = in_a_process("convert", pair[0], os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))
    assert done.returncode == 1 and "is not UTF-8" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_convert_export_and_verify_go_around(pair, tmp_path):
    official, _ = pair
    run("convert", official, tmp_path / "ours")
    run("export", tmp_path / "ours", tmp_path / "again")
    weights, again = (load_file(path / "model.safetensors") for path in (official, tmp_path / "again"))
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)
    assert "The same model" in run("verify", tmp_path / "again", tmp_path / "ours").output


def test_options_reach_the_conversion(pair, tmp_path):
    official, _ = pair
    assert "Not verified, as requested" in run("convert", official, tmp_path / "ours", "--no-verify").output
    run("convert", official, tmp_path / "ours", status=1)
    run("convert", official, tmp_path / "ours", "--overwrite")
    assert "has no meaning" in run("convert", official, tmp_path / "new", "--revision", "main", status=1).output


def test_verify_tells_the_same_from_another(pair, tmp_path):
    official, ours = pair
    figures = json.loads(run("verify", official, ours, "--json").stdout)
    assert figures["passed"] and figures["logits"]["relative_error"] < figures["logit_bound"]

    GPTScratchForCausalLM.from_pretrained(ours).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.trf_blocks.1.att.out_proj.weight"
    save_file({**weights, name: weights[name].T.contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "Different models" in run("verify", official, tmp_path, status=3).output
    assert not json.loads(run("verify", official, tmp_path, "--json", status=3).stdout)["passed"]


def test_verify_says_which_checkpoint_cannot_be_read(pair, tmp_path):
    official, ours = pair
    assert "The same model" in run("verify", ours, official).output
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "type 'llama', but verify compares 'gpt2' and 'gpt_scratch'" in " ".join(
        run("verify", official, tmp_path, status=1).output.split()
    )
    assert "there is no directory" in run("verify", official, "./missing", status=1).output


def test_explain_prints_code_and_json():
    output = run("explain", "h.3.attn.c_attn.weight").stdout
    assert "att.W_key.weight = attn.c_attn.weight[:, 768:1536].T" in output
    [found] = json.loads(run("explain", "W_key.weight", "--json", "--model", TRAINED).stdout)
    assert found["parts"][0]["value"] == "attn.c_attn.weight[:, 96:192].T"
    assert "did you mean W_query" in run("explain", "W_querry", status=1).output


@pytest.mark.slow
def test_inspect_prints_tables_and_json():
    output = run("inspect", "book").stdout
    for told in ("12 equal blocks", "163,009,536", "621.83 MiB", "768 × 768 + 768", "Norms come before"):
        assert told in output
    assert json.loads(run("inspect", "1558M", "--json").stdout)["parameters"]["tied"] == 1_557_611_200
    assert "config.json" in run("inspect", Path(__file__).parent, status=1).output


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("arguments", [("inspect", "1558M"), ("explain", "c_attn"), ("explain", "lm_head")])
def test_nothing_is_wider_than_the_terminal(monkeypatch, arguments, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = run(*arguments).stdout.splitlines()
    assert len(lines) > 8
    assert max(map(cell_len, lines)) <= width
    assert not any("…" in line for line in lines if "x + …" not in line)


def test_the_version_is_said():
    assert run("--version").stdout == f"hf-gpt-scratch {__version__}\n"


def test_a_wrong_command_line_is_2():
    run("explain", status=2)
    run("nonsense", status=2)
