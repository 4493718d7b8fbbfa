"""The inputs of the head's operators, and memory for one tile of logits."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import dispatch, reference
from ..kernels.interface import Backend, TokenOptions, row_length
from ..kernels.softmax import TileSoftmax
from . import gemm
from .plan import operand_dtype
from .schedule import Rows, Schedule

# No label has this value: the rows of a chunk are all scored, whatever the caller's ignore_index.
_NO_LABEL = -(2**31)


@dataclass(frozen=True)
class Head:
    """The operator's inputs: hidden states `[M, H]`, weight `[V, H]`, bias `[V]` and the options of its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    options: TokenOptions
    backend: str | None

    @functools.cached_property
    def operand_dtype(self) -> torch.dtype:
        """Dtype of the GEMMs' operands."""
        return operand_dtype(self.weight.dtype, self.weight.device)

    @property
    def aligned(self) -> bool:
        """Whether rows of the weight are contiguous and begin at multiples of 16 bytes."""
        across, along = self.weight.stride()
        return along == 1 and across * self.weight.itemsize % 16 == 0 and self.weight.data_ptr() % 16 == 0

    @functools.cached_property
    def exact_dtype(self) -> torch.dtype:
        """Dtype of statistics and accumulated gradients."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @functools.cached_property
    def logits_dtype(self) -> torch.dtype:
        """As GEMMs write the logits: exact, unless the device cannot from half-precision operands."""
        device_type = self.weight.device.type
        if gemm.results_in_float32(device_type, self.operand_dtype):
            return self.exact_dtype
        gemm.warn_of_rounding(device_type, self.operand_dtype)
        return self.operand_dtype

    @functools.cached_property
    def backend_name(self) -> str:
        """The backend that serves tiles of logits."""
        return dispatch.choose(self.weight.new_empty(0, dtype=self.logits_dtype), self.backend)

    @functools.cached_property
    def kernels(self) -> Backend:
        """The row kernels that serve tiles of logits."""
        return dispatch.rows(self.weight.new_empty(0, dtype=self.logits_dtype), self.backend)

    @functools.cached_property
    def softmax(self) -> TileSoftmax:
        """The kernels of the softmax over tiles of logits."""
        return dispatch.tile_softmax(self.kernels, self.backend_name)

    @functools.cached_property
    def row_options(self) -> TokenOptions:
        """Options for tiles of scored rows."""
        return self.options._replace(shift=False, ignore_index=_NO_LABEL)

    def gather(self, positions: Tensor) -> Tensor:
        """Hidden states that predict the labels at these positions, `[n, H]`, as GEMMs read them."""
        return self.take(positions).to(self.operand_dtype)

    def take(self, positions: Tensor) -> Tensor:
        """Hidden states that predict the labels at these positions, `[n, H]`."""
        return self.hidden.index_select(0, positions - 1 if self.options.shift else positions)

    def label_logits(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Transformed logits of some rows' labels, `[n]`; -inf for a label out of range."""
        column = labels.clamp(0, len(self.weight) - 1)
        logits = self.weight.index_select(0, column).to(self.exact_dtype).mul_(hidden).sum(-1)
        if self.bias is not None:
            logits += self.bias[column]
        return torch.where(column == labels, reference.transform(logits, self.options), -torch.inf)

    def label_mask(self, rows: Rows, schedule: Schedule | None) -> Tensor:
        """`[chunks, V]` uint8, 1 at the columns of each chunk's labels; `[0, V]` without a schedule."""
        if schedule is None:
            return self.hidden.new_empty(0, len(self.weight), dtype=torch.uint8)
        mask = torch.zeros(len(schedule.chunks), schedule.vocab, dtype=torch.uint8, device=self.hidden.device)
        chunk = torch.arange(schedule.rows, device=self.hidden.device) // schedule.chunk
        mask.view(-1)[chunk * schedule.vocab + rows.labels.clamp(0, schedule.vocab - 1)] = 1
        return mask


class Scratch:
    """Memory for one tile of logits, of U, and of the weight where GEMMs read another dtype; allocated when first used.

    Rows start at multiples of 16 elements, which GEMMs and kernels read fastest.
    """

    def __init__(self, head: Head, schedule: Schedule):
        self.head = head
        self.converts = head.operand_dtype != head.weight.dtype
        self.columns = min(schedule.vocab, schedule.tile)
        self.size = min(schedule.rows, schedule.chunk) * row_length(self.columns)

    def load(self, columns: slice, chosen: Tensor | None = None) -> Tensor:
        """A tile of the weight, or these of its rows, `[v, H]`, as GEMMs read it."""
        weight = self.head.weight[columns]
        if chosen is not None:
            weight = weight.index_select(0, chosen)
        if not self.converts:
            return weight
        return self._weight[: len(weight)].copy_(weight)

    def logits(self, hidden: Tensor, weight: Tensor, columns: slice, chosen: Tensor | None = None) -> Tensor:
        """The logits of a chunk and tile, or of chosen columns of it, `[n, v]`."""
        logits = _view(self._logits, len(hidden), len(weight))
        gemm.matmul(hidden, weight.T, logits)
        if self.head.bias is None:
            return logits
        bias = self.head.bias[columns]
        return logits.add_(bias if chosen is None else bias[chosen])

    def grad_logits(self, rows: int, columns: int) -> Tensor:
        """Where a tile of U, or of P, is written for GEMMs to read: over the logits if it is of their dtype."""
        return _view(
            self._logits if self.head.logits_dtype == self.head.operand_dtype else self._grad_logits, rows, columns
        )

    @functools.cached_property
    def _logits(self) -> Tensor:
        return self.head.weight.new_empty(self.size, dtype=self.head.logits_dtype)

    @functools.cached_property
    def _grad_logits(self) -> Tensor:
        return self.head.weight.new_empty(self.size, dtype=self.head.operand_dtype)

    @functools.cached_property
    def _weight(self) -> Tensor:
        return self.head.weight.new_empty(self.columns, self.head.weight.shape[1], dtype=self.head.operand_dtype)


def _view(memory: Tensor, rows: int, columns: int) -> Tensor:
    length = row_length(columns)
    return memory[: rows * length].view(rows, length)[:, :columns]
