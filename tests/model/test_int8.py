"""Int8 weights by torch's packed product: error bound, both ways to multiply, loading, saving, generating."""

import shutil

import pytest
import torch
from pairs import random_gpt2, random_ids, random_pair
from peft import LoraConfig, get_peft_model
from remote import run_without_the_package
from torch import nn
from torch._inductor.utils import run_and_get_code

from hf_gpt_scratch import GPTScratchForCausalLM, Int8Config
from hf_gpt_scratch.model import int8
from hf_gpt_scratch.model.int8 import FEW_ROWS, Int8Linear

pytestmark = pytest.mark.slow

BFLOAT16 = dict(dtype=torch.bfloat16, quantization_config=Int8Config())
GREEDY = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)


WIDTH = dict(n_embd=64)  # the packed product wants a multiple of 32, as all GPT-2 sizes are


def linear(dtype=torch.float32, bias=True, width=96):
    torch.manual_seed(0)
    return nn.Linear(width, 64, bias=bias).to(dtype)


@pytest.fixture
def checkpoint(tmp_path):
    random_gpt2(**WIDTH).save_pretrained(tmp_path / "official")
    return tmp_path / "official"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_is_further_off_than_half_a_step(dtype):
    float_layer = linear(dtype)
    layer = Int8Linear.from_linear(float_layer)
    restored = layer.int8_weight.float() * layer.scales.float()[:, None]
    steps = layer.scales.float()[:, None]
    # half a step by rounding; another half at the largest weight, where the rounded scale was too small
    assert ((restored - float_layer.weight.float()).abs() <= steps * (0.501 if dtype == torch.float32 else 1)).all()
    assert layer.int8_weight.abs().amax() == 127 and layer.bias.equal(float_layer.bias)


@torch.no_grad()
def test_many_rows_are_multiplied_in_float32_where_bfloat16_is_slow(monkeypatch):
    layer = Int8Linear.from_linear(linear(torch.bfloat16, bias=False))
    x = torch.randn(FEW_ROWS + 1, 96).bfloat16()
    exact = x.float() @ (layer.int8_weight.float() * layer.scales.float()[:, None]).t()
    monkeypatch.setattr(int8, "SLOW_BF16", True)
    slow = layer(x)
    assert slow.dtype is torch.bfloat16
    torch.testing.assert_close(slow.float(), exact, rtol=2**-8, atol=1e-5)  # rounded once
    monkeypatch.setattr(int8, "SLOW_BF16", False)
    assert not torch.equal(layer(x), slow)
    assert layer(x.float()).dtype is torch.float32


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [96, 49, 5])
@pytest.mark.parametrize("shape", [(1, 1), (FEW_ROWS,), (1, FEW_ROWS), (2, 30)])
@torch.no_grad()
def test_few_and_many_rows_give_the_same(bias, shape, width):
    float_layer = linear(bias=bias, width=width)
    layer = Int8Linear.from_linear(float_layer)
    x = torch.randn(*shape, width)
    many = layer(torch.cat([x.reshape(-1, width)] * (FEW_ROWS + 1)))[: x.shape[:-1].numel()].view(*shape, 64)
    torch.testing.assert_close(layer(x), many, rtol=0.02, atol=0.02)
    torch.testing.assert_close(layer(x), float_layer(x), rtol=0.05, atol=0.05)
    layer.scales /= 2
    assert not torch.allclose(layer(x), float_layer(x), rtol=0.05, atol=0.05)


def test_weights_are_moved_to_where_the_product_can_read_them(checkpoint, tmp_path):
    layer = Int8Linear.from_linear(linear())
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    across = torch.empty(1 + state["int8_weight"].numel(), dtype=torch.int8)[1:].view(64, 96)
    state["int8_weight"] = across.copy_(state["int8_weight"])
    layer.load_state_dict(state, assign=True)
    assert across.data_ptr() % 64 and layer.int8_weight.data_ptr() % 64 == 0 and torch.equal(layer.int8_weight, across)

    GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16).save_pretrained(tmp_path / "int8")
    loaded = GPTScratchForCausalLM.from_pretrained(tmp_path / "int8")
    assert all(m.int8_weight.data_ptr() % 64 == 0 for m in loaded.modules() if isinstance(m, Int8Linear))


def test_nan_is_refused():
    broken = linear()
    broken.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear.from_linear(broken)


@torch.no_grad()
def test_official_and_native_checkpoints_become_the_same_model_which_saves_and_loads(checkpoint, tmp_path):
    GPTScratchForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "native")
    models = [GPTScratchForCausalLM.from_pretrained(path, **BFLOAT16) for path in (checkpoint, tmp_path / "native")]
    models[0].save_pretrained(tmp_path / "int8")
    models.append(GPTScratchForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.bfloat16))
    expected = models[0].state_dict()
    assert {expected[name].dtype for name in expected if "int8_weight" in name} == {torch.int8}
    for model in models[1:]:
        state = model.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
        assert torch.equal(model(random_ids()).logits, models[0](random_ids()).logits)
    assert not any(type(module) is nn.Linear for module in models[2].modules())


