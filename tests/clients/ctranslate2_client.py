# /// script
# dependencies = ["torch==2.13.0", "ctranslate2==4.8.5", "transformers==5.24.0"]
# ///
"""CTranslate2: its converter with the official export, tokenizer included."""

import tempfile
from pathlib import Path

import ctranslate2
from checkpoints import PROMPTS, TRAINED, checkpoints, official_ids, row
from ctranslate2.converters import TransformersConverter
from transformers import AutoTokenizer

from hf_gpt_scratch import export

TEXTS = ["Every effort moves you", "The cat sat, didn't it?  Yes: 12 times!"]
NEW = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        official, ours = checkpoints(Path(folder))
        exported = Path(folder) / "exported"
        export(ours, exported, format="gpt2")
        tokenizer = AutoTokenizer.from_pretrained(exported)
        TransformersConverter(str(exported)).convert(f"{folder}/converted")
        generator = ctranslate2.Generator(f"{folder}/converted", device="cpu", compute_type="float32")
        prompts = [*PROMPTS[:3], *(AutoTokenizer.from_pretrained(TRAINED)(text)["input_ids"] for text in TEXTS)]
        given = [tokenizer.convert_ids_to_tokens(ids) for ids in [*prompts[:3], *tokenizer(TEXTS)["input_ids"]]]
        options = dict(
            max_length=NEW, sampling_topk=1, include_prompt_in_result=False, end_token=[], return_scores=True
        )
        found = [result.sequences_ids[0] for result in generator.generate_batch(given, **options)]
        expected = [ids[:NEW] for ids in official_ids(official, prompts)]
        row("ids after ids", found[:3] == expected[:3])
        row("ids after texts", found[3:] == expected[3:])


if __name__ == "__main__":
    main()
