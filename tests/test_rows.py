"""The row kernels: the definition against log_softmax and autograd, every live backend against the definition."""

import itertools

import pytest
import torch

from rpo_kernels.kernels import dispatch, reference
from rpo_kernels.kernels.interface import OUTPUT_FIELDS, ActiveColumns, EntropyGrad, TokenOptions

# Triton's interpreter computes in NumPy, which warns where exponentials of huge logits overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN = TokenOptions()
ALL = tuple(OUTPUT_FIELDS)
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
    bounds |= dict(top_before=(2e-7, 2e-7), squares=(4e-5, 0))
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


def assert_grad_matches(grad, logits, labels, grad_logps, options=PLAIN, grad_entropy=None):
    """Compare with the definition in float64: each entry to half a unit in the last place and a little more."""
    exact = reference.row_stats(logits.double().cpu(), labels.cpu(), options, outputs=("entropy",))
    entropy = None
    if grad_entropy is not None:
        entropy = EntropyGrad(exact.output("entropy", logits.shape[-1]), grad_entropy.double().cpu())
    expected = reference.row_grad(
        logits.double().cpu(), labels.cpu(), exact, grad_logps.double().cpu(), options, entropy=entropy
    )
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


@pytest.mark.parametrize("options", [TRANSFORMS["plain"], TRANSFORMS["softcap"]], ids=["plain", "softcap"])
def test_outputs(rows, backend_device, options):
    logits, labels, _ = make_batch(backend_device, (2, 2, 1003), torch.bfloat16)
    logits[0, 0, 5] = -torch.inf
    stats = rows.row_stats(logits, labels, options, outputs=ALL)
    assert_stats_match(stats, logits, labels, options, logp_error=8e-6, outputs=ALL)
    exact = reference.row_stats(logits.double().cpu(), labels.cpu(), options, outputs=ALL)
    for name in ALL:
        value = stats.output(name, 1003)
        assert value.dtype == torch.float32 and value[-1, -1] == 0
        torch.testing.assert_close(value.double().cpu(), exact.output(name, 1003), rtol=2e-6, atol=5e-6)
        alone = rows.row_stats(logits, labels, options, outputs=(name,))
        assert alone.outputs == (name,) and torch.equal(alone.output(name, 1003), value)


@pytest.mark.parametrize("vocab", [1, 8, 331])
def test_top1_gives_ties_to_the_first(rows, backend_device, vocab):
    """An equal logit before the label and after it, in the same block, another one and another tile; a larger one."""
    places = sorted({0, 7, 255, 256, 330} & set(range(vocab)))
    cases = [(label, other, 0.0) for label in places for other in places] + [(places[-1], places[0], 0.5)]
    logits = torch.full((1, len(cases), vocab), -3.0)
    labels = torch.tensor([[label for label, _, _ in cases]])
    for row, (label, other, lead) in zip(logits[0], cases):
        row[other] = 1.0 + lead
        row[label] = 1.0
    expected = (logits.argmax(-1) == labels).float()  # argmax names the first
    logits, labels = logits.to(backend_device), labels.to(backend_device)
    stats = rows.row_stats(logits, labels, PLAIN, outputs=("is_top1",))
    assert torch.equal(stats.output("is_top1", vocab).cpu(), expected)
    running = None
    for first, last in itertools.pairwise([0, *(b for b in (1, 256, 257) if b < vocab), vocab]):
        tile = logits[..., first:last]
        running = rows.row_stats(tile, labels, PLAIN, first, running, ("is_top1",))
    assert torch.equal(running.output("is_top1", vocab).cpu(), expected)


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
def test_gradient_with_the_entropy(rows, backend_device, dtype, options):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 331), dtype)
    logits[0, 1, 7] = -torch.inf
    labels[0, 1 + options.shift] = 9
    stats = rows.row_stats(logits, labels, options, outputs=("entropy",))
    factor = torch.randn(2, 3, generator=torch.Generator().manual_seed(5)).to(backend_device)
    factor[1, 0] = 0
    for slope in (factor, factor.T.contiguous().T, factor[:, :1].expand(2, 3)):
        entropy = EntropyGrad(stats.output("entropy", 331), slope)
        grad = rows.row_grad(logits, labels, stats, grad_logps, options, entropy=entropy)
        assert_grad_matches(grad, logits, labels, grad_logps, options, slope)


def test_entropy_gradient_of_a_certain_row(rows, backend_device):
    """Where one column holds nearly all of the probability, and where one holds all."""
    logits = torch.zeros(1, 3, 300)
    logits[0, 0, 5] = logits[0, 1, 9] = 15.0
    logits[0, 2, 5] = 200.0
    labels = torch.full((1, 3), 5)
    zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    x = logits.double().requires_grad_()
    logps = x.log_softmax(-1)
    (exact,) = torch.autograd.grad(-(logps.exp() * logps).sum(), x)
    logits, labels, zeros, ones = (t.to(backend_device) for t in (logits, labels, zeros, ones))
    stats = rows.row_stats(logits, labels, PLAIN, outputs=("entropy",))
    entropy = EntropyGrad(stats.output("entropy", 300), ones)
    grad = rows.row_grad(logits, labels, stats, zeros, PLAIN, entropy=entropy)
    torch.testing.assert_close(grad.double().cpu(), exact, rtol=1e-5, atol=3e-7)


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
        assert (value[unscored] == (1 if name in ("sumexp", "squares") else 0)).all(), name
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
