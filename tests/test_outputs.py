"""`outputs=` of token_logprobs and linear_token_logprobs against float64, and what a call without any returns."""

import pytest
import torch

from rpo_kernels import TokenOutputs, token_logprobs

# Triton's interpreter computes in NumPy, which warns where exponentials overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
OPTIONS = [
    dict(),
    dict(shift=True),
    dict(temperature=0.7, logit_scale=0.6),
    dict(temperature=1.3, softcap=7.0, logit_scale=2.0, shift=True),
]


def make(shape=(2, 5), vocab=301, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(*shape, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[0, 3] = -100
    labels[:, 2] = logits[:, 1].argmax(-1)  # with `shift` the label is the most likely one
    labels[:, 1] = logits[:, 1].argmax(-1)  # and without
    return logits.to(device).requires_grad_(), labels.to(device)


def expected(logits, labels, temperature=1.0, softcap=None, logit_scale=1.0, shift=False):
    """All outputs in float64, the first two differentiable."""
    z = logits.double() * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    first = int(shift)
    z = z[:, : labels.shape[1] - first]
    target = labels[:, first:]
    scored = target != -100
    target = target.masked_fill(~scored, 0)
    all_logps = z.log_softmax(-1)
    values = dict(
        logps=all_logps.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        entropy=-(all_logps.exp() * all_logps).sum(-1),
        mean_logit=z.mean(-1),
        is_top1=(z.argmax(-1) == target).double(),
        log_sum_sq_probs=(2 * all_logps).logsumexp(-1),
    )
    return {k: torch.nn.functional.pad(v.masked_fill(~scored, 0), (first, 0)) for k, v in values.items()}


def slopes(labels):
    generator = torch.Generator().manual_seed(7)
    return [(torch.rand(labels.shape, generator=generator) - 0.3).to(labels.device) for _ in range(2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_values_and_gradients(backend, backend_device, dtype, options):
    logits, labels = make(dtype=dtype, device=backend_device)
    exact = expected(logits, labels, **options)
    out = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend, **options)
    assert isinstance(out, TokenOutputs) and out.dropped is None
    assert out.is_top1.sum() >= 2
    for name, value in exact.items():
        found = getattr(out, name)
        assert found.dtype == torch.float32 and found.shape == labels.shape
        assert found.requires_grad == (name in ("logps", "entropy"))
        torch.testing.assert_close(found.double(), value, rtol=3e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    c, e = slopes(labels)
    (grad,) = torch.autograd.grad((out.logps * c).sum() + (out.entropy * e).sum(), logits)
    (exact_grad,) = torch.autograd.grad((exact["logps"] * c).sum() + (exact["entropy"] * e).sum(), logits)
    # Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds.
    tolerance = 3e-6 if dtype == torch.float32 else 8e-3 if backend == "triton" else 4e-3
    assert (grad.double() - exact_grad.double()).norm() <= tolerance * exact_grad.double().norm()


@pytest.mark.parametrize("asked", [("entropy",), ("is_top1", "mean_logit"), ("log_sum_sq_probs", "entropy")], ids=str)
def test_only_what_is_asked_for_comes(backend, backend_device, asked):
    logits, labels = make(device=backend_device)
    everything = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend)
    out = token_logprobs(logits, labels, outputs=asked, backend=backend)
    for name in TokenOutputs._fields:
        value = getattr(out, name)
        if name in ("logps", *asked):
            assert torch.equal(value, getattr(everything, name)), name
        else:
            assert value is None, name


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_gradient_of_the_entropy_alone(backend, backend_device, inplace_backward):
    leaf, labels = make(device=backend_device)
    exact = expected(leaf, labels)["entropy"].sum()
    (exact_grad,) = torch.autograd.grad(exact, leaf)
    logits = leaf * 1
    out = token_logprobs(logits, labels, outputs=["entropy"], inplace_backward=inplace_backward, backend=backend)
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=1e-4, atol=1e-6)
    assert (grad.data_ptr() == logits.data_ptr()) == inplace_backward


def test_entropy_that_is_only_logged_changes_no_bit_of_the_gradient(backend, backend_device):
    logits, labels = make(device=backend_device)
    (plain,) = torch.autograd.grad(token_logprobs(logits, labels, backend=backend).sum(), logits)
    out = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend)
    assert torch.equal(torch.autograd.grad(out.logps.sum(), logits)[0], plain)


@pytest.mark.parametrize("shape", [(5,), (0,), (0, 3), (2, 2, 3)], ids=str)
def test_shapes(backend, backend_device, shape):
    logits = torch.randn(*shape, 40, device=backend_device, requires_grad=True)
    labels = torch.randint(40, shape, device=backend_device)
    out = token_logprobs(logits, labels, outputs=(*STATISTICS, "dropped"), backend=backend)
    assert all(value.shape == shape for value in out)
    assert out.dropped.eq(0).all()  # nothing is ever left out of logits that are there
    (out.logps.sum() + out.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_float64_and_gradcheck():
    logits, labels = make((2, 4), vocab=7, dtype=torch.float64)
    for options in OPTIONS:
        out = token_logprobs(logits, labels, outputs=STATISTICS, **options)
        for name, value in expected(logits, labels, **options).items():
            torch.testing.assert_close(getattr(out, name), value, rtol=0, atol=1e-12)
        torch.autograd.gradcheck(lambda x, o=options: token_logprobs(x, labels, outputs=["entropy"], **o)[:2], logits)


def test_masked_vocabulary_and_certain_rows(backend, backend_device):
    """-inf logits weigh nothing in entropy and its gradient; a certain row has entropy 0 and a finite gradient."""
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))
    logits[0, :, 10:] = -torch.inf
    logits[0, 1, 3] = 1e4
    logits, labels = logits.to(backend_device).requires_grad_(), torch.tensor([[3, 3, 20]], device=backend_device)
    out = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend)
    p = logits.detach().double().softmax(-1)
    exact = -torch.xlogy(p, p).sum(-1)
    torch.testing.assert_close(out.entropy.double(), exact, rtol=1e-6, atol=1e-6)
    assert out.is_top1[0, 1:].tolist() == [1, 0] and out.logps[0, 2] == -torch.inf
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    exact_grad = -p * (torch.where(p > 0, p.log(), 0) + exact.unsqueeze(-1))
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", ["entropy", ("entropy", "perplexity"), ("logps",)])
def test_unknown_outputs_are_named(outputs):
    logits, labels = make()
    with pytest.raises(ValueError, match=r"outputs must be a tuple of names among .*, got .*(entropy|logps)"):
        token_logprobs(logits, labels, outputs=outputs)


def test_compiled_without_graph_breaks():
    logits, labels = make(vocab=64)
    logits = logits.detach()

    def loss(x):
        out = token_logprobs(x, labels, outputs=("entropy", "is_top1"))
        return out.logps.sum() - 0.1 * out.entropy.sum() + out.is_top1.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
