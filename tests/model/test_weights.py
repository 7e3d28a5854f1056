"""The law of weights: each parameter owns its storage, contiguous, unless it is tied, and nothing that reads moves one.

Held to with the tools that break when it is broken.
"""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from pairs import random_gpt2, random_ids, random_pair
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed import checkpoint as distributed_checkpoint
from torch.nn.utils import parameters_to_vector, prune
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from hf_gpt_scratch import (
    GPTModel,
    GPTScratchConfig,
    GPTScratchForCausalLM,
    GPTScratchForSequenceClassification,
    GPTScratchModel,
    Int8Config,
)

OPTIONS = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    gpt2 = random_gpt2()
    directory = tmp_path_factory.mktemp("official")
    gpt2.save_pretrained(directory)
    return gpt2, directory


@pytest.fixture
def loaded(official):
    return GPTScratchForCausalLM.from_pretrained(official[1])


def places(model):
    return {name: weight.data_ptr() for name, weight in model.named_parameters()}


def not_owned(model):
    return [
        name
        for name, weight in model.named_parameters()
        if not weight.is_contiguous() or weight.untyped_storage().nbytes() != weight.numel() * weight.element_size()
    ]


def from_book(official, tmp_path):
    config = GPTScratchConfig.from_gpt2(official[0].config)
    return GPTScratchForCausalLM.from_book(GPTModel(config).state_dict(), config)


def from_native(official, tmp_path):
    GPTScratchForCausalLM.from_pretrained(official[1]).save_pretrained(tmp_path)
    return GPTScratchForCausalLM.from_pretrained(tmp_path)


def from_pickles(official, tmp_path):
    official[0].config.save_pretrained(tmp_path)
    torch.save(official[0].state_dict(), tmp_path / "pytorch_model.bin")
    return GPTScratchForCausalLM.from_pretrained(tmp_path)


def from_shards(official, tmp_path):
    official[0].save_pretrained(tmp_path, max_shard_size="100KB")
    return GPTScratchForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda official, _: GPTScratchForCausalLM.from_pretrained(official[1]),
        lambda official, _: GPTScratchModel.from_pretrained(official[1]),
        lambda official, _: GPTScratchForSequenceClassification.from_pretrained(official[1]),
        lambda official, _: GPTScratchForCausalLM.from_pretrained(official[1], dtype=torch.bfloat16),
        lambda official, _: GPTScratchForCausalLM.from_pretrained(official[1], device_map="auto"),
        lambda official, _: GPTScratchForCausalLM.from_gpt2(official[0]),
        lambda official, _: GPTScratchForCausalLM.from_pretrained(official[1]).to_gpt2(),
        lambda official, _: GPTScratchForCausalLM(GPTScratchConfig.from_gpt2(official[0].config)),
        from_book,
        from_native,
        from_pickles,
        from_shards,
    ],
    ids=[
        "official",
        "base",
        "classifier",
        "bf16",
        "device_map",
        "from_gpt2",
        "to_gpt2",
        "new",
        "book",
        "native",
        "pickles",
        "shards",
    ],
)
def test_each_parameter_owns_its_storage(official, make, tmp_path):
    model = make(official, tmp_path)
    assert not_owned(model) == []
    tied = {weight.data_ptr() for weight in model.parameters()}
    assert len(tied) == len(list(model.parameters()))


def test_a_part_of_a_larger_storage_would_be_noticed(loaded):
    key = loaded.model.trf_blocks[0].att.W_key
    key.bias.data = torch.cat([key.bias.data, key.bias.data])[: len(key.bias)]
    loaded.out_head.weight.data = loaded.out_head.weight.data.t().contiguous().t()
    assert not_owned(loaded) == ["model.tok_emb.weight", "model.trf_blocks.0.att.W_key.bias"]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_nothing_that_reads_moves_a_weight(loaded, mode, tmp_path):
    ids = random_ids()
    loaded.train(mode)
    before, alias = places(loaded), loaded.state_dict()
    numbers = {name: weight.clone() for name, weight in alias.items()}
    for read in (
        loaded.state_dict,
        loaded.train,
        loaded.eval,
        lambda: loaded.generate(ids, **OPTIONS),
        lambda: loaded(ids),
        lambda: loaded.save_pretrained(tmp_path / "native"),
        lambda: loaded.save_pretrained(tmp_path / "original", save_original_format=True),
        lambda: loaded.save_as_gpt2(tmp_path / "official"),
        loaded.to_gpt2,
        lambda: copy.deepcopy(loaded),
        lambda: pickle.dumps(loaded),
    ):
        read()
        assert places(loaded) == before
    assert all(torch.equal(weight, numbers[name]) for name, weight in loaded.state_dict().items())
    with torch.no_grad():
        loaded.model.tok_emb.weight.add_(1)
    assert torch.equal(alias["model.tok_emb.weight"], loaded.model.tok_emb.weight)  # an alias stays one


