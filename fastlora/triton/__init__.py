"""The ``triton`` backend: every op as a Triton kernel, same contracts as reference.py and csrc/."""

from . import nf4_linear
from .bottleneck import bottleneck_down, bottleneck_down_backward, bottleneck_up
from .bounds import bounds as segment_bounds
from .down import down
from .gemm import gemm, scaled_gemm, segment_gemm
from .mask import mask
from .nf4 import dequantize, quantize
from .nf4_linear import dx as nf4_dx
from .norms import nf4_row_norms, row_norms
from .scale import scale_columns, scale_columns_backward
from .segment_wgrad import wgrad as segment_wgrad
from .segments import down as segment_down
from .segments import linear as segment_linear
from .segments import up as segment_up
from .wgrad import wgrad

__all__ = [
    "bottleneck_down",
    "bottleneck_down_backward",
    "bottleneck_up",
    "dequantize",
    "down",
    "gemm",
    "mask",
    "nf4_dx",
    "nf4_linear",
    "nf4_row_norms",
    "quantize",
    "row_norms",
    "scale_columns",
    "scale_columns_backward",
    "scaled_gemm",
    "segment_bounds",
    "segment_down",
    "segment_gemm",
    "segment_linear",
    "segment_up",
    "segment_wgrad",
    "wgrad",
]
