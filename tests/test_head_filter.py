"""The gradient filter: what it leaves out is bounded, and what it saves."""

import pytest
import torch

from head_cases import OPTIONS, compare, count_products, error, expected, factors_for, sparse
from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import operator, plan
from rpo_kernels.kernels import reference
from rpo_kernels.kernels.interface import ActiveColumns, RowStats, TokenOptions
from rpo_kernels.kernels.softmax import TileSoftmax

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


@pytest.mark.parametrize("bad", [-3, 1500, 10**12, -(2**40)])
@pytest.mark.parametrize("gradient_filter", [None, 0.0, 2**-9])
def test_labels_out_of_range_where_they_are_not_checked(backend, backend_device, gradient_filter, bad, monkeypatch):
    """On an accelerator: probability 0, all other rows and columns as they would be, no memory out of bounds."""
    monkeypatch.setattr(operator, "check_label_range", lambda *_: None)
    hidden, weight, bias, labels = sparse(backend_device)
    labels[1, 3] = bad
    factors = factors_for(labels)
    logits = hidden.detach().double() @ weight.detach().double().T + bias.detach().double()
    exact = logits.requires_grad_()
    inside = labels.clamp(0, 1499) == labels
    known = torch.where(inside, labels, 0)
    logps = exact.log_softmax(-1).gather(-1, known[..., None])[..., 0]
    # The label's column, which is not there, has no part in the gradient.
    parts = torch.where(inside, logps, -exact.logsumexp(-1))
    (grad,) = torch.autograd.grad((torch.where(labels == -100, 0, parts) * factors).sum(), exact)
    got = linear_token_logprobs(
        hidden, weight, labels, bias=bias, gradient_filter=gradient_filter, memory_budget="100KB", backend=backend
    )
    assert got[1, 3] == -torch.inf
    others = torch.where(inside, got, 0)
    torch.testing.assert_close(others.double(), torch.where(inside, logps, 0).detach(), rtol=2e-6, atol=5e-6)
    grads = torch.autograd.grad(got, (hidden, weight, bias), factors)
    wanted = grad @ weight.double(), grad.flatten(0, 1).T @ hidden.double().flatten(0, 1), grad.sum((0, 1))
    for mine, truth in zip(grads, wanted):
        assert error(mine, truth) < (1e-5 if not gradient_filter else 0.2)


@pytest.mark.parametrize("first_column", [0, 256, 512])
def test_columns_are_marked_by_their_bound(first_column):
    """The softmax over the columns so far, with the label's term once, wherever that stands."""
    generator = torch.Generator().manual_seed(first_column)
    z = 3 * torch.randn(40, 768, generator=generator, dtype=torch.float64)
    labels = torch.randint(768, (40,), generator=generator)
    columns, rows = slice(first_column, first_column + 256), torch.arange(40)
    label_logits = z[rows, labels]
    before = z[:, :first_column].logsumexp(-1) if first_column else torch.full((40,), -torch.inf).double()
    stats = RowStats(*(torch.zeros(1, 40, dtype=torch.float64) for _ in range(4)))
    stats.max[0], stats.label_logit[0] = label_logits, label_logits
    if first_column:
        stats.max[0], stats.sumexp[0] = before, 1.0
    active = ActiveColumns(torch.zeros(256, dtype=torch.uint8), 2.0**-7)
    arguments = (stats, first_column, TokenOptions(), label_logits, active, torch.zeros(40, dtype=torch.float64))
    TileSoftmax(reference).mark(z[:, columns].clone(), labels, *arguments)
    inside = (labels >= first_column) & (labels < first_column + 256)
    total = torch.logaddexp(before, z[:, columns].logsumexp(-1))
    total = torch.where(inside | (labels < first_column), total, torch.logaddexp(total, label_logits))
    probability = (z[:, columns] - total[:, None]).exp()
    probability[rows[inside], labels[inside] - first_column] = 0  # labels' columns are marked beforehand
    wanted = (probability > active.threshold).any(0)
    near = ((probability / active.threshold - 1).abs() < 1e-9).any(0)
    assert torch.equal((active.mask == 1) | near, wanted | near) and 0 < wanted.sum() < 256
