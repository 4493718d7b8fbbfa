"""The row kernels' outputs beside the log-probability, and the entropy's gradient, on every available backend."""

import itertools

import pytest
import torch

from row_cases import ALL, HALF_ULP, PLAIN, TRANSFORMS, assert_grad_matches, assert_stats_match, make_batch
from rpo_kernels.kernels import reference
from rpo_kernels.kernels.interface import EntropyGrad

# Triton's interpreter computes in NumPy, which warns where exponentials of huge logits overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


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
