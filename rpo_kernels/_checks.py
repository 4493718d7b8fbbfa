"""Checks of arguments: each raises ValueError with the argument's name, what came and what was expected."""

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64, torch.int32)
REAL = (*FLOATING, *INTEGER, torch.int16, torch.int8, torch.uint8, torch.bool)
_WORDS = {
    FLOATING: "floating point (float32, bfloat16, float16 or float64)",
    INTEGER: "int64 or int32",
    REAL: "of real numbers",
}


def checks_values(x: Tensor) -> bool:
    """Whether to read the values of `x`: always on the CPU, and never of fake tensors or while torch.compile traces.

    Reading them from an accelerator synchronises with it, so there only if RPO_KERNELS_CHECK=1 is set.
    """
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    return x.device.type == "cpu" or os.environ.get("RPO_KERNELS_CHECK") == "1"


def check_tensor(name: str, x: Any, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """Check that `x` is an ordinary (strided) tensor of one of these types."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise ValueError(f"{name} must be a dense tensor, got a {'nested' if x.is_nested else x.layout} one")
    if x.dtype not in dtypes:
        raise ValueError(f"{name} must be {_WORDS[dtypes]}, got {x.dtype}")


def check_shape(name: str, x: Tensor, shape: tuple[int, ...], which: str) -> None:
    """Check the shape of `x`; `which` describes the expected shape in the error."""
    if x.shape != shape:
        raise ValueError(f"{name} must have {which} {list(shape)}; got {list(x.shape)}")


def check_device(name: str, x: Tensor, device: torch.device, whose: str) -> None:
    """Check that `x` is on a device; `whose` names in the error the argument that is on it."""
    if x.device != device:
        raise ValueError(f"{name} must be on {whose} device {device}; got {x.device}")


def check_positive(name: str, value: Any) -> None:
    """Check that `value` is a positive finite Python number. A tensor would get no gradient, so it is refused."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} must be a number, not a tensor; to learn it, apply it to the inputs")
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def check_integer(name: str, value: Any) -> None:
    """Check that `value` is a Python integer."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether `value` is a Python int or float (or a symbolic one), not a bool."""
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)
