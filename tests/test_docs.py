"""README and docs: every block of code runs, every command, file, link and anchor exists, every table is up to date."""

import ast
import importlib.util
import re
import shutil
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
import typer
import yaml
from packaging import version
from pages import PAGES, ROOT, RUN_ELSEWHERE, WrongPage, anchors, check_inline, check_link, inline_code, links
from pages import run_page as run

import hf_gpt_scratch
from hf_gpt_scratch import GPT_CONFIG_124M, GPTModel, GPTScratchForCausalLM, export, gpt2_tokenizer
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.cli.new_command import OLDEST

FIXTURES = Path(__file__).parent / "fixtures"
DOCS = ROOT / "docs"
# The pages say GPT_CONFIG_124M, and meet a small one: 163 million parameters take too long.
SMALL = {"context_length": 128, "emb_dim": 48, "n_layers": 2}


def module_of(file):
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(page):
    return page.read_text(encoding="utf-8")


def name_of(page):
    return str(page.relative_to(ROOT))


def small_config(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setitem(GPT_CONFIG_124M, name, value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What the pages' code finds in its working directory, by the names that the pages use."""
    there = tmp_path_factory.mktemp("files")
    # A directory of the hub's name goes before the hub: the small trained model of the fixtures.
    official = there / "openai-community" / "gpt2"
    shutil.copytree(FIXTURES / "tiny-gpt2", official, ignore=shutil.ignore_patterns("training.json"))
    shutil.copytree(FIXTURES / "tiny-tensorflow", there / "gpt2" / "124M")
    shutil.copy(DOCS / "my_gpt.py", there)
    shutil.copy(DOCS / "my_generate.py", there)
    shutil.copy(DOCS / "my_train.py", there)
    (there / "docs").mkdir()
    shutil.copy(DOCS / "my_gpt.py", there / "docs")  # as the README has it
    (there / "text.txt").write_text("I had always thought Jack Gisburn rather a cheap genius.\n" * 20)
    model = GPTScratchForCausalLM.from_pretrained(official)
    model.save_pretrained(there / "mine")
    cfg = {**GPT_CONFIG_124M, **model.config.to_dict()}
    own = module_of(DOCS / "my_gpt.py").GPTModel({name: cfg[name] for name in (*GPT_CONFIG_124M, "qkv_bias")})
    torch.save(own.state_dict(), there / "my_gpt.pth")
    book = GPTModel({**GPT_CONFIG_124M, **SMALL})
    torch.save(book.state_dict(), there / "model.pth")
    book.out_head = torch.nn.Linear(book.out_head.in_features, 2)
    torch.save(book.state_dict(), there / "review_classifier.pth")
    export(official, there / "out", format="nanogpt")
    gpt2_tokenizer()  # whose vocabulary is fetched now, if it must be
    return there


@pytest.fixture
def directory(files, tmp_path, monkeypatch):
    """A working directory with these files, without a network."""

    def refuse(*_):
        raise OSError("a page asks for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # which is not tried again and again
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    small_config(monkeypatch)
    verbosity = transformers.logging.get_verbosity()
    yield tmp_path
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page if page.name == "README.md" else pytest.param(page, marks=pytest.mark.long) for page in PAGES],
    ids=name_of,
)
def test_the_code_on_a_page_runs(page, directory):
    if page.name == "new_model.md" and version.parse(transformers.__version__) < version.parse(OLDEST):
        pytest.skip(f"what `new` writes needs transformers {OLDEST}")
    run(text_of(page), name_of(page))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("```python\nfrom hf_gpt_scratch import converts\n```", "page:2: ImportError"),
        ("\n```python\nx = 1\nassert x == 2\n```", "page:3: AssertionError"),
        ("```python\nfrom hf_gpt_scratch.weights.formats import read\n```", "from hf_gpt_scratch alone"),
        (
            "```python\nfrom transformers import AutoConfig\nAutoConfig.from_pretrained('me/mine')\n```",
            "page:2: OSError",
        ),
        ("```bash\nhf-gpt-scratch convert model.pth target\n```", "exit status 1, not 0"),
        ("```bash\nhf-gpt-scratch convert model.pth target --n-heads 12  # exit status 3\n```", "status 0, not 3"),
        ("```bash\nhf-gpt-scratch doctor --jason\n```", "No such option: --jason"),
        ("```bash\nhf-gpt-scratch conwert a b\n```", "exit status 2, not 0"),
        ("```bash\n.venv/bin/python examples/quickstarts.py\n```", "there is no examples/quickstarts.py"),
        ("```bash\npython examples/quickstart.py --pre 124M\n```", "has no option --pre"),
        ("```bash\npython -m pytest -m real\n```", "no marker real"),
        ("```bash\npython -m pytest tests/model/test_modeling.py -k saved_cod3\n```", "has saved_cod3 in its name"),
        ("```bash\ntrue && pip install -c requirements.lock '.[tests]'\n```", "no test knows the command 'true'"),
        ("```bash\npip install -c requirements.lock '.[tests]'\n```", "no extra tests"),
        ("```bash\npip install onxruntime\n```", "does not have onxruntime"),
        ("```bash\nhf-gpt-scratch explain W_key\n```\n```text\nW_kee\n```", "is not in the output"),
        ("```json\n{}\n```", "a block of json"),
        ("Thus:\n\n    x = 1\n", "indented"),
    ],
)
def test_wrong_code_is_noticed(wrong, told, directory):
    with pytest.raises(WrongPage, match=re.escape(told)):
        run(wrong, "page")


