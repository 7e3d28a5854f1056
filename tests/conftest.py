"""What all tests need first, and the record of what ran for the support table in docs/support.md."""

import datetime
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before the libraries read it
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Models' own code is cached by the name of its folder, which all workers would write to.
    MODULES = tempfile.TemporaryDirectory()
    os.environ["HF_MODULES_CACHE"] = MODULES.name

import pytest
import torch
import transformers
from packaging.version import Version

from hf_gpt_scratch.weights.parity import warm_up

warm_up()
OUTCOMES = {}
# They need limits, signals and figures of processes that only POSIX has.
collect_ignore = (
    ["test_benchmarks.py", "weights/test_fuzz.py", "weights/test_publish.py"] if sys.platform == "win32" else []
)


def pytest_addoption(parser):
    parser.addoption(
        "--support-table", metavar="FILE", help="write each test's outcome here, for tests/helpers/support.py"
    )


def pytest_configure(config):
    """What takes long is run if it is asked for: by its file, or by a marker of one's own."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if everything and config.option.markexpr == "not real_size":  # as in pyproject.toml
        config.option.markexpr = "not real_size and not long"  # xdist hands it on to its processes


def pytest_runtest_logreport(report):
    name = report.nodeid.split("/")[-1]
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
        OUTCOMES[name] = {"outcome": report.outcome, "reason": reason}


def pytest_sessionfinish(session):
    file = session.config.getoption("--support-table")
    if file and "PYTEST_XDIST_WORKER" not in os.environ:  # whose reports the first process has
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        version = transformers.__version__
        run = {"transformers": version, "order": list(Version(version).release), "torch": torch.__version__}
        run |= {"python": platform.python_version(), "date": datetime.date.today().isoformat(), "tests": OUTCOMES}
        Path(file).write_text(json.dumps(run, indent=1), encoding="utf-8")
