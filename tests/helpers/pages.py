"""The pages of the documentation, and their code run, so that none of it is wrong without being noticed.

    ```python    the blocks of a page run in order, in one namespace and one directory
    ```bash      lines that begin with hf-gpt-scratch run too, in this process; `# exit status 3` on such a line says
                 how it ends. Of all other commands, what they name must exist: files, options, extras, markers
    ```text      the output of the block before it; … stands for anything

Inline code that is a command, a file of this repository or `file.py::name` is checked as well.
"""

import ast
import contextlib
import io
import re
import shlex
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import typer
import yaml
from markdown_it import MarkdownIt
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from hf_gpt_scratch.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
FOLDERS = ("hf_gpt_scratch", "tests", "examples", "benchmarks", "convert", "docs", ".ci")
ROOMS = ("model", "weights", "lab", "cli")  # folders of the package, which pages name without it

# Commands of ours that are only checked, as those of other programs are, and why.
RUN_ELSEWHERE = {"doctor": "takes ten seconds; tests/cli/test_doctor.py runs it"}
# Scripts that hand their options on to another program.
OTHERS_OPTIONS = {"examples/serve.py": "transformers serve"}


class WrongPage(AssertionError):
    """What a page says is not so; the message begins with page and line."""


@dataclass(frozen=True)
class Fence:
    """A code block, and the line where its code begins, from 1."""

    language: str
    code: str
    line: int


def parsed(text):
    return MarkdownIt("commonmark").enable("table").parse(text)


def fences(text):
    for token in parsed(text):
        if token.type == "fence":
            yield Fence(token.info.strip(), token.content, token.map[0] + 2)
        elif token.type == "code_block":
            raise WrongPage(
                f"line {token.map[0] + 1}: code that is indented, which no test runs; put it between fences"
            )


def inline_code(text):
    for token in parsed(text):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


# Running


def run_page(text, name):
    """Runs the blocks of a page in the working directory."""
    namespace, output = {"__name__": "__main__"}, None
    for fence in fences(text):
        try:
            if fence.language == "text":
                check_output(fence.code, output)
            elif fence.language == "bash":
                output = run_bash(fence.code)
            elif fence.language == "python":
                output = run_python(fence, name, namespace)
            elif fence.language == "yaml":
                yaml.safe_load(fence.code)
                output = run_bash("\n".join(re.findall(r"^ *- run: (.+)$", fence.code, re.M)))
            else:
                raise WrongPage(f"a block of {fence.language or 'no language'}, which no test runs")
        except Exception as error:
            raise WrongPage(f"{name}:{fence.line}: {type(error).__name__}: {error}") from error


def run_python(fence, name, namespace):
    for imported in re.findall(r"^\s*(?:from|import) (hf_gpt_scratch\.\S+)", fence.code, re.M):
        raise WrongPage(f"imports {imported}; pages import from hf_gpt_scratch alone")
    tree = ast.parse(fence.code, name)
    ast.increment_lineno(tree, fence.line - 1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(tree, name, "exec"), namespace)
    return said.getvalue()


def run_bash(code):
    said = ""
    for line in code.splitlines():
        for words in commands(line):
            if words[0] != "hf-gpt-scratch" or words[1] in RUN_ELSEWHERE:
                check_command(words)
                continue
            expected = int((re.findall(r"# exit status (\d+)", line) or [0])[0])
            result = CliRunner().invoke(app, words[1:])
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            if result.exit_code != expected:
                raise WrongPage(f"exit status {result.exit_code}, not {expected}, of {line!r}: {result.output}")
            said += result.output
    return said


def check_output(shown, output):
    """Each line of what is shown must be in the output, without regard to spaces and boxes around it."""
    if output is None:
        raise WrongPage("a block of text that follows no code")
    spaced = " ".join(re.sub("[│╭╮╰╯─]+", " ", output).split())
    for line in shown.splitlines():
        for part in re.sub("[│╭╮╰╯─]+", " ", line).split("…"):
            if " ".join(part.split()) not in spaced:
                raise WrongPage(f"{line!r} is not in the output: {output}")


# Checking


def commands(line):
    """The commands of a line of bash, as lists of words, without assignments before them."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
        if set(word) <= set("&;|"):
            if words:
                yield words
            words = []
        elif words or not re.match(r"\w+=", word):
            words.append(word)


def check_command(words):
    """Raises WrongPage unless what a command names exists."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "hf-gpt-scratch":
        check_ours(rest)
    elif program in ("python", "python3"):
        if rest[0] != "-m":
            check_script(rest)
        elif rest[1] == "pytest":
            check_pytest(rest[2:])
        elif rest[1] == "mkdocs":
            check_command(rest[1:])
        elif rest[1] not in ("venv", "vllm.entrypoints.openai.api_server"):
            raise WrongPage(f"python -m {rest[1]} is not known here")
    elif program == "pip":
        check_pip(rest)
    elif program == "torchrun":
        check_script(rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :])
    elif words[0].startswith((".ci/", "./")):
        existing(words[0])
    elif program == "mkdocs":
        existing("mkdocs.yml")
        check_pip(["install", ".[docs]"])
    elif program == "make":
        for target in rest:
            if not re.search(rf"^{target}:", existing("Makefile").read_text(encoding="utf-8"), re.M):
                raise WrongPage(f"the Makefile has no target {target}")
    elif words not in ([".", ".venv/bin/activate"],) and words[:2] not in (["transformers", "chat"], ["vllm", "serve"]):
        raise WrongPage(f"no test knows the command {' '.join(words)!r}")


