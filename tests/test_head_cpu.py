"""The LM head on CPUs with bfloat16 units: exactness, tails, the filter, bits, what the instruction does.

Runs on the units where the CPU has them, and on their emulation wherever there is AVX-512.
"""

import math

import pytest
import torch

import reference
from head_cpu_cases import ROUNDED, SETS, make
from rpo_kernels import linear_token_logprobs, memory_plan
from rpo_kernels.head.cpu import plan as cpu_plan
from rpo_kernels.kernels import native, native_head
from rpo_kernels.kernels.interface import TokenOptions


def run(hidden, weight, labels, factors, bias=None, **options):
    """Values, dropped mass and the gradients of the tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    out = linear_token_logprobs(
        *leaves[:2], labels, bias=leaves[2] if len(leaves) > 2 else None, outputs=("dropped",), **options
    )
    return out.logps.detach(), out.dropped, torch.autograd.grad((out.logps * factors).sum(), leaves)


def expected(hidden, weight, labels, factors, bias=None, **options):
    """The same in float64 over the full logits."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if len(leaves) > 2 else 0)
    logps = reference.token_logprobs(logits, labels, **options)
    return logps.detach(), torch.autograd.grad((logps * factors).sum(), leaves)


def assert_close(got, wanted, value=5e-6):
    logps, _, gradients = got
    true_logps, true_gradients = wanted
    torch.testing.assert_close(logps.double(), true_logps, rtol=value, atol=value)
    for gradient, truth in zip(gradients, true_gradients, strict=True):
        error = (gradient.double() - truth).norm() / truth.norm().clamp(min=1e-6)
        assert error < ROUNDED, error


@pytest.mark.parametrize("budget", [0, "1GB"], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 3, 2), (33, 40, 501), (64, 64, 280), (130, 97, 215), (31, 15, 14), (97, 33, 29)]
)
def test_sizes_that_are_multiples_of_nothing(head_isa, small_cpu_tiles, sizes, budget):
    inputs = make(*sizes)
    assert_close(run(*inputs, memory_budget=budget), expected(*inputs))


@pytest.mark.parametrize(
    "options", [dict(softcap=5.0), dict(temperature=0.7, logit_scale=0.4), dict(softcap=3.0, logit_scale=2.0)]
)
@pytest.mark.parametrize("budget", [0, "1GB"], ids=["recomputed", "kept"])
def test_transforms_and_bias(head_isa, small_cpu_tiles, options, budget):
    hidden, weight, labels, factors = make(100, 50, 301, spread=6.0)
    bias = torch.randn(301).bfloat16()
    inputs = (hidden, weight, labels, factors, bias)
    assert_close(run(*inputs, memory_budget=budget, **options), expected(*inputs, **options))


@pytest.mark.parametrize("threshold", [None, 0.0, 2**-12])
def test_columns_of_minus_infinity(head_isa, small_cpu_tiles, threshold):
    """A bias may mask columns, whole tiles and all but the label."""
    hidden, weight, labels, factors = make(70, 24, 200)
    bias = torch.zeros(200).bfloat16()
    bias[40:120] = -math.inf
    labels[(labels >= 40) & (labels < 120)] = 3
    inputs = (hidden, weight, labels, factors, bias)
    assert_close(run(*inputs, memory_budget="1GB", gradient_filter=threshold), expected(*inputs))
    bias[:], bias[3] = -math.inf, 0  # nothing but the label is possible: it is certain
    logps, _, gradients = run(hidden, weight, labels.fill_(3), factors, bias, gradient_filter=threshold)
    assert not logps.any() and not any(x.any() for x in gradients)


def test_a_label_without_weight_and_a_row_of_nothing(head_isa):
    hidden, weight, labels, _ = make(40, 16, 64)
    bias = torch.zeros(64).bfloat16()
    bias[labels[0]] = -math.inf
    logps = linear_token_logprobs(hidden, weight, labels, bias=bias)
    assert logps[0] == -math.inf and torch.isfinite(logps[labels != labels[0]]).all()
    assert linear_token_logprobs(hidden, weight, labels, bias=bias - math.inf).isnan().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(head_isa, small_cpu_tiles, poison):
    hidden, weight, labels, factors = make(70, 24, 200)
    clean = run(hidden, weight, labels, factors)
    hidden[17, 3] = poison
    logps, _, (grad_hidden, _) = run(hidden, weight, labels, factors)
    others = torch.arange(70) != 17
    assert not torch.isfinite(logps[17]) and torch.equal(logps[others], clean[0][others])
    assert torch.equal(grad_hidden[others], clean[2][0][others])


