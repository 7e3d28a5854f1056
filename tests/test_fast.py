"""`for_decoding` generates the model's ids, and refuses what it cannot do."""

import copy
import pickle

import pytest
import torch
from modes import ROWS
from pairs import random_ids, random_pair, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import set_seed

from hf_gpt_scratch import GPTScratchDoubleHeadsModel, GPTScratchForCausalLM, for_decoding

OPTIONS = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(scope="module")
def pair():
    _, model = random_pair()
    return model, for_decoding(model)


def generated(model, **options):
    set_seed(0)
    return model.generate(**{"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options})


@pytest.mark.parametrize("row", [row for row in ROWS if "offloaded" not in row])
def test_it_generates_the_model_s_ids_in_every_mode(pair, row):
    ids = random_ids(2, 12)
    expected, got = (generated(model, input_ids=ids, **ROWS[row]) for model in pair)
    assert torch.equal(expected, got) and got.shape[1] > ids.shape[1]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 17, 33])
def test_with_any_number_of_rows(pair, batch):
    options = dict(input_ids=random_ids(batch), output_logits=True, return_dict_in_generate=True, do_sample=False)
    expected, got = (generated(model, **options) for model in pair)
    assert torch.equal(expected.sequences, got.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-4)


def test_with_padding_and_with_prompt_lookup_and_as_and_with_an_assistant(pair):
    model, fast = pair
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    padded = dict(input_ids=random_ids(2, 12), attention_mask=mask, do_sample=False)
    assert torch.equal(generated(model, **padded), generated(fast, **padded))
    one = dict(input_ids=random_ids(1, 12).repeat(1, 2), do_sample=False)
    expected = generated(model, **one)
    assert torch.equal(expected, generated(fast, prompt_lookup_num_tokens=3, **one))
    assistant = random_pair(seed=1)[1]
    for main, helper in ((fast, assistant), (model, for_decoding(assistant)), (fast, for_decoding(assistant))):
        assert torch.equal(expected, generated(main, assistant_model=helper, **one))


def test_logits_and_loss_are_the_model_s_and_backward_is_refused(pair):
    model, fast = pair
    ids = random_ids()
    expected, got = (each(ids, labels=ids) for each in pair)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss)
    for tensor in (got.loss, got.logits.sum()):
        with pytest.raises(RuntimeError, match="cannot have gradients; train the original"):
            tensor.backward()
    embedded = model.model.tok_emb(ids).detach().requires_grad_()
    with pytest.raises(RuntimeError, match="cannot have gradients"):
        fast(inputs_embeds=embedded).logits.sum().backward()
    with pytest.raises(RuntimeError, match="cannot have gradients"):
        fast(ids, return_dict=False)[0].sum().backward()


