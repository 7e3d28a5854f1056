"""What is supported: each row of the table in docs/support.md, and the tests that show it.

    RECORDS=outputs/support .ci/run                          # on each version: pytest --support-table FILE
    python tests/helpers/support.py outputs/support/*.json           # writes the table
    python tests/helpers/support.py --check outputs/support/*.json   # or compares it

A row is supported by a version if all its tests passed there. On the oldest, .ci/run leaves out tests of no row.
"""

import fnmatch
import json
import re
import sys
from pathlib import Path

from modes import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
BEGIN, END = "<!-- support table: python tests/helpers/support.py -->\n", "<!-- end of support table -->"

# Section, row: patterns of test names, as `*` and `?` of the shell.
TABLE = {
    "Models": {
        "language model, official checkpoints in and out": ["test_modeling.py::*", "test_parity.py::test_logits*"],
        "double heads": ["test_heads.py::*[[]double[]]"],
        "sequence classification": ["test_heads.py::*[[]sequence*"],
        "token classification": ["test_heads.py::*[[]token[]]"],
        "question answering": ["test_heads.py::*[[]question[]]"],
        "cross-attention": ["test_cross_attention.py::test_logits*", "test_cross_attention.py::test_padding*"],
        "`EncoderDecoderModel`": ["test_cross_attention.py::test_encoder_decoder_model*"],
        "`VisionEncoderDecoderModel`": ["test_cross_attention.py::test_vision*"],
        "`token_type_ids`": ["test_parity.py::test_token_types*"],
        "`resize_token_embeddings`, tied and untied": ["test_modeling.py::test_resized*"],
        "saved by older versions of ours": ["test_modeling.py::test_models_saved_by_older*"],
    },
    "`generate`: the official ids": {
        **{row: [f"test_generation.py::test_ids_are_the_officials[[]{row}-*"] for row in ROWS},
        "left-padded batches": ["test_parity.py::test_left_padded*", "test_generation.py::test_ids*greedy-*"],
        "assisted decoding, ours and the official in both roles": ["test_generation.py::test_assisted*"],
        "prompt lookup": ["test_generation.py::test_prompt_lookup"],
        "stop strings": ["test_generation.py::test_stop_strings"],
        "streamers": ["test_generation.py::test_streamer*", "test_examples.py::test_streaming*"],
        "`inputs_embeds`": ["test_generation.py::test_from_embeddings"],
        "continuing from a cache": ["test_generation.py::test_continuing*"],
        "cropping a cache": ["test_generation.py::test_a_cropped*"],
        "quantized cache": ["test_generation.py::test_quantized_cache*"],
        "`generate_batch`: continuous batching, paged attention": ["test_serve.py::test_continuous*"],
        "moved out of transformers 5 (diverse and constrained beams, contrastive, DoLa): the official message": [
            "test_generation.py::test_what_moved_out*"
        ],
    },
    "Attention and graphs": {
        "`eager`": ["test_parity.py::*eager*"],
        "`sdpa`": ["test_parity.py::*sdpa*"],
        "`flex_attention`": ["test_modeling.py::test_flex*"],
        "`flash_attention_2`": ["test_gpu.py::test_flash*"],
        "`torch.compile(fullgraph=True)`, prefill": ["test_compile.py::test_prefill*"],
        "static decoding without recompilation": ["test_compile.py::test_static*"],
        "`torch.export`": ["test_compile.py::test_exported*"],
        "ONNX, run by onnxruntime": ["test_onnx.py::*"],
    },
    "Training": {
        "Trainer: the official losses, accumulation, label smoothing": ["test_training.py::test_trainer*"],
        "a run resumed half-way": ["test_training.py::test_resumed*"],
        "gradient checkpointing, both modes": ["test_modeling.py::test_gradient_checkpointing*"],
        "`num_items_in_batch`, masked labels": ["test_training.py::test_loss*", "test_parity.py::test_loss*"],
        "bfloat16 autocast": ["test_training.py::test_bfloat16*"],
        "compiled training": ["test_compile.py::test_compiled_training*"],
        "PEFT LoRA: train, save, load, merge, export": ["test_peft.py::test_adapters*"],
        "PEFT with its defaults: adapters, prompts": ["test_peft.py::*default*"],
        "two processes: DDP": ["test_distributed.py::test_data_parallel*data_parallel[]]"],
        "two processes: accelerate": ["test_distributed.py::test_data_parallel*accelerated[]]"],
        "two processes: FSDP2": ["test_distributed.py::test_fully_sharded_training*"],
        "two processes: `DistributedConfig(fsdp_size=2)`": ["test_distributed.py::test_fully_sharded_loading*"],
        "two processes: `DistributedConfig(tp_size=2)`": ["test_distributed.py::TestTensorParallel::*"],
        "pipeline plan": ["test_distributed.py::test_stages*", "test_distributed.py::test_the_pipeline_plan*"],
    },
    "Every day": {
        **{
            f'`pipeline("{task}")`': [f"test_pipelines.py::test_pipeline[[]{task}[]]"]
            for task in ("text-generation", "text-classification", "token-classification", "feature-extraction")
        },
        '`device_map="auto"`, layers on disk': ["test_user_day.py::test_what_does_not_fit*"],
        '`dtype="auto"`': ["test_user_day.py::test_the_checkpoints_dtype*"],
        "deprecated arguments as in transformers": [
            "test_user_day.py::test_arguments*",
            "test_user_day.py::test_the_old*",
        ],
        "torchao int8": ["test_quantization.py::*torchao*"],
        "bitsandbytes": ["test_quantization.py::*bitsandbytes*"],
        "`push_to_hub` with a model card": ["test_push_to_hub.py::*"],
        "saved code without the package": ["test_*.py::test_saved_code*"],
        "`transformers serve` (examples/serve.py): chats": [
            "test_serve.py::test_chat*",
            "test_serve.py::test_streamed*",
        ],
        "`transformers serve` (examples/serve.py): completions": ["test_serve.py::test_completions*"],
        "`transformers chat`": ["test_serve.py::test_transformers_chat*"],
        "the examples": ["test_examples.py::*"],
    },
}


