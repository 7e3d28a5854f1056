"""ONNX: the exported graph, run by onnxruntime, gives the model's logits at any batch and length."""

import onnxruntime
import pytest
import torch
from pairs import CONTEXT, VOCAB, random_ids, random_pair
from transformers import GPT2LMHeadModel

from hf_gpt_scratch.weights.parity import FP32_LOGITS, relative_error

pytestmark = [
    pytest.mark.slow,
    # One name for the batch of both inputs is what is wanted; the exporter says that it names it once.
    pytest.mark.filterwarnings("ignore:# The axis name. (batch|length) will not be used:UserWarning"),
    # torch's own use of its own tree utilities.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
SHAPES = [(3, 17), (2, CONTEXT), (5, 2), (1, 1)]


def export(model, file, dynamic=True, mask=True):
    """The recipe in docs/deploy.md."""
    example = {"input_ids": random_ids(2, 9)}
    if mask:
        example["attention_mask"] = torch.ones_like(example["input_ids"])
    any_size = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=CONTEXT)}
    model.config.use_cache = False
    torch.onnx.export(
        model,
        (),
        file,
        kwargs=example,
        dynamic_shapes=dict.fromkeys(example, any_size) if dynamic else None,
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run(session, **inputs):
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(logits)


def left_padded(batch, length):
    """Ids, and a mask that hides the first half of the first row."""
    ids = random_ids(batch, length)
    mask = torch.ones_like(ids)
    mask[0, : length // 2] = 0
    return ids, mask


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def exported(request, tmp_path_factory):
    """The official model, ours, and the session of ours."""
    gpt2, scratch = random_pair(attn_implementation=request.param)
    return gpt2, scratch, export(scratch, tmp_path_factory.mktemp("onnx") / "model.onnx")


@torch.no_grad()
def test_the_exported_graph_takes_any_batch_length_and_padding(exported):
    """Measured: relative error at most 6.0e-7 to the official model."""
    gpt2, scratch, session = exported
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("input_ids", ["batch", "length"]),
        ("attention_mask", ["batch", "length"]),
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", "length", VOCAB])]
    for size in SHAPES:
        ids, mask = left_padded(*size)
        logits, seen = run(session, input_ids=ids, attention_mask=mask), mask.bool()
        for model in (gpt2, scratch):
            assert relative_error(model(ids, attention_mask=mask).logits[seen], logits[seen]) <= FP32_LOGITS


@torch.no_grad()
def test_onnxruntime_continues_greedily_as_generate_does(exported):
    gpt2, _, session = exported
    ids = random_ids(2, 5)
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = GPT2LMHeadModel.generate(gpt2, ids, attention_mask=torch.ones_like(ids), **settings)
    for _ in range(12):
        logits = run(session, input_ids=ids, attention_mask=torch.ones_like(ids))
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(ids, expected)


@torch.no_grad()
def test_wrong_weights_and_an_unread_mask_would_be_noticed(exported):
    gpt2, _, session = exported
    ids, mask = left_padded(3, 16)
    seen = mask.bool()
    expected = gpt2(ids, attention_mask=mask).logits
    unmasked = run(session, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert relative_error(expected[seen], unmasked[seen]) > 1000 * FP32_LOGITS
    logits = run(session, input_ids=ids, attention_mask=mask)
    shift = gpt2.transformer.h[1].ln_1.bias
    shift += 0.1
    try:
        other = gpt2(ids, attention_mask=mask).logits
    finally:
        shift -= 0.1
    assert relative_error(other[seen], logits[seen]) > 100 * FP32_LOGITS


@torch.no_grad()
def test_the_graph_without_a_mask_is_causal(tmp_path):
    gpt2, scratch = random_pair()
    session = export(scratch, tmp_path / "model.onnx", mask=False)
    assert [i.name for i in session.get_inputs()] == ["input_ids"]
    for size in SHAPES:
        ids = random_ids(*size)
        assert relative_error(gpt2(ids).logits, run(session, input_ids=ids)) <= FP32_LOGITS


def test_without_dynamic_shapes_another_length_is_refused(tmp_path):
    session = export(random_pair()[1], tmp_path / "model.onnx", dynamic=False)
    ids = random_ids(2, 10)
    with pytest.raises(Exception, match="invalid dimensions for input"):
        run(session, input_ids=ids, attention_mask=torch.ones_like(ids))
