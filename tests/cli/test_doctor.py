"""The doctor passes what is right, and names what is broken; nothing stops it."""

import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hf_gpt_scratch
from hf_gpt_scratch import FeedForward, GPTScratchForCausalLM
from hf_gpt_scratch.cli import doctor
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.cli.doctor import CHECKS, FAILED, NOT_RUN, PASSED
from hf_gpt_scratch.model import compat
from hf_gpt_scratch.model.modeling_gpt_scratch import AnyFeedForward, check_library
from hf_gpt_scratch.tokenizer import CACHED_FILES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def examined(directory, *names):
    results = [one for one in doctor.examine(directory, list(names) or None) if not isinstance(one, str)]
    return {one.check: one for one in results}


def in_a_process(*arguments, **environment):
    """The command as it is installed, from this checkout."""
    return subprocess.run(
        [sys.executable, ROOT / "hf_gpt_scratch_command.py", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the command says here; some of its environment is nobody's business."""
    home = str(tmp_path_factory.mktemp("home") / "somebody")
    return in_a_process("doctor", "--json", HF_TOKEN="hf_tell_nobody", HOME=home, NO_COLOR="1")


def test_all_is_well_here(told):
    results = {check["check"]: check for check in json.loads(told.stdout)["checks"]}
    assert list(results) == list(CHECKS)
    assert not {name: one["reason"] for name, one in results.items() if one["status"] == FAILED}
    # The vocabulary is where somebody has put it, and the oldest transformers has no continuous batching on a CPU.
    assert {name for name, one in results.items() if one["status"] == NOT_RUN} <= {
        "tokenizer",
        "generate_batch",
        "libraries",
    }


def libraries(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["rich>=99", 'nothing; extra == "test"'])
    return "rich .*>=99"


def torch_(monkeypatch, tmp_path):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        return right(a, b) * (1.01 if a.dtype == torch.float32 else 1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    return "error of"


def transformers_too_old(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", "5.3.9")
    return "5.3.9 is older than"


def transformers_twice(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", "5.7.77")
    return "5.7.77 is imported, but .* is installed"


def package(monkeypatch, tmp_path):
    monkeypatch.setattr(hf_gpt_scratch, "__version__", "9.9.9")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.8")
    return "9.9.9 is imported, but 9.9.8 is installed"


def tokenizer(monkeypatch, tmp_path):
    for name in CACHED_FILES:
        (tmp_path / name).write_text("damaged")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    return "is damaged"


def build(monkeypatch, tmp_path):
    monkeypatch.setitem(doctor.TINY, "layer_norm_epsilon", float("nan"))
    return "not finite"


def feed_forward(monkeypatch, factor):
    for layer in (FeedForward, AnyFeedForward):  # the book's too, so that the library check sees no difference
        right = layer.forward
        monkeypatch.setattr(layer, "forward", lambda self, *given, right=right: right(self, *given) * factor(self))


def convert(monkeypatch, tmp_path):
    feed_forward(monkeypatch, lambda module: 1.01)
    return "ParityError: the two models differ"


def receipt(monkeypatch, tmp_path):
    blind = {"target": {"files": {}}}
    monkeypatch.setattr("hf_gpt_scratch.weights.publish.verify_receipt", lambda directory: blind)
    return "was not detected"


def logits(monkeypatch, tmp_path):
    feed_forward(monkeypatch, lambda module: 1.0001)
    return "the logits differ by"


def ids(monkeypatch, wrong_if):
    monkeypatch.setattr(check_library, "passed", {"generate"})
    right = GPTScratchForCausalLM.generate

    def generate(self, inputs, attention_mask=None, **options):
        found = right(self, inputs, attention_mask=attention_mask, **options)
        found[:, -3] += 1 if wrong_if(attention_mask, options) else 0
        return found

    monkeypatch.setattr(GPTScratchForCausalLM, "generate", generate)


def generate(monkeypatch, tmp_path):
    ids(monkeypatch, lambda mask, options: options.get("use_cache", True))
    return "with a cache, the ids differ from the official model's"


def generate_no_cache(monkeypatch, tmp_path):
    ids(monkeypatch, lambda mask, options: not options.get("use_cache", True))
    return "without a cache, the ids differ from the official model's"


def generate_padded(monkeypatch, tmp_path):
    ids(monkeypatch, lambda mask, options: not mask.all())
    return "left-padded, the ids differ from the official model's"


def generate_batch(monkeypatch, tmp_path):
    right = GPTScratchForCausalLM.generate_batch

    def one_token(self, *given, **options):
        found = right(self, *given, **options)
        for answer in found.values():
            del answer.generated_tokens[1:]
        return found

    monkeypatch.setattr(GPTScratchForCausalLM, "generate_batch", one_token)
    return "in continuous batches, the ids differ from the official model's: position 1 has|of a tiny model"


def train(monkeypatch, tmp_path):
    feed_forward(monkeypatch, lambda module: 1.01 if module.training else 1.0)
    return "the loss is .*, the official model's"


def save(monkeypatch, tmp_path):
    right = GPTScratchForCausalLM.save_as_gpt2

    def wrong(self, directory, **options):
        right(self, directory, **options)
        file = Path(directory) / "model.safetensors"
        weights = load_file(file)
        save_file(
            {**weights, "transformer.h.1.ln_1.bias": weights["transformer.h.1.ln_1.bias"] + 1}, file, {"format": "pt"}
        )

    monkeypatch.setattr(GPTScratchForCausalLM, "save_as_gpt2", wrong)
    return r"saved as official, 1 of \d+ tensors changed: .*h.1.ln_1.bias"


def saved_code(monkeypatch, tmp_path):
    right = doctor.Patient.converted.func

    def wrong(self):
        with (right(self) / "modeling_gpt_scratch.py").open("a") as code:
            code.write("\nAnyFeedForward.forward = lambda self, x: x\n")
        return self.directory / "converted"

    cached = functools.cached_property(wrong)
    cached.__set_name__(doctor.Patient, "converted")
    monkeypatch.setattr(doctor.Patient, "converted", cached)
    # What was saved checks itself, too.
    return "by the code that was saved, the ids differ from the official model's|of a tiny model"


TWINS = {
    "libraries": [libraries],
    "torch": [torch_],
    "transformers": [transformers_too_old, transformers_twice],
    "hf_gpt_scratch": [package],
    "tokenizer": [tokenizer],
    "build": [build],
    "convert": [convert],
    "receipt": [receipt],
    "logits": [logits],
    "generate": [generate],
    "generate, no cache": [generate_no_cache],
    "generate, padded": [generate_padded],
    "generate_batch": [generate_batch],
    "train": [train],
    "save and load": [save],
    "saved code": [saved_code],
}


def test_every_check_has_a_twin():
    assert TWINS.keys() == CHECKS.keys()


@pytest.mark.parametrize(("check", "broken"), [(check, twin) for check, twins in TWINS.items() for twin in twins])
def test_what_is_broken_is_named(monkeypatch, tmp_path, check, broken):
    reason = broken(monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "CHECKS", {check: CHECKS[check]})
    monkeypatch.setattr(doctor, "examine_elsewhere", doctor.examine)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    # Before it some releases print what went wrong in continuous batching; the command itself reads no such line.
    [found] = json.loads(result.stdout[result.stdout.index("{\n") :])["checks"]
    if check == "generate_batch" and found["status"] == NOT_RUN:
        pytest.skip(found["reason"])
    assert (found["check"], found["status"], result.exit_code) == (check, FAILED, 1)
    assert re.search(reason, found["reason"])
    assert "1 of 1 checks failed" in result.stderr and check in result.stderr


def test_a_failure_stops_no_other_check(monkeypatch, tmp_path):
    def fails(patient):
        raise RuntimeError("a reason\n  of two lines " + str(Path.home() / "me") + " and more" * 100)

    monkeypatch.setattr(doctor, "CHECKS", {"first": fails, "second": lambda patient: "fine", "third": fails})
    monkeypatch.setattr(doctor, "examine_elsewhere", doctor.examine)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    lines = [line for line in result.stdout.splitlines() if re.match("passed|FAILED", line)]
    assert [line.split()[:2] for line in lines] == [["FAILED", "first"], ["passed", "second"], ["FAILED", "third"]]
    assert "RuntimeError: a reason of two lines ~/me and more" in lines[0] and len(lines[0]) < 450
    assert "Traceback" not in result.output


def test_an_untested_transformers_is_told_and_tried(monkeypatch, tmp_path):
    monkeypatch.setattr(transformers, "__version__", "5.999.0")
    monkeypatch.setattr(doctor, "versions", lambda names: {"transformers": "5.999.0"})
    found = examined(tmp_path, "transformers")["transformers"]
    assert found.status == PASSED and "5.999.0 is newer than" in found.reason


def test_no_vocabulary_is_no_failure(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    found = examined(tmp_path, "tokenizer")["tokenizer"]
    assert found.status == NOT_RUN and str(tmp_path) in found.reason and found.facts["tokenizer"]["cached"] is False
    assert not list(tmp_path.iterdir())


# Stands for a process that examines: it passes what it is told, and ends itself or sleeps at two of them.
DIES = """
import json, os, signal, sys, time
for name in sys.argv[2:]:
    print(json.dumps(name), flush=True)
    if name == "second":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "third":
        print("the last words", file=sys.stderr)
        sys.exit(7)
    if name == "fourth":
        time.sleep(600)
    passed = dict(check=name, status="passed", reason="", seconds=0.0, facts={}, traceback=None)
    print(json.dumps(passed), flush=True)
"""


def test_a_process_that_dies_or_hangs_costs_one_check(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CHECKS", dict.fromkeys(("first", "second", "third", "fourth", "fifth")))
    monkeypatch.setattr(doctor, "SECONDS", 6)
    found = doctor.examine_elsewhere(tmp_path, (sys.executable, "-c", DIES))
    reasons = {one.check: (one.status, one.reason) for one in found if not isinstance(one, str)}
    assert reasons == {
        "first": (PASSED, ""),
        "second": (FAILED, "its process was killed by SIGKILL:"),
        "third": (FAILED, "its process ended with status 7: the last words"),
        "fourth": (FAILED, "no answer in 6 seconds"),
        "fifth": (PASSED, ""),
    }


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_it_runs_where_a_library_does_not_import(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise ImportError('libsomething.so.1 is missing')")
    broken = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = in_a_process("doctor", **broken)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"^FAILED +{name} +ImportError: libsomething.so.1 is missing$", done.stdout, re.M), done.stdout
    assert re.search("^FAILED +hf_gpt_scratch +.*libsomething.so.1", done.stdout, re.M), done.stdout
    assert f"{len(CHECKS)} checks failed" in done.stdout and "Traceback" not in done.stdout + done.stderr
    # The other commands say why they cannot start, and who knows more.
    other = in_a_process("explain", "W_key", **broken)
    assert other.returncode == 1 and "libsomething.so.1 is missing" in other.stderr
    assert "hf-gpt-scratch doctor" in other.stderr and "Traceback" not in other.stderr
    assert in_a_process("--version", **broken).stdout == f"hf-gpt-scratch {hf_gpt_scratch.__version__}\n"


@pytest.mark.parametrize("name", ["typer", "rich"])
@pytest.mark.long
def test_it_runs_where_the_commands_own_library_is_missing(tmp_path, name):
    """Without typer no other command starts; without rich the doctor does not either, and does not refer to itself."""
    (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')")
    broken = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    other = in_a_process("explain", "W_key", **broken)
    assert other.returncode == 1 and f"no {name} here" in other.stderr and "hf-gpt-scratch doctor" in other.stderr
    done = in_a_process("doctor", "--json", **broken)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    if name == "rich":
        assert "no rich here" in done.stderr and "pip install" in done.stderr
        assert "hf-gpt-scratch doctor" not in done.stderr
        return
    failed = {
        check["check"]: check["reason"] for check in json.loads(done.stdout)["checks"] if check["status"] == FAILED
    }
    assert failed == {"hf_gpt_scratch": "ImportError: no typer here"}
    assert "usage: hf-gpt-scratch doctor" in in_a_process("doctor", "--nonsense", **broken).stderr


def test_the_command_says_it_all_in_json_and_no_secret(told):
    report = json.loads(told.stdout)
    assert told.returncode == (0 if report["passed"] else 1)
    assert report["passed"], report["checks"]
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert report["versions"]["hf_gpt_scratch"] == hf_gpt_scratch.__version__
    assert report["torch"]["threads"] >= 1 and report["torch"]["device"]
    assert report["transformers"]["version"] == transformers.__version__
    assert report["system"]["cores"] >= 1 and "cache" in report["tokenizer"]
    assert [check["check"] for check in report["checks"]] == list(CHECKS)
    assert "hf_tell_nobody" not in told.stdout and "somebody" not in told.stdout
    assert "checks passed" in told.stderr and "\x1b" not in told.stderr


def test_the_tested_range_is_the_declared_one():
    assert (doctor.OLDEST_TESTED, doctor.NEWEST_TESTED) == (compat.OLDEST_TESTED, compat.NEWEST_TESTED)
    declared = (ROOT / "pyproject.toml").read_text()
    assert f'"transformers[torch]>={doctor.OLDEST_TESTED.removesuffix(".0")},<6"' in declared
    assert f'"transformers=={doctor.NEWEST_TESTED}"' in declared  # the lock is the newest that was tested
