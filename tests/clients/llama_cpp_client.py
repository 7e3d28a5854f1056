# /// script
# dependencies = ["torch==2.13.0", "xllamacpp==2026.10.11549", "gguf==0.19.0", "transformers==5.24.0"]
# ///
"""llama.cpp: the GGUF export, asked with ids and, by the tokenizer inside it, with texts."""

import tempfile
from pathlib import Path

import xllamacpp
from checkpoints import CONTEXT, PROMPTS, TRAINED, checkpoints, official_ids, row
from transformers import AutoTokenizer

from hf_gpt_scratch import export

TEXTS = ["Every effort moves you", "The cat sat, didn't it?  Yes: 12 times!", "naïve café — ok"]
NEW = 20


class Server:
    """llama.cpp with a file, greedy and in float32 as the others."""

    def __init__(self, file: Path):
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = params.n_parallel * CONTEXT
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def texts(self, prompt) -> str:
        settings = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        return self.server.handle_completions({"prompt": prompt, **settings})["choices"][0]["text"]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    with tempfile.TemporaryDirectory() as folder:
        for tied in (True, False):
            kind = "tied" if tied else "untied"
            official, ours = checkpoints(Path(folder), tied)
            export(ours, f"{folder}/{kind}", format="gguf")
            server = Server(Path(folder) / kind / "model.gguf")
            prompts = PROMPTS[:3]
            expected = [tokenizer.decode(ids[:NEW]) for ids in official_ids(official, prompts)]
            row(f"texts after ids, {kind}", [server.texts(ids) for ids in prompts] == expected)
            prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
            expected = [tokenizer.decode(ids[:NEW]) for ids in official_ids(official, prompts)]
            row(f"texts after texts, {kind}", [server.texts(text) for text in TEXTS] == expected)


if __name__ == "__main__":
    main()
