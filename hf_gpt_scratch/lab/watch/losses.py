"""Which token each row of logits was asked to predict, with which weight, and what the loss would be otherwise.

Shapes: B batch, T tokens, V vocabulary, N rows of logits that enter a loss.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import few
from .findings import FAULT, NOTE, Finding, Findings
from .record import Forward, Loss, Recorder, Step, are_probabilities, integer_rows, untouched

# The least number of positions that a statement about targets rests on.
ENOUGH = 6
# Nats above ln V from which a start is called far.
FAR = 1.0
OFFSETS = (1, 0, 2, -1, 3, -2, 4)
# Items of a dataset among which those of a batch are looked for.
ITEMS = 2000


@dataclass
class Aligned:
    """A loss whose rows are known positions: row n is position (batch[n], time[n]), transformed by `how`."""

    loss: Loss
    ids: torch.Tensor  # (B, T)
    batch: torch.Tensor  # (N,)
    time: torch.Tensor  # (N,)
    how: str  # "", "softmax", "log_softmax", "mangled", "other axis"
    cut: str  # "all", "last dropped", "first dropped", "some"

    def matches(self, offset: int) -> tuple[int, int]:
        """How many counted targets are the input `offset` positions later, of how many that could be."""
        later = self.time + offset
        valid = (later >= 0) & (later < self.ids.shape[1]) & self.counted
        if not bool(valid.any()):
            return 0, 0
        expected = self.ids[self.batch[valid], later[valid]]
        return int((expected == self.loss.targets[valid]).sum()), int(valid.sum())

    @property
    def counted(self) -> torch.Tensor:
        loss = self.loss
        counted = torch.ones_like(loss.targets, dtype=torch.bool)
        if loss.ignore_index is not None:
            counted = loss.targets != loss.ignore_index
        return counted if loss.weights is None else counted & (loss.weights != 0)


def candidates(forward: Forward, vocabulary: int):
    """The logits (B, T, V) of a forward pass: what it returned, or what its head did."""
    outputs = forward.output if isinstance(forward.output, list) else []
    found = [tensor for tensor in [*outputs, forward.head] if tensor is not None and tensor.dim() in (2, 3)]
    found = [tensor for tensor in found if tensor.shape[-1] == vocabulary]
    yield from (tensor for tensor in found if tensor.dim() == 3)
    for tensor in found:  # returned without its batch, which is less sure to be in order
        if tensor.dim() == 2 and forward.ids is not None and len(tensor) % len(forward.ids) == 0:
            yield tensor.view(len(forward.ids), -1, vocabulary)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.float(), other.float()
    if torch.equal(one, other):
        return True
    finite = one[torch.isfinite(one)]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    return torch.allclose(one, other, rtol=1e-5, atol=2e-6 * max(largest, 1e-3))


def align(loss: Loss) -> Aligned | None:
    """Which positions the rows of a loss are, or None if that cannot be told."""
    forward, rows = loss.forward, loss.rows
    if forward is None or forward.ids is None or rows is None or rows.shape[0] != loss.targets.shape[0]:
        return None
    for logits in candidates(forward, rows.shape[-1]):
        batch, time = logits.shape[:2]
        given = forward.embedded
        ids = given if given is not None and given.shape == (batch, time) else forward.ids
        if batch != ids.shape[0] or time > ids.shape[1]:
            continue
        offset = ids.shape[1] - time  # a model that returns the last logits only
        b = torch.arange(batch, device=ids.device)[:, None].expand(batch, time)
        t = torch.arange(time, device=ids.device)[None].expand(batch, time) + offset
        for cut, part in (("all", slice(None)), ("last dropped", slice(None, -1)), ("first dropped", slice(1, None))):
            chosen = logits[:, part]
            if chosen.shape[0] * chosen.shape[1] != rows.shape[0] or not chosen.numel():
                continue
            for how, function in TRANSFORMS:
                if close(function(chosen).reshape(rows.shape), rows):
                    return Aligned(loss, ids, b[:, part].reshape(-1), t[:, part].reshape(-1), how, cut)
            flat = chosen.float().reshape(rows.shape)
            others = [(chosen.float(), 0), (chosen.float(), 1), (flat, 0)]
            if any(close(f(x, dim).reshape(rows.shape), rows) for f in SOFTMAXES for x, dim in others):
                return Aligned(loss, ids, b[:, part].reshape(-1), t[:, part].reshape(-1), "other axis", cut)
            factor = float(
                (chosen.float().reshape(rows.shape) * rows).sum() / chosen.float().pow(2).sum().clamp(min=1e-30)
            )
            if close(chosen.float().reshape(rows.shape) * factor, rows):
                return Aligned(loss, ids, b[:, part].reshape(-1), t[:, part].reshape(-1), "", cut)
            if chosen.shape[0] > 1 and chosen.shape[1] > 1 and close(chosen.transpose(0, 1).reshape(rows.shape), rows):
                bt, tt = b[:, part].t().reshape(-1), t[:, part].t().reshape(-1)
                return Aligned(loss, ids, bt, tt, "", cut)
            mixed = [chosen.permute(order) for order in ((0, 2, 1), (2, 0, 1), (2, 1, 0), (1, 2, 0))]
            for other in (*mixed, chosen.reshape(chosen.shape[0], -1, chosen.shape[1]).transpose(1, 2)):
                if close(other.reshape(rows.shape), rows):
                    return Aligned(loss, ids, b[:, part].reshape(-1), t[:, part].reshape(-1), "mangled", cut)
        found = by_value(logits, rows)
        if found is not None:
            return Aligned(loss, ids, found // time, found % time + offset, "", "some")
    return None


TRANSFORMS = (
    ("", lambda logits: logits),
    ("log_softmax", lambda logits: logits.float().log_softmax(-1)),
    ("softmax", lambda logits: logits.float().softmax(-1)),
)

SOFTMAXES = (torch.log_softmax, torch.softmax)


def by_value(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """(N,): the places in logits (B, T, V), flattened, that hold the rows; None unless each is in exactly one."""
    flat = logits.reshape(-1, logits.shape[-1]).float()
    places: dict[bytes, int] = {}
    for n, row in enumerate(flat[:, :32].cpu().contiguous()):
        key = row.numpy().tobytes()
        if key in places:
            return None
        places[key] = n
    found = [places.get(row.numpy().tobytes(), -1) for row in rows[:, :32].float().cpu().contiguous()]
    return None if min(found, default=-1) < 0 else torch.tensor(found, device=logits.device)


def mean_loss(rows: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor) -> float:
    """The mean cross-entropy of the counted rows, in float64."""
    if not bool(counted.any()):
        return math.nan
    total, number = 0.0, int(counted.sum())
    for part in counted.nonzero()[:, 0].split(1024):
        total += float(torch.nn.functional.cross_entropy(rows[part].double(), targets[part], reduction="sum"))
    return total / number


def unscaled(step: Step, loss: Loss) -> float:
    """The sum of the weights of a loss's rows, without the scale of a GradScaler."""
    return math.nan if loss.weights is None else float(loss.weights.sum()) / step.scale


