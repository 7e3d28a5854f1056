"""Batches and padding: does each row get what its prompt gets alone?"""

from dataclasses import replace

import torch

from .examination import Examiner
from .recording import Run

UNSEEN = "it draws in a way that is not seen, so the ids of a batch and of single prompts need not be the same"


class Rows(Examiner):
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
        if self.has_found("softmax-over-batch"):
            self.not_made(what, "its softmax is over the rows of the batch")
            return
        if self.draws_unseen():
            self.not_made(what, UNSEEN)
            return
        first = all(row == together.new[0] for row in together.new) and together.new[0] == alone[0]
        self.wrong(
            what,
            "first-row-for-all" if first else "batch-rows-differ",
            "all rows of a batch get the tokens of the first"
            if first
            else f"prompts that give {alone} alone give {together.new} in a batch",
            "keep the batch dimension: argmax(dim=-1), of each row's own logits",
            proof="the first prompt alone gives the tokens of all rows" if first else "",
            shortest={"prompts": prompts[:2], "new_tokens": 1},
        )

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
        known = ("first-row-for-all", "batch-rows-differ", "wrong-number-of-tokens", "wrong-row")
        if any(self.has_found(name) for name in known):
            self.not_made(what, "what it gives for prompts of one length is wrong already")
            return
        alone = [run.new[0] for run in single]
        pad = next(
            n
            for n in range(self.bench.vocab_size - 1, 0, -1)
            if n not in (*prompts[0], *prompts[1], *alone[0], *alone[1])
        )
        forms = [replace(one, form=form) for form in ("rows", "tensors")]
        options = {**self.settings, "pad_id": pad}
        ragged = next(
            (run for form in forms if (run := self.bench.run(form, prompts, 4, **options)).error is None), None
        )
        by_itself = ragged is not None
        tries: dict[str, Run] = {}
        if ragged is not None:
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
        if self.draws_unseen():
            self.not_made(what, UNSEEN)
            return
        self.named_padding(what, ran, prompts, alone, pad)

    def named_padding(self, what, ran: dict[str, Run], prompts, alone, pad: int) -> None:
        shown = {"prompts": prompts, "new_tokens": 1}
        for side, run in ran.items():
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
            stay = [min(n, len(short) - 1) for n in range(len(ids))]
            only = torch.ones(len(ids), len(ids)).tril().bool() & real
            if not left:
                if side != "its own" or len(ids) == len(short):
                    continue  # not the decoder's choice, or no padding
                ways = [(ids, where, seen) for where in (None, stay) for seen in (None, masked, only)]
                if self.replayed(found, ways):
                    self.wrong(
                        what,
                        "padding-on-wrong-side",
                        "the padding is after the prompt, and the next token is that after the padding",
                        "pad on the left, or read each row's logits at its own last token",
                        proof="its own forward pass over prompt and padding gives these logits",
                        shortest=shown,
                    )
                    return
                continue
            if self.replayed(found, [(ids, None, None), (ids, moved, None)]):
                self.wrong(
                    what,
                    "padding-seen",
                    "the tokens see the padding before them",
                    "mask the padding: scores of padded keys are -inf",
                    proof="its own forward pass over padding and prompt gives these logits",
                    shortest=shown,
                )
                return
            if self.replayed(found, [(ids, None, masked)]):
                self.wrong(
                    what,
                    "positions-count-padding",
                    "the positions count the padding",
                    "positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)",
                    proof="its own forward pass, with the padding masked, gives these logits",
                    shortest=shown,
                )
                return
        run = next(iter(ran.values()))
        self.wrong(
            what,
            "padded-rows-differ",
            f"prompts that give {alone} alone give {run.new} in a batch",
            "mask the padding, and count positions without it, in every step",
            shortest=shown,
        )


def pad_to(row: list[int], length: int, pad: int, side: str) -> list[int]:
    padding = [pad] * (length - len(row))
    return padding + row if side == "left" else row + padding
