"""Expected time of the LM head on an H200: a cost model, not a measurement.

    python bench/predictions.py [--out bench/notes/predictions-h200.md]

Microseconds from the sizes of the launches that the walk makes and from the constants below, which are assumptions:
none was measured with this package. The table is committed so that a first run on a GPU can be held against it.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import torch

from rpo_kernels import memory_plan
from rpo_kernels.head.evaluation_plan import WIDEST

PROCESSORS, TFLOPS_A_PROCESSOR = 132, 6.17  # 790 TFLOP/s of bfloat16 at 8192^3, 97% of the waves full
BYTES, L2_BYTES = 4.1e6, 6.5e6  # a microsecond, from memory and from the L2 cache
INSTRUCTIONS = 28.7e6  # a microsecond, of all lanes
RAMP, SMALL = 2.5, 2.2  # an elementwise kernel's start; a kernel of a few thousand numbers
BLOCKS = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.82, (64, 256): 0.80, (256, 64): 0.80, (64, 128): 0.60}
SPLITS = (1, 2, 4, 8)
# Host time of one step forward, of one kept tile backward, and of what a call does once.
HOST_STEP, HOST_TILE, HOST_CALL = 60.0, 50.0, 400.0
INSTRUCTIONS_A_COLUMN = {False: 18.0, True: 41.0}  # of the tile kernel, counted in sm_90 code; with a softcap
# Of the product with the softmax in its epilogue, which nothing overlaps: its rate beside cuBLAS's, and instructions a
# column, counted in sm_90 code; with a softcap.
FUSED_RATE, FUSED_INSTRUCTIONS = 0.8, {False: 13.0, True: 37.0}
FUSED_BLOCK = (128, 256)
PASS_INSTRUCTIONS = {False: 7.2, True: 28.2}  # of `row_stats`, a column
ROWS = (2048, 8192, 32768, 131072)


class Model(NamedTuple):
    """A head: width, vocabulary, and whether its logits are capped."""

    width: int
    vocab: int
    capped: bool = False


MODELS = {
    "Llama-3.1-8B": Model(4096, 128256),
    "Qwen2.5-7B": Model(3584, 152064),
    "Gemma-2-2B": Model(2304, 256000, True),
    "Qwen2.5-0.5B": Model(896, 151936),
    "Gemma-3-270M": Model(640, 262144),
}


@functools.cache
def product(rows: int, columns: int, inner: int, out_bytes: int = 4, adds: bool = False) -> float:
    """Microseconds of `[rows, inner] x [inner, columns]`, the best of some block sizes and splits of the inner sum."""
    best = math.inf
    for (height, width), efficiency in BLOCKS.items():
        for split in SPLITS:
            if split > 1 and inner / split < 512:
                continue
            blocks = math.ceil(rows / height) * math.ceil(columns / width) * split
            main = 2 * height * width * (inner / split) / (TFLOPS_A_PROCESSOR * efficiency * 1e6)
            time = 3 + math.ceil(blocks / PROCESSORS) * (main + (1.5 if out_bytes == 2 else 2.5) + adds)
            if split > 1:
                time += 2 + rows * columns * 8 * split / L2_BYTES
            traffic = ((rows + columns) * inner * 2 + rows * columns * out_bytes * (1 + adds)) / BYTES
            best = min(best, max(time, traffic))
    return best


def head_gemm(rows: int, model: Model) -> float:
    """The unit: one product of all rows with the whole head, bfloat16 in and out."""
    return product(rows, model.vocab, model.width, out_bytes=2)


def elementwise(size: float) -> float:
    """Microseconds of a kernel that moves so many bytes."""
    return RAMP + size / BYTES


def walk(rows: int, model: Model, *, frozen: bool = False, budget: str = "100GB", share: float | None = None) -> float:
    """Microseconds of forward and backward by the plan; with a filter, of which `share` of the columns is active."""
    plan = memory_plan(
        *(rows, model.width, model.vocab, torch.bfloat16),
        needs_weight=not frozen,
        memory_budget=budget,
        gradient_filter=None if share is None else 2.0**-20,
        device="cuda",
    )
    chunks, tiles = _spans(rows, plan.chunk_rows), _spans(model.vocab, plan.tile_columns)
    total = 2 * HOST_CALL + elementwise(rows * model.width * 6)
    for n in chunks:
        for v in tiles:
            total += max(HOST_STEP, _forward_step(n, v, model, marks=share is not None))
        total += elementwise(n * model.width * 10) + 2 * SMALL
    for tile, v in enumerate(tiles):
        if share is not None:
            active = math.ceil(v * share)
            total += sum(max(2 * HOST_STEP, _recomputed(n, active, model, frozen, hidden=True)) for n in chunks)
            total += 0 if frozen else elementwise(v * model.width * 10)
        elif not frozen and tile < plan.kept_tiles:
            total += max(HOST_TILE, product(v, model.width, rows, out_bytes=2) + 4)
        elif not frozen:
            total += sum(max(HOST_STEP, _recomputed(n, v, model, frozen, hidden=False)) for n in chunks)
            total += elementwise(v * model.width * 6)
    return total


def evaluate(rows: int, model: Model, *, fused: bool) -> float:
    """Microseconds without gradients: a product and a pass over its logits a tile, or one product with that inside."""
    chunks, tile = _spans(rows, 8192), 8192
    total = HOST_CALL + elementwise(rows * model.width * 4)
    for n in chunks:
        if fused:
            total += max(HOST_STEP, _fused_product(n, model)) + elementwise(n * math.ceil(model.vocab / 256) * 8)
            continue
        for v in _spans(model.vocab, tile):
            instructions = n * v * PASS_INSTRUCTIONS[model.capped] / INSTRUCTIONS
            one_pass = RAMP + max(n * v * 4 * (0.9 / BYTES + 0.1 / L2_BYTES), instructions)
            total += max(HOST_STEP / 2, product(n, v, model.width) + one_pass)
    return total


def _fused_product(rows: int, model: Model) -> float:
    """Persistent programs, so that only the last wave is not full."""
    height, width = FUSED_BLOCK
    blocks = math.ceil(rows / height) * math.ceil(model.vocab / width)
    main = 2 * height * width * model.width / (TFLOPS_A_PROCESSOR * FUSED_RATE * 1e6)
    epilogue = height * width * FUSED_INSTRUCTIONS[model.capped] / (INSTRUCTIONS / PROCESSORS)
    return 3 + math.ceil(blocks / PROCESSORS) * (main + epilogue)


def _forward_step(n: int, v: int, model: Model, marks: bool) -> float:
    kernel = RAMP + n * v * 4 * (0.9 / BYTES + 0.1 / L2_BYTES) + (0 if marks else n * v * 2 / BYTES)
    kernel = max(kernel, n * v * INSTRUCTIONS_A_COLUMN[model.capped] / INSTRUCTIONS + RAMP)
    return product(n, v, model.width) + kernel + (0 if marks else product(n, model.width, v, adds=True))


def _recomputed(n: int, v: int, model: Model, frozen: bool, hidden: bool) -> float:
    """A chunk's part of a tile in backward: logits, U, the weight's gradient and, if asked, the hidden states'."""
    time = product(n, v, model.width) + elementwise(n * v * 6)
    time += 0 if frozen else product(v, model.width, n, adds=True)
    gathered = elementwise(v * model.width * 4) + 3 * SMALL if hidden else 0
    return time + (product(n, model.width, v, adds=True) if hidden else 0) + gathered


