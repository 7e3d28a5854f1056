"""The choice of the next token, where the most probable is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .draws import SINGLE, Draws
from .examination import NEW
from .recording import Run
from .steps import steps_of

TRUE_ARGMAX = "take torch.argmax(logits[:, -1], dim=-1, keepdim=True)"
LAST_ROW = "logits[:, -1, :]"
EVAL = "call model.eval() before generating, and model.train() only after it"


@dataclass(frozen=True)
class Rule:
    """A way to choose a token from the logits (T, V) of a forward pass."""

    name: str
    says: str
    remedy: str
    choose: Callable[[torch.Tensor], int]


RULES = [
    Rule("wrong-row", "the token is chosen from the logits of the first place, not of the last", LAST_ROW,
         lambda x: int(x[0].argmax())),
    Rule("wrong-row", "the token is chosen from the logits of the second place, not of the last", LAST_ROW,
         lambda x: int(x[1].argmax())),
    Rule("wrong-row", "the token is chosen from the logits of the last place but one", LAST_ROW,
         lambda x: int(x[-2].argmax())),
    Rule("wrong-row", "the token is chosen from the logits of the last place but two", LAST_ROW,
         lambda x: int(x[-3].argmax())),
    Rule("wrong-row", "the token is chosen from the largest logits of all places, not of the last", LAST_ROW,
         lambda x: int(x.amax(0).argmax())),
    Rule("wrong-row", "the token is chosen from the mean of the logits of all places, not of the last", LAST_ROW,
         lambda x: int(x.mean(0).argmax())),
    Rule("least-probable", "it takes the least probable token", TRUE_ARGMAX, lambda x: int(x[-1].argmin())),
    Rule("second-most-probable", "it takes the second most probable token", TRUE_ARGMAX,
         lambda x: int(x[-1].topk(2).indices[1])),
    Rule("top-k-sorted-indices", "the place among the sorted logits is taken for an id", TRUE_ARGMAX, lambda x: 0),
]  # fmt: skip


class Choice(Draws):
    """How a decoder is told to take the most probable token, and whether it does."""

    asked = False
    many_beams = False
    width = 3  # of beams that are asked for

    def choose_settings(self) -> None:
        one, prompt = self.decoder, [self.bench.ids(5, 2)]
        chosen = self.settings
        if one.has("use_cache"):
            chosen["use_cache"] = True
        if one.has("num_beams"):
            chosen["num_beams"] = 1
            if self.run(prompt, 2).error is not None:
                del chosen["num_beams"]
                self.many_beams = True
        elif (width := self.beams_seen()) > 1:
            self.width, self.many_beams = width, True
        if one.has("do_sample"):
            chosen["do_sample"], self.asked = False, True
        elif one.has("greedy"):
            chosen["greedy"], self.asked = True, True
        elif one.has("temperature"):
            default = one.defaults.get("temperature")
            zero = self.run(prompt, 2, temperature=0.0)
            # Where it draws otherwise, and not at 0, 0 asks for the most probable token.
            only_there = not zero.draws and bool(self.run(prompt, 2).draws)
            works = zero.error is None and (steps_of(zero)[1] or not default or only_there)
            if works and (not default or all(draw.certain for draw in zero.draws)):
                chosen["temperature"], self.asked = 0.0, True
            elif default is None:
                chosen["temperature"] = 1.0
        self.asked = self.asked or one.says_greedy

    def beams_seen(self) -> int:
        """How many beams it has for one prompt, without a parameter for their number; 1 if it is no beam search."""
        runs = [self.run([self.bench.ids(5, seed)], new) for seed, new in ((2, 3), (2, 5), (3, 5), (4, 5), (5, 5))]
        if any(run.error is not None or not run.calls for run in runs):
            return 1
        rows = int(runs[0].calls[-1].ids.shape[0])
        if rows == 1 and "beam" in self.decoder.name.lower():  # one after the other
            return (len(runs[1].calls) - len(runs[0].calls)) // 2
        return 1 if all(steps_of(run)[1] for run in runs) else rows

    def count(self) -> None:
        """Does it return as many ids as it was asked for?"""
        what, lengths = "number of new tokens", {}
        for seed, new in enumerate((1, 2, 3, 5)):
            runs = self.runs(what, [self.bench.ids(5, 10 + seed)], new)
            if runs is None:
                return
            lengths[new] = len(runs[0].new[0])
        off = {length - new for new, length in lengths.items()}
        if off == {0}:
            self.right(what)
        elif len(off) == 1:
            size = off.pop()
            many = f"{abs(size)} token{'s' * (abs(size) > 1)} too {'many' if size > 0 else 'few'}"
            self.wrong(
                what,
                "wrong-number-of-tokens",
                f"it returns {many}: asked for {list(lengths)}, it gives {list(lengths.values())}",
                "run the loop max_new_tokens times, and append each token once",
                proof=f"the same for {len(lengths)} lengths",
                shortest={"prompt": self.bench.ids(1, 0), "new_tokens": 1},
            )
        else:
            self.not_made(what, f"asked for {list(lengths)} tokens, it gives {list(lengths.values())}")

    def repeatable(self) -> bool:
        """Does the same prompt give the same logits again?"""
        what = "the same logits each time"

        def differ(**options: Any) -> bool | None:
            runs = [self.run([self.bench.ids(6, 20)], 3, seed=seed, **options) for seed in (0, 1)]
            if failed := next((run for run in runs if run.error is not None), None):
                self.fails(what, failed, 3)
                return None
            pairs = [(a, b) for a, b in zip(*(steps_of(r)[0] for r in runs), strict=False) if a.prefix == b.prefix]
            if not pairs:
                self.not_made(what, "no forward pass was seen")
                return None
            return not all(self.bench.equal(a.logits, b.logits) for a, b in pairs)

        found = differ()
        if found is None:
            return False
        if not found:
            self.right(what)
            return True
        still = differ(dropout=False) is False
        self.wrong(
            what,
            "dropout-on" if still else "not-repeatable",
            "dropout is on while it generates" if still else "the same prompt gives other logits each time",
            EVAL if still else "look for random numbers in the forward pass",
            proof="without dropout the logits are equal, with it they are not" if still else "",
            shortest={"prompt": self.bench.ids(1, 0), "new_tokens": 1},
        )
        return False

    def greedily(self) -> None:
        """Where it is asked for the most probable token, does it take it?"""
        what = "the most probable token"
        prompts = [self.bench.ids(n, 30 + n) for n in (6, 4, 7)]
        runs = self.runs(what, prompts, NEW)
        if runs is None:
            return
        draws = any(run.draws for run in runs)
        if not self.asked and (draws or any(self.decoder.has(s) for s in ("temperature", "top_k", "top_p"))):
            self.place_of_draws(what, runs)
            return
        if any(not draw.certain for run in runs for draw in run.draws):
            draw, run = next((d, r) for r in runs for d in r.draws if not d.certain)
            others = [self.run([prompts[0]], NEW, choose=None, seed=seed).new for seed in range(6)]
            self.wrong(
                what,
                "greedy-samples",
                f"asked for the most probable token ({self.told()}), it draws at random",
                TRUE_ARGMAX,
                proof=f"it draws from {'softmax(logits)' if self.plain(run, draw) else 'several tokens'}; 6 seeds give "
                f"{len({str(new) for new in others})} results",
                shortest={"prompt": self.bench.ids(1, 0), "new_tokens": 1},
            )
        elif all(steps_of(run)[1] for run in runs):
            self.right(what)
        else:
            self.decided_otherwise(what, runs)

    def place_of_draws(self, what: str, runs: list[Run]) -> None:
        """It draws: from the logits of the last place? No setting moves the largest of the logits."""
        if not all(steps_of(run)[1] for run in runs):
            for rule in RULES:
                if rule.name == "wrong-row" and all(follows(run, rule) for run in runs):
                    proof = f"the most probable draws are those of all {sum(len(run.new[0]) for run in runs)} ids"
                    shortest = self.smallest(lambda run: not steps_of(run)[1])
                    self.wrong(what, rule.name, rule.says, rule.remedy, proof=proof, shortest=shortest)
                    return
        self.not_made(what, "it cannot be asked for the most probable token")

    def plain(self, run: Run, draw) -> bool:
        """Whether a draw is from softmax(logits)."""
        z, shares = run.calls[draw.call].last[0].double(), draw.probabilities.reshape(-1, draw.probabilities.shape[-1])
        shares = shares[0].double() / shares[0].double().sum()
        return shares.shape == z.shape and float((z.softmax(-1) - shares).abs().max()) < SINGLE

    def at_zero(self) -> None:
        """Where the temperature is right otherwise, does 0 mean 1?"""
        one = self.decoder
        if self.asked or not one.has("temperature") or not one.defaults.get("temperature"):
            return
        run = self.run([self.bench.ids(5, 2)], 2, temperature=0.0)
        if run.error is None and run.draws and all(self.plain(run, draw) for draw in run.draws):
            name = one.parameters["temperature"]
            self.wrong(
                "the most probable token",
                "greedy-samples",
                f"with {name}=0, which asks for the most probable token, it draws from softmax(logits)",
                f"take the argmax where {name} is 0, or refuse it",
                proof="the probabilities of all draws are softmax(logits)",
                shortest={"prompt": self.bench.ids(1, 0), "new_tokens": 1, name: 0.0},
            )

    def told(self) -> str:
        named = {self.decoder.parameters[s]: v for s, v in self.settings.items() if s not in ("use_cache", "num_beams")}
        return ", ".join(f"{name}={value}" for name, value in named.items()) or self.decoder.name

    def decided_otherwise(self, what: str, runs: list[Run]) -> None:
        """The new ids are not the argmax of the last logits: of which, then?"""

        if all(token == 0 for run in runs for token in run.new[0]) and self.over_rows(self.settings):
            return
        for rule in RULES:
            if all(follows(run, rule) for run in runs):
                proof = f"it gives all {sum(len(run.new[0]) for run in runs)} ids of {len(runs)} prompts"
                shortest = self.smallest(lambda run: not steps_of(run)[1])
                self.wrong(what, rule.name, rule.says, rule.remedy, proof=proof, shortest=shortest)
                return
        if self.decoder.others:
            others = ", ".join(f"{name}={value}" for name, value in self.decoder.others.items())
            self.not_made(what, f"it has settings that are unknown here: {others}")
            return
        self.wrong(
            what,
            "not-the-most-probable",
            f"after the prompt {runs[0].prompts[0]} it gives {runs[0].new[0]}, which have not the largest logits",
            TRUE_ARGMAX,
        )


def follows(run: Run, rule: Rule) -> bool:
    """Whether a rule gives all new ids of a run, from consecutive forward passes."""
    calls = [call.logits[0] for call in run.calls if call.logits is not None]
    new = run.new[0]
    for start in range(len(calls) - len(new) + 1):
        try:
            if new and [rule.choose(logits) for logits in calls[start : start + len(new)]] == new:
                return True
        except (IndexError, RuntimeError):
            continue
    return False
