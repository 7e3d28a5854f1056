"""Training: the loss that GPT-2 has, resumed runs, bfloat16, and Trainer."""

import pytest
import torch
from pairs import VOCAB, random_ids, random_pair
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM
from hf_gpt_scratch.model.weight_map import BASE, rows
from hf_gpt_scratch.weights.parity import FP32_LOSS, relative_error

pytestmark = pytest.mark.slow

NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SAMPLES = [{"input_ids": ids, "labels": ids} for ids in random_ids(32, 16)]


def train(model, directory, steps=8, resume=None, **settings):
    """Runs Trainer and gives back the losses of each step and the trained model."""
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=SAMPLES)
    trainer.train(resume_from_checkpoint=resume)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.model


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}],
    ids=str,
)
def test_trainer_has_the_officials_loss_curve(tmp_path, settings):
    gpt2, scratch = random_pair(**NO_DROPOUT)
    # Newer versions of Trainer know by the loss type that a row of T labels has T - 1 targets. GPT2LMHeadModel has no
    # type, by its name, and its accumulated loss is (T - 1)/T of the right one.
    gpt2.loss_type = scratch.loss_type
    theirs, _ = train(gpt2, tmp_path / "gpt2", **settings)
    ours, _ = train(scratch, tmp_path / "ours", **settings)
    assert len(ours) == 8
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_trainer_decays_the_weights_that_it_decays_in_the_official_model():
    gpt2, scratch = random_pair()
    theirs, ours = (set(Trainer.get_decay_parameter_names(None, model)) for model in (gpt2, scratch))
    assert 0 < len(theirs) < len(list(gpt2.parameters()))
    named = {
        f"model.{name}"
        for row in rows(scratch.config.n_layers, BASE)
        if f"transformer.{row.theirs}" in theirs
        for name in row.ours
    }
    assert ours - {"out_head.weight"} == named  # the head is tied


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    _, scratch = random_pair()
    start = {name: tensor.clone() for name, tensor in scratch.state_dict().items()}
    whole, finished = train(scratch, tmp_path / "run")

    again = GPTScratchForCausalLM(scratch.config)
    again.load_state_dict(start)
    resumed, also_finished = train(again, tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed == pytest.approx(whole, rel=1e-6)
    for name, tensor in finished.state_dict().items():
        torch.testing.assert_close(also_finished.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=str)
def test_checkpoints_of_trainer_load_and_export(tmp_path, settings):
    _, scratch = random_pair()
    _, trained = train(scratch, tmp_path, steps=4, **settings)
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in trained.state_dict().items())
    trained.save_as_gpt2(tmp_path / "official")
    official, info = GPT2LMHeadModel.from_pretrained(tmp_path / "official", output_loading_info=True)
    assert not info["missing_keys"]
    ids = random_ids()
    assert relative_error(official(ids).logits, loaded.eval()(ids).logits) <= 1e-5


def test_loss_of_accumulated_batches_counts_every_token_once():
    gpt2, scratch = random_pair(**NO_DROPOUT)
    ids = random_ids(4, 16)
    labels = ids.masked_fill(torch.arange(16) >= torch.tensor([[16], [4], [9], [12]]), -100)
    whole = scratch(ids, labels=labels).loss
    tokens = (labels[:, 1:] != -100).sum()
    for model in (gpt2, scratch):
        parts = [model(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=tokens).loss for i in range(4)]
        assert abs(sum(parts) - whole) <= FP32_LOSS * whole
    unaware = sum(scratch(ids[i : i + 1], labels=labels[i : i + 1]).loss for i in range(4)) / 4
    assert abs(unaware - whole) > FP32_LOSS * whole


def test_bfloat16_autocast_is_as_close_to_float32_as_the_officials():
    gpt2, scratch = random_pair(**NO_DROPOUT)
    ids = random_ids(4, 32)
    exact = gpt2(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = gpt2(ids).logits, scratch(ids).logits
    assert ours.dtype == theirs.dtype
    assert (ours - exact).square().mean() <= 1.1 * (theirs - exact).square().mean()
    assert (ours - exact).abs().max() > 0


def test_gradients_reach_every_parameter_and_dropout_is_on():
    model = random_pair()[1].train()
    ids = random_ids()
    set_seed(1)
    losses = [model(ids, labels=ids).loss for _ in range(2)]
    assert losses[0] != losses[1]
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.get_input_embeddings().weight.grad.shape == (VOCAB, 48)


@pytest.mark.parametrize("ignored", [True, False])
def test_what_trainer_predicts_are_the_logits_alone(tmp_path, monkeypatch, ignored):
    """The cache of each batch would be gathered, too; twin: a config that does not say what to leave out."""
    _, scratch = random_pair()
    if not ignored:
        monkeypatch.setattr(GPTScratchConfig, "keys_to_ignore_at_inference", [])
    settings = dict(report_to=[], disable_tqdm=True, use_cpu=True, use_cache=True)
    arguments = TrainingArguments(output_dir=str(tmp_path), **settings)
    trainer = Trainer(model=scratch, args=arguments)
    if ignored:
        assert trainer.predict(SAMPLES).predictions.shape == (len(SAMPLES), 16, VOCAB)
    else:
        with pytest.raises((TypeError, AttributeError, ValueError)):
            trainer.predict(SAMPLES).predictions.shape  # noqa: B018
