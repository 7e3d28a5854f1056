"""The support table in docs/support.md names tests that exist, and says what they said."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from forks import run_python
from support import BEGIN, END, PAGE, TABLE, cell, collected, markdown

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def paths():
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-W", "ignore:Module already imported", "tests"]
    everything = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = run_python("-c", "import sys, pytest; pytest.main(sys.argv[1:])", *options, cwd=ROOT, env=everything)
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def names(paths):
    return [path.split("/")[-1] for path in paths]


def run_of(names, outcome="passed", reason=None):
    tests = {name: {"outcome": outcome, "reason": reason} for name in names}
    return {"transformers": "5.99.0", "torch": "2.99", "python": "3.99.0", "date": "2026-01-01", "tests": tests}


@pytest.mark.slow
def test_every_row_has_tests(names):
    for table in TABLE.values():
        for patterns in table.values():
            assert collected(patterns, names)


def test_the_page_has_these_rows():
    shown = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    rows = re.findall(r"^\| (?!\*\*|---|\|)(\S.*?) \|", shown, re.M)
    assert rows == [row for table in TABLE.values() for row in table]
    assert "**no**" not in shown


@pytest.mark.slow
def test_a_failure_and_a_skip_show(names):
    run = run_of(names)
    assert "**no**" not in markdown([run]) and "[1]" not in markdown([run])
    run["tests"][next(name for name in names if "test_prompt_lookup" in name)] = {"outcome": "failed", "reason": None}
    assert "| prompt lookup | **no** |" in markdown([run])
    assert "| prompt lookup | not run [1] |" in markdown([run_of(names, "skipped", "no GPU")])
    assert cell({"passed", "skipped"}) == "yes"


@pytest.mark.slow
def test_what_ci_leaves_out_on_the_oldest_is_in_no_row(paths, names):
    setting = re.search(r"^the_librarys_own=.*?\)$", (ROOT / ".ci" / "run").read_text(), re.M | re.S)[0]
    shell = subprocess.run(["bash", "-c", f"{setting}; echo $the_librarys_own"], capture_output=True, text=True)
    left_out = tuple(option.removeprefix("--ignore=") for option in shell.stdout.split())
    assert len(left_out) > 5 and all(any(path.startswith(place) for path in paths) for place in left_out)
    run = [path.split("/")[-1] for path in paths if not path.startswith(left_out)]
    for table in TABLE.values():
        for patterns in table.values():
            assert collected(patterns, run) == collected(patterns, names)


@pytest.mark.slow
def test_a_row_without_tests_is_refused(names):
    with pytest.raises(ValueError, match="test_nothing"):
        collected(["test_nothing*"], names)
