"""The token level in C++ on the CPU: loads the library that setup.py builds from csrc/ and passes it tensors.

The library is plain C ABI, so one build serves every torch and Python version. It is compiled for several instruction
sets and uses the best that this machine supports; `RPO_KERNELS_NATIVE_ISA` selects another.
"""

import ctypes
import functools
import os
import struct
import warnings
from ctypes import POINTER, Structure, byref, c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .interface import ActiveColumns, EntropyGrad, RowStats, TokenOptions

LIBRARY = Path(__file__).parent.parent / "_native.so"
ISA_VARIABLE = "RPO_KERNELS_NATIVE_ISA"
EMULATED = "emulated"  # AVX-512 with the LM head's bfloat16 products emulated, for tests
MAPPED_BYTES = 2**25  # larger blocks are mapped anew by the allocator, and unmapped when they are freed
_LARGEST = torch.finfo(torch.float32).max
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> bool:
    """Whether the native backend can run here."""
    return reason() is None


@functools.cache
def reason() -> str | None:
    """Why the native backend cannot run here, or None if it can."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built: `pip install` of this package builds it where there is a C++ compiler"
    if changed := _changed_since_build():
        warnings.warn(f"rpo_kernels: {changed}; until then the torch backend serves on the CPU", stacklevel=2)
        return changed
    try:
        _library()
    except (OSError, AttributeError) as error:  # the latter from a library of another version
        return f"{LIBRARY.name} cannot be used, install the package again: {error}"
    return None


def _changed_since_build() -> str | None:
    """In a checkout: which source is newer than the library, which may then read its arguments another way."""
    built = LIBRARY.stat().st_mtime
    for source in sorted((LIBRARY.parents[1] / "csrc").glob("*.[ch]*")):
        if source.stat().st_mtime > built:
            return f"{source.name} changed after {LIBRARY.name} was built: run `python setup.py build_ext --inplace`"
    return None


@functools.cache
def instruction_sets() -> list[str]:
    """The instruction sets that this machine can run, best first."""
    return _library().rpo_instruction_sets().decode().split()


def instruction_set() -> str:
    """The instruction set in use.

    Raises:
        ValueError: if `RPO_KERNELS_NATIVE_ISA` names one that this machine cannot run.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return instruction_sets()[0]
    if wanted not in instruction_sets() and not (wanted == EMULATED and "avx512" in instruction_sets()):
        raise ValueError(f"{ISA_VARIABLE}={wanted!r}, but this machine runs {', '.join(instruction_sets())}")
    return wanted


def has_head() -> bool:
    """Whether the instruction set in use has the LM head's bfloat16 products."""
    return bool(_library().rpo_has_head(_isa_pointer(instruction_set())))


def info() -> dict[str, Any]:
    """Instruction set, number of threads, and the pool that they belong to."""
    threads = "torch's OpenMP pool" if _openmp() else "started for each call"
    return {"instruction_set": instruction_set(), "threads": torch.get_num_threads(), "pool": threads}


def describe() -> str:
    """Instruction set and number of threads in words."""
    return f"{instruction_set()}, {torch.get_num_threads()} threads"


def row_stats(
    logits: Tensor,
    labels: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    running: RowStats | None = None,
    outputs: tuple[str, ...] = (),
) -> RowStats:
    """As `reference.row_stats`, for float32, bfloat16 and float16 logits on the CPU."""
    described = _describe(logits, labels, options, first_column)
    stats = RowStats.empty(labels, outputs) if running is None else running
    dense = stats if running is None else [None if x is None else x.contiguous() for x in stats]
    pointers = _STATS.pack(*map(_pointer, dense))
    failed = _library().rpo_row_stats(
        _isa_pointer(instruction_set()),
        byref(_workers()),
        described.packed,
        running is not None,
        pointers,
    )
    if failed:
        raise MemoryError("row_stats: no memory for partial sums")
    if running is not None:
        for field, x in zip(running, dense):
            if field is not None and x is not None and x is not field:
                field.copy_(x)
    return stats


