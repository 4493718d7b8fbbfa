"""The row kernels' gradient in place, in other dtypes, with marks of active columns, on every available backend."""

import pytest
import torch

from row_cases import HALF_ULP, PLAIN, TRANSFORMS, assert_grad_matches, make_batch
from rpo_kernels.kernels import reference
from rpo_kernels.kernels.interface import ActiveColumns

# Triton's interpreter computes in NumPy, which warns where exponentials of huge logits overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradient_in_place(rows, backend_device, options):
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 331), torch.bfloat16)
    stats = rows.row_stats(logits, labels, options)
    apart = rows.row_grad(logits, labels, stats, grad_logps, options)
    assert rows.row_grad(logits, labels, stats, grad_logps, options, out=logits) is logits
    assert torch.equal(logits, apart)


@pytest.mark.parametrize("dtype", HALF_ULP, ids=str)
@pytest.mark.parametrize("out_dtype", HALF_ULP, ids=str)
def test_gradient_in_another_dtype(rows, backend_device, dtype, out_dtype):
    logits, labels, grad_logps = make_batch(backend_device, (2, 2, 331), dtype)
    stats = rows.row_stats(logits, labels, PLAIN)
    out = torch.empty_like(logits, dtype=out_dtype)
    assert rows.row_grad(logits, labels, stats, grad_logps, PLAIN, out=out) is out
    assert_grad_matches(out, logits, labels, grad_logps)


@pytest.mark.parametrize("name", ["plain", "softcap", "shift"])
def test_active_columns(rows, backend_device, name):
    options, threshold = TRANSFORMS[name], 2**-7
    logits, labels, grad_logps = make_batch(backend_device, (2, 3, 331), torch.bfloat16)
    stats = rows.row_stats(logits, labels, options)
    exact = reference.row_stats(logits.double(), labels, options)
    expected = reference.row_grad(logits.double(), labels, exact, grad_logps.double(), options)
    largest = expected.abs().flatten(0, 1).amax(0)
    assert ((largest - threshold).abs() > 1e-6 * threshold).all()  # none so near that rounding decides
    mask = torch.zeros(331, dtype=torch.uint8, device=backend_device)
    mask[:10] = 1  # marked by an earlier call
    apart = rows.row_grad(logits, labels, stats, grad_logps, options)
    grad = rows.row_grad(logits, labels, stats, grad_logps, options, active=ActiveColumns(mask, threshold))
    assert torch.equal(grad, apart)
    assert (mask[:10] == 1).all() and torch.equal(mask[10:], (largest > threshold)[10:].to(torch.uint8))
    assert 0 < mask[10:].sum() < 200


def test_nan_counts_as_active(rows, backend_device):
    logits, labels, grad_logps = make_batch(backend_device, (1, 2, 331), torch.float32)
    stats = rows.row_stats(logits, labels, PLAIN)
    logits[0, 0, [0, 7, 200, 330]] = torch.nan
    mask = torch.zeros(331, dtype=torch.uint8, device=backend_device)
    rows.row_grad(logits, labels, stats, grad_logps, PLAIN, active=ActiveColumns(mask, torch.inf))
    assert mask.nonzero().flatten().tolist() == [0, 7, 200, 330]


def test_gradient_of_a_certain_label(rows, backend_device):
    """1 - p keeps its relative accuracy where p is near 1."""
    logits = torch.zeros(1, 2, 300, device=backend_device)
    labels = torch.tensor([[5, 299]], device=backend_device)
    logits[0, 0, 5] = logits[0, 1, 299] = 15.0
    stats = rows.row_stats(logits, labels, PLAIN)
    grad = rows.row_grad(logits, labels, stats, torch.ones(1, 2, device=backend_device), PLAIN)
    own = grad.double().gather(-1, labels.unsqueeze(-1)).flatten().cpu()
    odds = 299 * torch.tensor(-15.0, dtype=torch.float64).exp()
    torch.testing.assert_close(own, (odds / (1 + odds)).expand(2), rtol=1e-2, atol=0)
