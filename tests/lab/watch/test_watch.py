"""The training lab names the mistake in scripts that have one, accuses none that has not, and changes no run."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from training_zoo import HEALTHY, SABOTAGES, SCRIPTS, changed, watched
from typer.testing import CliRunner

from hf_gpt_scratch import LabError, watch
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.lab.watch.record import Recorder
from hf_gpt_scratch.lab.watch.session import watch_script

pytestmark = pytest.mark.filterwarnings("ignore")  # what the scripts are warned of is theirs
SAMPLE = slice(None, None, 7)
SLOW_SCRIPTS = ("hf", "accelerate")


def ids(cases):
    return [f"{number}-{case.get('name', case.get('what'))}-{case['script']}" for number, case in enumerate(cases)]


def cases(all_cases):
    """All of them, marked slow but for a sample."""
    quick = {id(case) for case in all_cases[SAMPLE] if case["script"] not in SLOW_SCRIPTS}
    return [
        pytest.param(case, id=name, marks=() if id(case) in quick else pytest.mark.slow)
        for case, name in zip(all_cases, ids(all_cases), strict=True)
    ]


@pytest.fixture(autouse=True)
def own_random_numbers():
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    yield
    torch.set_rng_state(state)
    torch.set_default_dtype(dtype)
    torch.autograd.set_detect_anomaly(False)
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("case", cases(SABOTAGES))
def test_a_mistake_is_named(case, tmp_path):
    report = watched(changed(case["script"], case["changes"]), tmp_path)
    assert case["name"] in report.names
    finding = next(finding for finding in report.findings if finding.name == case["name"])
    assert finding.level == case.get("level", finding.level)
    if finding.level == "fault":
        assert finding.proof and finding.remedy
        assert report.exit_status in (1, 3)
    others = {fault.name for fault in report.faults} - {case["name"], *case.get("also", [])}
    assert not others


@pytest.mark.parametrize("case", cases(HEALTHY))
def test_a_healthy_script_is_not_accused(case, tmp_path):
    report = watched(changed(case["script"], case["changes"]), tmp_path)
    assert not report.faults and report.exit_status == 0
    assert len(report.steps) == 3
    assert not set(case.get("without", [])) & set(report.names)


def stopped(script, steps):
    """The script's text, which ends by itself after this many optimizer steps, before the next backward pass."""
    return f"""
import torch as _torch
_seen = []
class _End(BaseException): pass
_backward = _torch.Tensor.backward
def _count(*_): _seen.append(1)
from torch.optim.optimizer import register_optimizer_step_post_hook as _register
_handle = _register(_count)
def backward(self, *args, **kwargs):
    if len(_seen) >= {steps}:
        raise _End
    return _backward(self, *args, **kwargs)
_torch.Tensor.backward = backward
try:
    exec(compile({SCRIPTS[script]!r}, "train.py", "exec"))
except _End:
    pass
finally:
    _torch.Tensor.backward = _backward
    _handle.remove()
"""


@pytest.mark.parametrize(
    ("script", "name", "steps"), [("book", "model", 3), ("nano", "model", 3), ("hand", "net", 20), ("lightning", "", 3)]
)
def test_watching_changes_nothing(script, name, steps, tmp_path):
    """Not in the steps watched, nor, in the script without an evaluation, in those until its end."""
    alone: dict = {"__name__": "__main__"}
    exec(compile(stopped(script, steps), "alone.py", "exec"), alone)
    left = torch.get_rng_state()
    seen = []
    usual = Recorder.__exit__

    class Keeping(Recorder):
        def __exit__(self, *error):
            seen.append(torch.get_rng_state())
            seen.append({id(f.module): f.module for f in self.step.forwards or self.steps[-1].forwards})
            usual(self, *error)

    from hf_gpt_scratch.lab.watch import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "Recorder", Keeping)
        watched(SCRIPTS[script], tmp_path)
    assert torch.equal(seen[0], left)
    if name:
        mine = next(iter(seen[1].values()))
        for key, value in alone[name].state_dict().items():
            assert torch.equal(value, mine.state_dict()[key]), key
        for (key, one), other in zip(alone[name].named_parameters(), mine.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), key
            assert one.grad is None or torch.equal(one.grad, other.grad), key


def test_everything_is_put_back(tmp_path):
    def patched():
        return [
            torch.nn.Module.__call__,
            torch.nn.utils.clip_grad_norm_,
            torch.optim.Optimizer.zero_grad,
            torch.optim.Optimizer.__init__,
            torch.optim.lr_scheduler.LRScheduler.step,
            torch.load,
            torch.set_rng_state,
            sys.argv,
            sys.path,
            sys.modules["__main__"],
        ]

    before = [*patched(), list(sys.path)]
    watched(SCRIPTS["book"], tmp_path)
    assert [*patched(), list(sys.path)] == before
    watched("raise ValueError('mine')", tmp_path)
    assert [*patched(), list(sys.path)] == before
    assert not torch.overrides._is_torch_function_mode_enabled()


