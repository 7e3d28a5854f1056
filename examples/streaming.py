"""Text as it is generated, token by token: python examples/streaming.py --model openai-community/gpt2

Without --model it uses the tests' small GPT-2, which was trained on one short story.
"""

import sys
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Annotated

import typer
from transformers import AutoTokenizer, TextIteratorStreamer, TextStreamer, set_seed

from hf_gpt_scratch import GPTScratchForCausalLM

SMALL = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-gpt2"


def main(
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "I had always thought",
    model: Annotated[str, typer.Option(help="Hub id or directory, official or ours.")] = str(SMALL),
    new_tokens: Annotated[int, typer.Option(help="How many tokens to generate.")] = 60,
) -> None:
    """Streams a greedy and a sampled continuation."""
    gpt = GPTScratchForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    options = dict(**inputs, max_new_tokens=new_tokens, pad_token_id=tokenizer.eos_token_id)

    print("--- TextStreamer: generate prints the text itself, with the prompt")
    gpt.generate(**options, do_sample=False, streamer=TextStreamer(tokenizer))

    print("--- TextIteratorStreamer: generate runs in a thread, and you get the pieces of text")
    sampling = dict(do_sample=True, top_k=25, temperature=0.8)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    set_seed(123)
    start = perf_counter()
    Thread(target=gpt.generate, kwargs=dict(**options, **sampling, streamer=streamer), daemon=True).start()
    pieces, times = [], []
    for piece in streamer:
        print(piece, end="", flush=True)
        pieces.append(piece)
        times.append(perf_counter() - start)

    set_seed(123)
    at_once = gpt.generate(**options, **sampling)[0, inputs.input_ids.shape[1] :]
    equal = "".join(pieces) == tokenizer.decode(at_once)
    words = next(time for piece, time in zip(pieces, times, strict=True) if piece)
    print(f"\n--- first words after {words:.2f} s of {times[-1]:.2f} s; equal to the text generated at once: {equal}")
    sys.exit(0 if equal else 3)


if __name__ == "__main__":
    typer.run(main)
