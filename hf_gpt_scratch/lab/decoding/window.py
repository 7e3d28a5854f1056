"""Beyond the context: does a decoder go on with the last tokens?"""

from collections.abc import Callable, Iterator

import torch

from .examination import Examiner
from .recording import NotReplayable, Run
from .steps import Step, Triple, steps_of

ANEW = "when the cache is full, empty it and run the last tokens anew, or refuse to go on"


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
            if not all(steps_of(run)[1] for run in runs):
                self.not_made(label, "its new ids are not those of its forward passes, one after the other")
                continue
            if all(not self.outside(step) for run in runs for step in steps_of(run)[0]):
                if self.one_too_short(label, runs):
                    continue
                short = min(len(run.new[0]) for run in runs)
                self.right(label)
                if short < new:
                    self.report.notes.append(f"{self.decoder.name} ends when the context is full")
                continue
            self.named_window(label, runs)

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

    def one_too_short(self, what: str, runs: list[Run]) -> bool:
        """Whether, without a cache, each step beyond the context has one token less than the context has room for."""
        context = self.bench.context_length
        steps = [step for run in runs for step in steps_of(run)[0] if len(step.prefix) > context]
        if not steps or any(step.cached or len(step.fed[-1]) != context - 1 for step in steps):
            return False
        self.wrong(
            what,
            "window-too-short",
            f"only the last {context - 1} tokens are seen, though the context has {context}",
            "idx_cond = idx[:, -context_size:]",
            proof=f"its own forward pass over the last {context - 1} tokens gives the logits of {len(steps)} steps of "
            f"{len(runs)} prompts",
            shortest={"prompt_length": len(runs[0].prompts[0]), "new_tokens": len(runs[0].new[0])},
        )
        return True

    def suffixes(self, length: int) -> list[int]:
        return list(range(self.bench.context_length, 0, -1))

    def named_window(self, what: str, runs: list[Run]) -> None:
        bench, context = self.bench, self.bench.context_length
        bad = [step for run in runs for step in steps_of(run)[0] if self.outside(step)]
        shown = {"prompt_length": len(runs[0].prompts[0]), "new_tokens": len(runs[0].new[0])}

        def gives(make: Callable[[Step], Triple]) -> bool:
            def one(step: Step) -> bool:
                try:
                    return bench.equal(step.logits, bench.last(*make(step)))
                except NotReplayable:
                    return False

            return all(one(step) for step in bad)

        for name, says, remedy, make in self.beyond(runs):
            if gives(make):
                proof = "so run without a cache, its own forward pass gives the logits of "
                proof += f"{len(bad)} steps of {len(runs)} prompts"
                self.wrong(what, name, says, remedy, proof=proof, shortest=shown)
                return
        step = bad[0]
        self.wrong(
            what,
            "window-logits-differ",
            f"after {len(step.prefix)} tokens, where the context has {context}, the logits are others",
            ANEW,
            error=bench.error(step.logits, bench.last(step.prefix[-context:])),
            shortest=shown,
        )

    def beyond(self, runs: list[Run]) -> Iterator[tuple[str, str, str, Callable[[Step], Triple]]]:
        """What may go wrong beyond the context: name, what it says, the remedy, and what is run in its place."""
        context = self.bench.context_length
        for size in range(context, context // 4, -1):
            says = f"of a sequence longer than the context, the first {size} tokens are kept, not the last"
            yield "prompt-cut-wrong-side", says, "idx_cond = idx[:, -context_size:]", first_ids(size)
        for size in range(context - 1, context // 2, -1):
            says = f"only the last {size} tokens are seen, though the context has {context}"
            yield "window-too-short", says, "idx_cond = idx[:, -context_size:]", last_ids(size)
        firsts = [run.prompts[0] for run in runs]
        fed = [run.calls[0].ids[0].tolist() for run in runs]
        if all(
            len(part) < len(prompt) and part == prompt[: len(part)] for part, prompt in zip(fed, firsts, strict=True)
        ):
            says = "of a prompt longer than the context, the first tokens are kept, not the last"
            yield "prompt-cut-wrong-side", says, "idx = idx[:, -context_size:]", lambda step: (step.tokens, None, None)
        positions: dict[str, Callable[[int], int]] = {
            "their positions stay at the last one": lambda i: min(i, context - 1),
            "their positions start again at 0": lambda i: i % context,
            "their positions are the first": lambda i: i if i < context else 0,
        }
        for says, where in positions.items():
            grown = f"the cache grows past the context of {context} tokens; {says}"
            yield "cache-past-window", grown, ANEW, with_positions(where, None)
        for says, where in positions.items():
            kept = f"beyond the context of {context} tokens, the cache keeps keys and values of the last ones, "
            yield (
                "cache-past-window",
                f"{kept}computed at other positions; {says}",
                ANEW,
                with_positions(where, context),
            )


def first_ids(size: int) -> Callable[[Step], Triple]:
    return lambda step: (step.prefix[:size], None, None)


def last_ids(size: int) -> Callable[[Step], Triple]:
    return lambda step: (step.prefix[-size:], None, None)


def with_positions(where: Callable[[int], int], width: int | None) -> Callable[[Step], Triple]:
    """All tokens that were fed, at positions; each sees the last `width` tokens, or all before it."""

    def make(step: Step) -> Triple:
        ids = step.tokens
        i = torch.arange(len(ids))
        visible = None if width is None else (i <= i[:, None]) & (i > i[:, None] - width)
        return ids, [where(n) for n in range(len(ids))], visible

    return make
