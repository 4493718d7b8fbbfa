"""Inputs and comparisons that the tests of the row kernels share."""

import torch

from rpo_kernels.kernels import reference
from rpo_kernels.kernels.interface import OUTPUT_FIELDS, EntropyGrad, TokenOptions

PLAIN = TokenOptions()
ALL = tuple(OUTPUT_FIELDS)
TRANSFORMS = {
    "plain": PLAIN,
    "temperature": TokenOptions(temperature=0.7, logit_scale=0.3),
    "softcap": TokenOptions(softcap=20.0, logit_scale=1.5, temperature=1.3),
    "shift": TokenOptions(shift=True),
}
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_batch(device, shape=(2, 3, 300), dtype=torch.float32, seed=0):
    """Logits, labels with one position ignored, and gradients of the log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = (6 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[-1, -1] = -100
    grad_logps = torch.randn(shape[:-1], generator=generator)
    return logits.to(device), labels.to(device), grad_logps.to(device)


def assert_stats_match(stats, logits, labels, options=PLAIN, logp_error=2e-6, **kwargs):
    """Compare with the reference backend in float64, field by field."""
    expected = reference.row_stats(logits.double().cpu(), labels.cpu(), options, **kwargs)
    bounds = dict(logp=(0, logp_error), max=(2e-7, 2e-7), sumexp=(2e-5, 0), label_logit=(2e-7, 2e-7))
    # The weighted sum nears cancellation, entropy does not; the sum of logits cancels to its terms' rounding.
    bounds |= dict(sum_exp_z=(2e-5, 2e-5), sum_z=(2e-6, logits.shape[-1] * 1e-6))
    bounds |= dict(max_before_label=(2e-7, 2e-7), sum_sq_exp=(4e-5, 0))
    for name, (relative, absolute) in bounds.items():
        value, target = getattr(stats, name), getattr(expected, name)
        if target is None:
            assert value is None
            continue
        assert value.dtype == torch.float32 and value.shape == labels.shape and value.is_contiguous()
        torch.testing.assert_close(
            value.double().cpu(),
            target,
            rtol=relative,
            atol=absolute,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def assert_grad_matches(grad, logits, labels, grad_logps, options=PLAIN, grad_entropy=None):
    """Compare with the reference backend in float64: each entry to half a unit in the last place and a little more."""
    exact = reference.row_stats(logits.double().cpu(), labels.cpu(), options, outputs=("entropy",))
    entropy = None
    if grad_entropy is not None:
        entropy = EntropyGrad(exact.output("entropy", logits.shape[-1]), grad_entropy.double().cpu())
    expected = reference.row_grad(
        logits.double().cpu(), labels.cpu(), exact, grad_logps.double().cpu(), options, entropy=entropy
    )
    assert grad.shape == logits.shape
    rounding = HALF_ULP[grad.dtype] * 1.01
    smallest = 2**-24 if grad.dtype == torch.float16 else 1e-12
    error = (grad.double().cpu() - expected).abs()
    excess = error - expected.abs() * (rounding + 1e-5) - smallest - 1e-7 * expected.abs().amax()
    assert excess.amax() <= 0, f"worst entry {excess.argmax().item()}"
    assert error.norm() <= expected.norm() * (1e-6 + (0 if grad.dtype == torch.float32 else rounding))
