"""Beams: are they those of a beam search, and does the cache of each follow it?"""

from .examination import Examiner
from .recording import NotReplayable, Run
from .searches import MISTAKES, ONE, Ending, Search, endings

CHOICE, CACHE = "the choice of beams", "the cache follows the beams"
LENGTH = 6
ENDS = "beams that end"
ENDED = {
    "unseen": ("end-ignored", "beams go on after the end token", "a beam that has the end token is not grown any more"),
    "on": (
        "ended-beams-go-on",
        "a beam that ends is kept as a result, and grows on all the same, so that it takes the place of others",
        "take it out of the beams once it has ended",
    ),
    "dropped": (
        "ended-beams-dropped",
        "a beam that ends is thrown away, so that no result has the end token",
        "keep it among the results, and choose the best of these",
    ),
}
BEAM_NAMES = ("beams-differ", "cache-not-reordered", *(how.name for how in (ONE, *MISTAKES)))
# Settings that change nothing without an end token.
HARMLESS = ("length", "alpha", "early", "verbose")


class Beams(Examiner):
    width: int
    many_beams: bool

    def beams(self) -> None:
        """Are its beams those of a beam search, and does the cache follow them?"""
        if not self.decoder.has("num_beams") and not self.many_beams:
            self.not_made(CHOICE, "it has no beams")
            self.not_made(CACHE, "it has no beams")
            return
        if self.unreliable:
            for what in (CHOICE, CACHE):
                self.not_made(what, "its steps are wrong already without beams")
            return
        try:
            prompts, rights = self.telling_prompts()
            # 0 asks many decoders for the most probable token, and would divide the scores of beams.
            scale = {"temperature": 1.0} if self.decoder.has("temperature") else {}
            runs = [self.run([prompt], LENGTH, num_beams=self.width, **scale) for prompt in prompts]
            self.judge(runs, rights)
            if self.decoder.has("eos_id") and not any(self.has_found(name) for name in BEAM_NAMES):
                self.ends_of_beams(scale)
        except NotReplayable as error:
            self.not_made(CHOICE, f"its forward pass without a cache fails: {error}")

    def telling_prompts(self, number: int = 4) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts after which several beams find what one does not, and what they find."""
        prompts, rights = [], []
        for seed in range(140, 200):
            prompt = self.bench.ids(5, seed)
            right = self.searched(Search(), prompt, self.width)
            if right != self.searched(ONE, prompt, 1):
                prompts.append(prompt)
                rights.append(right)
            if len(prompts) == number:
                break
        if len(prompts) < 4:
            raise NotReplayable("too few prompts tell several beams from one")
        return prompts, rights

    def searched(self, how: Search, prompt: list[int], width: int) -> list[int]:
        return how.run(self.bench.last, prompt, LENGTH, width)

    def judge(self, runs: list[Run], rights: list[list[int]]) -> None:
        if failed := next((run for run in runs if run.error is not None), None):
            for what in (CHOICE, CACHE):
                self.not_made(what, failed.failure)
            return
        if any(run.draws for run in runs):
            self.not_made(CHOICE, "it draws at random among the beams")
            self.follow(runs)
            return
        given = [run.new[0] for run in runs]
        if given == rights:
            self.right(CHOICE)
            self.follow(runs)
            return
        shown = next(n for n, right in enumerate(rights) if given[n] != right)
        shortest = {"prompt": runs[shown].prompts[0], "num_beams": self.width, "new_tokens": LENGTH}
        undecided = self.undecided()
        # Of other searches, such as one for diverse beams, the first beam may well be that of one alone.
        for how in (*(() if undecided else (ONE,)), *MISTAKES):
            width = 1 if how is ONE else self.width
            if all(self.searched(how, run.prompts[0], width) == run.new[0] for run in runs):
                proof = f"a search that does so, on its own forward pass without a cache, gives all ids of {len(runs)} "
                proof += "prompts; a beam search gives others"
                self.wrong(CHOICE, how.name, how.says, how.remedy, proof=proof, shortest=shortest)
                self.not_made(CACHE, "its beams are wrong already")
                return
        if not self.follow(runs):
            self.not_made(CHOICE, "the cache does not follow its beams")
        elif undecided:
            self.not_made(CHOICE, f"they are not those of a plain beam search, but {undecided}")
        else:
            self.wrong(
                CHOICE,
                "beams-differ",
                f"its beams are not those of a beam search: with {self.width} beams, after {runs[shown].prompts[0]}, "
                f"it gives {given[shown]}, where the sums of log probabilities give {rights[shown]}",
                "compare the beams and their scores after each step with those of a beam search by hand",
                shortest=shortest,
            )

    def ends_of_beams(self, scale: dict[str, float]) -> None:
        """What becomes of beams that end? Many conventions are right."""
        pairs = zip(*self.telling_prompts(8), strict=True)
        ends = [(p, right, end) for p, right in pairs for end in right[:-1] if right.count(end) == 1]
        runs = [self.run([p], LENGTH, num_beams=self.width, eos_id=end, **scale) for p, _, end in ends]
        if failed := next((run for run in runs if run.error is not None), None):
            self.not_made(ENDS, failed.failure)
            return
        powers = [v for v in {**self.decoder.others, **self.decoder.given}.values() if isinstance(v, float)]

        def explains(how: Ending) -> bool:
            for run, (prompt, plain, end) in zip(runs, ends, strict=True):
                right = how.run(self.bench.last, prompt, LENGTH, self.width, end)
                given = run.new[0]
                place = given.index(end) + 1 if end in given else len(given)
                if given != plain and len(set(given[place:])) == 1:  # padding
                    given = given[:place]
                if given != right and (right[-1] != end or given[: len(right) - 1] != right[:-1] or end in given):
                    return False
            return True

        known = tuple(dict.fromkeys([0.0, 1.0, 0.6, 0.7, 0.75, *powers]))
        kinds = ("aside", "fewer", "stay"), *[(kind,) for kind in ENDED]
        how = next((one for kind in kinds for one in endings(kind, known) if explains(one)), None)
        if how is None or len(ends) < 3:
            self.not_made(ENDS, "what becomes of beams that end is none of the ways that are known here")
        elif how.ended not in ENDED:
            self.right(ENDS)
        else:
            name, says, remedy = ENDED[how.ended]
            proof = f"a beam search that does so gives all ids of {len(runs)} runs; those that are right do not"
            mine = [one for one in self.report.findings if one.where == self.decoder.name and "end" in one.name]
            for one in mine:  # of the same cause
                self.report.findings.remove(one)
            self.wrong(ENDS, name, says, remedy, proof=proof, shortest={"prompt": ends[0][0], "eos_id": ends[0][2]})

    def undecided(self) -> str:
        """Why its beams may be meant to be others than those of a plain beam search."""
        one = self.decoder
        if any(word in one.name.lower() for word in ("divers", "stochastic", "group", "constrain")):
            return f"its name says that it is another search: {one.name}"
        others = {
            n: v for n, v in {**one.others, **one.given}.items() if not any(word in n.lower() for word in HARMLESS)
        }
        if not one.has("num_beams") and "beam" not in one.name.lower():
            return f"nothing says that its {self.width} rows for one prompt are beams"
        others |= {one.parameters[s]: one.defaults[s] for s in ("top_k", "top_p") if one.defaults.get(s)}
        told = ", ".join(f"{name}={value}" for name, value in others.items())
        return f"it has settings that may change them: {told}" if told else ""

    def follow(self, runs: list[Run]) -> bool:
        """Does the cache of each beam follow it? True also where this cannot be asked."""
        what, width = CACHE, self.width
        cached = [run for run in runs if len(run.calls) > 2 and run.calls[-1].ids.shape == (width, 1)]
        if not cached:
            self.not_made(what, "its beams use no cache")
            return True
        wrong = [run for run in cached if not self.follows(run)]
        if not wrong:
            self.right(what)
            return True
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
        return False

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
                fed = [run.prompts[0] for _ in range(self.width)]
                continue
            fed = [[*row, int(token)] for row, token in zip(fed, call.ids[:, -1], strict=False)]
            if not all(self.bench.equal(call.last[n], self.bench.last(row)) for n, row in enumerate(fed)):
                return False
        return True
