"""The native backend: accuracy with every instruction set, conversions, memory bounds, threads."""

import concurrent.futures
import multiprocessing
import os
import sys

import pytest
import torch

from rpo_kernels.kernels import native, reference
from rpo_kernels.kernels.interface import OUTPUT_FIELDS, ActiveColumns, TokenOptions

ALL = tuple(OUTPUT_FIELDS)
needs_native = pytest.mark.skipif(not native.available(), reason=f"native: {native.reason()}")
SETS = native.instruction_sets() if native.available() else ["none"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": TokenOptions(),
    "scaled": TokenOptions(logit_scale=0.3, temperature=0.7),
    "softcap": TokenOptions(softcap=30.0),
}


@pytest.fixture(params=SETS)
def isa(request, monkeypatch):
    """Each instruction set that this machine runs, in force for the test."""
    if not native.available():
        pytest.skip(f"native: {native.reason()}")
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_batch(shape=(2, 3, 1003), dtype=torch.float32, spread=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(shape, generator=generator)).clamp(-50, 50).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, labels, torch.randn(shape[:-1], generator=generator)


def exactly(logits, labels, grad_logps, options):
    """Statistics and gradient of the reference backend in float64."""
    stats = reference.row_stats(logits.double(), labels, options, outputs=ALL)
    return stats, reference.row_grad(logits.double(), labels, stats, grad_logps.double(), options)


# Instruction sets.


@needs_native
def test_level_in_use_is_the_best_one_or_the_one_named(monkeypatch):
    monkeypatch.delenv(native.ISA_VARIABLE, raising=False)
    assert native.info()["instruction_set"] == native.instruction_sets()[0]
    for name in native.instruction_sets():
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        assert native.info()["instruction_set"] == name


@needs_native
def test_level_that_this_machine_lacks_is_an_error(monkeypatch):
    monkeypatch.setenv(native.ISA_VARIABLE, "avx1024")
    logits, labels, _ = make_batch()
    with pytest.raises(ValueError, match=f"{native.ISA_VARIABLE}='avx1024', but this machine runs {SETS[0]}"):
        native.row_stats(logits, labels)


def rounding_of(value):
    """Half the distance between float32 numbers at `value`."""
    return torch.finfo(torch.float32).eps / 2 * value.abs()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("spread", [1.0, 15.0])
@pytest.mark.parametrize("vocab", [1003, 70001])
def test_accuracy_in_float32(isa, vocab, spread, options):
    """2e-6 in log-probability beyond rounding the value itself, 1e-6 in the gradient's norm, for |logit| <= 50."""
    logits, labels, grad_logps = make_batch((2, 4, vocab), spread=spread)
    exact, exact_grad = exactly(logits, labels, grad_logps, options)
    stats = native.row_stats(logits, labels, options, outputs=ALL)
    assert ((stats.logp - exact.logp).abs() <= 2e-6 + rounding_of(exact.logp)).all()
    assert (stats.output("entropy", 1) - exact.output("entropy", 1)).abs().max() < 5e-6
    assert (stats.sum_z - exact.sum_z).abs().max() < 1e-6 * exact.max.abs().max() * vocab
    grad = native.row_grad(logits, labels, stats, grad_logps, options)
    assert (grad - exact_grad).norm() <= 1e-6 * exact_grad.norm()


def test_accuracy_over_a_large_vocabulary(isa):
    logits, labels, grad_logps = make_batch((1, 2, 262144), spread=3.0)
    exact, exact_grad = exactly(logits, labels, grad_logps, TokenOptions())
    stats = native.row_stats(logits, labels)
    assert (stats.logp - exact.logp).abs().max() < 2e-6
    torch.testing.assert_close(stats.sumexp.double(), exact.sumexp, rtol=5e-7, atol=0)
    assert (native.row_grad(logits, labels, stats, grad_logps) - exact_grad).norm() <= 1e-6 * exact_grad.norm()