def test_it_stays_as_it_was_made_whatever_becomes_of_the_model():
    _, model = random_pair()
    fast, ids = for_decoding(model), random_ids()
    before = model.generate(ids, **OPTIONS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    model.to(torch.bfloat16)
    assert torch.equal(fast.generate(ids, **OPTIONS), before)
    del model
    assert torch.equal(fast.generate(ids, **OPTIONS), before)


def test_the_model_is_left_as_it_is():
    model = tiny_model().train()
    before = {name: (weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()}
    numbers = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    for_decoding(model)
    assert model.training and kinds == [type(module) for module in model.modules()]
    assert before == {name: (weight.data_ptr(), weight.requires_grad) for name, weight in model.named_parameters()}
    assert all(torch.equal(numbers[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda fast, path: fast.train(), "be trained"),
        (lambda fast, path: fast.state_dict(), "be saved"),
        (lambda fast, path: fast.save_pretrained(path), "be saved"),
        (lambda fast, path: fast.save_as_gpt2(path), "be saved"),
        (lambda fast, path: fast.to_gpt2(), "be saved"),
        (lambda fast, path: fast.push_to_hub("name"), "be saved"),
        (lambda fast, path: fast.load_state_dict({}), "load weights"),
        (lambda fast, path: fast.half(), "be converted"),
        (lambda fast, path: fast.to(torch.bfloat16), "be converted"),
        (lambda fast, path: fast.to("meta"), "be converted"),
        (lambda fast, path: fast.requires_grad_(True), "have gradients"),
        (lambda fast, path: fast.resize_token_embeddings(300), "other embeddings"),
        (lambda fast, path: fast.add_adapter(LoraConfig(target_modules=["W_query"])), "adapters"),
        (lambda fast, path: copy.deepcopy(fast), "be copied"),
        (lambda fast, path: copy.copy(fast), "be copied"),
        (lambda fast, path: pickle.dumps(fast), "be copied"),
        (lambda fast, path: torch.save(fast, path / "fast.pt"), "be copied"),
        (lambda fast, path: fast.num_parameters(), "count its parameters"),
        (lambda fast, path: torch.export.export(fast, (random_ids(),), strict=False), "be compiled or exported"),
    ],
)
def test_what_would_change_or_store_it_is_refused(pair, refused, message, tmp_path):
    with pytest.raises(RuntimeError, match=f"cannot [a-z ]*{message}.*; .*original"):
        refused(pair[1], tmp_path)
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_what_keeps_it_as_it_is_is_not(pair):
    _, fast = pair
    assert fast.eval() is fast and fast.train(False) is fast and for_decoding(fast) is fast
    assert fast.to("cpu") is fast and fast.to(torch.float32) is fast
    assert isinstance(fast, GPTScratchForCausalLM) and fast.device.type == "cpu" and fast.dtype == torch.float32


def test_it_tells_its_memory(pair):
    model, fast = pair
    head = model.out_head.weight.nbytes  # which was tied
    assert fast.get_memory_footprint() == model.get_memory_footprint() + head


def test_other_models_are_refused_by_what_they_are():
    with pytest.raises(TypeError, match="got a GPT2LMHeadModel"):
        for_decoding(random_pair()[0])
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["W_query"], init_lora_weights=False))
    with pytest.raises(TypeError, match=r"got a PeftModel.*merge_and_unload"):
        for_decoding(adapted)
    with pytest.raises(ValueError, match=r"W_query is Linear.*merge adapters"):
        for_decoding(adapted.get_base_model())
    merged = adapted.merge_and_unload()
    expected = merged.generate(random_ids(), **OPTIONS)
    assert torch.equal(for_decoding(merged).generate(random_ids(), **OPTIONS), expected)


def test_other_weights_are_refused_and_the_remedy_works():
    model = tiny_model().bfloat16()
    with pytest.raises(ValueError, match=r"is Parameter of torch.bfloat16 on cpu.*model.float\(\)"):
        for_decoding(model)
    assert isinstance(for_decoding(model.float()), GPTScratchForCausalLM)
    hook = model.out_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"out_head is Linear with hooks.*remove hooks"):
        for_decoding(model)
    hook.remove()
    for_decoding(model)


def test_subclasses_and_untied_heads_and_models_made_in_inference_mode():
    _, model = random_pair(tie_word_embeddings=False)
    assert torch.equal(for_decoding(model).generate(random_ids(), **OPTIONS), model.generate(random_ids(), **OPTIONS))
    two_heads = GPTScratchDoubleHeadsModel(model.config).eval()
    assert isinstance(for_decoding(two_heads), GPTScratchDoubleHeadsModel)
    with torch.inference_mode():
        fast = for_decoding(model)
    assert torch.equal(fast.generate(random_ids(), **OPTIONS), model.generate(random_ids(), **OPTIONS))


def test_a_saved_model_generates_the_same(pair, tmp_path):
    model, fast = pair
    model.save_pretrained(tmp_path)
    loaded = for_decoding(GPTScratchForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(loaded.generate(random_ids(), **OPTIONS), fast.generate(random_ids(), **OPTIONS))
