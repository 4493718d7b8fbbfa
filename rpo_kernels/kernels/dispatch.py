"""Choice of the backend for a tensor, by device or by name."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import reference
from .interface import Backend
from .softmax import TileSoftmax

BACKENDS = ("triton", "native", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None
_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def choose(logits: Tensor, backend: str | None) -> str:
    """Name of the backend for these logits: the one asked for, or the fastest that is available.

    Raises:
        ValueError: if `backend` is unknown, is not available here, or does not take these logits.
    """
    check_backend(backend)
    if backend is None:
        fastest = "native" if logits.device.type == "cpu" else "triton"
        return fastest if unavailable_reason(fastest, logits.device.type, logits.dtype) is None else "torch"
    reason = unavailable_reason(backend, logits.device.type, logits.dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot serve {logits.dtype} logits on {logits.device}: {reason}")
    return backend


def check_backend(backend: str | None) -> None:
    """Raise ValueError for a name that is no backend's."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")


def rows(logits: Tensor, backend: str | None) -> Backend:
    """The module whose `row_stats` and `row_grad` serve these logits; errors as `choose`."""
    return _module(choose(logits, backend))


def tile_softmax(kernels: Backend, name: str) -> TileSoftmax:
    """The softmax over tiles of logits: fused kernels, or the backend's row kernels in sequence."""
    if name == "triton":
        return importlib.import_module(".triton.softmax", __package__).FusedTileSoftmax(kernels)
    return TileSoftmax(kernels)


def fuses_objective(logps: Tensor, backend: str | None) -> bool:
    """Whether one fused kernel computes the RPO loss of these log-probabilities, which saves launches on a GPU."""
    return logps.dtype == torch.float32 and (backend == "triton" or (backend is None and HAS_TRITON and logps.is_cuda))


@functools.cache
def _module(name: str) -> Backend:
    if name == "torch":
        return reference
    if name == "native":
        from . import native

        return native
    from . import triton

    return triton


@functools.cache
def unavailable_reason(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why a backend cannot serve tensors of this device and dtype, or None if it can."""
    if backend == "torch":
        return None
    if dtype not in _HALF_AND_SINGLE:
        return "only float32, bfloat16 and float16 logits have kernels"
    if backend == "native":
        if device_type != "cpu":
            return "native kernels run on the CPU"
        from . import native

        return native.reason()
    if not HAS_TRITON:
        return "triton is not installed"
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton kernels run on CUDA and ROCm devices (elsewhere with TRITON_INTERPRET=1)"
    return None


def backend_info() -> dict[str, dict[str, Any]]:
    """Which backends are available on this machine.

    Returns:
        For each backend: `available` (bool), `device` that it runs on, `reason` why it is not available, and
        `version` of torch or Triton, or instruction set and threads of the native library; None where not.
    """
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    info: dict[str, dict[str, Any]] = {}
    for name, device in (("triton", cuda), ("native", "cpu"), ("torch", cuda)):
        reason, version = unavailable_reason(name, device, torch.float32), None
        try:
            version = _versions(name) if reason is None else None
        except ValueError as error:  # RPO_KERNELS_NATIVE_ISA names an instruction set that is not available
            reason = str(error)
        info[name] = {"available": reason is None, "device": _device_name(device), "reason": reason, "version": version}
    return info


def _device_name(device_type: str) -> str:
    return torch.cuda.get_device_name() if device_type == "cuda" else "cpu"


def _versions(backend: str) -> str:
    if backend == "torch":
        return torch.__version__
    if backend == "triton":
        return importlib.import_module("triton").__version__
    from . import native

    return native.describe()