def test_maximum_anywhere(isa):
    """The running reference moves at a far larger logit wherever that comes, and at rising ones again and again."""
    vocab = 40000
    for column in (0, 300, 8191, 8192, 32767, 32768, 39999):
        logits, labels, _ = make_batch((1, 1, vocab), spread=1.0)
        logits[0, 0, column] = 45.0
        exact = reference.row_stats(logits.double(), labels, outputs=ALL)
        stats = native.row_stats(logits, labels, outputs=ALL)
        torch.testing.assert_close(stats.logp.double(), exact.logp, rtol=0, atol=3e-6)
        torch.testing.assert_close(stats.output("entropy", 1).double(), exact.output("entropy", 1), rtol=0, atol=2e-6)
    rising = torch.linspace(-50, 50, vocab).view(1, 1, vocab)
    exact = reference.row_stats(rising.double(), torch.zeros(1, 1, dtype=torch.long), outputs=ALL)
    stats = native.row_stats(rising, torch.zeros(1, 1, dtype=torch.long), outputs=ALL)
    torch.testing.assert_close(stats.sumexp.double(), exact.sumexp, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.output("entropy", 1).double(), exact.output("entropy", 1), rtol=0, atol=2e-6)


def test_exponential_over_its_whole_range(isa):
    """Probabilities from 1 down to where they leave the normal float32 numbers, one logit at a time. Their relative
    error is that of rounding the exponent: a float32 at this distance."""
    distance = torch.linspace(0, 86, 4001).view(1, -1, 1)
    logits = torch.cat((torch.zeros_like(distance), -distance), -1)
    labels = torch.ones(1, 4001, dtype=torch.long)
    stats = native.row_stats(logits, labels)
    torch.testing.assert_close(stats.logp.double(), logits.double().log_softmax(-1)[..., 1], rtol=2e-7, atol=2e-7)
    other = torch.zeros_like(labels)
    grad = native.row_grad(logits, other, native.row_stats(logits, other), torch.ones(1, 4001))
    probs = logits.double().softmax(-1)[..., 1]
    assert ((-grad[..., 1] - probs).abs() <= probs * (3e-7 + 8e-8 * distance[..., 0])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_gradient_in_another_dtype_is_rounded_once(isa, dtype, out_dtype):
    """Whatever order of columns the vector types prefer: the float32 gradient, rounded as torch rounds it."""
    logits, labels, grad_logps = make_batch((2, 2, 1003), dtype)
    stats = native.row_stats(logits, labels)
    single = native.row_grad(logits, labels, stats, grad_logps, out=torch.empty(logits.shape))
    out = torch.empty(logits.shape, dtype=out_dtype)
    assert native.row_grad(logits, labels, stats, grad_logps, out=out) is out
    assert torch.equal(out, single.to(out_dtype))


def all_values_of(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_is_read_exactly(isa, dtype):
    """Each of the 65,536 values as the only column of a row, where max is the value itself."""
    values = all_values_of(dtype)
    stats = native.row_stats(values.view(1, -1, 1), torch.zeros(1, 2**16, dtype=torch.long))
    assert torch.equal(stats.max[0].nan_to_num(7.5), values.float().nan_to_num(7.5))
    assert torch.equal(stats.max[0].isnan(), values.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradient_is_rounded_to_nearest_even(isa, dtype):
    """Every value of the type, every midpoint between two and its neighbours, and numbers too large for it."""
    values = all_values_of(dtype).float()
    values = values[values.isfinite()].sort().values
    middle = (values[1:] + values[:-1]) / 2
    upward = torch.nextafter(middle, torch.tensor(torch.inf))
    expected = torch.cat((values, middle, upward, torch.tensor([3.3e38, -3.3e38])))
    # The label's entry is -expm1(logp) grad_logps, here exactly grad_logps.
    logits = torch.zeros(1, len(expected), 1, dtype=dtype)
    labels = torch.zeros(1, len(expected), dtype=torch.long)
    stats = native.row_stats(logits, labels)._replace(logp=torch.full((1, len(expected)), -torch.inf))
    grad = native.row_grad(logits, labels, stats, expected.unsqueeze(0))
    assert torch.equal(grad.flatten(), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 17, 1000, 40001])
def test_a_nan_of_any_payload_survives(isa, dtype, column):
    bits = {torch.float32: 0x7FFFFFFF, torch.bfloat16: 0x7FFF, torch.float16: 0x7C01}[dtype]
    logits, labels, grad_logps = make_batch((1, 2, 40002), dtype)
    logits.view(torch.int32 if dtype == torch.float32 else torch.int16)[0, 1, column] = bits
    assert logits[0, 1, column].isnan()
    stats = native.row_stats(logits, labels)
    assert stats.logp.isnan().tolist() == [[False, True]]
    grad = native.row_grad(logits, labels, stats, grad_logps)
    assert grad[0, 1].isnan().all() and not grad[0, 0].isnan().any()
    upstream = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32).view(1, 2)
    clean = native.row_stats(logits[:, :1].expand(1, 2, -1), labels)
    assert native.row_grad(logits[:, :1].expand(1, 2, -1), labels, clean, upstream).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threshold", [1e-3, 0.0])
def test_active_columns(isa, dtype, threshold):
    logits, labels, grad_logps = make_batch((3, 2, 1003), dtype)
    stats = native.row_stats(logits, labels)
    single = torch.empty(logits.shape)
    mask = torch.zeros(1003, dtype=torch.uint8)
    mask[3] = 1
    native.row_grad(logits, labels, stats, grad_logps, out=single, active=ActiveColumns(mask, threshold))
    expected = (single.abs() > threshold).any(0).any(0)
    expected[3] = True
    assert torch.equal(mask.bool(), expected) and expected.any()


def test_label_column_is_active_by_its_own_gradient(isa):
    logits = torch.full((1, 1, 100), -30.0)
    logits[0, 0, 40] = 30.0
    labels = torch.tensor([[40]])
    mask = torch.zeros(100, dtype=torch.uint8)
    stats = native.row_stats(logits, labels)
    native.row_grad(logits, labels, stats, torch.ones(1, 1), active=ActiveColumns(mask, 1e-6))
    assert not mask.any()
    labels[:] = 41
    stats = native.row_stats(logits, labels)
    native.row_grad(logits, labels, stats, torch.ones(1, 1), active=ActiveColumns(mask, 1e-6))
    assert mask.nonzero().flatten().tolist() == [40, 41]


# Memory: what is not the rows' own is neither read nor written.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [*range(1, 70), 255, 257, 8193])
def test_neighbours_are_not_touched(isa, dtype, columns):
    """Rows inside a larger tensor of NaN: statistics are clean, and the gradient is written between the NaN only."""
    before, after = 3, 5
    logits, labels, grad_logps = make_batch((1, 2, columns), dtype)
    around = torch.full((1, 2, before + columns + after), torch.nan, dtype=dtype)
    inside = around[..., before : before + columns]
    inside.copy_(logits)
    stats = native.row_stats(inside, labels, outputs=ALL)
    for value, expected in zip(stats, native.row_stats(logits, labels, outputs=ALL)):
        assert torch.equal(value, expected)
    native.row_grad(inside, labels, stats, grad_logps, out=inside)
    assert torch.equal(inside, native.row_grad(logits, labels, stats, grad_logps))
    assert around[..., :before].isnan().all() and around[..., before + columns :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_results_stream_past_the_caches_to_any_address(isa, dtype):
    """Results beyond the caches take other stores, which want aligned addresses."""
    rows, columns = 5, 4_000_003 if dtype == torch.float32 else 8_000_003
    assert rows * columns * dtype.itemsize > 2**25
    piece, labels, grad_logps = make_batch((1, rows, 1003), dtype)
    logits = torch.full((1, rows, columns), -20.0, dtype=dtype)
    for start in (0, columns // 2, columns - 1003):
        logits[..., start : start + 1003] = piece
    labels[0, 0], labels[0, 1] = columns - 1, 40
    stats = native.row_stats(logits, labels)
    out = torch.full((1, rows, columns + 3), 7.0, dtype=dtype)
    streamed = native.row_grad(logits, labels, stats, grad_logps, out=out[..., 1:-2])
    assert (out[..., 0] == 7).all() and (out[..., -2:] == 7).all()
    assert torch.equal(streamed, native.row_grad(logits, labels, stats, grad_logps, out=logits))


def test_output_over_another_part_of_the_logits(isa):
    """An `out` that overlaps the logits, other than as the logits themselves, comes out as if it did not."""
    logits, labels, grad_logps = make_batch((1, 4, 1003))
    stats = native.row_stats(logits, labels)
    expected = native.row_grad(logits, labels, stats, grad_logps)
    half = logits.view(torch.bfloat16)[..., :1003]
    native.row_grad(logits, labels, stats, grad_logps, out=half)
    assert torch.equal(half, expected.to(torch.bfloat16))


@needs_native
def test_running_statistics_in_strided_tensors():
    logits, labels, _ = make_batch((2, 3, 1003))
    whole = native.row_stats(logits, labels)
    first = native.row_stats(logits[..., :500], labels)
    running = first._make(None if x is None else x.T.contiguous().T for x in first)
    returned = native.row_stats(logits[..., 500:], labels, first_column=500, running=running)
    assert returned is running and not running.logp.is_contiguous()
    torch.testing.assert_close(running.logp, whole.logp, rtol=0, atol=1e-5)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(2, 3, 5, dtype=torch.float64)), "logits must be float32, bfloat16 or float16"),
        (dict(logits=torch.zeros(2, 15)), r"logits must be \[B, T, V\] with V > 0, got \(2, 15\)"),
        (dict(logits=torch.zeros(2, 3, 0)), r"logits must be \[B, T, V\] with V > 0, got \(2, 3, 0\)"),
        (dict(labels=torch.zeros(3, 2, dtype=torch.long)), r"labels must be \(2, 3\) as logits are, got \(3, 2\)"),
    ],
    ids=["float64", "two dimensions", "no columns", "labels"],
)
def test_bad_tensors_are_named(change, message):
    given = dict(logits=torch.zeros(2, 3, 5), labels=torch.zeros(2, 3, dtype=torch.long)) | change
    with pytest.raises(ValueError, match=message):
        native.row_stats(**given)


