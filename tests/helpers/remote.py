"""Runs code in a process of its own that cannot import this package."""

import os

from forks import run_python

MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_gpt_scratch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""


def run_without_the_package(code, *arguments, cwd):
    """Runs `code` with `sys.argv[1:]` of `arguments`; its output is shown if it fails."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(cwd / "modules")}
    done = run_python("-c", MISSING + code, *arguments, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
