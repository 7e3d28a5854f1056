"""The command, its tables and its page."""

import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import typer
from pairs import random_gpt2, random_ids, random_pair
from readers import RAW_MAP
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from hf_gpt_scratch import GPTModel
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.cli.compare_command import compare
from hf_gpt_scratch.cli.report import print_report
from hf_gpt_scratch.lab.compare import compare_models
from hf_gpt_scratch.lab.compare_page import HEADS_SHOWN, heat_map, html_report, number
from hf_gpt_scratch.lab.diagnose import diagnose
from hf_gpt_scratch.lab.page import logarithmic, picture, shade
from hf_gpt_scratch.lab.subject import copy_weights, subject

pytestmark = pytest.mark.slow

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
READERS = Path(__file__).parents[1] / "helpers" / "readers.py"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# A reader's file: the book's model, with one mistake.
MINE = """
from torch import nn
from hf_gpt_scratch import GPTModel

class MyGPT(GPTModel):
    pass

class MyWrongGPT(GPTModel):
    def __init__(self, cfg):
        super().__init__(cfg)
        for block in self.trf_blocks:
            block.ff.layers[1] = nn.GELU()
"""

MASKED = """
from hf_gpt_scratch import GPTModel

class MaskedGPT(GPTModel):
    def forward(self, in_idx, mask):
        return super().forward(in_idx)

def run(model, input_ids):
    return model(input_ids, None)
"""


def compared(sabotage=None, **options):
    reference = subject(random_gpt2(), name="official")
    config = reference.config
    model = GPTModel({**config.to_dict(), "qkv_bias": True}).eval()
    copy_weights(reference, subject(model, config))
    if sabotage:
        sabotage(model)
    candidate = subject(model, config, "my <b>model</b> [red]")
    comparison = compare_models(reference, candidate, random_ids(), **options)
    comparison.diagnosis = diagnose(comparison, reference, candidate)
    return comparison


def exact_gelu(model):
    for block in model.trf_blocks:
        block.ff.layers[1] = nn.GELU()


def broken_norm(model):
    with torch.no_grad():
        model.trf_blocks[1].norm1.scale[0] = float("nan")


@pytest.fixture(scope="module")
def different():
    return compared(exact_gelu, gradients=True, text_ids=random_ids(1, 60))


def terminal_text(comparison, width=150):
    console = Console(width=width, file=io.StringIO())
    print_report(comparison, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [120, 90, 60, 48])
def test_names_of_stages_are_never_cut(different, width):
    table = terminal_text(different, width).split("Error by stage")[1].split("Most probable")[0]
    shown = [stage.stage for stage in different.stages if f" {stage.stage} " in table]
    assert different.first_divergence.stage in shown and len(shown) > 4
    assert all(line.startswith("  " + stage) for stage in shown for line in table.splitlines() if f" {stage} " in line)
    assert "…" not in table and len(re.findall(r"\de[-+]\d\d", table)) >= len(shown) - 3


