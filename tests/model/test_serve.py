"""`transformers serve` and `transformers chat` with a converted model: the text is that of `generate`."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from pairs import random_ids, random_pair
from transformers import AutoTokenizer, GenerationConfig, GPT2LMHeadModel

from hf_gpt_scratch.weights.convert import gpt2_to_scratch
from hf_gpt_scratch.weights.parity import greedy_ids

pytestmark = pytest.mark.slow

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
EXAMPLE = Path(__file__).parents[2] / "examples" / "serve.py"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPT = "I had always thought"
NEW_TOKENS = 12
COMPLETIONS = importlib.util.find_spec("transformers.cli.serving") is not None
SECONDS = 60  # for the server to come up; it takes five


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


class Server:
    """A running server and the model that it is asked for."""

    def __init__(self, model, log):
        self.model, self.log, self.url = model, log, f"http://localhost:{free_port()}"
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        command = [sys.executable, EXAMPLE, "--port", self.url.rpartition(":")[2], "--device", "cpu"]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=self.environment, cwd=log.parent)

    def wait(self):
        for _ in range(10 * SECONDS):
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.post("/health", None)
            except urllib.error.URLError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def post(self, path, body):
        data = None if body is None else json.dumps({"model": str(self.model), **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.read().decode()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("serve")
    model = GPT2LMHeadModel.from_pretrained(TRAINED)
    model.save_pretrained(directory / "official")
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "official")
    gpt2_to_scratch(directory / "official", directory / "ours")
    server = Server(directory / "ours", directory / "log")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def expected():
    """The official model's greedy continuation."""
    tokenizer, model = AutoTokenizer.from_pretrained(TRAINED), GPT2LMHeadModel.from_pretrained(TRAINED)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": NEW_TOKENS, "temperature": 0}


def test_chat_completions_are_what_generate_gives(server, expected):
    answer = json.loads(server.post("/v1/chat/completions", {**CHAT, "stream": False}))
    assert answer["choices"][0]["message"]["content"] == expected != ""


def test_streamed_chunks_add_up_to_the_same_text(server, expected):
    lines = server.post("/v1/chat/completions", {**CHAT, "stream": True}).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == expected
    assert len(chunks) > 3


@pytest.mark.skipif(not COMPLETIONS, reason="this transformers serves chats only")
def test_completions_are_what_generate_gives(server, expected):
    body = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    assert json.loads(server.post("/v1/completions", body))["choices"][0]["text"] == expected


def test_transformers_chat_talks_to_it(server, expected):
    command = [sys.executable, "-c", "from transformers.cli.transformers import app; app()"]  # asks for no updates
    options = ["chat", server.model, server.url, f"max_new_tokens={NEW_TOKENS}", "do_sample=false"]
    chat = subprocess.run(
        [*command, *map(str, options)],
        input=f"{PROMPT}\nn\n!exit\n",
        env={**server.environment, "HF_HUB_OFFLINE": "0"},  # the client takes the server for the hub
        cwd=server.log.parent,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert " ".join(expected.split()) in " ".join(chat.stdout.split()), chat.stdout + chat.stderr


@pytest.mark.skipif(not COMPLETIONS, reason="this transformers cannot do it on a CPU, with the official model either")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_continuous_batching_gives_the_ids_of_generate(attention):
    """What --continuous-batching serves with: prompts of several lengths packed into one row, paged caches."""
    gpt2, scratch = random_pair(attn_implementation=attention)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (5, 11, 8)]
    expected = [greedy_ids(gpt2, torch.tensor([ids]), NEW_TOKENS)[0, len(ids) :].tolist() for ids in prompts]
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # not all of the memory
    answers = scratch.generate_batch(prompts, generation_config=settings, continuous_batching_config=small)
    assert [answer.generated_tokens for answer in answers.values()] == expected
