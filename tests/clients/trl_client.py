# /// script
# dependencies = ["torch==2.13.0", "trl==1.16.0", "transformers==5.24.0"]
# ///
"""TRL: every trainer a few steps by SGD, without dropout; the logged losses and the trained weights are compared."""

import tempfile
from functools import partial
from pathlib import Path

from checkpoints import WITHOUT_DROPOUT, checkpoints, row, same_curve, same_weights
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import hf_gpt_scratch  # noqa: F401  # for the Auto classes

TEXT = "the cat sat on the mat and then it went to sleep because every effort moves you further along the way"
TEXTS = [TEXT[start : start + length] for start, length in ((0, 15), (3, 49), (17, 62), (1, 98), (9, 36), (24, 48))]
STEPS = dict(
    max_steps=4,
    per_device_train_batch_size=2,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    optim="sgd",
    learning_rate=0.5,
    lr_scheduler_type="constant",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)


def completions():
    return [{"prompt": text, "completion": f" {TEXTS[-number]}"} for number, text in enumerate(TEXTS, 1)]


def preferences():
    return [{**one, "chosen": one.pop("completion"), "rejected": f" {TEXTS[0]}"} for one in completions()]


def judged():
    return [{**one, "label": number % 2 == 0} for number, one in enumerate(completions())]


def reward(completions, **kwargs):
    """The share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / (len(text) + 1) for text in completions]


def trained(trainer_class, config_class, data, auto_class, directory, how, **options):
    """The figures of the steps, and what was saved after them, of a model given as an instance or as a directory."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(folder, **{**STEPS, **options})
        model = str(directory)
        if how == "instance":
            model = auto_class.from_pretrained(directory)
            # Trainer knows by it that a row of T labels has T - 1 targets. GPT2LMHeadModel has none, by its name, and
            # its loss is (T - 1)/T of the right one.
            model.loss_type = "ForCausalLM"
        kwargs = dict(reward_funcs=reward) if trainer_class is GRPOTrainer else {}
        trainer = trainer_class(model, args=arguments, train_dataset=Dataset.from_list(data), **kwargs)
        trainer.train()
        trainer.save_model(f"{folder}/trained")
        curve = [{k: log[k] for k in WATCHED & log.keys()} for log in trainer.state.log_history if "loss" in log]
        return curve, auto_class.from_pretrained(f"{folder}/trained")


WATCHED = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "reward", "kl", "entropy", "accuracy"}
KINDS = {
    "SFTTrainer": partial(trained, SFTTrainer, SFTConfig, [{"text": text} for text in TEXTS]),
    "SFTTrainer, packing": partial(
        trained, SFTTrainer, SFTConfig, [{"text": text} for text in TEXTS * 4], packing=True, max_length=48
    ),
    "SFTTrainer, packing, wrapped": partial(
        trained,
        SFTTrainer,
        SFTConfig,
        [{"text": text} for text in TEXTS * 4],
        packing=True,
        packing_strategy="wrapped",
        max_length=48,
    ),
    "SFTTrainer, loss on the completion alone": partial(trained, SFTTrainer, SFTConfig, completions()),
    "SFTTrainer, checkpointed": partial(
        trained, SFTTrainer, SFTConfig, completions(), gradient_checkpointing=True, gradient_accumulation_steps=2
    ),
    "DPOTrainer": partial(trained, DPOTrainer, DPOConfig, preferences()),
    "KTOTrainer": partial(trained, KTOTrainer, KTOConfig, judged()),
    "RewardTrainer": partial(trained, RewardTrainer, RewardConfig, preferences()),
    "GRPOTrainer": partial(
        trained,
        GRPOTrainer,
        GRPOConfig,
        [{"prompt": text} for text in TEXTS],
        num_generations=2,
        max_completion_length=12,
        beta=0.1,
    ),
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = checkpoints(Path(folder), **WITHOUT_DROPOUT)
        classifiers = checkpoints(Path(folder) / "classifiers", num_labels=1, pad_token_id=0, **WITHOUT_DROPOUT)
        for what, run in KINDS.items():
            rewards = what == "RewardTrainer"
            official, ours = classifiers if rewards else models
            auto_class = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
            expected, gpt2 = run(auto_class, official, "instance")
            moved = not same_weights(auto_class.from_pretrained(official), gpt2)
            same = [moved]
            for how in ("instance", "directory"):
                curve, model = run(auto_class, ours, how)
                same += [same_curve(curve, expected), same_weights(gpt2, model)]
            row(f"{what}: losses, and the weights that are saved; by instance and by directory", all(same))


if __name__ == "__main__":
    main()
