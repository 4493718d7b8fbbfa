"""Matrix products as the head level needs them: half-precision operands, float32 results where the device has those."""

import functools

import torch
from torch import Tensor


def matmul(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out = left @ right`, accumulated in float32 or better and rounded to `out` only, where the device can."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    elif results_in_float32(left.device.type, left.dtype):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(left @ right)


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a temporary where the device can."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif results_in_float32(left.device.type, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@functools.cache
def results_in_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this device's products of such operands may have a float32 result; tried once."""
    if dtype.itemsize >= 4:
        return True
    try:
        ones = torch.ones(16, 16, dtype=dtype, device=device_type)
        out = torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty_like(ones, dtype=torch.float32))
        torch.addmm(out, ones, ones, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((out == 32).all())
