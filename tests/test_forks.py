"""A fork of the server finds and does what a new interpreter does."""

import os
import subprocess
import sys

import pytest
from forks import run_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="without forks each program has an interpreter of its own"),
]

FOUND = """
import json, os, sys, torch

ours = [name for name in sys.modules if name.startswith(("hf_gpt_scratch", "pytest"))]
state = [torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())]
names = [__name__, sys.modules["__main__"].__dict__ is globals(), globals().get("__file__")]
print(json.dumps([sys.argv, sys.path, os.getcwd(), sorted(os.environ.items()), names, state, ours, sys.stdin.read()]))
"""
ENDS = [
    "print('done')",
    "import sys; print('out'); sys.exit()",
    "import sys; print('err', file=sys.stderr); sys.exit(3)",
    "import sys; sys.exit('a reason')",
    "import os; os._exit(5)",
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "import atexit; atexit.register(print, 'at the end'); print('first')",
    "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('awaited'))).start()",
]


def new_interpreter(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("begin", ["-c", "file"])
def test_a_program_finds_what_it_would_in_a_new_interpreter(tmp_path, begin):
    (tmp_path / "program.py").write_text(FOUND)
    arguments = ["-c", FOUND] if begin == "-c" else [str(tmp_path / "program.py")]
    arguments += ["a b", "\udcff"]
    done = run_python(*arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "MINE": "é"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == new_interpreter(*arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path), MINE="é").stdout != ""


@pytest.mark.parametrize("code", ENDS)
def test_a_program_ends_as_in_a_new_interpreter(tmp_path, code):
    done, expected = run_python("-c", code, cwd=tmp_path), new_interpreter("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_an_error_has_its_traceback_and_the_next_program_runs():
    done = run_python("-c", "1 / 0")
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert run_python("-c", "print(1)").stdout == "1\n"


def test_no_two_programs_draw_the_same_numbers():
    code = "import random, numpy, torch; print(random.random(), numpy.random.random(), torch.rand(()).item())"
    one, other = (run_python("-c", code).stdout.split() for _ in range(2))
    assert len(one) == 3 and not set(one) & set(other)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads are not counted so")
def test_the_server_has_one_thread():
    assert run_python("-c", "import os; print(len(os.listdir(f'/proc/{os.getppid()}/task')))").stdout == "1\n"


def test_what_the_libraries_have_read_of_the_cache_of_modules_is_the_programs(tmp_path):
    code = "from transformers import dynamic_module_utils as modules; print(modules.HF_MODULES_CACHE)"
    done = run_python("-c", code, env={**os.environ, "HF_MODULES_CACHE": str(tmp_path)})
    assert done.stdout == f"{tmp_path}\n"
