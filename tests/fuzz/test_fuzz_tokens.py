"""token_logprobs against the oracle: any shape, type, strides, transform, output, backend and context of autograd."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_kernels import token_logprobs

from . import contexts, oracle

OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
STRIDES = {
    "contiguous": lambda x: x,
    "time first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "part of wider rows": lambda x: torch.cat((x, x[..., :1]), -1)[..., :-1],
    "every other position": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "odd offset": lambda x: torch.cat((x[:, :1, :1].flatten(), x.flatten()))[x.shape[0] :].view(x.shape),
}


@st.composite
def problems(draw, backend):
    """Logits `[B, T, V]` in some layout, labels, and options of `token_logprobs`."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 5)))
    vocab = draw(st.sampled_from([1, 2, 7, 33, 130, 515]))
    types = [torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend in ("torch", None))
    dtype, layout = draw(st.sampled_from(types)), draw(st.sampled_from(sorted(STRIDES)))
    scale, seed = draw(st.sampled_from([0.0, 1.0, 8.0, 60.0])), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(*shape, vocab, generator=generator)).to(dtype)
    if draw(st.booleans()):  # columns that are masked out, but never a label's
        logits[..., vocab // 2 + 1 :] = draw(st.sampled_from([-torch.inf, torch.finfo(dtype).min]))
    labels = torch.randint(vocab // 2 + 1, shape, generator=generator)
    ignore_index = draw(st.sampled_from([-100, 0, vocab + 3]))
    labels[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = ignore_index
    options = dict(
        temperature=draw(st.sampled_from([1.0, 0.6, 3.0])),
        softcap=draw(st.sampled_from([None, None, 5.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.25, 2.0])),
        ignore_index=ignore_index,
        shift=draw(st.booleans()),
    )
    label_type = draw(st.sampled_from([torch.int64, torch.int32]))
    return SimpleNamespace(logits=STRIDES[layout](logits), labels=labels.to(label_type), options=options, seed=seed)


def assert_close(value, exact, tolerance=1e-5):
    torch.testing.assert_close(value.detach().double(), exact.detach(), rtol=tolerance, atol=tolerance)


def assert_gradient(grad, exact, rounding):
    assert grad.isfinite().all()
    error, size = (grad.double() - exact).norm(), exact.norm()
    assert error <= 2 * rounding * size + 3e-6 * exact.numel() ** 0.5, f"error {error} of {size}"


def check(problem, backend, run, inplace=False):
    """Log-probabilities and their gradient in one context."""
    factors = torch.randn(problem.labels.shape, generator=torch.Generator().manual_seed(problem.seed))
    exact = problem.logits.double().requires_grad_()
    expected = oracle.token_outputs(exact, problem.labels, **problem.options)["logps"]
    (expected_grad,) = torch.autograd.grad(expected, exact, factors.double())
    x = problem.logits.detach().requires_grad_()

    def f(x):
        return token_logprobs(x * 1, problem.labels, inplace_backward=inplace, backend=backend, **problem.options)

    def direct(x):
        return token_logprobs(x, problem.labels, inplace_backward=inplace, backend=backend, **problem.options)

    chosen = direct if run is contexts.beside_another_reader else f
    value, grad = run(chosen, x, factors.to(torch.promote_types(x.dtype, torch.float32)))
    assert value.dtype == torch.promote_types(x.dtype, torch.float32)
    assert_close(value, expected)
    if grad is not None and not (run is contexts.beside_another_reader and x.dtype != torch.float64):
        assert grad.dtype == x.dtype
        assert_gradient(grad, expected_grad, ROUNDING[x.dtype])


BACKENDS = ["native", "torch"]


@pytest.mark.parametrize("context", contexts.QUICK)
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_values_and_gradients(context, data):
    backend = data.draw(st.sampled_from([*BACKENDS, None]))
    problem, inplace = data.draw(problems(backend)), data.draw(st.booleans())
    check(problem, backend, contexts.QUICK[context], inplace)


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_triton(data):
    problem, inplace = data.draw(problems("triton")), data.draw(st.booleans())
    if torch.cuda.is_available():
        problem.logits, problem.labels = problem.logits.cuda(), problem.labels.cuda()
        pytest.skip("the oracle's contexts are the CPU's")
    check(problem, "triton", contexts.QUICK[data.draw(st.sampled_from(contexts.FEW))], inplace)


@pytest.mark.slow
@pytest.mark.parametrize("context", contexts.COMPILED)
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_compiled(context, data):
    backend = data.draw(st.sampled_from(BACKENDS))
    check(data.draw(problems(backend)), backend, contexts.COMPILED[context], data.draw(st.booleans()))


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_rows_that_labels_share(data):
    """`rows=`: label n is scored against row rows[n], however many labels a row has."""
    backend = data.draw(st.sampled_from(BACKENDS))
    problem = data.draw(problems(backend))
    logits, labels = problem.logits.flatten(0, 1), problem.labels.flatten()
    options = problem.options | dict(shift=False)
    generator = torch.Generator().manual_seed(problem.seed)
    rows = torch.randint(len(logits), labels.shape, generator=generator)
    factors = torch.randn(labels.shape, generator=generator)
    exact = logits.double().requires_grad_()
    expected = oracle.token_outputs(exact[rows], labels, **options)["logps"]
    (expected_grad,) = torch.autograd.grad(expected, exact, factors.double())
    leaf = logits.detach().requires_grad_()
    inplace = data.draw(st.booleans())
    value = token_logprobs(leaf * 1, labels, rows=rows, inplace_backward=inplace, backend=backend, **options)
    assert_close(value, expected)
    (grad,) = torch.autograd.grad(value, leaf, factors.to(value.dtype))
    assert_gradient(grad, expected_grad, ROUNDING[leaf.dtype])


@pytest.mark.parametrize("shared", [False, True], ids=["rows of their own", "shared rows"])
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_outputs(shared, data):
    backend = data.draw(st.sampled_from(BACKENDS))
    problem = data.draw(problems(backend))
    labels, options = problem.labels, problem.options
    x = problem.logits.detach().requires_grad_()
    exact = problem.logits.double().requires_grad_()
    given_logits, exact_logits = x, exact
    if shared:
        labels, options = labels.flatten(), options | dict(shift=False)
        rows = torch.randint(len(labels), labels.shape, generator=torch.Generator().manual_seed(problem.seed))
        given_logits, exact_logits = x.flatten(0, 1), exact.flatten(0, 1)[rows]
        options = options | dict(rows=rows)
    expected = oracle.token_outputs(exact_logits, labels, **{k: v for k, v in options.items() if k != "rows"})
    asked = tuple(data.draw(st.lists(st.sampled_from(OUTPUTS), unique=True)))
    result = token_logprobs(given_logits, labels, outputs=asked, backend=backend, **options)
    if not asked:
        return assert_close(result, expected["logps"])
    for name in ("logps", *asked):
        value = getattr(result, name)
        if name == "mean_logit":  # of masked columns, infinite; also where the columns' sum exceeds the type
            overflows = expected[name].abs() * x.shape[-1] > torch.finfo(value.dtype).max
            wanted = torch.where(overflows, value.double(), expected[name].detach())
            assert (overflows <= value.isinf()).all()
            torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)
        elif name != "is_top1" or problem.logits.dtype == torch.float64 or options["softcap"] is None:
            assert_close(value, expected[name], 2e-5)
    if "entropy" in asked and (problem.logits.abs() < 1e300).all():  # beyond, the oracle's gradient overflows
        factors = torch.randn(labels.shape, dtype=result.logps.dtype)
        (grad,) = torch.autograd.grad([result.logps, result.entropy], x, [factors, factors.flip(-1)])
        outputs = [expected["logps"], expected["entropy"]]
        (expected_grad,) = torch.autograd.grad(outputs, exact, [factors.double(), factors.flip(-1).double()])
        assert_gradient(grad, expected_grad, ROUNDING[x.dtype])


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_properties(data):
    """What holds whatever the numbers: see the docstring of `token_logprobs`."""
    backend = data.draw(st.sampled_from(BACKENDS))
    problem = data.draw(problems(backend))
    problem.logits.requires_grad_()
    ignore_index = problem.options["ignore_index"]

    def run(logits, labels, factor=1.0):
        logps = token_logprobs(logits, labels, backend=backend, **problem.options)
        return logps, torch.autograd.grad(logps, logits, torch.full_like(logps, factor))[0]

    logps, grad = run(problem.logits, problem.labels)
    scaled = run(problem.logits, problem.labels, 4.0)[1]
    torch.testing.assert_close(scaled, 4 * grad, rtol=0, atol=1e-6 if grad.dtype == torch.float16 else 1e-36)  # linear
    if len(problem.labels) > 1:  # rows do not know of each other
        first = run(problem.logits.detach()[:1].requires_grad_(), problem.labels[:1])
        # torch's functions round other numbers at the end of memory, where its vectors are not full
        rounding = 1e-6 + torch.finfo(grad.dtype).eps if backend == "torch" else 0
        torch.testing.assert_close(first, (logps[:1], grad[:1]), rtol=10 * rounding, atol=rounding, equal_nan=True)
    order = torch.randperm(problem.logits.shape[-1], generator=torch.Generator().manual_seed(problem.seed))
    if ignore_index < 0:  # columns have no order
        renamed = torch.where(
            problem.labels == ignore_index, ignore_index, order.argsort()[problem.labels.clamp(min=0)]
        )
        permuted = run(problem.logits.detach()[..., order].requires_grad_(), renamed)
        assert_close(permuted[0], logps.double())
    exact = logps.dtype == torch.float64
    # A gradient sums to 0 over the vocabulary where nothing bends the logits.
    if problem.options["softcap"] is None and problem.logits.dtype in (torch.float32, torch.float64):
        assert grad.sum(-1).abs().max() <= (1e-10 if exact else 1e-4)
