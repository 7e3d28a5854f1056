import pytest


@pytest.fixture
def onednn(monkeypatch):
    """As on an AMD CPU, with weights of any size."""
    import torch

    from hf_gpt_scratch.model import decoding

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(decoding, "prefers_onednn", lambda: True)
    monkeypatch.setattr(decoding, "LARGE", 0)
