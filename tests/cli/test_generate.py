"""`generate` and `chat`: what they print is what `model.generate` gives."""

import copy
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    set_seed,
)
from typer.testing import CliRunner

from hf_gpt_scratch import GPTScratchForCausalLM, convert, export
from hf_gpt_scratch.cli.app import app

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
PROMPT = "I had always thought"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% else %}{{ message.content }}"
)
TEMPLATE += "<|endoftext|>{% endif %}{% endfor %}"
COMMAND = [sys.executable, "-c", "from hf_gpt_scratch_command import main; main()"]


def run(*arguments, status=0, given=None):
    result = CliRunner().invoke(app, list(map(str, arguments)), input=given)
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def model():
    return GPTScratchForCausalLM.from_pretrained(TRAINED)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TRAINED)


@pytest.fixture
def talker(tmp_path, tokenizer):
    """The same model, whose tokenizer has a chat template."""
    shutil.copytree(TRAINED, tmp_path / "talker")
    (tmp_path / "talker" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "talker"


def text_of(model, tokenizer, prompt=PROMPT, **options):
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, pad_token_id=0, **options)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def test_it_continues_a_text_as_the_models_settings_say(model, tokenizer):
    expected = text_of(model, tokenizer, max_new_tokens=20, do_sample=False) + "\n"
    assert run("generate", TRAINED, PROMPT).stdout == expected
    assert run("generate", TRAINED, PROMPT, "--greedy").stdout == expected
    assert run("generate", TRAINED, "-", given=PROMPT + "\n").stdout == expected


def test_settings_of_the_model_are_obeyed_unless_an_option_says_otherwise(tmp_path, model, tokenizer):
    shutil.copytree(TRAINED, tmp_path / "model")
    settings = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 7}
    saved = GPT2LMHeadModel.from_pretrained(TRAINED)
    saved.generation_config.update(**settings)
    saved.save_pretrained(tmp_path / "model")
    set_seed(5)
    expected = text_of(model, tokenizer, **settings)
    assert run("generate", tmp_path / "model", PROMPT, "--seed", 5).stdout == expected + "\n"
    greedy = text_of(model, tokenizer, max_new_tokens=7, do_sample=False)
    assert run("generate", tmp_path / "model", PROMPT, "--greedy").stdout == greedy + "\n"
    saved.generation_config.update(max_new_tokens=None, max_length=len(tokenizer(PROMPT).input_ids))
    saved.save_pretrained(tmp_path / "model")
    assert "says max_length=" in run("generate", tmp_path / "model", PROMPT, status=1).stderr


def test_beams_are_printed_at_the_end(talker, model, tokenizer):
    """They cannot be streamed; --greedy means one token at a time all the same."""
    saved = GPT2LMHeadModel.from_pretrained(talker)
    saved.generation_config.update(num_beams=3, num_return_sequences=2, max_new_tokens=9)
    saved.save_pretrained(talker)
    beams = text_of(model, tokenizer, num_beams=3, max_new_tokens=9) + "\n"
    greedy = text_of(model, tokenizer, max_new_tokens=9, do_sample=False) + "\n"
    assert run("generate", talker, PROMPT).stdout == beams != greedy
    assert run("generate", talker, PROMPT, "--greedy").stdout == greedy
    assert run("chat", talker, given=PROMPT).stdout == beams.removeprefix(PROMPT)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_standard_input_that_is_not_utf_8_is_named_so(talker, command):
    text = ["-"] if command == "generate" else []
    told = run(command, talker, *text, given="Café".encode("latin-1"), status=1).stderr
    assert "standard input is not UTF-8: byte 4 is 0xe9" in told and "iconv" in told
    assert run(command, talker, *text, "--max-new-tokens", 1, given="Café\r\n".encode()).stdout


@pytest.mark.parametrize("option", [("temperature", 1.5), ("top-k", 7), ("top-p", 0.8)])
def test_an_option_of_sampling_samples_with_the_seed(model, tokenizer, option):
    name, value = option
    set_seed(11)
    expected = text_of(model, tokenizer, max_new_tokens=30, do_sample=True, **{name.replace("-", "_"): value})
    options = ["--max-new-tokens", 30, f"--{name}", value]
    assert run("generate", TRAINED, PROMPT, *options, "--seed", 11).stdout == expected + "\n"
    assert run("generate", TRAINED, PROMPT, *options, "--seed", 12).stdout != expected + "\n"


def test_options_that_mean_nothing_are_usage_errors():
    for options in (
        ["--greedy", "--top-k", "5"],
        ["--temperature", "0"],
        ["--top-p", "1.5"],
        ["--max-new-tokens", "0"],
        ["--top-k", "0"],
    ):
        run("generate", TRAINED, PROMPT, *options, status=2)


