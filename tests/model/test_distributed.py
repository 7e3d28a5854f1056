"""Two processes give what one process gives: data, sharded-data, tensor and pipeline parallelism."""

import copy
import re

import pytest
import torch
from pairs import random_gpt2, random_ids, randomize
from processes import in_two_processes
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_gpt_scratch import GPTScratchConfig, GPTScratchForCausalLM, GPTScratchForSequenceClassification, GPTScratchModel
from hf_gpt_scratch.model.configuration_gpt_scratch import SHARDED_LOADING
from hf_gpt_scratch.weights.parity import FP32_GRADIENTS, FP32_LOGITS, greedy_ids, relative_error, relative_errors

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
NO_DROPOUT = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
SMALL = dict(vocab_size=97, context_length=16, emb_dim=16, n_heads=2, n_layers=2)
needs_sharded_loading = pytest.mark.skipif(not SHARDED_LOADING, reason="tensor parallelism is for transformers 5.22 on")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same random weights as an official checkpoint and as ours, tied and not."""
    found = {}
    for tied in (True, False):
        gpt2 = random_gpt2(tie_word_embeddings=tied, **NO_DROPOUT)
        for kind in ("official", "ours"):
            found[kind, tied] = tmp_path_factory.mktemp(f"{kind}-{'tied' if tied else 'untied'}")
        gpt2.save_pretrained(found["official", tied])
        GPTScratchForCausalLM.from_gpt2(gpt2).save_pretrained(found["ours", tied])
    return found


def train(model, batches, learning_rate=0.1):
    """Losses and the model's parameters after a step of plain gradient descent per batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    losses = []
    for batch in batches:
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def batches():
    return [random_ids(4, 12, seed=seed) for seed in range(3)]


def whole(tensor):
    """A copy of all of a tensor that may be spread over the processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained_in_one_process(directory):
    model = GPTScratchForCausalLM.from_pretrained(directory).train()
    losses = train(model, batches())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def assert_same_training(results, expected):
    """The mean of the processes' losses, and all weights of each, are those of one process with the whole batch."""
    losses, weights = expected
    assert torch.tensor([r["losses"] for r in results]).mean(0).tolist() == pytest.approx(losses, rel=1e-5)
    for result in results:
        assert result["weights"].keys() == weights.keys()
        for name, weight in weights.items():
            assert relative_error(weight, result["weights"][name]) < FP32_GRADIENTS, name


def my_half(rank):
    return [batch[2 * rank : 2 * rank + 2] for batch in batches()]


def data_parallel(rank, directory):
    model = GPTScratchForCausalLM.from_pretrained(directory).train()
    losses = train(nn.parallel.DistributedDataParallel(model), my_half(rank))
    return {"losses": losses, "weights": {name: whole(p) for name, p in model.named_parameters()}}


def accelerated(rank, directory):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = GPTScratchForCausalLM.from_pretrained(directory).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.cat(batches())
    loader = torch.utils.data.DataLoader(list(rows), batch_size=2)  # accelerate deals out the batches in turn
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model = accelerator.unwrap_model(model)
    return {"losses": losses, "weights": {name: whole(p) for name, p in model.named_parameters()}}


def fully_sharded(rank, directory):
    """torch's FSDP2, applied by hand along the config's plan."""
    from torch.distributed.fsdp import fully_shard

    model = GPTScratchForCausalLM.from_pretrained(directory).train()
    for block in model.model.trf_blocks:
        fully_shard(block)
    fully_shard(model)
    shards = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters()}
    losses = train(model, my_half(rank))
    return {"losses": losses, "weights": {n: whole(p) for n, p in model.named_parameters()}, "shards": shards}


def fully_sharded_by_transformers(rank, checkpoints):
    from transformers.distributed import DistributedConfig

    results = {}
    for kind, directory in checkpoints.items():
        model = GPTScratchForCausalLM.from_pretrained(
            directory, distributed_config=DistributedConfig(fsdp_size=2)
        ).train()
        losses = train(model, my_half(rank))
        results[kind] = {"losses": losses, "weights": {n: whole(p) for n, p in model.named_parameters()}}
    return results


@pytest.mark.parametrize("way", [data_parallel, accelerated])
def test_data_parallel_training_is_training_on_the_whole_batch(checkpoints, tmp_path, way):
    directory = checkpoints["ours", True]
    assert_same_training(in_two_processes(tmp_path, way, directory), trained_in_one_process(directory))


