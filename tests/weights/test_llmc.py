"""llm.c's checkpoints have the logits of the model that its `write_model` wrote, and go back as they came."""

import json
import struct

import numpy as np
import pytest
import torch
from pairs import CONTEXT, LAYERS, VOCAB, random_ids, random_pair
from programs import HEADS, E, Fused, book_model

from hf_gpt_scratch import GPTScratchForCausalLM, convert, export
from hf_gpt_scratch.errors import ConversionError, ParityError
from hf_gpt_scratch.weights.convert import verify_receipt
from hf_gpt_scratch.weights.formats import FORMATS, detect, read, write
from hf_gpt_scratch.weights.formats.format import Layout

pytestmark = pytest.mark.slow

PADDED = 256
# In the order of llm.c's ParameterTensors, by the names of its train_gpt2.py.
KINDS = [
    *("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"),
    *("ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
]


def llmc_file(path, model, dtype=torch.float32, padding=0.0, **header):
    """What llm.c's `write_model` writes of a `Fused`."""
    state_dict = {name.removeprefix("transformer."): t.detach().to(dtype) for name, t in model.state_dict().items()}
    extra = torch.full((PADDED - VOCAB, E), padding, dtype=dtype)
    tensors = [torch.cat((state_dict["wte.weight"], extra)), state_dict["wpe.weight"]]
    tensors += [state_dict[f"h.{n}.{kind}"] for kind in KINDS for n in range(LAYERS)]
    tensors += [state_dict["ln_f.weight"], state_dict["ln_f.bias"]]
    said = dict(magic=20240326, version=3 if dtype == torch.float32 else 5, context=CONTEXT, vocab=VOCAB)
    said |= dict(layers=LAYERS, heads=HEADS, width=E, padded=PADDED) | header
    numbers = np.zeros(256, dtype="<i4")
    numbers[: len(said)] = list(said.values())
    with path.open("wb") as file:
        file.write(numbers.tobytes())
        for tensor in tensors:
            raw = tensor.contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
            file.write(raw.numpy().tobytes())
    return path


def model_of(dtype=torch.float32):
    return Fused(gelu="tanh").to(dtype).float()  # with weights that the file's dtype can hold


def error_of(directory, reference):
    ours, ids = GPTScratchForCausalLM.from_pretrained(directory, dtype=torch.float32), random_ids()
    with torch.no_grad():
        return (ours(ids).logits - reference(ids)).abs().max().item()


@pytest.mark.parametrize("padding", [0.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_has_the_logits_of_the_model_that_was_written(tmp_path, dtype, padding):
    model = model_of(dtype)
    path = llmc_file(tmp_path / "gpt2_124M.bin", model, dtype, padding)
    assert detect(path) == "llmc"
    receipt = convert(path, tmp_path / "native")
    assert receipt["parity"]["passed"] and receipt["source"]["format"] == "llmc"
    left = (
        f"left behind: the last {PADDED - VOCAB} rows of wte, which are not zero, though no id below vocab_size={VOCAB}"
    )
    assert receipt["notes"] == ([f"{left} reads them"] if padding else [])
    assert error_of(tmp_path / "native", model) < 1e-4
    config = json.loads((tmp_path / "native/config.json").read_text())
    assert (config["vocab_size"], config["n_heads"], config["dtype"]) == (VOCAB, HEADS, str(dtype)[6:])
    assert config["tie_word_embeddings"] and config["qkv_bias"] and config["activation_function"] == "gelu_new"


@pytest.mark.parametrize("change", ["gelu", "heads", "order", "transposed"])
def test_its_twin_with_one_mistake_has_other_logits(tmp_path, monkeypatch, change):
    model = Fused(gelu="none") if change == "gelu" else model_of()
    path = llmc_file(tmp_path / "model.bin", model, **({"heads": 3} if change == "heads" else {}))
    if change in ("order", "transposed"):
        layout = FORMATS["llmc"].layout
        swap = {"ln1w.{n}": "ln2w.{n}", "ln2w.{n}": "ln1w.{n}"} if change == "order" else {}
        table = tuple(
            type(row)(
                swap.get(row.theirs, row.theirs),
                row.ours,
                row.theirs == "attprojw.{n}" and change == "transposed",
                row.meaning,
            )
            for row in layout.table
        )
        monkeypatch.setattr(FORMATS["llmc"], "layout", Layout(table))
    convert(path, tmp_path / "native")
    assert error_of(tmp_path / "native", model) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_back_as_it_came(tmp_path, dtype):
    path = llmc_file(tmp_path / "gpt2_124M.bin", model_of(dtype), dtype)
    convert(path, tmp_path / "native")
    receipt = export(tmp_path / "native", tmp_path / "back", "llmc")
    assert (tmp_path / "back/model.bin").read_bytes() == path.read_bytes()
    assert verify_receipt(tmp_path / "back") == receipt
    export(path, tmp_path / "official", "gpt2")
    export(tmp_path / "official", tmp_path / "again", "llmc")
    assert (tmp_path / "again/model.bin").read_bytes() == path.read_bytes()


def test_a_model_without_query_biases_gets_zeros(tmp_path):
    book = book_model()
    book.out_head.weight = book.tok_emb.weight
    torch.save(book.state_dict(), tmp_path / "model.pth")
    export(tmp_path / "model.pth", tmp_path / "out", "llmc", n_heads=HEADS)
    config, state_dict = read(tmp_path / "out/model.bin")
    assert config.qkv_bias and not state_dict["trf_blocks.0.att.W_query.bias"].any()
    assert torch.equal(state_dict["trf_blocks.2.att.W_key.weight"], book.trf_blocks[2].att.W_key.weight)


@pytest.mark.parametrize(
    ("changes", "cast", "told"),
    [
        ({"tie_word_embeddings": False}, None, "tie_word_embeddings=False, but llmc supports only True"),
        ({"activation_function": "gelu"}, None, "activation_function='gelu'"),
        ({"n_inner": 100}, None, "n_inner=100"),
        ({}, torch.float16, "torch.float16, but llm.c has float32 and bfloat16"),
    ],
)
def test_what_it_cannot_express_is_refused(tmp_path, changes, cast, told):
    ours = random_pair(**changes)[1].to(cast)
    with pytest.raises(ConversionError, match=told):
        write(ours, ours.config, tmp_path / "model.bin", "llmc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"version": 1}, "of version 1, but read are 3"),
        ({"magic": 20240328}, "llm.c's tokenizer"),
        ({"magic": 20240527}, "the state of llm.c's optimizer"),
        ({"magic": 20240325}, "which is not the beginning of a known format"),
        ({"layers": 0}, "n_layers=0"),
        ({"layers": -2}, "n_layers=-2"),
        ({"layers": 1 << 30}, "n_layers=1073741824"),
        ({"layers": LAYERS - 1}, "by its header"),
        ({"padded": VOCAB - 1}, "padded=210"),
        ({"padded": PADDED + 128}, f"padded={PADDED + 128}"),
        ({"padded": PADDED - 1, "context": CONTEXT + 1}, f"padded={PADDED - 1}"),  # of the same length
        ({"heads": 5}, "n_heads=5, but it must be a whole number that divides"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, header, told):
    path = llmc_file(tmp_path / "model.bin", model_of(), **header)
    with pytest.raises(ConversionError, match=told):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [5, 1023, 1024, -4, -1, 4])
def test_a_file_of_another_length_is_refused(tmp_path, size):
    path = llmc_file(tmp_path / "model.bin", model_of())
    whole = path.read_bytes()
    path.write_bytes(whole[:size] if size != 4 else whole + bytes(4))
    with pytest.raises(ConversionError, match="bytes, but"):
        convert(path, tmp_path / "out")


def test_nan_is_refused_by_the_name_of_its_tensor(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.transformer["h"][1].attn.c_proj.bias[3] = torch.nan
    with pytest.raises(ConversionError, match=r"'attprojb\.1' in model\.bin has 1 values that are NaN"):
        convert(llmc_file(tmp_path / "model.bin", model), tmp_path / "out")


def test_what_was_written_wrong_is_not_published(tmp_path, monkeypatch):
    ours = random_pair()[1]
    ours.save_pretrained(tmp_path / "native")
    save = FORMATS["llmc"].save

    def wrong(tensors, contents, path, options):
        written = save(tensors, contents, path, options)
        with path.open("r+b") as file:
            file.seek(1024 + 4 * 1000)
            file.write(struct.pack("<f", 0.125))
        return written

    monkeypatch.setattr(FORMATS["llmc"], "save", wrong)
    with pytest.raises(ParityError, match="not equal to the source's bit for bit"):
        export(tmp_path / "native", tmp_path / "out", "llmc")
    assert not (tmp_path / "out").exists()
