"""Functions of float32 numbers that the Triton kernels share: tanh and expm1 without cancellation."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Beyond this size, neighbouring float32 numbers are too far apart for a softmax relative to a stored maximum.
COARSE = tl.constexpr(2.0**30)
# Stands for a maximum of -inf: subtracting it from -inf gives -inf and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def squash(x, inner, SOFTCAP: tl.constexpr):
    return tanh(x * inner) if SOFTCAP else x


@triton.jit
def tanh(x):
    """tanh to about two units in the last place: a polynomial near 0, where 1 - 2 / (e^2x + 1) would cancel."""
    y = x * x
    small = x + x * y * (-0.33333319 + y * (0.13332488 + y * (-0.053831007 + y * (0.020951715 - y * 0.0060724764))))
    big = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.6, small, tl.where(x < 0, -big, big))


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0 without cancellation."""
    half = tanh(0.5 * x)
    return 2.0 * half / (1.0 - half)