@pytest.mark.parametrize("budget", [0, "1GB"], ids=["recomputed", "kept"])
@pytest.mark.parametrize("step", [1.0, 12.0, 40.0])
def test_logits_that_rise_with_every_column(head_isa, small_cpu_tiles, step, budget):
    """The reference moves in every strip, by less and by more than what float32 holds."""
    hidden, weight, labels, factors = make(70, 8, 150, spread=0.5)
    hidden[:, 0] = torch.where(torch.arange(70) % 2 == 0, 1.0, -1.0)  # rising in some rows, falling in others
    weight[:, 0] = (torch.arange(150) * step / 14).bfloat16()
    inputs = (hidden, weight, labels, factors)
    assert_close(run(*inputs, memory_budget=budget), expected(*inputs), value=2e-5)
    kept = run(*inputs, memory_budget=budget, gradient_filter=2**-20)
    assert_close(kept, expected(*inputs), value=2e-5)


@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["hidden", "weight"])
@pytest.mark.parametrize("threshold", [None, 2**-14])
def test_one_gradient_alone_has_the_bits_of_both(head_isa, small_cpu_tiles, needs, threshold):
    hidden, weight, labels, factors = make(130, 40, 200)
    _, _, both = run(hidden, weight, labels, factors, gradient_filter=threshold, memory_budget=0)
    leaves = [x.clone().requires_grad_(need) for x, need in zip((hidden, weight), needs)]
    logps = linear_token_logprobs(*leaves, labels, gradient_filter=threshold, memory_budget=0)
    (alone,) = torch.autograd.grad((logps * factors).sum(), [x for x in leaves if x.requires_grad])
    assert torch.equal(alone, both[needs.index(True)])


@pytest.mark.parametrize("threshold", [2**-8, 2**-14])
def test_the_filter_drops_what_it_says(head_isa, small_cpu_tiles, threshold):
    """A column is left out only if |dlogp / dlogit| is at most the threshold in all rows of the chunk; the mass that
    is dropped is at least what was left out, and bounds the error."""
    hidden, weight, labels, factors = make(64, 32, 700, spread=12.0)
    exact, (true_hidden, true_weight) = expected(hidden, weight, labels, factors)
    logps, dropped, (grad_hidden, grad_weight) = run(
        hidden, weight, labels, factors, gradient_filter=threshold, memory_budget=0
    )
    probabilities = (hidden.double() @ weight.double().T).softmax(-1)
    out = grad_weight.abs().sum(-1) == 0
    assert 20 < out.sum() < 650 and (probabilities[:, out] <= threshold).all()
    mass = probabilities[:, out].sum(-1)
    assert (dropped >= mass * (1 - 1e-6)).all() and (dropped <= mass * 1.02 + 1e-9).all()
    error = (grad_hidden.double() - true_hidden).norm(dim=-1)
    bound = dropped.double() * factors.abs() * weight.double().norm(dim=-1).max()
    _, _, (unfiltered, _) = run(hidden, weight, labels, factors)
    rounding = (unfiltered.double() - true_hidden).norm()
    assert error.norm() <= bound.norm() + 1.2 * rounding
    kept_error = (grad_weight.double() - true_weight)[~out].norm() / true_weight.norm()
    assert kept_error < ROUNDED
    assert_close((logps, None, []), (exact, []))