@torch.no_grad()
def test_the_next_token_s_distribution_stays_near(checkpoint):
    reference = GPTScratchForCausalLM.from_pretrained(checkpoint)
    quantized = GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16)
    bfloat16 = GPTScratchForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)

    def divergence(model):
        p, q = (m(random_ids()).logits.float().log_softmax(-1) for m in (reference, model))
        return (p.exp() * (p - q)).sum(-1).mean()

    healthy = divergence(quantized)
    assert healthy < 10 * divergence(bfloat16) + 0.01
    for module in quantized.modules():
        if isinstance(module, Int8Linear):
            module.scales /= 2
    assert divergence(quantized) > 5 * healthy


@pytest.mark.parametrize("options", [{}, dict(cache_implementation="static"), dict(num_beams=3)])
def test_it_generates(checkpoint, options):
    model = GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16)
    ids = model.generate(random_ids(1, 5), **GREEDY, **options)
    assert ids.shape[1] > 5
    if not options:  # step by step without a cache, every product by the other way
        for position in range(5, ids.shape[1]):
            logits = model(ids[:, :position]).logits[0, -1].float()
            assert logits[ids[0, position]] > logits.max() - 0.05 * logits.abs().max()


def test_layers_can_be_left_out(checkpoint):
    config = Int8Config(modules_to_not_convert=["out_head"])
    model = GPTScratchForCausalLM.from_pretrained(checkpoint, quantization_config=config)
    assert type(model.out_head) is nn.Linear and model.out_head.weight is model.model.tok_emb.weight
    assert type(model.model.trf_blocks[0].ff.layers[0]) is Int8Linear


@pytest.mark.parametrize("tokens", [5, 30])
def test_adapters_train_on_layers_that_stay_float_and_are_refused_on_others(checkpoint, tokens):
    adapted = ["W_query", "W_value"]
    model = GPTScratchForCausalLM.from_pretrained(
        checkpoint, quantization_config=Int8Config(modules_to_not_convert=adapted)
    )
    options = dict(task_type="CAUSAL_LM", init_lora_weights=False)
    plain = GPTScratchForCausalLM.from_pretrained(checkpoint)
    gradients = []
    for one in (model, plain):
        torch.manual_seed(0)
        peft = get_peft_model(one, LoraConfig(target_modules=adapted, **options))
        ids = random_ids(1, tokens)
        peft(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in peft.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 3 * 2 * 2
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() < 0.1 * theirs.norm()
    with pytest.raises(ValueError, match=r"Int8Linear.* is not supported"):
        get_peft_model(GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16), LoraConfig(**options))


def test_it_is_smaller_and_not_for_training_or_translation(checkpoint):
    model = GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16)
    block = model.model.trf_blocks[0]
    size = sum(t.nbytes for t in [*block.parameters(), *block.buffers()])
    assert size < 0.6 * sum(t.nbytes // 2 for t in random_pair(**WIDTH)[1].model.trf_blocks[0].parameters())
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="quantized"):
        model.to_gpt2()


def test_one_graph(checkpoint):
    model = GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        ids = random_ids(1, 1)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("shape", "packed"), [((1, 4), True), ((2, 16), False)])
def test_inductor_takes_the_packed_product_for_few_rows_only(shape, packed):
    layer, x = Int8Linear.from_linear(linear(torch.bfloat16)), torch.randn(*shape, 96).bfloat16()
    with torch.inference_mode():
        out, [code] = run_and_get_code(torch.compile(layer), x)
        torch.testing.assert_close(out, layer(x), rtol=0.02, atol=0.02)
    assert ("int8pack_mm" in code) == packed


QUANTIZED = """
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(sys.argv[1] + "-again")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "-again", trust_remote_code=True)
ids = torch.load(sys.argv[2])
torch.save((model(ids).logits, model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)), sys.argv[3])
"""


def test_a_saved_one_is_the_same_where_the_package_is_missing(checkpoint, tmp_path):
    model = GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16)
    model.save_pretrained(tmp_path / "saved")
    ids = random_ids()
    torch.save(ids, tmp_path / "ids.pt")
    run_without_the_package(QUANTIZED, tmp_path / "saved", tmp_path / "ids.pt", tmp_path / "out.pt", cwd=tmp_path)
    logits, generated = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(logits, model(ids).logits)
    assert torch.equal(generated, model.generate(ids, **GREEDY))


def test_only_a_quantized_model_ships_its_quantizer(checkpoint, tmp_path):
    model = GPTScratchForCausalLM.from_pretrained(checkpoint, **BFLOAT16)
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "int8", push_to_hub=True)
    assert not (tmp_path / "int8").exists()
    for name, saved in (("int8", model), ("float", GPTScratchForCausalLM.from_pretrained(checkpoint)), ("int8", model)):
        saved.save_pretrained(tmp_path / name)
    code = "modeling_gpt_scratch.py"
    assert (tmp_path / "int8" / code).read_text().count("from .int8 import") == 1
    assert {path.name for path in (tmp_path / "int8").glob("*.py")} - {"int8.py"} == {
        path.name for path in (tmp_path / "float").glob("*.py")
    }
    assert "int8 import" not in (tmp_path / "float" / code).read_text()
