"""LoRA by PEFT on the book's layers: trained, saved, loaded, merged, exported."""

import pytest
import torch
from pairs import random_ids, random_pair
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

pytestmark = pytest.mark.slow

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
