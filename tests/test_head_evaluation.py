"""The LM head without gradients in one product: against float64, its plan, and when it is chosen."""

import pytest
import torch

from head_cases import make
from rpo_kernels import linear_token_logprobs, memory_plan
from rpo_kernels.head import evaluation, evaluation_plan
from rpo_kernels.kernels import reference
from rpo_kernels.kernels.interface import RowStats, TokenOptions

TOLERANCE = dict(rtol=3e-6, atol=1e-5)
NO_LABEL = -(2**31)


@pytest.fixture
def fused(available_backend, monkeypatch):
    """The device on which the fused product serves, chosen whatever the model says."""
    backend, device = available_backend("triton")
    monkeypatch.setattr(evaluation_plan, "pays", lambda *_: backend == "triton")
    return device


def blocks(*shape):
    from rpo_kernels.kernels.triton.product import Blocks

    return Blocks(*shape, warps=4, stages=2)


def statistics(hidden, weight, bias, labels, options, shape=(32, 64, 32)):
    from rpo_kernels.kernels.triton.product import product_stats

    stats = RowStats.empty(labels[None], ())
    product_stats(hidden, weight, bias, labels, options, stats, blocks(*shape))
    return stats


def inputs(rows, width, vocab, dtype, device, seed=0):
    """Hidden states, weight, bias with columns at -inf, and labels in the first, the last, and no column."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(vocab, width, device=device).to(dtype)
    bias = torch.randn(vocab, device=device).to(dtype)
    bias[3:20] = -torch.inf
    labels = torch.randint(20, vocab, (rows,), device=device)
    labels[:5] = torch.tensor([0, vocab - 1, vocab, -7, 5], device=device)  # two out of range, one impossible
    return hidden, weight, bias, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [TokenOptions(ignore_index=NO_LABEL), TokenOptions(0.7, 8.0, 1.3, NO_LABEL)], ids=["plain", "softcap"]
)
@pytest.mark.parametrize("rows, width, vocab", [(37, 40, 301), (70, 24, 65)])
def test_statistics_against_float64(available_backend, dtype, options, rows, width, vocab):
    """Odd rows and vocabularies, widths that are no multiple of a block's, blocks that do not fill a group."""
    _, device = available_backend("triton")
    hidden, weight, bias, labels = inputs(rows, width, vocab, dtype, device)
    for offset in (bias, None):
        stats = statistics(hidden, weight, offset, labels, options)
        logits = hidden.double() @ weight.double().T + (0 if offset is None else offset.double())
        exact = reference.row_stats(logits[None], labels[None], options)
        for name in ("logp", "label_logit"):
            torch.testing.assert_close(getattr(stats, name).double(), getattr(exact, name), **TOLERANCE)
        lse, wanted = (x.max.double() + x.sumexp.double().log() for x in (stats, exact))
        torch.testing.assert_close(lse, wanted, **TOLERANCE)


def test_rows_without_a_finite_logit_and_maxima_far_apart(available_backend):
    _, device = available_backend("triton")
    hidden, weight, _, labels = inputs(37, 24, 257, torch.float32, device)
    labels = labels.clamp(0, 256)
    options = TokenOptions(ignore_index=NO_LABEL)
    nothing = torch.full((257,), -torch.inf, device=device)
    stats = statistics(hidden, weight, nothing, labels, options)
    assert (stats.sumexp == 0).all() and (stats.max == -torch.inf).all()
    rising = torch.arange(257, device=device) // 64 * 200.0  # from block to block, past what exp holds
    for bias in (rising, -rising):
        stats = statistics(hidden, weight, bias, labels, options)
        exact = reference.row_stats((hidden.double() @ weight.double().T + bias.double())[None], labels[None], options)
        torch.testing.assert_close(stats.logp.double(), exact.logp, rtol=3e-6, atol=2e-4)
    hidden[3, 0] = torch.nan
    stats = statistics(hidden, weight, None, labels, options)
    assert stats.logp[0].isnan().nonzero().flatten().tolist() == [3]


def test_bits_do_not_depend_on_the_number_of_programs(available_backend, monkeypatch):
    _, device = available_backend("triton")
    from rpo_kernels.kernels.triton import product

    arguments = (*inputs(70, 24, 301, torch.bfloat16, device), TokenOptions(ignore_index=NO_LABEL))
    found = []
    for programs in (1, 3, 64):
        monkeypatch.setattr(product, "processors", lambda _, programs=programs: programs)
        found.append(statistics(*arguments))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:4], other[:4]))