class LossFindings(Findings):
    """The findings about the losses of a recorded run."""

    def __init__(self, recorder: Recorder):
        super().__init__(recorder)
        self.aligned: list[tuple[Step, Aligned]] = []
        for step in recorder.steps:
            for loss in step.losses:
                if loss.tokens:
                    found = align(loss)
                    if found is not None:
                        self.aligned.append((step, found))

    def all(self) -> list[Finding]:
        right = {
            id(one.loss.forward)
            for _, one in self.aligned
            if one.how not in ("mangled", "other axis") and one.matches(1)[0] == one.matches(1)[1] > 0
        }
        for _, one in self.aligned:
            # A second head may predict the token after the next one.
            if self.probabilities(one) or (id(one.loss.forward) not in right and self.targets(one)):
                break
        if not self.findings and not self.aligned:
            self.unaligned_probabilities()
        if not self.findings:
            self.masks()
        if not self.findings:
            self.ignored_tokens()
        if not self.findings:
            self.prompts()
            self.few_positions()
        self.start()
        return self.findings

    # Softmax

    def probabilities(self, one: Aligned) -> bool:
        if one.loss.kind == "nll" and one.loss.rows is not None and are_probabilities(one.loss.rows):
            return self.add(
                "nll-of-probabilities",
                "nll_loss is given probabilities, but it takes their logarithms",
                one.loss.where,
                "log_softmax instead of softmax, or cross_entropy of the logits",
                f"each row sums to 1 and none is negative; the loss is {float(one.loss.output.mean()):.6f}, and no "
                "negative log-likelihood is below 0",
            )
        if one.loss.kind == "gather" and self.no_logarithm(one.loss):
            return True
        return one.loss.kind == "cross_entropy" and self.softmaxed(one.loss, one.how == "softmax")

    def no_logarithm(self, loss: Loss) -> bool:
        """Whether the probabilities of the targets themselves are averaged: all enter with one factor."""
        if loss.rows is None or loss.weights is None or not are_probabilities(loss.rows):
            return False
        counted = (loss.weights != 0) & (loss.targets >= 0)
        picked = loss.rows[counted].double().gather(1, loss.targets[counted][:, None].long())[:, 0]
        factors = loss.weights[counted].double() / picked
        if len(picked) < ENOUGH or float(picked.std()) < 1e-3 * float(picked.mean()):
            return False
        if float((factors - factors.mean()).abs().max()) > 1e-4 * float(factors.mean().abs()):
            return False
        return self.add(
            "nll-of-probabilities",
            "the loss is the mean of the targets' probabilities, not of their logarithms",
            loss.where,
            "take their logarithms: log_softmax instead of softmax",
            f"each of the {len(picked)} probabilities enters the loss with the factor {-float(factors.mean()):.6g}, "
            "whatever it is; with a logarithm the factors would be in inverse proportion to them",
        )

    def unaligned_probabilities(self) -> None:
        for step in self.recorder.steps:
            for loss in step.losses:
                if loss.kind == "cross_entropy" and loss.weights is not None and self.softmaxed(loss, False):
                    return

    def softmaxed(self, loss: Loss, known: bool) -> bool:
        if loss.rows is None or not (known or are_probabilities(loss.rows)):
            return False
        vocabulary = loss.rows.shape[-1]
        counted = loss.targets >= 0
        as_logits = mean_loss(loss.rows, loss.targets, counted)
        right = mean_loss(loss.rows.double().clamp(min=1e-300).log(), loss.targets, counted)
        return self.add(
            "softmax-before-cross-entropy",
            "the rows given to cross-entropy are probabilities already; it applies softmax itself, so the loss cannot "
            f"fall below {math.log(vocabulary - 1 + math.e) - 1:.3f}",
            loss.where,
            "give cross_entropy the logits, without softmax",
            f"each row sums to 1 and none is negative; taken as logits they give {as_logits:.6f}, as probabilities "
            f"{right:.6f}",
            figures={"loss": as_logits, "loss_without_softmax": right},
        )

    # Targets

    def targets(self, one: Aligned) -> bool:
        loss = one.loss
        where = loss.where
        if one.how == "other axis":
            return self.add(
                "softmax-over-wrong-dimension",
                "softmax is taken over the batch or the positions, not over the vocabulary",
                where,
                "log_softmax(logits, dim=-1)",
                "softmax over that dimension of the logits reproduces the rows; over the vocabulary it does not",
            )
        if one.how == "mangled":
            own = self.in_order(one)
            return own and self.add(
                "wrong-rows",
                "the logits (B, T, V) were permuted or reshaped so that the rows mix positions with tokens",
                where,
                "logits.view(-1, V) with targets.view(-1), or logits.transpose(1, 2) with targets",
                "the logits, permuted or reshaped so, reproduce the rows",
            )
        # Some models take sequences as columns, (T, B).
        other = Aligned(loss, one.ids.t(), one.time, one.batch, one.how, one.cut)
        if not self.one_offset(one) and self.one_offset(other):
            one = other
        matched = {offset: one.matches(offset) for offset in OFFSETS}
        right, possible = matched[1]
        if possible == 0 and not any(number for _, number in matched.values()):
            return False
        if right == possible and possible:
            return False
        text = describe(one, matched)
        numbers: dict[str, float] = {f"targets_equal_to_input_{offset:+d}": matched[offset][0] for offset in OFFSETS}
        for offset in OFFSETS[1:]:
            equal, number = matched[offset]
            if equal < number or number < ENOUGH:
                continue
            loss_now, loss_right = self.losses(one, offset)
            numbers |= {"loss": loss_now, "loss_with_the_next_tokens": loss_right}
            proof = f"{text}; the loss is {loss_now:.6f} as it is, {loss_right:.6f} with the next tokens as targets"
            if offset == 0 and one.cut == "first dropped":
                return self.add(
                    "wrong-rows",
                    "the first row of logits is dropped instead of the last: each row's target is its own input token",
                    where,
                    "logits[:, :-1] with targets ids[:, 1:]",
                    proof,
                    figures=numbers,
                )
            name, says, remedy = SHIFTS.get(
                offset,
                (
                    "targets-off",
                    f"each position's target is the token {offset:+d} positions away",
                    "make the target of position t the token at t + 1",
                ),
            )
            return self.add(name, says, where, remedy, proof, figures=numbers)
        order = self.other_order(one) or self.other_order(other)
        if order:
            return self.add(
                "wrong-rows",
                f"rows and targets are in different orders: {order}",
                where,
                "flatten logits and targets in the same order, logits.view(-1, V) with targets.view(-1)",
                text,
                figures=numbers,
            )
        return False

    @staticmethod
    def one_offset(one: Aligned) -> bool:
        """Whether all targets are the tokens at one distance."""
        return any(equal == number >= ENOUGH for equal, number in map(one.matches, OFFSETS))

    def in_order(self, one: Aligned) -> bool:
        """Whether the targets, in the order (B, T), are the next tokens."""
        return self.matches_order(one, one.batch, one.time)

    @staticmethod
    def matches_order(one: Aligned, batch: torch.Tensor, time: torch.Tensor) -> bool:
        other = Aligned(one.loss, one.ids, batch, time, "", one.cut)
        equal, number = other.matches(1)
        return equal == number >= ENOUGH

    def other_order(self, one: Aligned) -> str:
        number = one.batch.shape[0]
        times = one.time.unique()
        batches = one.ids.shape[0]
        if batches * len(times) != number or batches < 2:
            return ""
        device = one.ids.device
        b = torch.arange(batches, device=device)[:, None].expand(batches, len(times))
        t = times[None].expand(batches, len(times))
        if self.matches_order(one, b.reshape(-1), t.reshape(-1)):
            return "the logits go position by position, the targets sequence by sequence"
        if self.matches_order(one, b.t().reshape(-1), t.t().reshape(-1)):
            return "the logits go sequence by sequence, the targets position by position"
        for shift in range(1, batches):
            if self.matches_order(one, (one.batch + shift) % batches, one.time):
                return f"the targets belong to the sequence {shift} further in the batch"
        places = permuted(one, batches, len(times))
        if places is not None and self.matches_order(one, places[one.batch], one.time):
            return f"the targets of the sequences 0, 1, … belong to {few(list(map(str, places.tolist())), 6)}"
        return ""

    def losses(self, one: Aligned, offset: int) -> tuple[float, float]:
        """The mean loss of the counted rows as it is, and with the next tokens where they are known."""
        loss = one.loss
        assert loss.rows is not None
        counted = one.counted
        now = mean_loss(loss.rows, loss.targets, counted)
        valid = counted & (one.time + 1 < one.ids.shape[1])
        following = one.ids[one.batch, (one.time + 1).clamp(max=one.ids.shape[1] - 1)].long()
        return now, mean_loss(loss.rows, following, valid)

    # Padding, prompts and other masks

    def masks(self) -> None:
        for step, one in self.aligned:
            for name, mask in self.known_masks(step, one):
                if self.counted_although_masked(one, name, mask):
                    return
            if self.padding(one) or self.common_prompt(one):
                return

    def known_masks(self, step: Step, one: Aligned):
        """Masks (B, T) of the targets: of the batch from the loader, or given to the model; 1 where a token counts."""
        forward = one.loss.forward
        assert forward is not None
        shape = one.ids.shape
        given = [*step.batches, list(forward.arguments[1].items())]
        for named in given:
            tensors = [(name, value) for name, value in named if isinstance(value, torch.Tensor)]
            mine = any(value.shape == shape and torch.equal(value, one.ids) for _, value in tensors)
            for name, value in tensors:
                if value.shape != shape or not (mine or named is given[-1]):
                    continue
                if value.dtype == torch.int64 and bool((value == -100).any()):
                    kept = value != -100
                    # labels are either the ids themselves or already shifted
                    same = bool((value[kept] == one.ids[kept]).all())
                    yield name, (kept if same else torch.nn.functional.pad(kept, (1, 0), value=True)[:, :-1])
                elif (
                    bool(((value == 0) | (value == 1)).all()) and bool((value == 0).any()) and bool((value == 1).any())
                ):
                    yield name, value.bool()

    def counted_although_masked(self, one: Aligned, name: str, mask: torch.Tensor) -> bool:
        valid = (one.time + 1 < one.ids.shape[1]) & one.counted
        ends = (~mask).flip(1).long().cumprod(1).flip(1).bool()
        # What is masked at the rows' ends is padding, the rest a prompt; either may be counted without the other.
        kinds = {"padding-counted": ends, "prompt-counted": ~mask & ~ends}
        found = {kind: masked for kind, part in kinds.items() if (masked := counted_of(one, valid, part)) is not None}
        if not found:
            return False
        kind, masked = next(iter(found.items()))
        number = int(masked.sum())
        if "attention" in name:
            kind = "padding-counted"
        assert one.loss.rows is not None
        now = mean_loss(one.loss.rows, one.loss.targets, one.counted)
        right = mean_loss(one.loss.rows, one.loss.targets, one.counted & ~masked)
        return self.add(
            kind,
            f"{number} of {int(one.counted.sum())} targets that the loss counts are masked by {name or 'the batch'!r}",
            one.loss.where,
            "set these targets to -100, which cross_entropy ignores",
            f"their weight in the loss is not zero; the loss is {now:.6f} with them, {right:.6f} without",
            figures={"loss": now, "loss_without": right, "masked_targets": number},
        )

    def padding(self, one: Aligned) -> bool:
        found = padding_of(one.ids)
        if found is None:
            return False
        token, pads, side = found
        target = one.time + 1
        valid = (target < one.ids.shape[1]) & one.counted
        padded = valid.clone()
        inside = pads[one.batch[valid], target[valid]]
        if side == "right":  # the first one may be the end of the text, which is worth learning
            inside &= pads[one.batch[valid], one.time[valid]]
        padded[valid] = inside
        number = int(padded.sum())
        if number < 2:
            return False
        assert one.loss.rows is not None
        now = mean_loss(one.loss.rows, one.loss.targets, one.counted)
        right = mean_loss(one.loss.rows, one.loss.targets, one.counted & ~padded)
        return self.add(
            "padding-counted",
            f"{number} of {int(one.counted.sum())} counted targets are padding (token {token})",
            one.loss.where,
            "set padded targets to -100, which cross_entropy ignores",
            f"token {token} is only in runs of different lengths at the rows' ends; the loss is {now:.6f} with them, "
            f"{right:.6f} without",
            figures={"loss": now, "loss_without": right, "padding_targets": number, "token": token},
        )

    def common_prompt(self, one: Aligned) -> bool:
        ids = one.ids
        if ids.shape[0] < 3:
            return False
        same = (ids == ids[:1]).all(0)
        length = int(same.long().cumprod(0).sum())
        if not 4 <= length < ids.shape[1] - 2 or int(ids[0, :length].unique().numel()) < 3:
            return False
        counted = one.counted & (one.time + 1 < length)
        if int(counted.sum()) < ids.shape[0]:
            return False
        return self.add(
            "prompt-counted",
            f"all rows begin with the same {length} tokens, a prompt, and the loss counts them",
            one.loss.where,
            "if only the answers are to be learnt, set the prompt's targets to -100",
            level=NOTE,
            figures={"prompt_tokens": length},
        )

    def ignored_tokens(self) -> None:
        for _, one in self.aligned:
            token = one.loss.ignore_index
            if token is None or token < 0:
                continue
            inside = (one.ids[:, :-1] == token) & (one.ids[:, 1:] != token)
            left = padding_side(one.ids, token) == "left"
            if left:
                inside &= (one.ids != token).long().cumsum(1)[:, :-1] > 0
            ignored = int((one.loss.targets == token).sum())
            if int(inside.any(1).sum()) >= 2 and ignored:
                self.add(
                    "real-token-ignored",
                    f"ignore_index={token} is a token that occurs within the texts; {ignored} targets are not learnt",
                    one.loss.where,
                    "mark targets to ignore by -100, which is no token",
                    f"token {token} is followed by other tokens in {int(inside.any(1).sum())} rows",
                    figures={"ignored_targets": ignored},
                )
                return

    # Positions that no loss counts

    def prompts(self) -> None:
        """Whether the loss begins one token beside the place where the dataset's items end their prompts."""
        loaders = [facts for _, facts in self.recorder.loaders if facts["grad"]]
        with untouched():
            items = [parts for facts in loaders[:1] for parts in parts_of(facts["dataset"])]
        found: dict[tuple[int, bool], list[int]] = {}  # (distance, whether the prompt itself is an item's) -> tokens
        seen: set[int] = set()  # lengths of prompts
        for _, one in self.aligned if items else []:
            for row, ids in enumerate(one.ids.tolist()):
                times = one.time[one.counted & (one.batch == row)]
                first = int(times.min()) + 1 if len(times) else 0
                known = next((two for whole, two in items if whole[: len(ids)] == ids[: len(whole)]), None)
                if known is None and any(begins(ids, whole, parts[0][0], first - 1) for whole, parts in items):
                    known = [(first - 1, True)]  # between other tokens, as of a template
                if known is None or not 1 < first < len(ids) - 1:
                    return
                for length, sure in known:
                    found.setdefault((first - length, sure), []).append(ids[min(first, length)])
                seen.update(length for length, _ in known)
        if len(seen) < 2 or any(distance == 0 for distance, _ in found):
            return
        rows = max(map(len, found.values()), default=0)
        for (distance, sure), tokens in found.items():
            if abs(distance) != 1 or len(tokens) < max(4, rows) or len(set(tokens)) < 2:
                continue
            early = "the last token of each prompt is counted too"
            self.add(
                "mask-off-by-one",
                "the first token of each answer is not counted" if distance > 0 else early,
                self.aligned[0][1].loss.where,
                "targets are one place ahead of their rows: after a shift, mask prompt_length - 1 of them",
                f"in {len(tokens)} rows the first target that counts is {abs(distance)} "
                f"{'after' if distance > 0 else 'before'} the prompt's end, which is where an item of the dataset says",
                level=FAULT if sure else NOTE,
                figures={"rows": len(tokens), "distance": distance},
            )
            return

    def few_positions(self) -> None:
        """Only the last of all positions, or all but the last token of each text."""
        if not self.aligned:
            return
        step, one = self.aligned[0]
        ids, counted = one.ids, one.counted
        rows = one.loss.rows
        vocabulary = 0 if rows is None else rows.shape[-1]
        batch, length = ids.shape
        if not bool(counted.any()) or int(ids.max()) >= vocabulary:  # classes, not tokens
            return
        if batch > 1 and length > 3 and bool((one.time[counted] == length - 1).all()):
            self.add(
                "last-position-only",
                f"the loss counts the last of {length} positions only; the others have a next token to learn too",
                one.loss.where,
                "if all next tokens are to be learnt: logits.view(-1, V) with targets.view(-1)",
                f"{int(counted.sum())} rows of logits enter the loss, of {ids.numel()}",
                level=NOTE,
                figures={"positions": 1, "length": length},
            )
            return
        pairs = []  # the last target that counts, and what follows it
        real = [mask for name, mask in self.known_masks(step, one) if "attention" in name]
        for row in range(batch):
            times = one.time[counted & (one.batch == row)]
            if len(times) and int(times.max()) + 2 < length:
                last = int(times.max()) + 1
                pairs.append((int(ids[row, last]), int(ids[row, last + 1]), len(ids[row, last + 1 :].unique())))
                real = [mask for mask in real if bool(mask[row, last + 1]) and not bool(mask[row, last + 2 :].any())]
        lasts, ends = {last for last, _, _ in pairs}, {end for _, end, _ in pairs}
        if len(pairs) < 3 or len(lasts) < 2 or len(ends) != 1 or max(kinds for _, _, kinds in pairs) > 2:
            return
        padded = any(kinds == 2 for _, _, kinds in pairs)
        self.add(
            "end-not-learnt",
            f"token {ends.pop()} follows the last target that counts in {len(pairs)} rows, and is never counted: "
            "the model is not taught where to end",
            one.loss.where,
            "let the loss count the end token of each text, and only the padding after it not",
            "it is one token in all of these rows, "
            + ("and other tokens, the padding, follow it" if padded else "and nothing else follows it")
            + ("; the attention mask says that it is no padding" if real else ""),
            level=FAULT if padded or real else NOTE,
            figures={"rows": len(pairs)},
        )

    # The loss at the start

    def start(self) -> None:
        recorder = self.recorder
        if any(event.what == "model" for event in recorder.loaded) or not self.aligned:
            return
        step, one = self.aligned[0]
        if step is not recorder.steps[0] or one.loss.rows is None or one.how == "softmax":
            return
        rows = one.loss.rows
        vocabulary = rows.shape[-1]
        value, usual = mean_loss(rows, one.loss.targets, one.counted), math.log(vocabulary)
        if not value - usual > FAR:
            return
        spread = float((rows[:256].double() - rows[:256].double().mean(-1, keepdim=True)).pow(2).mean().sqrt())
        cause, remedy, proof = why_high(one, value, usual, spread)
        self.add(
            "loss-starts-high",
            f"the first loss is {value:.3f}, but ln V = {usual:.3f} is what equal odds for {vocabulary} tokens give: "
            + cause,
            one.loss.where,
            remedy,
            proof,
            figures={"loss": value, "ln_vocabulary": usual, "spread_of_logits": spread},
        )