def test_what_does_not_fit_the_context_is_refused_with_what_does(tokenizer):
    length = len(tokenizer(PROMPT).input_ids)
    told = run("generate", TRAINED, PROMPT, "--max-new-tokens", 128, status=1).stderr
    assert (
        f"the text has {length} tokens and 128 new ones" in told and f"--max-new-tokens {128 - length} at most" in told
    )
    assert len(run("generate", TRAINED, PROMPT, "--max-new-tokens", 128 - length).stdout) > len(PROMPT)
    assert "context_length is 128, new tokens included" in run("generate", TRAINED, PROMPT * 50, status=1).stderr
    assert "the text is empty" in run("generate", TRAINED, "", status=1).stderr


def test_without_an_option_it_stops_where_the_context_ends(tokenizer):
    prompt = tokenizer.decode(tokenizer(" he said that" * 60).input_ids[:120])
    told = run("generate", TRAINED, prompt)
    assert 0 < len(tokenizer(told.stdout).input_ids) - len(tokenizer(prompt).input_ids) <= 9


@pytest.mark.slow
@pytest.mark.parametrize("format", ["native", "book", "nanogpt", "gguf"])
def test_it_reads_what_convert_reads_and_writes_nothing(tmp_path, model, tokenizer, format):
    options = []
    if format == "native":
        convert(TRAINED, tmp_path / "model", check=False)
        source = tmp_path / "model"
    else:
        if format == "nanogpt":  # which knows the exact GELU alone
            convert(TRAINED, tmp_path / "native", check=False)
        export(TRAINED, tmp_path / "model", format, check=False)
        [source] = (path for path in (tmp_path / "model").iterdir() if path.name != "conversion_receipt.json")
    if format in ("book", "nanogpt"):
        options = ["--tokenizer", TRAINED]
        assert "has no tokenizer" in run("generate", source, PROMPT, *heads(format, model), status=1).stderr
    before = sorted(tmp_path.rglob("*"))
    told = run("generate", source, PROMPT, *options, *heads(format, model))
    assert told.stdout == text_of(model, tokenizer, max_new_tokens=20, do_sample=False) + "\n"
    assert sorted(tmp_path.rglob("*")) == before


def heads(format, model):
    return ["--n-heads", model.config.n_heads] if format == "book" else []


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_a_file_does_not_store_is_an_option(tmp_path, model, talker, tokenizer, command):
    """Adapters are merged with the scale that is given; another activation is another model."""
    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator) for shape in ((model.config.emb_dim, 2), (2, model.config.emb_dim)))
    merged = copy.deepcopy(model)
    with torch.no_grad():
        merged.model.trf_blocks[0].att.W_query.weight += 0.5 * (a @ b).T
    name = "trf_blocks.0.att.W_query"
    weights[f"{name}.linear.weight"] = weights.pop(f"{name}.weight")
    weights[f"{name}.linear.bias"] = weights.pop(f"{name}.bias")
    torch.save(weights | {f"{name}.lora.A": a, f"{name}.lora.B": b}, tmp_path / "lora.pth")
    export(TRAINED, tmp_path / "nano", "nanogpt", check=False)
    state = torch.load(tmp_path / "nano/ckpt.pt", weights_only=True)["model"]
    torch.save(state, tmp_path / "nano.pt")

    def said(file, *options, status=0):
        given, text = (PROMPT, []) if command == "chat" else (None, [PROMPT])
        options = [*options, "--n-heads", model.config.n_heads, "--tokenizer", talker, "--max-new-tokens", 30]
        return run(command, tmp_path / file, *text, *options, given=given, status=status)

    def expected(one):
        text = text_of(one, tokenizer, max_new_tokens=30, do_sample=False) + "\n"
        return text if command == "generate" else text.removeprefix(PROMPT)

    assert "--lora-scale" in said("lora.pth", status=1).stderr
    told = said("lora.pth", "--lora-scale", 0.5)
    assert told.stdout == expected(merged) != expected(model) and "merged" in told.stderr
    told = said("nano.pt", "--activation", "gelu_new")
    assert told.stdout == expected(model) and "--activation" not in told.stderr
    assert "--activation gelu_new" in said("nano.pt").stderr  # where it is not told, it is assumed, with a note


