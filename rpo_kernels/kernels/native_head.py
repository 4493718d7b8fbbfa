"""Tiles of the LM head in C++ on CPUs with bfloat16 units: packed operands, products with the softmax inside.

Layouts and arithmetic: csrc/head.h. A tile is all rows of a chunk by some columns of the vocabulary; with
`P = exp(z - reference)`, 0 at each row's label, `forward` sums P over the columns and `backward` recomputes it.
"""

import functools
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .interface import TokenOptions

STRIP, PANEL, PIECE = 14, 32, 16  # as in csrc/head.h


def reason() -> str | None:
    """Why bfloat16 products cannot run here, or None if they can."""
    if not native.available():
        return native.reason()
    try:
        if native.has_head():
            return None
    except ValueError as error:  # the variable names an instruction set that is not available
        return str(error)
    best = native.instruction_sets()[0]
    if best == "avx512bf16":
        return f"{native.ISA_VARIABLE}={native.instruction_set()}"
    return f"no avx512_bf16 in this CPU or in the compiler that built {native.LIBRARY.name} (it runs {best})"


def describe() -> str:
    """The LM head's products for bfloat16 operands on the CPU, and the reason, in words."""
    unavailable = reason()
    if unavailable is None:
        return f"bfloat16 operands, float32 results, softmax inside ({native.instruction_set()})"
    return f"float32, operands converted: {unavailable}"


def serves(device_type: str, dtype: torch.dtype, backend: str | None) -> bool:
    """Whether these kernels take such operands on this machine."""
    if device_type != "cpu" or dtype != torch.bfloat16 or backend not in (None, "native"):
        return False
    return reason() is None


