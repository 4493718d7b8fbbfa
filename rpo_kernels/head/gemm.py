"""Matrix products of the LM head: half-precision operands, with float32 results where the device supports them."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

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
    """Whether this device's products of such operands may have a float32 result; tried once, on 1 + 2^-12, which half
    precision rounds to 1."""
    if dtype.itemsize >= 4:
        return True
    try:
        left = torch.zeros(16, 16, dtype=dtype, device=device_type)
        left[:, 0], left[:, 1] = 1, 2.0**-6
        out = torch.mm(left, left.T, out_dtype=torch.float32, out=torch.empty_like(left, dtype=torch.float32))
        torch.addmm(out, left, left.T, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((out == 2 * (1 + 2.0**-12)).all())


def describe(device_type: str) -> str:
    """The dtype of results of half-precision products on this device, in words."""
    rounded = [str(x)[6:] for x in (torch.bfloat16, torch.float16) if not results_in_float32(device_type, x)]
    if not rounded:
        return "float32 results of half-precision operands"
    return f"no float32 results of {' and '.join(rounded)} operands: logits are rounded"


def warn_of_rounding(device_type: str, dtype: torch.dtype) -> None:
    """Say that logits will be rounded; shown once, as warnings are."""
    warnings.warn(
        f"torch {torch.__version__} has no products of {dtype} operands with a float32 result on {device_type!r}: "
        "logits are rounded before the softmax, some hundredths of a nat a token",
        stacklevel=2,
    )


@contextlib.contextmanager
def whole_sums(device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Products of half-precision operands within are summed in float32 to their end, also where torch is allowed to add
    parts of them in half precision.

    torch's flags belong to the process: they are as found again when the last thread has left. Products of other
    threads meanwhile are only more exact.
    """
    if dtype.itemsize >= 4 or not _has_flags(device_type):
        yield
        return
    _flags.turn_off()
    try:
        yield
    finally:
        _flags.restore()


def _has_flags(device_type: str) -> bool:
    return device_type == "cuda"


class _Flags:
    """What lets cuBLAS round sums in between, off while anybody is using it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.found: dict[str, bool | tuple[bool, bool]] = {}

    def turn_off(self) -> None:
        """Off, for one user more."""
        of_torch = torch.backends.cuda.matmul
        with self.lock:
            self.users += 1
            if self.users > 1:
                return
            self.found = {"allow_fp16_accumulation": of_torch.allow_fp16_accumulation}
            of_torch.allow_fp16_accumulation = False
            for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
                splits = getattr(of_torch, name + "_split_k")
                self.found[name] = getattr(of_torch, name), splits
                setattr(of_torch, name, (False, splits))

    def restore(self) -> None:
        """As found, after the last user."""
        with self.lock:
            self.users -= 1
            if self.users == 0:
                for name, value in self.found.items():
                    setattr(torch.backends.cuda.matmul, name, value)


_flags = _Flags()