@pytest.mark.parametrize("threshold", [None, 2**-12])
def test_bits_do_not_depend_on_the_number_of_threads(head_isa, monkeypatch, threshold):
    monkeypatch.setattr(cpu_plan, "_SHAPES", ((256, 252),))
    inputs, before = make(300, 40, 1000, spread=8.0), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            logps, dropped, gradients = run(*inputs, gradient_filter=threshold, memory_budget="1MB")
            results.append((logps, dropped, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.skipif(len(SETS) < 2, reason="this CPU has no bfloat16 units to compare with")
@pytest.mark.parametrize("scale", [1.0, 2.0**-100], ids=["normal", "denormal sums"])
def test_the_emulation_gives_the_bits_of_the_units(monkeypatch, small_cpu_tiles, scale):
    hidden, weight, labels, factors = make(70, 45, 200)
    results = []
    for name in SETS:
        monkeypatch.setenv(native.ISA_VARIABLE, name)
        logps, _, gradients = run(hidden, weight, labels, factors * scale, memory_budget="1GB")
        results.append((logps, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def product(units, hidden):
    """`units^T hidden` of one column, rows [n], by the products for the weight's gradient; hidden `[n, 1]`."""
    rows = len(units)
    shapes = native_head.Buffers(rows, 1, 1)
    grad_logits, elements = (torch.zeros(shape, dtype=torch.int32) for shape in (shapes.grad_logits, shapes.elements))
    grad_logits.view(torch.bfloat16).view(14, 32)[0, :rows] = torch.tensor(units).bfloat16()
    states = torch.tensor(hidden).bfloat16()[:, None]
    native_head.pack_hidden(states, None, elements)
    none = torch.zeros(32)
    tile = native_head.Tile(
        grad_logits, grad_logits, none.int() - 1, rows, 1, 1, TokenOptions(), grad_logits=grad_logits
    )
    out = torch.zeros(1, 1)
    native_head.weight_gradient(tile, elements, native_head.LabelGain(states, none), None, out)
    return out.item()


@pytest.mark.parametrize(
    "units, hidden, result",
    [
        ([2.0**24, 0.0, 1.0, 1.0], [1.0] * 4, 2.0**24),  # each product is added and rounded alone
        ([2.0**24, 0.0, -(2.0**24), 1.0], [1.0] * 4, 0.0),  # the odd one first
        ([2.0**24, 0.0, 1.0, -(2.0**24)], [1.0] * 4, 1.0),
        ([2.0**-65, 0.0], [2.0**-65, 0.0], 0.0),  # a denormal sum
        ([2.0**-130, 0.0], [2.0**60, 0.0], 0.0),  # a denormal operand
        ([2.0**-60, 0.0], [2.0**-66, 0.0], 2.0**-126),  # the smallest that counts
    ],
)
def test_what_the_instruction_does(head_isa, units, hidden, result):
    assert product(units, hidden) == result


def test_a_weight_that_is_not_dense(head_isa):
    hidden, weight, labels, factors = make(40, 24, 100)
    dense = run(hidden, weight, labels, factors)
    wide = torch.empty(100, 48, dtype=torch.bfloat16)
    wide[:, :24] = weight
    for view in (wide[:, :24], weight.T.contiguous().T):
        leaf = view.detach().requires_grad_()
        logps = linear_token_logprobs(hidden, leaf, labels)
        (gradient,) = torch.autograd.grad((logps * factors).sum(), leaf)
        assert torch.equal(logps, dense[0]) and torch.equal(gradient, dense[2][1])


def test_no_scored_row(head_isa):
    hidden, weight, labels, factors = make(10, 24, 100)
    logps, _, gradients = run(hidden, weight, labels.fill_(-100), factors)
    assert not logps.any() and not any(x.any() for x in gradients)


def test_the_plan_is_that_of_the_walk(head_isa, monkeypatch):
    """Where the units are not in use, the float32 walk is planned and serves."""
    planned = memory_plan(1000, 640, 100_000, memory_budget="10GB")
    assert planned.tile_columns % native_head.STRIP == 0 and planned.head_gemms == 3
    monkeypatch.setenv(native.ISA_VARIABLE, "avx2")
    assert native_head.reason() == f"{native.ISA_VARIABLE}=avx2" or head_isa == "emulated"
    assert memory_plan(1000, 640, 100_000, memory_budget="10GB") != planned
    inputs = make(40, 24, 100)
    assert_close(run(*inputs), expected(*inputs))


@pytest.mark.parametrize(
    "options",
    [dict(shift=True), dict(shift=True, softcap=6.0, temperature=0.4, logit_scale=1.7)],
    ids=["plain", "capped"],
)
@pytest.mark.parametrize("budget", [0, "1GB"], ids=["recomputed", "kept"])
def test_batches_that_predict_the_next_token(head_isa, small_cpu_tiles, options, budget):
    """Labels beside the input ids, some of them ignored: row t - 1 predicts label t."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight, labels, factors = make(60, 24, 300)
    hidden, labels, factors = hidden.view(5, 12, 24), labels.view(5, 12), factors.view(5, 12)
    labels[torch.rand(5, 12, generator=generator) < 0.4] = -100
    inputs = hidden, weight, labels, factors
    assert_close(run(*inputs, memory_budget=budget, **options), expected(*inputs, **options), 2e-5)


@pytest.mark.parametrize("options", [dict(temperature=0.25), dict(logit_scale=3.0)], ids=str)
def test_the_filters_threshold_is_on_the_gradient_of_the_logits(head_isa, options):
    """A column stays out if `|dlogp / dlogit|`, the transform's slope included, is at most the threshold."""
    hidden, weight, labels, factors = make(64, 32, 700, spread=3.0)
    slope, threshold = options.get("logit_scale", 1.0) / options.get("temperature", 1.0), 2**-6
    probabilities = (slope * (hidden.double() @ weight.double().T)).softmax(-1)
    _, _, (_, grad_weight) = run(hidden, weight, labels, factors, gradient_filter=threshold, memory_budget=0, **options)
    left_out = grad_weight.abs().sum(-1) == 0
    slopes = slope * probabilities.scatter(1, labels[:, None], 1.0).amax(0)
    assert left_out.sum() > 20 and (slopes[left_out] <= threshold).all() and slopes[left_out].max() > threshold / 4
