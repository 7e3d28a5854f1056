"""`for_decoding`: a frozen copy of a language model, with weights that oneDNN has packed for products of a few rows.

The packed weights belong to the copy alone: the model that it was made of stays as it is, and may change.
"""

import copy
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from .model.modeling_gpt_scratch import GPTScratchForCausalLM

# Rows that the weights are packed for, and to which fewer are filled up. On an AMD CPU (benchmarks/few_rows.py) 4 rows
# take about as long as 1 with the weight as it is, 8 a quarter longer, and 512 as long as with the weight as it is.
PACKED_FOR, FEWEST = 8, 4


class PackedLinear(nn.Module):
    """A linear layer that cannot change: a weight packed by oneDNN, and a bias, neither of them a parameter."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), PACKED_FOR)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in)
        rows = x.shape[:-1].numel()
        flat = x.reshape(rows, self.in_features)
        if rows < FEWEST:
            flat = F.pad(flat, (0, 0, 0, FEWEST - rows))
        out = torch.ops.mkldnn._linear_pointwise(flat, self._packed, self._bias, "none", [], "")
        return out[:rows].view(*x.shape[:-1], self.out_features)  # (..., out)

    @property
    def nbytes(self) -> int:
        biases = 0 if self._bias is None else self.out_features
        return 4 * (self.in_features * self.out_features + biases)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward pass raises an error."""

    @staticmethod
    def forward(ctx, tensor, anchor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *_) -> Any:
        _refuse("have gradients", "train the original, and call for_decoding again")


def _refuse(what: str, remedy: str) -> NoReturn:
    raise RuntimeError(f"a model made by for_decoding cannot {what}; {remedy}")


def _refusing(what: str, remedy: str) -> Any:
    def refuse(self, *args, **kwargs) -> NoReturn:
        _refuse(what, remedy)

    return refuse


class ForDecoding(GPTScratchForCausalLM):
    """What a model made by `for_decoding` does otherwise: it generates and computes logits, and refuses the rest."""

    _auto_class = None

    @wraps(GPTScratchForCausalLM.forward)
    def forward(self, *args, **kwargs):  # type: ignore[override]  # of the same signature
        if torch.compiler.is_compiling():
            _refuse("be compiled or exported", "compile the original")
        with torch.no_grad():
            outputs = super().forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return outputs
        anchor = torch.zeros((), requires_grad=True)
        if isinstance(outputs, tuple):
            return tuple(_NoGradient.apply(x, anchor) if isinstance(x, torch.Tensor) else x for x in outputs)
        for name in ("loss", "logits"):
            if outputs.get(name) is not None:
                outputs[name] = _NoGradient.apply(outputs[name], anchor)
        return outputs

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights, packed ones included."""
        packed = sum(layer.nbytes for layer in self.modules() if isinstance(layer, PackedLinear))
        return packed + super().get_memory_footprint(return_buffers)

    def train(self, mode: bool = True):
        if mode:
            _refuse("be trained", "train the original, and call for_decoding again")
        return super().train(False)

    def to(self, *args, **kwargs):  # type: ignore[override]  # of the same arguments
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (device is None or device.type == "cpu") and dtype in (None, torch.float32):
            return self
        return super().to(*args, **kwargs)  # which refuses

    num_parameters = _refusing("count its parameters", "ask the original")
    state_dict = save_pretrained = save_as_gpt2 = to_gpt2 = push_to_hub = _refusing(
        "be saved or converted", "save the original"
    )
    load_state_dict = _refusing("load weights", "load them into the original, and call for_decoding again")
    _apply = _refusing("be converted or moved", "convert the original, and call for_decoding again")
    requires_grad_ = _refusing("have gradients", "train the original, and call for_decoding again")
    resize_token_embeddings = set_input_embeddings = set_output_embeddings = _refusing(
        "get other embeddings", "change the original, and call for_decoding again"
    )
    add_adapter = load_adapter = _refusing("get adapters", "merge them into the original, and call for_decoding again")
    __deepcopy__ = __reduce_ex__ = _refusing("be copied or pickled", "copy the original, and call for_decoding again")


def for_decoding(model: GPTScratchForCausalLM) -> GPTScratchForCausalLM:
    """A frozen copy of a language model that generates the same ids faster, for 2 sequences and more.

    For one sequence it is about as fast as the model itself.

    It has `.generate()` with all its modes, and forward passes without gradients, on a CPU in float32. All linear
    layers are packed, a tied head too, which costs its size more than the model: `get_memory_footprint()` tells the
    bytes, 652 MB for 124M. The model itself is not changed, and may be deleted.

    Args:
        model: a language model on the CPU, in float32, without adapters, quantization or hooks.

    Returns:
        A model whose class inherits from the model's. Training, gradients, saving, copying and changes of weights
        raise RuntimeError.

    Raises:
        TypeError: it is no `GPTScratchForCausalLM`.
        ValueError: a weight is not float32 on the CPU, or a layer is not a plain one.
        RuntimeError: this torch has no oneDNN.
    """
    if not isinstance(model, GPTScratchForCausalLM):
        raise TypeError(
            f"for_decoding got a {type(model).__name__}; give it a GPTScratchForCausalLM (PEFT's merge_and_unload() "
            f"returns one)"
        )
    if isinstance(model, ForDecoding):
        return model
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        raise RuntimeError("this torch has no oneDNN to pack weights with; generate with the model itself")
    for name, weight in model.named_parameters():
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or type(weight) is not nn.Parameter:
            raise ValueError(
                f"{name} is {type(weight).__name__} of {weight.dtype} on {weight.device}, but for_decoding packs "
                f"float32 parameters on the CPU; call it with model.float().cpu(), or generate with the model itself"
            )
    for name, module in model.named_modules():
        hooked = bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
        other = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        if hooked or other or hasattr(module, "base_layer"):  # the last is what PEFT calls what it adapts
            raise ValueError(
                f"{name or 'the model'} is {type(module).__name__}{' with hooks' * hooked}, which packed weights would "
                f"leave out; merge adapters and remove hooks first, or generate with the model itself"
            )
    with torch.inference_mode(False), torch.no_grad():
        fast: Any = copy.deepcopy(model).eval()
        for name, layer in list(fast.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, child = name.rpartition(".")
                setattr(fast.get_submodule(parent), child, PackedLinear(layer))
        for parameter in fast.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
    fast.__class__ = type(f"{type(model).__name__}ForDecoding", (ForDecoding, type(model)), {})
    return fast
