"""The row kernels: the definition against log_softmax and autograd, every live backend against the definition."""

import itertools

import pytest
import torch

from rpo_kernels.kernels import dispatch, reference
from rpo_kernels.kernels.interface import ActiveColumns, TokenOptions

# Triton's interpreter computes in NumPy, which warns where exponentials of huge logits overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = TokenOptions()
TRANSFORMS = {
    "plain": PLAIN,
    "temperature": TokenOptions(temperature=0.7, logit_scale=0.3),
    "softcap": TokenOptions(softcap=20.0, logit_scale=1.5, temperature=1.3),
    "shift": TokenOptions(shift=True),
}
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def rows(backend, backend_device, monkeypatch):
    """The backend's module; Triton's blocks are made small, so that small rows have several, and a partial one."""
    module = dispatch.rows(torch.empty(1, 1, 1, device=backend_device), backend)
    if backend == "triton":
        monkeypatch.setattr("rpo_kernels.kernels.triton.tiling.LANES", 32)
        if backend_device == "cpu":
            monkeypatch.setitem(HALF_ULP, torch.bfloat16, 2**-7)  # the interpreter truncates to bfloat16
    return module


def make_batch(device, shape=(2, 3, 300), dtype=torch.float32, seed=0):
    """Logits, labels with one position ignored, and gradients of the log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = (6 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[-1, -1] = -100
    grad_logps = torch.randn(shape[:-1], generator=generator)
    return logits.to(device), labels.to(device), grad_logps.to(device)


def assert_stats_match(stats, logits, labels, options=PLAIN, logp_error=2e-6, **kwargs):
    """Compare with the definition in float64, field by field."""
    expected = reference.row_stats(logits.double().cpu(), labels.cpu(), options, **kwargs)
    bounds = dict(logp=(0, logp_error), max=(2e-7, 2e-7), sumexp=(2e-5, 0), label_logit=(2e-7, 2e-7))
    # The weighted sum nears cancellation, entropy does not; the sum of logits cancels to its terms' rounding.
    bounds |= dict(weighted=(2e-5, 2e-5), total=(2e-6, logits.shape[-1] * 1e-6))
    for name, (relative, absolute) in bounds.items():
        value, target = getattr(stats, name), getattr(expected, name)
        if target is None:
            assert value is None
            continue
        assert value.dtype == torch.float32 and value.shape == labels.shape and value.is_contiguous()
        torch.testing.assert_close(
            value.double().cpu(),
            target,
            rtol=relative,
            atol=absolute,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_grad_matches(grad, logits, labels, grad_logps, options=PLAIN):
    """Compare with the definition in float64: each entry to half a unit in the last place and a little more."""
    exact = reference.row_stats(logits.double().cpu(), labels.cpu(), options)
    expected = reference.row_grad(logits.double().cpu(), labels.cpu(), exact, grad_logps.double().cpu(), options)
    assert grad.shape == logits.shape
    rounding = HALF_ULP[grad.dtype] * 1.01
    smallest = 2**-24 if grad.dtype == torch.float16 else 1e-12
    error = (grad.double().cpu() - expected).abs()
    excess = error - expected.abs() * (rounding + 1e-5) - smallest - 1e-7 * expected.abs().amax()
    assert excess.amax() <= 0, f"worst entry {excess.argmax().item()}"
    assert error.norm() <= expected.norm() * (1e-6 + (0 if grad.dtype == torch.float32 else rounding))


# The definition.


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_definition_is_log_softmax_and_its_gradient(options):
    logits, labels, grad_logps = make_batch("cpu", dtype=torch.float64)
    grad_logps = grad_logps.double()
    x = logits.requires_grad_()
    z = x * options.logit_scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    all_logps = (z / options.temperature).log_softmax(-1)
    first = int(options.shift)
    scored = labels[:, first:] != options.ignore_index
    target = labels[:, first:].masked_fill(~scored, 0)
    picked = all_logps[:, : labels.shape[1] - first].gather(-1, target.unsqueeze(-1)).squeeze(-1)
    logps = torch.nn.functional.pad(picked.masked_fill(~scored, 0), (first, 0))
    logps.backward(grad_logps)

    stats = reference.row_stats(logits.detach(), labels, options, extras=True)
    torch.testing.assert_close(stats.logp, logps.detach(), rtol=0, atol=1e-12)
    grad = reference.row_grad(logits.detach(), labels, stats, grad_logps, options)
    torch.testing.assert_close(grad, x.grad, rtol=0, atol=1e-13)
    if not options.shift:
        entropy = -(all_logps.exp() * all_logps).sum(-1).masked_fill(~scored, 0)
        torch.testing.assert_close(stats.entropy, entropy.detach(), rtol=0, atol=1e-12)
        best = (labels == all_logps.argmax(-1)) | ~scored
        assert (stats.is_argmax == best).all()


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


@pytest.mark.parametrize("options", [TRANSFORMS["plain"], TRANSFORMS["softcap"]], ids=["plain", "softcap"])
def test_extras(rows, backend_device, options):
    logits, labels, _ = make_batch(backend_device, (2, 2, 1003), torch.bfloat16)
    logits[0, 0, 5] = -torch.inf
    stats = rows.row_stats(logits, labels, options, extras=True)
    assert_stats_match(stats, logits, labels, options, logp_error=8e-6, extras=True)
    exact = reference.row_stats(logits.double().cpu(), labels.cpu(), options, extras=True)
    torch.testing.assert_close(stats.entropy.double().cpu(), exact.entropy, rtol=0, atol=5e-6)
    assert (stats.is_argmax.cpu() == exact.is_argmax).all()


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("name", ["plain", "temperature", "softcap"])
def test_tiles_make_whole_rows(rows, backend_device, name, extras):
    options = TRANSFORMS[name]._replace(shift=extras)
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 700), torch.float32)
    bounds = [0, 256, 261, 700]
    stats = None
    grad = torch.empty_like(logits)
    for first, last in itertools.pairwise(bounds):
        tile = logits[..., first:last]
        running = stats
        stats = rows.row_stats(tile, labels, options, first, running, extras)
        assert running is None or stats.logp.data_ptr() == running.logp.data_ptr()
    assert_stats_match(stats, logits, labels, options, logp_error=1e-5, extras=extras)
    for first, last in itertools.pairwise(bounds):
        tile, part = logits[..., first:last], grad[..., first:last]
        assert rows.row_grad(tile, labels, stats, grad_logps, options, first, out=part) is part
    assert_grad_matches(grad, logits, labels, grad_logps, options)


def test_tile_of_minus_infinity_keeps_running_statistics(rows, backend_device):
    logits, labels, _ = make_batch(backend_device, (1, 3, 600))
    logits[0, 0, :300] = -torch.inf
    logits[0, 1, 300:] = -torch.inf
    labels[:] = torch.tensor([[400, 10, 10]])
    stats = rows.row_stats(logits[..., :300], labels, PLAIN, extras=True)
    stats = rows.row_stats(logits[..., 300:], labels, PLAIN, 300, stats, extras=True)
    assert_stats_match(stats, logits, labels, extras=True)


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
    stats = rows.row_stats(logits, labels, options, extras=True)
    unscored = labels == ignore_index
    if shift:
        unscored[:, 0] = True
    assert unscored.any() and not stats.logp.isnan().any()
    for name, value in stats._asdict().items():
        assert (value[unscored] == (1 if name == "sumexp" else 0)).all(), name
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


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradient_in_place(rows, backend_device, options):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 331), torch.bfloat16)
    stats = rows.row_stats(logits, labels, options)
    apart = rows.row_grad(logits, labels, stats, grad_logps, options)
    assert rows.row_grad(logits, labels, stats, grad_logps, options, out=logits) is logits
    assert torch.equal(logits, apart)


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("out_dtype", HALF_ULP, ids=str)
def test_gradient_in_another_dtype(rows, backend_device, dtype, out_dtype):
    logits, labels, grad_logps = make_batch(backend_device, (2, 2, 331), dtype)
    stats = rows.row_stats(logits, labels, PLAIN)
    out = torch.empty_like(logits, dtype=out_dtype)
    assert rows.row_grad(logits, labels, stats, grad_logps, PLAIN, out=out) is out
    assert_grad_matches(out, logits, labels, grad_logps)


@pytest.mark.parametrize("name", ["plain", "softcap", "shift"])
def test_active_columns(rows, backend_device, name):
    options, threshold = TRANSFORMS[name], 2**-7
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 331), torch.bfloat16)
    stats = rows.row_stats(logits, labels, options)
    exact = reference.row_stats(logits.double(), labels, options)
    expected = reference.row_grad(logits.double(), labels, exact, grad_logps.double(), options)
    largest = expected.abs().flatten(0, 1).amax(0)
    assert ((largest - threshold).abs() > 1e-6 * threshold).all()  # none so near that rounding decides
    mask = torch.zeros(331, dtype=torch.uint8, device=backend_device)
    mask[:10] = 1  # marked by an earlier call
    apart = rows.row_grad(logits, labels, stats, grad_logps, options)
    grad = rows.row_grad(logits, labels, stats, grad_logps, options, active=ActiveColumns(mask, threshold))
    assert torch.equal(grad, apart)
    assert (mask[:10] == 1).all() and torch.equal(mask[10:], (largest > threshold)[10:].to(torch.uint8))
    assert 0 < mask[10:].sum() < 200


def test_nan_counts_as_active(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device, (1, 2, 331), torch.float32)
    stats = rows.row_stats(logits, labels, PLAIN)
    logits[0, 0, [0, 7, 200, 330]] = torch.nan
    mask = torch.zeros(331, dtype=torch.uint8, device=backend_device)
    rows.row_grad(logits, labels, stats, grad_logps, PLAIN, active=ActiveColumns(mask, torch.inf))
    assert mask.nonzero().flatten().tolist() == [0, 7, 200, 330]


def test_gradient_of_a_certain_label(rows, backend_device):
    """1 - p keeps its relative accuracy where p is near 1."""
    logits = torch.zeros(1, 2, 300, device=backend_device)
    labels = torch.tensor([[5, 299]], device=backend_device)
    logits[0, 0, 5] = logits[0, 1, 299] = 15.0
    stats = rows.row_stats(logits, labels, PLAIN)
    grad = rows.row_grad(logits, labels, stats, torch.ones(1, 2, device=backend_device), PLAIN)
    own = grad.double().gather(-1, labels.unsqueeze(-1)).flatten().cpu()
    odds = 299 * torch.tensor(-15.0, dtype=torch.float64).exp()
    torch.testing.assert_close(own, (odds / (1 + odds)).expand(2), rtol=1e-2, atol=0)


def test_same_input_same_bits(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 1003), torch.bfloat16)
    runs = [rows.row_stats(logits, labels, PLAIN, extras=True) for _ in range(2)]
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
