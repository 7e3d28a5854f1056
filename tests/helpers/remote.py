"""Runs code in a fresh interpreter that cannot import this package."""

import os
import subprocess
import sys

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
    done = subprocess.run(
        [sys.executable, "-c", MISSING + code, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "HF_MODULES_CACHE": str(cwd / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