def row_grad(
    logits: Tensor,
    labels: Tensor,
    stats: RowStats,
    grad_logps: Tensor,
    options: TokenOptions = TokenOptions(),
    first_column: int = 0,
    out: Tensor | None = None,
    active: ActiveColumns | None = None,
    entropy: EntropyGrad | None = None,
) -> Tensor:
    """As `reference.row_grad`, for float32, bfloat16 and float16 logits on the CPU."""
    described = _describe(logits, labels, options, first_column)
    if out is not None and out.shape != logits.shape:
        raise ValueError(f"out must have the shape of logits, {tuple(logits.shape)}, got {tuple(out.shape)}")
    direct = out is not None and _is_writable(out, logits)
    result = out if out is not None and direct else _new_gradient(logits)
    kept = [x.to(torch.float32).contiguous() for x in (stats.logp, stats.max, stats.sumexp)]
    factors = grad_logps.to(torch.float32)
    mask = None if active is None else active.mask.contiguous()
    value, slope = (None, None) if entropy is None else (x.to(torch.float32) for x in entropy)
    value = None if value is None else value.contiguous()
    grad = _GRAD.pack(
        *map(_pointer, (*kept, factors)),
        *factors.stride(),
        result.data_ptr(),
        *result.stride()[:2],
        DTYPES[result.dtype],
        _pointer(mask),
        0.0 if active is None else min(active.threshold, _LARGEST),  # a float32
        _pointer(value),
        _pointer(slope),
        *((0, 0) if slope is None else slope.stride()),
    )
    _library().rpo_row_grad(_isa_pointer(instruction_set()), byref(_workers()), described.packed, grad)
    if active is not None and mask is not None and mask is not active.mask:
        active.mask.copy_(mask)
    return result if out is None or direct else out.copy_(result)


def _layout(fields: dict[str, str]) -> struct.Struct:
    """A structure of csrc/segments.h: its fields in order, with their formats (`struct`). Packing takes a third of the
    time that making a ctypes Structure takes."""
    return struct.Struct("".join(fields.values()))


_LOGITS = _layout(
    dict(data="P", labels="P", strides="qq", labels_strides="qq", batch="q", time="q", columns="q", first_column="q")
    | dict(ignore_index="q", logit_scale="d", softcap="d", temperature="d", dtype="i", shift="i")
)
_STATS = _layout(dict.fromkeys(RowStats._fields, "P"))
_GRAD = _layout(
    dict(
        logp="P", max="P", sumexp="P", grad_logps="P", grad_logps_strides="qq", out="P", out_strides="qq", out_dtype="i"
    )
    | dict(mask="P", threshold="f", entropy="P", grad_entropy="P", grad_entropy_strides="qq")
)


class _Workers(Structure):
    _fields_ = [("parallel", c_void_p), ("threads", c_int32)]


class _Described(NamedTuple):
    """The C description of logits and labels, with the tensors that it points into."""

    packed: bytes
    tensors: tuple[Tensor, Tensor]


def _describe(logits: Tensor, labels: Tensor, options: TokenOptions, first_column: int) -> _Described:
    if logits.device.type != "cpu" or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits must be float32, bfloat16 or float16 on the CPU, got {logits.dtype} on {logits.device}"
        )
    if logits.dim() != 3 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [B, T, V] with V > 0, got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels must be {tuple(logits.shape[:2])} as logits are, got {tuple(labels.shape)}")
    rows = logits if _has_dense_rows(logits) else logits.contiguous()
    if labels.dtype != torch.int64 or labels.device.type != "cpu":  # `to` takes a microsecond even if nothing changes
        labels = labels.to("cpu", torch.int64)
    packed = _LOGITS.pack(
        rows.data_ptr(),
        labels.data_ptr(),
        *rows.stride()[:2],
        *labels.stride(),
        *rows.shape,
        first_column,
        options.ignore_index,
        options.logit_scale,
        options.softcap or 0.0,
        options.temperature,
        DTYPES[rows.dtype],
        options.shift,
    )
    return _Described(packed, (rows, labels))


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _new_gradient(logits: Tensor) -> Tensor:
    result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if result.nbytes > MAPPED_BYTES:
        _library().rpo_use_large_pages(result.data_ptr(), result.nbytes)
    return result


def _is_writable(out: Tensor, logits: Tensor) -> bool:
    """Whether the kernel may write `out` while it reads `logits`: exactly these, or other memory."""
    same = out.data_ptr() == logits.data_ptr() and out.stride() == logits.stride() and out.dtype == logits.dtype
    apart = out.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr()
    return out.dtype in DTYPES and _has_dense_rows(out) and (same or apart)


def _has_dense_rows(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.rpo_instruction_sets.restype = c_char_p
    library.rpo_instruction_set.argtypes, library.rpo_instruction_set.restype = [c_char_p], c_void_p
    library.rpo_has_head.argtypes = [c_void_p]
    library.rpo_use_large_pages.argtypes, library.rpo_use_large_pages.restype = [c_void_p, c_int64], None
    library.rpo_row_stats.argtypes = [c_void_p, POINTER(_Workers), c_char_p, c_int32, c_char_p]
    library.rpo_row_grad.argtypes = [c_void_p, POINTER(_Workers), c_char_p, c_char_p]
    library.rpo_row_grad.restype = None
    return library


@functools.cache
def _isa_pointer(name: str) -> int:
    return _library().rpo_instruction_set(name.encode())


@functools.cache
def _openmp() -> int | None:
    """Address of the `GOMP_parallel` that torch itself calls, or None: then threads are started for each call.

    A second pool beside torch's would compete with torch's threads, which spin for a while after each parallel region.
    """
    for path in Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"):
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def _workers() -> _Workers:
    return _Workers(_openmp(), torch.get_num_threads())