SHIFTS = {
    0: (
        "not-shifted",
        "targets are not shifted: each position is asked for its own input token",
        "make the target of position t the token at t + 1: logits[:, :-1] with ids[:, 1:]",
    ),
    2: (
        "shifted-twice",
        "targets are shifted twice: each position is asked for the token two further",
        "shift once: either the data or the model does it",
    ),
    -1: (
        "shifted-backwards",
        "targets are shifted the wrong way: each position is asked for the token before it",
        "make the target of position t the token at t + 1: logits[:, :-1] with ids[:, 1:]",
    ),
}


def begins(ids: list[int], whole: list[int], length: int, at: int) -> bool:
    """Whether the answer of an item, which is what follows its prompt of this length, is at this place of a row."""
    there = ids[at:][: len(whole) - length]
    same = len(there) > 1 and there == whole[length:][: len(there)]
    return same and any(ids[start:][:length] == whole[:length] for start in range(at - length + 1))


def parts_of(dataset: Any) -> list[tuple[list[int], list[tuple[int, bool]]]]:
    """The ids of each item, and the lengths that its prompt may have: of a part that they begin with, or a number."""
    found = []
    try:
        for n in range(min(len(dataset), ITEMS)):
            item = dataset[n]
            values = list(item.values()) if isinstance(item, dict) else list(item)
            rows = integer_rows(values)
            whole = rows[0] + rows[1] if len(rows) == 2 else max(rows, key=len)
            lengths = [(len(one), True) for one in rows if len(one) < len(whole) and whole[: len(one)] == one]
            lengths += [(one, False) for one in values if type(one) is int]
            if not lengths:
                return []
            found.append((whole, lengths))
    except Exception:  # a dataset of the user's that has no such items, or cannot be read again
        return []
    return found


