"""Beyond the context: does a decoder go on with the last tokens?"""

from collections.abc import Callable
from typing import Any

import torch

from .examination import Examiner
from .recording import NotReplayable, Run
from .steps import Step, steps_of


class Window(Examiner):
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
                    what,
                    "prompt-cut-wrong-side",
                    f"of a sequence longer than the context, the first {size} tokens are kept, not the last",
                    "idx_cond = idx[:, -context_size:]",
                    proof=proof,
                    shortest=shown,
                )
                return
        for size in range(context - 1, max(context // 2, 1), -1):
            if gives(lambda step, size=size: (step.prefix[-size:],), bad):
                self.wrong(
                    what,
                    "window-too-short",
                    f"only the last {size} tokens are seen, though the context has {context}",
                    "idx_cond = idx[:, -context_size:]",
                    proof=proof,
                    shortest=shown,
                )
                return
        # A cut prompt, and then the new tokens: all of the history, whatever it is.
        for cut in ("start", "end"):

            def cut_prompt(step: Step, cut=cut):
                prompt = step.fed[0]
                wrong = prompt == runs[0].prompts[0][: len(prompt)] or prompt == runs[1].prompts[0][: len(prompt)]
                return (step.tokens,) if wrong and len(step.tokens) <= context else None

            if kind == "long prompt" and gives(cut_prompt, bad):
                self.wrong(
                    what,
                    "prompt-cut-wrong-side",
                    "of a prompt longer than the context, the first tokens are kept, not the last",
                    "idx = idx[:, -context_size:]",
                    proof=proof,
                    shortest=shown,
                )
                return
        positions: dict[str, Callable[[int], list[int]]] = {
            "their positions stay at the last one": lambda n: [min(i, context - 1) for i in range(n)],
            "their positions start again at 0": lambda n: [i % context for i in range(n)],
            "their positions are the first": lambda n: [i if i < context else 0 for i in range(n)],
        }
        for says, where in positions.items():
            if gives(lambda step, where=where: (step.tokens, where(len(step.tokens))), bad):
                self.wrong(
                    what,
                    "cache-past-window",
                    f"the cache grows past the context of {context} tokens; {says}",
                    "when the cache is full, empty it and run the last tokens anew, or refuse to go on",
                    proof=proof,
                    shortest=shown,
                )
                return
        for says, where in positions.items():

            def windowed(step: Step, where=where):
                ids = step.tokens
                i = torch.arange(len(ids))
                return ids, where(len(ids)), (i <= i[:, None]) & (i > i[:, None] - context)

            if gives(windowed, bad):
                self.wrong(
                    what,
                    "cache-past-window",
                    f"beyond the context of {context} tokens, the cache keeps the last keys and values, which were "
                    f"computed at other positions; {says}",
                    "when the cache is full, empty it and run the last tokens anew, or refuse to go on",
                    proof=proof,
                    shortest=shown,
                )
                return
        step = bad[0]
        self.wrong(
            what,
            "window-logits-differ",
            f"after {len(step.prefix)} tokens, where the context has {context}, the logits are not those of the last "
            "tokens",
            "when the cache is full, empty it and run the last tokens anew, or refuse to go on",
            error=bench.error(step.logits, bench.last(step.prefix[-context:])),
            shortest=shown,
        )
