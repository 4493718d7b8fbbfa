"""Logits of which one float32 step outweighs a softmax: exact where their transform is exact to a step."""

import pytest
import torch

from rpo_kernels import linear_token_logprobs, token_logprobs

TEMPERATURES = [dict(temperature=3.0), dict(temperature=0.7, logit_scale=0.3), dict(temperature=0.3, softcap=30.0)]
SIZES = [1e9, 1e15, 1e37]


def exact_logps(x, label, logit_scale=1.0, temperature=1.0, softcap=None):
    z = x * logit_scale if softcap is None else softcap * (x * logit_scale / softcap).tanh()
    return (z / temperature).log_softmax(-1)[..., label]


def compare(logits, label, backend, **options):
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    labels = torch.full(logits.shape[:-1], label)
    logps = token_logprobs(leaf, labels, backend=backend, **options)
    expected = exact_logps(exact, label, **options)
    torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-6, atol=2e-6)
    (grad,), (wanted,) = (torch.autograd.grad(y.sum(), x) for y, x in ((logps, leaf), (expected, exact)))
    torch.testing.assert_close(grad.double(), wanted, rtol=4e-3, atol=2e-6)


@pytest.mark.parametrize("options", TEMPERATURES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_one_huge_logit(size, options, backend):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    logits[0, 77], logits[0, 3] = size, -size
    for dtype in (torch.float32, torch.bfloat16):
        for label in (77, 0, 3):
            compare(logits.to(dtype), label, backend, **options)


@pytest.mark.parametrize("options", TEMPERATURES[:2], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows_of_huge_logits(size, options, backend):
    generator = torch.Generator().manual_seed(1)
    logits = size * torch.randn(4, 300, generator=generator)
    logits[2] = -logits[2].abs()
    logits[3] = size  # all alike
    for dtype in (torch.float32, torch.bfloat16):  # in bfloat16 some are equal
        for label in (int(logits[0].argmax()), 5):
            compare(logits.to(dtype), label, backend, **options)


@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_logits_that_differ_by_one_step(sign, size, name, available_backend):
    """Divided by 3 some of them are the same float; the softmax tells them apart all the same."""
    backend, _ = available_backend(name)
    top = torch.tensor(sign * size)
    for _ in range(3):
        below = top.nextafter(torch.tensor(-torch.inf))
        logits = (sign * size * (1.1 if sign < 0 else 0.9) * torch.ones(2, 300)).index_fill_(1, torch.tensor([40]), 0)
        logits[:, 40] = below
        logits[:, 7], logits[1, 211] = top, top
        for label in (7, 40):
            compare(logits, label, backend, temperature=3.0)
        top = below


def test_huge_logits_of_long_rows():
    """The native backend cuts rows into segments."""
    logits = 1e12 * torch.randn(2, 70_001, generator=torch.Generator().manual_seed(2))
    for label in (int(logits[0].argmax()), 69_000):
        compare(logits, label, "native", temperature=3.0)
    logits[0, 66_000] = logits[0, 12] = logits[0].max() * 2  # equal ones in two of them
    compare(logits, 12, "native", temperature=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, "1MB"])
def test_huge_logits_of_a_head(dtype, budget, backend, small_tiles):
    """Products far above the rest, kept and recomputed: certain tokens, with finite gradients."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(20, 16, generator=generator).to(dtype)
    weight = torch.randn(600, 16, generator=generator).to(dtype)
    hidden[:, 0], weight[:, 0] = 2.0**20, 0
    weight[torch.arange(20) * 7, 0] = (2.0 ** torch.linspace(12, 30, 20).round()).to(dtype)
    labels = torch.arange(20) * 7
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = (exact[0] @ exact[1].T / 3).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    logps = linear_token_logprobs(*leaves, labels, temperature=3.0, memory_budget=budget, backend=backend)
    torch.testing.assert_close(logps.double(), expected, rtol=2e-6, atol=1e-6)
    grads = torch.autograd.grad(logps.sum(), leaves)
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), exact)):
        assert (grad.double() - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize("size", [1e3, 1e4, 1e6])
def test_labels_far_below_the_rest_of_a_head(size, backend):
    """Their log-probability is as finite as their logit, though their probability is no number of any type."""
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (4, 600))
    hidden[:, 0], weight[:, 0], weight[7, 0] = size, 0, 1
    expected = (hidden.double() @ weight.double().T).log_softmax(-1)[:, 9]
    logps = linear_token_logprobs(hidden, weight, torch.full((4,), 9), backend=backend)
    torch.testing.assert_close(logps.double(), expected, rtol=2e-6, atol=1e-5)