# Threads.


@pytest.mark.parametrize("shape", [(1, 1, 300_000), (2, 9, 40_000), (3, 700, 211)])
def test_same_bits_on_any_number_of_threads(isa, threads, monkeypatch, shape):
    """On torch's pool and on threads of its own."""
    logits, labels, grad_logps = make_batch(shape, torch.bfloat16)
    labels[0, ::4] = -100
    results = []
    for pool in (native._openmp(), None):
        monkeypatch.setattr(native, "_openmp", lambda pool=pool: pool)
        for count in (1, 2, 3, 8):
            threads(count)
            stats = native.row_stats(logits, labels, outputs=ALL)
            results.append((*stats, native.row_grad(logits, labels, stats, grad_logps)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP has this entry on Linux")
def test_work_runs_on_torchs_own_pool(threads):
    """No thread comes into being for a call: those there are after one operation of torch's are all there are."""
    threads(2)
    logits, labels, _ = make_batch((1, 64, 40_000))
    logits.mul(2.0)
    native.row_stats(logits, labels)

    def count():
        return len(os.listdir("/proc/self/task"))

    before = count()
    for _ in range(20):
        logits.mul(2.0)
        native.row_stats(logits, labels)
    assert count() == before
    assert native.info()["pool"] == "torch's OpenMP pool"


@needs_native
def test_calls_from_several_threads_at_once():
    batches = [make_batch((1, 16, 20_000), seed=seed) for seed in range(8)]
    expected = [native.row_stats(x, y).logp for x, y, _ in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda b: native.row_stats(b[0], b[1]).logp, batches))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def _logps_in_child(logits, labels):
    torch.set_num_threads(1)  # as torch's own data loader workers do
    return native.row_stats(logits, labels).logp.tolist()


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_workers(threads):
    threads(2)
    logits, labels, _ = make_batch((1, 64, 20_000))
    expected = native.row_stats(logits, labels).logp
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(_logps_in_child, (logits, labels)).get(timeout=60)
    assert found == expected.tolist()