def test_no_class_of_ours_has_its_own_way_of_reading_weights():
    own = [c for c in GPTScratchForCausalLM.__mro__ if c.__module__.startswith("hf_gpt_scratch")]
    for name in ("train", "eval", "state_dict", "load_state_dict", "parameters", "named_parameters"):
        assert not any(name in vars(c) for c in own)


OPTIMIZERS = {
    "AdamW": lambda w, **how: torch.optim.AdamW(w, lr=1e-2, **how),
    "Adam": lambda w, **how: torch.optim.Adam(w, lr=1e-2, **how),
    "SGD": lambda w, **how: torch.optim.SGD(w, lr=1e-2, momentum=0.9, **how),
    "Adagrad": lambda w, **how: torch.optim.Adagrad(w, lr=1e-2, **how),
}


def losses(model, optimizer, training, between=lambda: None):
    model.train(training)
    optimizer = optimizer(model.parameters())
    told = []
    for step in range(4):
        loss = model(random_ids(seed=step % 2), labels=random_ids(seed=step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
        between()
        model.train(training)
    return told


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=["fused", "foreach", "loop"]
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_a_loaded_model_as_the_official_one(official, name, training, how):
    def optimizer(weights):
        return OPTIMIZERS[name](weights, **how)

    quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    gpt2 = GPT2LMHeadModel.from_pretrained(official[1], **quiet)
    rates = dict(drop_rate=0.0, drop_rate_emb=0.0, drop_rate_attn=0.0, drop_rate_shortcut=0.0)
    ours = GPTScratchForCausalLM.from_pretrained(official[1], **rates)
    expected = losses(gpt2, optimizer, training)
    got = losses(ours, optimizer, training, between=lambda: ours.generate(random_ids(), **OPTIONS))
    assert got == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]


def test_lbfgs_trains(loaded):
    optimizer = torch.optim.LBFGS(loaded.parameters(), max_iter=4)

    def closure():
        optimizer.zero_grad()
        loss = loaded(random_ids(), labels=random_ids()).loss
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert closure() < first


def test_pruning_and_vectors(loaded):
    vector = parameters_to_vector(loaded.parameters())
    assert torch.equal(vector, torch.cat([weight.flatten() for weight in loaded.parameters()]))
    layer = loaded.model.trf_blocks[0].ff.layers[0]
    prune.l1_unstructured(layer, "weight", amount=0.5)
    prune.random_structured(loaded.model.trf_blocks[1].att.out_proj, "weight", amount=0.25, dim=0)
    loaded(random_ids())
    assert (layer.weight == 0).float().mean() == 0.5
    prune.remove(layer, "weight")
    assert (loaded.model.trf_blocks[0].ff.layers[0].weight == 0).float().mean() == 0.5


def test_averages_follow_the_model_that_they_average(loaded):
    average = torch.optim.swa_utils.AveragedModel(loaded)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(1)
    loaded.state_dict()
    loaded.generate(random_ids(), **OPTIONS)
    average.update_parameters(loaded)
    average.update_parameters(loaded)
    for mean, weight in zip(average.module.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(mean, weight)


def test_accelerate_saves_and_loads_the_whole_model(loaded, tmp_path):
    accelerator = Accelerator(cpu=True)
    ids = random_ids()
    expected = loaded(ids).logits
    accelerator.save_model(loaded, tmp_path / "model")
    again = GPTScratchForCausalLM(loaded.config).eval()
    load_model(again, tmp_path / "model/model.safetensors")
    assert torch.equal(again(ids).logits, expected)

    model, optimizer = accelerator.prepare(loaded, torch.optim.AdamW(loaded.parameters(), lr=1e-2))
    for _ in range(2):
        accelerator.backward(model(ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(tmp_path / "state")
    trained = model(ids).logits

    def step():
        accelerator.backward(model(ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
        return model(ids).logits

    continued = step()
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(model(ids).logits, trained)
    torch.testing.assert_close(step(), continued)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_safetensors_saves_and_loads_the_whole_model(tied, tmp_path):
    _, ours = random_pair(tie_word_embeddings=tied)
    save_model(ours, tmp_path / "model.safetensors")
    again = GPTScratchForCausalLM(ours.config).eval()
    missing, unexpected = load_model(again, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert torch.equal(again(random_ids()).logits, ours(random_ids()).logits)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_hold_the_whole_model(loaded, tmp_path):
    expected = loaded(random_ids()).logits
    distributed_checkpoint.save(loaded.state_dict(), checkpoint_id=tmp_path / "dcp", no_dist=True)
    again = GPTScratchForCausalLM(loaded.config).eval()
    state = again.state_dict()
    distributed_checkpoint.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    again.load_state_dict(state)
    assert torch.equal(again(random_ids()).logits, expected)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_whole_and_their_own(loaded, duplicate):
    other = duplicate(loaded)
    assert not_owned(other) == []
    assert not set(places(other).values()) & set(places(loaded).values())
    assert other.out_head.weight is other.model.tok_emb.weight
    assert torch.equal(other(random_ids()).logits, loaded(random_ids()).logits)


def test_shared_memory_holds_the_weights(loaded):
    expected = loaded(random_ids()).logits
    loaded.share_memory()
    assert all(weight.is_shared() for weight in loaded.parameters())
    loaded.generate(random_ids(), **OPTIONS)
    assert all(weight.is_shared() for weight in loaded.parameters())
    assert torch.equal(loaded(random_ids()).logits, expected)


def test_a_loaded_model_can_be_saved_over_its_own_checkpoint(tmp_path):
    gpt2 = random_gpt2()
    gpt2.save_pretrained(tmp_path)
    model = GPTScratchForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for ours in (model, GPTScratchForCausalLM.from_pretrained(tmp_path)):
        torch.testing.assert_close(ours(random_ids()).logits, gpt2(random_ids()).logits)


def test_a_checkpoint_without_base_weights_is_refused(official, tmp_path):
    state_dict = official[0].state_dict()
    gone = "transformer.h.1.attn.c_attn.weight"
    kept = {name: weight for name, weight in state_dict.items() if name not in (gone, "lm_head.weight")}
    with pytest.raises(ValueError, match=r"no weights for model\.trf_blocks\.1\.att\.W_key\.weight, .*complete"):
        GPTScratchForCausalLM.from_pretrained(
            None, config=GPTScratchConfig.from_gpt2(official[0].config), state_dict=kept
        )


def test_a_new_head_is_no_reason_to_refuse(official):
    model = GPTScratchForSequenceClassification.from_pretrained(official[1], num_labels=3)
    assert model.score.weight.shape == (3, 48)
    theirs = GPT2ForSequenceClassification.from_pretrained(official[1], num_labels=3)
    assert theirs.score.weight.shape == model.score.weight.shape
    with_cross = GPTScratchForCausalLM.from_pretrained(official[1], add_cross_attention=True)
    assert with_cross.model.trf_blocks[0].cross_att is not None


@pytest.mark.parametrize("kind", ["int8_weight", "scales"])
@pytest.mark.parametrize("layer", ["model.trf_blocks.0.att.W_key", "model.trf_blocks.1.ff.layers.2", "out_head"])
def test_a_quantized_checkpoint_without_a_tensor_is_refused(official, tmp_path, layer, kind):
    options = dict(dtype=torch.bfloat16, quantization_config=Int8Config())
    GPTScratchForCausalLM.from_pretrained(official[1], **options).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {n: w for n, w in weights.items() if n != f"{layer}.{kind}"}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=rf"no weights for {layer}\.{kind}"):
        GPTScratchForCausalLM.from_pretrained(tmp_path)
