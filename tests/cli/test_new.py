"""`new`: what it writes is whole, stands alone, and is a Transformers model."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from forks import run_python
from modes import ROWS
from packaging import version
from pairs import VOCAB, random_ids
from typer.testing import CliRunner

from hf_gpt_scratch.cli import new_command
from hf_gpt_scratch.cli.app import app

needs_newest = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse(new_command.OLDEST),
    reason="what it writes needs a newer one",
)


def run(*words):
    result = CliRunner().invoke(app, ["new", *map(str, words)])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    place = tmp_path_factory.mktemp("new") / "thing"
    status, said = run("small_thing", "--directory", place)
    assert status == 0 and "modeling_small_thing.py" in said
    return place


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("My-Model", "take one such as my_model"),
        ("a__b", "take one such as my_model"),
        ("../up", "take one such as my_model"),
        ("class", "it is a word of Python's own"),
        ("None", "take one such as none_model"),
        ("x" * 41, "take one such as my_model"),
        ("gpt2", "there is a model type of this name"),
        ("gpt_scratch", "there is a model type of this name"),
        ("torch", "already finds another module"),
        ("json", "already finds another module"),
        ("tests", "already finds another module"),
    ],
)
def test_a_name_that_is_taken_or_no_name_is_refused_and_nothing_written(tmp_path, name, told):
    status, said = run(name, "--directory", tmp_path / "place")
    assert status == 1 and told in said
    assert not list(tmp_path.iterdir())


def test_a_directory_that_exists_is_left_alone_and_the_remedy_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small_thing").mkdir()
    status, said = run("small_thing")
    assert status == 1 and "choose another one with --directory" in said
    assert not list((tmp_path / "small_thing").iterdir())
    assert run("small_thing", "--directory", "elsewhere")[0] == 0


def test_nothing_is_half_written(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    status, said = run("small_thing", "--directory", tmp_path / "place")
    assert status == 1 and "No space left" in said
    assert not list(tmp_path.iterdir())


def test_the_package_has_at_most_200_lines_and_one_name(project):
    files = [path for path in project.rglob("*") if path.is_file()]
    assert len(files) == 7
    package = [path.read_text() for path in (project / "small_thing").glob("*.py")]
    assert sum(len(text.splitlines()) for text in package) <= 200
    for path in files:
        assert not re.search(r"my_?model", f"{path.name} {path.read_text()}", re.I), path


def test_the_package_stands_alone(project):
    imported = set()
    for file in (project / "small_thing").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in names}
    assert imported == {"torch", "transformers", "huggingface_hub"}


@needs_newest
@pytest.mark.slow
@pytest.mark.long
def test_its_own_tests_pass(project):
    """transformers' tests of a language model are among them where a clone of it is in PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # of this suite
    environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout)


@needs_newest
@pytest.mark.slow
def test_a_saved_model_loads_where_the_package_is_not_installed(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    ids = random_ids(2, 6)
    torch.save(model(ids).logits, tmp_path / "logits.pt")
    script = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
saved, ids, logits = sys.argv[1], torch.tensor(eval(sys.argv[2])), torch.load(sys.argv[3])
loaded = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
assert "small_thing" not in sys.modules and torch.equal(loaded(ids).logits, logits)
loaded.save_pretrained(saved + "-again")
again = AutoModelForCausalLM.from_pretrained(saved + "-again", trust_remote_code=True)
assert torch.equal(again(ids).logits, logits)
"""
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = ["-c", script, tmp_path / "saved", ids.tolist(), tmp_path / "logits.pt"]
    done = run_python(*command, env={**os.environ, **modules})
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_linter_of_transformers_models_has_nothing_to_say(project):
    pytest.importorskip("mlinter")
    command = [sys.executable, "-m", "mlinter", "--no-progress", "--no-cache"]
    done = subprocess.run([*command, project / "small_thing"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    file = project / "small_thing" / "modeling_small_thing.py"
    whole = file.read_text()
    file.write_text(whole.replace("@auto_docstring\n", ""))
    try:
        assert subprocess.run([*command, project / "small_thing"], capture_output=True).returncode != 0
    finally:
        file.write_text(whole)


@pytest.fixture(scope="module")
def model(project):
    sys.path.insert(0, str(project))
    try:
        import small_thing
    finally:
        sys.path.remove(str(project))
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5
    )
    torch.manual_seed(0)
    return small_thing.SmallThingForCausalLM(
        small_thing.SmallThingConfig(vocab_size=VOCAB, pad_token_id=0, eos_token_id=VOCAB - 1, **sizes)
    ).eval()


@needs_newest
@pytest.mark.parametrize("heads", [0, 5, -4])
def test_its_config_refuses_heads_that_do_not_fit(model, heads):
    with pytest.raises(ValueError, match=rf"hidden_size=32 must be a multiple of .*heads={heads}, at least 1"):
        type(model.config)(hidden_size=32, num_attention_heads=heads)


@needs_newest
@pytest.mark.parametrize("mode", [mode for mode in ROWS if "offloaded" not in mode])  # to where, without a GPU
def test_every_mode_of_generate_gives_what_it_gives_without_a_cache(model, mode):
    ids = random_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"max_new_tokens": 12, "attention_mask": mask, **ROWS[mode]}
    found = []
    for more in ({}, {"use_cache": False, "cache_implementation": None, "prefill_chunk_size": None}):
        torch.manual_seed(3)
        found.append(model.generate(ids, **{**given, **more}).tolist())
    assert found[0] == found[1]
    assert found[0] != [[0] * len(row) for row in found[0]]


@needs_newest
def test_its_twin_that_forgets_where_a_text_begins_gives_another_one(model, monkeypatch):
    ids, pad = random_ids(2, 6), torch.zeros(2, 2, dtype=torch.long)
    given = dict(attention_mask=torch.cat((pad, torch.ones_like(ids)), dim=1), max_new_tokens=8)
    padded = torch.cat((pad, ids), dim=1)
    alone = model.generate(ids, max_new_tokens=8).tolist()
    assert model.generate(padded, **given)[:, 2:].tolist() == alone
    real = model.model.forward
    forgets = lambda ids, mask, position_ids, *args, **kwargs: real(ids, mask, None, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(model.model, "forward", forgets)
    assert model.generate(padded, **given)[:, 2:].tolist() != alone
