"""token_logprobs on every backend against float64 log_softmax."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from rpo_kernels import token_logprobs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def make(shape=(2, 5), vocab=301, dtype=torch.float32, device="cpu", seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(*shape, vocab, generator=generator)).to(dtype).to(device)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = -100
    return logits.requires_grad_(), labels.to(device)


def compare(logits, labels, backend, inplace_backward=False, **options):
    """Values and gradient of the backend against the reference; returns the log-probabilities."""
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(9)).to(logits.device) - 0.3
    exact = reference.token_logprobs(logits, labels, **options)
    (exact_grad,) = torch.autograd.grad((exact * weight).sum(), logits)
    source = logits.detach().clone() if inplace_backward else logits.detach()
    leaf = source.requires_grad_()
    logps = token_logprobs(leaf * 1, labels, inplace_backward=inplace_backward, backend=backend, **options)
    (grad,) = torch.autograd.grad((logps * weight).sum(), leaf)
    assert logps.shape == labels.shape and grad.dtype == logits.dtype
    dtype = logits.dtype
    torch.testing.assert_close(logps.double(), exact.detach(), rtol=2e-6, atol=TOLERANCE[dtype])
    # Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds.
    cut = 2 if backend == "triton" and leaf.device.type == "cpu" and dtype == torch.bfloat16 else 1
    # Of a probability near 1, whose gradient is near 0, float32 statistics know 6e-8.
    slope = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    floor = 0 if dtype == torch.float64 else 1e-7 * slope * labels.numel() ** 0.5
    error, size = (grad.double() - exact_grad.double()).norm(), exact_grad.double().norm()
    assert error <= cut * GRADIENT[dtype] * size + floor
    return logps


OPTIONS = [
    dict(),
    dict(temperature=0.7),
    dict(softcap=5.0),
    dict(logit_scale=0.25),
    dict(shift=True),
    dict(temperature=1.3, softcap=7.0, logit_scale=2.0, shift=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend, backend_device, dtype, options):
    compare(*make(dtype=dtype, device=backend_device), backend, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_exact_to_rounding(options):
    logits, labels = make(dtype=torch.float64)
    compare(logits, labels, "torch", **options)
    logits, labels = make(dtype=torch.float64, vocab=7)
    torch.autograd.gradcheck(lambda x: token_logprobs(x, labels, **options), (logits,))


@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (2, 0), (0, 3), (3, 1), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_shapes(backend, backend_device, shape, shift):
    compare(*make(shape, device=backend_device), backend, shift=shift)


@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 5),
    vocab=st.integers(1, 700),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    shift=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_size(backend, backend_device, rows, length, vocab, scale, shift, seed):
    compare(*make((rows, length), vocab, device=backend_device, seed=seed, scale=scale), backend, shift=shift)


def test_inplace_backward_writes_into_the_logits(backend, backend_device):
    for options in OPTIONS:
        compare(*make(device=backend_device), backend, inplace_backward=True, **options)
    leaf, labels = make(device=backend_device)
    logits = leaf * 1
    (grad,) = torch.autograd.grad(token_logprobs(logits, labels, inplace_backward=True, backend=backend).sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()


def test_inplace_backward_of_logits_whose_vocabulary_is_not_contiguous(backend, backend_device):
    leaf, labels = make((3, 6), 130, device=backend_device)
    logits = (leaf * 1).transpose(1, 2).contiguous().transpose(1, 2)
    (expected,) = torch.autograd.grad(token_logprobs(logits, labels, backend=backend).sum(), logits)
    (grad,) = torch.autograd.grad(token_logprobs(logits, labels, inplace_backward=True, backend=backend).sum(), logits)
    assert torch.equal(grad, expected) and grad.data_ptr() == logits.data_ptr()


def test_inplace_backward_bumps_the_version(backend, backend_device):
    leaf, labels = make(device=backend_device)
    logits = leaf * 1
    other = (logits * logits).sum()  # saves the logits for its own backward, which runs after ours
    logps = token_logprobs(logits, labels, inplace_backward=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logps.sum() + other).backward()
    logits = leaf * 1
    loss = token_logprobs(logits, labels, inplace_backward=True, backend=backend).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_strided_logits_are_taken_as_they_come(backend, backend_device):
    base, labels = make((3, 6), 130, device=backend_device)
    for view, which in [
        (lambda x: x[:, :-1], lambda y: y[:, 1:]),
        (lambda x: x[::2, 1:4], lambda y: y[::2, 1:4]),
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
        (lambda x: x[..., 3:120], lambda y: y.clamp(max=100)),
        (lambda x: x[..., ::2], lambda y: y.clamp(max=60)),
        (lambda x: x[:1].expand(3, 6, 130), lambda y: y),
    ]:
        compare(view(base.detach()).requires_grad_(), which(labels), backend)


def test_shift_is_scoring_the_next_token(backend, backend_device):
    logits, labels = make((3, 6), device=backend_device)
    shifted = token_logprobs(logits, labels, shift=True, backend=backend)
    assert shifted[:, 0].eq(0).all()
    assert torch.equal(shifted[:, 1:], token_logprobs(logits[:, :-1], labels[:, 1:], backend=backend))


def test_ignored_rows_are_zero_and_never_read(backend, backend_device):
    leaf, labels = make(device=backend_device)
    with torch.no_grad():
        leaf[labels == -100] = torch.nan
    logps = token_logprobs(leaf, labels, backend=backend)
    logps.sum().backward()
    assert logps[labels == -100].eq(0).all() and leaf.grad[labels == -100].eq(0).all()
    assert logps.isfinite().all() and leaf.grad.isfinite().all()


def test_all_ignored(backend, backend_device):
    leaf, labels = make(device=backend_device)
    logps = token_logprobs(leaf, labels.fill_(-100), backend=backend)
    logps.sum().backward()
    assert logps.eq(0).all() and leaf.grad.eq(0).all()


def test_other_ignore_index(backend, backend_device):
    logits, labels = make(device=backend_device)
    compare(logits, labels.masked_fill(labels == -100, 0), backend, ignore_index=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(backend, backend_device, dtype):
    logits, labels = make((1, 8), 700, dtype, backend_device)
    labels = torch.arange(8, device=backend_device).unsqueeze(0) * 50
    big = torch.finfo(dtype).max
    with torch.no_grad():
        logits[0, 0, :] = -torch.inf
        logits[0, 0, :5] = 1.0  # most of the vocabulary masked, the label among the rest
        logits[0, 1, 50] = -torch.inf  # an impossible label
        logits[0, 2] += 1e4
        logits[0, 3, 7:] = -big  # Hugging Face's way to mask
        logits[0, 3, 150] = 2.0
        logits[0, 4, 200] = big / 4
        logits[0, 5, 250] = 88.0
        logits[0, 6] = 3.0
    exact = reference.token_logprobs(logits, labels)
    logps = token_logprobs(logits, labels, backend=backend)
    torch.testing.assert_close(logps.double(), exact.detach(), rtol=2e-6, atol=3e-6)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    (exact_grad,) = torch.autograd.grad(exact.sum(), logits)
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=1e-2, atol=GRADIENT[dtype])


def test_rows_without_a_distribution_are_nan(backend, backend_device):
    logits, labels = make((1, 4), device=backend_device)
    labels = labels.clamp(min=0)
    with torch.no_grad():
        logits[0, 0] = -torch.inf
        logits[0, 1, 17] = torch.inf
        logits[0, 2, 17] = torch.nan
    logps = token_logprobs(logits, labels, backend=backend)
    assert logps[0, :3].isnan().all() and logps[0, 3].isfinite()
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert grad[0, :3].isnan().any(-1).all() and grad[0, 3].isfinite().all()


def test_same_input_same_bits(backend, backend_device):
    logits, labels = make((4, 7), 1000, torch.bfloat16, backend_device)
    first, second = (token_logprobs(logits, labels, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (first, second)))


def test_int32_labels(backend, backend_device):
    logits, labels = make(device=backend_device)
    assert torch.equal(
        token_logprobs(logits, labels, backend=backend), token_logprobs(logits, labels.int(), backend=backend)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:, :-1], {}), "labels must have the shape"),
        (lambda x, y: (x.long(), y, {}), "logits must be floating"),
        (lambda x, y: (x, y.float(), {}), "labels must be int64"),
        (lambda x, y: (x[0, 0], y[0, 0], {}), "labels must have at least one dimension"),
        (lambda x, y: (x[..., :0], y, {}), "vocabulary of at least one"),
        (lambda x, y: (x, y, dict(temperature=0.0)), "temperature"),
        (lambda x, y: (x, y, dict(softcap=-1.0)), "softcap"),
        (lambda x, y: (x, y, dict(logit_scale=float("nan"))), "logit_scale"),
        (lambda x, y: (x, y, dict(backend="cuda")), "backend must be one of"),
        (lambda x, y: (x.double(), y, dict(backend="native")), "native"),
        (lambda x, y: (x[:1].expand(x.shape), y, dict(inplace_backward=True)), "rows do not share memory"),
        (lambda x, y: (x, y.to("meta"), {}), "labels must be on the logits' device"),
    ],
)
def test_bad_input_is_named(change, message):
    logits, labels, options = change(*make())
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, labels, **options)


@pytest.mark.parametrize("bad", [-1, 301, 10**12, -(2**40)])
def test_labels_out_of_range(backend, backend_device, bad, monkeypatch):
    logits, labels = make(device=backend_device)
    labels[0, 0] = bad
    monkeypatch.setenv("RPO_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 301\)"):
        token_logprobs(logits, labels, backend=backend)
