"""What all tests need first, and the record of what ran for the support table in docs/support.md."""

import datetime
import json
import platform
import sys
from pathlib import Path

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


def pytest_runtest_logreport(report):
    name = report.nodeid.split("/")[-1]
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else None
        OUTCOMES[name] = {"outcome": report.outcome, "reason": reason}


def pytest_sessionfinish(session):
    if file := session.config.getoption("--support-table"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        version = transformers.__version__
        run = {"transformers": version, "order": list(Version(version).release), "torch": torch.__version__}
        run |= {"python": platform.python_version(), "date": datetime.date.today().isoformat(), "tests": OUTCOMES}
        Path(file).write_text(json.dumps(run, indent=1), encoding="utf-8")