def _spans(total: int, step: int) -> list[int]:
    return [min(step, total - start) for start in range(0, total, step)]


def table() -> str:
    """The predictions as Markdown."""
    lines = [
        "# Predictions for an H200: nothing here was measured",
        "",
        "From `bench/predictions.py`, a cost model whose constants are assumptions. bfloat16; one head GEMM in",
        "milliseconds, all else forward and backward in head GEMMs. The floor is 3, and 2 with a frozen head.",
        "",
        "Without gradients: a product and a pass over its logits a tile, or one product with the softmax inside, which",
        f"is taken up to a width of {WIDEST} without a softcap.",
        "",
        "| model | rows | head GEMM, ms | trained | frozen | 64 MB budget | filter, 14% active | filter, 28% active "
        "| no gradients, in two | in one |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        for rows in ROWS:
            unit = head_gemm(rows, model)
            cases = (
                walk(rows, model),
                walk(rows, model, frozen=True),
                walk(rows, model, budget="64MB"),
                walk(rows, model, share=0.136),
                walk(rows, model, share=0.281),
                evaluate(rows, model, fused=False),
                evaluate(rows, model, fused=True),
            )
            numbers = " | ".join(f"{case / unit:.2f}" for case in cases)
            lines.append(f"| {name} | {rows:,} | {unit / 1000:.2f} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    text = table()
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
