import pytest
import torch
from transformers import AutoModelForCausalLM

from my_model import MyModelConfig, MyModelForCausalLM


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    return MyModelForCausalLM(MyModelConfig(vocab_size=50, pad_token_id=0, **sizes)).eval()


def test_the_cache_changes_nothing(model):
    ids = torch.tensor([[0, 0, 3, 4, 5], [6, 7, 8, 9, 10]])  # the first is padded
    mask = (ids > 0).long()
    cached, whole = (model.generate(ids, attention_mask=mask, max_new_tokens=9, use_cache=use) for use in (True, False))
    alone = model.generate(ids[:1, 2:], max_new_tokens=9)
    assert cached.tolist() == whole.tolist()
    assert cached[0, 2:].tolist() == alone[0].tolist()


def test_it_learns_and_is_saved(model, tmp_path):
    ids = torch.randint(50, (2, 12))
    before = model(ids, labels=ids).loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(ids, labels=ids).loss == model(ids, labels=ids).loss < before / 2
