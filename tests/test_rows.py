"""The row kernels: the reference against log_softmax and autograd, every available backend against the reference."""

import itertools

import pytest
import torch

from row_cases import ALL, HALF_ULP, PLAIN, TRANSFORMS, assert_grad_matches, assert_stats_match, make_batch
from rpo_kernels.kernels import reference
from rpo_kernels.kernels.interface import EntropyGrad, TokenOptions

# Triton's interpreter computes in NumPy, which warns where exponentials of huge logits overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# The reference.


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_reference_is_log_softmax_and_its_gradient(options):
    logits, labels, grad_logps = make_batch("cpu", dtype=torch.float64)
    grad_logps = grad_logps.double()
    x = logits.requires_grad_()
    z = x * options.logit_scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    first = int(options.shift)
    z = (z / options.temperature)[:, : labels.shape[1] - first]
    all_logps = z.log_softmax(-1)
    scored = labels[:, first:] != options.ignore_index
    target = labels[:, first:].masked_fill(~scored, 0)

    def of_positions(values):
        return torch.nn.functional.pad(values.masked_fill(~scored, 0), (first, 0))

    logps = of_positions(all_logps.gather(-1, target.unsqueeze(-1)).squeeze(-1))
    expected = dict(
        entropy=of_positions(-(all_logps.exp() * all_logps).sum(-1)),
        mean_logit=of_positions(z.mean(-1)),
        is_top1=of_positions((z.argmax(-1) == target).double()),
        log_sum_sq_probs=of_positions((2 * all_logps).logsumexp(-1)),
    )
    slope = torch.randn(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (exact,) = torch.autograd.grad(logps, x, grad_logps, retain_graph=True)
    (exact_entropy,) = torch.autograd.grad(expected["entropy"], x, slope)

    logits = logits.detach()
    stats = reference.row_stats(logits, labels, options, outputs=ALL)
    torch.testing.assert_close(stats.logp, logps.detach(), rtol=0, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(stats.output(name, 300), value.detach(), rtol=0, atol=1e-12)
    grad = reference.row_grad(logits, labels, stats, grad_logps, options)
    torch.testing.assert_close(grad, exact, rtol=0, atol=1e-13)
    entropy = EntropyGrad(stats.output("entropy", 300), slope)
    grad = reference.row_grad(logits, labels, stats, grad_logps, options, entropy=entropy)
    torch.testing.assert_close(grad, exact + exact_entropy, rtol=0, atol=1e-12)


# Every backend.


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("vocab", [300, 1003])
def test_whole_rows(rows, backend_device, vocab, dtype, options):
    logits, labels, grad_logps = make_batch(backend_device, (2, 2, vocab), dtype, seed=vocab)
    stats = rows.row_stats(logits, labels, options)
    assert_stats_match(stats, logits, labels, options, logp_error=2e-6 if options.softcap is None else 8e-6)
    grad = rows.row_grad(logits, labels, stats, grad_logps, options)
    assert grad.dtype == dtype
    assert_grad_matches(grad, logits, labels, grad_logps, options)


@pytest.mark.parametrize("vocab", [1, 2, 5, 8, 16, 17, 65])
def test_tiny_vocabularies(rows, backend_device, vocab):
    logits, labels, grad_logps = make_batch(backend_device, (1, 4, vocab), torch.bfloat16)
    stats = rows.row_stats(logits, labels, PLAIN)
    assert_stats_match(stats, logits, labels)
    assert_grad_matches(rows.row_grad(logits, labels, stats, grad_logps, PLAIN), logits, labels, grad_logps)


@pytest.mark.parametrize("outputs", [(), ALL, ("entropy",)], ids=str)
@pytest.mark.parametrize("name", ["plain", "temperature", "softcap"])
def test_tiles_make_whole_rows(rows, backend_device, name, outputs):
    options = TRANSFORMS[name]._replace(shift=bool(outputs))
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 700), torch.float32)
    bounds = [0, 256, 261, 700]
    stats = None
    grad = torch.empty_like(logits)
    for first, last in itertools.pairwise(bounds):
        tile = logits[..., first:last]
        running = stats
        stats = rows.row_stats(tile, labels, options, first, running, outputs)
        assert running is None or stats.logp.data_ptr() == running.logp.data_ptr()
    assert_stats_match(stats, logits, labels, options, logp_error=1e-5, outputs=outputs)
    for first, last in itertools.pairwise(bounds):
        tile, part = logits[..., first:last], grad[..., first:last]
        assert rows.row_grad(tile, labels, stats, grad_logps, options, first, out=part) is part
    assert_grad_matches(grad, logits, labels, grad_logps, options)


def test_tile_of_minus_infinity_keeps_running_statistics(rows, backend_device):
    logits, labels, _ = make_batch(backend_device, (1, 3, 600))
    logits[0, 0, :300] = -torch.inf
    logits[0, 1, 300:] = -torch.inf
    labels[:] = torch.tensor([[400, 10, 10]])
    stats = rows.row_stats(logits[..., :300], labels, PLAIN, outputs=ALL)
    stats = rows.row_stats(logits[..., 300:], labels, PLAIN, 300, stats, outputs=ALL)
    assert_stats_match(stats, logits, labels, outputs=ALL)


LAYOUTS = {
    "sliced": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 2))[:, :-2],
    "columns": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "broadcast": lambda x: x[:1].expand(x.shape),
    "vocabulary not last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("vocab", [264, 331])
