"""The loss without logits is the loss with them: value, gradients, every option, and logits for whoever asks."""

import pickle
from contextlib import nullcontext

import pytest
import torch
from onednn import by_onednn
from pairs import VOCAB, random_ids, random_pair
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from hf_gpt_scratch.model import loss as loss_module
from hf_gpt_scratch.model.loss import LazyLogitsOutput, can_skip_logits
from hf_gpt_scratch.weights.parity import FP32_GRADIENTS, relative_error, relative_errors


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK", 7)  # several of them, the last one short
    monkeypatch.setattr(loss_module, "COMPILED_CHUNK", 11)
    monkeypatch.setattr(loss_module, "PART", 40)  # and of these


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch._dynamo.reset()


@pytest.fixture
def pair():
    gpt2, ours = random_pair(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return gpt2.train(), ours.train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_gradients(model, forward=None, **inputs):
    model.zero_grad()
    loss = (model if forward is None else forward)(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


IDS = random_ids()
MASKED = IDS.clone()
MASKED[0, :9] = -100


def test_onednn_s_logits_give_the_same_loss_and_gradients(pair, onednn, monkeypatch):
    gpt2, ours = pair
    _, expected = loss_and_gradients(ours, input_ids=IDS, labels=IDS)
    for count, around in ((-(-IDS.numel() // 7), nullcontext()), (0, FlopCounterMode(display=False))):
        with around:
            found, (loss, got) = by_onednn(lambda: loss_and_gradients(ours, input_ids=IDS, labels=IDS))
        assert found == count
        torch.testing.assert_close(loss, gpt2(IDS, labels=IDS).loss, rtol=1e-5, atol=0)
        assert max(relative_errors(expected, got).values()) < FP32_GRADIENTS
    with torch.autocast("cpu", torch.bfloat16):
        assert by_onednn(lambda: loss_and_gradients(ours, input_ids=IDS, labels=IDS))[0] == 0
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert by_onednn(lambda: loss_and_gradients(ours, input_ids=IDS, labels=IDS))[0] == 0


OPTIONS = {
    "mean": dict(labels=IDS),
    "labels left out": dict(labels=MASKED),
    "a whole batch's number of items": dict(labels=MASKED, num_items_in_batch=torch.tensor(77)),
    "the same, a number": dict(labels=MASKED, num_items_in_batch=77),
    "shifted labels": dict(labels=IDS, shift_labels=MASKED.roll(-1, 1)),
    "another ignore_index": dict(labels=IDS.where(IDS > 50, 7), ignore_index=7),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_equal_those_of_the_logits(pair, options, compiled):
    _, ours = pair
    forward = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    got, got_gradients = loss_and_gradients(ours, forward, input_ids=IDS, **options)
    ours.chunked_loss = False
    expected, expected_gradients = loss_and_gradients(ours, input_ids=IDS, **options)
    torch.testing.assert_close(got, expected)
    assert got_gradients.keys() == expected_gradients.keys()
    scale = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (got_gradients[name] - gradient).abs().max() < FP32_GRADIENTS * scale, name


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="torch 2.13 brought it")
def test_a_compiled_graph_on_the_cpu_has_torchs_own_chunked_loss(pair):
    _, ours = pair
    names = []

    def backend(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(ours, backend=backend, fullgraph=True)(IDS, labels=IDS)
    assert any("linear_cross_entropy" in name for name in names)


def test_a_wrong_target_would_be_seen(pair):
    _, ours = pair
    wrong = IDS.clone()
    wrong[1, 5] = (wrong[1, 5] + 1) % VOCAB
    losses = [loss_and_gradients(ours, input_ids=IDS, labels=labels)[0] for labels in (IDS, wrong)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_it_equals_transformers_own_training(pair):
    gpt2, ours = pair
    expected = gpt2(IDS, labels=MASKED).loss
    torch.testing.assert_close(ours(IDS, labels=MASKED).loss, expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("factor", [1, 0.25])
def test_a_scaled_loss_and_a_second_backward_have_their_gradients(pair, factor, compiled):
    _, ours = pair
    results = []
    for chunked in (True, False):
        ours.chunked_loss = chunked
        ours.zero_grad()
        forward = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled and chunked else ours
        loss = factor * forward(IDS, labels=IDS).loss
        loss.backward(retain_graph=True)
        loss.backward()
        results.append(gradients(ours)["model.tok_emb.weight"])
    assert relative_error(*results) < FP32_GRADIENTS


def test_no_tensor_as_large_as_the_logits_is_made(pair):
    _, ours = pair
    ids = random_ids(batch=4, length=60)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,):
                sizes.append(result.numel() // VOCAB)
            return result

    for chunked in (True, False):
        ours.chunked_loss = chunked
        sizes.clear()
        with Sizes():
            ours(ids, labels=ids).loss.backward()
        assert (max(sizes) < ids.numel()) == chunked  # the weight is among them, 48 × V


def test_logits_come_when_asked_for_by_any_route_with_their_gradients(pair):
    _, ours = pair
    with torch.no_grad():
        expected = ours(IDS).logits
    routes = {
        "attribute": lambda output: output.logits,
        "key": lambda output: output["logits"],
        "index": lambda output: output[1],
        "slice": lambda output: output[:2][1],
        "tuple": lambda output: output.to_tuple()[1],
        "get": lambda output: CausalLMOutputWithCrossAttentions(**{k: output[k] for k in output}).logits,
    }
    for route, ask in routes.items():
        output = ours(IDS, labels=IDS)
        assert isinstance(output, LazyLogitsOutput)
        logits = ask(output)
        torch.testing.assert_close(logits, expected, msg=route)
        assert logits.requires_grad and (output.logits is logits or route == "get")
    tuple_output = ours(IDS, labels=IDS, return_dict=False)
    torch.testing.assert_close(tuple_output[1], expected)


def test_the_loss_is_the_first_and_costs_no_logits(pair):
    _, ours = pair
    output = ours(IDS, labels=IDS)
    assert output[0] is output.loss is output["loss"]
    assert callable(vars(output)["logits"])  # still to be computed
    assert torch.is_tensor(output.logits) and not callable(vars(output)["logits"])


def test_a_loss_of_ones_own_on_the_logits_adds_its_gradients(pair):
    _, ours = pair
    results = []
    for chunked in (True, False):
        ours.chunked_loss = chunked
        ours.zero_grad()
        output = ours(IDS, labels=IDS)
        (output.loss + output.logits.square().mean()).backward()
        results.append(gradients(ours))
    for name, gradient in results[1].items():
        assert relative_error(results[0][name], gradient) < 1e-3 or gradient.abs().max() < 1e-5, name


def test_asked_without_gradients_then_with_them(pair):
    _, ours = pair
    output = ours(IDS, labels=IDS)
    with torch.no_grad():
        assert not output.logits.requires_grad
    assert output.logits.requires_grad


def test_a_pickled_output_is_transformers_own(pair):
    _, ours = pair
    output = ours(IDS, labels=IDS, use_cache=False)
    with torch.no_grad():
        output["loss"] = output.loss.detach()
        read = pickle.loads(pickle.dumps(output))
    assert type(read) is CausalLMOutputWithCrossAttentions and read.logits.shape == (*IDS.shape, VOCAB)


def test_evaluation_has_its_logits_at_once(pair):
    _, ours = pair
    assert type(ours.eval()(IDS, labels=IDS)) is CausalLMOutputWithCrossAttentions
    with torch.no_grad():
        assert type(ours.train()(IDS, labels=IDS)) is CausalLMOutputWithCrossAttentions


def test_a_frozen_head_gets_no_gradient(pair):
    _, ours = pair
    ours.out_head.weight.requires_grad_(False)
    _, got = loss_and_gradients(ours, input_ids=IDS, labels=IDS)
    assert "model.tok_emb.weight" not in got and got["model.final_norm.scale"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_and_half_models_train_as_with_logits(pair, dtype):
    _, ours = pair
    losses = []
    for chunked in (True, False):
        ours.chunked_loss = chunked
        with torch.autocast("cpu", dtype):
            loss, grads = loss_and_gradients(ours, input_ids=IDS, labels=IDS)
        losses.append((loss, grads["model.tok_emb.weight"]))
    torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-3, atol=1e-3)
    assert relative_error(losses[0][1], losses[1][1]) < 0.03
    assert losses[0][1].dtype == torch.float32
    half = ours.to(dtype)
    half.chunked_loss = True
    loss, grads = loss_and_gradients(half, input_ids=IDS, labels=IDS)
    torch.testing.assert_close(loss, losses[1][0], rtol=0.02, atol=0.02)
    assert grads["model.tok_emb.weight"].dtype == dtype


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def changed_head(model):
    head = Doubled(model.config.emb_dim, VOCAB, bias=False)
    head.weight = model.out_head.weight
    model.out_head = head


CHANGES = {
    "a head of one's own": changed_head,
    "a hook on the head": lambda model: model.out_head.register_forward_hook(lambda m, args, out: 2 * out),
    "a loss of one's own": lambda model: setattr(model, "loss_function", lambda logits, labels, **_: logits.sum()),
    "float16": lambda model: model.half(),
    "switched off": lambda model: setattr(model, "chunked_loss", False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_the_head_or_the_loss_is_obeyed(pair, change):
    _, ours = pair
    assert can_skip_logits(ours)
    change(ours)
    output = ours(IDS, labels=IDS)
    assert type(output) is CausalLMOutputWithCrossAttentions
    expected = ours.loss_function(logits=output.logits, labels=IDS, vocab_size=VOCAB)
    torch.testing.assert_close(output.loss, expected)


def halve(head):
    whole = head.forward
    head.forward = lambda x: whole(x) / 2


WRAPPED_HEADS = {
    "forward of its own": halve,
    "backward hook": lambda head: head.register_full_backward_hook(lambda _, grad_in, grad_out: (grad_in[0] * 2,)),
    "backward pre-hook": lambda head: head.register_full_backward_pre_hook(lambda _, grad_out: (grad_out[0] * 2,)),
}


@pytest.mark.parametrize("wrap", WRAPPED_HEADS.values(), ids=WRAPPED_HEADS)
def test_a_head_that_is_wrapped_is_called(wrap):
    gpt2, ours = random_pair(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids, results = random_ids(), []
    for model in (gpt2, ours):
        wrap(model.get_output_embeddings())
        model.train()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), model.get_input_embeddings().weight.grad.norm().item()))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    plain = ours.from_gpt2(random_pair(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)[0]).train()
    loss = plain(ids, labels=ids).loss
    loss.backward()
    assert (loss.item(), plain.get_input_embeddings().weight.grad.norm().item()) != pytest.approx(results[0], rel=1e-2)


def test_kept_logits_may_be_named_by_a_tensor_in_training():
    _, ours = random_pair()
    ours.train()
    ids = random_ids()
    kept = torch.arange(ids.shape[1])
    assert ours(ids, labels=ids, logits_to_keep=kept).logits.shape == (*ids.shape, VOCAB)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_logits_of_weights_that_have_changed_are_refused_instead_of_computed_with_the_new_ones(compiled):
    _, model = random_pair(tie_word_embeddings=True)
    forward = torch.compile(model.train(), backend="aot_eager", fullgraph=True) if compiled else model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = random_ids()
    for _ in range(2):
        output = forward(ids, labels=ids, use_cache=False)
        logits = output.logits
        output.loss.backward()
        optimizer.step()
        assert torch.equal(output.logits, logits)
        output = forward(ids, labels=ids, use_cache=False)
        output.loss.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"before optimizer\.step\(\)"):
            output.logits  # noqa: B018
