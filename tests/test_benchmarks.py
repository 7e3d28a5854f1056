"""The benchmarks run at tiny sizes and report what they should; nothing here depends on how long anything takes."""

import importlib
import importlib.util
import json
import math
import mmap
import os
import re
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import typer
from transformers import GPT2LMHeadModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# What torch's exporter and compiler, torchao and CTranslate2 say of themselves and of each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


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
        ("scaling", {"ours, sdpa"}),
        ("profile_decode", {"a token", "all operators"}),
        ("few_rows", {"F.linear", "F.linear, [in, out]", "oneDNN", "oneDNN, packed"}),
        ("quality", {"ours, sdpa", "ours, bf16", "ours, int8"}),
        ("gpu", {"ours, bf16", "ours, bf16, static cache", "ours"}),
        ("import_time", {"Python"}),
    ],
)
@pytest.mark.long
def test_quick_runs_report_every_row(tmp_path, name, expected):
    # The processes of the other engines take some seconds each.
    only = {"only": "^ours(?!.*compiled)"} if name in ("decode", "prefill", "quality") else {}
    report, status = run(name, tmp_path, **only)
    assert status == 0
    assert expected <= rows(report).keys()
    references = [row for row in report["rows"] if row["reference"]]
    assert {row["group"] for row in references} == {row["group"] for row in report["rows"]}
    assert all(row["speed"] == 1 for row in references)


@pytest.mark.parametrize(("name", "output"), [("decode", "equal ids"), ("prefill", "relative error")])
def test_the_floor_has_a_time_and_no_output(tmp_path, name, output):
    report, status = run(name, tmp_path, only="^floor")
    assert status == 0
    [floor] = [row for row in rows(report).values() if row["name"].startswith("floor")]
    assert min(floor["times"]) > 0 and output not in floor["figures"]
    assert output in rows(report)[importlib.import_module("harness").REFERENCE]["figures"]


def damage_ours(monkeypatch):
    """The row `ours, sdpa` gets a model with one matrix too large."""
    engines = importlib.import_module("engines")

    def damaged(checkpoint):
        engine = engines.OURS(checkpoint)
        with torch.no_grad():
            engine.model.model.trf_blocks[0].att.out_proj.weight.mul_(1.5)
        return engine

    monkeypatch.setitem(engines.ENGINES, "ours, sdpa", damaged)


