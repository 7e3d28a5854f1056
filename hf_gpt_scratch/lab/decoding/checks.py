"""The questions asked of one decoder.

Each method of `Examination` asks one, and writes its answer into the report. What is wrong is named by a replay that
reproduces it; else what is observed is told.

Shapes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .bench import Bench
from .decoders import Decoder
from .recording import NotReplayable, Run, most_probable
from .report import NOT_MADE, RIGHT, WRONG, DecodingFinding, DecodingReport
from .sampling import SETTINGS, right_distributions, variants_that_give
from .steps import KEEP, RESET, STALE, Step, explain, explain_stale, first_difference, observed_positions, steps_of

NEW = 5
# Probabilities in float64, and where the decoder computes them in float32.
EXACT, SINGLE = 1e-9, 3e-6
EVAL = "call model.eval() before generating, and model.train() only after it"
TRUE_ARGMAX = "take torch.argmax(logits[:, -1], dim=-1, keepdim=True)"


def ready(bench: Bench, decoder: Decoder) -> tuple[Decoder, str]:
    """The decoder with the form of ids that it takes, or why it does not run."""
    prompt = bench.ids(5, 1)
    failures = []
    for form in ("tensor", "rows", "list", "vector"):
        one = replace(decoder, form=form, keeps_prompt=False)
        run = bench.run(one, [prompt], 4)
        if run.error is not None:
            failures.append(run.failure)
            continue
        if not run.new[0]:
            failures.append("it returns no ids")
            continue
        keeps = len(run.new[0]) > len(prompt) and run.new[0][: len(prompt)] == prompt
        count = len(run.new[0]) - len(prompt) * keeps
        total = not (one.has("max_length") and count == 4 + len(prompt))
        return replace(one, keeps_prompt=keeps, length_is_total=total), ""
    return decoder, failures[0]


@dataclass
class Examination:
    """One decoder on the bench. `greedy` are settings with which it takes the most probable token, as far as they say."""

    bench: Bench
    decoder: Decoder
    report: DecodingReport
    greedy: dict[str, Any] = field(default_factory=dict)
    asked_greedy: bool = False
    unreliable: bool = False

    # Runs

    def run(self, prompts: list[list[int]], new: int = NEW, **options: Any) -> Run:
        return self.bench.run(self.decoder, prompts, new, **{**self.greedy, **options})

    def right(self, what: str) -> None:
        self.report.checked(self.decoder.name, what, RIGHT)

    def not_made(self, what: str, why: str) -> None:
        self.report.checked(self.decoder.name, what, NOT_MADE, why)

    def wrong(
        self, what: str, name: str, says: str, remedy: str, *, proof: str = "", shortest: Any = None, **figures: Any
    ) -> None:
        self.report.checked(self.decoder.name, what, WRONG, name)
        if any(one.name == name and one.where == self.decoder.name for one in self.report.findings):
            return
        self.report.findings.append(
            DecodingFinding(name, says, self.decoder.name, remedy, bool(proof), proof, figures, shortest)
        )

    def everything(self) -> None:
        self.choose_settings()
        self.count()
        if not self.repeatable():
            return
        self.greedily()
        self.steps()
        self.second_prompt()
        self.window()
        self.ends()
        self.batch()
        self.padding()
        self.sampling()
        self.beams()

    # Greedy

    def choose_settings(self) -> None:
        one = self.decoder
        prompt = [self.bench.ids(5, 2)]
        switches: dict[str, Any] = {}
        if one.has("use_cache"):
            switches["use_cache"] = True
        if one.has("num_beams"):
            switches["num_beams"] = 1
            if self.bench.run(one, prompt, 2, **switches).error is not None:
                del switches["num_beams"]
        if one.has("do_sample"):
            switches["do_sample"] = False
            self.asked_greedy = True
        elif one.has("greedy"):
            switches["greedy"] = True
            self.asked_greedy = True
        elif one.has("temperature"):
            default = one.defaults.get("temperature")
            zero = self.bench.run(one, prompt, 2, **switches, temperature=0.0)
            if not default and zero.error is None:
                switches["temperature"] = 0.0
                self.asked_greedy = True
            elif zero.error is None and all(torch.isfinite(d.probabilities).all() for d in zero.draws):
                switches["temperature"] = 0.0
                self.asked_greedy = True
            elif one.says_greedy:
                self.asked_greedy = True
            elif default is None:
                switches["temperature"] = 1.0
        else:
            self.asked_greedy = one.says_greedy
        self.greedy = switches

    def count(self) -> None:
        """Does it return as many ids as it was asked for?"""
        what = "number of new tokens"
        lengths = {}
        for seed, new in enumerate((1, 2, 4, 6)):
            run = self.run([self.bench.ids(5, 10 + seed)], new)
            if run.error is not None:
                lengths[new] = None
                failure = run.failure
            else:
                lengths[new] = len(run.new[0])
        if None in lengths.values():
            self.not_made(what, failure)
        elif all(new == length for new, length in lengths.items()):
            self.right(what)
        elif len(found := {length - new for new, length in lengths.items() if length is not None}) == 1:
            off = found.pop()
            few_or_many = f"{abs(off)} token{'s' * (abs(off) > 1)} too {'many' if off > 0 else 'few'}"
            self.wrong(
                what,
                "wrong-number-of-tokens",
                f"it returns {few_or_many}: asked for {list(lengths)}, it gives {list(lengths.values())}",
                "run the loop max_new_tokens times, and append each token",
                proof=f"the same for {len(lengths)} lengths",
                shortest={"prompt": self.bench.ids(1, 0), "new_tokens": 1},
            )
        else:
            self.not_made(what, f"asked for {list(lengths)} tokens, it gives {list(lengths.values())}")

    def repeatable(self) -> bool:
        """Does the same prompt give the same logits again?"""
        what = "the same logits each time"
        prompt = [self.bench.ids(6, 20)]
        runs = [self.run(prompt, 3, seed=seed) for seed in (0, 1)]
        if failed := next((run for run in runs if run.error is not None), None):
            self.not_made(what, failed.failure)
            return False
        if not all(run.calls and run.calls[-1].logits is not None for run in runs):
            self.not_made(what, "no forward pass was seen")
            return False
        pairs = list(zip(*(steps_of(run)[0] for run in runs), strict=False))
        if all(self.bench.equal(a.logits, b.logits) for a, b in pairs):
            self.right(what)
            return True
        without = [self.run(prompt, 3, seed=seed, dropout=False) for seed in (0, 1)]
        pairs = list(zip(*(steps_of(run)[0] for run in without), strict=False))
        still = all(self.bench.equal(a.logits, b.logits) for a, b in pairs)
        self.wrong(
            what,
            "dropout-on" if still else "not-repeatable",
            "dropout is on while it generates" if still else "the same prompt gives other logits each time",
            EVAL if still else "look for random numbers in the forward pass",
            proof="without dropout the logits are equal, with it they are not" if still else "",
        )
        return False

    def greedily(self) -> None:
        """Where it is asked for the most probable token, does it take it?"""
        what = "the most probable token"
        if not self.asked_greedy:
            self.not_made(what, "it cannot be asked for the most probable token")
            return
        prompts = [self.bench.ids(n, 30 + n) for n in (6, 4, 7)]
        runs = [self.run([prompt], NEW) for prompt in prompts]
        if failed := next((run for run in runs if run.error is not None), None):
            self.not_made(what, failed.failure)
            return
        if any(not draw.certain for run in runs for draw in run.draws):
            draw, run = next((d, r) for r in runs for d in r.draws if not d.certain)
            others = [self.run([prompts[0]], NEW, choose=None, seed=seed).new for seed in range(6)]
            z = run.calls[draw.call].last[0]
            same = (
                draw.probabilities.shape[-1] == len(z)
                and float((z.softmax(-1) - draw.probabilities[0] / draw.probabilities[0].sum()).abs().max()) < SINGLE
            )
            self.wrong(
                what,
                "greedy-samples",
                f"asked for the most probable token ({self.told()}), it draws at random",
                TRUE_ARGMAX,
                proof=f"torch.multinomial draws from {'softmax(logits)' if same else 'several tokens'}; "
                f"{len({str(new) for new in others})} results with 6 seeds",
                shortest={"prompt": prompts[0][:1], "new_tokens": 1},
            )
            return
        if all(steps_of(run)[1] for run in runs):
            self.right(what)
            return
        self.decided_otherwise(what, runs)

    def told(self) -> str:
        named = {self.decoder.parameters[s]: v for s, v in self.greedy.items() if s not in ("use_cache", "num_beams")}
        return ", ".join(f"{name}={value}" for name, value in named.items()) or self.decoder.name

    def decided_otherwise(self, what: str, runs: list[Run]) -> None:
        """The new ids are not the argmax of the last logits: of which, then?"""
        rules: list[tuple[str, str, str, Callable[[torch.Tensor], int]]] = [
            ("wrong-row", f"the token is chosen from the logits of place {row}, not of the last", "logits[:, -1, :]",
             lambda logits, row=row: int(logits[row].argmax()))
            for row in (0, 1, -2, -3)
        ]  # fmt: skip
        rules += [
            ("takes-least-probable", "it takes the least probable token", TRUE_ARGMAX, lambda x: int(x[-1].argmin())),
            (
                "takes-second", "it takes the second most probable token", TRUE_ARGMAX,
                lambda x: int(x[-1].topk(2).indices[1]),
            ),
            (
                "top-k-sorted-indices", "the place among the largest is taken for an id", TRUE_ARGMAX, lambda x: 0,
            ),
            (
                "wrong-row", "the token is the largest over all places, not of the last", "logits[:, -1, :]",
                lambda x: int(x.amax(0).argmax()),
            ),
        ]  # fmt: skip

        def follows(run: Run, rule) -> bool:
            calls = [call for call in run.calls if call.logits is not None]
            new = run.new[0]
            for start in range(len(calls) - len(new) + 1):
                try:
                    if new and [rule(call.logits[0]) for call in calls[start : start + len(new)]] == new:
                        return True
                except (IndexError, RuntimeError):
                    continue
            return False

        for name, says, remedy, rule in rules:
            if all(follows(run, rule) for run in runs):
                proof = f"it gives all {sum(len(run.new[0]) for run in runs)} ids of {len(runs)} prompts"
                self.wrong(what, name, says, remedy, proof=proof, shortest=self.smallest(lambda r: not steps_of(r)[1]))
                return
        self.wrong(
            what,
            "not-the-most-probable",
            "the new tokens are not those with the largest logits",
            TRUE_ARGMAX,
            ids=runs[0].new[0],
            prompt=runs[0].prompts[0],
        )

    # Steps

    def smallest(self, shows: Callable[[Run], bool], **options: Any) -> dict[str, Any] | None:
        """The shortest prompt, and the fewest new tokens, with which a run shows it."""
        for total in range(2, 14):
            for new in range(1, total):
                prompt = self.bench.ids(total - new, 77)
                run = self.run([prompt], new, **options)
                try:
                    if run.error is None and shows(run):
                        return {"prompt": prompt, "new_tokens": new}
                except NotReplayable:
                    continue
        return None

    def differs(self, run: Run) -> bool:
        return first_difference(self.bench, steps_of(run)[0]) is not None

    def steps(self) -> None:
        """Are the logits of each step those of the whole sequence?"""
        what = "each step's logits are those of the whole sequence"
        for use_cache in (True, False) if self.decoder.has("use_cache") else (None,):
            options = {} if use_cache is None else {"use_cache": use_cache}
            runs = [self.run([self.bench.ids(n, 40 + n)], NEW, **options) for n in (7, 5, 6)]
            if failed := next((run for run in runs if run.error is not None), None):
                self.not_made(what, failed.failure)
                return
            try:
                if not self.same_logits(what, runs, options):
                    return
            except NotReplayable as error:
                self.not_made(what, f"its forward pass without a cache fails: {error}")
                return
        self.right(what)

    def same_logits(self, what: str, runs: list[Run], options: dict[str, Any]) -> bool:
        all_steps = [steps_of(run)[0] for run in runs]
        found = [first_difference(self.bench, steps) for steps in all_steps]
        differences = [one for one in found if one is not None]
        if not differences:
            return True
        self.unreliable = True
        worst = max(error for _, error in differences)
        n, cached = differences[0][0], any(step.cached for steps in all_steps for step in steps)
        hypotheses = explain(self.bench, all_steps)
        shortest = self.smallest(self.differs, **options)
        passes = "cached passes" if cached else "the forward passes"
        if hypotheses is None:
            positions = self.positions_seen(all_steps)
            self.wrong(
                what,
                "cached-logits-differ" if cached else "step-logits-differ",
                f"from new token {n + 1} on, the logits of {passes} differ from those of the whole sequence by up to "
                f"{worst:.1e} of the largest{positions}",
                "compare the keys and values in the cache with those of a full pass, layer by layer",
                error=worst,
                shortest=shortest,
            )
            return False
        count = sum(map(len, all_steps))
        for one in hypotheses:
            says = one.says
            if one.ids is not None:
                step = all_steps[0][-1]
                says += f": for the prompt {runs[0].prompts[0]} and the new ids {runs[0].new[0]}, it is {step.fed}"
            self.wrong(
                what,
                one.name,
                says,
                one.remedy,
                proof=f"so run without a cache, its own forward pass gives the logits of all {count} steps of "
                f"{len(runs)} prompts",
                error=worst,
                shortest=shortest,
            )
        return False

    def positions_seen(self, all_steps: list[list[Step]]) -> str:
        step = all_steps[0][-1]
        seen = observed_positions(step)
        if seen is None or seen == list(range(len(seen))):
            return ""
        return f"; the positions of its last {len(seen)} tokens are {seen}"

    def second_prompt(self) -> None:
        """Is the second generation with the same model that of a fresh one?"""
        what = "a second prompt is not affected by the first"
        all_steps, errors = [], []
        for seed in (0, 1, 2):
            module = self.bench.fresh()
            first = self.run([self.bench.ids(4 + seed, 50 + seed)], 3, module=module)
            prompt = self.bench.ids(5, 60 + seed)
            again, fresh = self.run([prompt], 4, module=module), self.run([prompt], 4)
            if first.error is not None or fresh.error is not None:
                self.not_made(what, first.failure or fresh.failure)
                return
            if again.error is not None:
                self.wrong(
                    what,
                    "second-prompt-fails",
                    f"a second prompt fails, which a new model accepts: {again.failure}",
                    RESET,
                    shortest={"prompt": prompt, "new_tokens": 4},
                )
                return
            before = [token for call in first.calls for token in call.ids[0].tolist()]
            steps, right = steps_of(again, before=before)[0], steps_of(fresh)[0]
            all_steps.append(steps)
            for a, b in zip(steps, right, strict=False):
                errors.append(self.bench.error(a.logits, b.logits))
                if a.prefix != b.prefix or not errors[-1] <= self.bench.rounding:
                    break
        if max(errors) <= self.bench.rounding:
            self.right(what)
            return
        proven = explain_stale(self.bench, all_steps)
        self.wrong(
            what,
            "cache-not-reset",
            STALE if proven else "the second prompt's logits depend on the first prompt",
            RESET,
            proof="its own forward pass over the first prompt's tokens and then the second's gives the logits of all "
            f"{sum(map(len, all_steps))} steps of {len(all_steps)} second prompts"
            if proven
            else "",
            error=max(errors),
            shortest={"prompts": [self.bench.ids(1, 1), self.bench.ids(1, 2)], "new_tokens": 1},
        )

    def window(self) -> None:
        """Beyond the context, does it go on with the last tokens?"""
        what = "beyond the context"
        if self.unreliable:
            self.not_made(what, "its steps are wrong already within the context")
            return
        context = self.bench.context_length
        sizes = {"crossing": (context - 2, 6), "long prompt": (context + 5, 3)}
        for kind, (length, new) in sizes.items():
            runs = [self.run([self.bench.ids(length, 70 + seed)], new) for seed in (0, 1)]
            label = f"{what}, {kind}"
            if failed := next((run for run in runs if run.error is not None), None):
                self.not_made(label, f"it refuses: {failed.failure}"[:300])
                continue
            if all(not self.outside(step) for run in runs for step in steps_of(run)[0]):
                short = min(len(run.new[0]) for run in runs)
                self.right(label)
                if short < new:
                    self.report.notes.append(f"{self.decoder.name} ends when the context is full")
                continue
            self.named_window(label, runs, kind)

    def outside(self, step: Step) -> bool:
        """Whether the logits are not those of the last tokens, as many as the decoder chose to keep."""
        context, prefix = self.bench.context_length, step.prefix
        if self.bench.equal(step.logits, self.bench.last(prefix[-context:])):
            return False
        if len(prefix) <= context:
            return True
        return not any(
            self.bench.equal(step.logits, self.bench.last(prefix[-size:])) for size in self.suffixes(len(prefix))
        )

    def suffixes(self, length: int) -> list[int]:
        return list(range(self.bench.context_length, 0, -1))

    def named_window(self, what: str, runs: list[Run], kind: str) -> None:
        bench, context = self.bench, self.bench.context_length
        steps = [step for run in runs for step in steps_of(run)[0]]
        long = [step for step in steps if len(step.prefix) > context] or steps

        def gives(make: Callable[[Step], Any], where: list[Step]) -> bool:
            def one(step: Step) -> bool:
                try:
                    made = make(step)
                    return made is not None and bench.equal(step.logits, bench.last(*made))
                except NotReplayable:
                    return False

            return all(one(step) for step in where)

        bad = [step for step in steps if self.outside(step)]
        shown = {"prompt_length": len(runs[0].prompts[0]), "new_tokens": len(runs[0].new[0])}
        proof = (
            f"so run without a cache, its own forward pass gives the logits of {len(bad)} steps of {len(runs)} prompts"
        )
        for size in range(context, max(context // 4, 1), -1):
            if gives(lambda step, size=size: (step.prefix[:size],), bad):
                self.wrong(
                    what, "prompt-cut-wrong-side",
                    f"of a sequence longer than the context, the first {size} tokens are kept, not the last",
                    "idx_cond = idx[:, -context_size:]", proof=proof, shortest=shown,
                )  # fmt: skip
                return
        for size in range(context - 1, max(context // 2, 1), -1):
            if gives(lambda step, size=size: (step.prefix[-size:],), bad):
                self.wrong(
                    what, "window-too-short",
                    f"only the last {size} tokens are seen, though the context has {context}",
                    "idx_cond = idx[:, -context_size:]", proof=proof, shortest=shown,
                )  # fmt: skip
                return
        # A cut prompt, and then the new tokens: all of the history, whatever it is.
        for cut in ("start", "end"):

            def cut_prompt(step: Step, cut=cut):
                prompt = step.fed[0]
                wrong = prompt == runs[0].prompts[0][: len(prompt)] or prompt == runs[1].prompts[0][: len(prompt)]
                return (sum(step.history, []),) if wrong and len(sum(step.history, [])) <= context else None

            if kind == "long prompt" and gives(cut_prompt, bad):
                self.wrong(
                    what, "prompt-cut-wrong-side",
                    "of a prompt longer than the context, the first tokens are kept, not the last",
                    "idx = idx[:, -context_size:]", proof=proof, shortest=shown,
                )  # fmt: skip
                return
        positions: dict[str, Callable[[int], list[int]]] = {
            "their positions stay at the last one": lambda n: [min(i, context - 1) for i in range(n)],
            "their positions start again at 0": lambda n: [i % context for i in range(n)],
            "their positions are the first": lambda n: [i if i < context else 0 for i in range(n)],
        }
        for says, where in positions.items():
            if gives(lambda step, where=where: (sum(step.history, []), where(len(sum(step.history, [])))), bad):
                self.wrong(
                    what, "cache-past-window",
                    f"the cache grows past the context of {context} tokens; {says}",
                    "when the cache is full, empty it and run the last tokens anew, or refuse to go on",
                    proof=proof, shortest=shown,
                )  # fmt: skip
                return
        for says, where in positions.items():

            def windowed(step: Step, where=where):
                ids = sum(step.history, [])
                i = torch.arange(len(ids))
                return ids, where(len(ids)), (i <= i[:, None]) & (i > i[:, None] - context)

            if gives(windowed, bad):
                self.wrong(
                    what, "cache-past-window",
                    f"beyond the context of {context} tokens, the cache keeps the last keys and values, which were "
                    f"computed at other positions; {says}",
                    "when the cache is full, empty it and run the last tokens anew, or refuse to go on",
                    proof=proof, shortest=shown,
                )  # fmt: skip
                return
        step = bad[0]
        self.wrong(
            what, "window-logits-differ",
            f"after {len(step.prefix)} tokens, where the context has {context}, the logits are not those of the last tokens",
            "when the cache is full, empty it and run the last tokens anew, or refuse to go on",
            error=bench.error(step.logits, bench.last(step.prefix[-context:])), shortest=shown,
        )  # fmt: skip

    # Ends

    def ends(self) -> None:
        """Does it end with the end token, and only there?"""
        what = "the end token"
        if not self.decoder.has("eos_id"):
            self.not_made(what, "it has no parameter for one")
            return
        prompt, new = self.bench.ids(5, 80), 6
        plain = self.run([prompt], new)
        seed = 80
        while plain.error is None and seed < 100 and len({*plain.new[0], *prompt}) < new + len(prompt):
            seed += 1
            prompt = self.bench.ids(5, seed)
            plain = self.run([prompt], new)
        if plain.error is not None or len(plain.new[0]) != new or len({*plain.new[0], *prompt}) < new + len(prompt):
            self.not_made(what, plain.failure or "no prompt gives tokens that are all different")
            return
        full = plain.new[0]
        results: dict[int, str] = {}
        for place in (0, 2, 4):
            run = self.run([prompt], new, eos_id=full[place])
            if run.error is not None:
                self.not_made(what, run.failure)
                return
            results[place] = ending(run.new[0], full, place)
        kinds = set(results.values())
        shown = {"prompt": prompt, "eos_id": full[0], "new_tokens": new}
        proof = f"the same at {len(results)} places"
        remedy = "stop as soon as the new token is the end token"
        if kinds in ({"kept"}, {"dropped"}):
            self.right(what)
            convention = "keeps the end token in its result" if kinds == {"kept"} else "leaves the end token out"
            self.report.notes.append(f"{self.decoder.name} {convention}")
        elif kinds == {"ignored"}:
            self.wrong(what, "end-ignored", "it goes on after the end token", remedy, proof=proof, shortest=shown)
        elif results[0] == "ignored" and {results[2], results[4]} in ({"kept"}, {"dropped"}):
            self.wrong(
                what, "end-missed-at-first-token", "it goes on if the first new token is the end token", remedy,
                proof="at later places it ends", shortest=shown,
            )  # fmt: skip
        elif kinds == {"late"}:
            self.wrong(
                what, "end-counted-late", "one token more follows the end token", remedy, proof=proof, shortest=shown
            )
        elif results[2] == results[4] == "lost":
            self.wrong(
                what, "end-token-lost", "the token before the end token is lost with it",
                "drop the end token once, or not at all", proof=proof, shortest=shown,
            )  # fmt: skip
        elif kinds <= {"kept", "dropped"}:
            self.wrong(
                what, "end-token-inconsistent", f"the end token is {results[0]} at the first place, {results[4]} later",
                "treat it alike wherever it comes", proof=proof, shortest=shown,
            )  # fmt: skip
        else:
            self.wrong(
                what, "end-handled-otherwise",
                f"with the end token {full[2]}, {full} becomes {self.run([prompt], new, eos_id=full[2]).new[0]}",
                remedy, shortest=shown,
            )  # fmt: skip
        self.end_in_prompt(prompt, full)
        self.end_zero(prompt, full, results)
        if kinds in ({"kept"}, {"dropped"}):
            self.rows_end()

    def end_in_prompt(self, prompt: list[int], full: list[int]) -> None:
        what = "an end token in the prompt"
        for place in (0, 2):
            run = self.run([prompt], len(full), eos_id=prompt[place])
            if run.error is not None:
                self.not_made(what, run.failure)
                return
            if run.new[0] != full:
                self.wrong(
                    what, "end-token-of-prompt-counted",
                    f"an end token in the prompt changes the result: {full} becomes {run.new[0]}",
                    "look for the end token among the new tokens only",
                    proof="without an end token the same prompt gives all tokens",
                    shortest={"prompt": prompt, "eos_id": prompt[place], "new_tokens": len(full)},
                )  # fmt: skip
                return
        self.right(what)

    def end_zero(self, prompt: list[int], full: list[int], results: dict[int, str]) -> None:
        """Is an end token with the id 0 one too? The vocabulary is renumbered for it."""
        what = "the end token 0"
        tables, token = self.bench.tables, full[2]
        matrices = {t.data_ptr(): t for t in (tables.tokens, tables.head)}.values()
        if results[2] not in ("kept", "dropped") or 0 in (*prompt, *full):
            return
        if any(t.shape[0] != self.bench.vocab_size for t in matrices):
            self.not_made(what, "the vocabulary cannot be renumbered")
            return
        swap = [token, 0]
        with torch.no_grad():
            for matrix in matrices:
                matrix[[0, token]] = matrix[swap]
            try:
                run = self.run([prompt], len(full), eos_id=0)
            finally:
                for matrix in matrices:
                    matrix[[0, token]] = matrix[swap]
        renumbered = [0 if one == token else one for one in full]
        if run.error is None and ending(run.new[0], renumbered, 2) == results[2]:
            self.right(what)
        elif run.error is None and run.new[0] == renumbered:
            self.wrong(
                what, "end-id-0-ignored", "an end token with the id 0 is ignored",
                "compare with None: if eos_id is not None", proof="with another id it ends",
                shortest={"eos_id": 0},
            )  # fmt: skip

    def rows_end(self) -> None:
        """Does each row of a batch end by itself?"""
        what = "each row of a batch ends by itself"
        new = 6
        for seed in range(200, 230):
            prompts = [self.bench.ids(5, seed), self.bench.ids(5, seed + 500)]
            singles = [self.run([prompt], new).new for prompt in prompts]
            if not all(singles):
                continue
            a, b = singles[0][0], singles[1][0]
            if a[2] in (*a[:2], *b, *prompts[0], *prompts[1]) or len({*a}) < new or len({*b}) < new:
                continue
            break
        else:
            self.not_made(what, "no two prompts give different tokens")
            return
        together = self.run(prompts, new)
        if together.error is not None or together.new != [a, b]:
            self.not_made(what, together.failure or "without an end token, its rows are not those of single prompts")
            return
        for order in ((0, 1), (1, 0)):
            run = self.run([prompts[n] for n in order], new, eos_id=a[2])
            if run.error is not None:
                self.not_made(what, f"it takes one prompt at a time: {run.failure}"[:300])
                return
            ended, going = run.new[order.index(0)], run.new[order.index(1)]
            shown = {"prompts": [prompts[n] for n in order], "eos_id": a[2], "new_tokens": new}
            proof = "alone, each prompt gives " + f"{a[:3]} and {b}"
            if going[: len(b)] != b:
                self.wrong(
                    what, "rows-end-together",
                    f"a row is cut off when another one ends: {b} becomes {going}",
                    "keep a flag for each row; stop when all have ended", proof=proof if going == b[: len(going)] else "",
                    shortest=shown,
                )  # fmt: skip
                return
            if ending(ended, a, 2) not in ("kept", "dropped"):
                went_on = ended[:5] == a[:5] or len(set(ended[3:])) > 1
                self.wrong(
                    what, "row-continues-after-end" if went_on else "row-changed-by-batch",
                    f"a row that has ended goes on in a batch: {ended}" if went_on
                    else f"in a batch a row becomes {ended}",
                    "once a row has ended, append padding to it", proof=proof, shortest=shown,
                )  # fmt: skip
                return
        self.right(what)

    # Batches

    def batch(self) -> None:
        """Does a row of a batch get what its prompt gets alone?"""
        what = "rows of a batch are those of single prompts"
        prompts = [self.bench.ids(5, 90 + n) for n in range(3)]
        together = self.run(prompts, 4)
        if together.error is not None:
            self.not_made(what, f"it takes one prompt at a time: {together.failure}"[:300])
            return
        alone = [self.run([prompt], 4).new[0] for prompt in prompts]
        if together.new == alone:
            self.right(what)
            return
        if self.unreliable:
            self.not_made(what, "its steps are wrong already for single prompts")
            return
        first = all(row == together.new[0] for row in together.new) and together.new[0] == alone[0]
        self.wrong(
            what,
            "first-row-for-all" if first else "batch-rows-differ",
            "all rows of a batch get the tokens of the first" if first
            else f"prompts that give {alone} alone give {together.new} in a batch",
            "keep the batch dimension: argmax(dim=-1), of each row's own logits",
            proof="the first prompt alone gives the tokens of all rows" if first else "",
            shortest={"prompts": prompts[:2], "new_tokens": 1},
        )  # fmt: skip

    def padding(self) -> None:
        """Do prompts of different lengths get in a batch what they get alone?"""
        what = "prompts of different lengths in a batch"
        one = self.decoder
        prompts = [self.bench.ids(3, 100), self.bench.ids(6, 101)]
        single = [self.run([prompt], 4) for prompt in prompts]
        if any(run.error is not None for run in single):
            self.not_made(what, single[0].failure or single[1].failure)
            return
        if self.unreliable:
            self.not_made(what, "its steps are wrong already for single prompts")
            return
        alone = [run.new[0] for run in single]
        pad = next(
            n for n in range(self.bench.vocab_size - 1, 0, -1) if n not in (*prompts[0], *prompts[1], *sum(alone, []))
        )
        ragged = self.bench.run(replace(one, form="rows"), prompts, 4, **{**self.greedy, "pad_id": pad})
        by_itself = ragged.error is None
        tries: dict[str, Run] = {}
        if by_itself:
            tries["its own"] = ragged
        elif one.has("attention_mask") or one.has("lengths") or one.has("pad_id"):
            for side in ("left", "right"):
                padded = [pad_to(row, 6, pad, side) for row in prompts]
                masks = torch.tensor([pad_to([1] * len(row), 6, 0, side) for row in prompts])
                lengths = torch.tensor([len(row) for row in prompts])
                tries[side] = self.run(padded, 4, attention_mask=masks, lengths=lengths, pad_id=pad)
        if not tries:
            self.not_made(what, "it takes prompts of one length")
            return
        ran = {side: run for side, run in tries.items() if run.error is None}
        if not ran:
            self.not_made(what, next(iter(tries.values())).failure[:300])
            return
        if any([row[:4] for row in run.new] == alone or [row[-4:] for row in run.new] == alone for run in ran.values()):
            self.right(what)
            return
        if not by_itself and not one.has("attention_mask") and not one.has("lengths"):
            self.not_made(what, "it takes prompts of one length")  # pad_id is for rows that have ended
            return
        self.named_padding(what, ran, prompts, alone, pad)

    def named_padding(self, what, ran: dict[str, Run], prompts, alone, pad: int) -> None:
        shown = {"prompts": prompts, "new_tokens": 1}
        for run in ran.values():
            if not run.calls or len(run.calls[0].ids) != 2 or run.calls[0].logits is None:
                continue
            ids = run.calls[0].ids[0].tolist()
            short, found = prompts[0], run.calls[0].last[0]
            start = next((n for n in range(len(ids) - len(short) + 1) if ids[n : n + len(short)] == short), None)
            if start is None:
                continue
            left = start > 0
            real = torch.arange(len(ids)).ge(start) & torch.arange(len(ids)).lt(start + len(short))
            masked = torch.ones(len(ids), len(ids)).tril().bool() & (real | torch.eye(len(ids)).bool())
            moved = [max(n - start, 0) for n in range(len(ids))]
            if not left:
                if self.replayed(found, [(ids, None, None), (ids, None, masked)]):
                    self.wrong(
                        what, "padding-on-wrong-side",
                        "the padding is after the prompt, and the next token is that after the padding",
                        "pad on the left, or read each row's logits at its own last token",
                        proof="its own forward pass over prompt and padding gives these logits", shortest=shown,
                    )  # fmt: skip
                    return
                continue
            if self.replayed(found, [(ids, None, None), (ids, moved, None)]):
                self.wrong(
                    what, "padding-seen", "the tokens see the padding before them",
                    "mask the padding: scores of padded keys are -inf",
                    proof="its own forward pass over padding and prompt gives these logits", shortest=shown,
                )  # fmt: skip
                return
            if self.replayed(found, [(ids, None, masked)]):
                self.wrong(
                    what, "positions-count-padding", "the positions count the padding",
                    "positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)",
                    proof="its own forward pass, with the padding masked, gives these logits", shortest=shown,
                )  # fmt: skip
                return
        run = next(iter(ran.values()))
        self.wrong(
            what, "padded-rows-differ",
            f"prompts that give {alone} alone give {run.new} in a batch",
            "mask the padding, and count positions without it, in every step", shortest=shown,
        )  # fmt: skip

    def replayed(self, found: torch.Tensor, triples: list[tuple]) -> bool:
        for made in triples:
            try:
                if self.bench.equal(found, self.bench.last(*made)):
                    return True
            except NotReplayable:
                continue
        return False

    # Sampling

    def sampling(self) -> None:
        """Are the probabilities those of the settings?"""
        one = self.decoder
        on: dict[str, Any] = {}
        if one.has("do_sample"):
            on["do_sample"] = True
        if one.has("greedy"):
            on["greedy"] = False
        if not (on or one.has("temperature") or one.has("top_k") or one.has("top_p")):
            self.not_made("sampling", "it has no settings for sampling")
            return
        if one.has("use_cache"):
            on["use_cache"] = True
        off = dict(on)
        if one.has("temperature"):
            off["temperature"] = 1.0
        if one.has("top_k"):
            off["top_k"] = (
                one.defaults.get("top_k") if one.defaults.get("top_k", 1) in (None, 0) else self.bench.vocab_size
            )
        if one.has("top_p"):
            off["top_p"] = one.defaults.get("top_p") if one.defaults.get("top_p", 0) in (None, 1.0) else 1.0
        kinds = {"temperature": (0.6, 1.7), "top_k": (3, 5), "top_p": (0.5, 0.8)}
        right_so_far = True
        for setting, values in kinds.items():
            if one.has(setting):
                right_so_far &= self.one_setting(setting, values, off)
        settings = [s for s in kinds if one.has(s)]
        if right_so_far and len(settings) > 1:
            self.settings_together({s: kinds[s] for s in settings}, off)
        if right_so_far and one.has("top_k"):
            self.rows_have_thresholds({**off, "top_k": 3})

    def drawn(self, prompt: list[int], settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, float] | str:
        """Logits (V,), probabilities by id (V,) and the rounding of the first draw, or why there are none."""
        run = self.bench.run(self.decoder, [prompt], 1, **settings)
        if run.error is not None:
            return run.failure
        if not run.draws:
            return "no draw was seen: it does not use torch.multinomial"
        draw = run.draws[0]
        if draw.call < 0 or run.calls[draw.call].logits is None:
            return "its logits were not seen"
        z = run.calls[draw.call].last[0].double()
        shares = draw.probabilities.reshape(-1, draw.probabilities.shape[-1])[0].double()
        bound = EXACT if draw.probabilities.dtype == torch.float64 else SINGLE
        shares = shares / shares.sum()
        if not torch.isfinite(shares).all():
            return "its probabilities are not finite"
        columns = shares.topk(min(12, int((shares > 0).sum()))).indices.tolist()
        whole = len(shares) == len(z)
        by_id = torch.zeros_like(z)
        ids = {}
        for column in columns[:4] if whole else columns:
            picked = self.bench.run(
                self.decoder, [prompt], 1, choose=lambda p, column=column: torch.full(p.shape[:-1], column), **settings
            )
            if picked.error is not None or not picked.new[0]:
                return picked.failure or "a run returned nothing"
            ids[column] = picked.new[0][0]
        if whole and all(column == token for column, token in ids.items()):
            return z, shares, bound
        if whole:
            # Sorted: the columns are ranks, of which these become those ids.
            order = z.argsort(descending=True)
            if all(int(order[column]) == token for column, token in ids.items()):
                return z, torch.zeros_like(z).scatter(0, order, shares), bound
        for column, token in ids.items():
            if not 0 <= token < len(z):
                return f"it returns {token}, which is no id"
            by_id[token] += shares[column]
        return z, by_id, bound

    def one_setting(self, setting: str, values: tuple[float, ...], off: dict[str, Any]) -> bool:
        what = f"sampling with {self.decoder.parameters[setting]}"
        common: set[int] | None = None
        count, worst = 0, 0.0
        undecided = ""
        divided_after = False
        for value in values:
            for seed in (0, 1):
                prompt = self.bench.ids(5, 110 + seed)
                drawn = self.drawn(prompt, {**off, setting: value})
                if isinstance(drawn, str):
                    undecided = drawn
                    continue
                z, found, bound = drawn
                right = SETTINGS[setting][0].apply(z, value, z).softmax(-1)
                worst = max(worst, float((right - found).abs().max()))
                fits = set(variants_that_give(setting, z, value, found, bound))
                common = fits if common is None else common & fits
                count += 1
                if setting == "temperature":
                    run = self.bench.run(self.decoder, [prompt], 1, **{**off, setting: value})
                    divided_after |= any(by == value and after for by, after in run.divided)
        if common is None:
            if "no draw" in undecided:
                return self.never_samples(what, {**off, setting: values[-1]}, undecided)
            self.not_made(what, undecided)
            return False
        name = self.decoder.parameters[setting]
        if 0 in common:
            self.right(what)
            return True
        shown = {"prompt": self.bench.ids(1, 110), "new_tokens": 1, name: values[0]}
        if common:
            variant = SETTINGS[setting][min(common)]
            says, kind = variant.says, variant.name
            if kind == "temperature-ignored" and divided_after:
                kind = "temperature-after-softmax"
                says = "the probabilities are divided by the temperature, after softmax, which has no effect on them"
            self.wrong(
                what, kind, says, variant.remedy,
                proof=f"it gives the probabilities of {count} draws", error=worst, shortest=shown,
            )  # fmt: skip
            return False
        self.wrong(
            what, f"{setting.replace('_', '-')}-wrong",
            f"with {name}={values[0]} the probabilities differ by up to {worst:.2g} from those of the setting",
            {"temperature": "divide the logits by it"}.get(setting, "filter the logits before softmax"),
            error=worst, shortest=shown,
        )  # fmt: skip
        return False

    def never_samples(self, what: str, settings: dict[str, Any], why: str) -> bool:
        prompt = self.bench.ids(5, 115)
        runs = [self.bench.run(self.decoder, [prompt], 6, choose=None, seed=seed, **settings) for seed in range(8)]
        if all(run.error is None for run in runs) and len({str(run.new) for run in runs}) == 1:
            if all(steps_of(run)[1] for run in runs):
                if all(self.decoder.has(s) for s in ("temperature",)) or self.decoder.has("do_sample"):
                    self.wrong(
                        what, "sampling-is-greedy", "asked to sample, it always takes the most probable token",
                        "draw with torch.multinomial(probs, num_samples=1)",
                        proof="8 seeds give the argmax of every step", shortest={"prompt": prompt[:1], "new_tokens": 1},
                    )  # fmt: skip
                    return False
        self.not_made(what, why)
        return False

    def settings_together(self, kinds: dict[str, tuple[float, ...]], off: dict[str, Any]) -> None:
        what = "sampling with several settings"
        for n in (0, 1):
            values = {setting: pair[n] for setting, pair in kinds.items()}
            drawn = self.drawn(self.bench.ids(6, 120 + n), {**off, **values})
            if isinstance(drawn, str):
                self.not_made(what, drawn)
                return
            z, found, bound = drawn
            errors = [float((right - found).abs().max()) for right in right_distributions(z, values)]
            if min(errors) > bound:
                self.wrong(
                    what, "settings-interfere",
                    f"with {values} the probabilities differ by {min(errors):.2g} from those of these settings, each of "
                    "which is right alone",
                    "logits / temperature, then top_k, then top_p, then softmax", error=min(errors),
                )  # fmt: skip
                return
        self.right(what)

    def rows_have_thresholds(self, settings: dict[str, Any]) -> None:
        what = "sampling in a batch"
        prompts = [self.bench.ids(5, 130 + n) for n in range(3)]
        run = self.bench.run(self.decoder, prompts, 1, **settings)
        if run.error is not None or not run.draws or run.draws[0].probabilities.shape != (3, self.bench.vocab_size):
            self.not_made(what, run.failure[:200] or "it draws from the largest alone")
            return
        z = run.calls[run.draws[0].call].last.double()
        found = run.draws[0].probabilities.double()
        found = found / found.sum(-1, keepdim=True)
        bound = EXACT if run.draws[0].probabilities.dtype == torch.float64 else SINGLE
        right = torch.stack([right_distributions(row, {"top_k": settings["top_k"]})[0] for row in z])
        if float((right - found).abs().max()) <= bound:
            self.right(what)
            return
        least = z[0].topk(settings["top_k"]).values[-1]
        shared = z.masked_fill(z < least, -torch.inf).softmax(-1)
        same = float((shared - found).abs().max()) <= bound
        self.wrong(
            what, "top-k-of-first-row" if same else "batch-probabilities-differ",
            "the threshold of the first row is used for all" if same else "in a batch the probabilities are others",
            "values[..., [-1]] keeps a threshold for each row",
            proof="it gives the probabilities of all rows" if same else "", shortest={"prompts": prompts},
        )  # fmt: skip

    # Beams

    def beams(self) -> None:
        """Does the cache of each beam follow it?"""
        what = "the cache follows the beams"
        if not self.decoder.has("num_beams"):
            self.not_made(what, "it has no beams")
            return
        if self.unreliable:
            self.not_made(what, "its steps are wrong already without beams")
            return
        width = 3
        runs = [self.run([self.bench.ids(5, 140 + n)], 6, num_beams=width) for n in range(4)]
        if failed := next((run for run in runs if run.error is not None), None):
            self.not_made(what, failed.failure[:300])
            return
        cached = [run for run in runs if len(run.calls) > 2 and run.calls[-1].ids.shape == (width, 1)]
        if not cached:
            self.not_made(what, "its beams use no cache")
            return
        wrong = [run for run in cached if not self.follows(run)]
        if not wrong:
            self.right(what)
            return
        kept = all(self.rows_kept(run) for run in cached)
        self.wrong(
            what, "cache-not-reordered",
            "when beams change places, the cache stays in the old order" if kept
            else "the logits of the beams are not those of the sequences that they become",
            "reorder the cache of every layer with the indices of the beams that were kept: keys[beam_idx]",
            proof=f"in every row, the logits of all steps of {len(cached)} prompts are those of the tokens fed to that row"
            if kept else "",
            shortest={"prompt": wrong[0].prompts[0], "num_beams": width, "new_tokens": len(wrong[0].new[0])},
        )  # fmt: skip

    def lineages(self, run: Run) -> list[list[list[int]]]:
        """For each cached step, the sequences whose logits its rows have; a row with none of them is left out."""
        sequences = [run.prompts[0]]
        steps = []
        for call in run.calls:
            if call.logits is None or call.ids.shape[1] > 1:
                continue
            grown = []
            for row in range(len(call.ids)):
                token = int(call.ids[row, -1])
                for before in sequences:
                    if self.bench.equal(call.last[row], self.bench.last([*before, token])):
                        grown.append([*before, token])
                        break
            sequences = grown
            steps.append(grown)
        return steps

    def follows(self, run: Run) -> bool:
        """Whether the result, cut at each step, is one of the sequences whose logits were computed there."""
        best = run.new[0]
        steps = self.lineages(run)
        return all(
            any(sequence == [*run.prompts[0], *best[: n + 1]] for sequence in sequences)
            for n, sequences in enumerate(steps[: len(best)])
            if n + 1 < len(best)
        )

    def rows_kept(self, run: Run) -> bool:
        """Whether each row's logits are those of the tokens that were fed to that row."""
        fed: list[list[int]] = []
        for call in run.calls:
            if call.ids.shape[1] > 1:
                fed = [run.prompts[0] for _ in range(3)]
                continue
            fed = [[*row, int(token)] for row, token in zip(fed, call.ids[:, -1], strict=False)]
            if not all(self.bench.equal(call.last[n], self.bench.last(row)) for n, row in enumerate(fed)):
                return False
        return True


def ending(found: list[int], full: list[int], place: int) -> str:
    """How a result ends whose end token is full[place]: kept, dropped, lost, late or ignored; else "other"."""
    if found == full:
        return "ignored"
    for kind, size in (("kept", place + 1), ("dropped", place), ("late", place + 2), ("lost", place - 1)):
        # What follows may be padding, the same id all along.
        if (
            size >= 0
            and found[:size] == full[:size]
            and len(set(found[size:])) <= (1 if kind in ("kept", "dropped") else 0)
        ):
            if kind != "dropped" or len(found) == size or found[size] not in full:
                return kind
    return "other"


def pad_to(row: list[int], length: int, pad: int, side: str) -> list[int]:
    padding = [pad] * (length - len(row))
    return padding + row if side == "left" else row + padding


__all__ = ["KEEP", "Examination", "most_probable", "ready"]
