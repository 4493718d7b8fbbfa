"""linear_token_logprobs against the oracle: any shape, type, budget, filter, frozen part and context of autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_kernels import linear_token_logprobs

from . import contexts, oracle
from .test_fuzz_tokens import assert_close


@st.composite
def problems(draw):
    shape, width = draw(st.tuples(st.integers(1, 3), st.integers(1, 5))), draw(st.sampled_from([1, 8, 24]))
    vocab = draw(st.sampled_from([1, 2, 33, 130, 515]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    hidden = torch.randn(*shape, width, generator=generator).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * draw(st.sampled_from([0.3, 2.0]))).to(dtype)
    bias = torch.randn(vocab, generator=generator).to(dtype) if draw(st.booleans()) else None
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
    if draw(st.booleans()):
        hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    options = dict(
        temperature=draw(st.sampled_from([1.0, 0.6])),
        softcap=draw(st.sampled_from([None, 5.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.25])),
        shift=draw(st.booleans()),
    )
    needs = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    return hidden, weight, bias, labels, options, needs


def exact_results(hidden, weight, bias, labels, options, factors):
    inputs = [x.double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = inputs[0] @ inputs[1].T + (0 if bias is None else inputs[2])
    logps = oracle.token_outputs(logits, labels, **options)["logps"]
    return logps, torch.autograd.grad(logps, inputs, factors.double(), allow_unused=True)


def assert_gradient(grad, exact, dtype, scale):
    rounding = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert grad.dtype == dtype and grad.isfinite().all()
    assert (grad.double() - exact).norm() <= rounding * (exact.norm() + scale) + 1e-12


BUDGETS = [0, 2**14, "1MB", None]


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_values_and_gradients(data):
    hidden, weight, bias, labels, options, needs = data.draw(problems())
    backend = data.draw(st.sampled_from([None, "torch"]))
    factors = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    expected, expected_grads = exact_results(hidden, weight, bias, labels, options, factors)
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    wanted = [needs[0], needs[1], needs[1]][: len(inputs)]
    for x, want in zip(inputs, wanted):
        x.requires_grad_(want)
    logps = linear_token_logprobs(
        hidden, weight, labels, bias=bias, memory_budget=data.draw(st.sampled_from(BUDGETS)), backend=backend, **options
    )
    torch.testing.assert_close(
        logps.double(), expected, rtol=1e-4, atol=2e-4 if hidden.dtype != torch.float64 else 1e-9
    )
    leaves = [x for x, want in zip(inputs, wanted) if want]
    grads = torch.autograd.grad(logps, leaves, factors.to(logps.dtype))
    for grad, exact in zip(grads, [g for g, want in zip(expected_grads, wanted) if want]):
        assert_gradient(grad, exact, hidden.dtype, float(factors.norm()))


@pytest.mark.parametrize(
    "context", [name for name in contexts.QUICK if name not in ("beside another reader", "autocast")]
)
@settings(settings.get_profile("fuzz"), max_examples=max(1, settings.get_profile("fuzz").max_examples // 4))
@given(data=st.data())
def test_contexts(context, data):
    """Of the hidden states alone: the weight's gradient is `test_values_and_gradients`' matter."""
    hidden, weight, bias, labels, options, _ = data.draw(problems())
    budget = data.draw(st.sampled_from([2**14, "1MB"]))
    factors = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    expected, (expected_grad, *_) = exact_results(hidden, weight, bias, labels, options, factors)

    def f(hidden):
        return linear_token_logprobs(hidden, weight, labels, bias=bias, memory_budget=budget, **options)

    cast = factors.to(torch.promote_types(hidden.dtype, torch.float32))
    logps, grad = contexts.QUICK[context](f, hidden.requires_grad_(), cast)
    assert_close(logps, expected, 2e-4)
    if grad is not None:
        assert_gradient(grad, expected_grad, hidden.dtype, float(factors.norm()))


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_filter_stays_within_its_bound(data):
    """A position's hidden gradient is off by its dropped mass, times its factor, times the longest row, or less."""
    hidden, weight, _, labels, options, _ = data.draw(problems())
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    threshold = data.draw(st.sampled_from([0.0, 2.0**-20, 2.0**-10, 0.1, 2.0]))
    out = linear_token_logprobs(
        hidden, weight, labels, gradient_filter=threshold, memory_budget=2**14, outputs=("dropped",), **options
    )
    logps, dropped = out.logps, out.dropped
    factors = torch.randn(labels.shape, generator=torch.Generator().manual_seed(1))
    expected, (expected_grad, *_) = exact_results(hidden.detach(), weight, None, labels, options, factors)
    assert_close(logps, expected, 2e-4)
    (grad,) = torch.autograd.grad(logps, hidden, factors)
    if options["shift"]:  # the row that predicts a label stands one before it
        dropped, factors = (torch.cat((x[..., 1:], torch.zeros_like(x[..., :1])), -1) for x in (dropped, factors))
    slope = options["logit_scale"] / options["temperature"]
    bound = dropped.detach() * factors.abs() * weight.norm(dim=-1).max() * max(slope, 1)
    error = (grad.double() - expected_grad).norm(dim=-1)
    assert (error <= bound * 1.001 + 2e-5 * (1 + weight.norm(dim=-1).max() * factors.abs())).all()


@pytest.mark.slow
def test_one_dynamic_graph_serves_every_shape():
    """Compiled once for sizes that change, then right for many."""
    torch._dynamo.reset()

    def f(hidden, weight, labels):
        return linear_token_logprobs(hidden * 1, weight, labels, memory_budget=2**14)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")

    @settings(settings.get_profile("fuzz"))
    @given(data=st.data())
    def run(data):
        shape = data.draw(st.tuples(st.integers(2, 5), st.integers(2, 5)))
        width, vocab = data.draw(st.integers(2, 24)), data.draw(st.integers(2, 300))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        hidden = torch.randn(*shape, width, generator=generator).requires_grad_()
        weight = torch.randn(vocab, width, generator=generator).requires_grad_()
        labels = torch.randint(vocab, shape, generator=generator)
        labels[torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))] = -100
        factors = torch.randn(shape, generator=generator)
        expected, expected_grads = exact_results(hidden, weight, None, labels, {}, factors)
        logps = compiled(hidden, weight, labels)
        torch.testing.assert_close(logps.double(), expected, rtol=1e-4, atol=2e-4)
        for grad, exact in zip(torch.autograd.grad(logps, (hidden, weight), factors), expected_grads):
            assert_gradient(grad, exact, torch.float32, float(factors.norm()))

    run()
