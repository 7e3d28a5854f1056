# /// script
# dependencies = ["torch==2.13.0", "gradio==6.31.0", "transformers==5.24.0"]
# ///
"""gradio: a ChatInterface around the pipeline, asked by its own client."""

import tempfile
from pathlib import Path

import gradio as gr
from checkpoints import checkpoints, row
from gradio_client import Client
from transformers import pipeline

import hf_gpt_scratch  # noqa: F401  # for the Auto classes

OPTIONS = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
ASKED = ("Every effort", "The cat sat on the mat")


def answers(directory: Path) -> list[str]:
    pipe = pipeline("text-generation", model=str(directory), device="cpu")

    def reply(message, history):
        return pipe(message, **OPTIONS)[0]["generated_text"]

    with gr.ChatInterface(reply, api_name="chat") as page:
        page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        client = Client(page.local_url, verbose=False)
        return [client.predict(text, api_name="/chat") for text in ASKED]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected, found = (answers(directory) for directory in checkpoints(Path(folder)))
        row("ChatInterface, asked by gradio_client", all(map(str, expected)) and found == expected)


if __name__ == "__main__":
    main()