def test_fully_sharded_training_is_training_on_the_whole_batch(checkpoints, tmp_path):
    directory = checkpoints["ours", True]
    results = in_two_processes(tmp_path, fully_sharded, directory)
    assert_same_training(results, trained_in_one_process(directory))
    assert all(share < 0.6 for share in results[0]["shards"].values())  # 211 rows: 106 and 105


def test_training_on_half_of_the_batch_is_told_from_the_whole(checkpoints):
    """The comparison above would see it."""
    losses, weights = trained_in_one_process(checkpoints["ours", True])
    model = GPTScratchForCausalLM.from_pretrained(checkpoints["ours", True]).train()
    alone = {"losses": train(model, my_half(0)), "weights": dict(model.named_parameters())}
    with pytest.raises(AssertionError):
        assert_same_training([alone, alone], (losses, weights))


@needs_sharded_loading
def test_fully_sharded_loading_reads_all_checkpoints(checkpoints, tmp_path):
    results = in_two_processes(tmp_path, fully_sharded_by_transformers, checkpoints)
    for kind, directory in checkpoints.items():
        assert_same_training([result[kind] for result in results], trained_in_one_process(directory))


def tensor_parallel(rank, checkpoints, save_to):
    from transformers.distributed import DistributedConfig

    results = {}
    for (kind, tied), directory in checkpoints.items():
        model = GPTScratchForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2))
        with torch.no_grad():
            logits = model(random_ids()).logits
        ids = greedy_ids(model, random_ids(1, 6), 12)
        shapes = {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if hasattr(p, "to_local")}
        model.save_pretrained(save_to / f"{kind}-{tied}")
        model.train()
        loss = model(random_ids(), labels=random_ids()).loss
        loss.backward()
        gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        results[kind, tied] = dict(
            logits=logits, ids=ids, shapes=shapes, loss=loss.item(), gradients=gradients, plan=model.tp_plan
        )
    return results


@pytest.fixture(scope="module")
def tensor_parallel_results(checkpoints, tmp_path_factory):
    saved = tmp_path_factory.mktemp("saved")
    return in_two_processes(tmp_path_factory.mktemp("results"), tensor_parallel, checkpoints, saved), saved


@needs_sharded_loading
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["official", "ours"])
class TestTensorParallel:
    def test_equals_one_process(self, checkpoints, tensor_parallel_results, kind, tied):
        model = GPTScratchForCausalLM.from_pretrained(checkpoints[kind, tied])
        logits = model(random_ids()).logits
        ids = greedy_ids(model, random_ids(1, 6), 12)
        loss = model.train()(random_ids(), labels=random_ids()).loss
        loss.backward()
        for result in tensor_parallel_results[0]:
            result = result[kind, tied]
            assert relative_error(logits, result["logits"]) < FP32_LOGITS
            assert torch.equal(ids, result["ids"])
            assert result["loss"] == pytest.approx(loss.item(), rel=1e-6)
            gradients = {name: p.grad for name, p in model.named_parameters()}
            assert max(relative_errors(gradients, result["gradients"]).values()) < FP32_GRADIENTS

    def test_every_matrix_but_the_positions_is_shared_out(self, checkpoints, tensor_parallel_results, kind, tied):
        model = GPTScratchForCausalLM.from_pretrained(checkpoints[kind, tied])
        matrices = {name for name, p in model.named_parameters() if p.ndim == 2} - {"model.pos_emb.weight"}
        shapes = [result[kind, tied]["shapes"] for result in tensor_parallel_results[0]]
        for name in matrices:
            full = model.get_parameter(name).numel()
            parts = [torch.Size(shape[name]).numel() for shape in shapes]
            assert sum(parts) == full and max(parts) < 0.51 * full, name

    def test_saves_the_whole_model(self, checkpoints, tensor_parallel_results, kind, tied):
        saved = load_file(tensor_parallel_results[1] / f"{kind}-{tied}" / "model.safetensors")
        expected = load_file(checkpoints["ours", tied] / "model.safetensors")
        if tied:  # transformers writes both names of the shared matrix here
            expected["out_head.weight"] = expected["model.tok_emb.weight"]
        assert saved.keys() == expected.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in expected.items())


def tensor_parallel_without_gathering(rank, directory):
    from transformers.distributed import DistributedConfig

    from hf_gpt_scratch.model.sharded_loading import Gather, Unchanged

    Gather.convert = Unchanged.convert
    try:
        model = GPTScratchForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_size=2))
        with torch.no_grad():
            return model(random_ids()).logits
    except Exception as error:  # the shapes do not even fit
        return repr(error)


