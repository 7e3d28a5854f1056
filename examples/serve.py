"""An OpenAI-compatible server for a model of ours: python examples/serve.py mine --port 8000

This is `transformers serve` with all its options. It looks up a model's class only among transformers' own, whatever
code lies beside the weights, so ours is added to them.
"""

import sys

import transformers
from transformers.cli.transformers import app

from hf_gpt_scratch import GPTScratchForCausalLM

if __name__ == "__main__":
    setattr(transformers, GPTScratchForCausalLM.__name__, GPTScratchForCausalLM)
    sys.argv[1:1] = ["serve"]
    app()