def check_ours(words):
    command = typer.main.get_command(app)
    if words and words[0] in command.commands:
        try:  # parses the arguments, and runs nothing
            command.commands[words[0]].make_context(words[0], list(words[1:]))
        except Exception as error:
            raise WrongPage(f"hf-gpt-scratch {' '.join(words)}: {error}") from error
    elif words not in (["--version"], ["--help"]):
        raise WrongPage(f"hf-gpt-scratch {' '.join(words)}: no such command")


def check_script(words):
    script, options = words[0], [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    source = existing(script).read_text(encoding="utf-8")
    for option in options:
        parameter = option.removeprefix("--").replace("-", "_")
        known = f'"{option}"' in source or re.search(rf"^    {parameter}: \w+.* = ", source, re.M)
        if not known and script not in OTHERS_OPTIONS:
            raise WrongPage(f"{script} has no option {option}")


def check_pytest(words):
    markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    files = [existing(word) for word in words if word.startswith("tests/")]
    for flag, value in pairwise(words):
        if flag == "-m" and value not in markers:
            raise WrongPage(f"pytest has no marker {value}")
        if flag == "-k" and not any(re.search(rf"def test_\w*{value}", file.read_text("utf-8")) for file in files):
            raise WrongPage(f"no test of {files} has {value} in its name")


def check_pip(words):
    assert words[0] == "install"
    rest = iter(words[1:])
    for word in rest:
        if word == "-c":
            existing(next(rest))
        elif extras := re.fullmatch(r"\.(?:\[(.*)\])?", word):
            for extra in filter(None, (extras[1] or "").split(",")):
                if extra not in PROJECT["project"]["optional-dependencies"]:
                    raise WrongPage(f"pyproject.toml has no extra {extra}")
        elif not word.startswith("-"):
            name = canonicalize_name(Requirement(word).name)
            if name == PROJECT["project"]["name"]:
                continue
            if not re.search(rf"^{re.escape(name)}==", LOCK, re.M):
                raise WrongPage(f"requirements.lock does not have {name}")


def check_inline(code):
    """Raises WrongPage if this is a command or names a file, and something in it does not exist."""
    if re.match(r"(\.venv/bin/)?(python3?|pip|hf-gpt-scratch|torchrun|mkdocs|make) \S|\.ci/\w", code):
        for words in commands(code):
            if words[0] != "hf-gpt-scratch" or len(words) > 2:
                check_command(words)
            elif words[1] not in typer.main.get_command(app).commands:  # the name alone is enough
                raise WrongPage(f"there is no command {code}")
        return
    file, _, name = code.partition("::")
    if re.fullmatch(rf"({'|'.join(map(re.escape, (*FOLDERS, *ROOMS)))})/[\w./-]*", file):
        path = existing(f"hf_gpt_scratch/{file}" if file.partition("/")[0] in ROOMS else file)
        if name:
            check_definition(name, path)


def check_definition(name, path):
    """Raises WrongPage unless a file of Python defines the name."""
    defined = rf"^\s*(?:(?:class|def) {re.escape(name)}\b|{re.escape(name)}\s*[:=])"
    if not re.search(defined, path.read_text(encoding="utf-8"), re.M):
        raise WrongPage(f"{path.name} defines no {name}")


def existing(name):
    path = ROOT / name
    if not path.exists():
        raise WrongPage(f"there is no {name}")
    return path


# Links


def links(text):
    """Where the links and pictures of a page go to, and the code that a link consists of, if it does."""
    for token in parsed(text):
        children = token.children or []
        for child, inside in zip(children, [*children[1:], None], strict=False):
            if child.type == "link_open":
                yield child.attrs["href"], inside.content if inside.type == "code_inline" else ""
            elif child.type == "image":
                yield child.attrs["src"], ""


def anchors(text):
    """The headings' anchors on which GitHub and MkDocs agree."""
    tokens = parsed(text)
    titles = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "heading_open"]
    for title in titles:
        words = "".join(child.content for child in title.children if child.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", words.lower()).strip()
        if re.sub(r"[-\s]+", "-", slug) == slug.replace(" ", "-"):
            yield slug.replace(" ", "-")


def check_link(target, code, page):
    """Raises WrongPage unless a link within the repository leads somewhere, and to what it says if that is code."""
    if re.match(r"\w+:", target):
        return
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    if not path.is_relative_to(ROOT) or not path.exists():
        raise WrongPage(f"{page.name}: the link {target} leads nowhere")
    if anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
        raise WrongPage(f"{page.name}: {path.name} has no heading #{anchor}")
    if code and path.suffix == ".py":
        if "/" in code or code.endswith(".py"):
            if not str(path).endswith(f"/{code}"):
                raise WrongPage(f"{page.name}: the link of {code} leads nowhere near: {target}")
        else:
            check_definition(code, path)