def test_strided_logits(rows, backend_device, layout, vocab):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, vocab), torch.bfloat16)
    logits = layout(logits)
    stats = rows.row_stats(logits, labels, PLAIN)
    assert_stats_match(stats, logits, labels)
    assert_grad_matches(rows.row_grad(logits, labels, stats, grad_logps, PLAIN), logits, labels, grad_logps)


def test_strided_labels_and_gradients(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 300))
    labels = labels.repeat_interleave(2, dim=1)[:, ::2]
    stats = rows.row_stats(logits, labels, PLAIN)
    assert_stats_match(stats, logits, labels)
    for factor in (grad_logps.T.contiguous().T, grad_logps[:, :1].expand(2, 3), grad_logps[0, 0].expand(2, 3)):
        assert_grad_matches(rows.row_grad(logits, labels, stats, factor, PLAIN), logits, labels, factor)


def test_int32_labels(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device)
    stats = rows.row_stats(logits, labels.int(), PLAIN)
    assert_stats_match(stats, logits, labels)
    grad = rows.row_grad(logits, labels.int(), stats, grad_logps, PLAIN)
    assert_grad_matches(grad, logits, labels, grad_logps)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_are_not_read(rows, backend_device, shift, ignore_index):
    options = TokenOptions(ignore_index=ignore_index, shift=shift)
    logits, labels, grad_logps = make_batch(backend_device, (2, 4, 300))
    labels[labels == 3] = 4
    labels[0, 1] = labels[1, 3] = labels[1, 2] = ignore_index
    target = reference.labels_of_rows(labels, options)
    logits[target == ignore_index] = torch.nan
    stats = rows.row_stats(logits, labels, options, outputs=ALL)
    unscored = labels == ignore_index
    if shift:
        unscored[:, 0] = True
    assert unscored.any() and not stats.logp.isnan().any()
    for name, value in stats._asdict().items():
        assert (value[unscored] == (1 if name in ("sumexp", "sum_sq_exp") else 0)).all(), name
    grad = rows.row_grad(logits, labels, stats, grad_logps, options)
    assert (grad[target == ignore_index] == 0).all() and not grad.isnan().any()
    assert (grad[target != ignore_index] != 0).any(-1).all()


def test_labels_out_of_range_score_minus_infinity(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device, (1, 6, 300))
    labels[0] = torch.tensor([-1, 300, 2**31 - 1, -(2**31), 10**12, 7])
    stats = rows.row_stats(logits, labels, PLAIN)
    assert_stats_match(stats, logits, labels)
    assert stats.logp[0].isneginf().tolist() == [True] * 5 + [False]
    assert_grad_matches(rows.row_grad(logits, labels, stats, grad_logps, PLAIN), logits, labels, grad_logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_and_huge_logits(rows, backend_device, dtype):
    logits, labels, grad_logps = make_batch(backend_device, (1, 7, 300), dtype)
    labels[:] = 7
    logits[0, 0, 10:] = -torch.inf
    logits[0, 1, :290] = -torch.inf  # the label's among them: log-probability -inf
    logits[0, 2] = -torch.inf  # a row of nothing: NaN
    logits[0, 3] = -3e38
    logits[0, 4, 100] = 3e38
    logits[0, 5, ::2] = -3e38
    logits[0, 6] *= 1e36
    stats = rows.row_stats(logits, labels, PLAIN)
    assert_stats_match(stats, logits, labels)
    assert stats.logp[0, 1].isneginf() and stats.logp[0, 2].isnan()
    grad = rows.row_grad(logits, labels, stats, grad_logps, PLAIN)
    finite = [0, 1, 3, 4, 5, 6]
    assert_grad_matches(grad[:, finite], logits[:, finite], labels[:, finite], grad_logps[:, finite])
    assert grad[0, 2].isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 150, 299])
def test_nan_is_not_hidden(rows, backend_device, bad, column):
    logits, labels, grad_logps = make_batch(backend_device, (1, 3, 300))
    labels[:] = 7
    logits[0, 1, column] = bad
    stats = rows.row_stats(logits, labels, PLAIN)
    assert stats.logp[0].isnan().tolist() == [False, True, False]
    assert (stats.max[0, 1].isnan() if bad is torch.nan else stats.max[0, 1].isinf()).item()
    grad = rows.row_grad(logits, labels, stats, grad_logps, PLAIN)
    assert grad[0, 1].isnan().any() and not grad[0, [0, 2]].isnan().any()


def test_same_input_same_bits(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 1003), torch.bfloat16)
    runs = [rows.row_stats(logits, labels, PLAIN, outputs=ALL) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    grads = [rows.row_grad(logits, labels, runs[0], grad_logps, PLAIN) for _ in range(2)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("shape", [(0, 3, 50), (2, 0, 50), (1, 1, 50)])
def test_empty_and_single_batches(rows, backend_device, shape):
    logits = torch.randn(shape, device=backend_device)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=backend_device)
    for shift in (False, True):
        options = TokenOptions(shift=shift)
        stats = rows.row_stats(logits, labels, options)
        assert stats.logp.shape == labels.shape
        grad = rows.row_grad(logits, labels, stats, torch.ones(shape[:-1], device=backend_device), options)
        assert grad.shape == logits.shape and (not shift or (grad == 0).all())
