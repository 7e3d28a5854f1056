"""Workflows, hooks, targets of make and the files about the project name only what exists, and agree."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from hf_gpt_scratch import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z]+):", MAKEFILE, re.M)
# What a job may do beyond reading the code, and nothing else may.
WRITES = {"docs deploy": {"pages": "write", "id-token": "write"}, "release publish": {"id-token": "write"}}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def commands(workflow):
    return [step["run"] for job in parsed(workflow)["jobs"].values() for step in job["steps"] if "run" in step]


def files_named(text):
    """Everything in a command that looks like a file of ours."""
    return re.findall(r"(?<![\w./$-])(?:\.ci/\w+|\w[\w/]*\.(?:py|lock|toml|md|cff))(?![\w/])", text)


def test_the_workflows_are_these():
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "nightly", "release", "tests"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_do_little_and_ends(path):
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is (path.stem != "release")
    assert True in workflow  # `on`, in YAML 1.1
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == WRITES.get(f"{path.stem} {name}")
        assert job["timeout-minutes"] <= 90
        uses = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v1)", action) for action in uses), uses
        assert all("${{" not in step.get("run", "").replace("${{ matrix.", "") for step in job["steps"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_names_only_what_exists(path):
    steps = "\n".join(commands(path))
    assert set(re.findall(r"\bmake (\w+)", steps)) <= set(TARGETS)
    assert set(re.findall(r"\b(hf-gpt-scratch)\b", steps)) <= set(PROJECT["project"]["scripts"])
    for name in files_named(steps):
        assert (ROOT / name).is_file(), name
    extras = set(re.findall(r'"\.\[(\w+)\]"', steps))
    if not (ROOT / "mkdocs.yml").is_file():
        extras -= {"docs"}
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    for setup in re.findall(r"cache-dependency-path: (\S+)", path.read_text(encoding="utf-8")):
        assert (ROOT / setup).is_file()


def test_the_tests_run_on_every_system_python_and_set_of_libraries():
    jobs = parsed(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    quick, everything = (jobs[name]["strategy"]["matrix"] for name in ("quick", "all"))
    assert quick["python"] == everything["python"] == pythons
    assert {system.partition("-")[0] for system in quick["system"]} == {"ubuntu", "macos", "windows"}
    libraries = {*everything["libraries"], *(row["libraries"] for row in everything["include"])}
    assert libraries == set(re.findall(r"^  (\w+)\)", read(".ci/constraints"), re.M))
    # The first is `make quick`, without make.
    expression = re.search(r"^QUICK = (.*)$", MAKEFILE, re.M)[1]
    assert any(expression in step.get("run", "") for step in jobs["quick"]["steps"])


def test_make_names_only_what_exists():
    assert set(TARGETS) == set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.M)[1].split())
    for name in (*files_named(MAKEFILE), *re.findall(r"\.ci/\w+", MAKEFILE)):
        assert (ROOT / name).is_file(), name
    for extra in re.findall(r"\.\[(\w+)\]", MAKEFILE):
        assert extra in PROJECT["project"]["optional-dependencies"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_lists_every_target_and_understands_it():
    def make(*arguments):
        return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert re.findall(r"^make (\w+)", make(), re.M) == TARGETS
    assert all(make("--dry-run", target) for target in TARGETS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_the_constraints_are_the_lock_the_oldest_and_none():
    def constraints(libraries):
        command = ["bash", ".ci/constraints", libraries]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    lock = read("requirements.lock").splitlines()
    oldest = re.search(r'"transformers\[torch\]>=([\d.]+)', read("pyproject.toml"))[1]
    assert constraints("locked") == lock
    assert constraints("oldest")[-1] == f"transformers=={oldest}"
    dropped = {line.partition("==")[0] for line in set(lock) - set(constraints("oldest"))}
    assert dropped == {"transformers", "tokenizers", "huggingface-hub"}
    assert constraints("newest") == []


def test_the_hooks_have_the_locked_ruff():
    hooks = {hook["repo"]: hook for hook in parsed(ROOT / ".pre-commit-config.yaml")["repos"]}
    revision = hooks["https://github.com/astral-sh/ruff-pre-commit"]["rev"]
    assert f"ruff=={revision.removeprefix('v')}" in PROJECT["project"]["optional-dependencies"]["dev"]
    assert f"ruff=={revision.removeprefix('v')}" in read("requirements.lock").splitlines()


def test_changelog_and_citation_have_the_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["project"]["license"]
    released = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", read("CHANGELOG.md"), re.M)
    assert released[0] == ("Unreleased", "")
    assert released[1] == (__version__, str(citation["date-released"]))
    sections = set(re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.M))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_a_bug_report_has_what_the_doctor_says():
    templates = ROOT / ".github" / "ISSUE_TEMPLATE"
    bug = parsed(templates / "bug_report.yml")
    fields = {field["id"]: field for field in bug["body"] if "id" in field}
    assert "hf-gpt-scratch doctor --json" in fields["doctor"]["attributes"]["label"]
    assert all(fields[name]["validations"]["required"] for name in ("doctor", "command", "expected", "actual"))
    assert parsed(templates / "feature_request.yml")["body"]
    assert parsed(templates / "config.yml") == {"blank_issues_enabled": False}
    assert "hf-gpt-scratch doctor --json" in read("SECURITY.md")


def test_dependabot_looks_at_packages_and_actions():
    updates = parsed(ROOT / ".github" / "dependabot.yml")["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}