def test_output_may_be_left_out_and_boxed(directory):
    run("```bash\nhf-gpt-scratch explain W_key\n```\n```text\n│ ours … trf_blocks.{n}.att.W_key.weight │\n```", "page")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page):
    text = text_of(page)
    for code in inline_code(text):
        check_inline(code)
    for target, content in links(text):
        check_link(target, content, page)


@pytest.mark.parametrize(
    "wrong",
    [
        "`hf_gpt_scratch/layers.py`",
        "`hf_gpt_scratch/model/layers.py::Gelu`",
        "`python -m pytest tests/test_party.py`",
        "`hf-gpt-scratch export mine out --form gguf`",
        "`hf-gpt-scratch conwert`",
        "`.ci/runs`",
        "`make doc`",
        "[x](docs/nothing.md)",
        "[x](docs/weights.md#nothing)",
        "![x](docs/images/nothing.png)",
        "[`Gelu`](hf_gpt_scratch/model/layers.py)",
        "[`model/loss.py`](hf_gpt_scratch/model/layers.py)",
        "`model/layer.py`",
    ],
)
def test_a_name_of_nothing_is_noticed(wrong):
    with pytest.raises(WrongPage, match=r"(?i)\bno|nowhere"):
        for code in inline_code(wrong):
            check_inline(code)
        for target, content in links(wrong):
            check_link(target, content, ROOT / "README.md")


def test_the_readme_is_short():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


def test_the_navigation_has_every_page_once():
    """And `docs/hooks.py` makes those pages that are no files of docs/."""

    def pages(entries):
        for entry in entries:
            for value in entry.values() if isinstance(entry, dict) else [entry]:
                yield from pages(value) if isinstance(value, list) else [value]

    made = module_of(DOCS / "hooks.py").PAGES
    shown = list(pages(yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"]))
    assert sorted(shown) == sorted([*(page.name for page in DOCS.glob("*.md")), *made])
    assert all((ROOT / source).is_file() for source in made.values())


def test_links_are_those_of_the_site_where_the_site_has_the_page():
    rewritten = module_of(DOCS / "hooks.py").rewritten
    text = (
        "[a](docs/lab.md#compare) [b](benchmarks/README.md) [c](LICENSE) ![d](docs/images/compare.png) [e](#install) "
    )
    text += "[`f`](hf_gpt_scratch/errors.py)"
    shown = rewritten(text, "README.md", "index.md", None)
    assert shown == "[a](lab.md#compare) [b](benchmarks.md) c (`LICENSE`) ![d](images/compare.png) [e](#install) `f`"
    shown = rewritten("[a](../README.md) [b](lab.md) [c](../LICENSE)", "docs/book.md", "book.md", "https://host/repo/")
    assert shown == "[a](index.md) [b](lab.md) [c](https://host/repo/blob/main/LICENSE)"
    assert rewritten("```\n[c](LICENSE)\n```", "README.md", "index.md", None) == "```\n[c](LICENSE)\n```"


def test_the_api_page_has_every_public_name_and_command():
    text = text_of(DOCS / "api.md")
    shown = re.findall(r"^::: hf_gpt_scratch\.(?:weights\.model_card\.)?(\w+)$", text, re.M)
    assert sorted(shown) == sorted(set(hf_gpt_scratch.__all__) - {"__version__"})
    assert set(re.findall(r"^\| `hf-gpt-scratch ([\w-]+)", text, re.M)) == set(typer.main.get_command(app).commands)
    assert RUN_ELSEWHERE.keys() <= typer.main.get_command(app).commands.keys()


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_take_public_names_from_the_package(example):
    for node in ast.walk(ast.parse(text_of(example))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_gpt_scratch."):
            assert not {alias.name for alias in node.names} & set(hf_gpt_scratch.__all__)


def test_generated_tables_are_up_to_date():
    tables = module_of(DOCS / "make_tables.py")
    for page in tables.TABLES:
        assert tables.filled(page) == text_of(DOCS / page), f"run python docs/make_tables.py: {page} is out of date"


def test_pictures_are_small_and_shown():
    pictures = {path.name for path in (DOCS / "images").iterdir()}
    shown = {Path(target).name for page in PAGES for target, _ in links(text_of(page)) if target.endswith(".png")}
    assert pictures == shown == module_of(DOCS / "make_figures.py").PARTS.keys()
    assert all(path.stat().st_size <= 300_000 for path in (DOCS / "images").iterdir())


def test_anchors_are_those_of_github_and_mkdocs():
    assert list(anchors("# Your `model.pth`\n\n## What is *this*?\n\n## a – b\n")) == ["your-modelpth", "what-is-this"]
