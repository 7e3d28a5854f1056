# /// script
# dependencies = ["torch==2.13.0", "lm_eval==0.4.13", "transformers==5.24.0"]
# ///
"""lm-evaluation-harness: local tasks of every kind of request, with its `hf` model."""

import json
import tempfile
from pathlib import Path

from checkpoints import checkpoints, row
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

import hf_gpt_scratch  # noqa: F401  # for the Auto classes

TEXTS = ["the cat sat on the mat", "every effort moves you further", "and then it went to sleep", "a long way to go"]
TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["on the mat", "further", "sleep", "away"]
doc_to_target: "{{number}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "generated": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: " on"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path) -> None:
    lines = [json.dumps({"text": text, "number": number}) for number, text in enumerate(TEXTS)]
    (folder / "data.json").write_text("\n".join(lines))
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {folder}/data.json}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: train{task}")


def evaluated(directory: Path, tasks: Path) -> dict:
    """Metrics, and the answers to all requests."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    arguments = f"pretrained={directory},dtype=float32"
    found = simple_evaluate("hf", arguments, tasks=list(TASKS), task_manager=manager, batch_size=2, device="cpu")
    answers = {name: [sample["resps"] for sample in samples] for name, samples in found["samples"].items()}
    return {name: [numbers(found["results"][name]), numbers(answers[name])] for name in TASKS}


def numbers(value):
    """The same, with numbers rounded as they are read, and nothing that tells the run."""
    if isinstance(value, dict):
        return {key: numbers(one) for key, one in value.items() if not str(key).startswith(("alias", "sample"))}
    if isinstance(value, (list, tuple)):
        return [numbers(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        tasks.mkdir()
        write_tasks(tasks)
        expected, found = (evaluated(directory, tasks) for directory in checkpoints(Path(folder)))
        for name in TASKS:
            row(f"metrics and answers, {name}", bool(expected[name]) and found[name] == expected[name])


if __name__ == "__main__":
    main()