def panels(rows: int) -> int:
    """Number of panels of that many rows."""
    return -(-rows // PANEL)


def _pieces(width: int) -> int:
    return -(-width // PANEL)


class Buffers(NamedTuple):
    """Shapes of the packed operands of a tile, as int32 tensors (gradient: float32)."""

    rows: int
    columns: int
    width: int

    @property
    def lanes(self) -> tuple[int, ...]:
        """Hidden states for the logits."""
        return (panels(self.rows), _pieces(self.width) * PIECE, PANEL)

    @property
    def elements(self) -> tuple[int, ...]:
        """Hidden states for the weight's gradient."""
        return (_pieces(self.width), panels(self.rows), PIECE, PANEL)

    @property
    def weight(self) -> tuple[int, ...]:
        """Weight for the logits."""
        return (-(-self.columns // STRIP), _pieces(self.width), STRIP, PIECE)

    @property
    def pairs(self) -> tuple[int, ...]:
        """Weight for the hidden states' gradient."""
        return (-(-self.width // STRIP) * -(-self.columns // 2) * STRIP + PIECE,)

    @property
    def grad_logits(self) -> tuple[int, ...]:
        """d logp / d logits."""
        return (-(-self.columns // STRIP), panels(self.rows), STRIP, PIECE)

    @property
    def gradient(self) -> tuple[int, ...]:
        """Gradient of the hidden states."""
        return (panels(self.rows), -(-self.width // STRIP), STRIP, PANEL)


class Tile(NamedTuple):
    """A tile of logits: packed operands and results."""

    lanes: Tensor
    weight: Tensor
    labels: Tensor  # int32, padded to panels: the label's column in the tile, any number outside if it has none
    rows: int
    columns: int
    width: int
    options: TokenOptions
    bias: Tensor | None = None  # [columns] float32
    pairs: Tensor | None = None
    gradient: Tensor | None = None  # added to, with `pairs`
    grad_logits: Tensor | None = None  # written
    stream: bool = False  # write `grad_logits` past the caches: it is read in backward only


class OutputRows(NamedTuple):
    """Sums for outputs beside the log-probability, over all columns but the label's; fields as in csrc/head.h."""

    sum_exp_z: Tensor
    sum_z: Tensor
    sum_sq_exp: Tensor
    max_before_label: Tensor
    max_after_label: Tensor
    at_label: Tensor

    @classmethod
    def empty(cls, rows: int) -> "OutputRows":
        """Before the first column."""
        sums = torch.zeros(3, rows, dtype=torch.float64, device="cpu")
        tops = torch.full((3, rows), -torch.inf, dtype=torch.float32, device="cpu")
        return cls(*sums, *tops)


class Running(NamedTuple):
    """Running softmax over all columns but the label's; fields as in csrc/head.h, padded to panels."""

    reference: Tensor
    sum: Tensor
    label: Tensor
    marks: Tensor | None = None
    dropped: Tensor | None = None
    threshold: float = 0.0
    outputs: OutputRows | None = None


def pack_hidden(hidden: Tensor, lanes: Tensor | None, elements: Tensor | None, factor: Tensor | None = None) -> None:
    """Pack hidden states `[n, H]`; for `elements` times a factor `[n]` float32."""
    matrix = _Matrix(hidden.data_ptr(), None, hidden.stride(0), *hidden.shape)
    _call("pack_hidden", byref(matrix), _pointer(factor), _pointer(lanes), _pointer(elements))


def pack_weight(weight: Tensor, index: Tensor | None, rows: Tensor | None, pairs: Tensor | None) -> None:
    """Pack rows `[v, H]` of the weight, or those of an int32 index."""
    count = len(weight) if index is None else len(index)
    matrix = _Matrix(weight.data_ptr(), _pointer(index), weight.stride(0), count, weight.shape[1])
    _call("pack_weight", byref(matrix), _pointer(rows), _pointer(pairs))


def forward(tile: Tile, running: Running) -> None:
    """Continue the softmax with a tile."""
    outputs = (None,) * 6 if running.outputs is None else map(_pointer, running.outputs)
    struct = _Running(*map(_pointer, running[:5]), running.threshold, *outputs)
    _call("forward", byref(_tile(tile)), byref(struct))


class Finished(NamedTuple):
    """The loss's gradient from P: `(factor + entropy_factor (z - reference + entropy_offset)) P`, z in bits."""

    reference: Tensor
    factor: Tensor
    entropy_factor: Tensor | None = None  # None: no gradient of the entropy
    entropy_offset: Tensor | None = None


def backward(tile: Tile, rows: Finished) -> None:
    """Write the gradient of a tile's logits and add its product with the weight to the hidden states' gradient."""
    struct = _Finished(*map(_pointer, rows))
    _call("backward", byref(_tile(tile)), byref(struct))


class LabelGain(NamedTuple):
    """The labels' terms of the weight's gradient: `gain[i] * hidden[i]`."""

    hidden: Tensor  # [n, H]
    gain: Tensor  # [n] float32


def weight_gradient(
    tile: Tile, elements: Tensor, labels: LabelGain, index: Tensor | None, out: Tensor, add: bool = False
) -> None:
    """`out[index] = grad_logits^T elements`, and the labels' gain; bfloat16, or float32 `[.., H]` to add to."""
    hidden, rounded = labels.hidden, out.dtype == torch.bfloat16
    struct = _WeightGradient(
        elements.data_ptr(),
        _Matrix(hidden.data_ptr(), None, hidden.stride(0), *hidden.shape),
        labels.gain.data_ptr(),
        _pointer(index),
        out.data_ptr() if rounded else None,
        None if rounded else out.data_ptr(),
        add,
    )
    _call("weight_gradient", byref(_tile(tile)), byref(struct))


def add_bias_gradient(tile: Tile, factor: Tensor, index: Tensor | None, out: Tensor) -> None:
    """`out[index] += grad_logits^T factor`, float32."""
    _call("bias_gradient", byref(_tile(tile)), factor.data_ptr(), _pointer(index), out.data_ptr())


class _Matrix(Structure):
    _fields_ = [("data", c_void_p), ("index", c_void_p), ("stride", c_int64), ("rows", c_int64), ("width", c_int64)]


class _Tile(Structure):
    _fields_ = [
        ("lanes", c_void_p),
        ("rows", c_void_p),
        ("pairs", c_void_p),
        ("bias", c_void_p),
        ("labels", c_void_p),
        ("gradient", c_void_p),
        ("grad_logits", c_void_p),
        ("row_count", c_int64),
        ("column_count", c_int64),
        ("width", c_int64),
        ("logit_scale", c_double),
        ("softcap", c_double),
        ("temperature", c_double),
        ("stream", c_int32),
    ]


class _Running(Structure):
    _fields_ = [
        *((name, c_void_p) for name in Running._fields[:5]),
        ("threshold", c_float),
        *((name, c_void_p) for name in OutputRows._fields),
    ]


class _Finished(Structure):
    _fields_ = [(name, c_void_p) for name in Finished._fields]


class _WeightGradient(Structure):
    _fields_ = [
        ("elements", c_void_p),
        ("hidden", _Matrix),
        ("gain", c_void_p),
        ("index", c_void_p),
        ("rounded", c_void_p),
        ("exact", c_void_p),
        ("add", c_int32),
    ]


def _tile(tile: Tile) -> _Tile:
    tensors = (tile.lanes, tile.weight, tile.pairs, tile.bias, tile.labels, tile.gradient, tile.grad_logits)
    options = tile.options
    return _Tile(
        *map(_pointer, tensors),
        tile.rows,
        tile.columns,
        tile.width,
        options.logit_scale,
        options.softcap or 0.0,
        options.temperature,
        tile.stream,
    )


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


_ARGUMENTS: dict[str, list[Any]] = {
    "pack_hidden": [POINTER(_Matrix), c_void_p, c_void_p, c_void_p],
    "pack_weight": [POINTER(_Matrix), c_void_p, c_void_p],
    "forward": [POINTER(_Tile), POINTER(_Running)],
    "backward": [POINTER(_Tile), POINTER(_Finished)],
    "weight_gradient": [POINTER(_Tile), POINTER(_WeightGradient)],
    "bias_gradient": [POINTER(_Tile), c_void_p, c_void_p, c_void_p],
}


@functools.cache
def _functions() -> dict[str, Any]:
    functions = {}
    for name, arguments in _ARGUMENTS.items():
        function = getattr(native._library(), f"rpo_head_{name}")
        function.argtypes, function.restype = [c_void_p, POINTER(native._Workers), *arguments], None
        functions[name] = function
    return functions


def _call(name: str, *arguments: Any) -> None:
    workers = native._workers()
    _functions()[name](native._isa_pointer(native.instruction_set()), byref(workers), *arguments)