class Page(HTMLParser):
    """Whether all tags close, what the page fetches, and its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        assert tag not in ("script", "link", "iframe")

    def handle_startendtag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_terminal_names_the_mistake_and_the_first_stage(different):
    text = terminal_text(different)
    assert "Different: exact-gelu" in text
    assert re.search(r"trf_blocks\.0\.ff\.layers\.2\.input .*the first that differs", text)
    assert "GELU is the exact" in text
    assert 'nn.GELU(approximate="tanh")' in text
    for told in ("KL divergence", "top-1 agreement", "perplexity", "gradients", "float32", "Most probable tokens"):
        assert told in text
    assert "my <b>model</b> [red]" in text, "names are no markup"


def test_every_report_says_in_which_block_the_mistake_is():
    different = compared(lambda model: setattr(model.trf_blocks[1].ff.layers, "1", nn.GELU()))
    text = " ".join(terminal_text(different).split())
    assert "Different: exact-gelu in block 1 " in text
    assert "not the tanh approximation, in block 1 only" in text
    assert "trf_blocks.1.ff.layers.2.input" in text
    assert "trf_blocks.2.norm1" not in text, "of the stages behind the block with the first, the blocks' ends alone"
    page = Page(html_report(different))
    assert "Mistake found: exact-gelu in block 1" in " ".join(page.words)
    fault = json.loads(json.dumps(different.to_dict()))["diagnosis"]["faults"][0]
    assert (fault["name"], fault["blocks"]) == ("exact-gelu", [1])
    everywhere = compared(exact_gelu)
    assert "exact-gelu in block" not in terminal_text(everywhere)
    assert everywhere.diagnosis.faults[0].blocks == []


def test_what_does_not_explain_all_is_called_possible_in_the_headline():
    def two(model):
        exact_gelu(model)
        model.trf_blocks[0].att.out_proj.forward = lambda x: x * 0.777

    different = compared(two)
    assert different.diagnosis.faults and not different.diagnosis.explained
    text, page = " ".join(terminal_text(different).split()), " ".join(Page(html_report(different)).words)
    assert "Different: not fully explained; possibly exact-gelu" in text
    assert text.index("do not explain everything") < text.index("fix:")
    assert "Different, not fully explained; possibly exact-gelu" in page and "Mistake found" not in page


def test_the_terminal_calls_a_healthy_model_the_same():
    text = terminal_text(compared())
    assert "The same model" in text
    assert "Different" not in text
    assert "differs\n" not in text


def test_the_page_stands_alone_and_names_the_mistake(different):
    page = Page(html_report(different))
    text = " ".join(page.words)
    assert not page.open
    assert all(fetched.startswith(("data:image/png;base64,", "#")) for fetched in page.fetched)
    assert "Mistake found: exact-gelu" in text
    assert "first differs" in text
    assert "my <b>model</b> [red]" in text
    assert sum(fetched.startswith("data:image") for fetched in page.fetched) == 3 * 4, "three maps of each head"
    assert "prefers-color-scheme: dark" in html_report(different) and "width=device-width" in html_report(different)
    assert text.index("Mistake found") < text.index("Repaired") < text.index("Error through depth")


@pytest.mark.parametrize("sabotage", [None, broken_norm])
def test_the_page_is_drawn_of_healthy_and_of_broken_models(sabotage):
    comparison = compared(sabotage)
    text = html_report(comparison)
    assert ("<strong>The same model</strong>" in text) is (sabotage is None)
    assert ("∞" in re.sub(r"<p.*?</p>", "", text, flags=re.DOTALL)) is (sabotage is not None)
    assert "NaN" in terminal_text(comparison) or sabotage is None


def test_the_report_stands_in_a_notebook_with_a_style_of_its_own(different):
    shown = different._repr_html_()
    assert shown.startswith('<div class="lab">') and "<html" not in shown
    assert "Mistake found: exact-gelu" in shown
    style = re.sub(r"@media[^{]*|[{][^{}]*[}]", " ", shown[shown.index("<style>") + 7 : shown.index("</style>")])
    assert all(
        part.strip().startswith(".lab") for rule in style.split("{") for part in re.findall(r"[.][\w .>:-]+", rule)
    )


def test_pictures_have_a_pixel_for_each_value():
    pixels = decoded(picture(torch.tensor([[0.0, 1.0, -0.5], [float("nan"), 0.25, 2.0]]), 1.0))
    assert pixels.shape == (2, 3, 4)
    assert pixels[..., 3].tolist() == [[0, 255, 128], [255, 64, 255]]
    assert pixels[0, 1, 2] > pixels[0, 1, 0] and pixels[0, 2, 0] > pixels[0, 2, 2], "blue above 0, red below"
    assert pixels[1, 0, :3].tolist() == [0, 0, 0]


def decoded(data):
    import base64
    import io

    import numpy
    from PIL import Image

    return numpy.array(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))))


def test_another_number_of_heads_is_drawn():
    reference = subject(random_gpt2(), name="official")
    other = random_gpt2(n_head=2 * HEADS_SHOWN, n_embd=48)
    other.load_state_dict(reference.module.state_dict())
    candidate = subject(other)
    comparison = compare_models(reference, candidate, random_ids())
    comparison.diagnosis = diagnose(comparison, reference, candidate)
    assert comparison.diagnosis.names == ["wrong-n-heads"]
    text = html_report(comparison)
    assert "and of 12 of the candidate" in text
    assert "candidate − reference" not in text


def test_the_heat_map_has_a_cell_for_every_layer_and_stage(different):
    heat = heat_map(different)
    assert [layer for layer, _ in heat["rows"]] == [0, 1, 2]
    cells = [cell for _, row in heat["rows"] for cell in row]
    assert len(cells) == 3 * len(heat["columns"])
    assert all(cell is not None for cell in cells)
    colours = {shade(cell.relative) for cell in cells}
    assert len(colours) > 3
    assert shade(None) not in colours


def test_figures_that_are_no_numbers_have_a_place():
    assert logarithmic(float("nan")) == logarithmic(float("inf")) > 1
    assert logarithmic(0.0) > 0
    assert number(float("inf")) == "∞"
    assert number(0.0) == "0"


def test_the_worst_token_is_that_of_the_largest_divergence(different):
    row, place = different.worst_token
    a, b = (trace["out_head"].double().log_softmax(-1) for trace in different.traces)
    divergence = (a.exp() * (a - b)).sum(-1)
    assert divergence[row, place] == divergence.max() == pytest.approx(different.logits.max_kl)
    top = different.top_tokens(3)
    assert top[0]["reference"]["probability"] == pytest.approx(a[row, place].max().exp().item())
    assert [row["rank"] for row in top] == [1, 2, 3]


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("compare")
    gpt2, scratch = random_pair()
    gpt2.save_pretrained(directory / "official")
    scratch.save_pretrained(directory / "ours")
    (directory / "mine.py").write_text(MINE)
    config = scratch.config
    model = GPTModel({**config.to_dict(), "qkv_bias": True})
    copy_weights(subject(gpt2), subject(model, config))
    torch.save(model.state_dict(), directory / "model.pth")
    return directory


def run(*arguments):
    app = typer.Typer()
    app.command()(compare)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "150"})


def test_the_command_exits_0_on_the_same_model(files):
    result = run(files / "official", files / "ours")
    assert result.exit_code == 0, result.output
    assert "The same model" in result.output
    result = run(files / "official", f"{files / 'mine.py'}:MyGPT", "--weights", files / "model.pth")
    assert result.exit_code == 0, result.output
    assert run(f"{files / 'mine.py'}:MyGPT", files / "ours", "--weights", files / "model.pth").exit_code == 0


def test_the_command_names_the_mistake_and_exits_3(files, tmp_path):
    result = run(
        files / "official",
        f"{files / 'mine.py'}:MyWrongGPT",
        *("--weights", files / "model.pth", "--tokens", "1,2,3,4,5 6 7", "--gradients"),
        *("--html", tmp_path / "report.html", "--json", tmp_path / "report.json"),
    )
    assert result.exit_code == 3, result.output
    assert "exact-gelu" in result.output
    assert "exact-gelu" in (tmp_path / "report.html").read_text()
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [fault["name"] for fault in figures["diagnosis"]["faults"]] == ["exact-gelu"]
    assert figures["tokens"] == [[1, 2, 3, 4, 5, 6, 7]]
    assert figures["same"] is False


def test_quick_answers_say_so(files):
    result = run(files / "official", f"{files / 'mine.py'}:MyWrongGPT", "--quick")
    assert result.exit_code == 3 and "exact-gelu" in result.output and "--quick: fewer experiments" in result.output
    result = run(files / "official", f"{files / 'mine.py'}:MyGPT", "--quick")
    assert result.exit_code == 0 and "not compared, as asked by --quick" in re.sub(r"[\s│]+", " ", result.output)


def test_a_model_that_must_be_called_otherwise_is_called_by_a_function(files, tmp_path):
    (tmp_path / "masked.py").write_text(MASKED)
    result = run(files / "official", f"{tmp_path / 'masked.py'}:MaskedGPT")
    assert result.exit_code == 1 and "--forward run" in result.output
    result = run(files / "official", f"{tmp_path / 'masked.py'}:MaskedGPT", "--forward", "run")
    assert result.exit_code == 0, result.output
    result = run(files / "official", f"{tmp_path / 'masked.py'}:MaskedGPT", "--forward", "walk")
    assert result.exit_code == 1 and "has no 'walk'" in result.output


def test_json_alone_on_standard_output(files):
    result = run(files / "official", files / "ours", "--json", "-")
    assert json.loads(result.stdout)["same"] is True


def test_texts_are_read_by_the_models_tokenizer(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day, and the clocks were striking thirteen. " * 10)
    result = run(TRAINED, TRAINED, "--text", text)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.output
    text.write_text("")
    assert "a text needs at least 2" in run(TRAINED, TRAINED, "--text", text).output


def test_a_map_and_a_cfg_are_read_from_files(files, tmp_path):
    official = files / "official"
    sizes = {"vocab_size": 211, "context_length": 64, "emb_dim": 48, "n_heads": 4, "n_layers": 3}
    (tmp_path / "map.json").write_text(json.dumps(RAW_MAP))
    (tmp_path / "cfg.json").write_text(json.dumps(sizes))
    raw = f"{READERS}:RawGPT"
    result = run(official, raw, "--map", tmp_path / "map.json", "--cfg", tmp_path / "cfg.json")
    assert result.exit_code == 0, result.output
    assert "Parameters, as guessed" in result.output
    assert "only place left" in result.output
    page = tmp_path / "report.html"
    run(official, raw, "--map", tmp_path / "map.json", "--cfg", tmp_path / "cfg.json", "--html", page)
    row = "<td><code>stack.0.attention.w_q</code></td><td><code>trf_blocks.0.att.W_query.weight</code></td>"
    assert row in page.read_text(encoding="utf-8")
    wrong = run(official, raw, "--map", tmp_path / "map.json", "--cfg", json.dumps(sizes | {"n_heads": 6}))
    assert wrong.exit_code == 3
    assert "wrong-n-heads" in wrong.output
    assert run(official, raw).exit_code == 0, "its use shows what each parameter is"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "/nowhere"], "no directory"),
        (["official", "ours", "--tokens", "a,b"], "token ids are numbers"),
        (["official", "ours", "--tokens", "211"], "ids from 0 to 210"),
        (["official", "ours", "--tokens", ""], "ids from 0 to 210"),
        (["official", "ours", "--tokens", "1 " * 65], "only 64 positions"),
        (["official", "ours", "--text", "model.pth"], "neither model has a tokenizer"),
        (["official", "ours", "--weights", "model.pth"], "are for a class of your own"),
        (["official", "mine.py:MyGPT", "--map", "mine.py"], "cannot read the map"),
        (["official", "ours", "--html", "/nowhere/report.html"], "in an existing directory"),
    ],
)
def test_the_command_exits_1_with_a_reason(files, arguments, message):
    def there(argument):
        known = argument.split(":")[0] in ("official", "ours", "mine.py", "model.pth")
        return f"{files}/{argument}" if known else argument

    result = run(*map(there, arguments))
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"\xff\xfe\x00", ["official", "ours", "--text"], "cannot be tokenized"),
        (b"{", ["official", "mine.py:MyGPT", "--cfg"], "neither JSON"),
        (b"[1]", ["official", "mine.py:MyGPT", "--map"], "is not a map"),
        (b"", ["official", "mine.py:MyGPT", "--weights"], "cannot read weights"),
        (b"x", ["official"], "got the file"),
    ],
)
def test_files_of_the_wrong_kind_are_refused(files, tmp_path, content, arguments, message):
    (tmp_path / "given").write_bytes(content)
    result = run(*(f"{files}/{a}" if a[0] in "om" else a for a in arguments), tmp_path / "given")
    assert result.exit_code == 1, result.output
    assert message in result.output


def test_a_file_of_weights_is_answered_with_what_makes_a_model_of_it(files, tmp_path):
    (tmp_path / "model.pth").write_bytes(b"x")
    for remedy in ("hf-gpt-scratch convert", "give the directory that it is in"):
        result = run(f"{files}/official", tmp_path / "model.pth")
        assert result.exit_code == 1 and remedy in " ".join(result.output.split()), result.output
        (tmp_path / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["official", "ours", "--text", "no.txt"], "there is no text file no.txt"),
        (["official", "mine.py:MyGPT", "--cfg", "no.json"], "there is no file no.json"),
        (["official", "mine.py:MyGPT", "--weights", "no.pth"], "there is no file no.pth"),
        (["official", "mine.py"], "mine.py:Name"),
    ],
)
def test_a_file_that_is_not_there_is_named(files, arguments, message):
    result = run(*(f"{files}/{a}" if a[0] in "om" else a for a in arguments))
    assert result.exit_code == 1 and message in result.output, result.output


QUANTIZED = '{"model_type": "gpt2", "quantization_config": 7}'


@pytest.mark.parametrize("content", ["3", "[]", QUANTIZED, '{"model_type": ["x"]}'])
@pytest.mark.parametrize("command", ["compare", "verify", "inspect", "explain"])
def test_configs_that_hold_anything_are_refused(files, tmp_path, command, content):
    (tmp_path / "config.json").write_text(content)
    shutil.copy(files / "official" / "model.safetensors", tmp_path)
    arguments = {"inspect": [tmp_path], "explain": ["W_key", "--model", tmp_path]}
    given = arguments.get(command, [tmp_path, files / "ours"])
    result = CliRunner().invoke(app, [command, *map(str, given)])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert str(tmp_path) in result.output or "quantization" in result.output


@pytest.mark.parametrize("saved", [{"a": 1}, [1], {"model": {"a": None}}])
def test_weights_that_are_no_tensors_are_refused(files, tmp_path, saved):
    torch.save(saved, tmp_path / "weights.pth")
    result = run(files / "official", f"{files / 'mine.py'}:MyGPT", "--weights", tmp_path / "weights.pth")
    assert result.exit_code == 1 and "cannot read weights" in result.output
    result = run(files / "official", f"{files / 'mine.py'}:MyGPT", "--weights", tmp_path)
    assert result.exit_code == 1 and "is a directory" in result.output


def test_a_file_that_exits_is_not_the_same_model(files, tmp_path):
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")
    result = run(files / "official", f"{tmp_path / 'exits.py'}:MyGPT")
    assert result.exit_code == 1 and "does not run: SystemExit" in result.output


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_files_that_cannot_be_written_are_refused_before_the_work(files, option, monkeypatch):
    monkeypatch.setattr("hf_gpt_scratch.lab.session.load_both", lambda *_: pytest.fail("the work has begun"))
    for file in (files / "missing" / "report", files / "official", files / "model.pth" / "report"):
        result = run(files / "official", files / "ours", option, file)
        assert result.exit_code == 1 and f"{option} {file} cannot be written" in result.output


def test_the_page_needs_no_library_for_drawing(files, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(files / "official", files / "ours", "--html", tmp_path / "report.html")
    assert result.exit_code == 0 and "The same model" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_page_that_fails_takes_neither_the_json_nor_the_verdict_along(files, monkeypatch, tmp_path):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("hf_gpt_scratch.lab.compare.html_report", full)
    for candidate, status in ((files / "ours", 1), (f"{files / 'mine.py'}:MyWrongGPT", 3)):
        result = run(files / "official", candidate, "--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
        assert result.exit_code == status, result.output
        assert "a.html: no space left" in result.output
        assert json.loads((tmp_path / "a.json").read_text())["same"] is (status == 1)


def test_a_wrong_command_line_exits_2():
    assert run("only one").exit_code == 2


BROWSER_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


def browsed(tmp_path, page, *flags):
    """What Chromium prints about a page."""
    command = [BROWSER, *BROWSER_FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
def test_a_browser_draws_the_page_light_and_dark(different, tmp_path):
    from PIL import Image

    page = tmp_path / "report.html"
    page.write_text(html_report(different), encoding="utf-8")
    assert "Mistake found: exact-gelu" in browsed(tmp_path, page, "--dump-dom")
    light = {}
    for scheme, flags in (("light", ()), ("dark", ("--blink-settings=preferredColorScheme=0",))):
        shot = tmp_path / f"{scheme}.png"
        browsed(tmp_path, page, "--window-size=1200,2600", f"--screenshot={shot}", *flags)
        picture = Image.open(shot).convert("RGB")
        assert picture.size == (1200, 2600)
        assert len(picture.resize((300, 650)).getcolors(10**6)) > 50, "figures are drawn"
        light[scheme] = sum(picture.getpixel((5, 5)))
    assert light["dark"] < 100 < 600 < light["light"]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
@pytest.mark.parametrize("width", [400, 1200])
def test_no_page_is_wider_than_its_window(different, tmp_path, width):
    around = tmp_path / "around.html"
    inside = html_report(different).replace("&", "&amp;").replace('"', "&quot;")
    script = "onload = () => document.title = f.contentDocument.documentElement.scrollWidth"
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{inside}"></iframe>'
    around.write_text(f"<body>{frame}<script>{script}</script></body>", encoding="utf-8")
    assert f"<title>{width}</title>" in browsed(tmp_path, around, "--dump-dom")
