"""Narrow heads without gradients: one product with the softmax in its epilogue, which materialises no logits."""

import importlib

import torch

from ..kernels.interface import RowStats
from . import evaluation_plan
from .plan import MemoryPlan
from .schedule import Forward, Needs, Rows, Saved, Schedule
from .tiles import Head


def serves(head: Head, needs: Needs) -> bool:
    """Whether `memory_plan` chose this implementation for the call."""
    if needs.hidden or needs.weight or needs.bias or needs.outputs:
        return False
    weight, capped = head.weight, head.options.softcap is not None
    at = weight.device, weight.dtype, head.backend_name
    return evaluation_plan.serves(*at, width=weight.shape[1], capped=capped, aligned=head.aligned)


def forward(head: Head, rows: Rows, plan: MemoryPlan, needs: Needs) -> Forward:
    """Log-probabilities of the scored rows; nothing is saved."""
    product = importlib.import_module("..kernels.triton.product", __package__)
    count, vocab = len(rows.positions), len(head.weight)
    schedule = Schedule(count, vocab, plan.chunk_rows, plan.tile_columns, 0, plan.shared)
    stats = head.hidden.new_empty(4, count, dtype=torch.float32)
    for span in schedule.chunks:
        hidden, labels = head.take(rows.positions[span]), rows.labels[span]
        product.product_stats(hidden, head.weight, head.bias, labels, head.options, RowStats(*stats[:, None, span]))
    saved = Saved.nothing(head.hidden, rows.positions, stats, schedule.dump())
    return Forward(stats[0].clone(), torch.zeros_like(stats[0]), saved, stats.new_empty(0, count))