def collected(patterns, names):
    """The test names that any of the patterns matches; each must match some."""
    found = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ValueError(f"no test is called {pattern}; correct tests/helpers/support.py")
        found.update(matched)
    return found


def cell(outcomes):
    """One row of one version: `outcomes` of its tests."""
    if "failed" in outcomes:
        return "**no**"
    if "passed" not in outcomes:
        return "not run"
    return "yes"


def markdown(runs):
    """The table of several runs, each with the version of transformers and the outcome of each test."""
    versions = [run["transformers"] for run in runs]
    lines = [f"| | {' | '.join(versions)} |", "| --- |" + " --- |" * len(versions)]
    notes = {}
    for section, table in TABLE.items():
        lines.append(f"| **{section}** |" + " |" * len(versions))
        for row, patterns in table.items():
            cells = []
            for run in runs:
                reports = [run["tests"][name] for name in sorted(collected(patterns, run["tests"]))]
                text = cell({report["outcome"] for report in reports})
                for reason in sorted({r["reason"] for r in reports if r["outcome"] == "skipped"}):
                    text += f" [{notes.setdefault(reason, len(notes) + 1)}]"
                cells.append(text)
            lines.append(f"| {row} | {' | '.join(cells)} |")
    lines += [""] + [f"[{number}] {reason}.  " for reason, number in notes.items()]
    counts = [
        f"{run['transformers']}: {sum(t['outcome'] == 'passed' for t in run['tests'].values())} tests passed on "
        f"{run['date']}, torch {run['torch']}, Python {run['python']}"
        for run in runs
    ]
    return "\n".join([*lines, "", "; ".join(counts) + ".", ""])


def verdicts(table):
    """Row and cells of each line, without the numbers of the notes."""
    return [re.sub(r" \[\d+\]", "", line) for line in table.splitlines() if line.startswith("|")]


def main(arguments):
    check = "--check" in arguments
    runs = [json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments if name != "--check"]
    runs.sort(key=lambda run: run["order"])
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    shown, after = rest.split(END)
    if not check:
        PAGE.write_text(before + BEGIN + markdown(runs) + END + after, encoding="utf-8")
    elif wrong := sorted(set(verdicts(markdown(runs))) ^ set(verdicts(shown))):
        print("the table in docs/support.md is not what the tests said:", *wrong, sep="\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
