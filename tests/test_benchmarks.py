"""The benchmarks run at tiny sizes and report what they should; nothing here depends on how long anything takes."""

import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import typer
from transformers import GPT2LMHeadModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# What torch's exporter and compiler, torchao and CTranslate2 say of themselves and of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(name, output, **options):
    """The report of a quick run, and its exit status."""
    status = 0
    try:
        importlib.import_module(name).main(quick=True, output=output, **options)
    except SystemExit as stopped:
        status = stopped.code
    report = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
    table = (output / f"{name}.md").read_text(encoding="utf-8")
    assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert report["environment"]["packages"]["torch"] == torch.__version__
    assert report["environment"]["threads"] == torch.get_num_threads()
    for row in report["rows"]:
        assert row["times"], row
        assert f"| {row['name']} |" in table
        assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    return report, status


def rows(report):
    return {row["name"]: row for row in report["rows"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decode", {"ours, sdpa", "ours, static cache", "ours, no cache", "ours, bf16"}),
        ("prefill", {"ours, sdpa", "ours, eager attention", "ours, bf16"}),
        ("training", {"ours, sdpa", "ours, eager attention", "ours, bf16 autocast"}),
        ("load", {"ours", "ours, from our own files"}),
        ("save", {"ours", "ours, as GPT-2", "ours from GPT-2", "ours to GPT-2, unverified"}),
        ("scaling", {"ours, sdpa"}),
        ("profile_decode", {"a token", "all operators"}),
        ("memory_order", {"[out, in]", "[in, out]"}),
        ("import_time", {"Python"}),
    ],
)
def test_quick_runs_report_every_row(tmp_path, name, expected):
    report, status = run(name, tmp_path)
    assert status == 0
    assert expected <= rows(report).keys()
    references = [row for row in report["rows"] if row["reference"]]
    assert {row["group"] for row in references} == {row["group"] for row in report["rows"]}
    assert all(row["speed"] == 1 for row in references)


@pytest.mark.parametrize(("name", "equal"), [("decode", "equal ids"), ("prefill", "relative error")])
def test_another_model_fails_the_check(tmp_path, monkeypatch, name, equal):
    engines = importlib.import_module("engines")

    def damaged(checkpoint):
        engine = engines.OURS(checkpoint)
        with torch.no_grad():
            engine.model.model.trf_blocks[0].att.out_proj.weight.mul_(1.5)
        return engine

    monkeypatch.setitem(engines.ENGINES, "ours, sdpa", damaged)
    report, status = run(name, tmp_path, only="^ours, sdpa$")
    assert status == 3
    other = rows(report)
    assert other["ours, sdpa"]["figures"][equal] != other["transformers GPT-2, sdpa"]["figures"][equal]


def test_a_damaged_model_fails_the_check_of_the_loss(tmp_path, monkeypatch):
    training = importlib.import_module("training")

    def damaged(*arguments):
        step = training.OURS(*arguments)
        with torch.no_grad():
            step.model.model.trf_blocks[0].att.out_proj.weight.mul_(1.5)
        return step

    monkeypatch.setitem(training.ROWS, "ours, sdpa", damaged)
    assert run("training", tmp_path, only="^ours, sdpa$")[1] == 3


def test_compiled_rows_generate_the_same_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("engines").Transformers, "backend", "eager")
    report, status = run("decode", tmp_path, only="^ours, compiled$")
    assert status == 0
    assert rows(report)["ours, compiled"]["figures"]["equal ids"] in ("6 of 6", "4 of 4")


def test_a_missing_package_leaves_its_row_out_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    report, status = run("prefill", tmp_path, only="^CTranslate2$")
    assert status == 0
    assert "ctranslate2" in report["missing"]["CTranslate2"]
    assert "Not measured: CTranslate2 " in (tmp_path / "prefill.md").read_text(encoding="utf-8")


def test_the_random_checkpoint_generates_more_than_one_id():
    harness = importlib.import_module("harness")
    with harness.official_checkpoint("tiny") as directory:
        model = GPT2LMHeadModel.from_pretrained(directory)
    model.generation_config.eos_token_id = None
    ids = model.generate(harness.random_ids(1, 8, 512), max_new_tokens=20, pad_token_id=0)
    assert len(ids[0, 8:].unique()) > 5


def test_interleaved_takes_turns_and_keeps_the_first_round_apart():
    harness = importlib.import_module("harness")
    calls = []
    measured = harness.interleaved({name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}, 3)
    assert calls == list("ABABABAB")
    assert [len(row.times) for row in measured.values()] == [3, 3]
    assert [row.output for row in measured.values()] == [7, 8]


def test_speed_is_the_references_median_over_the_rows_own():
    harness = importlib.import_module("harness")
    report = harness.Report("name", "title", {})
    report.add("one", "reference", [2.0, 4.0, 6.0], reference=True)
    report.add("one", "other", [1.0, 2.0, 9.0])
    report.add("two", "other", [1.0], reference=True)
    assert [report.speed(row) for row in report.rows] == [1, 2, 1]
    assert report.rows[1].quartiles == (1.5, 5.5)


def test_children_are_other_processes():
    assert importlib.import_module("harness").in_child(os.getpid) != os.getpid()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be forgotten")
def test_cost_counts_the_peak_above_what_was_there():
    harness = importlib.import_module("harness")
    before = torch.ones(200 << 18)
    for megabytes in (400, 100):
        with harness.Cost() as cost:
            torch.ones(megabytes << 18)
        # The kernel counts in batches, and what the allocator kept from before may be used again.
        assert 0.5 * megabytes < cost.memory / 2**20 < megabytes + 50
    assert len(before) == 200 << 18


@pytest.mark.parametrize("cases", ["1x32", "32+64", "1x2+3;4x5+6", ""])
def test_cases_that_cannot_be_read_are_refused_with_the_rule(cases):
    with pytest.raises(typer.BadParameter, match=r"BATCHxPROMPT\+NEW"):
        importlib.import_module("decode").parsed(cases)


def test_every_benchmark_is_in_the_readme_and_in_all():
    """But convert.py, which has no table to fill: it measures disks, and reports to the terminal."""
    everything = importlib.import_module("all")
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"all", "engines", "harness", "convert"}
    assert set(everything.BENCHMARKS) == scripts
    readme = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for name in scripts:
        assert re.search(f"<!-- {name} -->.*<!-- end of {name} -->", readme, re.DOTALL), name
        assert f"python benchmarks/{name}.py" in readme, name


def test_tables_replace_what_was_between_their_marks(tmp_path):
    everything = importlib.import_module("all")
    (tmp_path / "decode.md").write_text("| new |", encoding="utf-8")
    readme = "a <!-- decode -->old<!-- end of decode --> b <!-- load -->kept<!-- end of load -->"
    filled = everything.with_tables(readme, tmp_path)
    assert "old" not in filled and "| new |" in filled and "kept" in filled
    assert everything.with_tables(filled, tmp_path) == filled