def test_a_model_that_writes_no_text_is_refused(tmp_path):
    GPT2ForSequenceClassification(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    assert "which writes no text" in run("generate", tmp_path, PROMPT, status=1).stderr
    config = GPT2Config(vocab_size=1000, n_positions=64, n_embd=4, n_layer=1, n_head=1)
    GPT2DoubleHeadsModel(config).save_pretrained(tmp_path / "two")
    assert run("generate", tmp_path / "two", PROMPT, "--tokenizer", TRAINED).stdout.startswith(PROMPT)
    assert "there is no directory" in run("generate", tmp_path / "nowhere", PROMPT, status=1).stderr


@pytest.mark.slow
def test_a_character_that_the_tokenizer_does_not_know_is_an_error(tmp_path):
    stoi = {letter: i for i, letter in enumerate("abc ")}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": stoi}))
    config = GPT2Config(
        vocab_size=4, n_positions=16, n_embd=4, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=None
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    options = ["--tokenizer", tmp_path / "meta.pkl", "--max-new-tokens", 3]
    assert len(run("generate", tmp_path / "model", "ab ", *options).stdout) == len("ab ") + 3 + 1
    assert "does not take this text" in run("generate", tmp_path / "model", "abd", *options, status=1).stderr


def test_chat_answers_by_the_template_and_remembers(talker, model, tokenizer):
    first, second = PROMPT, " Gisburn rather"
    told = run("chat", talker, "--max-new-tokens", 9, given=f"{first}\n\n{second}\n")

    def answer(text):
        inputs = tokenizer(text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=9, do_sample=False, pad_token_id=0)
        return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    said = answer(first)
    again = answer(f"{first}{said.strip()}<|endoftext|>{second}")
    assert told.stdout == f"{said}\n{again}\n"


def test_a_chat_that_fills_the_context_forgets_its_beginning_and_says_so(talker):
    told = run("chat", talker, "--max-new-tokens", 60, given=f"{PROMPT}\n" * 4)
    assert "the oldest message and its answer are forgotten" in told.stderr
    told = run("chat", talker, given=f"{PROMPT * 60}\n{PROMPT}\n")
    assert "Not answered: the text has" in told.stderr and told.stdout.strip()


def test_without_a_chat_template_chat_says_where_one_is_from():
    told = run("chat", TRAINED, given="hello\n", status=1).stderr
    assert "has no chat template" in told and "examples/instruct.py" in told
    assert f"chat_template.jinja into {TRAINED}" in told


def test_for_a_file_the_place_of_a_chat_template_is_the_directory_that_it_is_converted_to(tmp_path, model, tokenizer):
    weights = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    torch.save(weights, tmp_path / "model.pth")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    told = run("chat", tmp_path / "model.pth", "--n-heads", 6, "--tokenizer", tmp_path / "tokenizer", status=1).stderr
    assert f"chat_template.jinja into {tmp_path / 'tokenizer'}" in told
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {chr(65 + i): i for i in range(1000)}}))
    told = run("chat", tmp_path / "model.pth", "--n-heads", 6, status=1, given="A\n").stderr
    [command] = re.findall("`hf-gpt-scratch (convert .*?)` with the same options", told)
    run(*command.replace("DIRECTORY", str(tmp_path / "ours")).split(), "--n-heads", 6)
    (tmp_path / "ours/chat_template.jinja").write_text(TEMPLATE.replace("<|endoftext|>", "A"))
    assert run("chat", tmp_path / "ours", "--max-new-tokens", 2, given="AB\n").stdout.strip()


def test_a_template_that_refuses_a_message_is_an_error(talker):
    (talker / "chat_template.jinja").write_text("{{ raise_exception('no, thanks') }}")
    assert "no, thanks" in run("chat", talker, given="hello\n").stderr


def test_ctrl_c_in_the_middle_ends_with_130(monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(GPTScratchForCausalLM, "generate", interrupted)
    assert "Interrupted" in run("generate", TRAINED, PROMPT, status=130).stderr


@pytest.mark.slow
def test_text_comes_word_by_word_and_ctrl_c_and_a_closed_pipe_end_it_quietly(tmp_path):
    """In a process whose model waits for a line after every token."""
    slow = """
import functools, signal, sys, time
import hf_gpt_scratch_command
from hf_gpt_scratch import GPTScratchForCausalLM

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background, without it
forward = GPTScratchForCausalLM.forward

@functools.wraps(forward)
def waiting(self, *arguments, **options):
    if self.config.vocab_size == 1000 and not sys.stdin.readline():  # not in the check before the first use
        time.sleep(60)
    return forward(self, *arguments, **options)

GPTScratchForCausalLM.forward = waiting
hf_gpt_scratch_command.main()
"""
    command = [sys.executable, "-c", slow, "generate", str(TRAINED), PROMPT, "--max-new-tokens", "100"]
    for how in ("ctrl-c", "pipe"):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
        with subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
            process.stdin.write("\n" * 20)
            process.stdin.flush()
            begun = process.stdout.read(len(PROMPT) + 5)
            assert begun.startswith(PROMPT) and process.poll() is None
            if how == "ctrl-c":
                process.send_signal(signal.SIGINT)
                status, told = process.wait(120), process.stderr.read()
                assert status == 130 and "Interrupted" in told, told
            else:
                process.stdout.close()
                process.stdin.write("\n" * 100)
                process.stdin.flush()
                status, told = process.wait(120), process.stderr.read()
                assert status == 1
            assert "Traceback" not in told, told