def permuted(one: Aligned, batches: int, length: int) -> torch.Tensor | None:
    """(B,): the sequence whose next tokens are the targets of each, if each has one of its own."""
    if not bool((one.batch == torch.arange(batches, device=one.batch.device).repeat_interleave(length)).all()):
        return None
    targets = one.loss.targets.view(batches, length)
    later = one.time.view(batches, length)[0] + 1
    inside = later < one.ids.shape[1]
    equal = (targets[:, None, inside] == one.ids[None, :, later[inside]]).all(-1)
    found = equal.long().argmax(1)
    return found if bool(equal.any(1).all()) and len(found.unique()) == batches else None


def counted_of(one: Aligned, valid: torch.Tensor, part: torch.Tensor) -> torch.Tensor | None:
    """(N,): the rows whose targets are in this part (B, T) of the tokens; None if less than half of it is counted."""
    masked = valid.clone()
    masked[valid] = part[one.batch[valid], one.time[valid] + 1]
    number = int(masked.sum())
    return masked if number >= 2 and number >= 0.5 * int(part[:, 1:].sum()) else None


def describe(one: Aligned, matched: dict[int, tuple[int, int]]) -> str:
    parts = [
        f"{equal} of {number} are the input at t{offset:+d}" for offset, (equal, number) in matched.items() if number
    ]
    return f"of the targets of positions t, {', '.join(parts[:3])}"


