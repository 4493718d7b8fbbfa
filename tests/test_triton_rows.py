"""What is particular to the Triton row kernels: blocks, splits, edges of unaligned rows, 64-bit offsets."""

import pytest
import torch

from row_cases import ALL, PLAIN, TRANSFORMS, assert_grad_matches, assert_stats_match, make_batch

triton_rows = pytest.importorskip("rpo_kernels.kernels.triton", exc_type=ImportError)
from rpo_kernels.kernels.triton import grad as grad_module  # noqa: E402
from rpo_kernels.kernels.triton import stats as stats_module  # noqa: E402
from rpo_kernels.kernels.triton import tiling as tilings  # noqa: E402

Tiling = tilings.Tiling

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def tile(monkeypatch):
    """Force a tiling: `tile(lanes, steps, splits)`; the vector stays what the addresses allow."""

    def force(lanes, steps, splits):
        for module in (stats_module, grad_module):
            monkeypatch.setattr(
                module, "choose_tiling", lambda rows, columns, vector, processors: Tiling(vector, lanes, steps, splits)
            )

    return force


def check(logits, labels, grad_logps, options=PLAIN, logp_error=2e-6, outputs=()):
    """Statistics and gradient against the reference backend."""
    stats = triton_rows.row_stats(logits, labels, options, outputs=outputs)
    assert_stats_match(stats, logits, labels, options, logp_error, outputs=outputs)
    grad = triton_rows.row_grad(logits, labels, stats, grad_logps, options)
    assert_grad_matches(grad, logits, labels, grad_logps, options)


