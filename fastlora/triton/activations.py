"""The activations of ``fastlora.activations`` in fp32 registers, chosen by ``kind`` at compile time.

As torch's: NaN goes through, and where an infinity makes torch's NaN it does here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """From exp(-2 |x|), and near zero, where that would cancel, from its series up to x^11 (the rest is below 1e-9 of it)."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _normal(x):
    """The normal distribution's function at x."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tanh_of_gelu(x):
    return _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))


@triton.jit
def _tanh_of_softplus(x):
    """tanh(log(1 + e^x)) = n / (n + 2) with n = e^x (e^x + 2); 1 where e^x might overflow."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    n = e * (e + 2.0)
    return tl.where(x > 20.0, 1.0, n / (n + 2.0))


@triton.jit
def activate(p, KIND: tl.constexpr):
    """act(p), fp32."""
    if KIND == "relu":
        a = tl.where(p <= 0.0, 0.0, p)
    elif KIND == "gelu":
        a = p * _normal(p)
    elif KIND == "gelu_tanh":
        a = 0.5 * p * (1.0 + _tanh_of_gelu(p))
    elif KIND == "silu":
        a = p / (1.0 + tl.exp(-p))
    elif KIND == "leaky_relu":
        a = tl.where(p > 0.0, p, 0.01 * p)
    elif KIND == "tanh":
        a = _tanh(p)
    elif KIND == "sigmoid":
        a = _sigmoid(p)
    elif KIND == "mish":
        a = p * _tanh_of_softplus(p)
    else:
        tl.static_assert(KIND == "linear", "an activation that is not there")
        a = p
    return a


@triton.jit
def activate_backward(g, p, KIND: tl.constexpr):
    """g * act'(p), fp32."""
    if KIND == "relu":
        d = tl.where(p <= 0.0, 0.0, g)
    elif KIND == "gelu":
        d = g * (_normal(p) + p * 0.3989422804014327 * tl.exp(-0.5 * p * p))
    elif KIND == "gelu_tanh":
        t = _tanh_of_gelu(p)
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * p * p)
        d = g * (0.5 * (1.0 + t) + 0.5 * p * (1.0 - t * t) * slope)
    elif KIND == "silu":
        s = _sigmoid(p)
        d = g * s * (1.0 + p * (1.0 - s))
    elif KIND == "leaky_relu":
        d = tl.where(p > 0.0, g, 0.01 * g)
    elif KIND == "tanh":
        t = _tanh(p)
        d = g * (1.0 - t * t)
    elif KIND == "sigmoid":
        s = _sigmoid(p)
        d = g * s * (1.0 - s)
    elif KIND == "mish":
        t = _tanh_of_softplus(p)
        d = g * (t + p * (1.0 - t * t) * _sigmoid(p))
    else:
        tl.static_assert(KIND == "linear", "an activation that is not there")
        d = g
    return d