@needs_sharded_loading
def test_official_layout_sharded_as_it_is_read_would_be_wrong(checkpoints, tmp_path):
    model = GPTScratchForCausalLM.from_pretrained(checkpoints["ours", True])
    expected = model(random_ids()).logits
    for result in in_two_processes(tmp_path, tensor_parallel_without_gathering, checkpoints["official", True]):
        assert isinstance(result, str) or not relative_error(expected, result) < 1e-2


@needs_sharded_loading
@pytest.mark.parametrize("model_class", [GPTScratchModel, GPTScratchForCausalLM, GPTScratchForSequenceClassification])
def test_every_rule_of_the_plans_names_modules(model_class):
    model = model_class(GPTScratchConfig(**SMALL))
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}  # as transformers reads them
    assert set(model.tp_plan) <= names and set(model.fsdp_plan) <= names
    assert {name.removesuffix(".weight") for name in model.pp_plan} <= names


@pytest.mark.skipif(SHARDED_LOADING, reason="transformers 5.22 and newer load in parallel")
@pytest.mark.parametrize("option", [{"tp_plan": "auto"}, {"tp_size": 2}])
def test_older_versions_refuse_tensor_parallelism(tmp_path, option):
    GPTScratchForCausalLM(GPTScratchConfig(**SMALL)).save_pretrained(tmp_path)
    for load in (GPTScratchForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=f"got {next(iter(option))}, but .* needs transformers 5.22"):
            load(tmp_path, **option)


def test_an_engine_shards_pairs_of_layers_by_the_plan():
    """As vLLM does: the first rule that matches as a regular expression; what it does not know is not sharded."""
    model = GPTScratchModel(GPTScratchConfig(**SMALL))
    styles = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            rule = next((rule for rule in model.tp_plan if re.match(rule, name)), "")
            styles[re.sub(r"\d+", "*", name, count=1)] = model.tp_plan.get(rule)
    feed_forward = [styles.pop(f"trf_blocks.*.ff.layers.{n}") for n in (0, 2)]
    assert feed_forward in (["colwise", "rowwise"], ["gpt_scratch_feed_forward"] * 2)
    att = "trf_blocks.*.att."
    assert styles == {att + W: "colwise" for W in ("W_query", "W_key", "W_value")} | {att + "out_proj": "rowwise"}


def pipeline_stage(model, first, last, blocks):
    """One stage as its frameworks make it: what is before and after the blocks in the plan only where it is used."""
    stage = copy.deepcopy(model)
    names = list(stage.config.base_model_pp_plan)
    layers = names.index("trf_blocks")
    for name in names[:layers] if not first else []:
        setattr(stage.model, name, nn.Identity())
    for name in names[layers + 1 :] if not last else []:
        setattr(stage.model, name, nn.Identity())
    stage.model.trf_blocks = stage.model.trf_blocks[blocks]
    return stage


@pytest.mark.parametrize("padded", [False, True])
def test_stages_of_a_pipeline_compose_to_the_model(padded):
    config = GPTScratchConfig(vocab_size=97, context_length=32, emb_dim=16, n_heads=2, n_layers=3)
    model = randomize(GPTScratchForCausalLM(config)).eval()
    ids = random_ids(2, 9, vocab_size=97)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0 if padded else 1
    first = pipeline_stage(model, True, False, slice(0, 1))
    last = pipeline_stage(model, False, True, slice(1, None))
    hidden = first.model(ids, attention_mask=mask).last_hidden_state
    logits = last(inputs_embeds=hidden, attention_mask=mask).logits
    assert torch.equal(logits, model(ids, attention_mask=mask).logits)
    # A later stage that still added the positions would be wrong.
    last.model.pos_emb = model.model.pos_emb
    assert not torch.allclose(last(inputs_embeds=hidden, attention_mask=mask).logits, logits, atol=1e-3)


def test_the_pipeline_plan_names_every_part_in_the_order_of_execution():
    config = GPTScratchConfig(vocab_size=97, context_length=32, emb_dim=16, n_heads=2, n_layers=2)
    model = GPTScratchForCausalLM(config)
    called = []
    for name, module in [*model.model.named_children(), ("out_head", model.out_head)]:
        for part in module if isinstance(module, nn.ModuleList) else [module]:
            part.register_forward_hook(lambda *_, name=name: called.append(name))
    model(random_ids(vocab_size=97))
    in_order = list(dict.fromkeys(called))
    assert in_order == [*config.base_model_pp_plan, *type(model)._pp_plan]


def test_plans_are_not_written_into_config_json(tmp_path):
    GPTScratchConfig().save_pretrained(tmp_path)
    assert "plan" not in (tmp_path / "config.json").read_text()
    assert isinstance(GPTScratchConfig.from_pretrained(tmp_path), PreTrainedConfig)