def test_a_block_of_a_notebook_is_left_after_the_steps():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = 0
    with watch(model, steps=2) as report:
        for _ in range(10):
            x = torch.randint(0, 20, (4, 9))
            loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    assert done == 2 and len(report.steps) == 2
    assert "not-shifted" in report.names
    assert report.exit_status == 3 and report.verdict.startswith("Mistakes found in 2 optimizer steps: not-shifted")
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["name"] == "not-shifted"


def test_a_block_without_backward_is_left_too():
    model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = 0
    with watch(steps=2) as report:
        for _ in range(10):
            x = torch.randint(0, 20, (4, 9))
            loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            for parameter, grad in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                parameter.grad = grad
            optimizer.step()
            done += 1
    assert done == 2 and len(report.steps) == 2 and not report.faults


def test_errors_in_a_block_pass_through_and_the_report_has_them():
    with pytest.raises(KeyError, match="mine"), watch() as report:
        raise KeyError("mine")
    assert report.error == "KeyError: 'mine'" and report.exit_status == 1


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_a_number_of_steps_that_is_none_is_refused(steps):
    with pytest.raises(LabError, match="at least 1 step"):
        watch(steps=steps)


def test_a_watch_within_a_watch_is_refused():
    with pytest.raises(LabError, match="already"), watch(), watch():
        pass
    with watch():
        pass


def test_the_page_has_every_name():
    root = Path(__file__).parents[3]
    page = (root / "docs" / "watch.md").read_text(encoding="utf-8")
    code = "".join(file.read_text(encoding="utf-8") for file in (root / "hf_gpt_scratch/lab/watch").glob("*.py"))
    table = re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)*)`", page[page.index("## Names") : page.index("## How good")])
    assert {case["name"] for case in SABOTAGES} <= set(table)
    told = re.findall(r'(?:\.add|Finding|told)\(\s*"([a-z0-9-]+)"', code)
    assert len(told) > 50 and set(told) <= set(table)
    assert all(f'"{name}"' in code for name in table)


def run(*arguments):
    return CliRunner().invoke(app, ["watch", *map(str, arguments)])


def test_the_command_says_what_it_found(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(changed("book", SABOTAGES[0]["changes"]), encoding="utf-8")
    result = run(script)
    assert result.exit_code == 3
    assert "Mistakes found in 3 optimizer steps: not-shifted." in result.output
    assert "where: train.py:" in result.output and "fix: " in result.output and "proof: " in result.output


def test_the_command_hands_the_arguments_on_and_the_json_is_json(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPTS["hand"] + "\n", encoding="utf-8")
    text = script.read_text(encoding="utf-8")
    script.write_text("import sys; print('started with', sys.argv[1:])\n" + text, encoding="utf-8")
    file = tmp_path / "figures.json"
    page = tmp_path / "report.html"
    result = run("--json", file, "--html", page, "--steps", 2, script, "--steps", "7", "--lr=3", "-x")
    assert result.exit_code == 0, result.output
    assert "started with ['--steps', '7', '--lr=3', '-x']" in result.output
    figures = json.loads(file.read_text(encoding="utf-8"))
    html = page.read_text(encoding="utf-8")
    assert figures["verdict"] in html and "<h2>Steps</h2>" in html and "decay-on-embeddings" in html
    assert len(figures["steps"]) == 2 and figures["verdict"] == "No known mistake in 2 optimizer steps."
    result = run("--json", "-", script)
    assert json.loads(result.stdout)["model"] == "Net"


def test_a_script_that_fails_shows_its_own_traceback(tmp_path, capsys):
    script = tmp_path / "train.py"
    script.write_text("def f():\n    raise ValueError('mine')\nf()\n", encoding="utf-8")
    report = watch_script(script)
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and 'train.py", line 2, in f' in told and "session.py" not in told
    assert report.exit_status == 1 and "ValueError: mine" in report.verdict


def test_a_script_that_does_not_train_or_is_not_there(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('hello')\n", encoding="utf-8")
    result = run(script)
    assert result.exit_code == 1 and "No optimizer step was seen" in result.output
    assert run(tmp_path / "nowhere.py").exit_code == 1
    assert run("--json", tmp_path / "no" / "where.json", script).exit_code == 1


@pytest.mark.slow
def test_a_script_that_never_ends_is_stopped(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import time\nwhile True:\n    time.sleep(0.01)\n", encoding="utf-8")
    report = watch_script(script, timeout=1)
    assert report.ended == "the time was over" and report.exit_status == 1


def test_a_module_is_run_as_python_m_runs_it(tmp_path, monkeypatch):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "train.py").write_text(SCRIPTS["hand"], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another test's
    result = run("-m", "mine.train")
    assert result.exit_code == 0, result.output
    assert not Path("__pycache__").exists()
