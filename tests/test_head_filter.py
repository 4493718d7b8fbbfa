"""The gradient filter: what it leaves out is bounded, and what it saves."""

import pytest
import torch

from head_cases import OPTIONS, compare, count_products, error, expected, factors_for, sparse
from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import plan

pytestmark = pytest.mark.usefixtures("small_tiles")
INTERPRETED = False


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threshold", [2**-6, 2**-9, 2**-12])
def test_filter_error_is_bounded_by_the_dropped_mass(backend, backend_device, threshold, options):
    hidden, weight, bias, labels = sparse(backend_device)
    options = {**options, "ignore_index": -100}
    factors = factors_for(labels)
    values, exact = expected(hidden, weight, bias, labels, factors, **options)
    for budget in (None, 0, "100KB"):
        outputs = linear_token_logprobs(
            *(hidden, weight, labels),
            bias=bias,
            gradient_filter=threshold,
            memory_budget=budget,
            outputs=("dropped",),
            backend=backend,
            **options,
        )
        logps, dropped = outputs.logps, outputs.dropped
        torch.testing.assert_close(logps.double(), values, rtol=2e-6, atol=5e-6)
        gradients = torch.autograd.grad((logps * factors).sum(), (hidden, weight, bias))
        at_hidden = torch.cat((dropped[:, 1:], dropped[:, :1] * 0), 1) if options.get("shift") else dropped
        c = torch.cat((factors[:, 1:], factors[:, :1] * 0), 1) if options.get("shift") else factors
        bound = at_hidden * c.abs() * weight.norm(dim=1).max()
        assert ((gradients[0] - exact[0]).norm(dim=-1) <= bound + 1e-5).all()
        # Of the weight's rows, each lacks at most the dropped columns' part of every position.
        missing = (dropped * factors.abs()).sum()
        assert (gradients[1] - exact[1]).norm(dim=-1).sum() <= missing * hidden.norm(dim=-1).max() + 1e-3
        assert (gradients[2] - exact[2]).abs().sum() <= missing + 1e-4
        if threshold == 2**-6:
            assert 0 < dropped.max() < 1 and error(gradients[0], exact[0]) > 1e-5  # something was left out


def test_dropped_mass_is_the_softmax_on_the_columns_left_out(backend, backend_device, monkeypatch):
    monkeypatch.setattr(
        plan, "_ACCELERATOR_SHAPES", ((64, 256), (64, 256))
    )  # one chunk: a column is out for all rows or for none
    hidden, weight, bias, labels = sparse(backend_device)
    outputs = linear_token_logprobs(
        hidden, weight, labels, bias=bias, gradient_filter=2**-7, outputs=("dropped",), backend=backend
    )
    logps, dropped = outputs.logps, outputs.dropped
    grad_weight, grad_bias = torch.autograd.grad((logps * factors_for(labels)).sum(), (weight, bias))
    out = (grad_weight == 0).all(-1)
    assert torch.equal(out, grad_bias == 0) and 0 < out.sum() < len(out)
    softmax = (hidden.double() @ weight.double().T + bias.double()).softmax(-1)
    mass = torch.where(labels != -100, softmax[..., out].sum(-1), 0)
    if backend == "triton":  # a row counts what it did not mark itself, of which others may have marked some
        assert (dropped >= mass * (1 - 1e-5)).all() and (dropped <= 1 + 1e-5).all()
    else:
        torch.testing.assert_close(dropped.double(), mass, rtol=1e-5, atol=1e-7)
    assert (softmax[labels != -100][:, out] <= 2**-7 * 1.001).all()


def test_filter_of_zero_is_exact(backend, backend_device):
    for budget in (None, 0):
        compare(*sparse(backend_device, torch.bfloat16), backend, gradient_filter=0.0, memory_budget=budget)


@pytest.mark.parametrize("frozen", [False, True])
def test_filter_saves_products(backend, backend_device, monkeypatch, frozen):
    hidden, weight, bias, labels = sparse(backend_device)
    weight.requires_grad_(not frozen)
    done = count_products(monkeypatch)
    one = int((labels != -100).sum()) * 24 * 1500
    wanted = (hidden,) if frozen else (hidden, weight)
    for scale, least, most in ((1, 0.001, 0.2), (0, 1, 1)):  # of all columns, when the head is all zeros
        logps = linear_token_logprobs(
            hidden, weight * scale, labels, bias=bias.detach() * scale, gradient_filter=2**-7 * scale, backend=backend
        )
        assert sum(done) == one
        done.clear()
        torch.autograd.grad(logps.sum(), wanted)
        assert least <= sum(done) / one / (2 if frozen else 3) <= most
        done.clear()
