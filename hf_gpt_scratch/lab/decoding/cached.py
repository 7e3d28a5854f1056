"""The steps of a generation, with a cache or without: are their logits those of the whole sequence?"""

from typing import Any

from .examination import NEW, Examiner
from .recording import NotReplayable, Run
from .steps import RESET, STALE, explain, explain_stale, first_difference, observed_positions, steps_of


class Cached(Examiner):
    def steps(self) -> None:
        """Are the logits of each step those of the whole sequence?"""
        what = "each step's logits are those of the whole sequence"
        for use_cache in (True, False) if self.decoder.has("use_cache") else (None,):
            options = {} if use_cache is None else {"use_cache": use_cache}
            runs = self.runs(what, [self.bench.ids(n, 40 + n) for n in (7, 5, 6)], NEW, **options)
            if runs is None:
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
        if not self.bench.causal:
            self.not_made(what, "without a cache, its forward pass sees later tokens")
            return False
        worst = max(error for _, error in differences)
        n, cached = differences[0][0], any(step.cached for steps in all_steps for step in steps)
        hypotheses = explain(self.bench, all_steps)
        shortest = self.smallest(self.differs, **options)
        passes = "cached passes" if cached else "the forward passes"
        if hypotheses is None:
            positions = self.positions_seen(shortest, options)
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
            if one.name == "wrong-tokens-fed":
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

    def differs(self, run: Run) -> bool:
        return first_difference(self.bench, steps_of(run)[0]) is not None

    def positions_seen(self, shortest: dict[str, Any] | None, options: dict[str, Any]) -> str:
        """The positions in the run of the shortest prompt, where they are not 0, 1, 2, …"""
        if shortest is None:
            return ""
        steps = steps_of(self.run([shortest["prompt"]], shortest["new_tokens"], **options))[0]
        seen = observed_positions(steps[-1]) if steps else None
        if seen is None or seen == list(range(len(seen))):
            return ""
        return f"; with the shortest prompt, the positions of its {len(seen)} tokens are {seen}"

    def second_prompt(self) -> None:
        """Is the second generation with the same model that of a fresh one?"""
        what = "a second prompt is not affected by the first"
        if not self.decoder.empties:
            self.not_made(what, "its cache is in the model, and no method is known that empties it, as reset_cache()")
            return
        all_steps, errors = [], []
        for seed in (0, 1, 2):
            module = self.bench.fresh()
            self.bench.restore_state()
            first = self.run([self.bench.ids(4 + seed, 50 + seed)], 3, module=module)
            prompt = self.bench.ids(5, 60 + seed)
            again = self.run([prompt], 4, module=module)
            fresh = self.run([prompt], 4)
            if failed := next((run for run in (first, fresh) if run.error is not None), None):
                self.fails(what, failed, 4)
                return
            if again.error is not None:
                self.wrong(
                    what,
                    "cache-not-reset",
                    f"something of the first prompt stays in the model, and a second prompt fails: {again.failure}",
                    RESET,
                    proof="a fresh copy of the model accepts the same prompt",
                    shortest={"prompts": [first.prompts[0], prompt], "new_tokens": 4},
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
        if not proven and self.unreliable:
            self.not_made(what, "its steps are wrong already for single prompts")
            return
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
            shortest=self.shortest_pair(),
        )

    def shortest_pair(self) -> dict[str, Any] | None:
        """The shortest two prompts of one length of which the second shows the first."""
        for size in range(1, 6):
            module = self.bench.fresh()
            self.bench.restore_state()
            prompts = [self.bench.ids(size, 1), self.bench.ids(size, 2)]
            again = [self.run([prompt], 1, module=module) for prompt in prompts][1]
            fresh = self.run([prompts[1]], 1)
            if again.error is not None or not self.bench.equal(again.calls[-1].last[0], fresh.calls[-1].last[0]):
                return {"prompts": prompts, "new_tokens": 1}
        return None
