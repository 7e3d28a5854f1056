"""`import hf_gpt_scratch` in a fresh interpreter: python benchmarks/import_time.py

The reference imports the GPT-2 classes of transformers that have a counterpart in this package.
"""

import subprocess
import sys
from functools import partial

import harness
import typer
from harness import Output, Quick, Report, Rounds

GPT2 = "GPT2Config, GPT2DoubleHeadsModel, GPT2ForQuestionAnswering, GPT2ForSequenceClassification, \
GPT2ForTokenClassification, GPT2LMHeadModel, GPT2Model, GPT2Tokenizer"
OURS = "GPTScratchConfig, GPTScratchDoubleHeadsModel, GPTScratchForCausalLM, GPTScratchForQuestionAnswering, \
GPTScratchForSequenceClassification, GPTScratchForTokenClassification, GPTScratchModel"
ROWS = {
    "transformers GPT-2": f"from transformers import {GPT2}",
    "ours": f"from hf_gpt_scratch import {OURS}",
    "ours, the package alone": "import hf_gpt_scratch",
    "hf-gpt-scratch --help": "import sys; sys.argv[1:] = ['--help']; from hf_gpt_scratch_command import main; main()",
    "torch": "import torch",
    "Python": "",
}


def main(
    rounds: Rounds = 11,
    output: Output = harness.RESULTS,
    quick: Quick = False,
) -> None:
    """Seconds of a whole `python -c "import ..."`."""
    names = ["Python"] if quick else list(ROWS)
    report = Report("import_time", "Import", {"rounds": rounds}, unit="s")
    calls = {
        name: partial(subprocess.run, [sys.executable, "-c", ROWS[name]], check=True, stdout=subprocess.DEVNULL)
        for name in names
    }
    measured = harness.interleaved(calls, rounds)
    for name, row in measured.items():
        report.add("a process", name, row.times, name == names[0], **{"first call, s": row.first})
    report.write(output)


if __name__ == "__main__":
    typer.run(main)
