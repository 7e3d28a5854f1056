"""What tests of the formats share."""

import functools

import pytest

from hf_gpt_scratch.weights.formats import onnx


@pytest.fixture(autouse=True, scope="session")
def graphs_are_traced_once():
    """ONNX graphs of one size and kind, which take seconds each."""
    trace, onnx.graph = onnx.graph, functools.cache(onnx.graph)
    yield
    onnx.graph = trace
