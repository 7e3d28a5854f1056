"""The wheel and the sdist, each installed into an environment of its own."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_gpt_scratch import __version__

ROOT = Path(__file__).parents[1]
TRAINED = Path(__file__).parent / "fixtures" / "tiny-gpt2"

MAIN_JOB = """
import sys
from importlib.metadata import version
from pathlib import Path
import hf_gpt_scratch
from hf_gpt_scratch.weights.convert import gpt2_to_scratch

package = Path(hf_gpt_scratch.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (package / "py.typed").is_file()
assert gpt2_to_scratch(sys.argv[1], sys.argv[2])["parity"]["passed"]
print(hf_gpt_scratch.__version__, version("hf-gpt-scratch"))
"""


def run(*command, **options):
    # PYTHONPATH would put a checkout before what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT)
    return {path.suffix: path for path in directory.iterdir()}


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_licence_only(built):
    names = zipfile.ZipFile(built[".whl"]).namelist()
    assert "hf_gpt_scratch/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    ours = ("hf_gpt_scratch/", "hf_gpt_scratch-", "hf_gpt_scratch_command.py")
    assert "hf_gpt_scratch_command.py" in names and all(name.startswith(ours) for name in names)


@pytest.mark.slow
def test_sdist_holds_tests_scripts_and_examples(built):
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "tests/model/test_parity.py", "convert/gpt2_to_scratch.py"} <= names
    assert {"requirements.lock", "examples/quickstart.py", "tests/fixtures/tiny-gpt2/model.safetensors"} <= names
    assert {
        "Makefile",
        "SECURITY.md",
        "CITATION.cff",
        ".pre-commit-config.yaml",
        ".github/workflows/tests.yml",
    } <= names


def contents(wheel):
    """But its record of them."""
    archive = zipfile.ZipFile(wheel)
    return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.mark.slow
def test_the_wheel_of_the_sdist_is_the_wheel_of_the_checkout(built, tmp_path):
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, ROOT)
    [wheel] = tmp_path.iterdir()
    assert contents(wheel) == contents(built[".whl"])


@pytest.mark.slow
@pytest.mark.long
def test_it_installs_and_converts_in_a_clean_environment(built, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # The libraries are the ones installed here; a .pth file inside a path added by .pth is not read, so that an
    # editable installation of this package stays invisible.
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", built[".whl"])
    versions = run(python, "-c", MAIN_JOB, TRAINED, tmp_path / "converted", cwd=tmp_path)
    assert versions.split() == [__version__, __version__]
    command = environment / "bin" / "hf-gpt-scratch"
    run(command, "inspect", tmp_path / "converted", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"hf-gpt-scratch {__version__}\n"


def test_the_lock_is_within_what_is_declared_and_has_all_of_it():
    """And every version of Python finds exactly one pin there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    pins = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line[0] != "#"]
    assert len(pins) > 80
    for requirement in map(Requirement, declared):
        name = canonicalize_name(requirement.name)
        if name == "hf-gpt-scratch":
            continue
        for python in ("3.11", "3.12", "3.13"):
            system = {"python_version": python, "python_full_version": f"{python}.1"}
            [pin] = [p for p in pins if p.name == name and (p.marker is None or p.marker.evaluate(system))]
            [pinned] = pin.specifier
            assert requirement.specifier.contains(pinned.version), f"{pin} is not {requirement}; run .ci/lock"
            # A local version such as 2.13.0+cpu would forbid every other build.
            assert pinned.operator == "==" and "+" not in pinned.version


def test_the_readmes_commands_take_the_lock():
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if "python3 -m venv" in line]
    assert len(commands) == 2 and all(" -c requirements.lock " in command for command in commands)