@pytest.mark.parametrize("options", [dict(), dict(shift=True, temperature=0.7, logit_scale=0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_takes_it_without_gradients(fused, monkeypatch, dtype, options):
    """Values against the two-kernel way, chunk by chunk; with gradients or outputs that way serves."""
    monkeypatch.setattr(evaluation_plan, "CHUNK_ROWS", 16)
    hidden, weight, bias, labels = make((3, 12), 24, 301, dtype, fused, bias=True)
    served = []
    walk = evaluation.forward
    monkeypatch.setattr(evaluation, "forward", lambda *args: served.append(1) or walk(*args))
    kept = linear_token_logprobs(hidden, weight, labels, bias=bias, backend="triton", **options)
    with torch.no_grad():
        assert not served
        outputs = linear_token_logprobs(
            hidden, weight, labels, bias=bias, outputs=("entropy",), backend="triton", **options
        )
        assert not served
        logps = linear_token_logprobs(hidden, weight, labels, bias=bias, backend="triton", **options)
        assert served
        del served[:]
        other = weight.T.contiguous().T  # rows that are not contiguous
        strided = linear_token_logprobs(hidden, other, labels, bias=bias, backend="triton", **options)
        assert not served
    assert logps.dtype == torch.float32 and not logps.requires_grad
    for way in (kept.detach(), outputs.logps, strided):
        torch.testing.assert_close(logps, way, **TOLERANCE)
    empty = torch.full_like(labels, -100)
    with torch.no_grad():
        assert (linear_token_logprobs(hidden, weight, empty, backend="triton") == 0).all()


def test_where_the_model_says_that_it_pays(monkeypatch):
    monkeypatch.setattr(evaluation_plan, "_capability", lambda device: 9)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert evaluation_plan.pays(cuda, torch.bfloat16, 640, False)
    for call in (
        (cuda, torch.bfloat16, 4096, False),
        (cuda, torch.bfloat16, 640, True),
        (cuda, torch.float32, 640, False),
        (cpu, torch.bfloat16, 640, False),
    ):
        assert not evaluation_plan.pays(*call)
    at = dict(width=640, capped=False)
    assert evaluation_plan.serves(cuda, torch.bfloat16, None, aligned=True, **at)
    assert not evaluation_plan.serves(cuda, torch.bfloat16, None, aligned=False, **at)
    assert not evaluation_plan.serves(cuda, torch.bfloat16, "torch", aligned=True, **at)
    monkeypatch.setattr(evaluation_plan, "_capability", lambda device: 8)
    assert not evaluation_plan.pays(cuda, torch.bfloat16, 640, False)


def test_plan(monkeypatch):
    monkeypatch.setattr(evaluation_plan, "_capability", lambda device: 9)
    sizes = dict(rows=65536, hidden=640, vocab=262144, device="cuda", needs_hidden=False, needs_weight=False)
    roomy, tight = memory_plan(**sizes, memory_budget="10GB"), memory_plan(**sizes, memory_budget="64MB")
    assert (roomy.chunk_rows, roomy.tiles, roomy.head_gemms) == (8192, 1, 1)
    assert tight.chunk_rows < 8192 and tight.peak_bytes <= 64 * 10**6 < roomy.peak_bytes
    assert memory_plan(**sizes, memory_budget="10GB", weight_aligned=False).tiles > 1
    assert memory_plan(**sizes, memory_budget="10GB", softcap=30.0).tiles > 1


def test_predicted_peak_against_counted_allocations(fused):
    from test_plan import peak_of

    if fused != "cpu":
        pytest.skip("counts the CPU's allocations")
    rows, positions, width, vocab = 160, 200, 64, 2500
    hidden, weight = torch.randn(positions, width).bfloat16(), torch.randn(vocab, width).bfloat16()
    labels = torch.randint(vocab, (positions,))
    labels[torch.randperm(positions)[rows:]] = -100
    chosen = memory_plan(
        rows, width, vocab, needs_hidden=False, needs_weight=False, positions=positions, backend="triton"
    )
    logps, measured, _ = peak_of(lambda: linear_token_logprobs(hidden, weight, labels, backend="triton"))
    assert measured - logps.nbytes <= chosen.peak_bytes <= 1.1 * (measured - logps.nbytes)
