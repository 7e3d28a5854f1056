"""Sabotaged decoders go in, the names of the mistakes come out; those that are right are not accused."""

import json

import decoding_zoo
import pytest
from decoding_zoo import CLASSES, HEALTHY, SABOTAGES
from typer.testing import CliRunner

from hf_gpt_scratch import GPTScratchConfig, check_decoding
from hf_gpt_scratch.cli.app import app
from hf_gpt_scratch.errors import LabError
from hf_gpt_scratch.lab.subject import book_settings

SIZES = dict(vocab_size=211, context_length=64, emb_dim=48, n_heads=4, n_layers=3)
# Of each kind one: positions, mask, window, choice, sampling, end, padding, beams.
SAMPLE = (
    "positions-ignore-cache",
    "mask-not-moved",
    "prompt-cut-wrong-side",
    "greedy-samples",
    "top-k-off-by-one",
    "worst-beams-kept",
)


def cfg():
    config = GPTScratchConfig(bos_token_id=None, eos_token_id=None, qkv_bias=True, **SIZES)
    return json.dumps(book_settings(config))


def checked(case, folder, **options):
    file = folder / "candidate.py"
    file.write_text(case.source, encoding="utf-8")
    return check_decoding("unused", f"{file}:{CLASSES[case.style]}", cfg=cfg(), **options)


def first_of(name):
    return next(case for case in SABOTAGES if case.names == (name,))


def test_the_zoo_is_large():
    assert len(SABOTAGES) >= 60 and len(HEALTHY) >= 25
    assert len({case.source for case in SABOTAGES + HEALTHY}) == len(SABOTAGES + HEALTHY)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sabotage_of_each_kind_is_named(name, tmp_path):
    assert checked(first_of(name), tmp_path).names == [name]


@pytest.mark.slow
@pytest.mark.parametrize("case", SABOTAGES, ids=lambda case: f"{case.names[0]} {case.title}")
@pytest.mark.long
def test_a_sabotage_is_named_and_nothing_else(case, tmp_path):
    report = checked(case, tmp_path)
    assert report.names == list(case.names), [finding.says for finding in report.findings]
    assert all(finding.remedy and finding.shortest for finding in report.findings)
    # Of a cache in another order after beams only one order is replayed; another one is told as observed.
    assert (
        all(finding.proven for finding in report.findings)
        or "sort()" in case.title
        or case.names[0] in ("beams-differ", "fails", "draws-differ", "logits-not-finite")
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.title)
@pytest.mark.long
def test_a_right_decoder_is_not_accused(case, tmp_path):
    report = checked(case, tmp_path)
    assert report.right and not report.findings, [finding.says for finding in report.findings]
    assert report.decoders


def test_the_shortest_prompt_shows_the_mistake(tmp_path):
    report = checked(first_of("mask-not-moved"), tmp_path)
    shortest = report.findings[0].shortest
    # The first cached step sees only the first token: one of the prompt and itself are enough to tell.
    assert len(shortest["prompt"]) + shortest["new_tokens"] <= 3


def test_what_was_not_checked_is_told(tmp_path):
    report = checked(decoding_zoo.right("book"), tmp_path)
    skipped = {(check.where, check.what): check.why for check in report.checks if check.outcome == "not made"}
    assert skipped[("generate_text_simple", "the end token")] == "it has no parameter for one"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["right"] is True


def test_an_unknown_mistake_is_told_as_observed(tmp_path):
    case = decoding_zoo.wrong(
        "layers", "", "keys, values = self.cache_k, self.cache_v", "keys, values = self.cache_k, 1.1 * self.cache_v"
    )
    [finding] = checked(case, tmp_path).findings
    assert finding.name == "cached-logits-differ" and not finding.proven
    assert "new token 1 on" in finding.says and finding.figures["error"] > 1e-3


def test_a_forward_pass_that_sees_the_future_is_told_once(tmp_path):
    case = decoding_zoo.wrong("returned", "", "scores = scores.masked_fill(~keep, -1e9)", "pass")
    assert checked(case, tmp_path).names == ["future-leak"]


@pytest.mark.parametrize(
    ("renamed", "arguments", "told"),
    [
        ("max_new_tokens", None, "the meaning of its parameter 'quantity' is unknown"),
        ("max_new_tokens", {"quantity": "tokens"}, "'tokens' is not one of model, ids, max_new_tokens"),
        ("max_new_tokens", {"quantity": "max_new_tokens"}, ""),
        ("context_size", {"quantity": {"value": 48}}, ""),
    ],
)
def test_a_parameter_of_unknown_meaning_is_asked_for(renamed, arguments, told, tmp_path):
    text = f"{renamed}, context_size):" if renamed == "max_new_tokens" else "max_new_tokens, context_size):"
    case = decoding_zoo.right("book", text, text.replace(renamed, "quantity"), f"range({renamed})", "range(quantity)")
    if renamed == "context_size":
        case = decoding_zoo.right("book", text, text.replace(renamed, "quantity"), "-context_size:", "-quantity:")
    options = dict(generate="generate_text_simple", arguments=arguments)
    if told:
        with pytest.raises(LabError, match=told):
            checked(case, tmp_path, **options)
    else:
        assert checked(case, tmp_path, **options).decoders == ["generate_text_simple"]


@pytest.mark.parametrize(
    ("candidate", "generate", "told"),
    [
        ("openai-community/gpt2", None, "--decode is for a class of your own"),
        (
            "{file}:GPTModel",
            "compose",
            "there is no function or method 'compose'; the functions are generate_text_simple",
        ),
    ],
)
def test_what_cannot_be_checked_is_refused(candidate, generate, told, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(decoding_zoo.right("book").source)
    with pytest.raises(LabError, match=told):
        check_decoding("unused", candidate.format(file=file), cfg=cfg(), generate=generate)


@pytest.mark.slow
def test_the_command(tmp_path):
    from pairs import random_gpt2

    random_gpt2().save_pretrained(tmp_path / "reference")
    for case, status in ((decoding_zoo.right("layers"), 0), (first_of("cache-not-reset"), 3)):
        (tmp_path / "mine.py").write_text(case.source)
        arguments = ["compare", tmp_path / "reference", f"{tmp_path / 'mine.py'}:GPTModel", "--decode"]
        outputs = ["--json", str(tmp_path / "figures.json"), "--html", str(tmp_path / "report.html")]
        result = CliRunner().invoke(app, [*map(str, arguments), *outputs])
        assert result.exit_code == status, result.output
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures["same"] is True and figures["decoding"]["names"] == list(case.names)
        assert figures["decoding"]["verdict"] in result.output
        page = (tmp_path / "report.html").read_text()
        assert figures["decoding"]["verdict"] in page
        assert ('class="verdict bad"' in page) == bool(case.names), "decoding is wrong, and the logits are the same"
        assert all(name in page for name in case.names)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--generate", "f"], "are for --decode"),
        (["--decode", "--decode-arguments", "k=top_k"], "is not JSON"),
        (["--decode", "--decode-arguments", "[1]"], "maps no parameters"),
    ],
)
def test_wrong_options_are_usage_errors(options, told):
    result = CliRunner().invoke(app, ["compare", "a", "b", *options])
    assert result.exit_code == 2 and told in " ".join(result.output.replace("│", " ").split())