@pytest.mark.parametrize(("name", "equal"), [("decode", "equal ids"), ("prefill", "relative error")])
def test_another_model_fails_the_check(tmp_path, monkeypatch, name, equal):
    damage_ours(monkeypatch)
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
    (tmp_path / "ctranslate2.py").write_text("raise ImportError('no ctranslate2')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)  # which the converter's process inherits
    report, status = run("prefill", tmp_path, only="^CTranslate2, oneDNN$")
    assert status == 0
    assert report["missing"] == {"CTranslate2, oneDNN": "no ctranslate2"}
    assert "Not measured: CTranslate2, oneDNN " in (tmp_path / "prefill.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "package"),
    [("onnxruntime", "onnxscript"), ("CTranslate2, oneDNN", "ctranslate2"), ("llama.cpp", "xllamacpp")],
)
@pytest.mark.long
def test_other_engines_run_without_torch_in_processes_of_their_own_that_end(monkeypatch, name, package):
    if not importlib.util.find_spec(package):  # importing CTranslate2 would slow down torch here
        pytest.skip(f"no {package}")
    engines, harness = (importlib.import_module(name) for name in ("engines", "harness"))
    report, ids = harness.Report("name", "title", {}), harness.random_ids(2, 9, 512)
    with harness.official_checkpoint("tiny") as directory, engines.built(directory, f"^{name}$", report) as built:
        process = built[name].worker.process
        generated = {name: engine.generate(ids, 4) for name, engine in built.items()}
        if name != "llama.cpp":  # which gives none
            logits = built[name].prefill(ids).output
            torch.testing.assert_close(logits, built[harness.REFERENCE].prefill(ids).detach(), rtol=1e-4, atol=1e-4)
        if sys.platform == "linux":
            assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
    assert torch.equal(generated[name].output, generated[harness.REFERENCE])
    assert process.returncode == 0


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Starts an engine that is no more than its file."""
    harness = importlib.import_module("harness")
    monkeypatch.setattr(harness, "WORKERS", tmp_path / "workers.py")
    started = []

    def start(methods, **arguments):
        source = (BENCHMARKS / "workers.py").read_text(encoding="utf-8")
        engine = "class Engine:\n" + textwrap.indent(textwrap.dedent(methods), "    ")
        start, end = source.split("def main()")
        harness.WORKERS.write_text(f"{start}{engine}\n\ndef main(){end}", encoding="utf-8")
        started.append(harness.Worker("Engine", **arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_what_an_engine_prints_does_not_disturb_its_answers(worker):
    engine = worker(
        """
        def __init__(self, first):
            os.system("echo made")
            self.first = first
        def sum(self, second):
            print("called", flush=True)
            time.sleep(0.05)
            return self.first + second
    """,
        first=1,
    )
    call = engine.call("sum", second=2)
    assert call.output == 3 and call.seconds >= 0.05


def test_errors_of_an_engine_arrive_with_its_traceback(worker):
    with pytest.raises(ImportError, match="not on this CPU"):
        worker("def __init__(self):\n    raise ImportError('not on this CPU')")
    engine = worker("""
        def divide(self):
            return 1 / 0
        def die(self):
            os._exit(7)
    """)
    with pytest.raises(RuntimeError, match=r"in divide\n(.*\n)*ZeroDivisionError"):
        engine.call("divide")
    with pytest.raises(RuntimeError, match="die: the engine's process ended with status 7"):
        engine.call("die")


@pytest.mark.parametrize("threads", [1, 2])
def test_engines_have_as_many_threads_as_torch(tmp_path, monkeypatch, threads):
    engines, harness, workers = (importlib.import_module(name) for name in ("engines", "harness", "workers"))
    harness.use_threads(threads)
    started = {}
    monkeypatch.setattr(engines, "in_child", lambda *arguments: None)
    monkeypatch.setattr(engines, "Worker", lambda engine, **arguments: started.update(arguments))
    engines.ENGINES["CTranslate2, oneDNN"](tmp_path)
    given = Mock()
    given.get_supported_compute_types.return_value = {"float32"}
    monkeypatch.setitem(sys.modules, "ctranslate2", given)
    monkeypatch.setenv("CT2_USE_MKL", "1")
    workers.CTranslate2(**started)
    assert given.Generator.call_args.kwargs["intra_threads"] == threads
    assert os.environ["CT2_USE_MKL"] == "0"
    onnxruntime = pytest.importorskip("onnxruntime")
    session = Mock()
    session.return_value.get_inputs.return_value = [SimpleNamespace(name="past", shape=(2, 2, "B", 4, "S", 16))]
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    workers.OnnxRuntime(tmp_path, threads)
    assert session.call_args.args[1].intra_op_num_threads == threads


def test_time_that_a_function_tells_goes_before_the_clock():
    harness = importlib.import_module("harness")
    rows = {"told": lambda: harness.Timed(1e6, "output"), "clocked": lambda: "output"}
    told, clocked = harness.interleaved(rows, 2).values()
    assert told.times == [1e6, 1e6] and told.first == 1e6
    assert clocked.output == told.output == "output" and max(clocked.times) < 1e3


@pytest.mark.long
def test_a_compilation_after_the_first_call_fails_the_check(tmp_path, monkeypatch):
    engines = importlib.import_module("engines")

    class Restless(engines.Transformers):
        backend = "eager"

        def generate(self, ids, new_tokens):
            torch._dynamo.reset()
            return super().generate(ids, new_tokens)

    row = "ours, compiled"
    monkeypatch.setitem(
        engines.ENGINES, row, lambda checkpoint: Restless(engines.GPTScratchForCausalLM, checkpoint, **engines.COMPILED)
    )
    report, status = run("decode", tmp_path, only=f"^{row}$")
    assert status == 3
    assert rows(report)[row]["figures"]["recompilations"] > 0


# The text that the fixture's model has learned: Edith Wharton, The Verdict (1908).
VERDICT = """\
I HAD always thought Jack Gisburn rather a cheap genius--though a good fellow enough--so it was no great surprise to me
to hear that, in the height of his glory, he had dropped his painting, married a rich widow, and established himself in
a villa on the Riviera. (Though I rather thought it would have been Rome or Florence.)

"The height of his glory"--that was what the women called it. I can hear Mrs. Gideon Thwing--his last Chicago sitter--
deploring his unaccountable abdication.
""".replace("\n", " ")


def test_quality_of_a_given_checkpoint_and_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(VERDICT, encoding="utf-8")
    report, status = run(
        "quality",
        tmp_path,
        checkpoint=BENCHMARKS.parent / "tests/fixtures/tiny-gpt2",
        text=text,
        only="^ours, (sdpa|bf16)$",
    )
    assert status == 0
    figures = {name: row["figures"] for name, row in rows(report).items()}
    exact, narrow = figures["ours, sdpa"], figures["ours, bf16"]
    assert exact["against fp32"] in ("+0.000%", "-0.000%") and exact["same likeliest token"] == "100.00%"
    assert abs(exact["KL, nats"]) < 1e-10 < 1e-7 < narrow["KL, nats"] < 1e-2
    assert float(exact["perplexity"]) < 200  # trained: random weights have the vocabulary's size, 1000


def test_quality_sums_what_its_names_say():
    quality = importlib.import_module("quality").Quality()
    reference, row = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    quality.add(reference, row, torch.tensor([0]))
    assert quality.perplexity == pytest.approx(4)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert quality.divergence == pytest.approx(divergence)


@pytest.mark.long
def test_a_damaged_model_fails_the_check_of_the_quality(tmp_path, monkeypatch):
    damage_ours(monkeypatch)
    assert run("quality", tmp_path, only="^ours, sdpa$")[1] == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("gpu").main(output=tmp_path)
    assert stopped.value.code == 2
    assert "NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_compiled_rows_of_the_gpu_run_on_a_cpu_too(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("engines").Transformers, "backend", "eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    report, status = run("gpu", tmp_path, only="^ours.*compiled", batches="1")
    assert status == 0
    found = rows(report)
    assert found["ours, bf16, compiled into CUDA graphs"]["figures"]["recompilations"] == 0
    assert found["ours, compiled"]["figures"]["recompilations"] == 0


@pytest.mark.long
def test_a_damaged_model_fails_the_checks_of_the_gpu(tmp_path, monkeypatch):
    gpu = importlib.import_module("gpu")

    def damaged(make):
        def made(*arguments, **options):
            row = make(*arguments, **options)
            with torch.no_grad():
                row.model.model.trf_blocks[0].att.out_proj.weight.mul_(1.5)
            return row

        return made

    monkeypatch.setitem(gpu.TRAIN, "ours", damaged(gpu.TRAIN["ours"]))
    assert run("gpu", tmp_path, only="^ours$")[1] == 3
    monkeypatch.undo()
    monkeypatch.syspath_prepend(BENCHMARKS)
    for table in (gpu.DECODE, gpu.PREFILL):
        with monkeypatch.context() as patch:
            patch.setitem(table, "ours, bf16", damaged(table["ours, bf16"]))
            assert run("gpu", tmp_path, only="^ours, bf16$", batches="1")[1] == 3


def test_the_flops_and_bytes_of_a_token_are_those_computed_by_hand():
    gpu, harness = (importlib.import_module(name) for name in ("gpu", "harness"))
    config, parameters = harness.gpt2_config("124M"), 124_439_808
    # 124,439,808 less 1024 × 768 positions is 123,653,376; six times that, and 12 × 12 × 768 × 1024.
    assert gpu.flops_a_token(config, parameters, 1024) == 741_920_256 + 113_246_208
    # nanoGPT's 178,000 tokens a second on an A100 are an MFU of 48.8 %.
    assert 178e3 * gpu.flops_a_token(config, parameters, 1024) / gpu.datasheet(
        "NVIDIA A100-SXM4-80GB"
    ) == pytest.approx(0.488, abs=5e-4)
    # Two bytes for each weight, and for 256 tokens × 12 layers × (768 keys + 768 values) of each sequence.
    assert gpu.bytes_a_token(config, parameters, 8, 256) == 248_879_616 + 8 * 9_437_184


@pytest.mark.parametrize(
    ("gpu", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA B200", 2250),
    ],
)
def test_the_peak_is_that_of_the_gpu_named(gpu, tflops):
    assert importlib.import_module("gpu").datasheet(gpu) == tflops * 1e12


def test_a_gpu_that_is_not_listed_has_no_peak():
    assert importlib.import_module("gpu").datasheet("Voodoo 2") is None


@pytest.mark.parametrize("model_class", ["GPT2LMHeadModel", "GPTScratchForCausalLM"])
def test_dropout_is_set_in_both_models(model_class):
    training, harness = (importlib.import_module(name) for name in ("training", "harness"))
    with harness.official_checkpoint("tiny") as directory:
        step = training.Step(getattr(training, model_class), directory, 1, 8, 0.0)
    ids = step.ids
    torch.testing.assert_close(step.model.train()(ids).logits, step.model.eval()(ids).logits)
    with harness.official_checkpoint("tiny") as directory:
        step = training.Step(getattr(training, model_class), directory, 1, 8, None)
    assert not torch.allclose(step.model.train()(ids).logits, step.model.eval()(ids).logits)


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
    for megabytes in (400, 100):
        # Not a tensor: the allocator may have as much left over from the tests before.
        with harness.Cost() as cost, mmap.mmap(-1, megabytes << 20) as memory:
            for page in range(0, len(memory), 4096):
                memory[page] = 1
        assert 0.9 * megabytes < cost.memory / 2**20 < megabytes + 50


@pytest.mark.parametrize("cases", ["1x32", "32+64", "1x2+3;4x5+6", ""])
def test_cases_that_cannot_be_read_are_refused_with_the_rule(cases):
    with pytest.raises(typer.BadParameter, match=r"BATCHxPROMPT\+NEW"):
        importlib.import_module("decode").parsed(cases)


@pytest.mark.parametrize(("ends", "status"), [([0, 2], 0), ([3, 0], 3), ([3, 1], 1)])
def test_all_runs_on_after_a_failure_and_tells_it_at_the_end(tmp_path, monkeypatch, capsys, ends, status):
    everything = importlib.import_module("all")
    commands, left = [], list(ends)

    def script(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, left.pop(0))

    monkeypatch.setattr(everything.subprocess, "run", script)
    with pytest.raises(SystemExit) as stopped:
        everything.main(only="decode,gpu", rounds=4, output=tmp_path, quick=True)
    assert stopped.value.code == status
    assert [Path(command[1]).stem for command in commands] == ["decode", "gpu"]
    assert all(command[command.index("--rounds") + 1] == "4" for command in commands)
    told = capsys.readouterr().out.rpartition("===")[2]
    phrases = {0: "done", 1: "BROKE with status 1", 2: "cannot run here", 3: "A CHECK FAILED"}
    for name, end in zip(["decode", "gpu"], ends, strict=True):
        assert re.search(f"{name}: 0.0 minutes, .*{phrases[end]}", told)


def test_all_refuses_a_benchmark_that_it_does_not_have():
    with pytest.raises(typer.BadParameter, match="decoding: choose from decode, prefill"):
        importlib.import_module("all").main(only="decoding", quick=True)


def test_every_benchmark_is_in_the_readme_and_in_all():
    """But convert.py, which has no table to fill: it measures disks, and reports to the terminal."""
    everything = importlib.import_module("all")
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")} - {"all", "engines", "harness", "workers", "convert"}
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
