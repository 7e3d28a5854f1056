"""AdamW's state goes along: Trainer has the losses that the source's program would have had."""

import json
import math

import pytest
import torch
from book import HEADS, MODELS, VOCAB, adapt, plain
from pairs import randomize
from programs import Fused, nanogpt_file
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from hf_gpt_scratch import ConversionError, GPTScratchForCausalLM, ParityError, convert, export
from hf_gpt_scratch.weights.formats.torch_file import save_lazily

BEFORE, AFTER, LENGTH, BATCH = 5, 20, 12, 2
IDS = torch.randint(VOCAB, (BEFORE + AFTER, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))
NANO = dict(learning_rate=6e-3, min_lr=6e-4, warmup_iters=3, lr_decay_iters=BEFORE + AFTER, decay_lr=True)
NANO |= dict(grad_clip=1.0, batch_size=BATCH, gradient_accumulation_steps=1, weight_decay=0.1, beta1=0.9, beta2=0.95)


def book_run(model, optimizer, ids):
    """The loop of chapter 5."""
    losses = []
    for batch in ids:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def nanogpt_optimizer(model, **settings):
    """`configure_optimizers` of nanoGPT."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=NANO["learning_rate"], betas=(0.9, 0.95), **settings)


def nanogpt_lr(step):
    rate, least, warmup = NANO["learning_rate"], NANO["min_lr"], NANO["warmup_iters"]
    if step < warmup:
        return rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / (NANO["lr_decay_iters"] - warmup)
    return least + 0.5 * (1 + math.cos(math.pi * done)) * (rate - least)


def nanogpt_run(model, optimizer, ids, start=0):
    """The loop of nanoGPT; at its end the learning rate is the next step's, as it is when nanoGPT saves."""
    losses = []
    for step, batch in enumerate(ids, start):
        for group in optimizer.param_groups:
            group["lr"] = nanogpt_lr(step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    for group in optimizer.param_groups:
        group["lr"] = nanogpt_lr(start + len(ids))
    return losses


def trainer_run(directory, out, kind=GPTScratchForCausalLM, frozen=(), **settings):
    model = kind.from_pretrained(directory, **({"drop_rate": 0.0} if kind is GPTScratchForCausalLM else NO_DROPOUT))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(tuple(frozen)))
    given = json.loads((directory / "training_arguments.json").read_text())
    given = {"max_steps": BEFORE + AFTER, "per_device_train_batch_size": BATCH, **given, **settings}
    arguments = TrainingArguments(str(out), report_to=[], disable_tqdm=True, use_cpu=True, **given)
    losses = []

    class InOrder(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    # The first label is never predicted; marked so, it is not counted by an older Trainer, nor for GPT2LMHeadModel.
    labels = IDS[BEFORE:].flatten(0, 1).clone()
    labels[:, 0] = -100
    rows = [{"input_ids": row, "labels": to} for row, to in zip(IDS[BEFORE:].flatten(0, 1), labels, strict=True)]
    trainer = InOrder(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(directory))
    return losses


NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def book_file(path, make=lambda: plain(False), **settings):
    """A model of the book that has made some steps, its file, and the losses that it then has."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 4e-3, "weight_decay": 0.1, **settings})
    book_run(model, optimizer, IDS[:BEFORE])
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, path)
    return book_run(model, optimizer, IDS[BEFORE:])


def nano_file(path, bias=True, config=NANO, change=lambda state: state):
    model = Fused(bias=bias, vocab=VOCAB)
    optimizer = nanogpt_optimizer(model)
    nanogpt_run(model, optimizer, IDS[:BEFORE])
    nanogpt_file(path, model, optimizer=change(optimizer.state_dict()), iter_num=BEFORE, config=config)
    return nanogpt_run(model, optimizer, IDS[BEFORE:], BEFORE)


def equal(ours, theirs):
    return len(ours) == AFTER and ours == pytest.approx(theirs, rel=1e-5)


def told(receipt):
    [note] = [note for note in receipt["notes"] if "optimizer" in note]
    return note


def no_dropout(make):
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["the book's", "without biases of query, key and value", "GPTModelFast", "heads in a list", "einsum"]
)
def test_trainer_goes_on_with_the_losses_of_the_books_loop(tmp_path, name):
    theirs = book_file(tmp_path / "model_and_optimizer.pth", lambda: no_dropout(MODELS[name]))
    heads = {} if "list" in name else {"n_heads": HEADS}
    receipt = convert(tmp_path / "model_and_optimizer.pth", tmp_path / "out", check="weights", **heads)
    assert "after 5 steps" in told(receipt)
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json"} <= receipt["target"]["files"].keys()
    assert equal(trainer_run(tmp_path / "out", tmp_path / "run"), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "gpt2"])
@pytest.mark.parametrize("bias", [True, False])
def test_trainer_goes_on_with_the_losses_of_nanogpts_loop(tmp_path, bias, kind):
    theirs = nano_file(tmp_path / "ckpt.pt", bias)
    options = dict(check="weights", activation_function="gelu")
    if kind == "native":
        receipt = convert(tmp_path / "ckpt.pt", tmp_path / "out", **options)
    else:
        receipt = export(tmp_path / "ckpt.pt", tmp_path / "out", "gpt2", **options)
    freeze = [note for note in receipt["notes"] if "freeze them" in note]
    assert bool(freeze) is not bias
    given = json.loads((tmp_path / "out" / "training_arguments.json").read_text())
    assert (given["max_grad_norm"], given["warmup_steps"], given["max_steps"]) == (1.0, 3, BEFORE + AFTER)
    model = GPTScratchForCausalLM if kind == "native" else GPT2LMHeadModel
    frozen = () if bias else ("bias", "shift")  # and those of which the note speaks
    assert equal(trainer_run(tmp_path / "out", tmp_path / "run", model, frozen), theirs)
    if not bias:  # whoever does not freeze them is told, by torch
        with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
            trainer_run(tmp_path / "out", tmp_path / "run", model)


def damaged(directory, change):
    state = torch.load(directory / "optimizer.pt")
    change(state)
    torch.save(state, directory / "optimizer.pt")


def square(state):
    return [one for one in state["state"].values() if one["exp_avg"].ndim == 2 and len(set(one["exp_avg"].shape)) == 1]


def swap(state):
    for one in square(state):
        one["exp_avg"], one["exp_avg_sq"] = one["exp_avg_sq"], one["exp_avg"].abs()


def transpose(state):
    for one in square(state):
        one["exp_avg"] = one["exp_avg"].T.contiguous()


def forget_the_step(state):
    for one in state["state"].values():
        one["step"] = torch.tensor(0.0)


def turn_keys_and_values(state):
    first, second, *_ = square(state)
    first["exp_avg"], second["exp_avg"] = second["exp_avg"], first["exp_avg"]


@pytest.mark.slow
@pytest.mark.parametrize("change", [swap, transpose, forget_the_step, turn_keys_and_values, lambda state: None])
def test_each_part_of_the_state_matters(tmp_path, change):
    """Twins of the two tests above: with a mistake in the state the losses are others."""
    theirs = nano_file(tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "out", check="weights", activation_function="gelu")
    damaged(tmp_path / "out", change)
    assert equal(trainer_run(tmp_path / "out", tmp_path / "run"), theirs) is (change.__name__ == "<lambda>")


@pytest.mark.slow
def test_without_the_schedule_the_losses_are_others(tmp_path):
    theirs = nano_file(tmp_path / "ckpt.pt")
    convert(tmp_path / "ckpt.pt", tmp_path / "out", check="weights", activation_function="gelu")
    state = torch.load(tmp_path / "out" / "scheduler.pt")
    torch.save({**state, "last_epoch": 0}, tmp_path / "out" / "scheduler.pt")
    assert not equal(trainer_run(tmp_path / "out", tmp_path / "run"), theirs)


def test_what_is_written_is_compared_with_the_source(tmp_path, monkeypatch):
    book_file(tmp_path / "model.pth")

    def transposed(tensors, content, *rest):
        def wrong(values):
            for one in square(found := content(values)):
                one["exp_avg_sq"] = one["exp_avg_sq"].T
            return found

        return save_lazily(tensors, wrong, *rest)

    monkeypatch.setattr("hf_gpt_scratch.weights.optimizer.save_lazily", transposed)
    with pytest.raises(ParityError, match=r"of the optimizer's state: .*--no-optimizer"):
        convert(tmp_path / "model.pth", tmp_path / "out", n_heads=HEADS, check="weights")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "model.pth", tmp_path / "out", n_heads=HEADS, check="weights", optimizer=False)


def notes_of(tmp_path, content, **options):
    torch.save(content, tmp_path / "model.pth")
    receipt = convert(tmp_path / "model.pth", tmp_path / "out", check="weights", overwrite=True, **options)
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    return told(receipt)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "model.pth"
    book_file(path)
    return path


def to_adam(state):
    state["param_groups"][0]["decoupled_weight_decay"] = False


def to_sgd(state):
    state["state"] = {i: {"momentum_buffer": one["exp_avg"]} for i, one in state["state"].items()}


def to_sorted(state):
    count = len(state["state"])
    state["state"] = {i: state["state"][count - 1 - i] for i in range(count)}


def drop_a_parameter(state):
    del state["state"][state["param_groups"][0]["params"].pop()]


def cut_in_three(state):
    [group] = state["param_groups"]
    numbers = group["params"]
    state["param_groups"] = [{**group, "params": part} for part in (numbers[:3], numbers[3:5], numbers[5:])]


def lose_the_groups(state):
    del state["param_groups"]


def never_step(state):
    state["state"] = {}


def spoil(state):
    state["param_groups"][0]["lr"] = torch.tensor(1.0)


CHANGES = {
    to_adam: "Adam's, whose weight decay is part of the gradient",
    to_sgd: "is not AdamW's step and moments",
    to_sorted: "in another order than the model's",
    drop_a_parameter: "parameters, and the model",
    cut_in_three: "nothing tells which parameters its 3 groups have",
    lose_the_groups: "it is not as torch saves it",
    never_step: "it has made no step",
    spoil: "is not a number that AdamW takes",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_state_without_a_counterpart_is_left_behind_and_the_note_says_why(tmp_path, trained, change):
    content = torch.load(trained)
    change(content["optimizer_state_dict"])
    note = notes_of(tmp_path, content, n_heads=HEADS)
    assert note.startswith("left behind: the optimizer's state under 'optimizer_state_dict', since ")
    assert CHANGES[change] in note


def test_groups_that_trainer_does_not_have_are_left_behind(tmp_path):
    """nanoGPT before June 2023 and minGPT do not decay embeddings."""
    model = plain(False)
    named = dict(model.named_parameters())
    decayed = [p for name, p in named.items() if p.ndim == 2 and "emb" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "emb" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    book_run(model, optimizer, IDS[:2])
    content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    assert "its groups are not matrices and the rest" in notes_of(tmp_path, content, n_heads=HEADS)


def test_moments_of_two_matrices_do_not_become_one(tmp_path, trained):
    content = torch.load(trained)
    content["model_state_dict"]["out_head.weight"] = content["model_state_dict"]["tok_emb.weight"].clone()
    assert "which are equal and become one matrix" in notes_of(tmp_path, content, n_heads=HEADS)


def test_heads_that_were_trained_for_different_numbers_of_steps_are_not_joined(tmp_path):
    book_file(tmp_path / "model.pth", MODELS["heads in a list"])
    content = torch.load(tmp_path / "model.pth")
    names = [name for name, _ in MODELS["heads in a list"]().named_parameters()]
    content["optimizer_state_dict"]["state"][names.index("trf_blocks.0.att.heads.1.W_key.weight")]["step"] += 1
    assert "trained for different numbers of steps" in notes_of(tmp_path, content)


def test_adapters_leave_their_moments_behind(tmp_path):
    model = randomize(adapt(plain()))
    content = {"model_state_dict": model.state_dict()}
    optimizer = torch.optim.AdamW(model.parameters())
    book_run(model, optimizer, IDS[:2])
    content["optimizer_state_dict"] = optimizer.state_dict()
    assert "adapters, which are merged" in notes_of(tmp_path, content, n_heads=HEADS, lora_scale=1.5)


def test_what_is_not_wanted_or_has_no_place_is_noted(tmp_path, trained):
    options = dict(check="weights", n_heads=HEADS)
    (tmp_path / "nano").mkdir()
    nano_file(tmp_path / "nano" / "ckpt.pt")
    assert told(convert(trained, tmp_path / "out", optimizer=False, **options)).endswith(
        "since optimizer=False says so"
    )
    receipt = export(
        tmp_path / "nano" / "ckpt.pt", tmp_path / "bin", "llmc", check="weights", activation_function="gelu_new"
    )
    assert told(receipt).endswith("since model.bin has no place for it")
    content = torch.load(trained)
    content["second"] = content["optimizer_state_dict"]
    assert "it is not one optimizer" in notes_of(tmp_path, content, n_heads=HEADS)
    convert(trained, tmp_path / "native", **options)
    receipt = export(tmp_path / "native", tmp_path / "official", "gpt2", check="weights")
    assert any(note.startswith("left behind: optimizer.pt") for note in receipt["notes"])


@pytest.mark.parametrize("kind, value, words", [("exp_avg", math.nan, "NaN"), ("exp_avg_sq", -1.0, "below 0")])
def test_moments_that_adamw_cannot_have_are_an_error_whose_remedy_works(tmp_path, trained, kind, value, words):
    content = torch.load(trained)
    content["optimizer_state_dict"]["state"][4][kind].view(-1)[3] = value
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(ConversionError, match=rf"{words}.*optimizer=False"):
        convert(tmp_path / "model.pth", tmp_path / "out", n_heads=HEADS, check="weights")
    convert(tmp_path / "model.pth", tmp_path / "out", n_heads=HEADS, check="weights", optimizer=False)


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "or of a schedule"),
        ({**NANO, "learning_rate": 1.0}, "not what its config says for step 5"),
        ({**NANO, "warmup_iters": 0.5}, "is not nanoGPT's"),
        ({**NANO, "decay_lr": False}, None),
    ],
)
def test_a_schedule_that_is_not_known_is_noted_and_the_learning_rate_stays(tmp_path, config, words):
    nano_file(tmp_path / "ckpt.pt", config=config)
    receipt = convert(tmp_path / "ckpt.pt", tmp_path / "out", check="weights", activation_function="gelu")
    given = json.loads((tmp_path / "out" / "training_arguments.json").read_text())
    assert given["lr_scheduler_type"] == "constant"
    assert given["learning_rate"] == pytest.approx(nanogpt_lr(BEFORE))
    assert any(words in note for note in receipt["notes"]) if words else "learning rate" not in str(receipt["notes"])


def test_one_that_was_saved_in_its_warm_up_says_how_trainer_differs(tmp_path):
    config = {**NANO, "warmup_iters": 10, "learning_rate": nanogpt_lr(BEFORE) * 11 / 6, "min_lr": 0.0}
    nano_file(tmp_path / "ckpt.pt", config=config)
    receipt = convert(tmp_path / "ckpt.pt", tmp_path / "out", check="weights", activation_function="gelu")
    assert any("saved in its warm-up" in note for note in receipt["notes"])


@pytest.mark.slow
def test_amsgrad_has_its_third_moment(tmp_path):
    theirs = book_file(tmp_path / "model.pth", lambda: no_dropout(plain), amsgrad=True)
    convert(tmp_path / "model.pth", tmp_path / "out", n_heads=HEADS, check="weights")
    assert equal(trainer_run(tmp_path / "out", tmp_path / "run"), theirs)