def padding_side(ids: torch.Tensor, token: int) -> str:
    is_token = ids == token
    return "left" if int(is_token[:, 0].sum()) > int(is_token[:, -1].sum()) else "right"


def padding_of(ids: torch.Tensor) -> tuple[int, torch.Tensor, str] | None:
    """The padding token, where it is (B, T), and its side; None if nothing is certainly padding.

    Padding: at least two rows end (or begin) with runs of one token, of different lengths, two or longer, and the token
    occurs nowhere else, except that all rows may begin (or end) with it.
    """
    if ids.shape[0] < 2:
        return None
    for side, edge in (("right", ids[:, -1]), ("left", ids[:, 0])):
        for token in edge.unique().tolist():
            is_token = (ids == token).long()
            runs = (is_token.flip(1) if side == "right" else is_token).cumprod(1)
            pads = runs.flip(1) if side == "right" else runs
            lengths = pads.sum(1)
            long = lengths >= 2
            if int(long.sum()) < 2 or bool((lengths == ids.shape[1]).any()):
                continue
            opposite = ids[:, 0 if side == "right" else -1]
            alone = int(is_token.sum()) - int(pads.sum()) in (0, len(ids) if bool((opposite == token).all()) else 0)
            if len(lengths.unique()) > 1 and alone and int(lengths.max()) >= 3:
                return int(token), pads.bool(), side
    return None


