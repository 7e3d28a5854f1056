"""The lessons' figures are those that the tutorials print, and the pictures are drawn."""

import json
import os
from pathlib import Path

import matplotlib.image
import pytest
import torch
from forks import run_python

from hf_gpt_scratch import GPT_CONFIG_124M, GPTModel

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "lessons.py"


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    output = tmp_path_factory.mktemp("lessons")
    done = run_python(EXAMPLE, "--output", output, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    return output, json.loads((output / "figures.json").read_text())


@pytest.fixture(scope="module")
def figures(lessons):
    return lessons[1]


def near(expected):
    """As printed: to four decimals."""
    return pytest.approx(expected, abs=5.5e-5)


@pytest.mark.parametrize("name", ["placeholder", "layer_norm", "gelu", "shortcuts", "sizes"])
@pytest.mark.long
def test_every_lesson_is_a_picture(lessons, name):
    picture = matplotlib.image.imread(lessons[0] / f"{name}.png")
    height, width, _ = picture.shape
    assert width >= 1400 and height >= 600
    assert picture[..., :3].std() > 0.05


def test_the_placeholder_becomes_the_books_model(figures):
    found = figures["placeholder"]
    assert found["parameters"] == [77_981_184, 78_019_584, 134_688_768, 163_009_536]
    assert found["shape"] == [[2, 4, 50257]] * 4
    assert found["first_logits"][0] == near([-1.2034, 0.3201, -0.7130])  # the tutorials' DummyGPTModel
    assert found["first_logits"][-1] == near([0.3613, 0.4222, -0.0711])  # and GPTModel


def test_the_last_stage_is_the_model_itself(figures):
    torch.manual_seed(123)
    model = GPTModel(GPT_CONFIG_124M)
    with torch.no_grad():
        logits = model(torch.tensor([[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]]))
    assert figures["placeholder"]["first_logits"][-1] == logits[0, 0, :3].tolist()
    assert figures["placeholder"]["first_logits"][-2] != logits[0, 0, :3].tolist()


def test_layer_norm_takes_mean_and_variance_to_0_and_1(figures):
    found = figures["layer_norm"]
    assert found["outputs"][0] == near([0.2260, 0.3470, 0, 0.2216, 0, 0])
    assert found["outputs"][1] == near([0.2133, 0.2394, 0, 0.5198, 0.3297, 0])
    assert (found["mean"], found["variance"]) == (near([0.1324, 0.2170]), near([0.0231, 0.0398]))
    assert (found["mean_after"], found["variance_after"]) == (near([0, 0]), near([1, 1]))
    inside = found["variances"]
    assert len(inside["before"]) == 13 and min(inside["before"]) > 2
    assert inside["after"] == pytest.approx([1] * 13, abs=1e-5)


def test_gelu_is_not_silent_below_zero_and_relu_is(figures):
    found = figures["gelu"]
    assert found["at"]["GELU"] == near([-0.1588, 0, 0.8412])
    assert found["at"]["ReLU"] == [0, 0, 1]
    assert found["lowest"] == pytest.approx([-0.75, -0.17], abs=5e-3)
    assert found["silent_below_zero"] == {"GELU": False, "ReLU": True}


def test_shortcuts_keep_the_gradient(figures):
    five, thirty = figures["shortcuts"]["five"], figures["shortcuts"]["thirty"]
    printed = [0.00020173587836325169, 0.0001201116101583466, 0.0007152041071094573, 0.001398873864673078]
    assert five["without shortcuts"] == pytest.approx([*printed, 0.005049646366387606], rel=1e-5)
    printed = [0.22169791162014008, 0.20694105327129364, 0.32896995544433594, 0.2665732204914093]
    assert five["with shortcuts"] == pytest.approx([*printed, 1.3258540630340576], rel=1e-5)
    assert thirty["without shortcuts"][0] < 1e-12 * thirty["without shortcuts"][-1]
    assert thirty["with shortcuts"][0] > thirty["with shortcuts"][-1]


@pytest.mark.parametrize(
    "name, untied, tied, mebibytes",
    [
        ("124M", 163_009_536, 124_412_160, 621.83),
        ("355M", 406_212_608, 354_749_440, 1549.58),
        ("774M", 838_220_800, 773_891_840, 3197.56),
        ("1558M", 1_637_792_000, 1_557_380_800, 6247.68),
    ],
)
def test_sizes_and_memory_are_the_printed_ones(figures, name, untied, tied, mebibytes):
    found = figures["sizes"][name]
    assert (found["untied"], found["tied"], round(found["MiB"], 2)) == (untied, tied, mebibytes)
