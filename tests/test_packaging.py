"""The wheel and the sdist, each installed into an environment of its own."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TRAINED = Path(__file__).parent / "fixtures" / "tiny-gpt2"

MAIN_JOB = """
import sys
from pathlib import Path
import hf_gpt_scratch
from hf_gpt_scratch.conversion import gpt2_to_scratch

package = Path(hf_gpt_scratch.__file__).parent
assert package.is_relative_to(sys.prefix), package
assert (package / "py.typed").is_file()
assert gpt2_to_scratch(sys.argv[1], sys.argv[2])["parity"]["passed"]
"""


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, ROOT)
    return {path.suffix: path for path in directory.iterdir()}


def test_wheel_holds_the_package_and_its_licence_only(built):
    names = zipfile.ZipFile(built[".whl"]).namelist()
    assert "hf_gpt_scratch/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith(("hf_gpt_scratch/", "hf_gpt_scratch-")) for name in names)


def test_sdist_holds_tests_scripts_and_examples(built):
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "tests/test_parity.py", "convert/gpt2_to_scratch.py"} <= names
    assert {"examples/quickstart.py", "tests/fixtures/tiny-gpt2/model.safetensors"} <= names


@pytest.mark.parametrize("kind", [".whl", ".gz"])
def test_it_installs_and_converts_in_a_clean_environment(built, kind, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    # The libraries are the ones installed here; a .pth file inside a path added by .pth is not read, so that an
    # editable installation of this package stays invisible.
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", built[kind])
    run(python, "-c", MAIN_JOB, TRAINED, tmp_path / "converted", cwd=tmp_path)
    run(environment / "bin" / "hf-gpt-scratch", "inspect", tmp_path / "converted", cwd=tmp_path)


def test_version_is_the_installed_one(built):
    assert f"-{version('hf-gpt-scratch')}-" in built[".whl"].name
