"""Counts products by oneDNN."""

from torch.profiler import profile


def by_onednn(call):
    """The number of products by oneDNN in a call, and its result."""
    with profile() as profiled:
        result = call()
    return sum("mkldnn::_linear_pointwise" in event.name for event in profiled.events()), result
