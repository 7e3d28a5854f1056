"""PEFT on the book's layers: adapters trained, saved, loaded, merged, exported; every method with its defaults."""

import importlib

import pytest
import torch
from pairs import random_ids, random_pair
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import constants
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, peft_rows
from hf_gpt_scratch.model.interop import for_each_type
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),  # of the official layers, and of the base model's config
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),  # PEFT uses the old name
]

TARGETS = ["W_query", "W_key", "W_value", "out_proj", "ff.layers.0", "ff.layers.2"]


@pytest.fixture(params=["from our checkpoint", "from the official checkpoint"])
def base(request, tmp_path):
    """A function that loads the model anew each time."""
    gpt2, scratch = random_pair()
    (scratch if "our" in request.param else gpt2).save_pretrained(tmp_path / "base")
    return lambda: GPTScratchForCausalLM.from_pretrained(tmp_path / "base")


def test_adapters_train_save_load_merge_and_export(base, tmp_path):
    ids = random_ids()
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(TARGETS) * 3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    expected = model.eval()(input_ids=ids).logits
    assert relative_error(expected, base()(ids).logits) > 100 * FP32_LOGITS
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    plain = base()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(plain.eval()(ids).logits, expected)

    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged.save_as_gpt2(tmp_path / "official")
    for model_class, directory in ((GPTScratchForCausalLM, "merged"), (GPT2LMHeadModel, "official")):
        again = model_class.from_pretrained(tmp_path / directory)
        assert relative_error(expected, again(ids).logits) <= FP32_LOGITS


TASK = dict(task_type="CAUSAL_LM")
PROMPT = dict(num_virtual_tokens=5, **TASK)
# Methods whose parameters on the official model and on ours are the same numbers.
ALIKE = {
    "IA3": lambda: IA3Config(**TASK),
    "FourierFT": lambda: FourierFTConfig(n_frequency=50, **TASK),
    "layer norms": lambda: LNTuningConfig(**TASK),
    "prefix": lambda: PrefixTuningConfig(**PROMPT),
    "prefix, projected": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **PROMPT),
    "prompt": lambda: PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: PromptEncoderConfig(encoder_hidden_size=16, **PROMPT),
}
LOW_RANK = {
    "LoRA": lambda: LoraConfig(**TASK),
    "AdaLoRA": lambda: AdaLoraConfig(total_step=10, **TASK),
}


def pair():
    return random_pair(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def trained(model, config, steps=3):
    """The model with adapters, and its losses."""
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=0.5)
    ids, losses = random_ids(), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model.eval(), losses


@pytest.mark.parametrize("method", ALIKE)
def test_methods_with_their_defaults_train_and_generate_as_on_the_official_model(method, tmp_path):
    gpt2, scratch = pair()
    expected, losses = trained(gpt2, ALIKE[method]())
    model, found = trained(scratch, ALIKE[method]())
    assert found == pytest.approx(losses, rel=1e-5) and losses[-1] < losses[0] - 1e-3

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair()[1], tmp_path).eval()
    ids, prompt = random_ids(), random_ids(2, 9)
    for _ in range(12):  # without `generate`: with transformers 5.24 the official one loses PEFT's prompts
        prompt = torch.cat([prompt, expected(input_ids=prompt).logits[:, -1:].argmax(-1)], dim=1)
    for one in (model, loaded):
        assert relative_error(expected(input_ids=ids).logits, one(input_ids=ids).logits) <= 10 * FP32_LOGITS
        start = prompt[:, :9]
        options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert torch.equal(one.generate(input_ids=start, attention_mask=torch.ones_like(start), **options), prompt)


@pytest.mark.parametrize("method", LOW_RANK)
def test_low_rank_methods_change_the_same_weights_by_default(method):
    """The official layer has queries, keys and values side by side, ours are three: each has a third of B."""
    gpt2, scratch = pair()
    expected = get_peft_model(gpt2, LOW_RANK[method]()).eval()
    for parameter in expected.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3)
    model = get_peft_model(scratch, LOW_RANK[method]()).eval()
    changed = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    blocks = expected.base_model.model.transformer.h
    assert len(changed) == 3 * len(blocks)
    for theirs, ours in zip(blocks, model.base_model.model.model.trf_blocks, strict=True):
        joint = {name: p.data for name, p in theirs.attn.c_attn.named_parameters() if name.startswith("lora_")}
        for third, layer in enumerate((ours.att.W_query, ours.att.W_key, ours.att.W_value)):
            for name, parameter in layer.named_parameters():
                if name.startswith("lora_"):
                    parameter.data = joint[name].chunk(3)[third] if name.startswith("lora_B") else joint[name]
    ids = random_ids()
    assert relative_error(expected(input_ids=ids).logits, model(input_ids=ids).logits) <= 10 * FP32_LOGITS
    assert relative_error(expected(input_ids=ids).logits, pair()[1](ids).logits) > 1000 * FP32_LOGITS


def test_vera_with_its_defaults_trains_and_merges():
    model, losses = trained(pair()[1], VeraConfig(r=8, **TASK))
    assert losses[-1] < losses[0]
    ids = random_ids()
    expected = model(input_ids=ids).logits
    assert relative_error(expected, model.merge_and_unload()(ids).logits) <= 10 * FP32_LOGITS


class OwnConfig(GPTScratchConfig):
    model_type = "gpt_with_adapters"


class OwnForCausalLM(GPTScratchForCausalLM):  # defined after PEFT has been imported
    config_class = OwnConfig


@pytest.mark.parametrize("method", [*LOW_RANK, *ALIKE])
def test_a_class_of_ones_own_takes_every_method_with_its_defaults_too(method):
    config = {**LOW_RANK, **ALIKE}[method]
    _, ours = pair()
    own = OwnForCausalLM(OwnConfig.from_gpt2(pair()[0].config))
    names = [
        {name for name, p in get_peft_model(model, config()).named_parameters() if p.requires_grad}
        for model in (ours, own)
    ]
    assert names[0] == names[1] and names[0]


def test_rows_are_for_all_model_types_that_there_are_and_those_to_come():
    found = []
    for_each_type(found.append)
    assert {"gpt_scratch", "gpt_with_adapters"} <= set(found) and len(found) == len(set(found))

    class LaterConfig(GPTScratchConfig):
        model_type = "gpt_later"

    class LaterForCausalLM(GPTScratchForCausalLM):
        config_class = LaterConfig

    assert found[-1] == "gpt_later"


def test_each_of_pefts_tables_with_the_official_model_has_our_row():
    tables = {name: table for name, table in vars(constants).items() if name.startswith("TRANSFORMERS_MODELS_TO_")}
    with_gpt2 = [name for name, table in tables.items() if "gpt2" in table]
    assert len(with_gpt2) > 10
    for model_type in (GPTScratchConfig.model_type, OwnConfig.model_type):
        assert [name for name, table in tables.items() if model_type in table] == with_gpt2


def test_a_row_that_peft_has_stays_and_unknown_names_give_none(monkeypatch):
    tables = {
        "A": {"gpt2": ["c_attn"], "gpt_scratch": ["out_proj"]},
        "B": {"gpt2": ["attn.all"]},
        "C": {"gpt2": ["ln_f"]},
    }
    for name, table in tables.items():
        monkeypatch.setattr(constants, f"TRANSFORMERS_MODELS_TO_{name}", table, raising=False)
    importlib.reload(peft_rows)
    assert tables["A"]["gpt_scratch"] == ["out_proj"]
    assert "gpt_scratch" not in tables["B"]
    assert tables["C"]["gpt_scratch"] == ["final_norm"]
