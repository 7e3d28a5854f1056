"""Beams: does the cache of each follow it?"""

from .examination import Examiner
from .recording import Run


class Beams(Examiner):
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
            what,
            "cache-not-reordered",
            "when beams change places, the cache stays in the old order"
            if kept
            else "the logits of the beams are not those of the sequences that they become",
            "reorder the cache of every layer with the indices of the beams that were kept: keys[beam_idx]",
            proof=f"in every row, the logits of all steps of {len(cached)} prompts are those of the tokens fed to it"
            if kept
            else "",
            shortest={"prompt": wrong[0].prompts[0], "num_beams": width, "new_tokens": len(wrong[0].new[0])},
        )

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
