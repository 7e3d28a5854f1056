"""What `generate` does, row by row: the ids must be those of the official GPT-2 with the same weights and seed."""

from pathlib import Path

import pytest
import torch
from modes import ROWS
from pairs import CONTEXT, random_ids, random_pair
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GPT2LMHeadModel,
    TextStreamer,
    set_seed,
)

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.model.compat import CACHE

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"


@pytest.fixture(scope="module")
def pair():
    return random_pair()


@pytest.fixture(scope="module")
def trained():
    return GPT2LMHeadModel.from_pretrained(TRAINED), GPTScratchForCausalLM.from_pretrained(TRAINED)


def prompts():
    """A batch padded on the left."""
    ids = random_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :7] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, seed=11, **settings):
    set_seed(seed)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(**settings)


NEEDS_A_GPU = ("offloaded cache", "offloaded static cache")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("row", ROWS)
def test_ids_are_the_officials(pair, row, attention):
    if row in NEEDS_A_GPU and not torch.cuda.is_available():
        pytest.skip("offloading moves the cache between a GPU and the processor")
    inputs, settings = prompts(), ROWS[row]
    if row == "prefill in chunks":
        inputs = {name: tensor[:1] for name, tensor in inputs.items()}
    for model in pair:
        model.set_attn_implementation(attention)
    theirs, ours = (generated(model, **inputs, **settings) for model in pair)
    assert theirs.shape[1] > 12
    assert torch.equal(theirs, ours)
    if settings.get("do_sample"):
        assert not torch.equal(ours, generated(pair[1], seed=12, **inputs, **settings))


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
@pytest.mark.long
def test_quantized_cache(pair, backend):
    axis = 0 if backend == "quanto" else 1
    settings = dict(backend=backend, nbits=4, residual_length=8, q_group_size=16, axis_key=axis, axis_value=axis)
    theirs, ours = (
        generated(model, input_ids=random_ids(2, 30), cache_implementation="quantized", cache_config=dict(settings))
        for model in pair
    )
    assert torch.equal(theirs, ours)


MOVED_OUT = {
    "diverse beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beams": {"num_beams": 3, "force_words_ids": [[5]]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
}


@pytest.mark.parametrize("row", MOVED_OUT)
def test_what_moved_out_of_transformers_is_refused_with_its_message(pair, row):
    told = []
    for model in pair:
        with pytest.raises(ValueError, match="trust_remote_code=True") as error:
            generated(model, **prompts(), **MOVED_OUT[row])
        told.append(str(error.value))
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ours assisted by the official", "the official assisted by ours", "ours by ours"])
@pytest.mark.parametrize("sample", [False, True])
def test_assisted_decoding(trained, how, sample):
    gpt2, scratch = trained
    target, assistant = {
        "ours assisted by the official": (scratch, gpt2),
        "the official assisted by ours": (gpt2, scratch),
        "ours by ours": (scratch, GPTScratchForCausalLM.from_pretrained(TRAINED)),
    }[how]
    inputs = AutoTokenizer.from_pretrained(TRAINED)("I had always", return_tensors="pt")
    settings = dict(max_new_tokens=20, do_sample=sample, pad_token_id=999)
    got = generated(target, assistant_model=assistant, **inputs, **settings)
    if sample:  # speculative sampling draws differently, so compare with the official pair
        other = GPT2LMHeadModel.from_pretrained(TRAINED)
        assert torch.equal(got, generated(gpt2, assistant_model=other, **inputs, **settings))
    else:
        assert torch.equal(got, generated(gpt2, **inputs, **settings))


def test_prompt_lookup(trained):
    inputs = AutoTokenizer.from_pretrained(TRAINED)("the picture the picture the", return_tensors="pt")
    theirs, ours = (generated(model, **inputs, prompt_lookup_num_tokens=4, pad_token_id=999) for model in trained)
    assert torch.equal(theirs, ours)
    assert torch.equal(ours, generated(trained[1], **inputs, pad_token_id=999))


def test_stop_strings(trained):
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    inputs = tokenizer("I had always", return_tensors="pt")
    settings = dict(max_new_tokens=40, stop_strings=["work"], tokenizer=tokenizer, pad_token_id=999)
    theirs, ours = (generated(model, **inputs, **settings) for model in trained)
    assert torch.equal(theirs, ours)
    assert ours.shape[1] < inputs.input_ids.shape[1] + 40
    assert tokenizer.decode(ours[0]).endswith("work")


def test_streamer_says_what_is_generated(trained, capsys):
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    inputs = tokenizer("I had always", return_tensors="pt")
    ids = generated(trained[1], **inputs, streamer=TextStreamer(tokenizer), pad_token_id=999)
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0]).strip()


def test_from_embeddings(pair):
    inputs = prompts()
    results = []
    for model in pair:
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        results.append(generated(model, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]))
    assert torch.equal(*results)
    assert torch.equal(results[1], generated(pair[1], **inputs)[:, 12:])


def test_continuing_from_a_cache_equals_starting_over(pair):
    ids = random_ids(2, 10)

    def go_on(model, ids, **settings):
        return generated(model, input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **settings)

    for model in pair:
        cache = DynamicCache(config=model.config)
        first = go_on(model, ids, max_new_tokens=5, **{CACHE: cache})
        then = go_on(model, first, max_new_tokens=5, **{CACHE: cache})
        assert torch.equal(then, go_on(model, ids, max_new_tokens=10))


def test_a_cropped_cache_is_a_shorter_one(pair):
    ids = random_ids(2, 10)
    model = pair[1]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        cache.crop(-4)
        changed = torch.cat([ids[:, :6], ids[:, 7:]], dim=1)
        got = model(changed[:, 6:], **{CACHE: cache}).logits
        torch.testing.assert_close(got, model(changed).logits[:, 6:], atol=1e-4, rtol=1e-4)


def test_scores_hidden_states_and_attentions_come_along(pair):
    settings = dict(return_dict_in_generate=True, output_scores=True, output_hidden_states=True, output_attentions=True)
    results = []
    for model in pair:
        model.set_attn_implementation("eager")
        results.append(generated(model, **prompts(), **settings))
    theirs, ours = results
    assert torch.equal(theirs.sequences, ours.sequences)
    for a, b in zip(theirs.scores, ours.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == len(ours.attentions) == 12
    assert ours.attentions[3][1].shape == theirs.attentions[3][1].shape


def test_the_context_can_be_filled_to_the_last_position(pair):
    ids = random_ids(1, CONTEXT - 4)
    results = [generated(model, input_ids=ids, max_new_tokens=5, eos_token_id=None) for model in pair]
    assert torch.equal(*results)
    assert results[1].shape == (1, CONTEXT + 1)
