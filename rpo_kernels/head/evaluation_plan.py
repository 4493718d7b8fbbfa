"""Which calls without gradients take the fused product (`head.evaluation`), how they are cut, and their bytes."""

import functools
import math
from dataclasses import dataclass

import torch

from ..kernels.kept import SharedTiles

CHUNK_ROWS, LEAST_ROWS = 8192, 1024
COLUMNS = 128  # of a block at least: two float32 numbers a row and block
# By the cost model (bench/predictions.py), not measured: the widest head whose product loses less time to cuBLAS's than
# writing and reading the logits takes.
WIDEST = 1536
_MODELLED = 9  # compute capability of the cost model
_SMALL = 2048  # tensors of a few numbers


def serves(
    device: torch.device, dtype: torch.dtype, backend: str | None, *, width: int, capped: bool, aligned: bool
) -> bool:
    """Whether calls of such a head, without gradients and outputs, take the fused product."""
    suits = backend in (None, "triton") and aligned and width % 8 == 0
    return suits and pays(device, dtype, width, capped)


def pays(device: torch.device, dtype: torch.dtype, width: int, capped: bool) -> bool:
    """Whether the cost model predicts less time than for a product and a pass over its logits (not with a softcap)."""
    if device.type != "cuda" or torch.version.hip or dtype.itemsize != 2:
        return False
    return width <= WIDEST and not capped and _capability(device) == _MODELLED


@functools.cache
def _capability(device: torch.device) -> int:
    """Its major number; without a GPU, that of the cost model."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else _MODELLED


@dataclass(frozen=True)
class EvaluationWork:
    """Sizes of one call, and the bytes that it allocates."""

    rows: int
    positions: int
    hidden: int
    vocab: int
    item: int  # bytes of an element of hidden states and weight
    needs_hidden = needs_weight = deferred = False

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows a chunk, from the most down, and all columns."""
        most = min(CHUNK_ROWS, max(1, self.rows))
        halvings = range(max(0, math.ceil(math.log2(most / LEAST_ROWS))) + 1)
        return [(max(min(most, LEAST_ROWS), math.ceil(most / 2**i)), self.vocab) for i in halvings]

    def forward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Peak of the forward pass."""
        of_blocks = 8 * math.ceil(self.vocab / COLUMNS) + 4
        return self.kept_bytes(chunk, tile, kept) + chunk * (8 + self.hidden * self.item + of_blocks)

    peak_bytes = forward_bytes

    def backward_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """There is no backward pass."""
        return 0

    def kept_bytes(self, chunk: int, tile: int, kept: int) -> int:
        """Positions, labels and statistics of rows; results of positions."""
        return _SMALL + self.rows * 40 + self.positions * 5

    def gradient_bytes(self) -> int:
        return 0

    def shared(self, chunk: int, tile: int, kept: int) -> SharedTiles:
        return SharedTiles()
