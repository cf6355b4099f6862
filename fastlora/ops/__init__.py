"""Raw ops and the choice of who runs them. None has a gradient formula: ``fastlora.autograd`` is the public path to those that
want one."""

from .bottleneck import (
    bottleneck_down,
    bottleneck_down_backward,
    bottleneck_up,
    bottleneck_wgrad,
)
from .linear import lora_backward, lora_forward, lora_scaled
from .nf4 import dequantize, nf4_backward, nf4_linear, nf4_scaled, quantize, quantize_scales
from .norms import nf4_row_norms, row_norms
from .raw import down, gemm, mask, wgrad
from .scale import scale_columns, scale_columns_backward, scaled_gemm
from .segments import (
    segment_bounds,
    segment_down,
    segment_gemm,
    segment_linear,
    segment_nf4_gemm,
    segment_up,
    segment_wgrad,
)
from .support import Form, backend

__all__ = [
    "Form",
    "backend",
    "bottleneck_down",
    "bottleneck_down_backward",
    "bottleneck_up",
    "bottleneck_wgrad",
    "dequantize",
    "down",
    "gemm",
    "lora_backward",
    "lora_forward",
    "lora_scaled",
    "mask",
    "nf4_backward",
    "nf4_linear",
    "nf4_row_norms",
    "nf4_scaled",
    "quantize",
    "quantize_scales",
    "row_norms",
    "scale_columns",
    "scale_columns_backward",
    "scaled_gemm",
    "segment_bounds",
    "segment_down",
    "segment_gemm",
    "segment_linear",
    "segment_nf4_gemm",
    "segment_up",
    "segment_wgrad",
    "wgrad",
]