# Blocks of 16 lanes * 1 step * 4 float32 = 64 columns; labels in the first, a middle, the last and the partial block.
@pytest.mark.parametrize(
    ("vocab", "splits"), [(63, 1), (64, 1), (256, 1), (259, 1), (64, 2), (256, 4), (259, 4), (320, 2), (320, 8)]
)
def test_blocks_and_splits(device, tile, vocab, splits):
    tile(16, 1, splits)
    logits, labels, grad_logps = make_batch(device, (1, 6, vocab))
    labels[0] = torch.tensor([0, 3, vocab // 2, vocab - 5, vocab - 1, -100])
    check(logits, labels, grad_logps, outputs=ALL)


@pytest.mark.parametrize(("name", "steps"), list(zip(TRANSFORMS, (4, 2, 1, 2))))
def test_steps_and_transforms_with_splits(device, tile, name, steps):
    tile(16, steps, 2)
    logits, labels, grad_logps = make_batch(device, (2, 2, 601))
    check(logits, labels, grad_logps, TRANSFORMS[name], logp_error=8e-6, outputs=ALL)


def test_splits_continue_running_statistics(device, tile):
    tile(16, 1, 4)
    logits, labels, _ = make_batch(device, (2, 2, 500))
    stats = triton_rows.row_stats(logits[..., :250], labels, PLAIN, outputs=ALL)
    triton_rows.row_stats(logits[..., 250:], labels, PLAIN, 250, stats)
    assert_stats_match(stats, logits, labels, logp_error=4e-6, outputs=ALL)


def test_a_split_of_minus_infinity(device, tile):
    tile(16, 1, 4)
    logits, labels, _ = make_batch(device, (1, 3, 256))
    labels[:] = 1
    logits[0, 0, 64:128] = -torch.inf
    logits[0, 1, :192] = -torch.inf
    logits[0, 2, :] = -torch.inf
    stats = triton_rows.row_stats(logits, labels, PLAIN, outputs=ALL)
    assert_stats_match(stats, logits, labels, outputs=ALL)


@pytest.mark.parametrize(
    ("phase", "dtype"), [(0, torch.float32), (3, torch.float32), (1, torch.float16), (8, torch.float16)]
)
def test_rows_at_any_address(device, tile, phase, dtype):
    """Odd row lengths at an odd base: every row starts at another distance from a 16-byte boundary."""
    tile(16, 1, 2)
    vocab = 203
    flat = torch.empty(4 * vocab + phase, dtype=dtype, device=device)
    logits, labels, grad_logps = make_batch(device, (1, 4, vocab), dtype)
    logits = flat[phase:].view(logits.shape).copy_(logits)
    labels[0] = torch.tensor([0, vocab - 1, 100, 2])
    check(logits, labels, grad_logps)


@pytest.mark.parametrize("gap", [0, 1, 2, 4, 8])
def test_out_at_another_address(device, tile, gap):
    tile(16, 1, 1)
    logits, labels, grad_logps = make_batch(device, (2, 2, 203), torch.float16)
    stats = triton_rows.row_stats(logits, labels, PLAIN)
    flat = torch.full((4 * 203 + gap + 9,), 7.0, dtype=torch.float16, device=device)
    out = flat[gap : gap + 4 * 203].view(logits.shape)
    triton_rows.row_grad(logits, labels, stats, grad_logps, PLAIN, out=out)
    assert_grad_matches(out, logits, labels, grad_logps)
    assert (flat[:gap] == 7).all() and (flat[gap + 4 * 203 :] == 7).all()


@pytest.mark.parametrize(
    ("shape", "strides", "gap", "vector"),
    [
        ((2, 3, 64), (192, 64), 0, 8),
        ((2, 3, 63), (189, 63), 0, 8),  # rows unaligned, but in step
        ((2, 3, 64), (192, 64), 1, 1),
        ((2, 3, 64), (192, 64), 4, 4),
        ((2, 3, 64), (192 + 2, 64), 0, 2),
        ((1, 3, 64), (192 + 2, 64), 0, 8),  # the stride of a dimension of one is not used
    ],
)
def test_common_vector(shape, strides, gap, vector):
    a = torch.empty(shape, dtype=torch.bfloat16)
    b = torch.empty(1000, dtype=torch.bfloat16)[gap:].as_strided(shape, (*strides, 1))
    assert tilings.common_vector(a, b) == tilings.common_vector(b, a) == vector


def test_common_vector_of_two_dtypes():
    logits = torch.empty(2, 3, 64)
    memory = torch.empty(1000, dtype=torch.bfloat16)
    assert tilings.common_vector(logits, memory[: 6 * 64].view(2, 3, 64)) == 8
    assert tilings.common_vector(logits, memory[4 : 4 + 6 * 64].view(2, 3, 64)) == 4


def test_offsets_beyond_31_bits(device):
    """Two rows more than 2^31 elements apart; only the pages of those rows are touched."""
    apart = 2**31 + 8
    memory = torch.empty(apart + 1000, dtype=torch.float16, device=device)
    logits = memory.as_strided((2, 1, 300), (apart, 300, 1))
    values, labels, grad_logps = make_batch(device, (2, 1, 300), torch.float16)
    logits.copy_(values)
    labels[:] = 5
    stats = triton_rows.row_stats(logits, labels, PLAIN)
    assert_stats_match(stats, values, labels)
    triton_rows.row_grad(logits, labels, stats, grad_logps, PLAIN, out=logits)
    assert_grad_matches(logits, values, labels, grad_logps)


def test_choose_tiling():
    lanes = tilings.LANES
    assert tilings.choose_tiling(8192, 128256, 8, 132) == Tiling(8, lanes, 4, 1)
    assert tilings.choose_tiling(8192, 100, 8, 132) == Tiling(8, lanes, 1, 1)
    for rows in (1, 3, 100, 527, 528):
        tiling = tilings.choose_tiling(rows, 128256, 8, 132)
        blocks = -(-128256 // (8 * lanes * 4))
        assert rows * tiling.splits >= min(4 * 132, rows * blocks)
        assert tiling.splits < 2 * blocks
    # A row of one block is never split.
    assert tilings.choose_tiling(1, 4000, 8, 132).splits == 1


def test_errors_name_the_argument(device):
    logits, labels, grad_logps = make_batch(device)
    stats = triton_rows.row_stats(logits[:, :1], labels[:, :1], PLAIN)
    with pytest.raises(ValueError, match=r"logits must be .* got torch\.float64"):
        triton_rows.row_stats(logits.double(), labels, PLAIN)
    for out in (logits.double(), logits[..., :-1]):
        with pytest.raises(ValueError, match=r"out must be float32, bfloat16 or float16 of shape \[2, 3, 300\]"):
            triton_rows.row_grad(logits, labels, stats, grad_logps, PLAIN, out=out)
    running = stats._replace(logp=stats.logp.expand(2, 3))
    with pytest.raises(ValueError, match="running must be contiguous"):
        triton_rows.row_stats(logits, labels, PLAIN, 0, running)
