"""The walk's moving reference under inputs made to break it, on every backend, against float64."""

import pytest
import torch

from head_cases import GRADIENT, compare, error, expected, factors_for, make
from rpo_kernels import linear_token_logprobs
from rpo_kernels.kernels.interface import TokenOptions
from rpo_kernels.kernels.kept import KeptTiles, SharedTiles
from rpo_kernels.kernels.softmax import TileSoftmax

pytestmark = pytest.mark.usefixtures("small_tiles")
INTERPRETED = False


def rising(dtype, device, vocab=1500, step=12.0, falling=False):
    """A head whose logits rise, or fall, by more than ten bits from one tile of 256 columns to the next."""
    hidden, weight, _, labels = make((2, 16), vocab=vocab, dtype=torch.float32, device=device)
    with torch.no_grad():
        hidden[..., 0] = 4
        tiles = torch.arange(vocab, device=device) // 256
        weight[:, 0] = (tiles.max() - tiles if falling else tiles) * step / 4
    return *(x.detach().to(dtype).requires_grad_() for x in (hidden, weight)), labels


@pytest.mark.parametrize("falling", [False, True], ids=["rising", "falling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maxima_that_move_by_more_than_ten_bits_in_every_tile(backend, backend_device, dtype, falling):
    hidden, weight, labels = rising(dtype, backend_device, falling=falling)
    # Labels in all tiles, the first and the last included: most are impossible beside those of the top tile.
    labels[0, :6] = torch.tensor([0, 255, 256, 1200, 1499, 1280], device=backend_device)
    factors = factors_for(labels)
    values, exact = expected(hidden, weight, None, labels, factors)
    for budget in (None, 0):
        logps = linear_token_logprobs(hidden, weight, labels, memory_budget=budget, backend=backend)
        torch.testing.assert_close(logps.double(), values, rtol=3e-6, atol=2e-5)
        for mine, wanted in zip(torch.autograd.grad((logps * factors).sum(), (hidden, weight)), exact):
            assert mine.isfinite().all() and error(mine, wanted) <= 2 * GRADIENT[dtype]


@pytest.mark.parametrize("gradient_filter", [None, 2.0**-12])
def test_columns_and_labels_at_minus_infinity(backend, backend_device, gradient_filter):
    hidden, weight, bias, labels = make((2, 16), vocab=777, device=backend_device, bias=True)
    with torch.no_grad():
        bias[:300] = -torch.inf  # the whole first tile
        bias[600:640] = -torch.inf
    labels = torch.where(labels < 0, labels, labels.clamp(min=300))
    labels = torch.where((labels >= 600) & (labels < 640), 776, labels)
    factors = factors_for(labels)
    values, exact = expected(hidden, weight, bias, labels, factors)
    logps = linear_token_logprobs(hidden, weight, labels, bias=bias, gradient_filter=gradient_filter, backend=backend)
    torch.testing.assert_close(logps.double(), values, rtol=2e-6, atol=5e-6)
    for mine, wanted in zip(torch.autograd.grad((logps * factors).sum(), (hidden, weight, bias)), exact):
        assert error(mine, wanted) < (1e-5 if gradient_filter is None else 2e-2)


@pytest.mark.parametrize("vocab", [257, 511, 700, 769])
@pytest.mark.parametrize("options", [dict(), dict(softcap=5.0, temperature=0.5)], ids=str)
def test_odd_vocabularies_keep_aligned_rows(backend, backend_device, vocab, options):
    compare(*make((2, 16), vocab=vocab, dtype=torch.bfloat16, device=backend_device, bias=True), backend, **options)


@pytest.mark.parametrize("gradient_filter", [None, 2.0**-12])
@pytest.mark.parametrize("softcap", [None, 40.0])
def test_all_of_it_at_once_in_triton(available_backend, softcap, gradient_filter):
    """Rising maxima, an odd vocabulary, columns at -inf, labels in the first and the last tile; kept and recomputed."""
    backend, device = available_backend("triton")
    hidden, weight, labels = rising(torch.bfloat16, device, vocab=601)
    hidden, labels = hidden[:1, :6].detach().requires_grad_(), labels[:1, :6].clone()
    labels[0, :4] = torch.tensor([0, 255, 256, 600], device=device)
    labels[0, 4:] = torch.tensor([-100, 599], device=device)
    bias = torch.zeros(601, dtype=torch.bfloat16, device=device)
    bias[300:340] = -torch.inf if softcap is None else 0  # a capped logit is finite
    factors, bias = factors_for(labels), bias.requires_grad_()
    values, exact = expected(hidden, weight, bias, labels, factors, softcap=softcap)
    options = dict(bias=bias, softcap=softcap, gradient_filter=gradient_filter, outputs=("dropped",), backend=backend)
    for budget in (None, 0) if gradient_filter is None else (None,):
        outputs = linear_token_logprobs(hidden, weight, labels, memory_budget=budget, **options)
        torch.testing.assert_close(outputs.logps.double(), values, rtol=3e-6, atol=2e-5)
        mine = torch.autograd.grad((outputs.logps * factors).sum(), (hidden, weight, bias))
        reach = weight.norm(dim=-1).max() * factors.abs() * outputs.dropped  # of what the filter left out
        missing = (mine[0] - exact[0]).norm(dim=-1)
        assert (missing <= reach + 2 * GRADIENT[torch.bfloat16] * exact[0].norm(dim=-1) + 1e-6).all()
        for gradient, wanted in zip(mine[1:], exact[1:]):
            assert error(gradient, wanted) <= 2 * GRADIENT[torch.bfloat16] + outputs.dropped.sum()


def test_a_row_without_a_finite_logit_spoils_no_other(backend, backend_device):
    hidden, weight, _, labels = make((1, 20), vocab=601, device=backend_device)
    with torch.no_grad():
        weight[:, 0] = -weight[:, 0].abs() - 0.1
        hidden[0, 3, 0] = torch.inf
    labels[0, 3], labels[0, 4] = 5, 6
    finite = torch.arange(20, device=backend_device) != 3
    values, exact = expected(hidden[:, finite], weight, None, labels[:, finite], factors_for(labels)[:, finite])
    logps = linear_token_logprobs(hidden, weight, labels, backend=backend)
    assert not logps[0, 3].isfinite()
    torch.testing.assert_close(logps[:, finite].double(), values, rtol=2e-6, atol=5e-6)
    (gradient,) = torch.autograd.grad((logps * factors_for(labels))[:, finite].sum(), hidden)
    assert error(gradient[:, finite], exact[0]) <= 1e-5


def test_tile_kernel_against_the_reference(available_backend):
    """Each pass of the fused kernels beside the same pass of the reference, tile by tile, with references that move."""
    _, device = available_backend("triton")
    from rpo_kernels.kernels import reference, triton
    from rpo_kernels.kernels.interface import ActiveColumns, RowStats
    from rpo_kernels.kernels.triton.softmax import FusedTileSoftmax

    torch.manual_seed(0)
    rows, vocab, tile, width = 6, 300, 128, 24
    labels = torch.tensor([0, 127, 128, 299, 300, -5], device=device)  # the last two out of range
    logits = 3 * torch.randn(rows, vocab, device=device) + (torch.arange(vocab, device=device) // tile) * 9
    weight = torch.randn(vocab, width, device=device)
    shared = SharedTiles(2, (vocab * width - 2 * rows * tile) // 32 * 32, rows * tile, tile * width)
    for options in (TokenOptions(ignore_index=-(2**31)), TokenOptions(0.7, 20.0, 1.3, -(2**31))):
        found = []
        for softmax in (TileSoftmax(reference), FusedTileSoftmax(triton)):
            stats = RowStats(*torch.zeros(4, 1, rows, device=device))
            stats.max.fill_(-torch.inf)
            stats.label_logit.fill_(-torch.inf)
            layout = (rows, vocab, tile, 3)
            memory = torch.zeros(KeptTiles.size(*layout, shared.tiles), device=device)
            kept = KeptTiles(memory, torch.zeros_like(weight), shared, *layout, slice(0, rows))
            references, sums = torch.zeros(3, rows, device=device), torch.zeros(rows, width, device=device)
            for number in range(3):
                part = logits[:, number * tile : (number + 1) * tile].contiguous()
                arguments = (labels, stats, number * tile, options, references[number], kept.tile(number))
                softmax.weigh(part, *arguments, sums if number else None)
                sums += kept.tile(number) @ weight[number * tile : (number + 1) * tile]
            softmax.finish(stats, labels, options, references, sums, weight, kept)
            marked = RowStats(*torch.zeros(4, 1, rows, device=device))
            early = torch.full((rows,), 2.0, device=device)
            marked.max[0] = early
            mask = torch.zeros(vocab, dtype=torch.uint8, device=device)
            dropped = torch.zeros(rows, device=device)
            for first in range(0, vocab, tile):
                active = ActiveColumns(mask[first : first + tile], 2.0**-7)
                part = logits[:, first : first + tile].contiguous()
                softmax.mark(part, labels, marked, first, options, early, active, dropped)
            found.append((stats, kept, references, sums, marked, mask, dropped))
        (stats, kept, scales, sums, marked, mask, dropped), fused = found
        torch.testing.assert_close(fused[0].logp, stats.logp)
        torch.testing.assert_close(fused[3], sums, rtol=1e-4, atol=1e-5)
        for number in range(3):
            mine = fused[1].tile(number) * fused[2][number][:, None]
            torch.testing.assert_close(mine, kept.tile(number) * scales[number][:, None], rtol=1e-4, atol=1e-6)
        assert torch.equal(fused[5], mask) and 0 < mask.sum() < vocab
        lse = [x[4].max + x[4].sumexp.log() for x in ((0, 0, 0, 0, marked), fused)]
        torch.testing.assert_close(lse[1], lse[0])
        # A row of the kernel counts what it did not mark itself: a bound of what no row marked.
        share = [x / y for x, y in ((dropped, marked.sumexp[0]), (fused[6], fused[4].sumexp[0]))]
        assert (share[1] >= share[0] - 1e-6).all() and (share[1] <= 1).all()


def test_offsets_beyond_two_to_the_31():
    """By arithmetic, where memory does not suffice: rows of a late tile of a matrix of 2^33 elements."""
    nothing = torch.empty(0, device="meta")
    kept = KeptTiles(nothing, nothing, SharedTiles(), 2**15, 2**18, 8192, 32, slice(8192, 16384))
    size = KeptTiles.size(2**15, 2**18, 8192, 32, 0)
    assert size == 2**33
    tile = kept._replace(memory=torch.empty(size, device="meta")).tile(31)
    assert tile.shape == (8192, 8192) and tile.storage_offset() == 2**15 * 31 * 8192 + 8192 * 8192 > 2**31
