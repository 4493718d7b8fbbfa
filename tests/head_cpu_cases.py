"""Inputs for tests of the LM head on CPUs with bfloat16 units, and the implementations of its products to test."""

import math

import torch

from rpo_kernels.kernels import native

RUNNING = native.instruction_sets() if native.available() else []
SETS = [isa for isa in ("avx512bf16", "emulated") if isa in RUNNING or "avx512" in RUNNING[1:]]
if "avx512bf16" not in RUNNING:
    SETS = ["emulated"] if "avx512" in RUNNING else []
ROUNDED = 4e-3  # of a gradient that was rounded to bfloat16 twice


def make(rows, width, vocab, spread=3.0, seed=0):
    """Hidden states, weight, and labels with the first and the last column among them; factors of the loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).bfloat16()
    weight = (torch.randn(vocab, width, generator=generator) * spread / math.sqrt(width)).bfloat16()
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[0], labels[-1] = 0, vocab - 1
    return hidden, weight, labels, torch.randn(rows, generator=generator)
