"""Linear layers with int8 weights, through transformers' quantization config; on CPUs by torch's packed product.

    GPTScratchForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, quantization_config=Int8Config())

Weights only, one scale for each output: w ≈ scale · q with q in [-127, 127], scale = max |w| / 127. A saved
int8 model loads as one. A tied output head gets an int8 matrix of its own; the embedding is not quantized.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "gpt_scratch_int8"
FEW_ROWS = 16  # up to this number the packed product is faster than converting the weight
PACKED = 32  # `in_features` must be a multiple of this; otherwise the packed product reads out of bounds
# Whether products in bfloat16 are several times slower than in float32, as on CPUs without AVX-512.
SLOW_BF16 = not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
ALIGNMENT = 64  # bytes; it crashes on weights that are not aligned, as in mapped files


def _align(layer, _):
    layer.align()


class Int8Linear(nn.Module):
    """`nn.Linear` with an int8 weight (out, in) and one scale (out,) for each output; for inference."""

    int8_weight: torch.Tensor
    scales: torch.Tensor

    def __init__(self, in_features, out_features, bias=True, dtype=torch.bfloat16):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("int8_weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(out_features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        self.register_load_state_dict_post_hook(_align)

    def align(self) -> None:
        """Copies the weight to aligned memory, which the packed product needs."""
        if self.int8_weight.device.type == "cpu" and self.int8_weight.data_ptr() % ALIGNMENT:
            self.int8_weight = self.int8_weight.clone()

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear) -> "Int8Linear":
        """The nearest int8 layer to a float one.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        weight = linear.weight.float()
        largest = weight.abs().amax(dim=1)
        if not largest.isfinite().all():
            raise ValueError(
                "the weight of a layer has NaN or infinite values, which int8 does not have; repair it first"
            )
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)
        layer.scales = (largest / 127).clamp(min=torch.finfo(linear.weight.dtype).tiny).to(linear.weight.dtype)
        layer.int8_weight = (weight / layer.scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias)
        return layer

    def forward(self, x):  # (..., in)
        rows = x.shape[:-1].numel()
        trains = x.requires_grad and torch.is_grad_enabled()  # through this layer; the packed product has no gradient
        if rows <= FEW_ROWS and self.in_features % PACKED == 0 and x.device.type == "cpu" and not trains:
            few = x.reshape(rows, self.in_features).bfloat16()
            out = torch._weight_int8pack_mm(few, self.int8_weight, self.scales.bfloat16())
            out = out.view(*x.shape[:-1], self.out_features).to(x.dtype)
        else:
            weight = self.int8_weight
            if torch.compiler.is_compiling():
                weight = weight.float()  # otherwise inductor would recognize the product and use the packed one
            dtype = torch.float32 if x.dtype is torch.bfloat16 and x.device.type == "cpu" and SLOW_BF16 else x.dtype
            out = (F.linear(x.to(dtype), weight.to(dtype)) * self.scales.to(dtype)).to(x.dtype)
        return out if self.bias is None else out + self.bias  # (..., out)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Config(QuantizationConfigMixin):
    """Int8 weights for all linear layers.

    Args:
        modules_to_not_convert: names, or ends of names, of layers to leave out, such as `["out_head"]`.
    """

    def __init__(self, modules_to_not_convert: list[str] | None = None, **_):
        self.quant_method = METHOD  # type: ignore[assignment]  # not in transformers' enum
        self.modules_to_not_convert = modules_to_not_convert


class Int8Quantizer(HfQuantizer):
    """Carries out an `Int8Config` in transformers' loader: float weights are quantized after loading."""

    quantization_config: Int8Config
    requires_calibration = False
    is_trainable = False
    is_compileable = True

    def is_serializable(self, *args, **kwargs):
        return True

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            self._replace(model, _empty)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            self._replace(model, Int8Linear.from_linear)
        for layer in model.modules():
            if isinstance(layer, Int8Linear):
                layer.align()
        return model

    def _replace(self, model, replaced_by):
        left = tuple(self.quantization_config.modules_to_not_convert or ())
        for name, linear in list(model.named_modules()):
            if type(linear) is nn.Linear and not name.endswith(left):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, replaced_by(linear))
                if name == "out_head":
                    model.config.tie_word_embeddings = False
                    model.all_tied_weights_keys = {}


def _empty(linear: nn.Linear) -> Int8Linear:
    with linear.weight.device:
        return Int8Linear(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # unless the package, or a copy shipped with saved weights, has registered it
    register_quantization_config(METHOD)(Int8Config)
    register_quantizer(METHOD)(Int8Quantizer)
