"""Outputs beside the log-probabilities, and the entropy's gradient, on CPUs with bfloat16 units."""

import math

import pytest
import torch

import reference
from head_cpu_cases import ROUNDED, make
from rpo_kernels import linear_token_logprobs
from rpo_kernels.head.cpu import plan as cpu_plan

STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


def exact_outputs(hidden, weight, labels, bias=None, **options):
    """In float64 over all logits."""
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    z = reference.transform(logits, **options)
    logps = z.log_softmax(-1)
    p = logps.exp()
    return dict(
        logps=logps.gather(-1, labels[:, None])[:, 0],
        entropy=-torch.where(p > 0, p * logps, 0).sum(-1),
        mean_logit=z.mean(-1),
        is_top1=(z.argmax(-1) == labels).double(),
        log_sum_sq_probs=(2 * logps).logsumexp(-1),
    )


def compare(found, wanted, value=5e-6):
    for name, truth in wanted.items():
        got = getattr(found, name).double()
        torch.testing.assert_close(got, truth.detach(), rtol=value, atol=value, msg=lambda m, n=name: f"{n}: {m}")


OPTIONS = [dict(), dict(temperature=0.7, logit_scale=0.4), dict(softcap=3.0, logit_scale=2.0, temperature=1.3)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 3, 2), (33, 40, 501), (97, 33, 29)], ids=str)
def test_values_and_gradients(head_isa, small_cpu_tiles, sizes, options):
    hidden, weight, labels, factors = make(*sizes, spread=6.0)
    labels[::3] = (hidden[::3].double() @ weight.double().T).argmax(-1)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = exact_outputs(*doubles, labels, **options)
    assert exact["is_top1"].sum() > 0
    found = linear_token_logprobs(*leaves, labels, outputs=STATISTICS, **options)
    compare(found, exact)
    tilts = torch.rand(len(labels), generator=torch.Generator().manual_seed(3)) - 0.3
    for of_logps, of_entropy in [(factors, tilts), (0 * factors, tilts), (1e-6 * factors, 1e6 * tilts)]:
        got, wanted = (
            torch.autograd.grad(
                (of["logps"] * of_logps).sum() + (of["entropy"] * of_entropy).sum(), of_leaves, retain_graph=True
            )
            for of, of_leaves in ((found._asdict(), leaves), (exact, doubles))
        )
        for a, b in zip(got, wanted, strict=True):
            assert (a.double() - b).norm() < ROUNDED * b.norm().clamp(min=1e-6)


@pytest.mark.parametrize("threshold", [None, 2**-14])
@pytest.mark.parametrize("budget", [0, "1GB"], ids=["recomputed", "kept"])
def test_outputs_that_are_only_logged_change_no_bit(head_isa, small_cpu_tiles, budget, threshold):
    hidden, weight, labels, factors = make(130, 40, 215, spread=6.0)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    options = dict(memory_budget=budget, gradient_filter=threshold)
    plain = linear_token_logprobs(*leaves, labels, **options)
    found = linear_token_logprobs(*leaves, labels, outputs=STATISTICS, entropy_grad=False, **options)
    assert not found.entropy.requires_grad
    compare(found, exact_outputs(hidden, weight, labels))
    for a, b in zip(
        [found.logps, *torch.autograd.grad((found.logps * factors).sum(), leaves)],
        [plain, *torch.autograd.grad((plain * factors).sum(), leaves)],
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("step", [12.0, 40.0])
def test_logits_that_rise_with_every_column(head_isa, small_cpu_tiles, step):
    """The reference moves in every strip, and with it what was added up before."""
    hidden, weight, labels, _ = make(70, 8, 150, spread=0.5)
    hidden[:, 0] = torch.where(torch.arange(70) % 2 == 0, 1.0, -1.0)
    weight[:, 0] = (torch.arange(150) * step / 14).bfloat16()
    compare(
        linear_token_logprobs(hidden, weight, labels, outputs=STATISTICS),
        exact_outputs(hidden, weight, labels),
        value=4e-5,
    )


def test_of_equal_logits_the_first_is_the_largest(head_isa, small_cpu_tiles):
    hidden, weight, _, _ = make(6, 24, 130)
    weight[:] = weight[0] / 64
    weight[[20, 60, 100]] = (hidden[0] / 8).bfloat16()  # equal, in three tiles and the same
    weight[101] = weight[100]
    labels = torch.tensor([20, 60, 100, 101, 20, 60])
    found = linear_token_logprobs(hidden[:1].expand(6, -1), weight, labels, outputs=["is_top1"])
    assert found.is_top1.tolist() == [1, 0, 0, 0, 1, 0]


def test_masked_columns_and_certain_rows(head_isa, small_cpu_tiles):
    hidden, weight, labels, _ = make(40, 16, 90)
    bias = torch.zeros(90).bfloat16()
    bias[10:] = -math.inf
    labels %= 10
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    found = linear_token_logprobs(*leaves, labels, bias=bias, outputs=STATISTICS)
    wanted = exact_outputs(hidden, weight, labels, bias)
    assert wanted.pop("mean_logit").eq(-math.inf).all() and found.mean_logit.eq(-math.inf).all()
    compare(found, wanted)
    gradients = torch.autograd.grad(found.entropy.sum(), leaves)
    assert all(torch.isfinite(x).all() for x in gradients) and not gradients[1][10:].any()
    bias[1:] = -math.inf  # one column is left: certain for its label, impossible for the others
    found = linear_token_logprobs(*leaves, labels, bias=bias, outputs=STATISTICS)
    assert (found.entropy < 2e-7).all() and torch.equal(found.is_top1 == 1, labels == 0)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(found.entropy.sum(), leaves))


def test_bits_do_not_depend_on_the_number_of_threads(head_isa, monkeypatch):
    monkeypatch.setattr(cpu_plan, "_SHAPES", ((256, 252),))
    hidden, weight, labels, factors = make(300, 40, 1000, spread=8.0)
    leaves, before, results = [x.requires_grad_() for x in (hidden, weight)], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found = linear_token_logprobs(*leaves, labels, outputs=STATISTICS)
            gradients = torch.autograd.grad((found.logps * factors + found.entropy).sum(), leaves)
            results.append((*found[:5], *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
