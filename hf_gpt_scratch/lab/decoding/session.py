"""`check_decoding`: a candidate by name, its decoders, all checks."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...errors import LabError
from ..building import import_file, public_model
from ..subject import load, names_a_class, settings_for
from .bench import Make, causal_forward, make_bench
from .cached_forward import forward_decoder, remembers
from .checks import Examination, ready
from .decoders import find_decoders
from .report import WRONG, DecodingFinding, DecodingReport


def check_decoding(
    reference: str | os.PathLike,
    candidate: str | os.PathLike,
    *,
    cfg: str | None = None,
    generate: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    step: Callable[[str], None] = lambda step: None,
) -> DecodingReport:
    """Whether what a class of your own generates is what its own forward pass says.

    The forward pass without a cache is the reference, so that decoding is judged apart from it. The class is built
    small, with random weights, which decoding does not depend on.

    Args:
        reference: a model whose sizes the class gets if there is no cfg.
        candidate: `my_gpt.py:MyGPTModel`. The file is executed.
        cfg: its config: JSON, a JSON file, or the name of a dict in its file.
        generate: the one function or method to check; default: all whose names say that they generate. A function of
            another file is `other.py:name`.
        arguments: parameter -> what it means (a name in `decoders.SETTINGS`), or {"value": …}.
        step: called with the name of each step.

    Raises:
        LabError: there is nothing that generates, or it does not run, or a parameter's meaning is unknown.
    """
    reference, candidate = os.fspath(reference), os.fspath(candidate)
    if not names_a_class(candidate):
        raise LabError(f"--decode is for a class of your own, file.py:Name, but the candidate is {candidate!r}")
    file, _, attribute = candidate.rpartition(":")
    step("Loading")
    module = import_file(file, attribute)
    made = public_model(module, attribute, file)
    if isinstance(made, type) and issubclass(made, PreTrainedModel):
        raise LabError(
            f"{candidate} is a Transformers class, which generates with transformers' own code; nothing to check"
        )
    like = None if cfg is not None else load(reference, cfg=cfg if names_a_class(reference) else None)
    known, settings, given = settings_for(made, module, cfg, like, candidate, [])
    bench = make_bench(Make(made, module, given, candidate), settings, known.vocab_size, known.context_length)
    place = module
    if generate is not None and names_a_class(generate):
        other, _, generate = generate.rpartition(":")
        place = module if Path(other).resolve() == Path(file).resolve() else import_file(other)
    model_class: type[nn.Module] = type(bench.module)
    for one_file in {id(module): module, id(place): place}.values():
        bench.keep_state_of(one_file)
    decoders, notes = find_decoders(place, model_class, generate, arguments or {})
    report = DecodingReport(candidate, [], notes=notes)
    failures: list[str] = []
    used_cache = False
    finite = bool(torch.isfinite(bench.all_logits(bench.ids(6, 0))).all())
    if not finite:
        report.decoders.append(f"{model_class.__name__}.forward")
        report.checked(report.decoders[0], "its logits are numbers", WRONG, "logits-not-finite")
        report.findings.append(
            DecodingFinding(
                "logits-not-finite",
                "without a cache, some logits are NaN or infinite, so that nothing can be said of what is generated",
                report.decoders[0],
                "compare the forward pass first: a row of the mask may hide all tokens",
                False,
                "",
                shortest={"prompt": bench.ids(6, 0), "new_tokens": 1},
            )
        )
        return report
    bench.causal = causal_forward(bench)
    if not bench.causal:
        report.findings.append(
            DecodingFinding(
                "future-leak",
                "without a cache, tokens see the tokens after them, so no cache can give the same logits",
                f"{model_class.__name__}.forward",
                "mask the scores of later tokens: scores.masked_fill_(torch.triu(ones, diagonal=1).bool(), -inf)",
                True,
                "another last token changes the logits of the tokens before it",
                shortest={"prompt": bench.ids(2, 0), "new_tokens": 1},
            )
        )
    for decoder in decoders:
        step(f"Checking {decoder.name}")
        one, failure = ready(bench, decoder)
        prompt = bench.ids(5, 1)
        # One that reaches the model and then fails is wrong; of others, it may not be understood how to call them.
        if failure and (run := bench.run(decoder, [prompt], 4)).calls and "it returns" not in run.failure:
            says = f"with a prompt of {len(prompt)} tokens and 4 new ones it does not run: {failure}"
            report.decoders.append(decoder.name)
            report.checked(decoder.name, "it runs", WRONG, "fails")
            report.findings.append(
                DecodingFinding(
                    "fails",
                    says,
                    decoder.name,
                    "run it so by hand, on ids of shape (1, 5)",
                    False,
                    "",
                    shortest={"prompt": prompt, "new_tokens": 4},
                )
            )
            continue
        if failure:
            failures.append(f"{decoder.name} does not run: {failure}")
            continue
        report.decoders.append(one.name)
        examination = Examination(bench, one, report)
        examination.everything()
        used_cache |= examination.uses_cache()
    if not used_cache and (of_forward := forward_decoder(bench.module)) is not None and generate is None:
        step(f"Checking {of_forward.name}")
        one, failure = ready(bench, of_forward)
        if not failure and not remembers(bench.module, bench.run(one, [bench.ids(5, 1)], 3)):
            failure = "no pass attends to more tokens than it is given"
        if failure:
            report.notes.append(
                f"{of_forward.name} was not checked, because the cache is used in another way: {failure}"
            )
        else:
            report.decoders.append(one.name)
            Examination(bench, one, report).everything()
    if not report.decoders:
        why = "; ".join([*failures, *notes]) or "no function or method of it generates; name one with --generate"
        raise LabError(f"{candidate}: {why}")
    report.notes += failures
    if any(one.proven for one in report.findings):  # whose cause it may be, so that it is told once
        report.notes += [f"{one.where}: {one.says}" for one in report.findings if one.name == "fails"]
        report.findings = [one for one in report.findings if one.name != "fails"]
    report.replays = bench.replays
    return report