def why_high(one: Aligned, value: float, usual: float, spread: float) -> tuple[str, str, str]:
    """Cause, remedy and proof of a first loss far above ln V."""
    forward, rows = one.loss.forward, one.loss.rows
    assert forward is not None and rows is not None
    module = forward.module
    part = slice(256)
    rescaled = mean_loss(rows[part].double() / max(spread, 1e-9) * 0.5, one.loss.targets[part], one.counted[part])
    proof = f"the logits have a spread of {spread:.2f}; with a spread of 0.5 the same model has the loss {rescaled:.3f}"
    vocabulary = rows.shape[-1]
    heads = [
        (name, parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.dim() == 2 and parameter.shape[0] == vocabulary
    ]
    same = len({id(parameter) for _, parameter in heads}) < len(heads)
    deviations = {name: float(parameter.detach().double().std()) for name, parameter in heads}
    head = heads[-1] if heads else None
    if head is not None:
        width = head[1].shape[1]
        deviation = deviations[head[0]]
        told = f"{head[0]} has a standard deviation of {deviation:.3g}"
        if deviation > 2.5 / width**0.5 or deviation > 0.2:
            if same:
                return (
                    f"the head is tied to the token embedding, and {told}",
                    "initialise the embedding with a standard deviation of 0.02",
                    proof,
                )
            return f"initialisation: {told}", "initialise it with a standard deviation of 0.02", proof
        return (
            f"scale: {told}, which is small, but what enters it is not: is there a norm before it?",
            "normalise before the head, and initialise with a standard deviation of 0.02",
            proof,
        )
    return "the logits are large", "initialise with a standard deviation of 0.02", proof
