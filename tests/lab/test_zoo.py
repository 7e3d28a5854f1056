"""GPTs in every style: what is GPT-2 is called the same, and the same with one mistake is not."""

import json
import sys

import pytest
from pairs import random_gpt2

from hf_gpt_scratch import compare
from hf_gpt_scratch.lab.subject import subject

sys.path.insert(0, str(__import__("pathlib").Path(__file__).parent))
from zoo.styles import STYLES, healthy, misused, wrong

SIZES = dict(n_positions=48, n_layer=2, n_head=3, n_embd=48)  # as many positions as the model is wide
FEW = ["book", "nanoGPT", "einsum weights", "a module for each head", "nn.TransformerEncoder"]


@pytest.fixture(scope="module")
def official():
    return random_gpt2(**SIZES)


def source_of(style, folder):
    """The style as files in a folder, and the name by which `compare` takes it."""
    for name, text in {style.file: style.text, **style.files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".ipynb"):
            parts = [
                "!pip install torch\n%matplotlib inline",
                *text.split("\n\n\n"),
                "raise SystemExit('not to be run')",
            ]
            cells = [{"cell_type": "code", "source": part.splitlines(keepends=True)} for part in parts]
            text = json.dumps({"cells": [{"cell_type": "markdown", "source": ["# GPT"]}, *cells]})
        path.write_text(text)
    return f"{folder / style.file}:{style.target}"


def options_of(style, official):
    options = dict(style.options)
    if "cfg" in options:
        config = subject(official).config
        options["cfg"] = json.dumps({name: getattr(config, size) for name, size in options["cfg"].items()})
    return options


def compared(style, official, folder):
    return compare(official, source_of(style, folder), **options_of(style, official))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in healthy()])
def test_a_healthy_gpt_is_the_same_in_every_style(official, name, tmp_path):
    comparison = compared(healthy()[name], official, tmp_path)
    assert comparison.same, comparison.verdict
    assert comparison.first_divergence is None
    assert comparison.gradients_agree


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in wrong()])
@pytest.mark.long
def test_one_mistake_is_found_in_every_style(official, name, tmp_path):
    comparison = compared(wrong()[name], official, tmp_path)
    assert not comparison.same
    assert comparison.diagnosis.explained, comparison.diagnosis
    assert len(comparison.diagnosis.names) == 1


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if i < 5 else pytest.mark.slow) for i, n in enumerate(misused())]
)
@pytest.mark.long
def test_names_that_say_what_a_part_is_are_believed(official, name, tmp_path):
    """A part that does another's work is a mistake, not another name for that part."""
    style, names = misused()[name]
    comparison = compared(style, official, tmp_path)
    assert not comparison.same
    assert comparison.diagnosis.names == names, comparison.diagnosis
    assert comparison.diagnosis.explained == bool(names)


def test_the_zoo_has_forty_healthy_styles_and_a_mistake_in_each():
    assert len(healthy()) >= 40
    assert all(style.mistake[0] in style.text for style in STYLES.values())
